"""The figures of one answer: maps, attention, contributions, and where detail was looked up."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties, findfont, get_font
from PIL import Image

from layerfuse import plots
from layerfuse.explain.inspection import Inspection
from layerfuse.palette import INK

WIDTH = 9.2
"""of a figure, in inches"""
COLUMNS = 6
"""pictures in a row"""
WORDS = 12
"""tokens of an answer whose attention is drawn, at most"""
POINTS = 64
"""points drawn of those that a patch looks at: those of largest weight"""
SMALL_CHANGE = 0.1
"""nats that the axis of changes reaches to both sides at least"""
SIDE, TITLE, GAP = 1.5, 0.22, 0.08
"""of a panel with the gap behind it, of the room for its title, and of the gap, in inches"""
PANEL_DPI = 100
"""pixels an inch of panels"""
HEAT = 0.62
"""how much of a panel of attention is attention; the rest is the picture"""


@dataclass(frozen=True)
class Panel:
    """A small picture with a title.

    Attributes:
        title: above it.
        pixels: (height, width, 3) colours in 0..255.
    """

    title: str
    pixels: np.ndarray


def grid_panel(title: str, cells: np.ndarray) -> Panel:
    """A map over the cells of a picture, dark is little.

    Args:
        title: of the panel.
        cells: (rows, columns) numbers, or (rows, columns, 3) colours in 0..1.
    """
    if cells.ndim == 2:
        cells = _shades(cells)
    return Panel(title, (255 * cells).round().astype(np.uint8))


def attention_panel(word: str, picture: Image.Image, attention: np.ndarray, share: float) -> Panel:
    """Attention over the picture, bright where most of it went; the title says how much did.

    Args:
        word: the token, or what else attended.
        picture: that the encoder saw.
        attention: (rows, columns) shares of all attention, without what is not to be seen.
        share: of all attention that went to the picture, 0..1.
    """
    heat = Image.fromarray((255 * _shades(attention)).round().astype(np.uint8))
    heat = heat.resize(picture.size, Image.Resampling.BICUBIC)
    mixed = Image.blend(picture.convert("L").convert("RGB"), heat, HEAT)
    title = f"{drawable(word)}  {100 * share:.1f} %"
    return Panel(title, np.asarray(mixed))


def drawable(word: str) -> str:
    """A token as figures can show it: characters that their font lacks are question marks.

    Args:
        word: the token.
    """
    font = get_font(findfont(FontProperties(family=["sans-serif"])))
    shown = [character if font.get_char_index(ord(character)) else "?" for character in word]
    return "".join(shown).strip() or "␣"


def _shades(values: np.ndarray) -> np.ndarray:
    """(rows, columns) numbers as (rows, columns, 3) colours in 0..1, from the least to the most."""
    spread = max(float(values.max() - values.min()), np.finfo(np.float32).tiny)
    return mpl.colormaps["magma"]((values - values.min()) / spread)[..., :3]


def plot_panels(groups: Sequence[Sequence[Panel]], ax: Axes) -> Axes:
    """Plot panels side by side; each group begins in a row of its own.

    All are one image: a figure of many axes takes seconds to lay out.

    Args:
        groups: of panels.
        ax: where they are drawn, in inches.

    Returns:
        `ax`.
    """
    columns = _columns(groups)
    rows = sum(-(-len(group) // columns) for group in groups)
    width = round(PANEL_DPI * columns * SIDE)
    sheet = np.full((round(PANEL_DPI * rows * (SIDE + TITLE)), width, 4), 0, np.uint8)
    size = round(PANEL_DPI * (SIDE - GAP))
    row = 0
    for group in groups:
        for place, panel in enumerate(group):
            top = (row + place // columns) * (SIDE + TITLE) + TITLE
            left = place % columns * SIDE
            image = Image.fromarray(panel.pixels).resize((size, size), Image.Resampling.NEAREST)
            y, x = round(PANEL_DPI * top), round(PANEL_DPI * left)
            sheet[y : y + size, x : x + size, :3] = np.asarray(image)
            # Opaque; between the panels the page shows.
            sheet[y : y + size, x : x + size, 3] = 255
            ax.text(left, top - 0.05, panel.title, fontsize=8)
        row += -(-len(group) // columns)
    extent = (0, columns * SIDE, rows * (SIDE + TITLE), 0)
    ax.imshow(sheet, extent=extent, interpolation="nearest")
    ax.set_axis_off()
    return ax


def _columns(groups: Sequence[Sequence[Panel]]) -> int:
    """Panels in a row."""
    return min(COLUMNS, max(len(group) for group in groups))


@dataclass(frozen=True)
class LayerChanges:
    """What replacing each layer does to the log-probability of an answer.

    Attributes:
        layers: of the encoder.
        by_mean: change in nats with the layer's mean in its place.
        by_zero: the same with zeros.
    """

    layers: list[int]
    by_mean: list[float]
    by_zero: list[float]


def plot_contributions(data: LayerChanges, ax: Axes) -> Axes:
    """Plot the changes as two bars a layer; below zero the layer spoke for the answer.

    Args:
        data: of all layers.
        ax: where they are drawn.

    Returns:
        `ax`.
    """
    places = np.arange(len(data.layers))
    for offset, values, label, style in (
        (-0.2, data.by_mean, "replaced by its mean", plots.look(0)),
        (0.2, data.by_zero, "replaced by zeros", plots.look(1)),
    ):
        ax.bar(places + offset, values, width=0.38, color=style.color, label=label)
    ax.axhline(0, color=INK, lw=1)
    # Changes that are nothing are drawn as nothing.
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, -SMALL_CHANGE), max(high, SMALL_CHANGE))
    ax.set_xticks(places, [str(layer) for layer in data.layers])
    ax.set(xlabel="layer", ylabel="change of log p(answer), nats")
    ax.grid(axis="x", visible=False)
    return ax


@dataclass(frozen=True)
class PatchPoints:
    """Where one patch looks up detail.

    Attributes:
        picture: that the encoder saw.
        centre: (x, y) of the patch in shares of the picture.
        points: (points, 2) in shares of the picture.
        weights: (points,)
        levels: (points,) places in `level_names`.
        level_names: of the layers.
    """

    picture: Image.Image
    centre: tuple[float, float]
    points: np.ndarray
    weights: np.ndarray
    levels: np.ndarray
    level_names: list[str]


def plot_sampling(data: PatchPoints, ax: Axes) -> Axes:
    """Plot the points over the picture: a colour a layer, larger the more they weigh.

    Args:
        data: of one patch.
        ax: where they are drawn.

    Returns:
        `ax`.
    """
    width, height = data.picture.size
    ax.imshow(data.picture, alpha=0.7)
    heaviest = np.argsort(-data.weights)[:POINTS]
    # Beyond the picture there is nothing to read.
    inside = ((data.points >= 0) & (data.points <= 1)).all(axis=1)
    for level, name in enumerate(data.level_names):
        own = heaviest[data.levels[heaviest] == level]
        style = plots.look(level)
        ax.scatter(
            width * data.points[own, 0],
            height * data.points[own, 1],
            # In points²: the heaviest of all is 12 points wide.
            s=144 * data.weights[own] / data.weights.max(),
            color=style.color,
            alpha=0.7,
            lw=0,
            label=f"{name}: {100 * data.weights[inside & (data.levels == level)].sum():.0f} %",
        )
    ax.plot(
        width * data.centre[0],
        height * data.centre[1],
        "s",
        ms=11,
        mfc="none",
        mec=INK,
        mew=2,
    )
    # Points beyond the picture read nothing, and are out of sight.
    ax.set(xlim=(0, width), ylim=(height, 0))
    ax.set_axis_off()
    return ax


def draw(inspection: Inspection, folder: Path) -> list[str]:
    """Draw all figures of an answer as PNG and SVG.

    Args:
        inspection: what was seen.
        folder: where the figures go.

    Returns:
        Their names.
    """
    names = ["contributions", "maps"]
    facts = inspection.facts
    with plots.figure(folder / "contributions", WIDTH, 3.2) as figure:
        ax = figure.subplots()
        of_layers = facts.contributions
        changes = LayerChanges(
            layers=[one.layer for one in of_layers],
            by_mean=[one.by_mean.change for one in of_layers],
            by_zero=[one.by_zero.change for one in of_layers],
        )
        plot_contributions(changes, ax)
        ax.legend(loc="best")
    _draw_panels(_map_panels(inspection), folder / "maps")
    if facts.pieces and facts.blocks:
        _draw_panels(_attention_panels(inspection), folder / "attention")
        names.append("attention")
    if facts.levels:
        with plots.figure(folder / "sampling", 6.4, 4.6) as figure:
            ax = plot_sampling(_points_of(inspection, most_attended(inspection)), figure.subplots())
            ax.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
        names.append("sampling")
    # An earlier answer into the same folder may have had more.
    for name in {"attention", "sampling"} - set(names):
        for suffix in (".png", ".svg"):
            (folder / f"{name}{suffix}").unlink(missing_ok=True)
    return names


def _draw_panels(groups: Sequence[Sequence[Panel]], stem: Path) -> None:
    """Draw groups of panels as large as they are."""
    columns = _columns(groups)
    rows = sum(-(-len(group) // columns) for group in groups)
    with plots.figure(stem, columns * SIDE, rows * (SIDE + TITLE)) as figure:
        # The panels fill the figure: there is nothing to lay out.
        figure.set_layout_engine(None)
        plot_panels(groups, figure.add_axes((0, 0, 1, 1)))


def _map_panels(inspection: Inspection) -> list[list[Panel]]:
    """The layers in colours of one basis; every map in its own colours; norms."""
    facts = inspection.facts
    shared = [Panel("the picture", np.asarray(inspection.picture))]
    for layer, colours in zip(facts.layers, inspection.shared_colours, strict=True):
        shared.append(grid_panel(f"layer {layer}, one basis", colours))
    own: list[Panel] = []
    norms: list[Panel] = []
    for place, name in enumerate(facts.map_names):
        own.append(grid_panel(name, inspection.own_colours[place]))
        norms.append(grid_panel(f"norm, {name}", inspection.norms[place]))
    return [shared, own, norms]


def _attention_panels(inspection: Inspection) -> list[list[Panel]]:
    """The first words, each the mean over LLM blocks, then the blocks, each the mean over words;
    drawn without sinks where there are any, whose attention is still a part of the numbers."""
    attention = inspection.attention_without_sinks
    # (pieces, blocks)
    shares = inspection.attention.sum(axis=(2, 3))
    words: list[Panel] = []
    # (pieces, blocks, rows, columns) -> (pieces, rows, columns)
    for word, cells, share in zip(
        inspection.facts.pieces[:WORDS],
        attention.mean(axis=1),
        shares.mean(axis=1),
        strict=False,
    ):
        words.append(attention_panel(word, inspection.picture, cells, share))
    blocks: list[Panel] = []
    for block, (cells, share) in enumerate(
        zip(attention.mean(axis=0), shares.mean(axis=0), strict=True)
    ):
        blocks.append(attention_panel(f"block {block}", inspection.picture, cells, share))
    return [words, blocks]


def most_attended(inspection: Inspection) -> int:
    """The cell that the answer looked at most, sinks left out: of an empty answer the middle one.

    Args:
        inspection: what was seen.

    Returns:
        The place of the cell in raster order.
    """
    attention = inspection.attention_without_sinks
    if not attention.size:
        rows, columns = inspection.facts.grid
        return rows // 2 * columns + columns // 2
    return int(attention.mean(axis=(0, 1)).argmax())


def _points_of(inspection: Inspection, cell: int) -> PatchPoints:
    """Where the patch of a cell looks up detail."""
    rows, columns = inspection.facts.grid
    row, column = divmod(cell, columns)
    return PatchPoints(
        picture=inspection.picture,
        centre=((column + 0.5) / columns, (row + 0.5) / rows),
        points=inspection.points[cell],
        weights=inspection.point_weights[cell],
        levels=inspection.point_levels,
        level_names=inspection.facts.levels,
    )
