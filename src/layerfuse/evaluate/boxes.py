"""Boxes that a model writes as four numbers, and how much two boxes overlap."""

import math
import re

from layerfuse.errors import LayerfuseError, short

Box = tuple[float, float, float, float]
"""Left, top, right and bottom of a box, in pixels of its picture."""

WHOLE_SIDE = {"unit": 1.0, "thousand": 1000.0}
"""What the far side of a picture is in scales that do not depend on its size."""
SCALES = ("pixels", *WHOLE_SIDE)
NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?", re.ASCII)
"""A number that is not the end of a word: the 2 of `bbox_2d` and the 1 of `x1` are none."""


def read_box(text: str, scale: str, size: tuple[int, int], padded: bool) -> Box | None:
    """Read a box in an answer.

    Args:
        text: an answer such as `[0.1, 0.2, 0.3, 0.4]`: left, top, right, bottom.
        scale: of its numbers: `pixels`, `unit` (0..1) or `thousand` (0..1000) of the picture.
        size: width and height of the picture in pixels.
        padded: whether the numbers are of the picture after LLaVA's padding to a square, which
            puts it in the middle, with the odd row or column at the bottom or right.

    Returns:
        The box in pixels of the picture without padding, as it was written: it may go beyond the
        picture or have its corners in the wrong order. None where the text has any other count
        than four numbers, or one that is infinite.

    Raises:
        LayerfuseError: the scale is unknown, or the picture is without pixels.
    """
    if scale not in SCALES:
        raise LayerfuseError(f"a box's scale is one of {', '.join(SCALES)}, not {short(scale)}")
    width, height = size
    if width < 1 or height < 1:
        raise LayerfuseError(f"a picture has at least one pixel, not {width} x {height}")
    numbers = [float(number) for number in NUMBER.findall(text)]
    if len(numbers) != 4:
        return None
    span = (max(size), max(size)) if padded else size
    left, right = (_pixels(number, scale, span[0]) for number in numbers[0::2])
    top, bottom = (_pixels(number, scale, span[1]) for number in numbers[1::2])
    # Whole pixels, because that is where LLaVA pastes the picture.
    before = (span[0] - width) // 2
    above = (span[1] - height) // 2
    box = left - before, top - above, right - before, bottom - above
    if all(math.isfinite(side) for side in box):
        return box
    return None


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
