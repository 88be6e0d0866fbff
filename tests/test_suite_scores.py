"""The table of a suite: divided columns, averages, and what is missing."""

import io
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

from layerfuse.evaluate.benchmarks import BENCHMARKS
from layerfuse.evaluate.benchmarks.interface import JudgedItem, judged_item
from layerfuse.evaluate.suite_scores import UnreadAnswers, average_lines, fill, print_scores
from tests.made_up_benchmarks import (
    column,
    suite_of,
    write_realmix,
    write_refcoco,
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


def test_answers_that_say_nothing_are_counted_and_printed(benchmarks: Path) -> None:
    """The question marks of `judged` name no option; one answer is empty."""
    suite = suite_of(column("counting", "realmix", column="counting"), column("SQA", "scienceqa"))
    science = BENCHMARKS["scienceqa"]
    items = science.load(benchmarks / "scienceqa")
    answered = {
        "realmix": judged(benchmarks, "realmix", 6),
        "scienceqa": [judged_item(science, item, "") for item in items[:1]],
    }
    answered["scienceqa"] += judged(benchmarks, "scienceqa", 2)[1:]

    scores = fill(suite, "m", answered, missing={}, notes=[])

    assert scores.unread == {"scienceqa": UnreadAnswers(4, 3, 1)}
    assert asdict(scores)["unread"] == {
        "scienceqa": {"answers": 4, "unreadable": 3, "empty": 1},
    }
    said = io.StringIO()
    print_scores(suite, scores, Console(file=said, width=200))
    assert "ScienceQA: of 4 answers nothing could be read in 3, 1 empty\n" in said.getvalue()
    assert "real pictures: of" not in said.getvalue()


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


def test_notes_on_answers_stand_with_those_on_questions(tmp_path: Path) -> None:
    """A right box in pixels, read as shares of the picture."""
    write_refcoco(tmp_path / "refcoco")
    benchmark = BENCHMARKS["refcoco"]
    answered: list[JudgedItem] = []
    for item in benchmark.load(tmp_path / "refcoco"):
        answered.append(judged_item(benchmark, item, "[10, 5, 30, 25]"))

    scores = fill(
        suite_of(column("RefCOCO", "refcoco")),
        "m",
        {"refcoco": answered},
        missing={},
        notes=["of the questions"],
    )

    first, second = scores.notes
    assert first == "of the questions"
    assert "3 of 3 answers are boxes with a number above" in second
