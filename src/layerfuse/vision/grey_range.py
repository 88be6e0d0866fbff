"""Pictures of more than 8 bits a sample: which samples are black and white, and 8-bit levels."""

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

_SIXTEEN_BIT_FORMATS = ("ICNS", "ICO", "JPEG2000", "PNG", "PPM")
"""formats whose grey samples of 9 to 16 bits Pillow gives with 65535 for white, in the mode of 16
or of 32 bits; the first two hold PNG"""

# Tags of TIFF, which Pillow's table of names lacks in part.
_BITS_PER_SAMPLE = 258
_PHOTOMETRIC = 262
_SAMPLE_FORMAT = 339
_LOWEST_SAMPLE = 340
_HIGHEST_SAMPLE = 341

_UNSIGNED = 1
"""the sample format that stands for whole numbers from 0 on"""
_WHITE_IS_ZERO = 0
"""the photometric interpretation of negatives"""
_SAVE_AGAIN = "save it with 8 or 16 bits a sample"


@dataclass(frozen=True)
class GreyRange:
    """The samples that a file declares to be black and white; of a negative, black is larger."""

    black: float
    white: float

    def levels(self, samples: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """8-bit levels of samples.

        Args:
            samples: numbers of any type, of any shape.

        Returns:
            Levels in 0..255, uint8, of the same shape.

        Raises:
            UnidentifiedImageError: for samples outside the range, which would say that the range
                is not the one they were written for.
        """
        lowest, highest = sorted((self.black, self.white))
        # Written so that NaN, which compares as false, is outside.
        if not (samples.min() >= lowest and samples.max() <= highest):
            raise UnidentifiedImageError(
                f"samples from {samples.min():g} to {samples.max():g}, of which the file declares "
                f"{lowest:g} to {highest:g}; {_SAVE_AGAIN}"
            )
        shares = (samples.astype(np.float64) - self.black) / (self.white - self.black)
        return (shares * 255).round().astype(np.uint8)


SIXTEEN_BITS = GreyRange(0, 65535)


def declared_range(image: Image.Image) -> GreyRange | None:
    """What a picture's header says of its samples.

    Args:
        image: opened, not necessarily decoded, and not turned, which would lose the header.

    Returns:
        The range; None where Pillow gives 8 bits.

    Raises:
        UnidentifiedImageError: where the header does not say which samples are black and white.
    """
    # Any: Pillow types the values of tags in part only
    tags: Any = {}
    if isinstance(image, TiffImageFile):
        tags = image.tag_v2
    has_8_bits = image.mode != "F" and not image.mode.startswith("I")
    if has_8_bits:
        _refuse_narrow_colours(tags)
        return None
    if image.format == "TIFF":
        return _declared_by_tags(tags)
    if image.mode != "F" and image.format in _SIXTEEN_BIT_FORMATS:
        return SIXTEEN_BITS
    # IM has samples of 32 bits, too.
    if image.mode.startswith("I;16") and image.format == "IM":
        return SIXTEEN_BITS
    raise UnidentifiedImageError(
        f"{_kind(image)}, of which {image.format} does not say which is white; {_SAVE_AGAIN}"
    )


def _kind(image: Image.Image) -> str:
    """How errors call the samples."""
    if image.mode == "F":
        return "floating-point pixels"
    if image.mode == "I":
        return "32-bit pixels"
    return "16-bit pixels"


def _declared_by_tags(tags: Any) -> GreyRange:
    """The range that a TIFF's tags declare for its one sample a pixel.

    Args:
        tags: by number.
    """
    bits = int(tags[_BITS_PER_SAMPLE][0])
    # Whole numbers from 0 on, where nothing is said.
    sample_format = tags.get(_SAMPLE_FORMAT, (_UNSIGNED,))[0]
    lowest = tags.get(_LOWEST_SAMPLE)
    highest = tags.get(_HIGHEST_SAMPLE)
    if lowest is None and sample_format == _UNSIGNED:
        lowest = (0,)
    # The standard's default is the full range of the type. Few files of 32 bits use that.
    if highest is None and sample_format == _UNSIGNED and bits <= 16:
        highest = (2**bits - 1,)
    if lowest is None or highest is None:
        kinds = {1: "whole", 2: "signed", 3: "floating-point"}
        raise UnidentifiedImageError(
            f"{kinds.get(sample_format, 'unknown')} pixels of {bits} bits without the TIFF tags "
            f"SMinSampleValue and SMaxSampleValue, which say what is black and white; {_SAVE_AGAIN}"
        )
    black = float(lowest[0])
    white = float(highest[0])
    if not black < white:
        raise UnidentifiedImageError(
            f"TIFF tags SMinSampleValue {black:g} and SMaxSampleValue {white:g}, between which "
            f"there is nothing; {_SAVE_AGAIN}"
        )
    # Pillow inverts negatives of 8 bits alone.
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        return GreyRange(white, black)
    return GreyRange(black, white)


def _refuse_narrow_colours(tags: Any) -> None:
    """Raise Pillow's error for a TIFF of 16-bit colours that uses a part of the 16 bits.

    Pillow keeps the upper 8 bits, which are black for samples of 8 bits.

    Args:
        tags: of a TIFF by number; empty for other formats.
    """
    bits = tags.get(_BITS_PER_SAMPLE, (8,))[0]
    if bits != 16:
        return
    highest = tags.get(_HIGHEST_SAMPLE, (65535,))[0]
    if highest != 65535:
        raise UnidentifiedImageError(
            f"16-bit colours of which the file declares {highest:g} as the highest; {_SAVE_AGAIN}"
        )


def png_range(image: Image.Image, content: bytes) -> GreyRange | None:
    """What a PNG of 16 bits has its samples in, if it says that fewer bits are significant.

    The standard wants samples scaled to all 16 bits whatever the number of significant ones, and
    some writers do not scale them.

    Args:
        image: the PNG, decoded.
        content: of its file.

    Returns:
        The range of samples that are surely not scaled; None for others.

    Raises:
        UnidentifiedImageError: for colours that are so dark that they seem not to be scaled.
    """
    bits = _significant_bits(content)
    if bits is None:
        return None
    white = 2**bits - 1
    if image.mode.startswith("I"):
        samples = np.asarray(image)
        # What is scaled ends in zeros, or in a copy of its first bits, which is 0 or 1 for samples
        # as small as these.
        last_bits = samples % 2 ** (16 - bits)
        if samples.max() <= white and last_bits.max() > 1:
            return GreyRange(0, white)
        return None
    # Pillow keeps the upper 8 of 16 bits.
    highest = 0
    for band in image.split():
        if band.getextrema() != (255, 255):
            highest = max(highest, int(np.asarray(band).max()))
    if 0 < highest <= white >> 8:
        raise UnidentifiedImageError(
            f"16-bit colours of which the PNG declares {bits} bits significant, none higher than "
            f"{white}: they seem not to be scaled to 16 bits; {_SAVE_AGAIN}"
        )
    return None


def _significant_bits(content: bytes) -> int | None:
    """The number of significant bits of a 16-bit PNG; None where it is 16, or 8 of 8.

    Args:
        content: of the file, whose checksums are right.
    """
    # The signature has 8 bytes, then come a chunk's length and name; IHDR begins with the sides.
    depth = content[24]
    if depth != 16:
        return None
    place = 8
    while place + 8 <= len(content):
        length, name = struct.unpack_from(">I4s", content, place)
        if name == b"IDAT":
            return None
        if name == b"sBIT":
            # One number a channel.
            bits = max(content[place + 8 : place + 8 + length], default=16)
            if 0 < bits < 16:
                return bits
            return None
        # Behind a chunk's data stands a checksum of 4 bytes.
        place += 12 + length
    return None


def to_8_bits(image: Image.Image, grey_range: GreyRange) -> Image.Image:
    """A grey picture of more than 8 bits in 8 bits, its transparent samples white.

    Args:
        image: decoded, of mode `I`, `I;16` or `F`.
        grey_range: of its samples.

    Raises:
        UnidentifiedImageError: as `GreyRange.levels`.
    """
    samples = np.asarray(image)
    levels = grey_range.levels(samples)
    # PNG names one sample that is transparent.
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        levels[samples == transparent] = 255
    return Image.fromarray(levels)
