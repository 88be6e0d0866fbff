"""The table of a suite: divided columns, averages, and what is missing."""

from pathlib import Path

import pytest

from layerfuse.evaluate.benchmarks import BENCHMARKS
from layerfuse.evaluate.benchmarks.interface import JudgedItem
from layerfuse.evaluate.suite_scores import average_lines, fill
from tests.made_up_benchmarks import (
    column,
    suite_of,
    write_realmix,
    write_scienceqa,
)


@pytest.fixture
def benchmarks(tmp_path: Path) -> Path:
    """A folder with two benchmarks."""
    folder = tmp_path / "benchmarks"
    write_realmix(folder / "realmix")
    write_scienceqa(folder / "scienceqa")
    return folder


def judged(benchmarks: Path, name: str, right: int) -> list[JudgedItem]:
    """The questions of a benchmark, of which the first are answered rightly."""
    benchmark = BENCHMARKS[name]
    answered: list[JudgedItem] = []
    for place, item in enumerate(benchmark.load(benchmarks / name)):
        answer = item.answers[0] if place < right else "?"
        answered.append(JudgedItem(item, benchmark.judge(item, answer)))
    return answered


def test_averages_are_over_the_divided_columns(benchmarks: Path) -> None:
    """By hand: 2 of 3 counted rightly; both pictures of ScienceQA, halved."""
    suite = suite_of(
        column("counting", "realmix", column="counting"),
        column("SQA", "scienceqa", divide=2),
    )
    answered = {
        # Questions 0, 2 and 4 are about numbers: four right ones are two of them.
        "realmix": judged(benchmarks, "realmix", 4),
        "scienceqa": judged(benchmarks, "scienceqa", 3),
    }
    scores = fill(suite, "m", answered, missing={}, notes=[])

    counting, science = scores.columns
    assert counting.value == pytest.approx(200 / 3)
    assert (counting.best, counting.questions) == (100, 3)
    assert (science.value, science.averaged, science.questions) == (100, 50, 2)
    assert scores.average == pytest.approx((200 / 3 + 50) / 2)
    assert scores.averaged == ["counting", "SQA"]
    assert average_lines(suite, scores) == ["Average over all 2 columns: 58.33"]


def test_no_average_is_over_fewer_columns_unless_it_is_asked_for(benchmarks: Path) -> None:
    suite = suite_of(column("SQA", "scienceqa"), column("MM-Vet", "mm-vet"))
    answered = {"scienceqa": judged(benchmarks, "scienceqa", 1)}
    missing = {"mm-vet": "layerfuse does not score it"}

    scores = fill(suite, "m", answered, missing=missing, notes=[])
    partial = fill(suite, "m", answered, missing=missing, notes=[], partial_average=True)

    assert (scores.average, scores.averaged) == (None, [])
    (line,) = average_lines(suite, scores)
    assert line.startswith("No average: MM-Vet missing.")
    assert (partial.average, partial.averaged) == (50, ["SQA"])
    (line,) = average_lines(suite, partial)
    assert line.startswith("Average over 1 of 2 columns (SQA): 50.00.")
    without = suite_of(column("SQA", "scienceqa"), average=None)
    scores = fill(without, "m", answered, missing=missing, notes=[])
    assert scores.average is None
    assert average_lines(without, scores) == []
