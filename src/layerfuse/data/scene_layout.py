"""Where the parts of a generated scene lie: the group of objects, the card beside it, the mark."""

import numpy as np

from layerfuse.data.drawing import SIZE


def place_group(count: int, position: str, radius: float, rng: np.random.Generator) -> np.ndarray:
    """The centres of the objects on a grid of 2 x 3 cells, a little displaced.

    Args:
        count: number of objects.
        position: of the card. The grid's longer side is turned to it, so that both fit.
        radius: of the circle around each object.
        rng: draws cells and displacements.

    Returns:
        x and y of each, relative to the first cell, (count, 2).
    """
    cells = rng.permutation(6)[:count]
    grid = np.stack([cells % 2, cells // 2], 1)
    if position in ("top", "bottom"):
        grid = grid[:, ::-1]
    centres = rng.uniform(-2.5, 2.5, (count, 2))
    # Displaced by 2.5 pixels towards each other, two objects stay 2 pixels apart.
    centres += (2 * radius + 7) * grid
    return centres


def place_card(
    centres: np.ndarray,
    position: str,
    *,
    radius: float,
    half: float,
    gap: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """The centre of the card beside the group.

    Args:
        centres: of the objects, (count, 2).
        position: the side of the group on which the card lies.
        radius: of the circle around each object.
        half: half of the card's box.
        gap: pixels between group and card.
        rng: draws the place along that side.

    Returns:
        x and y, in the coordinates of `centres`.
    """
    # The group's box, x and y.
    low = centres.min(0) - radius
    high = centres.max(0) + radius
    # Beside the middle, more or less; the coordinate across is set below.
    card = (low + high) / 2 + rng.uniform(-0.3, 0.3) * (high - low)
    if position == "left":
        card[0] = low[0] - gap - half
    elif position == "right":
        card[0] = high[0] + gap + half
    elif position == "top":
        card[1] = low[1] - gap - half
    else:
        card[1] = high[1] + gap + half
    return card


def place_mark(
    centres: np.ndarray,
    card: np.ndarray,
    *,
    radius: float,
    half: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """The centre of the mark, on the bare background.

    Args:
        centres: of the objects in the picture, (count, 2).
        card: its centre in the picture.
        radius: of the circle around each object.
        half: half of the card's box.
        rng: draws places, of which the first that is free is taken.

    Returns:
        x and y.
    """
    # So many that one is free in every scene: group and card never fill the picture.
    places = rng.uniform(12, SIZE - 12, (400, 2))
    # (400, 1, 2) - (count, 2) -> (400, count, 2): from every object to every place.
    offsets = places[:, None] - centres
    distances = np.hypot(offsets[:, :, 0], offsets[:, :, 1])
    # 11 pixels are more than the longest half of a mark (7).
    beside_objects = distances.min(1) > radius + 11
    beside_card = np.abs(places - card).max(1) > half + 11
    return places[beside_objects & beside_card][0]
