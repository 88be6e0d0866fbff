"""Benchmarks of a few questions in their official layouts, and files of answers to them."""

import base64
import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from layerfuse.evaluate.benchmarks import Benchmark, Column, Item
from layerfuse.evaluate.benchmarks.interface import JudgedItem
from layerfuse.evaluate.benchmarks.mme import COGNITION, PERCEPTION
from layerfuse.evaluate.suites import Suite

CATEGORIES = ("counting", "colour")
"""of the pictures of `write_realmix`, in turn"""


def write_picture(file: Path, shade: int) -> None:
    """Save a picture of one colour, and its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), (shade, 0, 90)).save(file)


def png(shade: int = 0) -> bytes:
    """A small encoded picture; those of different shades differ."""
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 90, 200)).save(file, "PNG")
    return file.getvalue()


def png_text(shade: int = 0) -> str:
    """A small picture in base64."""
    return base64.b64encode(png(shade)).decode()


def write_png(file: Path) -> None:
    """Write a small picture under any name, and its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    # Not saved by Pillow, which chooses the format by a suffix: SEED-Bench's pictures have none.
    file.write_bytes(png())


def write_tsv(file: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write a table with a header line, as VLMEvalKit does."""
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table as the hub has it, and its folder."""
    # Slow to import, and needed by few tests.
    import pyarrow
    from pyarrow import parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file)


def answer_all(
    benchmark: Benchmark, items: Sequence[Item], answer: Callable[[Item], str]
) -> list[JudgedItem]:
    """Judge what a made-up model says to each question."""
    return [JudgedItem(item, benchmark.judge(item, answer(item))) for item in items]


def columns_of(benchmark: Benchmark, answered: Sequence[JudgedItem]) -> dict[str, Column]:
    """What a benchmark reports, by name, checked for what holds of every benchmark."""
    columns = benchmark.columns(answered)
    by_name = {column.name: column for column in columns}
    assert len(by_name) == len(columns)
    assert benchmark.headline in by_name
    for column in columns:
        if column.mean_of:
            scores = [each.judged.score for each in column.mean_of]
            assert column.value == pytest.approx(column.best * sum(scores) / len(scores))
        assert 0 <= column.value <= column.best
    return by_name


def values_of(benchmark: Benchmark, answered: Sequence[JudgedItem]) -> dict[str, float]:
    """The numbers that a benchmark reports, by name."""
    return {name: column.value for name, column in columns_of(benchmark, answered).items()}


def near(value: Fraction | float) -> Any:
    """A value, up to the rounding of floats."""
    return pytest.approx(float(value), abs=1e-12)


def write_realmix(
    folder: Path, count: int = 6, pictures: bool = True, categories: Sequence[str] = CATEGORIES
) -> None:
    """Write questions about one picture each, whose answer is their number."""
    folder.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    for number in range(count):
        name = f"images/{number}.png"
        if pictures:
            write_picture(folder / name, 30 * number)
        conversation = [
            # Of different lengths, so that a batch is padded.
            {"from": "human", "value": f"<image>\nwhich one{', say' * number}?"},
            {"from": "gpt", "value": str(number)},
        ]
        record = {
            "id": f"q{number}",
            "image": name,
            "conversations": conversation,
            "categories": [categories[number % len(categories)]],
        }
        records.append(record)
    (folder / "test.json").write_text(json.dumps(records))


def write_scienceqa(folder: Path) -> None:
    """Write four questions with options, of which two have no picture."""
    problems: dict[str, dict[str, Any]] = {}
    for number in range(4):
        has_picture = number % 2 == 0
        problems[str(number)] = {
            "question": f"Which of {{these}} {'long ' * number}?",
            "choices": ["ice", "steam"],
            "answer": 1,
            "hint": "Think." if number == 3 else "",
            "image": "image.png" if has_picture else None,
            "grade": "grade3",
            "subject": "natural science",
            "split": "test",
        }
        if has_picture:
            write_picture(folder / "images" / "test" / str(number) / "image.png", 60 * number)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"test": list(problems)}))


def write_refcoco(folder: Path) -> None:
    """Write three sentences about boxes, one of each split."""
    rows: list[dict[str, Any]] = []
    for split in ("val", "testA", "testB"):
        row = {
            "image": "train2014/a.jpg",
            "sentence": f"the cup of {split}",
            "bbox": [10.0, 5.0, 20.0, 20.0],
            "width": 40,
            "height": 30,
            "split": split,
        }
        rows.append(row)
    write_picture(folder / "train2014" / "a.jpg", 10)
    write_lines(folder / "refcoco.jsonl", rows)


def write_ocrbench(folder: Path, count: int) -> None:
    """Write questions of one type, whose answer is their number, without their pictures."""
    rows: list[dict[str, Any]] = []
    for number in range(count):
        row = {
            "dataset_name": "made",
            "type": "Doc-oriented VQA",
            "question": "which one?",
            "answers": [str(number)],
            "image_path": f"{number}.png",
        }
        rows.append(row)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "OCRBench.json").write_text(json.dumps(rows))


def write_mme(folder: Path, pictures_of_task: int) -> None:
    """Write two questions about each picture of the fourteen tasks, without the pictures."""
    for task in PERCEPTION + COGNITION:
        (folder / task).mkdir(parents=True, exist_ok=True)
        for number in range(pictures_of_task):
            text = f"Is it {task}?\tYes\nIs it a cup?\tNo\n"
            (folder / task / f"{number:04}.txt").write_text(text)


def write_lines(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines, and their folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_answers(file: Path, answers: Mapping[str, str]) -> None:
    """Write answers by the ids of their questions, as another tool would."""
    write_lines(file, [{"id": id, "answer": answer} for id, answer in answers.items()])


def suite_of(
    *columns: Mapping[str, Any], name: str = "mine", average: str | None = "mean", note: str = ""
) -> Suite:
    """A suite of some columns."""
    content = {
        "name": name,
        "title": "a table",
        "source": "a paper",
        "note": note,
        "columns": list(columns),
        "average": average,
    }
    return Suite.model_validate(content)


def column(name: str, benchmark: str, **others: Any) -> dict[str, Any]:
    """One column of a suite."""
    return {"name": name, "benchmark": benchmark, **others}
