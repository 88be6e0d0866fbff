"""Mean of each group of layers, concatenated with the base layer, then one projector.

    V = P(mean_{k in G_1} h_k ⊕ ... ⊕ mean_{k in G_m} h_k ⊕ h_base)

External direct fusion (E_D) with `former`, `latter` and `all` of "Multi-Layer Visual Feature
Fusion in Multimodal LLMs" (2503.06063); DCI of DenseConnector (2405.13800) with `0-11|12-23`.
"""

import torch
from torch import Tensor

from layerfuse.fusion.base import BaseLayerConfig, Shapes, options, register
from layerfuse.fusion.blocks import Projector, ProjectorKind
from layerfuse.fusion.fixed_mix import FixedMix, Part
from layerfuse.fusion.flat_projector import FlatProjector
from layerfuse.fusion.visual import Fused, Guidance
from layerfuse.vision.features import Features


@options
class GroupMeanConfig(BaseLayerConfig):
    """Options of `group_mean`."""

    projector: ProjectorKind = "mlp"
    """`mlp` is Linear, GELU, Linear; `linear` is one Linear."""


@register("group_mean", GroupMeanConfig)
class GroupMean(FixedMix[GroupMeanConfig]):
    """Group means beside the base layer, projected to the LLM's width."""

    kind = "external direct"
    paper = "E_D former / latter / all, DenseConnector DCI"
    summary = "mean of each group beside a base layer, MLP"
    published = "all"

    def __init__(self, config: GroupMeanConfig, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        # one part per group, and the base layer
        parts = len(shapes.selection.groups) + 1
        width = parts * shapes.vision_width
        self.projector = Projector(width, shapes.llm_width, config.projector)

    def forward(
        self,
        features: Features,
        instruction: Tensor | None = None,
        guidance: Guidance = "instruction",
    ) -> Fused:
        means = self.group_means(features)
        base = self.normalized(features, [self.config.base])
        # m + 1 times (B, N, Dv) -> (B, N, (m + 1) · Dv)
        side_by_side = torch.cat(means + base, dim=-1)
        return Fused(self.projector(side_by_side))

    def parts(self) -> list[Part]:
        parts = [dict.fromkeys(group, 1 / len(group)) for group in self.shapes.selection.groups]
        return [*parts, {self.config.base: 1.0}]

    def begin_as(self, given: FlatProjector) -> None:
        # the base layer comes behind the groups
        parts = {self.config.base: len(self.shapes.selection.groups)}
        self.begin_projector(self.projector, given, parts)
