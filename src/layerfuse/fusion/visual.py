"""What a strategy makes of images (`Fused`), and that arranged by rows of a prompt (`Placed`).

Images are always in reading order: row by row of the prompt, left to right within a row.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from layerfuse.errors import LayerfuseError


@dataclass(frozen=True)
class FixedWeights:
    """Weights over layers or groups that are the same for every image: `weights` (n,)."""

    weights: Tensor


Guidance = Literal["instruction", "uniform"] | FixedWeights
"""what weighs the layers of a guided strategy: the instruction, nothing, or fixed weights"""


# functions, because torch.compile cannot trace a call of `dict[int, Tensor]`
def _no_memory() -> dict[int, Tensor]:
    return {}


def _no_notes() -> dict[str, Tensor]:
    return {}


def _no_blocks() -> set[int]:
    return set()


@dataclass(frozen=True)
class Fused:
    """What a fusion strategy makes of B images, before it is known where they stand in text.

    tokens  (B, N', D) replace the image tokens
    memory  {LLM block: (B, N, *)} for injection into that block
    notes   {name: tensor} weights and gates, for losses and figures
    """

    tokens: Tensor
    memory: dict[int, Tensor] = field(default_factory=_no_memory)
    notes: dict[str, Tensor] = field(default_factory=_no_notes)


@dataclass(frozen=True)
class Layout:
    """Where the images of a batch stand in rows of text.

    mask              (rows, T) positions of image tokens
    row               (B,) the row of each image
    place             (B,) its place among the images of that row
    most              an upper bound of the images in one row
    tokens_per_image  number of image tokens of one image
    """

    mask: Tensor
    row: Tensor
    place: Tensor
    most: int
    tokens_per_image: int

    @classmethod
    def of(cls, mask: Tensor, images: int, tokens_per_image: int) -> "Layout":
        """Assign every image to the row whose image tokens it replaces.

        Args:
            mask: (rows, T), true at image tokens.
            images: number of images B.
            tokens_per_image: number of image tokens that each image replaces.

        Raises:
            LayerfuseError: if the rows do not hold exactly the image tokens of these images.
        """
        counts = mask.sum(dim=1)
        if torch.compiler.is_compiling() or mask.is_meta:
            # Values are unknown while tracing, so the number of images is bounded by shapes.
            most = max(1, min(images, mask.shape[1] // tokens_per_image))
        else:
            by_row = _integers(counts)
            divided = any(count % tokens_per_image for count in by_row)
            if divided or sum(by_row) != images * tokens_per_image:
                raise LayerfuseError(
                    f"{sum(by_row)} image tokens in the text, but {images} images of "
                    f"{tokens_per_image} tokens (by row: {by_row})"
                )
            most = max(by_row) // tokens_per_image

        images_of_row = counts // tokens_per_image
        rows = torch.arange(len(counts), device=mask.device)
        # images in reading order: row r repeats once per image; the size is given, because
        # finding it out would wait for the GPU
        row = torch.repeat_interleave(rows, images_of_row, output_size=images)

        # the number of images in all rows above
        first_of_row = images_of_row.cumsum(dim=0) - images_of_row
        place = torch.arange(images, device=mask.device) - first_of_row[row]
        return cls(mask, row, place, most, tokens_per_image)

    def seen_images(self) -> Tensor:
        """(rows, T, most): which images of its row each position sees.

        An image's tokens see that image; text sees the images that stand before it.
        """
        # (rows, T), this position included
        image_tokens_so_far = self.mask.cumsum(dim=1)
        own_image = (image_tokens_so_far - 1).div(self.tokens_per_image, rounding_mode="floor")
        images_before = image_tokens_so_far // self.tokens_per_image

        # (most,) against (rows, T, 1) -> (rows, T, most)
        image = torch.arange(self.most, device=self.mask.device)
        at_image = image == own_image[..., None]
        at_text = image < images_before[..., None]
        return torch.where(self.mask[..., None], at_image, at_text)


@dataclass(frozen=True)
class Placed:
    """The images of a batch, arranged by rows of its prompt; made by `Fusion.place`.

    fused   what the strategy made of the images
    memory  {LLM block: tensor} as the strategy's `addition` reads it: for strategies that attend
            (rows, images · N, *), for the others (B, N, *)
    mask    (rows, T) image positions in the prompt; None for the tokens that follow the prompt
    seen    (rows, T, images) which images of its row each position may look at; for the tokens
            that follow the prompt (rows, 1, images), all images of the row
    adds    the `addition` of the strategy that made it: the LLM's blocks reach the strategy through
            what they are given, since a copied or wrapped model has another one than its LLM knew
    reached the LLM's blocks that were given it so far
    """

    fused: Fused
    memory: dict[int, Tensor]
    mask: Tensor | None
    seen: Tensor
    adds: Callable[[int, Tensor, "Placed"], Tensor]
    reached: set[int] = field(default_factory=_no_blocks, compare=False)

    @property
    def tokens(self) -> Tensor:
        """(B, N', D) what replaces the image tokens."""
        return self.fused.tokens

    @property
    def notes(self) -> dict[str, Tensor]:
        """Weights and gates, for losses and figures."""
        return self.fused.notes

    def decoding(self) -> "Placed":
        """The same for the tokens that follow the prompt, which come after all images."""
        if self.mask is None:
            return self
        return replace(self, mask=None, seen=self.seen.any(dim=1, keepdim=True))

    def without_memory(self) -> "Placed":
        """Tokens and notes alone, where nothing is decoded: the memory need not be kept alive."""
        return replace(self, memory={}, fused=replace(self.fused, memory={}))


def spread(memory: Tensor, mask: Tensor) -> Tensor:
    """Write visual memory to the positions of its image tokens.

    Args:
        memory: (B, N, D), images in reading order.
        mask: (rows, T), true at B · N positions.

    Returns:
        (rows, T, D), zero where `mask` is false.
    """
    dense = memory.new_zeros(*mask.shape, memory.shape[-1])
    return dense.masked_scatter(mask.unsqueeze(-1), memory)


def _integers(counts: Tensor) -> list[int]:
    """(n,) integers as Python's own, which waits for the GPU."""
    # Any: torch types lists of a tensor's values by no type of element
    values: Any = counts
    return values.tolist()
