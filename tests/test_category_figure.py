"""The figure of a comparison draws hand-worked scores by category, normalised both ways."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from PIL import Image

from layerfuse import plots
from layerfuse.evaluate import compare_report
from layerfuse.evaluate.category_scores import (
    CategoryColumns,
    CategoryScore,
    category_columns,
    category_scores,
)
from layerfuse.evaluate.compare import Cell, ComparedRun, Comparison
from layerfuse.evaluate.compare_figures import draw_categories, min_max_bars, relative_bars

CATEGORIES = {"GQA": "General", "MME": "General", "OCRBench": "OCR"}
# General: the first run has 1 and 1/2 of the best, the second 1/2 and 1, the third 3/4 and 3/4.
SCORES = {
    "last layer": {"GQA": 80.0, "MME": 1000.0, "OCRBench": 30.0},
    "concat": {"GQA": 40.0, "MME": 2000.0, "OCRBench": 60.0},
    "middle": {"GQA": 60.0, "MME": 1500.0, "OCRBench": 15.0},
}


def comparison_of(
    scores: dict[str, dict[str, float]], categories: dict[str, str] = CATEGORIES
) -> Comparison:
    """A comparison of runs with these scores, by run and column."""
    runs: list[ComparedRun] = []
    for name, of_run in scores.items():
        cells = {column: Cell(value, 100, value, 10) for column, value in of_run.items()}
        runs.append(ComparedRun(name, cells, None))
    return Comparison(
        suite="made up",
        columns=list(categories),
        categories=categories,
        baseline=runs[0].name,
        runs=runs,
        missing={},
        resamples=10,
        seed=0,
        notes=[],
    )


def drawn(data: plots.CategoryResult) -> Axes:
    """The axes of the figure."""
    ax = Figure().subplots()
    assert plots.plot_categories(data, ax) is ax
    return ax


def drawn_relative(comparison: Comparison) -> Axes:
    """The axes of the shares of the best run."""
    return drawn(relative_bars(category_scores(comparison), category_columns(comparison)))


def drawn_min_max(comparison: Comparison) -> Axes:
    """The axes of the places between the lowest and the best run."""
    return drawn(min_max_bars(category_scores(comparison), category_columns(comparison)))


def names_of(ax: Axes) -> list[str]:
    """The names of the categories, each in one line."""
    return [label.get_text().replace("\n", " ") for label in ax.get_xticklabels()]


def heights_of(ax: Axes) -> dict[str, list[float]]:
    """The heights of the bars of each run."""
    heights: dict[str, list[float]] = {}
    for bars in ax.containers:
        assert isinstance(bars, BarContainer)
        heights[str(bars.get_label())] = [bar.get_height() for bar in bars]
    return heights


def test_bars_are_shares_of_the_best_run() -> None:
    ax = drawn_relative(comparison_of(SCORES))

    assert heights_of(ax) == {"last layer": [75, 50], "concat": [75, 100], "middle": [75, 25]}
    assert ax.get_ylabel() == "score, % of the best run’s"


def test_bars_are_places_between_the_lowest_and_the_best_run() -> None:
    ax = drawn_min_max(comparison_of(SCORES))

    heights = heights_of(ax)
    assert heights["last layer"] == pytest.approx([50, 100 / 3])
    assert heights["concat"] == [50, 100]
    assert heights["middle"] == [50, 0]
    assert ax.get_ylabel() == "lowest run 0, best run 100"


def test_bars_stand_in_the_group_of_their_category() -> None:
    ax = drawn_relative(comparison_of(SCORES))

    assert names_of(ax) == ["General", "OCR"]
    middles: list[list[float]] = []
    for bars in ax.containers:
        assert isinstance(bars, BarContainer)
        middles.append([bar.get_x() + bar.get_width() / 2 for bar in bars])
    # In the order of the runs, around the tick of the category.
    assert np.all(np.diff(middles, axis=0) > 0)
    assert np.mean(middles, axis=0) == pytest.approx([0, 1])
    assert np.all(np.abs(np.array(middles) - [0, 1]) < 0.5)


def test_numbers_stand_above_few_bars_and_not_above_many() -> None:
    few = drawn_relative(comparison_of(SCORES))
    assert [text.get_text() for text in few.texts] == ["75", "50", "75", "100", "75", "25"]

    many = {f"run {index}": SCORES["concat"] for index in range(16)}
    assert not drawn_relative(comparison_of(many)).texts


def test_sixteen_runs_look_different() -> None:
    many = {f"run {index}": SCORES["concat"] for index in range(16)}

    ax = drawn_relative(comparison_of(many))

    looks: set[tuple[Any, ...]] = set()
    for bars in ax.containers:
        assert isinstance(bars, BarContainer)
        looks.add((bars[0].get_edgecolor(), bars[0].get_hatch()))
    assert len(looks) == 16


def test_a_category_in_which_all_runs_are_equal_has_no_places() -> None:
    equal = {"a": {"GQA": 1.0, "OCRBench": 5.0}, "b": {"GQA": 2.0, "OCRBench": 5.0}}
    categories = {"GQA": "General", "OCRBench": "OCR"}

    ax = drawn_min_max(comparison_of(equal, categories))

    assert np.isnan([heights[1] for heights in heights_of(ax).values()]).all()
    assert [heights[0] for heights in heights_of(ax).values()] == [0, 100]
    [text] = [text for text in ax.texts if text.get_text() == "all equal"]
    assert isinstance(text, Annotation)
    assert text.xy == (1, 4)


def test_columns_that_a_run_lacks_are_in_no_bar() -> None:
    """Without GQA, the first run is the half of the best in General, whose name says so."""
    lacking = {name: dict(of_run) for name, of_run in SCORES.items()}
    del lacking["middle"]["GQA"]

    ax = drawn_relative(comparison_of(lacking))

    assert heights_of(ax) == {"last layer": [50, 50], "concat": [100, 100], "middle": [75, 25]}
    assert names_of(ax) == ["General (1 of 2: MME)", "OCR"]
    assert names_of(drawn_min_max(comparison_of(lacking))) == ["General (1 of 2: MME)", "OCR"]


def test_columns_in_which_all_runs_are_equal_are_in_no_place() -> None:
    equal = {"a": {"GQA": 4.0, "MME": 1.0, "OCRBench": 5.0}, "b": {"GQA": 4.0, "MME": 2.0}}
    equal["b"]["OCRBench"] = 10.0

    comparison = comparison_of(equal)

    assert names_of(drawn_relative(comparison)) == ["General", "OCR"]
    assert names_of(drawn_min_max(comparison)) == ["General (1 of 2: MME)", "OCR"]
    assert heights_of(drawn_relative(comparison)) == {"a": [75, 50], "b": [100, 100]}


def test_columns_in_which_every_run_has_nothing_are_in_no_bar() -> None:
    """They would make all runs look alike: the first has half of the best in General, not 3/4."""
    nothing = {"a": {"GQA": 0.0, "MME": 1.0, "OCRBench": 0.0}, "b": {"GQA": 0.0, "MME": 2.0}}
    nothing["b"]["OCRBench"] = 0.0
    comparison = comparison_of(nothing)

    scores = category_scores(comparison)

    # Nothing is left of OCR.
    assert scores == {"General": {"a": CategoryScore(0.5, 0.0), "b": CategoryScore(1.0, 1.0)}}
    assert category_columns(comparison) == {
        "General": CategoryColumns(["GQA", "MME"], ["MME"], ["MME"]),
        "OCR": CategoryColumns(["OCRBench"], [], []),
    }


def test_long_names_of_categories_go_on_in_a_second_line() -> None:
    scores: dict[str, dict[str, CategoryScore]] = {}
    columns: dict[str, CategoryColumns] = {}
    for number in range(8):
        scores[f"Hallucination of things {number}"] = {"a": CategoryScore(1, None)}
        columns[f"Hallucination of things {number}"] = CategoryColumns(["POPE"], ["POPE"], [])

    ax = drawn(relative_bars(scores, columns))

    names = [label.get_text() for label in ax.get_xticklabels()]
    assert names[0] == "Hallucination\nof things 0"


def test_the_figure_grows_with_the_lines_of_names(tmp_path: Path) -> None:
    """Else the names of columns that are left out would take their room from the bars."""
    long = "A benchmark whose name is much longer than the room that a category has"
    many = {run: {**of_run, long: 1.0} for run, of_run in SCORES.items()}
    categories = {**CATEGORIES, long: "General"}
    del many["middle"]["GQA"]
    draw_categories(comparison_of(SCORES), tmp_path / "short")
    draw_categories(comparison_of(many, categories), tmp_path / "long")

    with Image.open(tmp_path / "short" / "categories.png") as picture:
        height = picture.height
    with Image.open(tmp_path / "long" / "categories.png") as picture:
        assert picture.height > height


@pytest.mark.parametrize(
    ("scores", "categories"),
    [
        (SCORES, CATEGORIES),
        # Columns that no paper groups are one category.
        (SCORES, {"GQA": "all", "MME": "all"}),
        # Not every run has answers to OCR.
        ({**SCORES, "other": {"GQA": 1.0, "MME": 1.0}}, CATEGORIES),
    ],
)
def test_the_figure_is_written_where_there_is_something_to_compare(
    scores: dict[str, dict[str, float]], categories: dict[str, str], tmp_path: Path
) -> None:
    assert draw_categories(comparison_of(scores, categories), tmp_path) == ["categories"]

    assert sorted(file.name for file in tmp_path.iterdir()) == ["categories.png", "categories.svg"]


@pytest.mark.parametrize(
    ("scores", "categories"),
    [
        ({"alone": SCORES["concat"]}, CATEGORIES),
        (SCORES, {"GQA": "all"}),
        # No column has answers of both runs.
        ({"first": {"GQA": 1.0}, "second": {"MME": 1.0}}, CATEGORIES),
    ],
)
def test_one_run_or_one_column_has_no_figure(
    scores: dict[str, dict[str, float]], categories: dict[str, str], tmp_path: Path
) -> None:
    assert draw_categories(comparison_of(scores, categories), tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_compare_writes_the_figure_beside_the_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is compared is made up; all that is written is real."""

    def made_up(*arguments: Any, **options: Any) -> Comparison:
        return comparison_of(SCORES)

    monkeypatch.setattr(compare_report, "compare", made_up)

    compare_report.report_comparison(
        [str(tmp_path)], "igva", benchmarks=tmp_path, form="csv", output=tmp_path / "out"
    )

    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"categories.png", "categories.svg", "categories.csv", "comparison.json"} <= written
