"""Figures: `plot_x(data, ax) -> ax` inside `figure`, one style for all.

Colours are those of `layerfuse.palette`; beyond its eight, markers, line styles and hatches change,
so that no two arms look alike up to 24 arms. Figures have no background, so that they can stand on
white and on dark paper.

`data` of every plot is a value of its own type. Shares are in 0..1 and shown in %.
"""

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from layerfuse.errors import LayerfuseError
from layerfuse.palette import FAINT, INK, PALETTE

MARKERS = ("o", "s", "D")
LINES = ("-", "--", ":")
HATCHES = ("", "////", "....")
DASHED = (0, (4, 3))
"""Dashes of 4 line widths with gaps of 3."""
NUMBERED_BARS = 30
"""The most bars whose numbers stand above them without touching."""
SMOOTHED = 1.15
"""Losses are averaged over steps that differ by no more than this factor."""
FAR_CHANCE = 1.5
"""Chance is drawn among the scores up to so many times the range of these."""
DRAWN_POINTS = 300
"""Of a curve of losses, at most."""

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
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "font.family": "sans-serif",
    "font.size": 10,
    "legend.fontsize": 9,
    # A dollar sign in the name of an arm is no formula
    "text.parse_math": False,
    # As text it can be read aloud, searched and shown in a page's own typeface; matplotlib centres
    # it by anchors, so that another typeface stays in its place
    "svg.fonttype": "none",
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


@dataclass(frozen=True)
class Look:
    """How the marks of an arm look, in matplotlib's terms."""

    color: str
    marker: str
    line_style: str
    hatch: str


def look(index: int) -> Look:
    """Give the look of an arm.

    Args:
        index: place of the arm in its study.

    Returns:
        Its colour, marker, line style and hatch.
    """
    # Colours come round first, so that up to eight arms differ by colour alone
    turn = index // len(PALETTE) % len(MARKERS)
    return Look(
        color=PALETTE[index % len(PALETTE)],
        marker=MARKERS[turn],
        line_style=LINES[turn],
        hatch=HATCHES[turn],
    )


def smooth(steps: Sequence[int], values: Sequence[float]) -> np.ndarray:
    """Average each value with those of the steps that a logarithmic axis shows close to its own.

    Args:
        steps: (n,), growing, from 1 on.
        values: (n,), one a step.

    Returns:
        (n,): the mean of the values of all steps between 1 / 1.15 and 1.15 times the step.
    """
    places = np.asarray(steps, dtype=float)
    # A window's sum is a difference of two running totals
    total = np.cumsum([0.0, *values])
    low = np.searchsorted(places, places / SMOOTHED, side="left")
    high = np.searchsorted(places, places * SMOOTHED, side="right")
    return (total[high] - total[low]) / (high - low)


def thinned(count: int) -> np.ndarray:
    """Choose the points of a long curve that are drawn on a logarithmic axis.

    Args:
        count: of its points.

    Returns:
        Their positions, at most 300, closer at the start: a page with many runs stays small.
    """
    return np.unique(np.geomspace(1, count, DRAWN_POINTS).round().astype(int)) - 1


@dataclass(frozen=True)
class LossCurve:
    """The training loss of one run in one stage.

    Attributes:
        arm: its name.
        index: place of the arm in the study, which decides its look.
        points: step and loss; none where the run skips the stage.
    """

    arm: str
    index: int
    points: Sequence[tuple[int, float]]


@dataclass(frozen=True)
class StageLosses:
    """The losses of all runs in one stage.

    Attributes:
        stage: its name.
        curves: one a run.
        batch_size: samples of a step; None where it is not known.
    """

    stage: str
    curves: list[LossCurve]
    batch_size: int | None = None


def plot_losses(data: StageLosses, ax: Axes) -> Axes:
    """Plot the training loss of one stage: raw faint, smoothed strong, one line a run.

    Both axes are logarithmic: losses fall fastest in the first steps, and arms differ later. Where
    the batch size is known, the axis above counts samples.

    Args:
        data: of one stage.
        ax: where it is drawn.

    Returns:
        `ax`.
    """
    smoothed_losses: list[float] = []
    for curve in data.curves:
        # A run that skips the stage has no points
        if not curve.points:
            continue
        steps, losses = np.transpose(curve.points)
        drawn = thinned(len(steps))
        smoothed = smooth(steps, losses)
        smoothed_losses.extend(smoothed)
        style = look(curve.index)
        ax.plot(steps[drawn], losses[drawn], color=style.color, alpha=0.13, lw=0.7)
        ax.plot(
            steps[drawn],
            smoothed[drawn],
            color=style.color,
            ls=style.line_style,
            lw=1.5,
            label=curve.arm,
        )
    ax.set(xlabel=f"step of {data.stage}", ylabel="loss", xscale="log")
    # A line has a gap where its loss is not positive; clipped, it would fall out of the figure
    ax.set_yscale("log", nonpositive="mask")
    _set_loss_ticks(ax, smoothed_losses)
    batch_size = data.batch_size
    if batch_size is not None:
        samples = ax.secondary_xaxis(
            "top",
            functions=(
                lambda step: np.multiply(step, batch_size),
                lambda count: np.divide(count, batch_size),
            ),
        )
        samples.set_xlabel("samples")
        samples.xaxis.set_major_formatter("{x:,g}")
        samples.xaxis.set_minor_locator(NullLocator())
        samples.spines["top"].set_visible(False)
    return ax


def _set_loss_ticks(ax: Axes, losses: Sequence[float]) -> None:
    """Limit the axis of losses to what lines show, and write numbers that do not touch."""
    # Numbers as they are written elsewhere, not powers of ten
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:g}")
    positive = [loss for loss in losses if loss > 0]
    if not positive:
        return
    low, high = min(positive), max(positive)
    # Single recorded losses may be a hundred times smaller than any mean, and would press the
    # means together
    ax.set_ylim(low / 1.4, high * 1.4)
    # Numbers between the powers of ten too where few of these are passed
    if high < 30 * low:
        ax.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5, 7)))
    elif high < 300 * low:
        ax.yaxis.set_minor_locator(LogLocator(subs=(3,)))
    else:
        ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_minor_formatter("{x:g}")


@dataclass(frozen=True)
class ValidationCurve:
    """What one run answered along its training.

    Attributes:
        arm: its name.
        index: place of the arm in the study, which decides its look.
        samples: seen by each point.
        accuracy: at each point, 0..1.
        loss: at each point, in nats a token.
    """

    arm: str
    index: int
    samples: list[int]
    accuracy: list[float]
    loss: list[float]


def plot_validation(curves: Sequence[ValidationCurve], accuracy: Axes, loss: Axes) -> None:
    """Plot accuracy and loss on validation questions against samples seen, one line a run.

    Args:
        curves: of all runs.
        accuracy: where the accuracies are drawn.
        loss: where the losses are drawn.
    """
    for curve in curves:
        style = look(curve.index)
        percentages = [100 * share for share in curve.accuracy]
        for ax, values in ((accuracy, percentages), (loss, curve.loss)):
            ax.plot(
                curve.samples,
                values,
                color=style.color,
                ls=style.line_style,
                marker=style.marker,
                ms=4,
                lw=1.3,
                label=curve.arm,
            )
    accuracy.set(xlabel="samples seen in training", ylabel="validation, % right")
    loss.set(xlabel="samples seen in training", ylabel="validation loss, nats a token")


@dataclass(frozen=True)
class Share:
    """A share of right answers, and its 95 % interval [low, high]."""

    score: float
    interval: list[float]


@dataclass(frozen=True)
class SizeCurve:
    """What one arm scores at each number of training samples.

    Attributes:
        arm: its name.
        index: place of the arm in the study, which decides its look.
        samples: numbers of training samples, growing.
        shares: the score at each.
    """

    arm: str
    index: int
    samples: list[int]
    shares: list[Share]


def plot_data_sizes(curves: Sequence[SizeCurve], chance: float, ax: Axes) -> Axes:
    """Plot scores with their intervals against the number of training samples, one line an arm.

    Args:
        curves: of all arms; all have the same numbers of samples.
        chance: what guessing scores, 0..1.
        ax: where it is drawn.

    Returns:
        `ax`.
    """
    # Arms stand side by side within 8 % of a size, so that their intervals do not hide each other.
    offsets = np.linspace(0.96, 1.04, len(curves)) if len(curves) > 1 else [1.0]
    for curve, offset in zip(curves, offsets, strict=True):
        style = look(curve.index)
        x = [offset * size for size in curve.samples]
        lows = [100 * share.interval[0] for share in curve.shares]
        highs = [100 * share.interval[1] for share in curve.shares]
        ax.vlines(x, lows, highs, color=style.color, lw=2.4, alpha=0.4)
        ax.plot(
            x,
            [100 * share.score for share in curve.shares],
            color=style.color,
            ls=style.line_style,
            marker=style.marker,
            ms=5,
            lw=1.3,
            label=curve.arm,
        )
    ax.axhline(100 * chance, color=INK, lw=1, ls=DASHED, zorder=0, label="chance")
    ax.set(xlabel="training samples", ylabel="mean over families, % right", xscale="log")
    sizes = curves[0].samples
    ax.set_xticks(sizes, [f"{size:,}" for size in sizes])
    # Powers of ten between the sizes would be read as sizes
    ax.xaxis.set_minor_locator(NullLocator())
    return ax


@dataclass(frozen=True)
class ArmResult:
    """What one arm scored.

    Attributes:
        arm: its name.
        index: place of the arm in the study, which decides its look.
        mean: over the families.
        seed_means: the mean of each run.
        families: by family.
    """

    arm: str
    index: int
    mean: Share
    seed_means: list[float]
    families: dict[str, Share]


@dataclass(frozen=True)
class StudyResult:
    """What a study's arms scored.

    Attributes:
        arms: the best first.
        baseline: the name of an arm.
        chance: what guessing scores, mean over the families.
        family_chance: what guessing scores, by family.
    """

    arms: list[ArmResult]
    baseline: str
    chance: float
    family_chance: dict[str, float]


def plot_scores(data: StudyResult, ax: Axes) -> Axes:
    """Plot the mean score per arm with its interval, a dot per seed, blind guessing dashed.

    Where guessing scores far less than all arms, the axis leaves it out and says so.

    Args:
        data: of a study.
        ax: where it is drawn.

    Returns:
        `ax`.
    """
    names = []
    for row, arm in enumerate(data.arms):
        _plot_arm_score(arm, row, ax)
        name = arm.arm
        if name == data.baseline:
            # A thin line lets every arm be compared with the baseline
            ax.axvline(100 * arm.mean.score, color=FAINT, lw=1, zorder=0)
            name += " (baseline)"
        names.append(name)

    _mark_chance(data, ax)
    ax.set_yticks(range(len(names)), names)
    # The first row, the best arm, is at the top
    ax.set(ylim=(len(names) - 0.4, -0.6), xlabel="mean over families, % right")
    ax.grid(axis="y", visible=False)
    return ax


def _mark_chance(data: StudyResult, ax: Axes) -> None:
    """A dashed line at chance, or words where it is so far off that arms would be in a heap."""
    lows = []
    highs = []
    for arm in data.arms:
        lows.append(100 * min(arm.mean.interval[0], *arm.seed_means))
        highs.append(100 * max(arm.mean.interval[1], *arm.seed_means))
    low, high = min(lows), max(highs)
    chance = 100 * data.chance
    if abs(low - chance) > FAR_CHANCE * (high - low) > 0:
        margin = 0.06 * (high - low)
        ax.set_xlim(low - margin, high + margin)
        ax.set_title(f"chance is {chance:.1f}, outside this axis", fontsize=9, loc="left")
        return
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


def _plot_arm_score(arm: ArmResult, row: int, ax: Axes) -> None:
    """One row of `plot_scores`: interval, seeds below it, and the score on top of both."""
    style = look(arm.index)
    color = style.color
    interval = [100 * end for end in arm.mean.interval]
    ax.plot(interval, [row, row], color=color, lw=4, alpha=0.35)
    seeds = [100 * mean for mean in arm.seed_means]
    seed_rows = [row + 0.24] * len(seeds)
    ax.plot(seeds, seed_rows, "o", ms=4, mfc="none", mec=color, mew=0.9)
    ax.plot(100 * arm.mean.score, row, style.marker, color=color, ms=7.5, zorder=3)


def plot_families(data: StudyResult, ax: Axes) -> Axes:
    """Plot the score per family: a marker per arm with its interval, blind guessing as a tick.

    Args:
        data: of a study.
        ax: where it is drawn.

    Returns:
        `ax`.
    """
    families = list(data.family_chance)
    for position, family in enumerate(families):
        # Every other family gets a band, so that markers are seen to belong to one
        if position % 2 == 0:
            ax.axvspan(position - 0.5, position + 0.5, color=FAINT, alpha=0.09, lw=0, zorder=0)
        chance = 100 * data.family_chance[family]
        ends = [position - 0.42, position + 0.42]
        (tick,) = ax.plot(ends, [chance, chance], color=INK, lw=1.2, ls=DASHED, zorder=1)
        # The legend names it once
        if position == 0:
            tick.set_label("chance")

    # Arms stand side by side within the middle 0.76 of a family's band
    count = len(data.arms)
    offsets = (np.arange(count) - (count - 1) / 2) * 0.76 / count
    # Thinner and smaller the more there are, so that they do not touch
    line_width = max(1.0, 3.2 - count / 8)
    marker_size = max(3.0, 6.2 - count / 8)
    for arm, offset in zip(data.arms, offsets, strict=True):
        scores = []
        lows = []
        highs = []
        for family in families:
            share = arm.families[family]
            low, high = share.interval
            scores.append(100 * share.score)
            lows.append(100 * low)
            highs.append(100 * high)
        x = np.arange(len(scores)) + offset
        style = look(arm.index)
        color = style.color
        ax.vlines(x, lows, highs, color=color, lw=line_width, alpha=0.4)
        ax.plot(x, scores, style.marker, color=color, ms=marker_size, label=arm.arm)
    ax.set_xticks(range(len(families)), families)
    ax.set(xlim=(-0.5, len(families) - 0.5), ylabel="% right")
    ax.grid(axis="x", visible=False)
    return ax


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
