"""Scores of compared runs, normalised within each category of a suite."""

from collections.abc import Sequence
from dataclasses import dataclass

from layerfuse.evaluate.compare import ComparedRun, Comparison


@dataclass(frozen=True)
class CategoryScore:
    """How a run does in one category of columns.

    Attributes:
        relative: mean over the columns of score / best score of all runs.
        min_max: mean over the columns of the place between the lowest and the highest score of all
            runs; None where all runs are equal in every column.
    """

    relative: float
    min_max: float | None


def category_scores(comparison: Comparison) -> dict[str, dict[str, CategoryScore]]:
    """Normalise the scores within each category, as figure 3 of IGVA (2501.08443) does.

    Args:
        comparison: of runs; columns that some run lacks are left out.

    Returns:
        By category, then by run.
    """
    by_category: dict[str, list[str]] = {}
    for column in comparison.columns:
        # The mean of a category is over the same columns for all runs.
        if all(column in run.cells for run in comparison.runs):
            by_category.setdefault(comparison.categories[column], []).append(column)
    scores: dict[str, dict[str, CategoryScore]] = {}
    for category, columns in by_category.items():
        scores[category] = {}
        for run in comparison.runs:
            scores[category][run.name] = _category_score(run, columns, comparison.runs)
    return scores


def _category_score(
    run: ComparedRun, columns: Sequence[str], runs: Sequence[ComparedRun]
) -> CategoryScore:
    """The normalised score of a run over some columns."""
    relative: list[float] = []
    places: list[float] = []
    for column in columns:
        values = [other.cells[column].value for other in runs]
        lowest, highest = min(values), max(values)
        value = run.cells[column].value
        # Where the best is nothing, all are equally good.
        relative.append(value / highest if highest else 1.0)
        if highest > lowest:
            places.append((value - lowest) / (highest - lowest))
    min_max = sum(places) / len(places) if places else None
    return CategoryScore(sum(relative) / len(relative), min_max)
