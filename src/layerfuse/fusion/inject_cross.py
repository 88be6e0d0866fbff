"""Gated cross-attention from the text and image positions to a projected layer, in LLM blocks.

    V_0 = P_base(h_base) replaces the image tokens;   V_k = P_k(h_k) is the memory of block l(k)
    add(x) = tanh(a)·CA(N(x), V_k), then, with `mlp`, + tanh(b)·SwiGLU(N'(x + ...))
    pre       x <- x + add(x), then the block
    post      y = x + SA(N1 x);  y <- y + add(y);  then y + MLP(N2 y)
    parallel  y = x + SA(N1 x) + tanh(a)·CA(N1 x, V_k);  then y + MLP(N2 y)

Internal modular fusion (I_M) of "Multi-Layer Visual Feature Fusion in Multimodal LLMs"
(2503.06063), after Flamingo (2204.14198). The gates a and b start at zero: the LLM starts as it is.
An image is seen by its own tokens and by all text after it; text before it and rows without it get
exactly zero. Keys and values are projected once per image and carried through decoding.
"""

from typing import Literal

from pydantic import PositiveInt
from torch import Tensor, nn

from layerfuse.fusion.base import BaseLayerConfig, Fusion, Shapes, options, register
from layerfuse.fusion.blocks import GatedCrossAttention, GatedMLP, Projector
from layerfuse.fusion.injector import PLAIN, SANDWICH, Placement, llm_blocks
from layerfuse.fusion.visual import Fused, Guidance, Layout, Placed
from layerfuse.vision.features import Features


@options
class InjectCrossConfig(BaseLayerConfig):
    """Options of `inject_cross`."""

    placement: Placement = "proportional"
    """The LLM block of each selected layer, as in `inject_add`; each needs a block of its own."""
    position: Literal["pre", "post", "parallel"] = "pre"
    """Where in the block: before it, between its self-attention and its MLP, or beside its
    self-attention. `post` and `parallel` know blocks built as llama's or gemma3's."""
    mlp: bool = False
    """Follow the cross-attention with a gated SwiGLU MLP of the LLM's inner width, as the release
    does. Not with `parallel`."""
    heads: PositiveInt | None = None
    """Attention heads; they must divide the LLM's width. Default: the LLM's own number."""
    released_residual: bool = False
    """Take the residual of the public release, for study: the addition enters only the
    self-attention, and the normalised stream replaces the residual one, so that the LLM changes
    even with closed gates, in rows with images. What sees which image stays as here; the release
    always has `mlp`. Only with `pre`, in blocks built as llama's."""


@register("inject_cross", InjectCrossConfig)
class InjectCross(Fusion):
    """A projector, keys, values and a gated cross-attention per injected layer."""

    kind = "internal modular"
    paper = "I_M, Flamingo"
    published = (3, 18)
    attends = True

    def __init__(self, config: InjectCrossConfig, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        self.position = _position(config, shapes)
        blocks = llm_blocks(config.placement, shapes)
        if len(set(blocks)) < len(blocks):
            raise ValueError(
                f"layers {list(shapes.selection.layers)} would share LLM blocks {list(blocks)}; "
                "each needs its own: select fewer layers or give `placement` as a list"
            )
        width, heads = shapes.llm_width, config.heads or shapes.llm_heads
        if heads is None or width % heads:
            raise ValueError(f"{heads} heads do not divide the LLM's width {width}: set a divisor")
        own_norm = self.position in ("pre", "post")
        self.projector = Projector(shapes.vision_width, width)
        self.projectors = nn.ModuleList(Projector(shapes.vision_width, width) for _ in blocks)
        self.attention = nn.ModuleDict(
            {str(b): GatedCrossAttention(width, heads, norm=own_norm) for b in blocks}
        )
        inner = shapes.llm_ffn or 4 * width
        self.mlp = nn.ModuleDict(
            {str(b): GatedMLP(width, inner, norm=own_norm) for b in blocks if config.mlp}
        )

    def forward(
        self,
        features: Features,
        instruction: Tensor | None = None,
        guidance: Guidance = "instruction",
    ) -> Fused:
        layers = self.normalized(features, self.shapes.selection.layers)
        memory: dict[int, Tensor] = {}
        parts = zip(self.attention.items(), self.projectors, layers, strict=True)
        for (block, attend), project, x in parts:
            memory[int(block)] = attend.keys_values(project(x))  # type: ignore[operator]
        return Fused(self.projector(self.normalized(features, [self.config.base])[0]), memory)

    def arrange(self, memory: dict[int, Tensor], layout: Layout) -> dict[int, Tensor]:
        """Images side by side in their row, zero behind the last: (rows, images · N, *)."""
        by_row = {}
        for block, images in memory.items():
            empty = images.new_zeros(len(layout.mask), layout.most, *images.shape[1:])
            by_row[block] = empty.index_put((layout.row, layout.place), images).flatten(1, 2)
        return by_row

    def addition(self, block: int, hidden: Tensor, visual: Placed) -> Tensor:
        memory, seen = visual.memory[block], visual.seen
        if len(memory) != len(hidden):
            raise ValueError(
                f"the visual memory has {len(memory)} rows and the LLM's input {len(hidden)}"
            )
        tokens = memory.shape[1] // seen.shape[-1]
        attend = self.attention[str(block)]
        x = hidden.to(attend.get_parameter("query.weight").dtype)
        added = attend(x, memory, seen.repeat_interleave(tokens, dim=-1))
        if self.config.mlp:
            sees = seen.any(dim=-1, keepdim=True)
            added = added + self.mlp[str(block)](x + added).masked_fill(~sees, 0)
        return added.to(hidden.dtype)


def _position(config: InjectCrossConfig, shapes: Shapes) -> str:
    """Where the block is changed. Raises ValueError for options that contradict each other,
    and where the position is not defined for that family of LLM."""
    if config.mlp and config.position == "parallel":
        raise ValueError("position 'parallel' has no place for `mlp`; valid with 'pre' and 'post'")
    if config.released_residual and config.position != "pre":
        raise ValueError("released_residual is defined for position 'pre' only")
    known = (*PLAIN, *SANDWICH) if config.position in ("post", "parallel") else PLAIN
    position = "released" if config.released_residual else config.position
    if position != "pre" and shapes.llm_family not in known:
        raise ValueError(
            f"position {position!r} is defined for LLMs of the types {', '.join(known)}, not "
            f"{shapes.llm_family!r}; position 'pre' works with every LLM"
        )
    return position
