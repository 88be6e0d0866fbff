"""Images that are given to a processor are read as training reads files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from layerfuse.errors import LayerfuseError
from layerfuse.vision.picture import Picture, as_read
from tests import tiny

ASKED = [[{"role": "user", "content": "<image>What?"}]]


def turned_photo(folder: Path) -> Path:
    """A photo with a bright half, which its EXIF turns by half a turn; 40 x 32 pixels."""
    pixels = np.zeros((32, 40, 3), dtype=np.uint8)
    pixels[:16] = 255
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[ExifTags.Base.Orientation] = 3
    image.save(folder / "photo.jpg", exif=exif, quality=95)
    return folder / "photo.jpg"


def transparent_picture(folder: Path) -> Path:
    """Pixels that nobody sees hold black, which white must cover."""
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(folder / "clear.png")
    return folder / "clear.png"


def deep_picture(folder: Path) -> Path:
    """A ramp of 16 bits, of which `convert` would keep the lowest 8."""
    ramp = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    Image.fromarray(ramp).save(folder / "deep.png")
    return folder / "deep.png"


@pytest.mark.parametrize("make", [turned_photo, transparent_picture, deep_picture])
def test_an_opened_image_is_read_as_its_file(make: Any, tmp_path: Path) -> None:
    file = make(tmp_path)
    processor = tiny.processor(tiny.model("single"))
    as_training = Picture(str(file)).open()
    expected = processor.image_processor([as_training], return_tensors="pt")["pixel_values"]

    with Image.open(file) as opened:
        of_image = processor.inputs(ASKED, images=[opened])["pixel_values"]
    with Image.open(file) as opened:
        called = processor(images=[opened], text="<image>")["pixel_values"]
    of_path = processor(images=[str(file)], text="<image>")["pixel_values"]

    assert torch.equal(of_image, expected)
    assert torch.equal(torch.as_tensor(np.array(called)), expected)
    assert torch.equal(torch.as_tensor(np.array(of_path)), expected)


def test_a_picture_in_a_part_of_a_chat_is_read_as_its_file(tmp_path: Path) -> None:
    file = turned_photo(tmp_path)
    processor = tiny.processor(tiny.model("single"))
    part = {"type": "image", "path": str(file)}
    chat = [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]

    inputs = processor.apply_chat_template(
        chat,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )

    as_training = Picture(str(file)).open()
    expected = processor.image_processor([as_training], return_tensors="pt")["pixel_values"]
    assert torch.equal(inputs["pixel_values"], expected)


def test_the_given_image_is_not_changed(tmp_path: Path) -> None:
    with Image.open(turned_photo(tmp_path)) as opened:
        as_read(opened)

        assert opened.getexif()[ExifTags.Base.Orientation] == 3


def test_an_image_without_a_range_is_refused() -> None:
    with pytest.raises(LayerfuseError, match="cannot read the given image: floating-point pixels"):
        as_read(Image.new("F", (4, 4)))


def test_other_colour_spaces_are_converted() -> None:
    """Full saturation and value at hue 0 is red."""
    red = Image.new("HSV", (4, 4), (0, 255, 255))

    assert as_read(red).getpixel((0, 0)) == (255, 0, 0)
