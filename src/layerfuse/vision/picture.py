"""Pictures: read, checked and decoded in one way."""

import hashlib
import io
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import ExifTags, Image, UnidentifiedImageError

from layerfuse.errors import LayerfuseError
from layerfuse.vision.grey_range import GreyRange, declared_range, png_range, to_8_bits

LONGEST = 200
"""The longer side of a picture in shorter sides: encoders resize the shorter side to their own
size, which makes gigabytes of a thinner picture."""

# In Pillow's own order, as some of them are known by nothing but a header that can be read. Left
# out are those for which Pillow starts another program or needs one that registers itself (EPS,
# WMF, BUFR, GRIB, HDF5), those of which it knows the header alone (MPEG), or that hold a file of
# any other format (IPTC), and SPIDER, which has floating-point samples without a range.
FORMATS = (
    "BMP",
    "DIB",
    "GIF",
    "JPEG",
    "PPM",
    "PNG",
    "AVIF",
    "BLP",
    "CUR",
    "PCX",
    "DCX",
    "DDS",
    "FITS",
    "FLI",
    "FTEX",
    "GBR",
    "JPEG2000",
    "ICNS",
    "ICO",
    "IM",
    "IMT",
    "MCIDAS",
    "TIFF",
    "MSP",
    "PCD",
    "PIXAR",
    "PSD",
    "QOI",
    "SGI",
    "SUN",
    "TGA",
    "WEBP",
    "XBM",
    "XPM",
    "XVTHUMB",
)
"""The formats that are read, by Pillow's names: those that it decodes by itself."""

_UNREAD_FORMATS = {
    b"%!PS": "EPS",
    b"\xc5\xd0\xd3\xc6": "EPS",
    b"%PDF": "PDF",
    b"<svg": "SVG",
    b"\xd7\xcd\xc6\x9a": "WMF",
}
"""what files begin with that another program would have to draw"""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""what makes an image upright, by the orientation that its EXIF says"""


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
            return self._file().read_bytes()
        except LayerfuseError:
            raise
        # A path that is none is a ValueError; readers raise whatever their libraries raise.
        except Exception as error:
            raise self._unreadable(error) from error

    def _file(self) -> Path:
        """The path of the file, which may not exist.

        Raises:
            LayerfuseError: it is a folder, or a pipe or device, which might be read for ever.
        """
        path = Path(self.name)
        if path.exists() and not path.is_file():
            raise LayerfuseError(f"cannot read the image {self.name}: it is no ordinary file")
        return path

    def file_bytes(self) -> int:
        """How long the file of a picture without a reader is; it is not read.

        Raises:
            LayerfuseError: naming the file that is missing or cannot be read.
        """
        try:
            return self._file().stat().st_size
        except (OSError, ValueError) as error:
            raise self._unreadable(error) from error

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
            with self._file().open("rb") as file, open_image(file) as image:
                self._refuse_thin(image)
                declared_range(image)
        except FileNotFoundError:
            return f"no image file {self.name}"
        except LayerfuseError as error:
            return str(error)
        except Exception as error:
            return str(self._unreadable(error))
        return None

    def open(self) -> Image.Image:
        """The decoded image as 8-bit RGB, upright as its EXIF says, transparency over white.

        Raises:
            LayerfuseError: naming a file that is no readable image or thinner than `LONGEST`.
        """
        content = self.read()
        try:
            with open_image(io.BytesIO(content)) as image:
                # What the header refuses is refused before the pixels are decoded.
                self._refuse_thin(image)
                grey_range = declared_range(image)
                _refuse_damaged(image, content)
                upright = _upright(image)
                if image.format == "PNG":
                    grey_range = png_range(upright, content) or grey_range
                decoded = _rgb(upright, grey_range)
                # Without its EXIF, after which somebody could turn it once more.
                decoded.info.clear()
        except LayerfuseError:
            raise
        # Pillow has no error of its own: for broken files its decoders raise OSError, SyntaxError,
        # struct.error, RuntimeError, AttributeError and more, each format its own.
        except Exception as error:
            raise self._unreadable(error) from error
        if self.crop is None:
            return decoded
        left, top, right, bottom = self.crop
        width, height = decoded.size
        # Resized to the size of the whole, so that a crop changes no token count.
        corners = (left * width, top * height, right * width, bottom * height)
        return decoded.resize(decoded.size, box=corners)

    def _unreadable(self, error: Exception) -> LayerfuseError:
        """The error that names this picture."""
        # Some decoders raise errors without a word.
        reason = str(error) or type(error).__name__
        return LayerfuseError(f"cannot read the image {self.name}: {reason}")

    def _refuse_thin(self, image: Image.Image) -> None:
        """Raise LayerfuseError for an image whose header says that it is too thin."""
        width, height = image.size
        if max(width, height) > LONGEST * min(width, height):
            raise LayerfuseError(
                f"the image {self.name} has {width} x {height} pixels; its longer side may be at "
                f"most {LONGEST} times its shorter side"
            )


def as_read(image: Image.Image) -> Image.Image:
    """An image that somebody opened or made, as `Picture.open` gives a file's.

    Args:
        image: is decoded if it is not yet.

    Returns:
        8-bit RGB, upright as its EXIF says, transparency over white.

    Raises:
        LayerfuseError: it cannot be decoded, or does not say which samples are black and white.
    """
    try:
        # First, as an image that was turned has lost its header.
        grey_range = declared_range(image)
        decoded = _rgb(_upright(image), grey_range)
    # As in `Picture.open`
    except Exception as error:
        raise LayerfuseError(f"cannot read the given image: {error}") from error
    # Without its EXIF, after which somebody could turn it once more.
    decoded.info.clear()
    return decoded


def open_image(file: BinaryIO, *, header_alone: bool = False) -> Image.Image:
    """A picture whose header is read, and nothing else, as long as no pixels are asked for.

    Args:
        file: encoded, of one of `FORMATS`.
        header_alone: whether to refuse the one format of which Pillow decodes pixels at once, since
            what it says of their number is not to be believed.

    Raises:
        UnidentifiedImageError: if it is of none of them.
    """
    # Pillow else knows its commonest formats alone.
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]
    if header_alone:
        formats.remove("ICO")
    try:
        return Image.open(file, formats=formats)
    except UnidentifiedImageError:
        # Pillow's message names an object of Python.
        file.seek(0)
        start = file.read(8)
    for signature, unread in _UNREAD_FORMATS.items():
        if start.startswith(signature):
            raise UnidentifiedImageError(
                f"another program would have to draw {unread}; save it as PNG or JPEG"
            )
    raise UnidentifiedImageError(
        f"it is of none of the formats that are read, or its header is broken: {', '.join(formats)}"
    )


def _refuse_damaged(image: Image.Image, content: bytes) -> None:
    """Raise Pillow's error for damage that its decoders make another picture of.

    Args:
        image: not yet decoded.
        content: of its file.
    """
    if image.format == "PNG":
        # Decoding looks at few of a PNG's checksums. Opened once more, because an image that was
        # verified cannot be decoded.
        with open_image(io.BytesIO(content)) as verified:
            verified.verify()
    # A PCX of 8 bits has its palette at the end, 769 bytes that begin with 12. Where they are cut
    # off, its numbers of colours are taken for grey.
    is_pcx_of_8_bits = image.format == "PCX" and image.mode == "L"
    if is_pcx_of_8_bits and content[-769:-768] != b"\x0c":
        raise UnidentifiedImageError("the palette at its end is missing")


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF says; an EXIF without a readable orientation says nothing."""
    # First, because the EXIF may stand behind the pixels; TIFF turns its image itself.
    image.load()
    # Not `exif_transpose`, which writes all the tags again: one odd tag, of which cameras write
    # many, makes it fail, though the orientation can be read.
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    # Its readers of tags raise what comes: TypeError, struct.error, AttributeError and more. The
    # orientation is then looked for below.
    except Exception:
        orientation = None
    exif = image.info.get("exif")
    if orientation is None and isinstance(exif, bytes):
        # Pillow stops at the first tag that cannot be read.
        orientation = _find_orientation(exif)
    if orientation not in _TURNS:
        return image
    return image.transpose(_TURNS[orientation])


def _find_orientation(exif: bytes) -> int | None:
    """The orientation in an EXIF, whatever the other tags hold; None where there is none.

    Args:
        exif: a TIFF header, and a directory of 12 bytes a tag, of any content.
    """
    tiff = exif.removeprefix(b"Exif\0\0")
    byte_orders = {b"II": "<", b"MM": ">"}
    byte_order = byte_orders.get(tiff[:2])
    if byte_order is None:
        return None
    try:
        (start,) = struct.unpack_from(f"{byte_order}I", tiff, 4)
        (num_tags,) = struct.unpack_from(f"{byte_order}H", tiff, start)
        for place in range(num_tags):
            entry = start + 2 + 12 * place
            tag, kind, _, value = struct.unpack_from(f"{byte_order}HHIH", tiff, entry)
            # Kind 3 is a 16-bit number, as the standard has it.
            if tag == ExifTags.Base.Orientation and kind == 3:
                return value
    except struct.error:
        # The directory ends before its last tag.
        return None
    return None


def _rgb(image: Image.Image, grey_range: GreyRange | None) -> Image.Image:
    """The image as 8-bit RGB, with transparent parts over white.

    Args:
        image: decoded.
        grey_range: of its samples, if they have more than 8 bits.
    """
    if grey_range is not None:
        # `convert` would keep the lowest 8 bits.
        return to_8_bits(image, grey_range).convert("RGB")
    if image.has_transparency_data:
        # `convert("RGB")` alone would show the colours that transparent pixels happen to have.
        foreground = image.convert("RGBA")
        white = Image.new("RGBA", foreground.size, "white")
        return Image.alpha_composite(white, foreground).convert("RGB")
    return image.convert("RGB")
