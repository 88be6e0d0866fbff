"""Figures: `plot_x(data, ax) -> ax`, one style for all.

Colours: Okabe and Ito's palette (2008), told apart with any common colour blindness; beyond its
eight, markers and line styles change, so that no two arms look alike up to 24 arms. Text and axes
are a mid grey that is legible on white and on dark paper, and figures have no background.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

INK, FAINT = "#767b84", "#9aa0a8"
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8f7ee7", "#a8672e")
MARKERS, LINES = ("o", "s", "D"), ("-", "--", ":")
RC: dict[Any, Any] = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "svg.fonttype": "path",
    "svg.hashsalt": "layerfuse",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
    "text.parse_math": False,
}


@contextmanager
def style() -> Iterator[None]:
    """Every figure is made inside this context."""
    with mpl.rc_context(RC):
        yield


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
    labelled = set()
    for curve in data["curves"]:
        if not curve["points"]:
            continue
        steps, losses = zip(*curve["points"], strict=True)
        looks = look(curve["index"])
        ax.plot(steps, losses, color=looks["color"], alpha=0.13, lw=0.7)
        label = None if curve["arm"] in labelled else curve["arm"]
        labelled.add(curve["arm"])
        ax.plot(
            steps,
            smooth(losses, max(3, len(losses) // 12)),
            color=looks["color"],
            ls=looks["ls"],
            lw=1.5,
            label=label,
        )
    ax.set_xlabel(f"step of {data['stage']}")
    ax.set_ylabel("loss")
    return ax


def plot_scores(data: dict, ax: Axes) -> Axes:
    """Mean score per arm with its item interval, a dot per seed, blind guessing dashed.

    data: {"arms": [{"arm", "index", "score", "interval", "seed_means"}], "baseline", "chance"},
    the best arm first.
    """
    count = len(data["arms"])
    for row, arm in enumerate(data["arms"]):
        looks = look(arm["index"])
        low, high = (100 * v for v in arm["interval"])
        ax.plot([low, high], [row, row], color=looks["color"], lw=4, alpha=0.35)
        ax.plot(
            [100 * v for v in arm["seed_means"]],
            [row + 0.24] * len(arm["seed_means"]),
            "o",
            ms=4,
            mfc="none",
            mec=looks["color"],
            mew=0.9,
        )
        ax.plot(100 * arm["score"], row, looks["marker"], color=looks["color"], ms=7.5, zorder=3)
        if arm["arm"] == data["baseline"]:
            ax.axvline(100 * arm["score"], color=FAINT, lw=1, zorder=0)
    ax.axvline(100 * data["chance"], color=INK, lw=1, ls=(0, (4, 3)), zorder=0)
    ax.annotate(
        "chance",
        (100 * data["chance"], 1),
        xycoords=("data", "axes fraction"),
        xytext=(4, 3),
        textcoords="offset points",
        fontsize=9,
    )
    names = [
        f"{a['arm']} (baseline)" if a["arm"] == data["baseline"] else a["arm"] for a in data["arms"]
    ]
    ax.set_yticks(range(count), names)
    ax.set_ylim(count - 0.4, -0.6)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("mean over families, % right")
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
        ax.plot(
            [at - 0.42, at + 0.42],
            [100 * data["chance"][family]] * 2,
            color=INK,
            lw=1.2,
            ls=(0, (4, 3)),
            zorder=1,
            label="chance" if at == 0 else None,
        )
    for arm, offset in zip(data["arms"], offsets, strict=True):
        cells = [arm["families"][family] for family in data["families"]]
        x, looks = np.arange(len(cells)) + offset, look(arm["index"])
        low, high = np.transpose([cell["interval"] for cell in cells]) * 100
        ax.vlines(x, low, high, color=looks["color"], lw=max(1.0, 3.2 - count / 8), alpha=0.4)
        ax.plot(
            x,
            [100 * cell["score"] for cell in cells],
            looks["marker"],
            color=looks["color"],
            ms=max(3.0, 6.2 - count / 8),
            label=arm["arm"],
        )
    ax.set_xticks(range(len(data["families"])), data["families"])
    ax.set_xlim(-0.5, len(data["families"]) - 0.5)
    ax.grid(axis="x", visible=False)
    ax.set_ylabel("% right")
    return ax


def plot_matrix(data: dict, ax: Axes) -> Axes:
    """Similarity of layers as a heat map, the groups of layers framed.

    data: {"matrix": [[...]] (None: undefined), "title", "xlabel", "ylabel", "groups": [[layer,
    ...], ...]}; rows and columns are layers 0, 1, ...
    """
    matrix = np.array(data["matrix"], dtype=float)
    low = min(0.0, float(np.nanmin(matrix)))
    image = ax.imshow(matrix, cmap="magma", vmin=low, vmax=1)
    for group in data["groups"]:
        corner, side = (group[0] - 0.5,) * 2, len(group)
        ax.add_patch(Rectangle(corner, side, side, fill=False, ec="white", lw=2.4))
        ax.add_patch(Rectangle(corner, side, side, fill=False, ec="#0072b2", lw=1.2))
    every = -(-len(matrix) // 14)
    ax.set_xticks(range(0, matrix.shape[1], every))
    ax.set_yticks(range(0, matrix.shape[0], every))
    ax.grid(visible=False)
    ax.set_title(data["title"], fontsize=10, loc="left")
    ax.set_xlabel(data["xlabel"])
    ax.set_ylabel(data["ylabel"])
    bar = ax.figure.colorbar(image, ax=ax, fraction=0.046, pad=0.03)
    bar.outline.set_visible(False)
    return ax


def plot_tasks(data: dict, ax: Axes) -> Axes:
    """Tasks by layers (or selections), score / best of the task, the best cell of a task framed.

    data: {"tasks": [...], "columns": [...], "scores": [[...]] as shares, "relative": [[...]]}
    """
    relative, scores = np.array(data["relative"]), 100 * np.array(data["scores"])
    ax.imshow(relative, cmap="magma", vmin=0.0, vmax=1.1, aspect="auto")
    for row, column in np.ndindex(*scores.shape):
        ink = "black" if relative[row, column] > 0.65 else "white"
        text = f"{scores[row, column]:.0f}"
        ax.text(column, row, text, ha="center", va="center", fontsize=8, color=ink)
    for row, best in enumerate(scores.argmax(axis=1)):
        ax.add_patch(Rectangle((best - 0.5, row - 0.5), 1, 1, fill=False, ec="#0072b2", lw=2))
    ax.set_xticks(range(len(data["columns"])), data["columns"], rotation=25)
    ax.set_yticks(range(len(data["tasks"])), data["tasks"])
    ax.grid(visible=False)
    return ax


def plot_depth(data: dict, ax: Axes) -> Axes:
    """Score / best against depth, one line a task, with intervals and a ring at the best layer.

    data: {"layers": [...], "tasks": [{"task", "relative", "low", "high"}, ...]}
    """
    for index, task in enumerate(data["tasks"]):
        relative, looks = np.array(task["relative"]), look(index)
        ax.fill_between(data["layers"], task["low"], task["high"], color=looks["color"], alpha=0.12)
        ax.plot(data["layers"], relative, label=task["task"], ms=4, lw=1.6)[0].set(**looks)
        best = int(relative.argmax())
        ax.plot(data["layers"][best], relative[best], "o", ms=10, mfc="none", mec=looks["color"])
    ax.set_xticks(data["layers"])
    ax.set_xlabel("layer")
    ax.set_ylabel("score / best layer's score")
    return ax
