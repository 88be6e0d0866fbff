"""Channel concatenation of the selected layers, then one projector.

    V = P(h_a ⊕ h_b ⊕ ...)      in the order in which the layers are listed

External direct fusion (E_D) with few layers of "Multi-Layer Visual Feature Fusion in Multimodal
LLMs" (2503.06063), SCI of DenseConnector (2405.13800), Molmo; with `projector: linear` the light
three-layer fusion of "Rethinking Visual Layer Selection" (2504.21447).
"""

import torch
from torch import Tensor

from layerfuse.fusion.base import Shapes, StrategyConfig, options, register
from layerfuse.fusion.blocks import Projector, ProjectorKind
from layerfuse.fusion.fixed_mix import FixedMix, Part
from layerfuse.fusion.flat_projector import FlatProjector
from layerfuse.fusion.visual import Fused, Guidance
from layerfuse.vision.features import Features


@options
class ConcatConfig(StrategyConfig):
    """Options of `concat`."""

    projector: ProjectorKind = "mlp"
    """`mlp` is Linear, GELU, Linear (LLaVA-1.5); `linear` is one Linear, which equals the sum of
    one Linear per layer."""


@register("concat", ConcatConfig)
class Concat(FixedMix[ConcatConfig]):
    """All layers side by side, projected to the LLM's width."""

    kind = "external direct"
    paper = "E_D with few layers, DenseConnector SCI, light three-layer fusion, Molmo"
    summary = "channels side by side, MLP or one Linear"
    published = (3, 18, 23)

    def __init__(self, config: ConcatConfig, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        width = len(shapes.selection.layers) * shapes.vision_width
        self.projector = Projector(width, shapes.llm_width, config.projector)

    def forward(
        self,
        features: Features,
        instruction: Tensor | None = None,
        guidance: Guidance = "instruction",
    ) -> Fused:
        layers = self.normalized(features, self.shapes.selection.layers)
        # n times (B, N, Dv) -> (B, N, n · Dv)
        side_by_side = torch.cat(layers, dim=-1)
        return Fused(self.projector(side_by_side))

    def parts(self) -> list[Part]:
        return [{layer: 1.0} for layer in self.shapes.selection.layers]

    def begin_as(self, given: FlatProjector) -> None:
        layers = self.shapes.selection.layers
        parts = {layer: part for part, layer in enumerate(layers)}
        self.begin_projector(self.projector, given, parts)
