"""What the encoder says of a batch of images."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Features:
    """What the encoder says of B images.

    `patches` and `summary` hold one tensor per entry of `layers`: (B, N, D) patch tokens in raster
    order, and (B, D), the CLS token where the encoder has one, else the mean patch token. `grid` is
    (rows, columns) with rows * columns = N.
    """

    layers: tuple[int, ...]
    patches: tuple[Tensor, ...]
    summary: tuple[Tensor, ...]
    grid: tuple[int, int]

    def select(self, layers: Iterable[int]) -> list[Tensor]:
        """The patch tokens of some layers.

        Args:
            layers: entries of `self.layers`, in any order.

        Returns:
            One (B, N, D) tensor per entry of `layers`, in that order.

        Raises:
            ValueError: if a layer was not taken from the encoder.
        """
        return [self.patches[self.layers.index(layer)] for layer in layers]

    def take(self, rows: Tensor) -> "Features":
        """The features of some of the images.

        Args:
            rows: (R,) indices of images, or (B,) booleans.

        Returns:
            The features of the R images at `rows`, in that order.
        """
        patches = tuple(tensor[rows] for tensor in self.patches)
        summary = tuple(tensor[rows] for tensor in self.summary)
        return replace(self, patches=patches, summary=summary)

    def to(
        self,
        target: torch.device | torch.dtype | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        device: torch.device | str | int | None = None,
        non_blocking: bool = False,
        copy: bool = False,
    ) -> "Features":
        """`Tensor.to` on every tensor.

        Args:
            target: a device or a dtype, as the first argument of `Tensor.to`.
            dtype: the dtype of the result; None keeps it.
            device: the device of the result; None keeps it.
            non_blocking: whether a copy between devices may return before it is done.
            copy: whether tensors that are right already are copied too.

        Returns:
            The same features with that device and dtype.
        """
        if isinstance(target, torch.dtype):
            dtype = target
        elif target is not None:
            device = target

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device=device, dtype=dtype, non_blocking=non_blocking, copy=copy)

        patches = tuple(moved(tensor) for tensor in self.patches)
        summary = tuple(moved(tensor) for tensor in self.summary)
        return replace(self, patches=patches, summary=summary)


def concatenate(parts: Sequence[Features]) -> Features:
    """The features of several batches of images as one batch.

    Args:
        parts: at least one batch; all of the same layers and grid.

    Returns:
        The features of all images, those of the first part first.

    Raises:
        ValueError: if the parts have different numbers of layers.
    """
    # strict: a part that has another number of layers must not be cut silently
    patches_by_layer = zip(*[part.patches for part in parts], strict=True)
    summary_by_layer = zip(*[part.summary for part in parts], strict=True)
    return replace(
        parts[0],
        patches=tuple(torch.cat(tensors) for tensors in patches_by_layer),
        summary=tuple(torch.cat(tensors) for tensors in summary_by_layer),
    )
