"""A learned scalar mix of layers or of group means: one weight each, the same for all inputs.

    Z = Σ_k w_k mean_{i in G_k} h_i,   w = softmax(s)     s learned, zero at first: a uniform mean
    V = P(Z)                    beside: none
    V = P(h_base ⊕ Z)           beside: concat, the static twin of `instruction_weighted`
    V = P(LN(h_base + Z))       beside: add, the static twin of `text_routed`

The control for every guided strategy: what an instruction adds is what it gains over this. The mix
is ELMo's (1802.05365), whose overall scale the projector holds.
"""

import warnings
from typing import Literal

import torch
from torch import Tensor, nn

from layerfuse.errors import LayerfuseError
from layerfuse.fusion.base import BaseLayerConfig, Shapes, options, register
from layerfuse.fusion.blocks import Projector, weighted
from layerfuse.fusion.fixed_mix import FixedMix, Part
from layerfuse.fusion.flat_projector import FlatProjector
from layerfuse.fusion.visual import Fused, Guidance
from layerfuse.vision.features import Features
from layerfuse.vision.selection import Selection

ALL_BUT_ALONE = 100.0
"""how far the logits of added layers begin below that of a given one: what they add to it then
rounds to nothing in float32"""


@options
class WeightedSumConfig(BaseLayerConfig):
    """Options of `weighted_sum`."""

    beside: Literal["none", "concat", "add"] = "none"
    """What becomes of the base layer: `none` leaves it out, `concat` puts it beside the mix, `add`
    adds the mix to it, followed by a LayerNorm."""

    def taps(self, selection: Selection) -> tuple[int, ...]:
        # a base layer that is left out need not be encoded
        if self.beside == "none":
            return tuple(sorted(selection.layers))
        return tuple(sorted({*selection.layers, self.base}))


@register("weighted_sum", WeightedSumConfig)
class WeightedSum(FixedMix[WeightedSumConfig]):
    """Softmax weights over layers or groups, learned as plain parameters."""

    kind = "external direct"
    paper = "ELMo's mix: the static control of the guided ones"
    summary = "learned scalar mix"
    published = "every:1"

    def __init__(self, config: WeightedSumConfig, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        width = shapes.vision_width
        # s of the formula: equal logits make a uniform mean
        self.logits = nn.Parameter(torch.zeros(len(shapes.selection.groups)))
        if config.beside == "add":
            self.norm = nn.LayerNorm(width)
        else:
            self.norm = nn.Identity()
        projected_width = width
        if config.beside == "concat":
            projected_width = 2 * width
        self.projector = Projector(projected_width, shapes.llm_width)

    def forward(
        self,
        features: Features,
        instruction: Tensor | None = None,
        guidance: Guidance = "instruction",
    ) -> Fused:
        weights = self.logits.softmax(dim=0)
        # (n,) -> (1, n): all images share the weights
        mix = weighted(weights.unsqueeze(0), self.group_means(features))
        if self.config.beside == "none":
            fused = mix
        else:
            base = self.normalized(features, [self.config.base])[0]
            if self.config.beside == "concat":
                # (B, N, 2 Dv)
                fused = torch.cat([base, mix], dim=-1)
            else:
                fused = self.norm(base + mix)
        return Fused(self.projector(fused), notes={"weights": weights})

    def parts(self) -> list[Part]:
        if self.config.beside == "add":
            raise LayerfuseError(
                "beside: add has a LayerNorm between its sum and the projector, which divides "
                "every token by its own spread: no matrix does"
            )
        mix: Part = {}
        weights = self.logits.detach().double().softmax(dim=0)
        for weight, group in zip(weights, self.shapes.selection.groups, strict=True):
            for layer in group:
                mix[layer] = float(weight) / len(group)
        if self.config.beside == "concat":
            return [{self.config.base: 1.0}, mix]
        return [mix]

    def begin_as(self, given: FlatProjector) -> None:
        if self.config.beside == "add":
            raise LayerfuseError(
                "beside: add has a LayerNorm before the projector, which the given model lacks: "
                "take beside: concat"
            )
        if self.config.beside == "concat":
            self.begin_projector(self.projector, given, {self.config.base: 0})
            return
        alone = [group[0] for group in self.shapes.selection.groups if len(group) == 1]
        # every layer that is a group of its own could be the whole mix
        self.begin_projector(self.projector, given, dict.fromkeys(alone, 0))
        if len(given.layers) > 1:
            raise LayerfuseError(
                f"the given model puts layers {list(given.layers)} side by side, which a sum "
                "cannot: take concat"
            )
        warnings.warn(
            "weighted_sum begins with all weight on the given layer, where the softmax has no "
            "gradient: the added layers will never be learned. `beside: concat` learns them",
            stacklevel=2,
        )
        place = self.shapes.selection.groups.index(given.layers)
        with torch.no_grad():
            self.logits.fill_(-ALL_BUT_ALONE)
            self.logits[place] = 0
