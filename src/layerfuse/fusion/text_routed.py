"""Weights over all layers from the text of the prompt, added to the base layer.

    t   = mean of the LLM's embeddings of the prompt's text
    w   = softmax(W_2 ReLU(W_1 t + b_1) + b_2)               one weight per selected layer
    V   = P(LN(h_base + Σ_k w_k h_k))

TGIF (2601.03100). The prompt is what stands before the first labelled token, without the image
tokens: an answer never reaches the router, while the release lets it read the answers in training.
Conversations are trained one turn a row, so that every answer is routed by its own prompt.
"""

import torch
from pydantic import NonNegativeFloat, PositiveInt
from pydantic.dataclasses import dataclass as validated
from torch import Tensor, nn

from layerfuse.encoder import Features
from layerfuse.fusion.base import OPTIONS, BaseLayerConfig, Shapes, Visual, register
from layerfuse.fusion.guided import GuidedFusion
from layerfuse.layers import Projector


@validated(frozen=True, config=OPTIONS)
class TextRoutedConfig(BaseLayerConfig):
    """Options of `text_routed`."""

    hidden: PositiveInt = 512
    """Width inside the router."""
    entropy_weight: NonNegativeFloat = 0.0
    """Weight α of a term that spreads a batch over the layers, −α·H(mean of w over the batch), in
    the training loss. Off by default, as published."""


@register("text_routed", TextRoutedConfig)
class TextRouted(GuidedFusion):
    """A two-layer router over the selected layers."""

    paper = "TGIF"
    reads = "prompt"

    def __init__(self, config: TextRoutedConfig, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        self.router = nn.Sequential(
            nn.Linear(shapes.llm_width, config.hidden),
            nn.ReLU(),
            nn.Linear(config.hidden, len(shapes.selection.groups)),
        )
        self.norm = nn.LayerNorm(shapes.vision_width)
        self.projector = Projector(shapes.vision_width, shapes.llm_width)

    @classmethod
    def example(cls, depth: int) -> str:
        return "every:1"

    def allocate(self, features: Features, instruction: Tensor) -> Tensor:
        return self.router(instruction).softmax(dim=-1)

    def forward(self, features: Features, instruction: Tensor | None = None) -> Visual:
        weights = self.weights(features, instruction)
        mix = self.normalized(features, [self.config.base])[0]
        for w, z in zip(weights.unbind(dim=1), self.group_means(features), strict=True):
            mix = mix + w[:, None, None] * z
        return Visual(self.projector(self.norm(mix)), notes={"weights": weights})

    def penalty(self, visual: Visual) -> Tensor | None:
        if self.guidance != "instruction" or self.config.entropy_weight == 0:
            return None
        mean = visual.notes["weights"].float().mean(dim=0)
        return self.config.entropy_weight * torch.xlogy(mean, mean).sum()
