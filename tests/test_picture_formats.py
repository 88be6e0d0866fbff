"""Which formats of pictures are read: those that Pillow decodes by itself, and no others."""

import io
import subprocess
from functools import partial
from pathlib import Path

import pytest
from PIL import EpsImagePlugin, Image

from layerfuse.errors import LayerfuseError
from layerfuse.vision.picture import FORMATS, Picture

RED = Image.new("RGB", (6, 4), "red")


def encoded(file_format: str) -> bytes:
    """A red picture in a file as Pillow writes it."""
    file = io.BytesIO()
    RED.save(file, file_format)
    return file.getvalue()


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA"])
def test_common_formats_are_read(tmp_path: Path, file_format: str) -> None:
    # What the file is called does not matter.
    file = tmp_path / "picture"
    file.write_bytes(encoded(file_format))
    picture = Picture(str(file))

    assert picture.fault() is None
    red, green, blue = picture.open().getpixel((2, 2))  # pyright: ignore[reportGeneralTypeIssues]

    # JPEG and WebP are not exact.
    assert red > 250
    assert green < 5
    assert blue < 5


DRAWN_BY_OTHERS = {
    "EPS": encoded("EPS"),
    # With a preview, the file begins with where its parts are.
    "EPS with a preview": b"\xc5\xd0\xd3\xc6" + bytes(28) + encoded("EPS"),
    "PDF": b"%PDF-1.7\n",
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "WMF": b"\xd7\xcd\xc6\x9a" + bytes(40),
}


@pytest.mark.parametrize("kind", DRAWN_BY_OTHERS)
def test_what_another_program_would_draw_is_refused_by_name(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No program is started, even where Pillow knows of one."""
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", "gs")
    monkeypatch.setattr(subprocess, "check_call", pytest.fail)
    file = tmp_path / "figure.png"
    file.write_bytes(DRAWN_BY_OTHERS[kind])
    name = kind.split()[0]
    reason = f"another program would have to draw {name}; save it as PNG or JPEG"

    with pytest.raises(LayerfuseError, match=f"cannot read the image {file}: {reason}"):
        Picture(str(file)).open()

    # Known from the header, before any picture of a study is decoded.
    assert reason in (Picture(str(file)).fault() or "")


def test_what_is_no_picture_is_refused_with_the_formats_that_are_read(tmp_path: Path) -> None:
    file = tmp_path / "notes.png"
    file.write_text("no picture")
    picture = Picture(str(file))

    with pytest.raises(LayerfuseError, match="none of the formats that are read") as refusal:
        picture.open()

    message = str(refusal.value)
    assert str(file) in message
    assert message == picture.fault()
    for file_format in ("PNG", "JPEG", "WEBP", "TIFF"):
        assert file_format in message


def test_no_format_is_read_that_is_not_pillows_own_work() -> None:
    """Those that start a program, that other packages register, and that hold any other file."""
    unread = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "IPTC", "FPX", "MIC"}

    assert not unread & set(FORMATS)


def test_every_other_format_of_pillow_is_read() -> None:
    """A format that Pillow learns is noticed here, and either read or refused."""
    Image.init()
    unread = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "IPTC", "FPX", "MIC", "SPIDER"}

    assert set(Image.OPEN) - unread <= set(FORMATS)


def test_a_picture_inside_an_iptc_file_is_not_read() -> None:
    """Pillow opens what such a file holds as a file of any format."""
    # Records and their numbers: grey, width, height, uncompressed, and what it holds.
    fields = [
        (3, 60, b"\x01\x00"),
        (3, 20, b"\x00\x06"),
        (3, 30, b"\x00\x04"),
        (3, 120, b"\x00\x05"),
        (8, 10, encoded("EPS")),
    ]
    content = b""
    for record, number, value in fields:
        content += bytes([0x1C, record, number]) + len(value).to_bytes(2, "big") + value

    with pytest.raises(LayerfuseError, match="none of the formats that are read"):
        Picture("hidden", partial(bytes, content)).open()


def test_of_an_animation_the_first_picture_is_read() -> None:
    file = io.BytesIO()
    blue = Image.new("RGB", RED.size, "blue")
    RED.save(file, "GIF", save_all=True, append_images=[blue])

    pixel = Picture("animation", file.getvalue).open().getpixel((0, 0))

    assert pixel == (255, 0, 0)
