"""Normalised scores by category: along the layers of an encoder, and of several runs."""

import textwrap
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from layerfuse.plots.style import look

NUMBERED_BARS = 30
"""The most bars whose numbers stand above them without touching."""


@dataclass(frozen=True)
class DepthCurve:
    """How well the layers of an encoder serve one kind of question.

    Attributes:
        name: of the questions: a category, or a family.
        index: its place among the curves, which decides its look.
        layers: growing.
        values: the normalised score of each layer, the mean over seeds.
        lows: of each layer's seeds the lowest, on the same scale; of one seed the value itself.
        highs: of each layer's seeds the highest, likewise.
    """

    name: str
    index: int
    layers: list[int]
    values: list[float]
    lows: list[float]
    highs: list[float]


@dataclass(frozen=True)
class DepthResult:
    """The curves of all kinds of questions, normalised in one way, which `scale` says.

    A kind in which all layers are equal has none where that leaves nothing to divide by.
    """

    scale: str
    curves: list[DepthCurve]


def plot_depth(data: DepthResult, ax: Axes) -> Axes:
    """Plot normalised scores against the layer, one line a kind of question, bands over seeds.

    Args:
        data: of single layers.
        ax: where it is drawn.

    Returns:
        `ax`.
    """
    measured: set[int] = set()
    for curve in data.curves:
        measured.update(curve.layers)
        style = look(curve.index)
        # A band of no height would still be drawn as a hairline.
        if curve.lows != curve.highs:
            ax.fill_between(
                curve.layers,
                [100 * low for low in curve.lows],
                [100 * high for high in curve.highs],
                color=style.color,
                alpha=0.18,
                lw=0,
            )
        ax.plot(
            curve.layers,
            [100 * value for value in curve.values],
            color=style.color,
            ls=style.line_style,
            marker=style.marker,
            ms=4.5,
            lw=1.5,
            label=curve.name,
        )
    if not data.curves:
        ax.annotate("all layers equal", (0.5, 0.5), xycoords="axes fraction", ha="center")
    ax.set(xlabel="layer", ylabel=data.scale)
    # Ticks of more layers would touch; those of few stand where something was measured.
    if len(measured) <= 13:
        ax.set_xticks(sorted(measured))
    else:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return ax


@dataclass(frozen=True)
class CategoryBars:
    """What one run scores in each category.

    Attributes:
        run: its name.
        index: place of the run in the comparison, which decides its look.
        values: the normalised score in each category; NaN where there is none.
    """

    run: str
    index: int
    values: list[float]


@dataclass(frozen=True)
class CategoryResult:
    """The scores of all runs by category, normalised in one way, which `scale` says."""

    scale: str
    categories: list[str]
    runs: list[CategoryBars]


def plot_categories(data: CategoryResult, ax: Axes) -> Axes:
    """Plot normalised scores as bars: a group a category, in it a bar a run.

    Args:
        data: of a comparison.
        ax: where it is drawn.

    Returns:
        `ax`.
    """
    count = len(data.categories)
    places = np.arange(count)
    # The bars of a group fill 0.8 of its room
    room = 0.8 / len(data.runs)
    for row, run in enumerate(data.runs):
        style = look(run.index)
        offset = (row - (len(data.runs) - 1) / 2) * room
        bars = ax.bar(
            places + offset,
            [100 * value for value in run.values],
            width=0.86 * room,
            # A hatch has the colour of the edge, and needs a paler face to be seen
            color=(style.color, 0.3 if style.hatch else 0.85),
            edgecolor=style.color,
            hatch=style.hatch,
            lw=1.2,
            # On top of the axis: of a bar of no height this line is all that is seen
            zorder=3,
            clip_on=False,
            label=run.run,
        )
        if count * len(data.runs) <= NUMBERED_BARS:
            ax.bar_label(bars, fmt="{:.0f}", fontsize=8, padding=1.5)
    for place in places:
        # Room without bars would be read as zeros
        if all(np.isnan(run.values[place]) for run in data.runs):
            ax.annotate("all equal", (place, 4), ha="center", fontsize=9)
    # Long names go on in a second line; a row of ticks has room for some hundred letters
    width = max(8, 104 // count)
    names = [textwrap.fill(name, width, break_long_words=False) for name in data.categories]
    ax.set_xticks(places, names)
    # Room for the number above a bar of 100
    ax.set(xlim=(-0.5, count - 0.5), ylim=(0, 110), ylabel=data.scale)
    ax.set_yticks(range(0, 101, 20))
    ax.grid(axis="x", visible=False)
    return ax
