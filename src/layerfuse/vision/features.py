"""What the encoder says of a batch of images."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

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
        """The patch tokens of `layers`, in that order."""
        return [self.patches[self.layers.index(layer)] for layer in layers]

    def take(self, rows: Tensor) -> "Features":
        """The features of the images at `rows`, in that order."""
        return self._changed(lambda x: x[rows])

    def to(self, *args: Any, **kwargs: Any) -> "Features":
        """`Tensor.to` on every tensor."""
        return self._changed(lambda x: x.to(*args, **kwargs))

    def _changed(self, change: Callable[[Tensor], Tensor]) -> "Features":
        patches, summary = tuple(map(change, self.patches)), tuple(map(change, self.summary))
        return replace(self, patches=patches, summary=summary)


def concatenate(parts: Sequence[Features]) -> Features:
    """The features of several batches of images as one batch."""
    return replace(
        parts[0],
        patches=tuple(torch.cat(x) for x in zip(*(p.patches for p in parts), strict=True)),
        summary=tuple(torch.cat(x) for x in zip(*(p.summary for p in parts), strict=True)),
    )
