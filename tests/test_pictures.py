"""Pictures of every kind open as upright RGB, and those that cannot be opened are named."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from transformers import AutoModel, CLIPImageProcessorPil, SiglipImageProcessorPil

from layerfuse.errors import LayerfuseError
from layerfuse.look.pictures import find_pictures
from layerfuse.vision.encoder import Encoder
from layerfuse.vision.picture import Picture
from tests import tiny

RED = [255, 0, 0]
WHITE = [255, 255, 255]
BLACK = [0, 0, 0]
LIGHT_GRAY = [204, 204, 204]
"""Black at an opacity of 51 / 255 over white."""

GRAY = np.arange(256).reshape(16, 16)
"""Every level of 8 bits."""
RAMP = np.arange(65536).reshape(256, 256)
"""Every level of 16 bits."""
HALVES = [0] * 16 + [255] * 16
"""A row that is black at the left and white at the right."""


def image_of(pixels: Any, dtype: str = "u1") -> Image.Image:
    """An image of these pixels; their dtype decides Pillow's mode."""
    return Image.fromarray(np.array(pixels).astype(dtype))


def palette_image() -> Image.Image:
    """Three pixels of indexed colours: red, blue, black."""
    image = Image.new("P", (3, 1))
    # The place of each pixel's colour in the palette
    image.putdata([0, 1, 2])
    image.putpalette([255, 0, 0, 0, 0, 255, 0, 0, 0])
    return image


def turned_exif() -> Image.Exif:
    """To be shown turned by 90 degrees clockwise: left becomes top."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@dataclass(frozen=True)
class Kind:
    """A kind of picture, and how it looks once it is opened."""

    name: str
    image: Image.Image
    expected: Any
    """pixels, of a shape that broadcasts to (rows, columns, 3)"""
    options: dict[str, Any] = field(default_factory=dict)
    """with which it is saved"""
    tolerance: float = 0
    """per colour, for what is compressed with losses"""


# Over white: opaque, transparent, of 51 / 255
RGBA = image_of(
    [
        [
            [*RED, 255],
            [0, 0, 255, 0],
            [*BLACK, 51],
        ]
    ]
)
LA = image_of([[[9, 255], [9, 0], [0, 51]]])
# `convert` would keep the lowest 8 of 16 bits; 65535 / 257 = 255
RAMP_OF_8_BITS = np.round(RAMP / 257)[..., None]
KINDS = [
    Kind("gray.png", image_of(GRAY), expected=GRAY[..., None]),
    Kind(
        "bits.png",
        image_of(GRAY > 99, "?"),
        expected=255 * (GRAY > 99)[..., None],
    ),
    Kind("16.png", image_of(RAMP, "<u2"), expected=RAMP_OF_8_BITS),
    Kind("16.tif", image_of(RAMP, "<u2"), expected=RAMP_OF_8_BITS),
    Kind(
        "16-big-endian.tif",
        image_of(RAMP, ">u2"),
        expected=RAMP_OF_8_BITS,
    ),
    Kind("rgba.png", RGBA, expected=[[RED, WHITE, LIGHT_GRAY]]),
    Kind("la.png", LA, expected=[[[9, 9, 9], WHITE, LIGHT_GRAY]]),
    # An opacity for each colour of the palette
    Kind(
        "bytes.png",
        palette_image(),
        expected=[[RED, WHITE, LIGHT_GRAY]],
        options={"transparency": bytes([255, 0, 51])},
    ),
    # The number of the one colour that is transparent
    Kind(
        "index.png",
        palette_image(),
        expected=[[RED, WHITE, BLACK]],
        options={"transparency": 1},
    ),
    Kind(
        "index.gif",
        palette_image(),
        expected=[[RED, WHITE, BLACK]],
        options={"transparency": 1},
    ),
    # Magenta and yellow make red
    Kind(
        "cmyk.jpg",
        Image.new("CMYK", (8, 8), (0, 255, 255, 0)),
        expected=RED,
        tolerance=4,
    ),
    Kind(
        "turned.jpg",
        image_of([HALVES] * 8),
        expected=np.reshape(HALVES, (32, 1, 1)),
        options={"exif": turned_exif()},
    ),
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_kind_opens_as_rgb(tmp_path: Path, kind: Kind) -> None:
    file = tmp_path / kind.name
    kind.image.save(file, **kind.options)

    opened = Picture(str(file)).open()

    # What was 32 wide is upright now
    size = kind.image.size
    if kind.name == "turned.jpg":
        size = (8, 32)
    assert opened.mode == "RGB"
    assert opened.size == size
    pixels = np.asarray(opened)
    expected = np.broadcast_to(kind.expected, pixels.shape)
    np.testing.assert_allclose(pixels, expected, atol=kind.tolerance)


def noise() -> Image.Image:
    """A picture that no compression makes small."""
    random = np.random.default_rng(0)
    return image_of(random.integers(0, 256, (40, 30, 3)))


def half_a_file(file: Path) -> None:
    """A download that was interrupted."""
    noise().save(file)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def endless_comment(file: Path) -> None:
    """A text of 2 MB, which Pillow refuses by a ValueError of its own."""
    info = PngInfo()
    info.add_text("comment", "x" * 2_000_000, zip=True)
    noise().save(file, pnginfo=info)


def floating_point(file: Path) -> None:
    """Pixels whose black and white nobody knows."""
    image_of(np.ones((4, 4)), "f4").save(file)


def text(file: Path) -> None:
    """A page of an error, saved under the picture's name."""
    file.write_text("no picture")


def empty(file: Path) -> None:
    """No byte."""
    file.write_text("")


@pytest.mark.parametrize(
    ("name", "write_broken"),
    [
        ("float.tif", floating_point),
        ("half.png", half_a_file),
        ("half.jpg", half_a_file),
        ("text.png", text),
        ("empty.png", empty),
        ("comment.png", endless_comment),
    ],
)
def test_unreadable_pictures_are_named(
    tmp_path: Path, name: str, write_broken: Callable[[Path], None]
) -> None:
    file = tmp_path / name
    write_broken(file)

    with pytest.raises(LayerfuseError, match=rf"cannot read the image .*{name}"):
        Picture(str(file)).open()


@pytest.mark.parametrize(
    ("width", "height"),
    [
        (20000, 50),
        (50, 20000),
        # 200 times are allowed
        (201, 1),
    ],
)
def test_too_thin_pictures_are_named_with_their_size(
    tmp_path: Path, width: int, height: int
) -> None:
    """An encoder resizes the shorter side: gigabytes for the longer one."""
    file = tmp_path / "thin.png"
    Image.new("L", (width, height)).save(file)

    with pytest.raises(LayerfuseError, match=rf"thin\.png has {width} x {height} pixels"):
        Picture(str(file)).open()


SQUARE = {"height": tiny.SIZE, "width": tiny.SIZE}
EXTREME_SIZES = [
    (1, 1),
    (3, 3),
    (3, 40),
    (40, 3),
    (1, 200),
    (20000, 200),
]


@torch.no_grad()
@pytest.mark.parametrize(
    ("encoder", "processor"),
    [
        (
            "clip",
            CLIPImageProcessorPil(size={"shortest_edge": tiny.SIZE}, crop_size=SQUARE),
        ),
        ("siglip", SiglipImageProcessorPil(size=SQUARE)),
        ("dinov2", tiny.image_processor()),
    ],
    ids=["clip", "siglip", "dinov2"],
)
def test_extreme_pictures_reach_an_encoder(tmp_path: Path, encoder: str, processor: Any) -> None:
    """Sides of 1 and 3 pixels are not taken for channels."""
    for k, size in enumerate(EXTREME_SIZES):
        Image.new("RGB", size, "red").save(tmp_path / f"{k}.png")
    tower: Any = AutoModel.from_config(tiny.vision_config(encoder))

    images = [picture.open() for picture in find_pictures(str(tmp_path))]
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    features = Encoder(tower, range(5)).eval()(pixels)

    assert pixels.shape == (6, 3, tiny.SIZE, tiny.SIZE)
    # Red everywhere, in the first channel
    first_pixel = pixels[:1, :, :1, :1]
    assert (pixels == first_pixel).all()
    red, green = pixels[:, 0], pixels[:, 1]
    assert (red > green).all()
    for patches in features.patches:
        assert patches.isfinite().all()
        assert patches.shape == (6, 16, 24)


@pytest.mark.parametrize("whole", [False, True])
def test_pipes_and_folders_are_named_and_not_waited_for(tmp_path: Path, whole: bool) -> None:
    """Whoever opens a pipe waits for another process to write into it."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()

    for name in ("pipe.png", "folder.png"):
        reason = Picture(str(tmp_path / name)).fault(whole)

        assert reason == f"cannot read the image {tmp_path / name}: it is no ordinary file"
