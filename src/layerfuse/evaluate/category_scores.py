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


@dataclass(frozen=True)
class CategoryColumns:
    """Over which of its columns the scores of a category are, the same for all runs.

    Attributes:
        all: the columns that the suite has in the category.
        relative: those that score / best is the mean over: without those that some run has no
            answers to, and those in which every run has 0.
        min_max: those that the place is the mean over: of these, without those in which all runs
            are equal.
    """

    all: list[str]
    relative: list[str]
    min_max: list[str]

    def of_all(self, columns: Sequence[str]) -> str:
        """Say how many of the category's columns some are, and which.

        Args:
            columns: `relative` or `min_max`.

        Returns:
            Such as `1 of 4: ScienceQA`.
        """
        count = f"{len(columns)} of {len(self.all)}"
        return f"{count}: {', '.join(columns)}" if columns else count


def category_columns(comparison: Comparison) -> dict[str, CategoryColumns]:
    """Say over which columns the scores of each category are.

    Args:
        comparison: of runs.

    Returns:
        By category, in the order of the suite; also those that no score can be given in.
    """
    categories: dict[str, CategoryColumns] = {}
    for column in comparison.columns:
        category = comparison.categories[column]
        columns = categories.setdefault(category, CategoryColumns([], [], []))
        columns.all.append(column)
        # The mean of a category is over the same columns for all runs.
        if not all(column in run.cells for run in comparison.runs):
            continue
        values = [run.cells[column].value for run in comparison.runs]
        # Where the best is nothing, there is no share of it, and nothing is known of who is better.
        if max(values) == 0:
            continue
        columns.relative.append(column)
        if max(values) > min(values):
            columns.min_max.append(column)
    return categories


def has_category_scores(comparison: Comparison) -> bool:
    """Whether normalised scores say more than the columns do.

    Args:
        comparison: of runs.

    Returns:
        True for several runs on several columns, at least one of which can be normalised.
    """
    is_of_several = len(comparison.runs) > 1 and len(comparison.categories) > 1
    return is_of_several and any(
        columns.relative for columns in category_columns(comparison).values()
    )


def category_scores(comparison: Comparison) -> dict[str, dict[str, CategoryScore]]:
    """Normalise the scores within each category, as figure 3 of IGVA (2501.08443) does.

    Args:
        comparison: of runs; `category_columns` says which of their columns are left out.

    Returns:
        By category, then by run; without categories of which all columns are left out.
    """
    scores: dict[str, dict[str, CategoryScore]] = {}
    for category, columns in category_columns(comparison).items():
        if not columns.relative:
            continue
        scores[category] = {}
        for run in comparison.runs:
            scores[category][run.name] = _category_score(run, columns, comparison.runs)
    return scores


def _category_score(
    run: ComparedRun, columns: CategoryColumns, runs: Sequence[ComparedRun]
) -> CategoryScore:
    """The normalised score of a run over some columns."""
    relative: list[float] = []
    for column in columns.relative:
        highest = max(other.cells[column].value for other in runs)
        relative.append(run.cells[column].value / highest)
    places: list[float] = []
    for column in columns.min_max:
        values = [other.cells[column].value for other in runs]
        lowest, highest = min(values), max(values)
        places.append((run.cells[column].value - lowest) / (highest - lowest))
    min_max = sum(places) / len(places) if places else None
    return CategoryScore(sum(relative) / len(relative), min_max)
