"""What the naive references of the fusion strategies start from: see `tests/naive.py`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from torch import Tensor

from layerfuse.fusion import FUSIONS, FixedWeights, Fusion, Guidance
from layerfuse.vision.features import Features
from tests.naive_layers import (
    Array,
    Weights,
    array,
    layer_norm,
    mean,
    part,
    projector,
    weights_of,
)


@dataclass
class Answer:
    """What a strategy should give."""

    tokens: Array
    """(B, N', H)"""
    memory: dict[int, Array] = field(default_factory=dict)
    """by LLM block, (B, N, *)"""
    weights: Array | None = None
    """(B, n) over layers or groups, or (n) where all images share them"""


@dataclass
class Problem:
    """A strategy's weights and options, and the features of some images."""

    name: str
    options: Any
    groups: tuple[tuple[int, ...], ...]
    depth: int
    """blocks of the encoder"""
    llm_depth: int
    """blocks of the LLM, L"""
    has_cls: bool
    weights: Weights
    patches: dict[int, Array]
    """by layer, (B, N, Dv)"""
    summary: dict[int, Array]
    """by layer, (B, Dv)"""
    instruction: Array | None = None
    """(B, E)"""
    guidance: Literal["instruction", "uniform"] | Array = "instruction"
    """what weighs the layers of guided strategies; fixed weights are (n)"""

    @classmethod
    def of(
        cls,
        fusion: Fusion,
        features: Features,
        instruction: Tensor | None = None,
        guidance: Guidance = "instruction",
    ) -> "Problem":
        """Copy what the formula of a strategy needs."""
        shapes = fusion.shapes
        # weights and options alone: nothing that the strategy computes is used
        problem = cls(
            name=_name_of(fusion),
            options=fusion.config,
            groups=shapes.selection.groups,
            depth=shapes.selection.depth,
            llm_depth=shapes.llm_depth,
            has_cls=shapes.has_cls,
            weights=weights_of(fusion),
            patches={},
            summary={},
        )
        # features come in ascending order of the layers, selections in any
        for index, layer in enumerate(features.layers):
            problem.patches[layer] = array(features.patches[index])
            problem.summary[layer] = array(features.summary[index])
        if instruction is not None:
            problem.instruction = array(instruction)
        if isinstance(guidance, FixedWeights):
            problem.guidance = array(guidance.weights)
        else:
            problem.guidance = guidance
        return problem

    @property
    def layers(self) -> list[int]:
        """All selected layers, in the order of the selection."""
        layers: list[int] = []
        for group in self.groups:
            layers.extend(group)
        return layers

    @property
    def _first_layer(self) -> Array:
        """(B, N, Dv): all layers have the same shape."""
        return next(iter(self.patches.values()))

    @property
    def images(self) -> int:
        """B"""
        return self._first_layer.shape[0]

    @property
    def tokens(self) -> int:
        """N"""
        return self._first_layer.shape[1]

    @property
    def vision_width(self) -> int:
        """Dv"""
        return self._first_layer.shape[2]

    def part(self, name: str) -> Weights:
        """The weights of one submodule."""
        return part(self.weights, name)

    def h(self, layer: int, image: int, token: int) -> Array:
        """h_k of one place, normalised as the options say: (Dv)"""
        x = self.patches[layer][image, token]
        weights = self.part(f"norms.{layer}")
        if self.options.normalize == "layernorm":
            return layer_norm(weights, x)
        if self.options.normalize == "standardize":
            # stored constants, not the statistics of these images
            return (x - weights["mean"]) / weights["std"]
        if self.options.normalize == "whiten":
            # stored constants too: `tests/naive_whitening.py` says what they should be
            return (x - weights["mean"]) @ weights["matrix"]
        # as published
        return x

    def base(self, image: int, token: int) -> Array:
        """h_base of one place: (Dv)"""
        return self.h(self.options.base, image, token)

    def z(self, group: tuple[int, ...], image: int, token: int) -> Array:
        """Z_i of one place: (Dv)"""
        layers = [self.h(layer, image, token) for layer in group]
        return mean(layers)

    def mix(self, weights: Array, image: int, token: int) -> Array:
        """Σ_i w_i Z_i of one place, with weights (n): (Dv)"""
        total = np.zeros(self.vision_width)
        for weight, group in zip(weights, self.groups, strict=True):
            total = total + weight * self.z(group, image, token)
        return total

    def per_token(self, compute: Callable[[int, int], Array]) -> Array:
        """(B, N, *) of what `compute` gives for each image and token."""
        images: list[list[Array]] = []
        # one token at a time, so that nothing can leak between tokens or images
        for image in range(self.images):
            tokens: list[Array] = []
            for token in range(self.tokens):
                tokens.append(compute(image, token))
            images.append(tokens)
        return np.array(images)

    def projected(self, name: str, layer: int) -> Array:
        """P(h_k) of all places with the projector of that name: (B, N, H)"""
        weights = self.part(name)

        def token_of(image: int, token: int) -> Array:
            return projector(weights, self.h(layer, image, token))

        return self.per_token(token_of)


def _name_of(fusion: Fusion) -> str:
    """The name under which the class of a fusion is registered."""
    for name, (_, module) in FUSIONS.items():
        if module is type(fusion):
            return name
    raise ValueError(f"{type(fusion)} is not registered")
