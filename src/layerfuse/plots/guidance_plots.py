"""What guidance does: weights by kind of question, and scores without it."""

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes

from layerfuse.palette import INK
from layerfuse.plots.style import DASHED, look


@dataclass(frozen=True)
class WeightMap:
    """Weights of layers or groups by kind of question.

    Attributes:
        title: of the map.
        kinds: names of the rows.
        choices: names of the columns.
        values: of each row, in percent or points.
        is_difference: whether the values are differences around 0.
        rules: rows above which a line divides the map.
    """

    title: str
    kinds: list[str]
    choices: list[str]
    values: list[list[float]]
    is_difference: bool
    rules: list[int]


def plot_guidance(data: WeightMap, ax: Axes) -> Axes:
    """Plot weights as a heat map, kinds of questions by layers or groups, with numbers.

    Args:
        data: of one model.
        ax: where it is drawn.

    Returns:
        `ax`.
    """
    values = np.array(data.values)
    # Differences of less than a point are pale: they are next to nothing.
    largest = max(float(np.abs(values).max()), 1.0)
    lowest = -largest if data.is_difference else 0.0
    color_map = mpl.colormaps["PuOr" if data.is_difference else "magma"]
    ax.imshow(values, cmap=color_map, vmin=lowest, vmax=largest, aspect="auto")
    for row, column in np.ndindex(*values.shape):
        # Dark numbers on light cells, light ones on dark cells
        red, green, blue, _ = color_map((values[row, column] - lowest) / (largest - lowest))
        lightness = 0.3 * red + 0.6 * green + 0.1 * blue
        ink = "black" if lightness > 0.5 else "white"
        # Adding zero turns a negative zero into zero
        number = round(float(values[row, column]), 1) + 0.0
        text = f"{number:+.1f}" if data.is_difference else f"{number:.1f}"
        text = text.replace("-", "\u2212")
        ax.text(column, row, text, ha="center", va="center", fontsize=8, color=ink)
    for rule in data.rules:
        ax.axhline(rule - 0.5, color="white", lw=3)
    ax.set_xticks(range(len(data.choices)), data.choices)
    ax.set_yticks(range(len(data.kinds)), data.kinds)
    ax.grid(visible=False)
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.set_title(data.title, fontsize=10, loc="left")
    return ax


@dataclass(frozen=True)
class ControlChange:
    """What becomes of the scores of a guided model without its guidance.

    Attributes:
        control: what takes the place of the guidance.
        index: place of the control, which decides its look.
        changes: by kind of question, the score under the control minus the guided one, 0..1.
        intervals: of each kind, 95 %.
    """

    control: str
    index: int
    changes: dict[str, float]
    intervals: dict[str, list[float]]


def plot_control_changes(controls: Sequence[ControlChange], ax: Axes) -> Axes:
    """Plot how much scores change without the guidance, a row a kind of question.

    Args:
        controls: of one model; all of the same kinds.
        ax: where it is drawn.

    Returns:
        `ax`.
    """
    kinds = list(controls[0].changes)
    offsets = (np.arange(len(controls)) - (len(controls) - 1) / 2) * 0.3
    for control, offset in zip(controls, offsets, strict=True):
        style = look(control.index)
        rows = np.arange(len(kinds)) + offset
        lows = [100 * control.intervals[kind][0] for kind in kinds]
        highs = [100 * control.intervals[kind][1] for kind in kinds]
        ax.hlines(rows, lows, highs, color=style.color, lw=3.2, alpha=0.4)
        changes = [100 * control.changes[kind] for kind in kinds]
        ax.plot(changes, rows, style.marker, color=style.color, ms=6.5, label=control.control)
    ax.axvline(0, color=INK, lw=1, ls=DASHED, zorder=0)
    ax.set_yticks(range(len(kinds)), kinds)
    ax.set(
        ylim=(len(kinds) - 0.4, -0.6),
        xlabel="score without the guidance minus score with it, points",
    )
    ax.grid(axis="y", visible=False)
    return ax
