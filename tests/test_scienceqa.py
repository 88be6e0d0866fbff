"""ScienceQA: its files, its categories, and how LLaVA reads answers."""

import json
from pathlib import Path
from typing import Any

import pytest

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.benchmarks import BENCHMARKS
from layerfuse.evaluate.benchmarks.official_pictures import check_pictures
from tests.made_up_benchmarks import answer_all, values_of, write_png


def write_scienceqa(folder: Path) -> dict[str, Any]:
    """Write four problems of the test split, one for each mix of hint and picture, and another.

    Returns:
        The problems, by their ids.
    """

    def problem(**changes: Any) -> dict[str, Any]:
        usual = {
            "question": "Which?",
            "choices": ["ice", "steam", "sand"],
            "answer": 1,
            "hint": "",
            "image": None,
            "grade": "grade3",
            "subject": "natural science",
            "split": "test",
        }
        return {**usual, **changes}

    problems = {
        "4": problem(image="image.png"),
        "5": problem(hint="Think.", grade="grade7", subject="social science"),
        "11": problem(subject="language science", answer=0, choices=["a", "b"]),
        "12": problem(image="image.png", hint="Look.", grade="grade12", answer=2),
        "99": problem(split="train"),
    }
    (folder / "problems.json").write_text(json.dumps(problems))
    splits = {"train": ["99"], "test": ["4", "5", "11", "12"]}
    (folder / "pid_splits.json").write_text(json.dumps(splits))
    for pid in ("4", "12"):
        write_png(folder / "images" / "test" / pid / "image.png")
    return problems


def test_scienceqa_reports_the_official_categories(tmp_path: Path):
    write_scienceqa(tmp_path)
    benchmark = BENCHMARKS["scienceqa"]
    items = benchmark.load(tmp_path)
    assert [item.id for item in items] == ["4", "5", "11", "12"]
    assert items[3].context == "Look."
    # A question with a hint and a picture counts for both, TXT and IMG, as in the official script.
    # No option is named by the third, which is no option A; C is none of the third's.
    answers = {"4": "B. steam", "5": "A", "11": "the first", "12": "The answer is C."}
    answered = answer_all(benchmark, items, lambda item: answers[item.id])
    assert [each.judged.parsed for each in answered] == ["B", "A", None, "C"]
    assert values_of(benchmark, answered) == {
        "accuracy": 50,
        "image accuracy": 100,
        "NAT": 100,
        "SOC": 0,
        "LAN": 0,
        "TXT": 50,
        "IMG": 100,
        "NO": 0,
        "G1-6": 50,
        "G7-12": 50,
    }
    assert benchmark.judge(items[2], "C").parsed is None
    # A column over no questions would have no value.
    without_pictures = [each for each in answered if not each.item.pictures]
    names = [column.name for column in benchmark.columns(without_pictures)]
    assert "IMG" not in names


def test_scienceqa_refuses_what_does_not_fit(tmp_path: Path):
    problems = write_scienceqa(tmp_path)
    benchmark = BENCHMARKS["scienceqa"]
    (tmp_path / "images" / "test" / "12" / "image.png").unlink()
    items = benchmark.load(tmp_path)
    with pytest.raises(LayerfuseError, match="1 of 2 pictures are missing"):
        check_pictures(items)
    problems["11"]["answer"] = 2
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    with pytest.raises(LayerfuseError, match="answer 2 to problem 11; the number of one of its 2"):
        benchmark.load(tmp_path)
    (tmp_path / "pid_splits.json").write_text('{"test": ["4", "4"]}')
    with pytest.raises(LayerfuseError, match="same id '4'"):
        benchmark.load(tmp_path)
    (tmp_path / "pid_splits.json").write_text('{"test": ["7"]}')
    with pytest.raises(LayerfuseError, match="no problem '7'"):
        benchmark.load(tmp_path)
    (tmp_path / "pid_splits.json").write_text('["4"]')
    with pytest.raises(LayerfuseError, match="no list of ids under 'test'"):
        benchmark.load(tmp_path)
