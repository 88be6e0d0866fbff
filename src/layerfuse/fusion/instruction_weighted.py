"""Group means weighted by the instruction, beside the base layer.

    Z_k = mean_{i in G_k} h_i,   c_k = mean_{i in G_k} CLS_i       for K groups of layers
    s   = sentence embedding of the question (frozen encoder)
    q_0 = W_s s + b,   E = W_c c_k + b
    4 times:  q <- LN(q + MHA(q, E, E));   q <- LN(q + FFN(q))     4 heads, ReLU, post-norm
    w   = softmax(W_o q_4 + b);   V = P(h_base ⊕ Σ_k w_k Z_k)

IGVA, "Instruction-Guided Fusion of Multi-Layer Visual Features" (2501.08443). Stage 1 takes the
uniform mean (`guidance: uniform` of a stage, the default where the prompt is plain), stage 2 the
allocator. The sentence is the question of the turn that is answered, alone: conversations are
trained one turn a row, where the release averages all questions of a sample.
"""

from itertools import pairwise
from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from layerfuse.fusion.base import BaseLayerConfig, Shapes, options, register
from layerfuse.fusion.blocks import OwnInit, Projector, weighted
from layerfuse.fusion.guided import GuidedFusion, entropy
from layerfuse.fusion.visual import Fused, Guidance
from layerfuse.vision.features import Features

HEADS, BLOCKS = 4, 4


@options
class InstructionWeightedConfig(BaseLayerConfig):
    """Options of `instruction_weighted`."""

    sentence_encoder: str = "sentence-transformers/all-mpnet-base-v2"
    """Hub id, folder or local-model name of the frozen sentence encoder; `all-minilm-l6-v2` works
    without a hub."""
    sentence_width: PositiveInt = 768
    """Width of its embeddings; 384 for `all-minilm-l6-v2`."""
    regularizer: Literal["off", "released", "entropy", "balance"] = "entropy"
    """Term of the training loss: `entropy` is −λ·H(w) averaged over the images, which the paper
    means; `released` is the release's −λ·H(softmax(w)), nearly constant; `balance` is −λ·H(mean of
    w over the batch), which spreads the batch but lets each image choose."""
    regularizer_weight: NonNegativeFloat = 0.02
    """λ. In accumulated batches each forward pass counts by its share of the labelled tokens."""
    group_identity: bool = False
    """Add a learned vector per group to E: as published, groups differ by their content alone."""
    summary: Literal["auto", "cls", "mean"] = "auto"
    """What stands for a layer in c_k: its CLS token, its mean patch token, or (`auto`) the CLS
    token where the encoder has one, else the mean. `normalize` leaves it as it is."""


class AllocatorBlock(nn.Module):
    """Post-norm cross-attention from the instruction to the groups, then an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, HEADS, batch_first=True)
        self.norm_1 = nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.norm_2 = nn.LayerNorm(width)

    def forward(self, query: Tensor, groups: Tensor) -> Tensor:
        """query (B, 1, D), groups (B, K, D) -> (B, 1, D)"""
        attended, _ = self.attention(query, groups, groups, need_weights=False)
        query = self.norm_1(query + attended)
        return self.norm_2(query + self.ffn(query))


class Allocator(OwnInit):
    """Instruction (B, S) and group summaries (B, K, D) -> weights (B, K)."""

    def __init__(self, width: int, sentence_width: int, groups: int, identity: bool) -> None:
        super().__init__()
        self.sentence = nn.Linear(sentence_width, width)
        self.group = nn.Linear(width, width)
        self.identity = nn.Parameter(torch.zeros(groups, width)) if identity else None
        self.blocks = nn.ModuleList(AllocatorBlock(width) for _ in range(BLOCKS))
        self.output = nn.Linear(width, groups)

    def reset_parameters(self) -> None:
        for block in self.blocks:
            block.get_submodule("attention")._reset_parameters()  # type: ignore[operator]
        if self.identity is not None:
            nn.init.normal_(self.identity, std=0.02)

    def forward(self, instruction: Tensor, summaries: Tensor) -> Tensor:
        query = self.sentence(instruction).unsqueeze(1)
        groups = self.group(summaries)
        if self.identity is not None:
            groups = groups + self.identity
        for block in self.blocks:
            query = block(query, groups)
        return self.output(query.squeeze(1)).softmax(dim=-1)


@register("instruction_weighted", InstructionWeightedConfig)
class InstructionWeighted(GuidedFusion):
    """The weight allocator over group means."""

    paper = "IGVA"
    reads = "sentence"

    def __init__(self, config: InstructionWeightedConfig, shapes: Shapes) -> None:
        super().__init__(config, shapes, len(shapes.selection.groups))
        width = shapes.vision_width
        if width % HEADS:
            raise ValueError(f"the allocator has {HEADS} heads: they must divide width {width}")
        if config.summary == "cls" and not shapes.has_cls:
            raise ValueError("summary 'cls': this encoder has no CLS token; valid: 'mean', 'auto'")
        identity = config.group_identity
        self.allocator = Allocator(width, config.sentence_width, self.choices, identity)
        self.projector = Projector(2 * width, shapes.llm_width)

    @classmethod
    def example(cls, depth: int) -> list[list[int]]:
        """Four equal groups; as many as there are layers in a smaller encoder."""
        edges = [round(k * depth / min(4, depth)) for k in range(min(4, depth) + 1)]
        return [list(range(a + 1, b + 1)) for a, b in pairwise(edges)]

    def allocate(self, features: Features, instruction: Tensor) -> Tensor:
        mean = self.config.summary == "mean"
        stands = [x.mean(dim=1) for x in features.patches] if mean else features.summary
        by_layer = dict(zip(features.layers, stands, strict=True))
        groups = self.shapes.selection.groups
        means = [torch.stack([by_layer[k] for k in group]).mean(dim=0) for group in groups]
        return self.allocator(instruction, torch.stack(means, dim=1))

    def forward(
        self,
        features: Features,
        instruction: Tensor | None = None,
        guidance: Guidance = "instruction",
    ) -> Fused:
        weights = self.weights(features, instruction, guidance)
        fused = weighted(weights, self.group_means(features))
        base = self.normalized(features, [self.config.base])[0]
        tokens = self.projector(torch.cat([base, fused], dim=-1))
        return Fused(tokens, notes={"weights": weights})

    def penalty(self, fused: Fused) -> Tensor | None:
        kind = self.config.regularizer
        if kind == "off":
            return None
        weights = fused.notes["weights"].float()
        if kind == "released":
            weights = weights.softmax(dim=-1)
        elif kind == "balance":
            weights = weights.mean(dim=0, keepdim=True)
        return -self.config.regularizer_weight * entropy(weights).mean()
