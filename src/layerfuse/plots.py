"""Figures: `plot_x(data, ax) -> ax` inside `figure`, one style for all.

Colours: Okabe and Ito's palette (2008), told apart with any common colour blindness; beyond its
eight, markers and line styles change, so that no two arms look alike up to 24 arms. Text and axes
are a mid grey that is legible on white and on dark paper, and figures have no background.

`data` of every plot is plain JSON, since figures are drawn from the files of reports. Shares are in
0..1 and shown in %.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from layerfuse.errors import LayerfuseError

INK = "#767b84"
"""Text and axes."""
FAINT = "#9aa0a8"
"""Grid, frame, and what is in the background."""
PALETTE = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#8f7ee7",
    "#a8672e",
)
MARKERS = ("o", "s", "D")
LINES = ("-", "--", ":")
DASHED = (0, (4, 3))
"""Dashes of 4 line widths with gaps of 3."""
TICKS = 14
"""Layers that get a tick, at most."""

# Any: matplotlib names the keys in a literal type of its own
RC: dict[Any, Any] = {
    # A page in dark mode must show through
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.edgecolor": FAINT,
    "grid.color": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "font.family": "sans-serif",
    "font.size": 10,
    "legend.fontsize": 9,
    # A dollar sign in the name of an arm is no formula
    "text.parse_math": False,
    # Text as outlines looks the same on machines without the font
    "svg.fonttype": "path",
    # Ids of an SVG are random otherwise, and equal data would give different files
    "svg.hashsalt": "layerfuse",
    "lines.solid_capstyle": "round",
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.7,
}
"""The style, as matplotlib's settings."""


@contextmanager
def figure(stem: Path, width: float, height: float) -> Iterator[Figure]:
    """Make a figure that is saved when the context ends; equal data give equal files.

    Args:
        stem: path without the suffix; its folder is made.
        width: in inches.
        height: in inches.

    Yields:
        The figure, empty.

    Raises:
        LayerfuseError: a file cannot be written.
    """
    with mpl.rc_context(RC):
        drawing = Figure(figsize=(width, height), layout="constrained")
        yield drawing
        png = stem.with_suffix(".png")
        svg = stem.with_suffix(".svg")
        try:
            stem.parent.mkdir(parents=True, exist_ok=True)
            # Versions and dates in the files would make equal figures differ
            drawing.savefig(png, dpi=160, metadata={"Software": None})
            drawing.savefig(svg, metadata={"Date": None, "Creator": None})
        except OSError as error:
            raise LayerfuseError(f"the figure {stem} cannot be written: {error}") from error


def look(index: int) -> dict[str, str]:
    """Give the look of an arm.

    Args:
        index: place of the arm in its study.

    Returns:
        Its `color`, `marker` and line style `ls`, as matplotlib names them.
    """
    # Colours come round first, so that up to eight arms differ by colour alone
    turn = index // len(PALETTE) % len(MARKERS)
    return {
        "color": PALETTE[index % len(PALETTE)],
        "marker": MARKERS[turn],
        "ls": LINES[turn],
    }


def smooth(values: Sequence[float], width: int) -> np.ndarray:
    """Compute a centred running mean; the window shrinks at both ends.

    Args:
        values: n numbers.
        width: of the window, in values.

    Returns:
        (n,).
    """
    # A window's sum is a difference of two running totals
    total = np.cumsum([0.0, *values])
    positions = np.arange(len(values))
    low = np.maximum(positions - width // 2, 0)
    high = np.minimum(positions + width // 2 + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def plot_losses(data: dict, ax: Axes) -> Axes:
    """Plot the training loss of one stage: raw faint, smoothed strong, one line a run.

    Args:
        data: `stage`, its name, and `curves`, each with its `arm`, the arm's `index` (place in the
            study, which decides the colour) and `points`, pairs of step and loss.
        ax: where it is drawn.

    Returns:
        `ax`.
    """
    for curve in data["curves"]:
        # A run that skips the stage has no points
        if not curve["points"]:
            continue
        steps = [step for step, _ in curve["points"]]
        losses = [loss for _, loss in curve["points"]]
        style = look(curve["index"])
        ax.plot(steps, losses, color=style["color"], alpha=0.13, lw=0.7)
        window = max(3, len(losses) // 12)
        ax.plot(
            steps,
            smooth(losses, window),
            color=style["color"],
            ls=style["ls"],
            lw=1.5,
            label=curve["arm"],
        )
    ax.set(xlabel=f"step of {data['stage']}", ylabel="loss")
    return ax


def plot_scores(data: dict, ax: Axes) -> Axes:
    """Plot the mean score per arm with its item interval, a dot per seed, blind guessing dashed.

    Args:
        data: `arms`, the best first, each with its name `arm`, `index` (place in the study),
            `score`, `interval` and `seed_means`; `baseline`, the name of an arm; `chance`.
        ax: where it is drawn.

    Returns:
        `ax`.
    """
    names = []
    for row, arm in enumerate(data["arms"]):
        _plot_arm_score(arm, row, ax)
        name = arm["arm"]
        if name == data["baseline"]:
            # A thin line lets every arm be compared with the baseline
            ax.axvline(100 * arm["score"], color=FAINT, lw=1, zorder=0)
            name += " (baseline)"
        names.append(name)

    chance = 100 * data["chance"]
    ax.axvline(chance, color=INK, lw=1, ls=DASHED, zorder=0)
    ax.annotate(
        "chance",
        xy=(chance, 1),
        # Just above the frame, right of the line
        xytext=(4, 3),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        fontsize=9,
    )
    ax.set_yticks(range(len(names)), names)
    # The first row, the best arm, is at the top
    ax.set(ylim=(len(names) - 0.4, -0.6), xlabel="mean over families, % right")
    ax.grid(axis="y", visible=False)
    return ax


def _plot_arm_score(arm: dict, row: int, ax: Axes) -> None:
    """One row of `plot_scores`: interval, seeds below it, and the score on top of both."""
    style = look(arm["index"])
    color = style["color"]
    interval = [100 * end for end in arm["interval"]]
    ax.plot(interval, [row, row], color=color, lw=4, alpha=0.35)
    seeds = [100 * mean for mean in arm["seed_means"]]
    seed_rows = [row + 0.24] * len(seeds)
    ax.plot(seeds, seed_rows, "o", ms=4, mfc="none", mec=color, mew=0.9)
    ax.plot(100 * arm["score"], row, style["marker"], color=color, ms=7.5, zorder=3)


def plot_families(data: dict, ax: Axes) -> Axes:
    """Plot the score per family: a marker per arm with its interval, blind guessing as a tick.

    Args:
        data: `families`, their names; `arms`, each with its name `arm`, `index` (place in the
            study) and `families`, by name the `score` and its `interval`; `chance` by family.
        ax: where it is drawn.

    Returns:
        `ax`.
    """
    for position, family in enumerate(data["families"]):
        # Every other family gets a band, so that markers are seen to belong to one
        if position % 2 == 0:
            ax.axvspan(position - 0.5, position + 0.5, color=FAINT, alpha=0.09, lw=0, zorder=0)
        chance = 100 * data["chance"][family]
        ends = [position - 0.42, position + 0.42]
        (tick,) = ax.plot(ends, [chance, chance], color=INK, lw=1.2, ls=DASHED, zorder=1)
        # The legend names it once
        if position == 0:
            tick.set_label("chance")

    # Arms stand side by side within the middle 0.76 of a family's band
    count = len(data["arms"])
    offsets = (np.arange(count) - (count - 1) / 2) * 0.76 / count
    # Thinner and smaller the more there are, so that they do not touch
    line_width = max(1.0, 3.2 - count / 8)
    marker_size = max(3.0, 6.2 - count / 8)
    for arm, offset in zip(data["arms"], offsets, strict=True):
        scores = []
        lows = []
        highs = []
        for family in data["families"]:
            cell = arm["families"][family]
            low, high = cell["interval"]
            scores.append(100 * cell["score"])
            lows.append(100 * low)
            highs.append(100 * high)
        x = np.arange(len(scores)) + offset
        style = look(arm["index"])
        color = style["color"]
        ax.vlines(x, lows, highs, color=color, lw=line_width, alpha=0.4)
        ax.plot(x, scores, style["marker"], color=color, ms=marker_size, label=arm["arm"])
    ax.set_xticks(range(len(data["families"])), data["families"])
    ax.set(xlim=(-0.5, len(data["families"]) - 0.5), ylabel="% right")
    ax.grid(axis="x", visible=False)
    return ax


def plot_matrix(data: dict, ax: Axes) -> Axes:
    """Plot the similarity of layers as a heat map, groups of layers framed.

    Args:
        data: `matrix`, whose rows and columns are layers 0, 1, ... (None: undefined); `title`,
            `xlabel` and `ylabel`; `groups`, each a list of neighbouring layers.
        ax: where it is drawn.

    Returns:
        `ax`.
    """
    matrix = np.array(data["matrix"], dtype=float)
    if np.isnan(matrix).all():
        ax.set_title(f"{data['title']}: undefined", fontsize=10, loc="left")
        ax.set_axis_off()
        return ax
    # Colours mean the same in all figures, unless similarities are negative
    lowest = min(0.0, float(np.nanmin(matrix)))
    image = ax.imshow(matrix, cmap="magma", vmin=lowest, vmax=1)
    for group in data["groups"]:
        # Cells are centred on whole numbers, so their edges are halves
        edge = group[0] - 0.5
        # The white rim makes the frame visible on every colour of the map
        for color, width in (("white", 2.4), (PALETTE[0], 1.2)):
            ax.add_patch(_frame(edge, edge, len(group), color, width))

    rows, columns = matrix.shape
    step = -(-rows // TICKS)
    ax.set(
        xticks=range(0, columns, step),
        yticks=range(0, rows, step),
        xlabel=data["xlabel"],
        ylabel=data["ylabel"],
    )
    ax.grid(visible=False)
    ax.set_title(data["title"], fontsize=10, loc="left")
    bar = ax.figure.colorbar(image, ax=ax, fraction=0.046, pad=0.03)
    bar.outline.set_visible(False)
    return ax


def _frame(left: float, top: float, side: float, color: str, line_width: float) -> Rectangle:
    """A square without filling."""
    return Rectangle((left, top), side, side, fill=False, ec=color, lw=line_width)


def plot_tasks(data: dict, ax: Axes) -> Axes:
    """Plot tasks by layers as a heat map of score / best, the best cell of each task framed.

    Args:
        data: `tasks`, their names; `rows`, one a layer or selection, each with its `name` and
            `tasks`, by name the `accuracy` and what is `relative` to the task's best layer.
        ax: where it is drawn.

    Returns:
        `ax`.
    """
    # Tasks are rows here, layers are columns
    tasks = list(data["tasks"])
    columns = [row["name"] for row in data["rows"]]
    relative = np.zeros((len(tasks), len(columns)))
    scores = np.zeros_like(relative)
    for row, task in enumerate(tasks):
        for column, layer in enumerate(data["rows"]):
            cell = layer["tasks"][task]
            relative[row, column] = cell["relative"]
            scores[row, column] = 100 * cell["accuracy"]

    # Combinations can exceed the best single layer, which is 1
    ax.imshow(relative, cmap="magma", vmin=0.0, vmax=1.1, aspect="auto")
    for row, column in np.ndindex(*scores.shape):
        # The map is dark below and light above
        ink = "white"
        if relative[row, column] > 0.65:
            ink = "black"
        number = f"{scores[row, column]:.0f}"
        ax.text(column, row, number, ha="center", va="center", fontsize=8, color=ink)
    for row, best in enumerate(scores.argmax(axis=1)):
        ax.add_patch(_frame(best - 0.5, row - 0.5, 1, PALETTE[0], 2))
    ax.set_xticks(range(len(columns)), columns, rotation=25)
    ax.set_yticks(range(len(tasks)), tasks)
    ax.grid(visible=False)
    return ax


def plot_depth(data: dict, ax: Axes) -> Axes:
    """Plot score / best against depth, a line a task, with intervals and a ring at the best layer.

    Args:
        data: as for `plot_tasks`, with `layers` of every row and the `interval` of the accuracy;
            rows of several layers are left out.
        ax: where it is drawn.

    Returns:
        `ax`.
    """
    singles = [row for row in data["rows"] if len(row["layers"]) == 1]
    layers = [row["layers"][0] for row in singles]
    for index, task in enumerate(data["tasks"]):
        cells = [row["tasks"][task] for row in singles]
        # Where no layer reads the task, everything is 0
        best_accuracy = max(cell["accuracy"] for cell in cells) or 1.0
        relative = []
        lows = []
        highs = []
        for cell in cells:
            low, high = cell["interval"]
            relative.append(cell["relative"])
            lows.append(low / best_accuracy)
            highs.append(high / best_accuracy)
        style = look(index)
        color = style["color"]
        ax.fill_between(layers, lows, highs, color=color, alpha=0.12)
        (line,) = ax.plot(layers, relative, label=task, ms=4, lw=1.6)
        line.set(**style)
        best = int(np.argmax(relative))
        ax.plot(layers[best], relative[best], "o", ms=10, mfc="none", mec=color)
    ax.set(xticks=layers, xlabel="layer", ylabel="score / best layer's score")
    return ax
