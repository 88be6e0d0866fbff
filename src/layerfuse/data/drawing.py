"""How a generated scene is drawn: everything at twice the size, to be halved at the end."""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 224
"""pixels of the finished picture, both ways"""
SCALE = 2
"""drawn pixels per finished pixel, both ways: halving the drawing smooths its edges"""

PAINT = {
    "red": "#d62024",
    "orange": "#f58a14",
    "yellow": "#f8de1e",
    "green": "#22963c",
    "blue": "#1e50d7",
    "purple": "#7a2ca0",
    "pink": "#fa7dbe",
    "black": "#18181a",
}


@dataclass(frozen=True)
class Pose:
    """Where an object lies in the finished picture."""

    x: float
    """pixels from the left to the centre"""
    y: float
    """pixels from the top to the centre"""
    angle: float
    """degrees, clockwise"""


@dataclass(frozen=True)
class Card:
    """Where the card lies in the finished picture."""

    x: float
    """pixels from the left to the centre"""
    y: float
    """pixels from the top to the centre"""
    side: float
    """pixels"""
    angle: float
    """degrees, counter-clockwise"""


@dataclass(frozen=True)
class Pattern:
    """The measures of a background's texture."""

    period: float
    """pixels"""
    phase: float
    """pixels by which the texture is shifted, at least 0"""
    contrast: float
    """grey levels by which its dark parts are darker"""


def add_object(
    picture: Image.Image,
    *,
    shape: str,
    colour: str,
    radius: float,
    pose: Pose,
) -> None:
    """Draw one object.

    Args:
        picture: the drawing, `SCALE` times as large as the finished picture.
        shape: one that `outline` knows.
        colour: a key of `PAINT`.
        radius: of the circle around the shape, in pixels of the finished picture.
        pose: where it lies.
    """
    # A product with e^(i angle) turns the corners about the shape's centre.
    turned = outline(shape) * radius * np.exp(1j * np.radians(pose.angle))
    corners = SCALE * (turned + complex(pose.x, pose.y))
    points = np.column_stack([corners.real, corners.imag])
    ImageDraw.Draw(picture).polygon(points.ravel().tolist(), PAINT[colour])


def add_mark(picture: Image.Image, kind: str, centre: tuple[float, float]) -> None:
    """Draw a tiny mark.

    Args:
        picture: the drawing, `SCALE` times as large as the finished picture.
        kind: "dot", "line", "cross", or "none", which draws nothing.
        centre: x and y in pixels of the finished picture.
    """
    x = SCALE * centre[0]
    y = SCALE * centre[1]
    draw = ImageDraw.Draw(picture)
    # All measures here are pixels of the drawing.
    if kind == "dot":
        draw.ellipse((x - 10, y - 10, x + 10, y + 10), "black")
    if kind in ("line", "cross"):
        draw.rectangle((x - 14, y - 4, x + 14, y + 4), "black")
    if kind == "cross":
        draw.rectangle((x - 4, y - 14, x + 4, y + 14), "black")


def background(texture: str, ground: tuple[float, ...], pattern: Pattern) -> Image.Image:
    """The ground of a picture, with its texture.

    Args:
        texture: "plain", "horizontal", "vertical", "diagonal", "dots" or "checks".
        ground: red, green and blue of the bright parts, 0..255.
        pattern: the measures of the texture.

    Returns:
        The drawing that the other functions add to, `SCALE` times as large as the finished picture.
    """
    rows, columns = np.ogrid[:SIZE, :SIZE]
    # Coordinates in periods, (SIZE, 1) down and (1, SIZE) across: their broadcast is the picture.
    y = (rows + pattern.phase) / pattern.period
    x = (columns + pattern.phase) / pattern.period
    dark = np.broadcast_to(_dark_parts(texture, x, y), (SIZE, SIZE))
    bright_shade = np.array(ground).astype(np.uint8)
    dark_shade = (np.array(ground) - pattern.contrast).astype(np.uint8)
    # (SIZE, SIZE, 1) chooses between two shades (3,).
    pixels = np.where(dark[:, :, None], dark_shade, bright_shade)
    # Enlarged without smoothing: the reduction at the end gives back the very same pixels.
    drawn_size = (SCALE * SIZE, SCALE * SIZE)
    return Image.fromarray(pixels).resize(drawn_size, Image.Resampling.NEAREST)


def _dark_parts(texture: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Where a texture is dark.

    Args:
        texture: its name.
        x: coordinates across, in periods, (1, columns).
        y: coordinates down, in periods, (rows, 1).

    Returns:
        True where it is dark, of a shape that broadcasts to (rows, columns).
    """
    if texture == "plain":
        return np.zeros((1, 1), bool)
    if texture == "horizontal":
        return y % 1 < 0.5
    if texture == "vertical":
        return x % 1 < 0.5
    if texture == "diagonal":
        # About the square root of 2: at right angles to the stripes they repeat each period.
        return (x + y) % 1.4 < 0.7
    if texture == "dots":
        # Within 0.3 periods of the centre of a cell.
        return (x % 1 - 0.5) ** 2 + (y % 1 - 0.5) ** 2 < 0.09
    if texture == "checks":
        return (x % 1 < 0.5) ^ (y % 1 < 0.5)
    raise KeyError(texture)


def _arc(start: float, stop: float, steps: int) -> np.ndarray:
    """Points on the unit circle, both ends included, as x + iy.

    Args:
        start: degrees from the right, clockwise because y points down.
        stop: degrees; less than `start` goes counter-clockwise.
        steps: one less than the number of points.
    """
    return np.exp(1j * np.radians(np.linspace(start, stop, steps + 1)))


def outline(shape: str) -> np.ndarray:
    """The corners of a shape within the unit circle.

    Args:
        shape: "circle", "square", "triangle", "star", "heart", "diamond", "ring" or "moon".

    Returns:
        Complex numbers x + iy, y downwards.
    """
    if shape == "circle":
        return _arc(0, 360, 48)
    if shape == "square":
        return _arc(45, 405, 4)
    if shape == "triangle":
        return _arc(-90, 270, 3)
    if shape == "star":
        tips = _arc(-90, 270, 5)
        notches = 0.42 * _arc(-54, 306, 5)
        # (tips, 2) -> (tips * 2): tips and notches by turns.
        return np.column_stack([tips, notches]).ravel()
    if shape == "heart":
        left = _arc(140, 330, 24) - 1
        right = _arc(210, 400, 24) + 1
        point = [2j]
        # Two circles of radius 1 side by side and a point below, scaled into the unit circle.
        return 0.48 * np.concatenate([left, right, point]) - 0.2j
    if shape == "diamond":
        return np.array([-1j, 0.62, 1j, -0.62])
    if shape == "ring":
        outer = _arc(0, 360, 48)
        # The other way round: a polygon that comes back along its hole leaves the hole empty.
        inner = 0.55 * _arc(360, 0, 48)
        return np.concatenate([outer, inner])
    if shape == "moon":
        outer = _arc(48.7, 311.3, 40)
        # A smaller circle, moved to the right, cuts the crescent out; both end in the same points.
        inner = 0.45 + 0.78 * _arc(285.6, 74.4, 40)
        return np.concatenate([outer, inner])
    raise KeyError(shape)


def add_card(picture: Image.Image, letter: str, card: Card) -> None:
    """Paste a light card with a dark letter.

    Args:
        picture: the drawing, `SCALE` times as large as the finished picture.
        letter: one character.
        card: where it lies.
    """
    side = round(SCALE * card.side)
    # Transparent where the turned card leaves its box empty.
    face = Image.new("RGBA", (side, side), "#fafaf8")
    draw = ImageDraw.Draw(face)
    draw.rectangle((0, 0, side - 1, side - 1), outline="#5a5a5a", width=3)
    font = ImageFont.load_default(size=0.8 * side)
    draw.text(
        (side / 2, side / 2),
        letter,
        "#141414",
        font,
        # The middle of the letter, both ways, lies at these coordinates.
        anchor="mm",
        stroke_width=1,
    )
    turned = face.rotate(card.angle, Image.Resampling.BICUBIC, expand=True)
    left = round(SCALE * card.x - turned.width / 2)
    top = round(SCALE * card.y - turned.height / 2)
    picture.paste(turned, (left, top), turned)
