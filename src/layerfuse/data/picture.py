"""Pictures: read, checked and decoded in one way."""

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from layerfuse.errors import LayerfuseError

LONGEST = 200
"""The longer side of a picture in shorter sides: encoders resize the shorter side to their own
size, which makes gigabytes of a thinner picture."""

# Pillow has no error of its own: its decoders raise all of these for broken files.
_PILLOW_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Picture:
    """An image by name: a file, or what reads it from elsewhere, such as a dataset's cell."""

    name: str
    """of the file, or of the cell; distinct pictures have distinct names"""
    reader: Callable[[], bytes] | None = None
    """reads the encoded bytes; None reads the file"""
    crop: tuple[float, float, float, float] | None = None
    """left, top, right, bottom of the part to use, in shares of the sides"""

    def read(self) -> bytes:
        """The encoded bytes.

        Raises:
            LayerfuseError: naming the file that is missing or cannot be read.
        """
        try:
            if self.reader is not None:
                return self.reader()
            return Path(self.name).read_bytes()
        except OSError as error:
            raise LayerfuseError(f"cannot read the image {self.name}: {error}") from error

    def digest(self) -> str:
        """The SHA-256 of the encoded bytes, in hexadecimal."""
        return hashlib.sha256(self.read()).hexdigest()

    def fault(self, whole: bool = False) -> str | None:
        """Why this is no image.

        Args:
            whole: whether to decode it; else a file's header is read alone.

        Returns:
            The reason, or None if it is an image.
        """
        if whole:
            try:
                self.open()
            except LayerfuseError as error:
                return str(error)
            return None
        try:
            # Pillow reads no more than the header until pixels are asked for.
            Image.open(self.name).close()
        except FileNotFoundError:
            return f"no image file {self.name}"
        except _PILLOW_ERRORS as error:
            return f"cannot read the image {self.name}: {error}"
        return None

    def open(self) -> Image.Image:
        """The decoded image as 8-bit RGB, upright as its EXIF says, transparency over white.

        Raises:
            LayerfuseError: naming a file that is no readable image or thinner than `LONGEST`.
        """
        content = self.read()
        try:
            with Image.open(io.BytesIO(content)) as image:
                width, height = image.size
                thin = max(image.size) > LONGEST * min(image.size)
                decoded = image
                # A thin picture is refused below, before its pixels are decoded.
                if not thin:
                    # Turned before it is converted, which drops the EXIF.
                    decoded = _rgb(ImageOps.exif_transpose(image))
        except _PILLOW_ERRORS as error:
            raise LayerfuseError(f"cannot read the image {self.name}: {error}") from error
        if thin:
            raise LayerfuseError(
                f"the image {self.name} has {width} x {height} pixels; its longer side may be at "
                f"most {LONGEST} times its shorter side"
            )
        if self.crop is None:
            return decoded
        left, top, right, bottom = self.crop
        width, height = decoded.size
        # Resized to the size of the whole, so that a crop changes no token count.
        corners = (left * width, top * height, right * width, bottom * height)
        return decoded.resize(decoded.size, box=corners)


def _rgb(image: Image.Image) -> Image.Image:
    """The image as 8-bit RGB, with transparent parts over white."""
    if image.mode.startswith("I"):
        # 16 bits, of which `convert` would keep the lowest 8: 65535 / 257 = 255.
        levels = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise UnidentifiedImageError("floating-point pixels; save it with 8 or 16 bits")
    if image.has_transparency_data:
        # `convert("RGB")` alone would show the colours that transparent pixels happen to have.
        foreground = image.convert("RGBA")
        white = Image.new("RGBA", foreground.size, "white")
        return Image.alpha_composite(white, foreground).convert("RGB")
    return image.convert("RGB")
