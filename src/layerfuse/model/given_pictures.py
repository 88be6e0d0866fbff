"""Images that people give to a processor, in any of the forms that transformers takes."""

import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from huggingface_hub.utils import httpx
from PIL import Image
from transformers.image_utils import load_image

from layerfuse.errors import LayerfuseError, short
from layerfuse.vision.picture import Picture, as_read


# Any: all that transformers takes for images
def read_images(images: Any) -> Any:
    """Images in which PIL images and files are read as training reads them.

    Args:
        images: PIL images, paths, addresses (`https:`, `file:`, `data:`), arrays, tensors, None;
            lists of these.

    Returns:
        The same, with PIL images in place of what had to be read.

    Raises:
        LayerfuseError: naming what cannot be read.
    """
    if isinstance(images, list | tuple):
        several: list[Any] = [*images]
        return [read_images(image) for image in several]
    if isinstance(images, Image.Image):
        return as_read(images)
    if isinstance(images, str | Path):
        return _read_place(str(images))
    # arrays and tensors hold pixels alone
    return images


def _read_place(place: str) -> Image.Image:
    """The image at a path or an address."""
    if place.startswith("file:"):
        place = url2pathname(urlsplit(place).path)
    if os.path.isfile(place):
        return Picture(place).open()
    try:
        return as_read(load_image(place))
    # what transformers and the libraries below it raise for addresses
    except (OSError, TypeError, ValueError, httpx.HTTPError) as error:
        raise LayerfuseError(
            f"cannot read the image {short(place)}: it is no file, and no address that leads to an "
            "image. Give a path, an address that begins with https:, file: or data:, or an image "
            "that Pillow opened"
        ) from error


# Any: all that transformers takes for images
def flat(images: Any) -> list[Any]:
    """The images of all conversations, in order.

    Args:
        images: one, or lists of images, or of lists of them.
    """
    if images is None:
        return []
    if not isinstance(images, list | tuple):
        return [images]
    several: list[Any] = []
    nested: list[Any] = [*images]
    for image in nested:
        several.extend(flat(image))
    return several
