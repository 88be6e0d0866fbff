"""What the guided strategies share: weights over layers that the instruction decides."""

import torch
from torch import Tensor

from layerfuse.errors import LayerfuseError
from layerfuse.fusion.base import Fusion, Options, Shapes
from layerfuse.fusion.visual import FixedWeights, Guidance
from layerfuse.vision.features import Features


def entropy(weights: Tensor) -> Tensor:
    """The entropy of weights that sum to one.

    Args:
        weights: (..., n)

    Returns:
        (...) in nats.
    """
    # w log w has no finite gradient at zero, where a collapsed softmax ends up
    tiny = torch.finfo(weights.dtype).tiny
    logarithms = weights.clamp_min(tiny).log()
    return -(weights * logarithms).sum(dim=-1)


class GuidedFusion(Fusion[Options]):
    """A strategy whose layer weights follow the instruction; a subclass implements `allocate`.

    Args:
        config: the strategy's options.
        shapes: what the encoder and the LLM are like.
        choices: number of layers or groups that it weighs.

    Raises:
        LayerfuseError: if there are fewer than two choices.
    """

    kind = "external guided"

    def __init__(self, config: Options, shapes: Shapes, choices: int) -> None:
        super().__init__(config, shapes)
        self.choices = choices
        if choices < 2:
            selected = list(shapes.selection.layers)
            raise LayerfuseError(f"select at least two layers or groups to mix, not {selected}")

    def allocate(self, features: Features, instruction: Tensor) -> Tensor:
        """The weights that the instruction decides.

        Args:
            features: the features of B images.
            instruction: (B, E)

        Returns:
            (B, n) weights over layers or groups, each row summing to one.
        """
        raise NotImplementedError

    def weights(self, features: Features, instruction: Tensor | None, guidance: Guidance) -> Tensor:
        """The weights over layers or groups, whatever decides them.

        Args:
            features: the features of B images.
            instruction: (B, E), if there is one.
            guidance: whether the instruction decides, nothing, or fixed weights.

        Returns:
            (B, n)

        Raises:
            LayerfuseError: if the instruction is to guide and there is none.
        """
        patches = features.patches[0]
        images = len(patches)
        if isinstance(guidance, FixedWeights):
            return guidance.weights.to(patches).expand(images, self.choices)
        if guidance == "uniform":
            return patches.new_full((images, self.choices), 1 / self.choices)
        if instruction is None:
            raise LayerfuseError(
                f"fusion {type(self).__name__} is guided by a {self.reads} and got no instruction: "
                "give the model `instruction` (`Processor.inputs` does), or `guidance='uniform'`"
            )
        return self.allocate(features, instruction)
