"""The figures of one answer: maps, attention, contributions, and where detail was looked up."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from matplotlib.axes import Axes
from PIL import Image

from layerfuse import plots
from layerfuse.explain.inspection import Inspection

WIDTH = 9.2
"""of a figure, in inches"""
COLUMNS = 6
"""pictures in a row"""
WORDS = 12
"""tokens of an answer whose attention is drawn, at most"""
POINTS = 64
"""points drawn of those that a patch looks at: those of largest weight"""
# Any: matplotlib takes options of several types
PANEL: dict[str, Any] = {"fontsize": 9, "loc": "left"}
"""how the title of a panel is written"""

Panel = TypeVar("Panel")


@dataclass(frozen=True)
class GridMap:
    """Something over the cells of a picture.

    Attributes:
        title: of the panel.
        cells: (rows, columns) numbers, or (rows, columns, 3) colours in 0..1.
    """

    title: str
    cells: np.ndarray


def plot_grid_map(data: GridMap, ax: Axes) -> Axes:
    """Plot a map over the cells of a picture, dark is little.

    Args:
        data: the map.
        ax: where it is drawn.

    Returns:
        `ax`.
    """
    ax.imshow(data.cells, cmap="magma", interpolation="nearest")
    ax.set_title(data.title, **PANEL)
    ax.set_axis_off()
    return ax


@dataclass(frozen=True)
class WordAttention:
    """Where one token of an answer looked.

    Attributes:
        word: the token.
        picture: that the encoder saw.
        attention: (rows, columns) shares of all its attention.
    """

    word: str
    picture: Image.Image
    attention: np.ndarray


def plot_attention(data: WordAttention, ax: Axes) -> Axes:
    """Plot attention over the picture: bright where most of it went.

    Args:
        data: of one token.
        ax: where it is drawn.

    Returns:
        `ax`.
    """
    extent = (0, data.picture.width, data.picture.height, 0)
    ax.imshow(data.picture.convert("L"), cmap="gray", extent=extent, alpha=0.55)
    ax.imshow(data.attention, cmap="magma", extent=extent, alpha=0.6, interpolation="bilinear")
    ax.set_title(f"{data.word.strip() or '␣'}  {100 * data.attention.sum():.1f} %", **PANEL)
    ax.set_axis_off()
    return ax


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
    ax.axhline(0, color=plots.INK, lw=1)
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
            label=f"{name}: {100 * data.weights[data.levels == level].sum():.0f} %",
        )
    ax.plot(
        width * data.centre[0],
        height * data.centre[1],
        "s",
        ms=11,
        mfc="none",
        mec=plots.INK,
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
    _draw_panels(_map_panels(inspection), folder / "maps", plot_grid_map)
    if facts.pieces and facts.blocks:
        _draw_panels(_attention_panels(inspection), folder / "attention", plot_attention)
        names.append("attention")
    if facts.levels:
        with plots.figure(folder / "sampling", 6.4, 4.6) as figure:
            ax = plot_sampling(_points_of(inspection, most_attended(inspection)), figure.subplots())
            ax.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
        names.append("sampling")
    return names


def _draw_panels(
    groups: Sequence[Sequence[Panel]], stem: Path, plot: Callable[[Panel, Axes], Axes]
) -> None:
    """Draw groups of panels, each beginning in a row of its own."""
    columns = min(COLUMNS, max(len(group) for group in groups))
    places: list[Panel | None] = []
    for group in groups:
        places.extend(group)
        # What is left of the last row of a group stays empty.
        places.extend([None] * (-len(group) % columns))
    rows = len(places) // columns
    side = WIDTH / COLUMNS
    with plots.figure(stem, columns * side, rows * (side + 0.2)) as figure:
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for panel, ax in zip(places, axes, strict=True):
            if panel is None:
                ax.set_axis_off()
            else:
                plot(panel, ax)


def _map_panels(inspection: Inspection) -> list[list[GridMap]]:
    """The layers in colours of one basis; every map in its own colours; norms."""
    facts = inspection.facts
    picture = GridMap("the picture", np.asarray(inspection.picture))
    shared = [picture]
    for layer, colours in zip(facts.layers, inspection.shared_colours, strict=True):
        shared.append(GridMap(f"layer {layer}, one basis", colours))
    own: list[GridMap] = []
    norms: list[GridMap] = []
    for place, name in enumerate(facts.map_names):
        own.append(GridMap(name, inspection.own_colours[place]))
        norms.append(GridMap(f"norm, {name}", inspection.norms[place]))
    return [shared, own, norms]


def _attention_panels(inspection: Inspection) -> list[list[WordAttention]]:
    """The first words, each the mean over LLM blocks, then the blocks, each the mean over words;
    without sinks where there are any."""
    attention = inspection.attention_without_sinks
    words: list[WordAttention] = []
    # (pieces, blocks, rows, columns) -> (pieces, rows, columns)
    for word, cells in zip(inspection.facts.pieces[:WORDS], attention.mean(axis=1), strict=False):
        words.append(WordAttention(word, inspection.picture, cells))
    blocks: list[WordAttention] = []
    for block, cells in enumerate(attention.mean(axis=0)):
        blocks.append(WordAttention(f"block {block}", inspection.picture, cells))
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
