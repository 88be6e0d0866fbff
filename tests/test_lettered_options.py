"""SEED-Bench, MMStar and AI2D: each question is judged alone, by the letter of an option."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.benchmarks import BENCHMARKS
from layerfuse.evaluate.benchmarks.mmstar import split_options
from layerfuse.evaluate.run_answers import judged_answers
from tests.made_up_benchmarks import (
    answer_all,
    near,
    png,
    png_text,
    values_of,
    write_lines,
    write_parquet,
    write_png,
    write_tsv,
)


def write_seed(folder: Path) -> list[dict[str, Any]]:
    """Write the pictures of three questions about pictures; a fourth is about a video.

    Returns:
        The questions, as the file of the benchmark has them.
    """
    questions: list[dict[str, Any]] = []
    kinds = (("101", "image", 1), ("102", "image", 1), ("103", "image", 5), ("104", "video", 10))
    for question_id, data_type, number in kinds:
        row: dict[str, Any] = {
            "question_id": question_id,
            "question": "What?",
            "data_id": f"{question_id}_7",
            "data_type": data_type,
            "question_type_id": number,
            "answer": "C",
        }
        for letter in "abcd":
            row[f"choice_{letter}"] = f"{letter}{letter}"
        questions.append(row)
        if data_type == "image":
            write_png(folder / "SEED-Bench-image" / f"{question_id}_7")
    return questions


def test_seed_bench_reads_the_questions_about_pictures(tmp_path: Path):
    types = {"Scene Understanding": 1, "Instances Counting": 5, "Action Recognition": 10}
    content = {"questions": write_seed(tmp_path), "question_type": types}
    (tmp_path / "SEED-Bench.json").write_text(json.dumps(content))
    benchmark = BENCHMARKS["seedbench_image"]
    items = benchmark.load(tmp_path)
    assert [item.id for item in items] == ["101", "102", "103"]
    # The second names an option by its words; the third none, which is no option A.
    answers = {"101": "A", "102": "cc", "103": "I cannot tell"}
    answered = answer_all(benchmark, items, lambda item: answers[item.id])
    values = values_of(benchmark, answered)
    assert values["accuracy"] == near(Fraction(100, 3))
    assert values["Scene Understanding"] == 50
    assert values["Instances Counting"] == 0


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("C. cc", True),
        ("C", True),
        ("(C)", True),
        ("C)", True),
        ("C.", True),
        ("Answer: C", True),
        ("The answer is C. cc", True),
        ("cc", True),
        # No option, another one, two, and a letter that is none of the four
        ("", False),
        ("I cannot tell", False),
        ("B. bb", False),
        ("C. bb", False),
        ("C or D", False),
        ("E", False),
    ],
)
def test_seed_bench_reads_an_option_as_models_write_it(
    tmp_path: Path, answer: str, right: bool
) -> None:
    content = {"questions": write_seed(tmp_path), "question_type": {}}
    (tmp_path / "SEED-Bench.json").write_text(json.dumps(content))
    benchmark = BENCHMARKS["seedbench_image"]
    items = benchmark.load(tmp_path)

    answered = answer_all(benchmark, items, lambda item: answer)

    assert values_of(benchmark, answered)["accuracy"] == 100 * right


def test_answers_to_all_of_seed_bench_are_scored_without_those_about_videos(tmp_path: Path):
    content = {"questions": write_seed(tmp_path), "question_type": {}}
    (tmp_path / "SEED-Bench.json").write_text(json.dumps(content))
    benchmark = BENCHMARKS["seedbench_image"]
    items = benchmark.load(tmp_path)
    # LLaVA has whole numbers as ids of the questions about pictures.
    lines = [{"question_id": id, "text": "C", "prompt": "What?"} for id in (101, 102, 103, "104")]
    file = tmp_path / "answers.jsonl"
    write_lines(file, lines)

    judged = judged_answers(file, benchmark, items)

    assert [each.item.id for each in judged] == ["101", "102", "103"]
    (note,) = benchmark.notes(items)
    assert note.startswith("1 questions about videos are left out, and so are")
    write_lines(file, [*lines, lines[3]])
    with pytest.raises(LayerfuseError, match="answers '104' a second time"):
        judged_answers(file, benchmark, items)
    # What is in neither part is still refused.
    write_lines(file, [*lines, {"question_id": 105, "text": "C"}])
    with pytest.raises(LayerfuseError, match="line 5 answers '105', no question of SEED-Bench"):
        judged_answers(file, benchmark, items)


def test_all_of_seed_bench_has_questions_about_videos(tmp_path: Path):
    types = {"Scene Understanding": 1, "Instances Counting": 5, "Action Recognition": 10}
    content = {"questions": write_seed(tmp_path), "question_type": types}
    (tmp_path / "SEED-Bench.json").write_text(json.dumps(content))
    benchmark = BENCHMARKS["seedbench"]
    items = benchmark.load(tmp_path)
    file = tmp_path / "answers.jsonl"
    lines = [{"question_id": id, "text": "C"} for id in (101, 102, 103)]
    # A file of answers needs no pictures, of videos neither.
    write_lines(file, [*lines, {"question_id": "104", "text": "D"}])

    values = values_of(benchmark, judged_answers(file, benchmark, items))

    assert values["accuracy"] == 75
    assert values["image"] == 100
    assert values["video"] == 0
    assert values["Action Recognition"] == 0
    # LLaVA's script names the frame in the middle by the type and the id of the question.
    assert items[3].pictures[0].name.endswith("SEED-Bench-video-image/10_104.png")


def test_seed_bench_refuses_what_does_not_fit(tmp_path: Path):
    file = tmp_path / "SEED-Bench.json"
    questions = write_seed(tmp_path)
    file.write_text(json.dumps({"questions": questions + questions[:1]}))
    with pytest.raises(LayerfuseError, match="same id '101'"):
        BENCHMARKS["seedbench_image"].load(tmp_path)
    file.write_text(json.dumps({"questions": questions[3:]}))
    with pytest.raises(LayerfuseError, match="no questions that the benchmark asks"):
        BENCHMARKS["seedbench_image"].load(tmp_path)
    questions[0]["answer"] = "E"
    file.write_text(json.dumps({"questions": questions}))
    with pytest.raises(LayerfuseError, match="answer 'E' to the question 101"):
        BENCHMARKS["seedbench_image"].load(tmp_path)


def test_mmstar_reads_both_of_its_files_alike(tmp_path: Path):
    table: list[dict[str, str]] = []
    records: list[dict[str, Any]] = []
    for index, category in (("0", "math"), ("1", "coarse perception"), ("2", "math")):
        # With a comma, as it also parts the options in the Parquet file.
        options = {"A": "one, two", "B": "three", "C": "four", "D": "five"}
        common = {"index": index, "answer": "B", "category": category}
        table.append({**common, "question": "How many?", "image": png_text(3), **options})
        written = ", ".join(f"{letter}: {text}" for letter, text in options.items())
        question = f"How many?\nOptions: {written}"
        records.append({**common, "question": question, "image": {"bytes": png(3)}})
    (tmp_path / "table").mkdir()
    write_tsv(tmp_path / "table" / "MMStar.tsv", table)
    write_parquet(tmp_path / "parquet" / "mmstar.parquet", records)
    benchmark = BENCHMARKS["mmstar"]
    items = benchmark.load(tmp_path / "table")
    others = benchmark.load(tmp_path / "parquet")
    assert [item.options for item in items] == [item.options for item in others]
    assert [item.question for item in items] == [item.question for item in others]
    assert [item.answers for item in items] == [item.answers for item in others]
    assert others[0].pictures[0].read() == png(3)
    answers = {"0": "B", "1": "(b) three", "2": "D"}
    answered = answer_all(benchmark, others, lambda item: answers[item.id])
    values = values_of(benchmark, answered)
    assert values["accuracy"] == near(Fraction(200, 3))
    assert (values["coarse perception"], values["math"]) == (100, 50)


@pytest.mark.parametrize(
    "text", ["What is it? (A) 1 (B) 2", "Options: A. 1, B. 2", "Options: A: 1", "A? Options: B: 1"]
)
def test_mmstars_options_stay_in_the_question_where_they_are_written_otherwise(text: str):
    assert split_options(text) == (text, ())


def test_mmstar_judges_a_question_with_options_in_its_words_by_the_letter_alone(tmp_path: Path):
    record = {"index": 0, "answer": "D", "category": "math", "question": "What? (A) 1 (D) 4"}
    write_parquet(tmp_path / "mmstar.parquet", [{**record, "image": {"bytes": png()}}])
    item = BENCHMARKS["mmstar"].load(tmp_path)[0]
    assert BENCHMARKS["mmstar"].judge(item, "(D)").score == 1
    # The text of the option is not known to be one.
    assert BENCHMARKS["mmstar"].judge(item, "4").parsed is None


def test_ai2d_reads_the_table_and_the_hubs_files_alike(tmp_path: Path):
    rows: list[dict[str, str]] = []
    records: list[dict[str, Any]] = []
    for number, answer in enumerate((2, 0, 1)):
        options = ["root", "leaf", "stem"]
        # All three are about one picture, which the first row has.
        image = png_text(9) if number == 0 else "0"
        row = {"index": str(number), "question": "What is X?", "image": image}
        rows.append({**row, **dict(zip("ABC", options, strict=True)), "answer": "ABC"[answer]})
        record = {"question": "What is X?", "options": options, "answer": str(answer)}
        records.append({**record, "image": {"bytes": png(9), "path": None}})
    (tmp_path / "table").mkdir()
    write_tsv(tmp_path / "table" / "AI2D_TEST.tsv", rows)
    # Rows have no ids: those of the second shard go on counting.
    hub = tmp_path / "hub" / "data"
    write_parquet(hub / "test-00000-of-00002.parquet", records[:2])
    write_parquet(hub / "test-00001-of-00002.parquet", records[2:])
    benchmark = BENCHMARKS["ai2d"]
    items = benchmark.load(tmp_path / "table")
    others = benchmark.load(tmp_path / "hub")
    for item, other in zip(items, others, strict=True):
        assert (item.id, item.question, item.options) == (other.id, other.question, other.options)
        assert item.answers == other.answers
        assert item.pictures[0].read() == other.pictures[0].read()
    answered = answer_all(benchmark, items, lambda item: "C")
    assert values_of(benchmark, answered) == {"accuracy": near(Fraction(100, 3))}


def test_ai2d_refuses_a_missing_shard_half_a_shard_and_another_answer(tmp_path: Path):
    record = {"question": "What?", "options": ["a", "b"], "answer": "2", "image": {"bytes": png()}}
    file = tmp_path / "data" / "test-00000-of-00002.parquet"
    write_parquet(file, [record])
    with pytest.raises(LayerfuseError, match="1 of the 2 files"):
        BENCHMARKS["ai2d"].load(tmp_path)
    file = file.rename(tmp_path / "data" / "test-00000-of-00001.parquet")
    # The hub's answers count from 0, so that 2 is a third option.
    with pytest.raises(LayerfuseError, match="answer '2' in row 0; one of 0, 1"):
        BENCHMARKS["ai2d"].load(tmp_path)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(LayerfuseError, match="cut off"):
        BENCHMARKS["ai2d"].load(tmp_path)
