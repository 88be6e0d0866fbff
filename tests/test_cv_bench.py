"""CV-Bench: a mean of halves and sources, whatever their sizes."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.benchmarks import BENCHMARKS
from tests.made_up_benchmarks import (
    answer_all,
    near,
    png,
    values_of,
    write_lines,
    write_parquet,
    write_png,
)


def cv_bench_records() -> list[dict[str, Any]]:
    """Questions of both halves, with sources of different sizes."""
    records: list[dict[str, Any]] = []
    kinds = (
        ("2D", "Count", "ADE20K"),
        ("2D", "Relation", "COCO"),
        ("2D", "Count", "COCO"),
        ("2D", "Count", "COCO"),
        ("3D", "Depth", "Omni3D"),
        ("3D", "Distance", "Omni3D"),
    )
    for number, (half, task, source) in enumerate(kinds):
        record = {
            # Both halves count from 0, in files of their own.
            "idx": number % 4,
            "type": half,
            "task": task,
            "source": source,
            "question": "How many?",
            "choices": ["1", "2", "3"],
            "answer": "(B)",
            "filename": f"img/{half}/{number}.png",
        }
        records.append(record)
    return records


def test_cv_bench_weighs_its_halves_and_sources_alike(tmp_path: Path):
    records = cv_bench_records()
    with_pictures = [{**record, "image": {"bytes": png()}} for record in records]
    write_parquet(tmp_path / "halves" / "test_2d.parquet", with_pictures[:4])
    write_parquet(tmp_path / "halves" / "test_3d.parquet", with_pictures[4:])
    write_parquet(tmp_path / "whole" / "test.parquet", with_pictures)
    write_lines(tmp_path / "lines" / "test.jsonl", records)
    for record in records:
        write_png(tmp_path / "lines" / record["filename"])
    benchmark = BENCHMARKS["cvbench"]
    items = benchmark.load(tmp_path / "halves")
    # Both halves count from 0.
    assert [item.id for item in items] == ["2D/0", "2D/1", "2D/2", "2D/3", "3D/0", "3D/1"]
    for layout in ("whole", "lines"):
        others = benchmark.load(tmp_path / layout)
        assert [item.id for item in others] == [item.id for item in items]
        assert [item.group for item in others] == [item.group for item in items]
        assert [item.answers for item in others] == [item.answers for item in items]
    # ADE20K is right; of COCO's three the first; of Omni3D's two none, as words are no letter.
    answers = {"2D/0": "(B)", "2D/1": "B.", "2D/2": "C", "2D/3": "b is it", "3D/1": "2"}
    answered = answer_all(benchmark, items, lambda item: answers.get(item.id, "the answer is B"))
    two_d = (1 + Fraction(1, 3)) / 2
    expected = {
        "accuracy": 100 * two_d / 2,
        "2D": 100 * two_d,
        "3D": 0,
        "ADE20K": 100,
        "COCO": Fraction(100, 3),
        "Omni3D": 0,
        "Count": Fraction(100, 3),
        "Depth": 0,
        "Distance": 0,
        "Relation": 100,
    }
    values = values_of(benchmark, answered)
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        assert values[name] == near(value)


def test_cv_bench_refuses_a_missing_half_and_a_missing_source(tmp_path: Path):
    records = [{**record, "image": {"bytes": png()}} for record in cv_bench_records()]
    write_parquet(tmp_path / "test_2d.parquet", records[:4])
    with pytest.raises(LayerfuseError, match=r"no file .*test_3d\.parquet"):
        BENCHMARKS["cvbench"].load(tmp_path)
    write_parquet(tmp_path / "test.parquet", records[:4])
    # One file is enough where it has both halves, which cannot be told from its name.
    with pytest.raises(LayerfuseError, match="about ADE20K, COCO; CV-Bench has them about"):
        BENCHMARKS["cvbench"].load(tmp_path)
    write_parquet(tmp_path / "test.parquet", [*records, records[0]])
    with pytest.raises(LayerfuseError, match="same id '2D/0'"):
        BENCHMARKS["cvbench"].load(tmp_path)
    with pytest.raises(LayerfuseError, match="none about ADE20K, COCO, Omni3D"):
        BENCHMARKS["cvbench"].columns([])
