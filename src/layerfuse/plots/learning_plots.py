"""How runs learn: losses, validation along training, and scores by the number of samples."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator

from layerfuse.palette import INK
from layerfuse.plots.score_plots import Share
from layerfuse.plots.style import DASHED, look

SMOOTHED = 1.15
"""Losses are averaged over steps that differ by no more than this factor."""
DRAWN_POINTS = 300
"""Of a curve of losses, at most."""


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
