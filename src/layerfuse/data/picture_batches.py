"""Pictures in the batches in which the feature cache encodes them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from layerfuse.errors import LayerfuseError
from layerfuse.vision.picture import Picture


class Place(NamedTuple):
    """Where a picture stands among the batches."""

    row: int
    """in its batch"""
    batch_size: int
    """of its batch; the last one may be smaller than the others"""


@dataclass(frozen=True)
class PictureBatches:
    """Pictures in batches fixed by their order: kernels round differently for other batches, and
    a pass that was stopped and continued must make the same bits."""

    pictures: dict[str, Picture]
    """by name"""
    digests: dict[str, str]
    """of the pictures' bytes, by the picture's name, in the order in which they are encoded"""
    image_processor: Any  # of transformers, whose image processors share no typed base
    batch_size: int

    def names(self) -> list[list[str]]:
        """The names of the pictures of every batch."""
        all_names = list(self.digests)
        batches = []
        for start in range(0, len(all_names), self.batch_size):
            batches.append(all_names[start : start + self.batch_size])
        return batches

    def place(self, digest: str) -> Place:
        """Where the picture with these bytes is encoded."""
        # Of two pictures with the same bytes the first is encoded.
        index = list(self.digests.values()).index(digest)
        row = index % self.batch_size
        start = index - row
        return Place(row, min(self.batch_size, len(self.digests) - start))

    def pixels(self, names: Sequence[str]) -> tuple[Tensor, dict[str, str]]:
        """Decode and preprocess pictures.

        Args:
            names: of the pictures.

        Returns:
            Pixels (pictures, 3, height, width), grey where a picture cannot be decoded, and the
            reason by the name of each such picture.

        Raises:
            LayerfuseError: a picture is missing or changed since its digest was taken.
        """
        images = []
        bad = {}
        for name in names:
            # Read once, so that the bytes that are checked are those that are decoded.
            content = self.pictures[name].read()
            if sha256(content).hexdigest() != self.digests[name]:
                raise LayerfuseError(f"{name} changed while the study ran; start it again")
            try:
                images.append(Picture(name, partial(bytes, content)).open())
            except LayerfuseError as error:
                bad[name] = str(error)
                # A place holder keeps the others at their places in the batch.
                images.append(Image.new("RGB", (64, 64)))
        inputs = self.image_processor(images, return_tensors="pt")
        return inputs["pixel_values"], bad
