"""MMVP and HallusionBench: questions that count only together."""

import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import pytest

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.benchmarks import BENCHMARKS
from tests.made_up_benchmarks import answer_all, columns_of, near, write_png

# The first letter of the release's header is a small L.
MMVP_LINES = (
    "lndex,Question,Options,Correct Answer",
    "1,Is the door open?,(a) Open (b) Closed,(a)",
    '2,"Is the door, there, open?",(a) Open (b) Closed,(b)',
    "3,How many?,(a) 3 (b) 4,(b)",
    "4,How many?,(a) 3 (b) 4,(a)",
)


def write_mmvp(folder: Path, lines: Sequence[str] = MMVP_LINES) -> None:
    """Write a file of questions, and the pictures of four."""
    (folder / "Questions.csv").write_text("\n".join(lines) + "\n")
    for number in range(1, 5):
        write_png(folder / "MMVP Images" / f"{number}.jpg")


def test_mmvp_is_right_only_where_both_of_a_pair_are(tmp_path: Path):
    write_mmvp(tmp_path)
    benchmark = BENCHMARKS["mmvp"]
    items = benchmark.load(tmp_path)
    assert items[1].question == "Is the door, there, open?"
    assert items[0].options == ("Open", "Closed")
    assert [item.together for item in items] == ["1", "1", "2", "2"]
    # Letters of either case, and an option's words; the last is wrong, and with it its pair.
    answers = {"1": "(a)", "2": "Closed", "3": "B", "4": "B"}
    answered = answer_all(benchmark, items, lambda item: answers[item.id])
    columns = columns_of(benchmark, answered)
    assert columns["pair accuracy"].value == 50
    assert columns["pair accuracy"].questions == 2
    assert columns["accuracy"].value == 75


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (MMVP_LINES[:4], "question 3 without its partner 4"),
        ((*MMVP_LINES, MMVP_LINES[4]), "same id '4'"),
        ((*MMVP_LINES[:4], "4,How"), "a row of 2 cells"),
        ((*MMVP_LINES[:4], '4,"How'), "not a complete CSV"),
        (("Index,Caption", "1,a cup"), "columns Index, Caption; Index, Question, Options"),
        ((MMVP_LINES[0], "x,A?,(a) 1 (b) 2,(a)"), "index 'x'; a number from 1"),
        ((MMVP_LINES[0], "1,A?,1 or 2,(a)"), "options '1 or 2' in row 1; such as"),
        ((MMVP_LINES[0], "1,A?,(a) 1 (b) 2,(c)"), "answer 'C' to the question 1"),
    ],
)
def test_mmvp_refuses_what_does_not_fit(lines: Sequence[str], words: str, tmp_path: Path):
    write_mmvp(tmp_path, lines)
    with pytest.raises(LayerfuseError, match=words):
        BENCHMARKS["mmvp"].load(tmp_path)


def hallusion_rows() -> list[dict[str, str]]:
    """A set with two figures and two questions, and one with a question without a figure."""
    rows: list[dict[str, str]] = []
    figures = (
        ("VD", "0", "1", "0", "1"),
        ("VD", "0", "1", "1", "0"),
        ("VD", "1", "2", "0", "0"),
        ("VD", "1", "2", "1", "1"),
        ("VS", "0", "0", "0", "1"),
        ("VS", "1", "1", "0", "0"),
    )
    for category, figure, visual, question, right in figures:
        row = {
            "category": category,
            "subcategory": "chart",
            "visual_input": visual,
            "set_id": "3",
            "figure_id": figure,
            "question_id": question,
            "question": "Is it longer?",
            "gt_answer": right,
        }
        rows.append(row)
    return rows


def write_hallusion(folder: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write questions, and the three figures in the folder that the release's archive makes."""
    (folder / "HallusionBench.json").write_text(json.dumps(rows))
    for name in ("VD/chart/3_0.png", "VD/chart/3_1.png", "VS/chart/3_1.png"):
        write_png(folder / "hallusion_bench" / name)


def test_hallusion_bench_counts_questions_figures_and_questions_of_a_set(tmp_path: Path):
    write_hallusion(tmp_path, hallusion_rows())
    benchmark = BENCHMARKS["hallusionbench"]
    items = benchmark.load(tmp_path)
    assert [len(item.pictures) for item in items] == [1, 1, 1, 1, 0, 1]
    answers = {
        "VD/chart/3/0/0": "Yes, it is.",
        "VD/chart/3/0/1": "No",
        # `nothing` holds no further no, and an answer with both words is none.
        "VD/chart/3/1/0": "No, nothing is.",
        "VD/chart/3/1/1": "I cannot tell, yes or no",
        # Nobody can know without the figure: not to say is right.
        "VS/chart/3/0/0": "I do not know",
        "VS/chart/3/1/0": "not longer: no",
    }
    answered = answer_all(benchmark, items, lambda item: answers[item.id])
    assert [each.judged.score for each in answered] == [1, 1, 1, 0, 1, 1]
    columns = columns_of(benchmark, answered)
    assert columns["aAcc"].value == near(Fraction(500, 6))
    # Three figures; what is asked without one is about none.
    assert columns["fAcc"].value == near(Fraction(200, 3))
    assert columns["qAcc"].value == near(Fraction(200, 3))
    assert [column.questions for column in columns.values()] == [6, 3, 3]


def test_hallusion_bench_refuses_what_does_not_fit(tmp_path: Path):
    rows = hallusion_rows()
    write_hallusion(tmp_path, rows + rows[:1])
    with pytest.raises(LayerfuseError, match="same id 'VD/chart/3/0/0'"):
        BENCHMARKS["hallusionbench"].load(tmp_path)
    rows[0]["gt_answer"] = "2"
    write_hallusion(tmp_path, rows)
    with pytest.raises(LayerfuseError, match="answer '2' to a question about VD/chart/3/0; 0 for"):
        BENCHMARKS["hallusionbench"].load(tmp_path)
