"""What the guided strategies share: weights over layers that the instruction decides."""

from typing import Any

import torch
from torch import Tensor

from layerfuse.fusion.base import Fusion, Shapes
from layerfuse.fusion.visual import FixedWeights, Guidance
from layerfuse.vision.features import Features


def entropy(weights: Tensor) -> Tensor:
    """(..., n) weights -> (...) their entropy in nats; its gradient is finite at zero too."""
    tiny = torch.finfo(weights.dtype).tiny
    return -(weights * weights.clamp_min(tiny).log()).sum(dim=-1)


class GuidedFusion(Fusion):
    """A strategy whose layer weights follow the instruction; a subclass implements `allocate`.

    `choices` is the number of layers or groups that it weighs; fewer than two are a ValueError.
    """

    kind = "external guided"

    def __init__(self, config: Any, shapes: Shapes, choices: int) -> None:
        super().__init__(config, shapes)
        self.choices = choices
        if choices < 2:
            chosen = list(shapes.selection.layers)
            raise ValueError(f"select at least two layers or groups to mix, not {chosen}")

    def allocate(self, features: Features, instruction: Tensor) -> Tensor:
        """(B, n) weights over layers or groups, each row summing to one."""
        raise NotImplementedError

    def weights(self, features: Features, instruction: Tensor | None, guidance: Guidance) -> Tensor:
        """(B, n) weights over layers or groups.

        Raises:
            ValueError: if the instruction is to guide and there is none.
        """
        images, n = len(features.patches[0]), self.choices
        if isinstance(guidance, FixedWeights):
            return guidance.weights.to(features.patches[0]).expand(images, n)
        if guidance == "uniform":
            return features.patches[0].new_full((images, n), 1 / n)
        if instruction is None:
            raise ValueError(
                f"fusion {type(self).__name__} is guided by a {self.reads} and got no instruction: "
                "give the model `instruction` (`Processor.inputs` does), or `guidance='uniform'`"
            )
        return self.allocate(features, instruction)
