"""What a strategy makes of images, and where it stands in rows of text."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Images of a batch, in reading order: row by row, left to right.

    mask   (rows, T) positions of image tokens
    row    (B,) the row of each image
    place  (B,) its place among the images of that row
    most   an upper bound of the images in one row
    """

    mask: Tensor
    row: Tensor
    place: Tensor
    most: int

    @classmethod
    def of(cls, mask: Tensor, images: int, each: int) -> "Layout":
        """The layout of `images` images of `each` tokens. Raises ValueError if they do not fit."""
        counts = mask.sum(dim=1)
        if torch.compiler.is_compiling() or mask.is_meta:  # values are unknown: bounded by shapes
            most = max(1, min(images, mask.shape[1] // each))
        else:
            found = counts.tolist()
            if sum(found) != images * each or any(n % each for n in found):
                raise ValueError(
                    f"{sum(found)} image tokens in the text, but {images} images of {each} tokens "
                    f"(by row: {found})"
                )
            most = max(n // each for n in found)
        counts = counts // each
        rows = torch.arange(len(counts), device=mask.device)
        row = torch.repeat_interleave(rows, counts, output_size=images)
        first = counts.cumsum(dim=0) - counts
        return cls(mask, row, torch.arange(images, device=mask.device) - first[row], most)


def seen_images(mask: Tensor, each: int, most: int) -> Tensor:
    """(rows, T, most): which images of its row each position sees.

    An image's tokens see that image; text sees the images that stand before it.
    """
    tokens = mask.cumsum(dim=1)
    own = (tokens - 1).div(each, rounding_mode="floor")
    before = tokens // each
    image = torch.arange(most, device=mask.device)
    return torch.where(mask[..., None], image == own[..., None], image < before[..., None])


def place(memory: Tensor, mask: Tensor) -> Tensor:
    """(B, N, D) visual memory -> (rows, T, D), zero where `mask` (rows, T) is false."""
    dense = memory.new_zeros(*mask.shape, memory.shape[-1])
    return dense.masked_scatter(mask.unsqueeze(-1), memory)


@dataclass(frozen=True)
class Visual:
    """What a fusion strategy gives to the LLM.

    tokens  (B, N', D) replace the image tokens
    memory  {LLM block: (B, N, *)} for injection into that block; (rows, images * N, *) once
            `Fusion.by_row` has arranged it
    mask    (rows, T) image positions in the prompt; None while decoding
    seen    (rows, T, images) which images of its row each position may look at; while decoding
            (rows, 1, images), all images of the row
    notes   {name: tensor} weights and gates, for losses and figures
    """

    tokens: Tensor
    memory: dict[int, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None
    seen: Tensor | None = None
    notes: dict[str, Tensor] = field(default_factory=dict)

    def decoding(self) -> "Visual":
        """The same for the tokens that follow the prompt, which come after all images."""
        seen = None if self.seen is None else self.seen.any(dim=1, keepdim=True)
        return replace(self, mask=None, seen=seen)
