"""Boxes that a model writes as four numbers, and how much two boxes overlap."""

import math
import re
from typing import Literal

from layerfuse.errors import LayerfuseError
from layerfuse.recipe.strict import Strict

Box = tuple[float, float, float, float]
"""Left, top, right and bottom of a box, in pixels of its picture."""

WHOLE_SIDE = {"unit": 1.0, "thousand": 1000.0}
"""What the far side of a picture is in scales that do not depend on its size."""
FAR_BEYOND = 2.0
"""A box a little beyond its picture has numbers a little above 1; above this the scale is another
one."""
NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|(?:nan|inf(?:inity)?)\b)",
    re.ASCII | re.IGNORECASE,
)
"""A number that is not the end of a word: the 2 of `bbox_2d` and the 1 of `x1` are none. `nan` and
`inf` count too, so that four others beside them are no box."""


class BoxForm(Strict):
    """How a model writes boxes and is told them. The defaults are LLaVA-1.5's, whose training data
    have boxes of the padded picture: issue 606 of haotian-liu/LLaVA."""

    scale: Literal["unit", "pixels", "thousand"] = "unit"
    """Of the four numbers: `unit` for 0..1 of the picture's sides, `thousand` for 0..1000, or
    `pixels`."""
    padded: bool = True
    """Whether the numbers are of the picture after LLaVA's padding to a square, which puts it in
    the middle, with the odd row or column at the bottom or right; else of the picture itself."""


LLAVA_BOXES = BoxForm()


def read_box(text: str, form: BoxForm, size: tuple[int, int]) -> Box | None:
    """Read a box in an answer.

    Args:
        text: an answer such as `[0.1, 0.2, 0.3, 0.4]`: left, top, right, bottom.
        form: how the box is written.
        size: width and height of the picture in pixels.

    Returns:
        The box in pixels of the picture without padding, as it was written: it may go beyond the
        picture or have its corners in the wrong order. None where the text has any other count
        than four numbers, or one that is not finite.

    Raises:
        LayerfuseError: the picture is without pixels.
    """
    width, height = size
    if width < 1 or height < 1:
        raise LayerfuseError(f"a picture has at least one pixel, not {width} x {height}")
    numbers = _numbers_in(text)
    if len(numbers) != 4:
        return None
    span = (max(size), max(size)) if form.padded else size
    left, right = (_pixels(number, form.scale, span[0]) for number in numbers[0::2])
    top, bottom = (_pixels(number, form.scale, span[1]) for number in numbers[1::2])
    # Whole pixels, because that is where LLaVA pastes the picture.
    before = (span[0] - width) // 2
    above = (span[1] - height) // 2
    box = left - before, top - above, right - before, bottom - above
    if all(math.isfinite(side) for side in box):
        return box
    return None


def is_off_scale(text: str, form: BoxForm) -> bool:
    """Say whether a box is probably written in another scale than it is read in.

    Args:
        text: an answer.
        form: how its box is read.

    Returns:
        True for four numbers that are read as shares of the picture's sides, and of which one is
        far above 1. Of the other scales nothing can be said: small numbers are small boxes.
    """
    numbers = _numbers_in(text)
    if form.scale != "unit" or len(numbers) != 4:
        return False
    return all(math.isfinite(number) for number in numbers) and max(numbers) > FAR_BEYOND


def _numbers_in(text: str) -> list[float]:
    return [float(number) for number in NUMBER.findall(text)]


def _pixels(number: float, scale: str, span: int) -> float:
    if scale == "pixels":
        return number
    return number / WHOLE_SIDE[scale] * span


def box_iou(first: Box, second: Box) -> float:
    """Divide what two boxes share by what they cover together.

    Args:
        first: a box.
        second: another, of the same picture.

    Returns:
        The intersection over the union, 0..1; 0 if either has no area, or its corners in the
        wrong order.
    """
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / (_area(first) + _area(second) - shared)


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
