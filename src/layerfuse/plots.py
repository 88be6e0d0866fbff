"""Figures: `plot_x(data, ax) -> ax` inside `figure`, one style for all.

Colours: Okabe and Ito's palette (2008), told apart with any common colour blindness; beyond its
eight, markers and line styles change, so that no two arms look alike up to 24 arms. Text and axes
are a mid grey that is legible on white and on dark paper, and figures have no background.
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

INK, FAINT = "#767b84", "#9aa0a8"
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8f7ee7", "#a8672e")
MARKERS, LINES = ("o", "s", "D"), ("-", "--", ":")
DASHED = (0, (4, 3))
RC: dict[Any, Any] = {
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), FAINT),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 0),
}
RC |= {"font.family": "sans-serif", "font.size": 10, "legend.fontsize": 9, "text.parse_math": False}
RC |= {"svg.fonttype": "path", "svg.hashsalt": "layerfuse", "lines.solid_capstyle": "round"}
RC |= {"axes.linewidth": 0.8, "axes.grid": True, "axes.axisbelow": True}
RC |= {"grid.alpha": 0.25, "grid.linewidth": 0.7}


@contextmanager
def figure(stem: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure, in inches, saved as `stem`.png and `stem`.svg; equal data give equal files."""
    with mpl.rc_context(RC):
        made = Figure(figsize=(width, height), layout="constrained")
        yield made
        stem.parent.mkdir(parents=True, exist_ok=True)
        made.savefig(stem.with_suffix(".png"), dpi=160, metadata={"Software": None})
        made.savefig(stem.with_suffix(".svg"), metadata={"Date": None, "Creator": None})


def look(index: int) -> dict[str, str]:
    """Colour, marker and line style of the arm with this place in the study."""
    turn = index // len(PALETTE) % len(MARKERS)
    return {"color": PALETTE[index % len(PALETTE)], "marker": MARKERS[turn], "ls": LINES[turn]}


def smooth(values: Sequence[float], width: int) -> np.ndarray:
    """Centred running mean; the window shrinks at both ends."""
    total = np.cumsum([0.0, *values])
    at = np.arange(len(values))
    low, high = np.maximum(at - width // 2, 0), np.minimum(at + width // 2 + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def plot_losses(data: dict, ax: Axes) -> Axes:
    """Training loss of one stage: raw faint, smoothed strong, one line a run, one colour an arm.

    data: {"stage": "align", "curves": [{"arm", "index", "points": [[step, loss], ...]}, ...]}
    """
    for curve in data["curves"]:
        if not curve["points"]:
            continue
        steps, losses = zip(*curve["points"], strict=True)
        looks = look(curve["index"])
        line = {"color": looks["color"], "ls": looks["ls"], "label": curve["arm"]}
        ax.plot(steps, losses, color=looks["color"], alpha=0.13, lw=0.7)
        ax.plot(steps, smooth(losses, max(3, len(losses) // 12)), lw=1.5, **line)
    ax.set(xlabel=f"step of {data['stage']}", ylabel="loss")
    return ax


def plot_scores(data: dict, ax: Axes) -> Axes:
    """Mean score per arm with its item interval, a dot per seed, blind guessing dashed.

    data: {"arms": [{"arm", "index", "score", "interval", "seed_means"}], "baseline", "chance"},
    the best arm first.
    """
    names, chance = [], 100 * data["chance"]
    for row, arm in enumerate(data["arms"]):
        looks, is_baseline = look(arm["index"]), arm["arm"] == data["baseline"]
        color, score = looks["color"], 100 * arm["score"]
        seeds = [100 * v for v in arm["seed_means"]]
        ax.plot([100 * v for v in arm["interval"]], [row, row], color=color, lw=4, alpha=0.35)
        ax.plot(seeds, [row + 0.24] * len(seeds), "o", ms=4, mfc="none", mec=color, mew=0.9)
        ax.plot(score, row, looks["marker"], color=color, ms=7.5, zorder=3)
        if is_baseline:
            ax.axvline(score, color=FAINT, lw=1, zorder=0)
        names.append(arm["arm"] + (" (baseline)" if is_baseline else ""))
    ax.axvline(chance, color=INK, lw=1, ls=DASHED, zorder=0)
    above = ("data", "axes fraction")
    ax.annotate("chance", (chance, 1), (4, 3), above, "offset points", fontsize=9)
    ax.set_yticks(range(len(names)), names)
    ax.set(ylim=(len(names) - 0.4, -0.6), xlabel="mean over families, % right")
    ax.grid(axis="y", visible=False)
    return ax


def plot_families(data: dict, ax: Axes) -> Axes:
    """Score per family: a marker per arm with its interval, blind guessing as a tick.

    data: {"families": [...], "arms": [{"arm", "index", "families": {f: {"score", "interval"}}}],
    "chance": {f: share}}
    """
    count = len(data["arms"])
    offsets = (np.arange(count) - (count - 1) / 2) * 0.76 / count
    for at, family in enumerate(data["families"]):
        if at % 2 == 0:
            ax.axvspan(at - 0.5, at + 0.5, color=FAINT, alpha=0.09, lw=0, zorder=0)
        share, label = 100 * data["chance"][family], "chance" if at == 0 else None
        ends = [at - 0.42, at + 0.42]
        ax.plot(ends, [share, share], color=INK, lw=1.2, ls=DASHED, zorder=1, label=label)
    for arm, offset in zip(data["arms"], offsets, strict=True):
        cells = [arm["families"][family] for family in data["families"]]
        x, looks = np.arange(len(cells)) + offset, look(arm["index"])
        color, scores = looks["color"], [100 * cell["score"] for cell in cells]
        low, high = np.transpose([cell["interval"] for cell in cells]) * 100
        ax.vlines(x, low, high, color=color, lw=max(1.0, 3.2 - count / 8), alpha=0.4)
        size = max(3.0, 6.2 - count / 8)
        ax.plot(x, scores, looks["marker"], color=color, ms=size, label=arm["arm"])
    ax.set_xticks(range(len(data["families"])), data["families"])
    ax.set(xlim=(-0.5, len(data["families"]) - 0.5), ylabel="% right")
    ax.grid(axis="x", visible=False)
    return ax


def plot_matrix(data: dict, ax: Axes) -> Axes:
    """Similarity of layers as a heat map, the groups of layers framed.

    data: {"matrix": [[...]] (None: undefined), "title", "xlabel", "ylabel", "groups": [[layer,
    ...], ...]}; rows and columns are layers 0, 1, ...
    """
    matrix = np.array(data["matrix"], dtype=float)
    if np.isnan(matrix).all():
        ax.set_title(f"{data['title']}: undefined", fontsize=10, loc="left")
        ax.set_axis_off()
        return ax
    image = ax.imshow(matrix, cmap="magma", vmin=min(0.0, float(np.nanmin(matrix))), vmax=1)
    for group in data["groups"]:
        corner, side = (group[0] - 0.5,) * 2, len(group)
        for color, width in (("white", 2.4), (PALETTE[0], 1.2)):
            ax.add_patch(Rectangle(corner, side, side, fill=False, ec=color, lw=width))
    every = -(-len(matrix) // 14)
    rows, columns = (range(0, count, every) for count in matrix.shape)
    ax.set(xticks=columns, yticks=rows, xlabel=data["xlabel"], ylabel=data["ylabel"])
    ax.grid(visible=False)
    ax.set_title(data["title"], fontsize=10, loc="left")
    ax.figure.colorbar(image, ax=ax, fraction=0.046, pad=0.03).outline.set_visible(False)
    return ax


def plot_tasks(data: dict, ax: Axes) -> Axes:
    """Tasks by layers (or selections), score / best of the task, the best cell of a task framed.

    data: {"tasks": [...], "rows": [{"name", "tasks": {t: {"accuracy" as share, "relative"}}}, ...]}
    """
    cells = [[row["tasks"][task] for row in data["rows"]] for task in data["tasks"]]
    relative = np.array([[cell["relative"] for cell in row] for row in cells])
    scores = np.array([[100 * cell["accuracy"] for cell in row] for row in cells])
    ax.imshow(relative, cmap="magma", vmin=0.0, vmax=1.1, aspect="auto")
    for row, column in np.ndindex(*scores.shape):
        ink = "black" if relative[row, column] > 0.65 else "white"
        number = f"{scores[row, column]:.0f}"
        ax.text(column, row, number, ha="center", va="center", fontsize=8, color=ink)
    for row, best in enumerate(scores.argmax(axis=1)):
        ax.add_patch(Rectangle((best - 0.5, row - 0.5), 1, 1, fill=False, ec=PALETTE[0], lw=2))
    ax.set_xticks(range(len(data["rows"])), [row["name"] for row in data["rows"]], rotation=25)
    ax.set_yticks(range(len(data["tasks"])), data["tasks"])
    ax.grid(visible=False)
    return ax


def plot_depth(data: dict, ax: Axes) -> Axes:
    """Score / best against depth, one line a task, with intervals and a ring at the best layer.

    data: as for `plot_tasks`, with "layers" and "interval" of the accuracy; one layer a row
    """
    singles = [row for row in data["rows"] if len(row["layers"]) == 1]
    layers = [row["layers"][0] for row in singles]
    for index, task in enumerate(data["tasks"]):
        cells, looks = [row["tasks"][task] for row in singles], look(index)
        relative = np.array([cell["relative"] for cell in cells])
        top = max(cell["accuracy"] for cell in cells) or 1.0
        low, high = np.transpose([cell["interval"] for cell in cells]) / top
        ax.fill_between(layers, low, high, color=looks["color"], alpha=0.12)
        ax.plot(layers, relative, label=task, ms=4, lw=1.6)[0].set(**looks)
        best = int(relative.argmax())
        ax.plot(layers[best], relative[best], "o", ms=10, mfc="none", mec=looks["color"])
    ax.set(xticks=layers, xlabel="layer", ylabel="score / best layer's score")
    return ax
