"""Projected layers added at the image positions before chosen LLM blocks.

    V_0 = P_base(h_base) replaces the image tokens;
    x[image] <- x[image] + P_k(h_k)   before LLM block l(k), for every selected layer k

Internal direct fusion (I_D) of "Multi-Layer Visual Feature Fusion in Multimodal LLMs" (2503.06063);
with `placement: first` the DeepStack of Qwen3-VL. The KV cache carries the effect into decoding.
"""

from typing import Literal

from pydantic.dataclasses import dataclass as validated
from torch import Tensor, nn

from layerfuse.encoder import Features
from layerfuse.fusion.base import OPTIONS, BaseLayerConfig, Fusion, Shapes, Visual, place, register
from layerfuse.layers import Projector

Placement = Literal["proportional", "first", "last"] | tuple[int, ...]


@validated(frozen=True, config=OPTIONS)
class InjectAddConfig(BaseLayerConfig):
    """Options of `inject_add`."""

    placement: Placement = "proportional"
    """The LLM block before which each selected layer is added: `proportional` puts layer k of an
    encoder with n blocks before block int(k·L/n − 1) of an LLM with L blocks (2503.06063), `first`
    and `last` use the first or last blocks in order, a list names one block per layer."""


def llm_blocks(placement: Placement, shapes: Shapes) -> tuple[int, ...]:
    """The 0-based LLM block l(k) of every selected layer k, in the order of the layers.

    Raises ValueError if a block does not exist or there are more layers than blocks.
    """
    layers, depth = shapes.selection.layers, shapes.llm_depth
    if placement == "proportional":
        n = shapes.selection.depth
        return tuple(max(0, k * depth // n - 1) for k in layers)
    if isinstance(placement, tuple):
        if len(placement) != len(layers):
            raise ValueError(f"placement {list(placement)} must name a block for each of {layers}")
        blocks = placement
    else:
        start = 0 if placement == "first" else depth - len(layers)
        blocks = tuple(range(start, start + len(layers)))
    if min(blocks) < 0 or max(blocks) >= depth:
        raise ValueError(
            f"cannot place layers {list(layers)} by {placement!r}: the LLM has {depth} blocks, "
            f"0..{depth - 1}"
        )
    return blocks


@register("inject_add", InjectAddConfig)
class InjectAdd(Fusion):
    """One projector per injected layer and one for the base layer."""

    kind = "internal direct"
    paper = "I_D, Qwen3-VL DeepStack"

    def __init__(self, config: InjectAddConfig, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        self.blocks = llm_blocks(config.placement, shapes)
        self.projector = Projector(shapes.vision_width, shapes.llm_width)
        self.projectors = nn.ModuleList(
            Projector(shapes.vision_width, shapes.llm_width) for _ in shapes.selection.layers
        )

    def forward(self, features: Features) -> Visual:
        memory: dict[int, Tensor] = {}
        layers = self.normalized(features, self.shapes.selection.layers)
        for block, project, x in zip(self.blocks, self.projectors, layers, strict=True):
            added = project(x)
            memory[block] = memory[block] + added if block in memory else added
        tokens = self.projector(self.normalized(features, [self.config.base])[0])
        return Visual(tokens, memory)

    def inject(self, block: int, hidden: Tensor, visual: Visual) -> Tensor:
        if visual.mask is None:
            return hidden
        return hidden + place(visual.memory[block].to(hidden.dtype), visual.mask)
