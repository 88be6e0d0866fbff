"""Figures of what guides a model, made of the content of `guidance.json` alone."""

from pathlib import Path

from layerfuse import plots
from layerfuse.explain.guidance_report import GuidanceReport, KindWeights

CONTROL_NAMES = {
    "other_category": "instruction of another kind of question",
    "mean": "mean weights",
}
"""What controls are called in figures and sentences."""
ALL = "all questions"


def draw_guidance(report: GuidanceReport, folder: Path) -> list[str]:
    """Draw the weights by kind of question, and what controls do to the scores.

    Args:
        report: what was measured.
        folder: gets `guidance.png` and `.svg`, and `controls.png` and `.svg` where there are
            controls.

    Returns:
        The names of the figures.

    Raises:
        LayerfuseError: a file cannot be written.
    """
    maps = weight_maps(report)
    rows = sum(len(each.kinds) for each in maps)
    # Inches grow with the numbers of rows and columns, so that the cells stay readable
    width = max(6.4, 2.4 + 0.46 * len(report.choices))
    with plots.figure(folder / "guidance", width, 1.7 + 0.36 * rows) as figure:
        heights = [len(each.kinds) for each in maps]
        axes = figure.subplots(len(maps), 1, height_ratios=heights, squeeze=False)[:, 0]
        for ax, weight_map in zip(axes, maps, strict=True):
            plots.plot_guidance(weight_map, ax)
        axes[-1].set_xlabel("layers")
    if not report.controls:
        return ["guidance"]

    changes = control_changes(report)
    height = 1.7 + 0.5 * len(changes[0].changes)
    with plots.figure(folder / "controls", 7.6, height) as figure:
        ax = plots.plot_control_changes(changes, figure.subplots())
        handles, labels = ax.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return ["guidance", "controls"]


def weight_maps(report: GuidanceReport) -> list[plots.WeightMap]:
    """Give the weights as maps: the mean, and by how much each kind differs from all questions.

    Args:
        report: what was measured.

    Returns:
        What `plot_guidance` draws; one map where all questions are of one kind.
    """
    kinds, rules = _kinds(report)
    whole = plots.WeightMap(
        title="mean weight, %",
        kinds=[ALL, *kinds],
        choices=report.choices,
        values=[_percent(report.overall.mean)]
        + [_percent(of_kind.mean) for of_kind in kinds.values()],
        is_difference=False,
        rules=[1, *(rule + 1 for rule in rules)],
    )
    if not kinds:
        return [whole]
    differences = []
    for of_kind in kinds.values():
        pairs = zip(of_kind.mean, report.overall.mean, strict=True)
        differences.append(_percent([weight - overall for weight, overall in pairs]))
    difference = plots.WeightMap(
        title="difference to all questions, points",
        kinds=list(kinds),
        choices=report.choices,
        values=differences,
        is_difference=True,
        rules=rules,
    )
    return [whole, difference]


def _kinds(report: GuidanceReport) -> tuple[dict[str, KindWeights], list[int]]:
    """The rows of a map, and those that begin another sort of kinds: categories, then families."""
    sorts = []
    for by_name in (report.categories, report.families):
        # A single category or family is all questions under another name
        if len(by_name) > 1:
            sorts.append(by_name)
    if len(sorts) == 2 and report.categories.keys() == report.families.keys():
        sorts.pop()
    kinds = {}
    rules = []
    for by_name in sorts:
        if kinds:
            rules.append(len(kinds))
        for name, of_kind in by_name.items():
            # A family may have the name of a category
            label = name if name not in kinds else f"{name} (family)"
            kinds[label] = of_kind
    return kinds, rules


def _percent(weights: list[float]) -> list[float]:
    return [100 * weight for weight in weights]


def control_changes(report: GuidanceReport) -> list[plots.ControlChange]:
    """Give what becomes of the scores under each control.

    Args:
        report: with controls.

    Returns:
        What `plot_control_changes` draws.
    """
    changes = []
    for index, (control, effect) in enumerate(report.controls.items()):
        differences = {"mean of families": effect.difference}
        if len(effect.by_kind) > 1:
            differences |= effect.by_kind
        # What is measured is the guided model minus the control
        by_kind = {kind: -each.difference for kind, each in differences.items()}
        intervals = {}
        for kind, each in differences.items():
            low, high = each.interval
            intervals[kind] = [-high, -low]
        name = CONTROL_NAMES.get(control, control)
        changes.append(plots.ControlChange(name, index, by_kind, intervals))
    return changes
