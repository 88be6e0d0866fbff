"""The figures of a study's report: written as files, and made parts of its page."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from layerfuse.evaluate.records import FinishedRun
from layerfuse.pages.written_numbers import percent
from layerfuse.study.depth_figure import layer_scores, normalised
from layerfuse.study.summary import Summary

# A study imports this module before it trains; matplotlib is loaded when figures are drawn.
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from layerfuse import plots

# Figures: inches, and labels of arms in a row of the legend.
WIDTH = 9.2
LEGEND_ROW = 0.26
LEGEND_COLUMNS = 4


def draw(
    summary: Summary, runs: list[FinishedRun], folder: Path, batch_sizes: Mapping[str, int]
) -> list[str]:
    """Write the figures as PNG and SVG.

    Args:
        summary: the numbers of the study.
        runs: all finished runs.
        folder: where the figures go.
        batch_sizes: samples of a step, of the stages for which it is known.

    Returns:
        The names of the figures.
    """
    from layerfuse import plots

    # An arm's look follows its place in results.jsonl, not its rank, which new runs may change.
    order: dict[str, int] = {}
    stages: list[str] = []
    for run in runs:
        order.setdefault(run.record.arm, len(order))
        for stage in run.record.losses:
            if stage not in stages:
                stages.append(stage)
    # `plots` lies on a lower floor and knows nothing of studies.
    by_category = summary.shown_by == "categories"
    arms = []
    for arm in summary.arms:
        families = {}
        scores_of_groups = arm.categories if by_category else arm.families
        for family, score in scores_of_groups.items():
            families[family] = plots.Share(score.score, score.interval)
        arms.append(
            plots.ArmResult(
                arm=arm.arm,
                index=order[arm.arm],
                mean=plots.Share(arm.mean.score, arm.mean.interval),
                seed_means=arm.seed_means,
                families=families,
            )
        )
    data = plots.StudyResult(
        arms=arms,
        baseline=summary.baseline,
        chance=summary.chance.mean,
        family_chance=summary.chance.categories if by_category else summary.chance.families,
    )
    legend = LEGEND_ROW * math.ceil(len(arms) / LEGEND_COLUMNS)

    # Higher with every arm: one row each.
    with plots.figure(folder / "scores", WIDTH, 1.1 + 0.42 * len(arms)) as figure:
        plots.plot_scores(data, figure.subplots())
    with plots.figure(folder / "families", WIDTH, 4 + legend) as figure:
        axes = plots.plot_families(data, figure.subplots())
        add_legend(figure, [axes])
    names = ["scores", "families", *draw_depth(runs, folder)]
    curves = validation_curves(runs, order)
    if curves:
        with plots.figure(folder / "along", WIDTH, 3.4 + legend) as figure:
            accuracy_axes, loss_axes = figure.subplots(1, 2)
            plots.plot_validation(curves, accuracy_axes, loss_axes)
            add_legend(figure, [accuracy_axes])
        names.append("along")
    if not stages:
        return names

    with plots.figure(folder / "losses", WIDTH, 3.4 + legend) as figure:
        stage_axes = figure.subplots(1, len(stages), squeeze=False)[0]
        for stage, axes in zip(stages, stage_axes, strict=True):
            curves = loss_curves(runs, stage, order)
            losses = plots.StageLosses(stage, curves, batch_sizes.get(stage))
            plots.plot_losses(losses, axes)
        add_legend(figure, stage_axes)
    return [*names, "losses"]


def alt_text(name: str, summary: Summary) -> str:
    """Say what a figure shows, for those who cannot see it.

    Args:
        name: one that `draw` gave.
        summary: the numbers of the study.

    Returns:
        One or two sentences, with the table that has the same numbers where there is one.
    """
    best = summary.arms[0]
    shown = "category" if summary.shown_by == "categories" else "family"
    highest = f"{best.arm} is highest with {percent(best.mean.score)}"
    texts = {
        "scores": f"The mean score of each arm with its interval, as in the table Results: "
        f"{highest}, chance is {percent(summary.chance.mean)}.",
        "families": f"The scores of all arms with their intervals for each {shown} of questions, "
        "as in the table above.",
        "depth": f"Scores against the depth of the layer, a line for each {shown} of questions.",
        "along": "Accuracy and loss on validation questions against the samples seen in training, "
        "a line for each run.",
        "losses": "The training loss of each stage against its steps, a line for each run.",
    }
    return texts[name]


def draw_depth(runs: list[FinishedRun], folder: Path) -> list[str]:
    """Write the figure of single layers, where the study has at least three with one setting.

    Args:
        runs: all finished runs.
        folder: where the figure goes.

    Returns:
        The name of the figure; none where there is none.
    """
    from layerfuse import plots

    settings = layer_scores(runs)
    if not settings:
        return []
    groups = {group for setting in settings for group in setting.groups}
    legend = LEGEND_ROW * math.ceil(len(groups) / LEGEND_COLUMNS)
    with plots.figure(folder / "depth", WIDTH, 3.2 * len(settings) + legend) as figure:
        rows = figure.subplots(len(settings), 2, squeeze=False, sharey="col")
        for setting, (relative_axes, min_max_axes) in zip(settings, rows, strict=True):
            plots.plot_depth(normalised(setting, from_lowest=False), relative_axes)
            plots.plot_depth(normalised(setting, from_lowest=True), min_max_axes)
            # Beside arms of other settings it must be said whose layers these are.
            relative_axes.set_title(setting.setting, loc="left", fontsize=10)
        add_legend(figure, rows.flat)
    return ["depth"]


def validation_curves(
    runs: list[FinishedRun], order: dict[str, int]
) -> "list[plots.ValidationCurve]":
    """Give what the runs answered along training; none of studies without validation data."""
    from layerfuse.plots import ValidationCurve

    curves = []
    for run in runs:
        points = run.record.along
        if not points:
            continue
        curves.append(
            ValidationCurve(
                arm=run.record.arm,
                index=order[run.record.arm],
                samples=[point.samples for point in points],
                accuracy=[point.accuracy for point in points],
                loss=[point.loss for point in points],
            )
        )
    return curves


def loss_curves(
    runs: list[FinishedRun], stage: str, order: dict[str, int]
) -> "list[plots.LossCurve]":
    """Give the losses of one stage, one curve a run."""
    from layerfuse.plots import LossCurve

    curves = []
    for run in runs:
        arm = run.record.arm
        curves.append(
            LossCurve(
                arm=arm,
                index=order[arm],
                points=run.record.losses.get(stage, []),
            )
        )
    return curves


def arms_with_negative_losses(runs: list[FinishedRun]) -> list[str]:
    """Name the arms whose loss is 0 or less at some step, which a logarithmic axis cannot show."""
    names: list[str] = []
    for run in runs:
        lowest = 1.0
        for curve in run.record.losses.values():
            lowest = min([lowest, *(loss for _, loss in curve)])
        if lowest <= 0 and run.record.arm not in names:
            names.append(run.record.arm)
    return names


def add_legend(figure: "Figure", all_axes: "Iterable[Axes]") -> None:
    """Write every label of the axes once, below them."""
    handles = {}
    # By label: the arms are the same on all axes.
    for axes in all_axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles[label] = handle
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=LEGEND_COLUMNS,
    )
