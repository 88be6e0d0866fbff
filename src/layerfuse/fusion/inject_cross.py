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

from typing import Literal, cast

from pydantic import PositiveInt
from torch import Tensor, nn

from layerfuse.errors import LayerfuseError
from layerfuse.fusion.base import BaseLayerConfig, Fusion, Shapes, options, register
from layerfuse.fusion.blocks import GatedCrossAttention, GatedMLP, Projector
from layerfuse.fusion.flat_projector import FlatProjector
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
class InjectCross(Fusion[InjectCrossConfig]):
    """A projector, keys, values and a gated cross-attention per injected layer."""

    kind = "internal modular"
    paper = "I_M, Flamingo"
    summary = "gated cross-attention from the LLM to each layer: before, inside or beside its block"
    published = (3, 18)
    attends = True

    def __init__(self, config: InjectCrossConfig, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        self.position = _position(config, shapes)
        blocks = llm_blocks(config.placement, shapes)
        if len(set(blocks)) < len(blocks):
            raise LayerfuseError(
                f"layers {list(shapes.selection.layers)} would share LLM blocks {list(blocks)}; "
                "each needs its own: select fewer layers or give `placement` as a list"
            )
        width = shapes.llm_width
        heads = config.heads or shapes.llm_heads
        if heads is None or width % heads:
            raise LayerfuseError(
                f"{heads} heads do not divide the LLM's width {width}: set a divisor"
            )
        # the other positions read x after the LLM's own norm N1
        needs_norm = self.position in ("pre", "post")
        # 4 times the width where the LLM's config does not say how wide its MLP is
        inner = shapes.llm_ffn or 4 * width

        self.projector = Projector(shapes.vision_width, width)
        self.projectors = nn.ModuleList()
        for _ in blocks:
            self.projectors.append(Projector(shapes.vision_width, width))
        # by the name of the block that they belong to
        self.attention = nn.ModuleDict()
        for block in blocks:
            self.attention[str(block)] = GatedCrossAttention(width, heads, norm=needs_norm)
        self.mlp = nn.ModuleDict()
        if config.mlp:
            for block in blocks:
                self.mlp[str(block)] = GatedMLP(width, inner, norm=needs_norm)

    def forward(
        self,
        features: Features,
        instruction: Tensor | None = None,
        guidance: Guidance = "instruction",
    ) -> Fused:
        layers = self.normalized(features, self.shapes.selection.layers)
        memory: dict[int, Tensor] = {}
        for (block, module), project, layer in zip(
            self.attention.items(), self.projectors, layers, strict=True
        ):
            attention = cast(GatedCrossAttention, module)
            # V_k = P_k(h_k): (B, N, Dv) -> (B, N, D), then its keys and values (B, N, 2 D)
            memory[int(block)] = attention.keys_values(project(layer))
        base = self.normalized(features, [self.config.base])[0]
        return Fused(self.projector(base), memory)

    def arrange(self, memory: dict[int, Tensor], layout: Layout) -> dict[int, Tensor]:
        """Images side by side in their row, zero behind the last: (rows, images · N, *)."""
        by_row: dict[int, Tensor] = {}
        for block, images in memory.items():
            # (B, N, *) -> (rows, images of a row, N, *) -> (rows, images of a row · N, *)
            empty = images.new_zeros(len(layout.mask), layout.most, *images.shape[1:])
            filled = empty.index_put((layout.row, layout.place), images)
            by_row[block] = filled.flatten(1, 2)
        return by_row

    def addition(self, block: int, hidden: Tensor, visual: Placed) -> Tensor:
        memory = visual.memory[block]
        if len(memory) != len(hidden):
            # one image would otherwise be broadcast into rows that have none
            raise ValueError(
                f"the visual memory has {len(memory)} rows and the LLM's input {len(hidden)}"
            )
        # (rows, T or 1, images) -> (rows, T or 1, images · N): an image is seen whole
        tokens_per_image = memory.shape[1] // visual.seen.shape[-1]
        seen = visual.seen.repeat_interleave(tokens_per_image, dim=-1)

        # the LLM may run in bfloat16 while the fusion trains in float32
        attention = self.attention[str(block)]
        x = hidden.to(attention.get_parameter("query.weight").dtype)
        added = attention(x, memory, seen)
        if self.config.mlp:
            # the MLP is no attention: it would change positions that see no image
            sees = visual.seen.any(dim=-1, keepdim=True)
            from_mlp = self.mlp[str(block)](x + added)
            added = added + from_mlp.masked_fill(~sees, 0)
        return added.to(hidden.dtype)

    def openings(self) -> dict[str, float]:
        openings: dict[str, float] = {}
        for layer, (block, module) in zip(
            self.shapes.selection.layers, self.attention.items(), strict=True
        ):
            gate = module.get_parameter("gate").detach()
            openings[f"layer {layer} in block {block}"] = float(gate.tanh())
            if self.config.mlp:
                gate = self.mlp[block].get_parameter("gate").detach()
                openings[f"MLP in block {block}"] = float(gate.tanh())
        return openings

    def begin_as(self, given: FlatProjector) -> None:
        if self.config.released_residual:
            raise LayerfuseError(
                "released_residual changes the LLM even with closed gates: leave it out"
            )
        self.begin_projector(self.projector, given, {self.config.base: 0})


def _position(config: InjectCrossConfig, shapes: Shapes) -> str:
    """Where the block is changed.

    Raises:
        LayerfuseError: for options that contradict each other, and where the position is not
            defined for that family of LLM.
    """
    if config.mlp and config.position == "parallel":
        raise LayerfuseError(
            "position 'parallel' has no place for `mlp`; valid with 'pre' and 'post'"
        )
    if config.released_residual and config.position != "pre":
        raise LayerfuseError("released_residual is defined for position 'pre' only")
    position = config.position
    if config.released_residual:
        position = "released"
    if position == "pre":
        return position

    # these hook the parts of a block, which families build and name differently
    known = PLAIN
    if position != "released":
        known = PLAIN + SANDWICH
    if shapes.llm_family not in known:
        raise LayerfuseError(
            f"position {position!r} is defined for LLMs of the types {', '.join(known)}, not "
            f"{shapes.llm_family!r}; position 'pre' works with every LLM"
        )
    return position
