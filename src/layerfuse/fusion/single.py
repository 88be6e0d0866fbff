"""One layer, one projector.

    V = P(h_k)

The baseline of the field: LLaVA-1.5 (Liu et al., 2310.03744) with k = 23 of CLIP-L.
"""

from typing import Literal

from pydantic.dataclasses import dataclass as validated
from torch import Tensor

from layerfuse.encoder import Features
from layerfuse.fusion.base import OPTIONS, Fusion, Shapes, StrategyConfig, Visual, register
from layerfuse.layers import Projector
from layerfuse.selection import Selection


@validated(frozen=True, config=OPTIONS)
class SingleConfig(StrategyConfig):
    """Options of `single`."""

    projector: Literal["mlp", "linear"] = "mlp"
    """`mlp` is Linear, GELU, Linear (LLaVA-1.5); `linear` is one Linear (the probes of paper 4)."""

    def resolve(self, selection: Selection) -> "SingleConfig":
        if len(selection.layers) != 1:
            raise ValueError(
                f"fusion 'single' takes exactly one layer, not {list(selection.layers)}; "
                "use 'concat' or 'group_mean' for several"
            )
        return self


@register("single", SingleConfig)
class Single(Fusion):
    """One layer projected to the LLM's width."""

    kind = "baseline"
    paper = "LLaVA-1.5"

    def __init__(self, config: SingleConfig, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        self.projector = Projector(shapes.vision_width, shapes.llm_width, config.projector)

    @classmethod
    def example(cls, depth: int) -> list[int]:
        return [-2]

    def forward(self, features: Features, instruction: Tensor | None = None) -> Visual:
        return Visual(self.projector(self.normalized(features, self.shapes.selection.layers)[0]))
