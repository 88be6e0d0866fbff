"""Mutated pictures: an error that names them, or exactly what they hold.

Nothing else may leave the reader: no error but `LayerfuseError`, and no picture that silently
becomes another one.
"""

import io
import random
from functools import partial
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, features

from layerfuse.vision.picture import Picture
from tests.mutations import SHORT_AND_FULL, mutate, outcome_of

Pixels = NDArray[np.uint8]
"""(height, width, 3)"""

MODES = ("RGB", "L", "RGBA", "LA", "P", "1", "CMYK", "I;16")
NOT_FUZZED = {
    # Runs Ghostscript.
    "EPS",
    # Is written and never read.
    "PDF",
    # Are read by programs that register themselves.
    "BUFR",
    "GRIB",
    "HDF5",
    "WMF",
    # Holds megabytes of PNG and JPEG 2000, which are here by themselves.
    "ICNS",
    # Has floating-point pixels, which are refused.
    "SPIDER",
}
# The formats whose files say how they are turned.
TURNED_FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "AVIF")
ORIENTATION = 0x112
QUARTER_TURN = 6
HEIGHT = 9
WIDTH = 14


def noise(mode: str) -> Image.Image:
    """A picture of random pixels, of which every one matters."""
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    image = Image.fromarray(pixels)
    if mode == "I;16":
        # 255 becomes 65535
        levels = pixels[..., 0].astype(np.uint16) * 257
        return Image.fromarray(levels)
    if mode in ("RGBA", "LA"):
        alpha = Image.fromarray(pixels[..., 1])
        image.putalpha(alpha)
    return image.convert(mode)


def encoded(format_name: str, mode: str, is_turned: bool) -> bytes | None:
    """The file of a picture of noise, or None where the format does not hold this mode."""
    options: dict[str, Any] = {}
    if is_turned:
        # A new one for each file: saving an AVIF takes the orientation out of it.
        exif = Image.Exif()
        exif[ORIENTATION] = QUARTER_TURN
        options["exif"] = exif
    if format_name == "WEBP":
        options["lossless"] = True
    file = io.BytesIO()
    try:
        noise(mode).save(file, format_name, **options)
        Image.open(file).load()
    # The format does not hold this mode, or is not read as it is written.
    except (OSError, ValueError, KeyError, SyntaxError):
        return None
    return file.getvalue()


def files_of_every_format() -> dict[str, bytes]:
    """A file of every format that Pillow writes and reads, of every mode that the format holds.

    Returns:
        The files' contents by "<format> <mode>" and "<format> <mode> turned".
    """
    # Registers the formats, of which Pillow knows a few at first.
    Image.init()
    format_names = set(Image.SAVE) & set(Image.OPEN) - NOT_FUZZED
    files = {}
    # Sorted, because the order of a set of texts is another one in each process.
    for format_name in sorted(format_names):
        for mode in MODES:
            upright = encoded(format_name, mode, is_turned=False)
            if upright is not None:
                files[f"{format_name} {mode}"] = upright
            if format_name not in TURNED_FORMATS:
                continue
            turned = encoded(format_name, mode, is_turned=True)
            if turned is not None:
                files[f"{format_name} {mode} turned"] = turned
    return files


def naive_rgb(content: bytes) -> Pixels:
    """What Pillow's decoder makes of a file as 8-bit RGB, over white, not turned."""
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        # Asked here: converted images do not know it any more.
        transparent = image.has_transparency_data
        if image.mode.startswith("I"):
            # 16 bits of grey
            grey = np.asarray(image).astype(np.float64) / 257
            grey = grey.round().clip(0, 255)
            colour = grey[..., None].repeat(3, 2)
        elif transparent:
            rgba = np.asarray(image.convert("RGBA")).astype(np.float64)
            opacity = rgba[..., 3:] / 255
            colour = rgba[..., :3] * opacity + 255 * (1 - opacity)
        else:
            colour = np.asarray(image.convert("RGB")).astype(np.float64)
    return colour.round().astype(np.uint8)


def all_orientations(stored: Pixels) -> list[Pixels]:
    """The eight ways to turn and mirror a picture, the stored one first."""
    swapped = stored.transpose(1, 0, 2)
    orientations = []
    for pixels in (stored, swapped):
        orientations += [
            pixels,
            pixels[:, ::-1],
            pixels[::-1],
            pixels[::-1, ::-1],
        ]
    return orientations


def is_one_of(shown: Image.Image, candidates: list[Pixels]) -> bool:
    """Whether a picture is one of these, but for rounding."""
    # Signed, because differences of unsigned numbers wrap around.
    pixels = np.asarray(shown).astype(np.int64)
    for candidate in candidates:
        if candidate.shape != pixels.shape:
            continue
        difference = np.abs(candidate.astype(np.int64) - pixels)
        # Blending over white rounds.
        if difference.max() <= 1:
            return True
    return False


@pytest.fixture
def _bombs_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutated header may ask for gigabytes that Pillow allows."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500_000)


@pytest.mark.usefixtures("_bombs_are_small")
@pytest.mark.filterwarnings("ignore")
def test_files_of_every_format_are_read() -> None:
    files = files_of_every_format()
    formats = {label.split()[0] for label in files}
    # A Pillow without some of its libraries would make the other test easy.
    assert formats >= {"BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP"}
    assert ("AVIF" in formats) == features.check("avif")
    for label, content in files.items():
        shown = Picture(label, partial(bytes, content)).open()

        assert shown.mode == "RGB"
        stored = naive_rgb(content)
        is_turned = label.endswith("turned")
        if not is_turned:
            candidates = [stored]
        elif label.startswith("TIFF"):
            # The naive reader has TIFF turned already: Pillow does so by itself.
            candidates = all_orientations(stored)
        else:
            quarter_turned = stored.transpose(1, 0, 2)[:, ::-1]
            candidates = [quarter_turned]
        assert is_one_of(shown, candidates), label
        if is_turned:
            assert shown.size == (HEIGHT, WIDTH), label


def naive_candidates(content: bytes) -> list[Pixels]:
    """What a file may show: any orientation of what is decoded, or nothing at all."""
    try:
        stored = naive_rgb(content)
    # Pillow's decoders raise whatever they meet.
    except Exception:
        return []
    return all_orientations(stored)


@pytest.mark.usefixtures("_bombs_are_small")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", SHORT_AND_FULL)
def test_mutated_pictures(count: int) -> None:
    """Refused by name, or exactly what the decoder makes of these bytes.

    Where a file says whether it is whole, nothing but its own picture comes out: PNG holds
    checksums, and a file that ends too early is seen in every format.
    """
    files = files_of_every_format()
    labels = list(files)
    num_read = 0
    for number in range(count):
        # Seeded by the number: a failure is made again by itself.
        dice = random.Random(number)
        # One format after the other, so that every run has all of them.
        label = labels[number % len(labels)]
        mutated = mutate(files[label], dice)
        name = f"picture {number} ({label})"
        picture = Picture(name, partial(bytes, mutated.content))
        candidates = naive_candidates(mutated.content)

        outcome = outcome_of(picture.open)

        if outcome.value is None:
            assert name in outcome.refusal
            # What can be decoded is refused for what the message says alone.
            is_thin = "its longer side" in outcome.refusal
            is_floating = "floating-point" in outcome.refusal
            # The naive reader looks neither at checksums nor for palettes.
            is_checked_further = label.startswith(("PNG", "PCX"))
            may_be_refused = is_thin or is_floating or is_checked_further
            assert may_be_refused or not candidates, outcome.refusal
        else:
            num_read += 1
            assert is_one_of(outcome.value, candidates), name
            if mutated.is_cut or label.startswith("PNG"):
                unharmed = all_orientations(naive_rgb(files[label]))
                assert is_one_of(outcome.value, unharmed), name
    # The mutations leave some to be read, and refuse some.
    assert count / 10 < num_read < count * 9 / 10
