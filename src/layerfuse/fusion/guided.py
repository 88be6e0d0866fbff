"""What the guided strategies share: weights over layers that the instruction decides."""

import torch
from torch import Tensor

from layerfuse.encoder import Features
from layerfuse.fusion.base import Fusion


class GuidedFusion(Fusion):
    """A strategy whose layer weights follow the instruction; a subclass implements `allocate`."""

    kind = "external guided"

    def allocate(self, features: Features, instruction: Tensor) -> Tensor:
        """(B, n) weights over layers or groups, each row summing to one."""
        raise NotImplementedError

    def weights(self, features: Features, instruction: Tensor | None) -> Tensor:
        """(B, n) weights as `guidance` says. Raises ValueError if the instruction is missing."""
        images, n = len(features.patches[0]), len(self.shapes.selection.groups)
        if isinstance(self.guidance, Tensor):
            return self.guidance.to(features.patches[0]).expand(images, n)
        if self.guidance == "uniform":
            return features.patches[0].new_full((images, n), 1 / n)
        if instruction is None:
            raise ValueError(
                f"fusion {type(self).__name__} is guided by a {self.reads} and got no instruction: "
                "give the model `instruction` (`Processor.inputs` does), or set "
                "`model.fusion.guidance = 'uniform'`"
            )
        return self.allocate(features, instruction)

    @torch.no_grad()
    def calibrate(self, features: Features, embedding_std: float) -> None:
        guidance, self.guidance = self.guidance, "uniform"  # pictures are measured without text
        super().calibrate(features, embedding_std)
        self.guidance = guidance
