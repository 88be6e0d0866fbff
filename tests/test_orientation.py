"""Photos are turned as their EXIF says, whatever else cameras wrote into it."""

import struct
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from layerfuse.vision.picture import Picture

# Pixels as they are stored, (8, 16, 3): a red and a green half, so that turning them shows.
STORED = np.zeros((8, 16, 3), np.uint8)
STORED[:, :8, 0] = 255
STORED[:, 8:, 1] = 255

# The tags of an EXIF that are used here, by their numbers
MAKER = 0x10F
ORIENTATION = 0x112
X_RESOLUTION = 0x11A
Y_RESOLUTION = 0x11B
RESOLUTION_UNIT = 0x128
DATE = 0x132
DIRECTORY_OF_PHOTO = 0x8769
UNKNOWN_TAG = 0x9999

# The types of values of TIFF, by their numbers
BYTE = 1
TEXT = 2
SHORT = 3
RATIONAL = 5
SIGNED_BYTE = 6
ANY_BYTES = 7
SIGNED_LONG = 9
FLOAT = 11
UNKNOWN_TYPE = 200


def tag(number: int, kind: int, count: int, value: bytes) -> bytes:
    """A tag of a TIFF directory, 12 bytes.

    Args:
        number: of the tag.
        kind: the type of its values.
        count: of its values.
        value: at most 4 bytes, the values themselves or the place where they are.
    """
    return struct.pack("<HHI", number, kind, count) + value.ljust(4, b"\0")


def directory(*tags: bytes) -> bytes:
    """A TIFF header and one directory with these tags."""
    start = struct.pack("<I", 8)
    count = struct.pack("<H", len(tags))
    # Four zeros say that no other directory follows.
    return b"II*\0" + start + count + b"".join(tags) + bytes(4)


def jpeg_with(tags: bytes, folder: Path) -> Picture:
    """A JPEG of `STORED` whose EXIF holds some bytes."""
    file = folder / "photo.jpg"
    image = Image.fromarray(STORED)
    # Every pixel with its own colour, so that the two halves keep theirs.
    image.save(file, exif=b"Exif\0\0" + tags, quality=100, subsampling=0)
    return Picture(str(file))


def largest_difference(shown: Image.Image, expected: NDArray[np.uint8]) -> int:
    """The largest difference of two pictures in any pixel and colour, 0..255."""
    # Signed, because differences of unsigned numbers wrap around.
    difference = np.asarray(shown, np.int64) - expected
    return int(np.abs(difference).max())


QUARTER_TURN = tag(ORIENTATION, SHORT, 1, b"\6")
# The first five make Pillow fail where it writes an EXIF again, each with another error; the sixth
# makes it read no tag behind it.
ODD_TAGS = {
    "text in a number": tag(X_RESOLUTION, TEXT, 2, b"x"),
    "a number out of range": tag(X_RESOLUTION, SIGNED_BYTE, 3, b"\x8e\x11{\xff"),
    "bytes in a number": tag(RESOLUTION_UNIT, BYTE, 1, b"v"),
    "a number in a text": tag(MAKER, FLOAT, 1, b"\xa2}\xa1\xbd"),
    "a directory before the start": tag(DIRECTORY_OF_PHOTO, SIGNED_LONG, 1, b"..\2\xf0"),
    "a rational without bytes": tag(Y_RESOLUTION, RATIONAL, 1, struct.pack("<I", 9999)),
    "an unknown type": tag(UNKNOWN_TAG, UNKNOWN_TYPE, 1, b"x"),
    "too many values": tag(DATE, SHORT, 2**31, b"x"),
}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("odd", ODD_TAGS.values(), ids=ODD_TAGS)
def test_photos_with_odd_tags_are_turned(tmp_path: Path, odd: bytes) -> None:
    """As the orientation says, whatever the tags beside it hold."""
    expected = np.rot90(STORED, -1)
    odd_last = directory(QUARTER_TURN, odd)
    odd_first = directory(odd, QUARTER_TURN)
    for tags in (odd_last, odd_first):
        picture = jpeg_with(tags, tmp_path)
        assert picture.fault() is None

        shown = picture.open()

        # width, height
        assert shown.size == (8, 16)
        # JPEG loses a little; red and green differ by 255.
        assert largest_difference(shown, expected) < 40
        # Nobody turns it once more.
        assert not shown.getexif()


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize(
    "tags",
    [
        b"",
        b"II",
        b"no tags at all",
        # 9, and there are orientations from 1 to 8
        directory(tag(ORIENTATION, SHORT, 1, b"\x09")),
        # Of types that the standard does not allow
        directory(tag(ORIENTATION, TEXT, 2, b"6")),
        directory(tag(ORIENTATION, RATIONAL, 1, b"\xff\xff")),
        directory(tag(ORIENTATION, ANY_BYTES, 1, b"\6")),
        # Cut off within the tag
        directory(QUARTER_TURN)[:12],
    ],
)
def test_photos_without_a_readable_orientation_are_shown_as_stored(
    tmp_path: Path, tags: bytes
) -> None:
    shown = jpeg_with(tags, tmp_path).open()

    assert shown.size == (16, 8)
    assert largest_difference(shown, STORED) < 40


# What the standard says of each orientation: rows and columns swapped for 5 to 8, then mirrored.
SWAPPED = STORED.transpose(1, 0, 2)
UPRIGHT = {
    1: STORED,
    2: STORED[:, ::-1],
    3: STORED[::-1, ::-1],
    4: STORED[::-1],
    5: SWAPPED,
    6: SWAPPED[:, ::-1],
    7: SWAPPED[::-1, ::-1],
    8: SWAPPED[::-1],
}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image = Image.fromarray(STORED)
    # PNG holds it in an EXIF, WebP in one behind the pixels, TIFF in a tag of its own.
    for suffix in ("png", "webp", "tif"):
        file = tmp_path / f"a.{suffix}"
        image.save(file, exif=exif, lossless=True)

        shown = Picture(str(file)).open()

        assert np.array_equal(np.asarray(shown), UPRIGHT[orientation]), suffix
