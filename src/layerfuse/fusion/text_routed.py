"""Weights over all layers from the text of the prompt, added to the base layer.

    t   = mean of the LLM's embeddings of the prompt's text
    w   = softmax(W_2 ReLU(W_1 t + b_1) + b_2)               one weight per selected layer
    V   = P(LN(h_base + Σ_k w_k h_k))

TGIF (2601.03100). The prompt is what stands before the first labelled token, without the image
tokens: an answer never reaches the router, while the release lets it read the answers in training.
To score a given answer, pass `labels` or `instruction`: without them all text is the prompt.
Conversations are trained one turn a row, so that every answer is routed by its own prompt.
"""

from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from layerfuse.fusion.base import BaseLayerConfig, Shapes, options, register
from layerfuse.fusion.blocks import Projector, weighted
from layerfuse.fusion.guided import GuidedFusion, entropy
from layerfuse.fusion.visual import Fused, Guidance
from layerfuse.vision.features import Features


@options
class TextRoutedConfig(BaseLayerConfig):
    """Options of `text_routed`."""

    hidden: PositiveInt = 512
    """Width inside the router."""
    entropy_weight: NonNegativeFloat = 0.0
    """Weight α of a term that spreads a batch over the layers, −α·H(mean of w over the batch), in
    the training loss; in accumulated batches each forward pass counts by its labelled tokens.
    Off by default, as published."""


@register("text_routed", TextRoutedConfig)
class TextRouted(GuidedFusion[TextRoutedConfig]):
    """A two-layer router over the selected layers."""

    paper = "TGIF"
    summary = "all layers weighted by the prompt's embeddings"
    published = "every:1"
    reads = "prompt"

    def __init__(self, config: TextRoutedConfig, shapes: Shapes) -> None:
        super().__init__(config, shapes, len(shapes.selection.layers))
        # the instruction is a mean of the LLM's embeddings, so the router has its width
        self.router = nn.Sequential(
            nn.Linear(shapes.llm_width, config.hidden),
            nn.ReLU(),
            nn.Linear(config.hidden, self.choices),
        )
        self.norm = nn.LayerNorm(shapes.vision_width)
        self.projector = Projector(shapes.vision_width, shapes.llm_width)

    def allocate(self, features: Features, instruction: Tensor) -> Tensor:
        # (B, D) -> (B, n)
        logits = self.router(instruction)
        return logits.softmax(dim=-1)

    def forward(
        self,
        features: Features,
        instruction: Tensor | None = None,
        guidance: Guidance = "instruction",
    ) -> Fused:
        weights = self.weights(features, instruction, guidance)
        base = self.normalized(features, [self.config.base])[0]
        layers = self.normalized(features, self.shapes.selection.layers)
        mix = weighted(weights, layers)
        tokens = self.projector(self.norm(base + mix))
        return Fused(tokens, notes={"weights": weights})

    def penalty(self, fused: Fused) -> Tensor | None:
        if self.config.entropy_weight == 0:
            return None
        # of the mean over the batch: each image may choose, but not all the same layer
        mean = fused.notes["weights"].float().mean(dim=0)
        return -self.config.entropy_weight * entropy(mean)
