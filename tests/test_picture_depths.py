"""Pictures of 12, 16 and 32 bits are as bright as their file says, or refused by name."""

import io
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from layerfuse.errors import LayerfuseError
from layerfuse.vision.picture import Picture

Samples = NDArray[Any]

RAMP_12 = np.arange(4096).reshape(64, 64)
RAMP_16 = np.arange(65536).reshape(256, 256)

# Tags of TIFF, and the numbers of the types that their values have.
PHOTOMETRIC = 262
LOWEST = 340
HIGHEST = 341
SHORT, LONG, SIGNED_SHORT, FLOAT = 3, 4, 8, 11
FORMATS_OF_TYPES = {SHORT: "H", LONG: "I", SIGNED_SHORT: "h", FLOAT: "f"}


@dataclass(frozen=True)
class Tag:
    """One value in a TIFF's header."""

    number: int
    kind: int
    value: float

    def encoded(self) -> bytes:
        """12 bytes: number, type, count, and the value in the first of 4 bytes."""
        type_format = FORMATS_OF_TYPES[self.kind]
        value: float = self.value
        if type_format != "f":
            # The format has no decimal places.
            value = int(self.value)
        packed = struct.pack(f"<{type_format}", value).ljust(4, b"\0")
        return struct.pack("<HHI", self.number, self.kind, 1) + packed


def tiff(samples: Samples, bits: int | None = None, tags: Sequence[Tag] = ()) -> bytes:
    """A TIFF of one sample a pixel.

    Args:
        samples: (height, width), of the type that the file declares.
        bits: 12 packs two samples into three bytes; None: those of the type.
        tags: further ones, or others than black for 0.
    """
    height, width = samples.shape
    # Whole numbers from 0 on, signed ones, floating-point ones.
    sample_format = {"u": 1, "i": 2, "f": 3}[samples.dtype.kind]
    content = samples.astype(samples.dtype.newbyteorder("<")).tobytes()
    if bits == 12:
        # One long number, whose upper bits come first.
        digits = "".join(f"{sample:012b}" for sample in samples.ravel().tolist())
        content = int(digits, 2).to_bytes(len(digits) // 8, "big")
    header = {
        256: Tag(256, SHORT, width),
        257: Tag(257, SHORT, height),
        258: Tag(258, SHORT, bits or 8 * samples.dtype.itemsize),
        259: Tag(259, SHORT, 1),
        PHOTOMETRIC: Tag(PHOTOMETRIC, SHORT, 1),
        277: Tag(277, SHORT, 1),
        278: Tag(278, SHORT, height),
        279: Tag(279, LONG, len(content)),
        339: Tag(339, SHORT, sample_format),
    }
    for tag in tags:
        header[tag.number] = tag
    # Behind the header, the place of the samples included.
    start = 8 + 2 + 12 * (len(header) + 1) + 4
    header[273] = Tag(273, LONG, start)
    encoded = b"II*\0" + struct.pack("<IH", 8, len(header))
    for number in sorted(header):
        encoded += header[number].encoded()
    return encoded + bytes(4) + content


def chunk(name: bytes, content: bytes) -> bytes:
    """A PNG's chunk with its checksum."""
    checksum = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + checksum


def png(
    samples: Samples,
    significant_bits: int | None = None,
    transparent: int | None = None,
) -> bytes:
    """A PNG of 16 bits a sample.

    Args:
        samples: (height, width) of grey, or (height, width, 3) of colours.
        significant_bits: what the file declares.
        transparent: the sample that the file declares transparent.
    """
    height, width = samples.shape[:2]
    channels = samples[0, 0].size
    # As PNG numbers grey and RGB.
    colour_type = {1: 0, 3: 2}[channels]
    rows = b""
    for row in samples.astype(">u2"):
        # Each row begins with its filter.
        rows += b"\0" + row.tobytes()
    encoded = b"\x89PNG\r\n\x1a\n"
    encoded += chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0))
    if significant_bits is not None:
        encoded += chunk(b"sBIT", bytes([significant_bits] * channels))
    if transparent is not None:
        encoded += chunk(b"tRNS", struct.pack(">H", transparent))
    return encoded + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def pgm(samples: Samples, highest: int) -> bytes:
    """A PGM of two bytes a sample."""
    height, width = samples.shape
    return b"P5 %d %d %d\n" % (width, height, highest) + samples.astype(">u2").tobytes()


def saved(samples: Samples, file_format: str) -> bytes:
    """A file as Pillow writes it."""
    file = io.BytesIO()
    Image.fromarray(samples).save(file, file_format)
    return file.getvalue()


def opened(content: bytes, name: str = "x.tif") -> Samples:
    """(height, width, 3): a file as 8-bit RGB."""
    return np.asarray(Picture(name, partial(bytes, content)).open())


def levels(samples: Samples, black: float, white: float) -> Samples:
    """(height, width): what samples are in 8 bits."""
    shares = (samples.astype(np.float64) - black) / (white - black)
    return np.round(255 * shares)


# Half of them below 0.
SIGNED = np.arange(-1000, 1000, dtype=np.int16).reshape(40, 50)
SHARES = np.linspace(0, 1, 60, dtype=np.float32).reshape(6, 10)
# Samples of 12 bits as PNG wants them: in the upper bits, and as a share of the highest.
SHIFTED = RAMP_12 << 4
STRETCHED = np.round(RAMP_12 * (65535 / 4095)).astype(np.uint16)
# No sample needs more than 12 bits, but all are proper samples of 16.
DARK = STRETCHED[:4]

DECLARED: dict[str, tuple[bytes, Samples]] = {
    "PNG": (
        png(RAMP_16),
        levels(RAMP_16, 0, 65535),
    ),
    "PNG of 12 significant bits, shifted": (
        png(SHIFTED, significant_bits=12),
        levels(SHIFTED, 0, 65535),
    ),
    "PNG of 12 significant bits, stretched": (
        png(STRETCHED, significant_bits=12),
        levels(STRETCHED, 0, 65535),
    ),
    "PNG of 12 significant bits, not scaled": (
        png(RAMP_12, significant_bits=12),
        levels(RAMP_12, 0, 4095),
    ),
    "PNG of 10 significant bits, not scaled": (
        png(RAMP_12[:16], significant_bits=10),
        levels(RAMP_12[:16], 0, 1023),
    ),
    "PNG of 12 significant bits, dark": (
        png(DARK, significant_bits=12),
        levels(DARK, 0, 65535),
    ),
    "PNG of 16 significant bits": (
        png(RAMP_12, significant_bits=16),
        levels(RAMP_12, 0, 65535),
    ),
    "TIFF of 12 bits": (
        tiff(RAMP_12.astype(np.uint16), bits=12),
        levels(RAMP_12, 0, 4095),
    ),
    "TIFF of 16 bits": (
        tiff(RAMP_16.astype(np.uint16)),
        levels(RAMP_16, 0, 65535),
    ),
    "TIFF of 16 bits, big-endian": (
        saved(RAMP_16.astype(">u2"), "TIFF"),
        levels(RAMP_16, 0, 65535),
    ),
    # Of 8 bits, Pillow inverts them.
    "TIFF of 16 bits, negative": (
        tiff(RAMP_16.astype(np.uint16), tags=[Tag(PHOTOMETRIC, SHORT, 0)]),
        levels(RAMP_16, 65535, 0),
    ),
    "TIFF of 16 bits with the highest": (
        tiff(RAMP_12.astype(np.uint16), tags=[Tag(HIGHEST, SHORT, 4095)]),
        levels(RAMP_12, 0, 4095),
    ),
    "TIFF of signed 16 bits with both ends": (
        tiff(SIGNED, tags=[Tag(LOWEST, SIGNED_SHORT, -1000), Tag(HIGHEST, SIGNED_SHORT, 1000)]),
        levels(SIGNED, -1000, 1000),
    ),
    "TIFF of 32 bits with the highest": (
        tiff(RAMP_12.astype(np.uint32), tags=[Tag(HIGHEST, LONG, 8190)]),
        levels(RAMP_12, 0, 8190),
    ),
    "TIFF of floating point with both ends": (
        tiff(SHARES, tags=[Tag(LOWEST, FLOAT, 0), Tag(HIGHEST, FLOAT, 2)]),
        levels(SHARES, 0, 2),
    ),
    "PGM up to 65535": (
        pgm(RAMP_16, 65535),
        levels(RAMP_16, 0, 65535),
    ),
    "PGM up to 4095": (
        pgm(RAMP_12, 4095),
        levels(RAMP_12, 0, 4095),
    ),
    "PGM up to 1000": (
        pgm(RAMP_12[:15], 1000),
        levels(RAMP_12[:15], 0, 1000),
    ),
    "JPEG 2000": (
        saved(RAMP_16.astype(np.uint16), "JPEG2000"),
        levels(RAMP_16, 0, 65535),
    ),
}


@pytest.mark.parametrize("kind", DECLARED)
def test_the_declared_range_becomes_black_to_white(kind: str) -> None:
    content, expected = DECLARED[kind]

    pixels = opened(content)

    # Pillow itself rounds what it reads of a PGM, to 16 bits.
    rounding = 1 if kind.startswith("PGM up to 4095") else 0
    np.testing.assert_allclose(pixels[..., 0], expected, atol=rounding)
    np.testing.assert_array_equal(pixels[..., 1], pixels[..., 0])
    np.testing.assert_array_equal(pixels[..., 2], pixels[..., 0])


# No sample needs more than 10 bits.
COLOURS = np.stack([RAMP_12[:8], RAMP_12[8:16], RAMP_12[16:24]], axis=-1)
UNKNOWN_TIFF = "without the TIFF tags SMinSampleValue and SMaxSampleValue"

UNDECLARED: dict[str, tuple[bytes, str]] = {
    "TIFF of 32 bits": (
        tiff(RAMP_12.astype(np.uint32)),
        f"whole pixels of 32 bits {UNKNOWN_TIFF}",
    ),
    "TIFF of signed 32 bits": (
        tiff(RAMP_12.astype(np.int32)),
        f"signed pixels of 32 bits {UNKNOWN_TIFF}",
    ),
    "TIFF of signed 16 bits": (
        tiff(SIGNED),
        f"signed pixels of 16 bits {UNKNOWN_TIFF}",
    ),
    "TIFF of floating point": (
        tiff(SHARES),
        f"floating-point pixels of 32 bits {UNKNOWN_TIFF}",
    ),
    "TIFF of floating point with the highest alone": (
        tiff(SHARES, tags=[Tag(HIGHEST, FLOAT, 1)]),
        f"floating-point pixels of 32 bits {UNKNOWN_TIFF}",
    ),
    "TIFF with an empty range": (
        tiff(SHARES, tags=[Tag(LOWEST, FLOAT, 1), Tag(HIGHEST, FLOAT, 1)]),
        "TIFF tags SMinSampleValue 1 and SMaxSampleValue 1, between which there is nothing",
    ),
    # Samples of FITS are signed, which Pillow does not heed.
    "FITS of 16 bits": (
        b"SIMPLE  =                    T".ljust(80)
        + b"BITPIX  =                   16".ljust(80)
        + b"NAXIS   =                    2".ljust(80)
        + b"NAXIS1  =                    2".ljust(80)
        + b"NAXIS2  =                    2".ljust(80)
        + b"END".ljust(2880 - 400)
        + bytes(2880),
        "16-bit pixels, of which FITS does not say which is white",
    ),
    "PFM": (
        b"Pf 2 1 -1.0\n" + np.array([0, 1], "<f4").tobytes(),
        "floating-point pixels, of which PPM does not say which is white",
    ),
}


@pytest.mark.parametrize("kind", UNDECLARED)
def test_an_unknown_range_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    content, reason = UNDECLARED[kind]
    file = tmp_path / "scan"
    file.write_bytes(content)
    message = f"cannot read the image {file}: {reason}.*; save it with 8 or 16 bits a sample"

    with pytest.raises(LayerfuseError, match=message):
        Picture(str(file)).open()

    # The header says so by itself, before any picture of a study is decoded.
    assert reason in (Picture(str(file)).fault() or "")


CONTRADICTED: dict[str, tuple[bytes, str]] = {
    "TIFF above its highest": (
        tiff(RAMP_12.astype(np.uint16), tags=[Tag(HIGHEST, SHORT, 4000)]),
        "samples from 0 to 4095, of which the file declares 0 to 4000",
    ),
    "TIFF below its lowest": (
        tiff(SHARES, tags=[Tag(LOWEST, FLOAT, 0.5), Tag(HIGHEST, FLOAT, 1)]),
        "samples from 0 to 1, of which the file declares 0.5 to 1",
    ),
    "TIFF of no numbers": (
        tiff(SHARES * np.float32("nan"), tags=[Tag(LOWEST, FLOAT, 0), Tag(HIGHEST, FLOAT, 1)]),
        "samples from nan to nan",
    ),
    "PNG of colours, not scaled": (
        png(COLOURS, significant_bits=12),
        "16-bit colours of which the PNG declares 12 bits significant, none higher than 4095",
    ),
}


@pytest.mark.parametrize("kind", CONTRADICTED)
def test_samples_that_contradict_the_range_are_refused(kind: str) -> None:
    """Cut off at its ends, a picture would have another brightness than was meant."""
    content, reason = CONTRADICTED[kind]

    with pytest.raises(LayerfuseError, match=f"{reason}.*; save it with 8 or 16 bits"):
        opened(content)


def test_colours_of_16_bits_keep_their_upper_8(tmp_path: Path) -> None:
    # Other samples in each channel, so that exchanged channels show.
    colours = np.stack([RAMP_16, RAMP_16.T, RAMP_16[::-1]], axis=-1)

    for significant_bits in (None, 12, 16):
        pixels = opened(png(colours, significant_bits))

        np.testing.assert_array_equal(pixels, colours >> 8)


def test_a_transparent_sample_of_16_bits_is_white() -> None:
    """As it is of 8 bits: transparency is shown over white."""
    samples = np.array([[0, 20000, 40000, 65535]])

    pixels = opened(png(samples, transparent=20000))

    assert pixels[0, :, 0].tolist() == [0, 255, round(40000 / 257), 255]


def test_a_black_picture_is_black() -> None:
    """It does not tell how its samples are scaled, and need not."""
    black = np.zeros((3, 4), np.uint16)

    for significant_bits in (None, 8, 12):
        assert not opened(png(black, significant_bits)).any()
        assert not opened(png(np.stack([black] * 3, axis=-1), significant_bits)).any()
