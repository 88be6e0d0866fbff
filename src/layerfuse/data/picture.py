"""Pictures: read, checked and decoded in one way."""

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

LONGEST = 200
"""The longer side of a picture in shorter sides: encoders resize the shorter side to their own
size, which makes gigabytes of a thinner picture."""


@dataclass(frozen=True)
class Picture:
    """An image by name: a file, or what reads it from elsewhere, such as a dataset's cell."""

    name: str
    reader: Callable[[], bytes] | None = None
    crop: tuple[float, float, float, float] | None = None
    """left, top, right, bottom of the part to use, in shares of the sides"""

    def read(self) -> bytes:
        """The encoded bytes. Raises FileNotFoundError naming the file."""
        return self.reader() if self.reader else Path(self.name).read_bytes()

    def digest(self) -> str:
        return hashlib.sha256(self.read()).hexdigest()

    def fault(self, whole: bool = False) -> str | None:
        """Why this is no image, from a file's header alone or from the whole; None if it is one."""
        try:
            if whole:
                self.open()
            else:
                Image.open(self.name).close()
        except FileNotFoundError:
            return f"no image file {self.name}"
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            return str(error) if whole else f"cannot read the image {self.name}: {error}"
        return None

    def open(self) -> Image.Image:
        """The decoded image as 8-bit RGB, upright as its EXIF says, transparency over white.

        Raises ValueError naming a file that is no readable image or thinner than `LONGEST`.
        """
        try:
            with Image.open(io.BytesIO(self.read())) as image:
                width, height = image.size
                thin = max(image.size) > LONGEST * min(image.size)
                found = image if thin else _rgb(ImageOps.exif_transpose(image))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"cannot read the image {self.name}: {error}") from error
        if thin:
            raise ValueError(
                f"the image {self.name} has {width} x {height} pixels; its longer side may be at "
                f"most {LONGEST} times its shorter side"
            )
        if self.crop is None:
            return found
        left, top, right, bottom = self.crop
        width, height = found.size
        corners = (left * width, top * height, right * width, bottom * height)
        return found.resize(found.size, box=corners)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits, of which `convert` would keep the lowest 8
        levels = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise UnidentifiedImageError("floating-point pixels; save it with 8 or 16 bits")
    if image.has_transparency_data:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return image.convert("RGB")
