"""How a generated scene is drawn: everything at twice the size, to be halved at the end."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 224  # pixels of the finished picture, both ways
PAINT = {"red": "#d62024", "orange": "#f58a14", "yellow": "#f8de1e", "green": "#22963c"}
PAINT |= {"blue": "#1e50d7", "purple": "#7a2ca0", "pink": "#fa7dbe", "black": "#18181a"}
# Half widths and heights of the strokes, in doubled pixels.
MARKS = {"none": (), "dot": ((10, 10),), "line": ((14, 4),), "cross": ((14, 4), (4, 14))}
Triple = tuple[float, float, float]


def add_object(picture: Image.Image, shape: str, colour: str, radius: float, spot: Triple) -> None:
    """Draw one object of that circumradius at ``spot`` (x, y, angle in degrees)."""
    x, y, angle = spot
    turned = outline(shape) * radius * np.exp(1j * np.radians(angle))
    corners = (2 * (turned + complex(x, y))).tolist()
    ImageDraw.Draw(picture).polygon([(p.real, p.imag) for p in corners], PAINT[colour])


def add_mark(picture: Image.Image, kind: str, place: tuple[float, float]) -> None:
    """Draw a tiny mark, or nothing for "none"."""
    draw, x, y = ImageDraw.Draw(picture), 2 * place[0], 2 * place[1]
    for w, h in MARKS[kind]:
        stroke = draw.ellipse if w == h else draw.rectangle
        stroke((x - w, y - h, x + w, y + h), "black")


def background(texture: str, ground: tuple[float, ...], pattern: Triple) -> Image.Image:
    """The patterned ground; ``pattern`` is (period, phase, contrast in grey levels)."""
    period, phase, contrast = pattern
    y, x = ((steps + phase) / period for steps in np.ogrid[:SIZE, :SIZE])
    mask = {
        "plain": x + y < 0,
        "horizontal": y % 1 < 0.5,
        "vertical": x % 1 < 0.5,
        "diagonal": (x + y) % 1.4 < 0.7,
        "dots": (x % 1 - 0.5) ** 2 + (y % 1 - 0.5) ** 2 < 0.09,
        "checks": (x % 1 < 0.5) ^ (y % 1 < 0.5),
    }[texture]
    shades = np.array([ground, np.array(ground) - contrast]).astype(np.uint8)
    small = Image.fromarray(shades[np.broadcast_to(mask, (SIZE, SIZE)).astype(int)])
    return small.resize((2 * SIZE, 2 * SIZE), Image.Resampling.NEAREST)


def outline(shape: str) -> np.ndarray:
    """The corners x + iy of a shape within the unit circle, y downwards."""

    def arc(start: float, stop: float, steps: int) -> np.ndarray:
        return np.exp(1j * np.radians(np.linspace(start, stop, steps + 1)))

    return {
        "circle": arc(0, 360, 48),
        "square": arc(45, 405, 4),
        "triangle": arc(-90, 270, 3),
        "star": np.column_stack([arc(-90, 270, 5), 0.42 * arc(-54, 306, 5)]).ravel(),
        "heart": 0.48 * np.concatenate([arc(140, 330, 24) - 1, arc(210, 400, 24) + 1, [2j]]) - 0.2j,
        "diamond": np.array([-1j, 0.62, 1j, -0.62]),
        "ring": np.concatenate([arc(0, 360, 48), 0.55 * arc(360, 0, 48)]),
        "moon": np.concatenate([arc(48.7, 311.3, 40), 0.45 + 0.78 * arc(285.6, 74.4, 40)]),
    }[shape]


def add_card(picture: Image.Image, letter: str, place: tuple[float, float, float, float]) -> None:
    """Paste a light card with a dark letter at ``place`` (x, y, side, angle in degrees)."""
    x, y, width, angle = place
    side = round(2 * width)
    card = Image.new("RGBA", (side, side), "#fafaf8")
    draw = ImageDraw.Draw(card)
    draw.rectangle((0, 0, side - 1, side - 1), outline="#5a5a5a", width=3)
    font = ImageFont.load_default(size=0.8 * side)
    draw.text((side / 2, side / 2), letter, "#141414", font, anchor="mm", stroke_width=1)
    card = card.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    picture.paste(card, (round(2 * x - card.width / 2), round(2 * y - card.height / 2)), card)
