"""The figure of a comparison: the normalised scores of the models by category."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerfuse.evaluate.category_scores import (
    CategoryColumns,
    CategoryScore,
    category_columns,
    category_scores,
    has_category_scores,
)
from layerfuse.evaluate.compare import Comparison

# Tables need no figures; matplotlib is loaded when one is drawn.
if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from layerfuse import plots

NAME = "categories"
"""Of the figure's files, without the suffix."""
# Inches, and names of runs in a row of the legend.
WIDTH = 9.2
HEIGHT = 4.6
NAME_LINE = 0.18
LEGEND_ROW = 0.26
LEGEND_COLUMNS = 4


def draw_categories(comparison: Comparison, folder: Path) -> list[str]:
    """Write the normalised scores by category as PNG and SVG, scaled in both ways.

    Where a category is not over all of its columns, its name says over which.

    Args:
        comparison: of runs.
        folder: where the figure goes.

    Returns:
        The name of the figure; none of what `has_category_scores` says has none.

    Raises:
        LayerfuseError: a file cannot be written.
    """
    if not has_category_scores(comparison):
        return []
    scores = category_scores(comparison)
    columns = category_columns(comparison)
    from layerfuse import plots

    legend = LEGEND_ROW * math.ceil(len(comparison.runs) / LEGEND_COLUMNS)
    with plots.figure(folder / NAME, WIDTH, HEIGHT + legend) as figure:
        relative_axes, min_max_axes = figure.subplots(2, 1)
        plots.plot_categories(relative_bars(scores, columns), relative_axes)
        plots.plot_categories(min_max_bars(scores, columns), min_max_axes)
        # The second and later lines of names must not take their room from the bars.
        lines = _further_lines(relative_axes) + _further_lines(min_max_axes)
        figure.set_figheight(HEIGHT + NAME_LINE * lines + legend)
        # The runs are the same on both axes.
        handles, labels = relative_axes.get_legend_handles_labels()
        # matplotlib leaves the type of its options open.
        untyped: Any = figure
        untyped.legend(handles, labels, loc="outside lower center", ncols=LEGEND_COLUMNS)
    return [NAME]


def relative_bars(
    scores: dict[str, dict[str, CategoryScore]], columns: dict[str, CategoryColumns]
) -> "plots.CategoryResult":
    """Give the bars of the scores as shares of the best run's.

    Args:
        scores: by category, then by run.
        columns: by category, over which the scores are.

    Returns:
        What `plot_categories` draws.
    """
    values: dict[str, list[float]] = {}
    for of_runs in scores.values():
        for run, score in of_runs.items():
            values.setdefault(run, []).append(score.relative)
    names = [_name(category, columns[category], columns[category].relative) for category in scores]
    return _bars("score, % of the best run’s", names, values)


def min_max_bars(
    scores: dict[str, dict[str, CategoryScore]], columns: dict[str, CategoryColumns]
) -> "plots.CategoryResult":
    """Give the bars of the places between the lowest and the best run.

    Args:
        scores: by category, then by run.
        columns: by category, over which the scores are.

    Returns:
        What `plot_categories` draws; NaN in categories in which all runs are equal.
    """
    values: dict[str, list[float]] = {}
    for of_runs in scores.values():
        for run, score in of_runs.items():
            place = math.nan if score.min_max is None else score.min_max
            values.setdefault(run, []).append(place)
    names = [_name(category, columns[category], columns[category].min_max) for category in scores]
    return _bars("lowest run 0, best run 100", names, values)


def _further_lines(axes: "Axes") -> int:
    """How many lines the longest name of a category has below its first."""
    return max(label.get_text().count("\n") for label in axes.get_xticklabels())


def _name(category: str, columns: CategoryColumns, averaged: list[str]) -> str:
    """The category, with the columns that the bars are over where these are not all."""
    if averaged == columns.all:
        return category
    return f"{category} ({columns.of_all(averaged)})"


def _bars(
    scale: str, categories: list[str], values: dict[str, list[float]]
) -> "plots.CategoryResult":
    """Runs look as their place in the comparison says."""
    from layerfuse.plots import CategoryBars, CategoryResult

    runs: list[CategoryBars] = []
    for index, (run, of_run) in enumerate(values.items()):
        runs.append(CategoryBars(run, index, of_run))
    return CategoryResult(scale, categories, runs)
