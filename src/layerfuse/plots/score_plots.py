"""What a study's arms score: the mean over families, and each family."""

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from layerfuse.palette import FAINT, INK
from layerfuse.plots.style import DASHED, look

FAR_CHANCE = 1.5
"""Chance is drawn among the scores up to so many times the range of these."""


@dataclass(frozen=True)
class Share:
    """A share of right answers, and its 95 % interval [low, high]."""

    score: float
    interval: list[float]


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
