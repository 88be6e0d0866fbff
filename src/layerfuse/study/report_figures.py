"""The figures of a study's report: written as files, and made parts of its page."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerfuse.evaluate.records import FinishedRun, RunRecord
from layerfuse.pages.written_numbers import percent
from layerfuse.palette import INK, PALETTE
from layerfuse.study.depth_figure import family_curves, layer_scores, normalised
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
PANEL_COLUMNS = 3
LAYER_COLUMNS = 4
LAYER_TICKS = 6
LEAST_NUMBERS = 3
"""Numbers of layers of one strategy that make a set that grows."""


def draw(
    content: dict[str, Any],
    records: list[RunRecord],
    folder: Path,
    batch_sizes: Mapping[str, int],
) -> list[str]:
    """Write the figures as PNG and SVG.

    Args:
        content: of summary.json.
        records: of all finished runs, the content of results.jsonl.
        folder: where the figures go.
        batch_sizes: samples of a step, of the stages for which it is known.

    Returns:
        The names of the figures.
    """
    from layerfuse import plots

    # An arm's look follows its place in results.jsonl, not its rank, which new runs may change.
    order: dict[str, int] = {}
    stages: list[str] = []
    for record in records:
        order.setdefault(record.arm, len(order))
        for stage in record.losses:
            if stage not in stages:
                stages.append(stage)
    data = study_result(content, order)
    legend = LEGEND_ROW * math.ceil(len(data.arms) / LEGEND_COLUMNS)

    # Higher with every arm: one row each.
    with plots.figure(folder / "scores", WIDTH, 1.1 + 0.42 * len(data.arms)) as figure:
        plots.plot_scores(data, figure.subplots())
    with plots.figure(folder / "families", WIDTH, 4 + legend) as figure:
        axes = plots.plot_families(data, figure.subplots())
        add_legend(figure, [axes])
    names = ["scores", "families", *draw_depth(records, content["chance"]["families"], folder)]
    curves = validation_curves(records, order)
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
            curves = loss_curves(records, stage, order)
            losses = plots.StageLosses(stage, curves, batch_sizes.get(stage))
            plots.plot_losses(losses, axes)
        add_legend(figure, stage_axes)
    return [*names, "losses", *draw_growth(records, data.baseline, stages, folder)]


def study_result(content: dict[str, Any], order: dict[str, int]) -> "plots.StudyResult":
    """Give the scores of a study as `plots` draws them, which knows nothing of studies.

    Args:
        content: of summary.json.
        order: the place of each arm, which decides its look.

    Returns:
        The scores, by category where the study shows these.
    """
    from layerfuse import plots

    # Summaries of older versions show families.
    shown_by = content.get("shown_by", "families")
    arms = []
    for row in content["arms"]:
        groups = {}
        for group, score in row[shown_by].items():
            groups[group] = plots.Share(score["score"], score["interval"])
        arms.append(
            plots.ArmResult(
                arm=row["arm"],
                index=order[row["arm"]],
                mean=plots.Share(row["mean"]["score"], row["mean"]["interval"]),
                seed_means=row["seed_means"],
                families=groups,
            )
        )
    return plots.StudyResult(
        arms=arms,
        baseline=content["baseline"],
        chance=content["chance"]["mean"],
        family_chance=content["chance"][shown_by],
    )


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
        "layers": "Scores against the depth of the layer, a panel for each family of questions.",
        "growth": "The training loss against its steps, a panel for each number of layers.",
    }
    return texts[name]


def draw_depth(records: list[RunRecord], chance: dict[str, float], folder: Path) -> list[str]:
    """Write the figures of single layers, where the study has at least three with one setting.

    Args:
        records: of all finished runs.
        chance: what guessing scores, by family of questions.
        folder: where the figures go.

    Returns:
        The names of the figures; none where there are none.
    """
    from matplotlib.ticker import MaxNLocator

    from layerfuse import plots

    settings = layer_scores(records)
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

    families = list(settings[0].families)
    columns = LAYER_COLUMNS if len(families) > 2 * PANEL_COLUMNS else PANEL_COLUMNS
    rows = math.ceil(len(families) / columns)
    with plots.figure(folder / "layers", WIDTH, 0.6 + 1.8 * rows) as figure:
        panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat
        for number, axes in enumerate(panels):
            if number >= len(families):
                axes.set_axis_off()
                continue
            family = families[number]
            plots.plot_depth(family_curves(settings, family), axes)
            axes.axhline(100 * chance[family], color=INK, lw=1, ls=plots.DASHED, zorder=0)
            axes.set_title(family, loc="left", fontsize=10)
            axes.set(xlabel="", ylabel="", ylim=(0, 104))
            # Ticks of all layers would touch in a panel
            axes.xaxis.set_major_locator(MaxNLocator(LAYER_TICKS, integer=True))
            # Below the last panel of a column that is not full there is none to bear the ticks
            axes.tick_params(labelbottom=True)
        figure.supxlabel("layer", fontsize=10)
        figure.supylabel("% right", fontsize=10)
        if len(settings) > 1:
            add_legend(figure, panels)
    return ["depth", "layers"]


def draw_growth(
    records: list[RunRecord], baseline: str, stages: list[str], folder: Path
) -> list[str]:
    """Write the losses as the set of layers grows, a panel for each number of layers.

    As figure 4 of "Multi-Layer Visual Feature Fusion in Multimodal LLMs" (2503.06063).

    Args:
        records: of all finished runs.
        baseline: the name of an arm, which is drawn too.
        stages: of training, a row of panels or more each.
        folder: where the figure goes.

    Returns:
        The name of the figure; none where no strategy with one set of options has three
        numbers of layers.
    """
    from layerfuse import plots

    counts: dict[str, set[int]] = {}
    for record in records:
        counts.setdefault(_setting(record), set()).add(len(record.layers))
    if max(len(of_strategy) for of_strategy in counts.values()) < LEAST_NUMBERS:
        return []
    panels: dict[int, list[RunRecord]] = {}
    for record in sorted(records, key=lambda record: len(record.layers)):
        if len(counts[_setting(record)]) > 1 or record.arm == baseline:
            panels.setdefault(len(record.layers), []).append(record)
    rows_of_stage = math.ceil(len(panels) / PANEL_COLUMNS)
    rows = rows_of_stage * len(stages)
    with plots.figure(folder / "growth", WIDTH, 3.0 * rows) as figure:
        # Losses are compared across panels
        axes = figure.subplots(rows, PANEL_COLUMNS, squeeze=False, sharey=True).flat
        limits: list[tuple[float, float]] = []
        for stage in stages:
            for number in range(rows_of_stage * PANEL_COLUMNS):
                ax = next(axes)
                if number >= len(panels):
                    ax.set_axis_off()
                    continue
                layers = list(panels)[number]
                curves = loss_curves(panels[layers], stage, _looks(panels[layers], list(counts)))
                plots.plot_losses(plots.StageLosses(stage, curves), ax)
                title = f"{layers} layers" if layers > 1 else "1 layer"
                ax.set_title(title, loc="left", fontsize=10)
                # What differs between sets of layers comes late: early steps need no room.
                ax.set_xscale("linear")
                limits.append(ax.get_ylim())
                handles, labels = ax.get_legend_handles_labels()
                # Runs of one arm are one line of the legend
                by_label = dict(zip(labels, handles, strict=True))
                ax.legend(list(by_label.values()), list(by_label), fontsize=8, loc="lower left")
        # Each panel has limited the axis that all share to its own losses
        lows, highs = zip(*limits, strict=True)
        figure.axes[0].set_ylim(min(lows), max(highs))
    return ["growth"]


def _setting(record: RunRecord) -> str:
    """The strategy of a run with its options, but for where layers go, which the layers decide."""
    options = {name: value for name, value in record.fusion.items() if name != "placement"}
    return json.dumps(options, sort_keys=True)


def _looks(records: list[RunRecord], settings: list[str]) -> dict[str, int]:
    """The look of each arm: the colour of its strategy and options, told apart by lines."""
    looks: dict[str, int] = {}
    for record in records:
        if record.arm in looks:
            continue
        colour = settings.index(_setting(record)) % len(PALETTE)
        same_colour = sum(look % len(PALETTE) == colour for look in looks.values())
        looks[record.arm] = colour + len(PALETTE) * same_colour
    return looks


def validation_curves(
    records: list[RunRecord], order: dict[str, int]
) -> "list[plots.ValidationCurve]":
    """Give what the runs answered along training; none of studies without validation data."""
    from layerfuse.plots import ValidationCurve

    curves = []
    for record in records:
        if not record.along:
            continue
        curves.append(
            ValidationCurve(
                arm=record.arm,
                index=order[record.arm],
                samples=[point.samples for point in record.along],
                accuracy=[point.accuracy for point in record.along],
                loss=[point.loss for point in record.along],
            )
        )
    return curves


def loss_curves(
    records: list[RunRecord], stage: str, order: dict[str, int]
) -> "list[plots.LossCurve]":
    """Give the losses of one stage, one curve a run."""
    from layerfuse.plots import LossCurve

    curves = []
    for record in records:
        curves.append(
            LossCurve(
                arm=record.arm,
                index=order[record.arm],
                points=record.losses.get(stage, []),
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
