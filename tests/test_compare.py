"""`layerfuse compare`: tables by hand, resamples by a naive reference, bad files of answers."""

import io
import json
import math
import random
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openpyxl
import pytest
import yaml
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from layerfuse.cli import app
from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.benchmarks import BENCHMARKS, Item
from layerfuse.evaluate.benchmarks.mme import COGNITION, PERCEPTION
from layerfuse.evaluate.category_scores import CategoryScore, category_scores
from layerfuse.evaluate.compare import Cell, ComparedRun, Comparison, Difference, compare, mcnemar
from layerfuse.evaluate.compare_report import report_comparison
from layerfuse.evaluate.compare_table import (
    Table,
    category_table,
    comparison_table,
    difference_table,
    written,
)
from layerfuse.evaluate.published import PublishedRow, PublishedTable
from layerfuse.evaluate.redrawing import clusters_of_items
from layerfuse.evaluate.run_answers import Run, judged_answers
from layerfuse.evaluate.suites import Suite
from layerfuse.vision.picture import Picture
from tests.made_up_benchmarks import (
    column,
    suite_of,
    write_answers,
    write_lines,
    write_mme,
    write_ocrbench,
    write_realmix,
)
from tests.studies import one_line

REAL = suite_of(
    column("counting", "realmix", column="counting", category="numbers"),
    column("colour", "realmix", column="colour", category="looks", divide=2),
)


def run_of(folder: Path, name: str, benchmark: str, answers: Mapping[str, str]) -> Run:
    """Write the answers of a run, as another tool would."""
    write_answers(folder / name / f"{benchmark}.jsonl", answers)
    return Run(name, folder / name)


def right_answers(count: int, right: Callable[[int], bool]) -> dict[str, str]:
    """Answers to `write_realmix`: the number where it is right, else none."""
    return {f"q{number}/0": str(number) if right(number) else "?" for number in range(count)}


def compare_quickly(*args: Any, **options: Any) -> Comparison:
    return compare(*args, **{"resamples": 100, **options})


# By hand


def test_scores_and_differences_by_hand(tmp_path: Path) -> None:
    """Twelve questions; even ones count. The first run has all but 0, 2 and 1; the second has the
    even ones and 1."""
    write_realmix(tmp_path / "realmix", 12, pictures=False)
    first = right_answers(12, lambda number: number > 2)
    second = right_answers(12, lambda number: number % 2 == 0 or number == 1)
    runs = [run_of(tmp_path, name, "realmix", a) for name, a in (("a", first), ("b", second))]

    comparison = compare_quickly(runs, REAL, tmp_path)

    a, b = comparison.runs
    assert comparison.baseline == "a"
    assert (a.cells["counting"].value, b.cells["counting"].value) == (pytest.approx(200 / 3), 100)
    assert a.cells["colour"].value == pytest.approx(500 / 6)
    assert b.cells["colour"].value == pytest.approx(100 / 6)
    assert a.average == pytest.approx((200 / 3 + 500 / 12) / 2)
    assert b.average == pytest.approx((100 + 100 / 12) / 2)
    counting = b.cells["counting"].difference
    colour = b.cells["colour"].difference
    assert counting is not None
    assert colour is not None
    assert counting.difference == pytest.approx(100 / 3)
    assert (counting.better, counting.worse, counting.mcnemar) == (2, 0, 0.5)
    assert colour.difference == pytest.approx(-400 / 6)
    # 3, 5, 7, 9 and 11 against 1: 2 · (1 + 6) / 2⁶.
    assert (colour.better, colour.worse) == (1, 5)
    assert colour.mcnemar == pytest.approx(14 / 64)
    assert b.average_difference is not None
    expected = (100 + 100 / 12 - 200 / 3 - 500 / 12) / 2
    assert b.average_difference.difference == pytest.approx(expected)
    # The average's own p: it is one number, and no column is like it.
    assert b.average_difference.p_holm == b.average_difference.p
    assert a.average_difference is None
    assert all(cell.difference is None for cell in a.cells.values())


def test_the_baseline_is_chosen(tmp_path: Path) -> None:
    write_realmix(tmp_path / "realmix", 6, pictures=False)
    runs = [
        run_of(tmp_path, "a", "realmix", right_answers(6, lambda number: number > 1)),
        run_of(tmp_path, "b", "realmix", right_answers(6, lambda number: True)),
    ]

    of_a = compare_quickly(runs, REAL, tmp_path, baseline="b").runs[0].cells["counting"].difference

    assert of_a is not None
    assert of_a.difference == pytest.approx(-100 / 3)
    with pytest.raises(LayerfuseError, match="the baseline 'c' is no run; valid: a, b"):
        compare_quickly(runs, REAL, tmp_path, baseline="c")
    with pytest.raises(LayerfuseError, match="two runs are called 'a': name them by NAME=FOLDER"):
        compare_quickly([runs[0], runs[0]], REAL, tmp_path)


def test_equal_runs_do_not_differ(tmp_path: Path) -> None:
    write_realmix(tmp_path / "realmix", 6, pictures=False)
    answers = right_answers(6, lambda number: number < 3)
    runs = [run_of(tmp_path, name, "realmix", answers) for name in "ab"]

    comparison = compare_quickly(runs, REAL, tmp_path)

    for cell in comparison.runs[1].cells.values():
        assert cell.difference == Difference(0, (0, 0), 1, 1, 0, 0, 1)
    scores = category_scores(comparison)
    assert scores["looks"]["b"] == CategoryScore(1, None)


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (1, 0), (8, 1), (5, 5), (3, 17)])
def test_mcnemar_is_the_sum_of_both_tails(better: int, worse: int) -> None:
    number = better + worse
    tail = sum(math.comb(number, k) for k in range(min(better, worse) + 1)) / 2**number
    assert mcnemar(better, worse) == pytest.approx(min(1, 2 * tail))


# Resamples


def mme_answers(seed: int, share_right: float, pictures: int) -> dict[str, str]:
    """Answers to `write_mme`, right with some probability."""
    random_numbers = random.Random(seed)
    answers: dict[str, str] = {}
    for task in PERCEPTION + COGNITION:
        suffix = "jpg" if task in PERCEPTION else "png"
        for picture in range(pictures):
            for number, right in ((1, "Yes"), (2, "No")):
                wrong = "No" if right == "Yes" else "Yes"
                said = right if random_numbers.random() < share_right else wrong
                answers[f"{task}/{picture:04}.{suffix}/{number}"] = said
    return answers


def naive_perception(answers: Mapping[str, str], drawn: list[str]) -> float:
    """MME's perception over drawn pictures, each of which counts by itself."""
    total = 0.0
    for task in PERCEPTION:
        of_task = [picture for picture in drawn if picture.startswith(f"{task}/")]
        right = 0
        both = 0
        for picture in of_task:
            first = answers[f"{picture}/1"] == "Yes"
            second = answers[f"{picture}/2"] == "No"
            right += first + second
            both += first and second
        total += 100 * right / (2 * len(of_task)) + 100 * both / len(of_task)
    return total


def test_resamples_are_those_of_a_naive_reference(tmp_path: Path) -> None:
    """MME judges both questions about a picture together: a picture that is drawn twice is two."""
    write_mme(tmp_path / "mme", 3)
    first, second = mme_answers(0, 0.6, 3), mme_answers(1, 0.8, 3)
    runs = [run_of(tmp_path, name, "mme", a) for name, a in (("a", first), ("b", second))]
    suite = suite_of(column("MME", "mme", divide=20), average=None)

    comparison = compare(runs, suite, tmp_path, resamples=200, seed=5)

    pictures = list(dict.fromkeys(id.rpartition("/")[0] for id in first))
    draws = np.random.default_rng([5, zlib.crc32(b"mme")])
    differences: list[float] = []
    while len(differences) < 200:
        chosen = draws.integers(len(pictures), size=len(pictures))
        drawn = [pictures[place] for place in chosen]
        tasks = {picture.partition("/")[0] for picture in drawn}
        # A task without a picture has no score.
        if len(tasks) == len(PERCEPTION + COGNITION):
            differences.append(naive_perception(second, drawn) - naive_perception(first, drawn))
    found = comparison.runs[1].cells["MME"].difference
    assert found is not None
    assert found.difference == pytest.approx(
        naive_perception(second, pictures) - naive_perception(first, pictures)
    )
    assert found.interval == pytest.approx(np.quantile(differences, [0.025, 0.975]).tolist())
    below = sum(difference <= 0 for difference in differences)
    above = sum(difference >= 0 for difference in differences)
    assert found.p == pytest.approx(2 * (1 + min(below, above)) / 201)
    # Both questions about a picture: McNemar's test would be on other numbers than the score.
    assert found.mcnemar is None


def test_means_are_never_over_fewer_groups_than_the_benchmark_has(tmp_path: Path) -> None:
    """Three pictures count and one has colours: a draw without it would be of another benchmark."""
    categories = ["counting", "counting", "counting", "colour"]
    write_realmix(tmp_path / "realmix", 4, pictures=False, categories=categories)
    first = right_answers(4, lambda number: number == 0)
    second = right_answers(4, lambda number: number > 0)
    runs = [run_of(tmp_path, name, "realmix", a) for name, a in (("a", first), ("b", second))]

    comparison = compare(runs, suite_of(column("mean", "realmix")), tmp_path, resamples=100)

    draws = np.random.default_rng([0, zlib.crc32(b"realmix")])
    differences: list[float] = []
    while len(differences) < 100:
        chosen = draws.integers(4, size=4).tolist()
        counting = [place for place in chosen if place < 3]
        if 3 in chosen and counting:
            won = [1 if place > 0 else -1 for place in counting]
            # All of colour is won, however often it is drawn.
            differences.append(100 * (sum(won) / len(won) + 1) / 2)
    found = comparison.runs[1].cells["mean"].difference
    assert found is not None
    assert found.interval == pytest.approx(np.quantile(differences, [0.025, 0.975]).tolist())
    assert found.difference == pytest.approx(100 * (1 / 3 + 1) / 2)


def test_intervals_are_as_wide_as_theory_has_them(tmp_path: Path) -> None:
    """Of 200 pictures 60 are won and 20 lost: the difference is 20 % with a known error."""
    write_realmix(tmp_path / "realmix", 400, pictures=False)
    # The even ones count: 0, 2, ..., 118 are won, 120, ..., 158 lost.
    answers = [
        right_answers(400, lambda number: 120 <= number < 160),
        right_answers(400, lambda number: number < 120),
    ]
    runs = [run_of(tmp_path, name, "realmix", a) for name, a in zip("ab", answers, strict=True)]

    found = compare(runs, REAL, tmp_path, resamples=1000).runs[1].cells["counting"].difference

    assert found is not None
    error = 100 * math.sqrt((80 / 200 - 0.2**2) / 200)
    assert found.difference == pytest.approx(20)
    assert found.interval == pytest.approx((20 - 1.96 * error, 20 + 1.96 * error), abs=1.2)
    assert found.p == pytest.approx(2 / 1001)
    assert found.mark == "+"


def test_p_values_are_corrected_for_the_columns(tmp_path: Path) -> None:
    """Holm: the smaller of two p values is doubled, the larger one stays, if it is larger still."""
    write_realmix(tmp_path / "realmix", 80, pictures=False)
    answers = [
        right_answers(80, lambda number: number < 20),
        right_answers(80, lambda number: number % 2 == 0 or number < 5),
    ]
    runs = [run_of(tmp_path, name, "realmix", a) for name, a in zip("ab", answers, strict=True)]

    cells = compare(runs, REAL, tmp_path, resamples=500).runs[1].cells

    differences = sorted(
        (cell.difference for cell in cells.values() if cell.difference is not None),
        key=lambda difference: difference.p,
    )
    assert len(differences) == 2
    smaller, larger = differences
    assert smaller.p_holm == pytest.approx(2 * smaller.p)
    assert larger.p_holm == max(larger.p, smaller.p_holm)


@pytest.mark.parametrize(
    ("difference", "p", "mark"),
    [(3.0, 0.04, "+"), (-3.0, 0.04, "-"), (3.0, 0.06, ""), (-3.0, 1.0, "")],
)
def test_marks_are_by_the_corrected_p(difference: float, p: float, mark: str) -> None:
    assert Difference(difference, (0, 0), p=0.001, p_holm=p).mark == mark


def test_benchmarks_are_redrawn_independently(tmp_path: Path) -> None:
    """With the same draws, two benchmarks alike would make the average as noisy as one of them."""
    write_realmix(tmp_path / "realmix", 40, pictures=False, categories=["counting"])
    write_ocrbench(tmp_path / "ocrbench", 40)
    suite = suite_of(column("mean", "realmix"), column("OCR", "ocrbench", divide=0.4))
    runs: list[Run] = []
    for place, name in enumerate("ab"):
        answers = right_answers(40, lambda number, place=place: (number + place) % 2 == 0)
        of_ocr = {f"{number + 1}-made": said for number, said in enumerate(answers.values())}
        run_of(tmp_path, name, "ocrbench", of_ocr)
        runs.append(run_of(tmp_path, name, "realmix", answers))

    second = compare(runs, suite, tmp_path, resamples=1000).runs[1]

    def width(difference: Difference | None, scale: float = 1.0) -> float:
        assert difference is not None
        return (difference.interval[1] - difference.interval[0]) / scale

    # The same questions are right in both: of independent draws the mean varies less by √2.
    of_one = width(second.cells["mean"].difference)
    assert width(second.cells["OCR"].difference, 0.4) == pytest.approx(of_one, rel=0.15)
    assert width(second.average_difference) == pytest.approx(of_one / math.sqrt(2), rel=0.1)
    # In whatever order.
    reordered = suite.model_copy(update={"columns": suite.columns[::-1]})
    assert compare(runs, reordered, tmp_path, resamples=1000).runs[1].cells == second.cells


def test_what_is_judged_together_is_redrawn_together() -> None:
    def item(id: str, *pictures: Picture, together: str = "") -> Item:
        return Item(id, pictures, "what?", ("a",), together=together)

    def in_memory(name: str, shade: int) -> Picture:
        """A row's own picture, as tables hold it."""
        file = io.BytesIO()
        Image.new("RGB", (4, 4), (shade, 0, 0)).save(file, "PNG")
        return Picture(name, file.getvalue)

    items = [
        item("0", Picture("gone.jpg")),
        item("1", Picture("other.jpg"), together="pair"),
        item("2"),
        item("3", Picture("gone.jpg"), Picture("third.jpg")),
        item("4", together="pair"),
        item("5", in_memory("row 5", 1)),
        item("6", in_memory("row 6", 1)),
        item("7", in_memory("row 7", 2)),
        item("8"),
    ]
    expected = [0, 1, 2, 0, 1, 3, 3, 4, 5]
    assert clusters_of_items(BENCHMARKS["realmix"], items) == expected


def test_figures_of_a_set_are_redrawn_together() -> None:
    """HallusionBench's qAcc is over all figures of a set, whose pictures differ."""
    items: list[Item] = []
    for together in ("VD/chart/3/0", "VD/chart/3/1", "VD/chart/4/0", "VS/chart/3/1"):
        picture = Picture(f"{together}.png")
        items.append(Item(f"{together}/0", (picture,), "?", ("yes",), together=together))
    assert clusters_of_items(BENCHMARKS["hallusionbench"], items) == [0, 0, 1, 2]


def test_too_few_pictures_are_one_clear_error(tmp_path: Path) -> None:
    """A draw of fourteen pictures has all fourteen tasks once in a hundred thousand times."""
    write_mme(tmp_path / "mme", 1)
    runs = [run_of(tmp_path, name, "mme", mme_answers(0, 0.5, 1)) for name in "ab"]
    suite = suite_of(column("MME", "mme"))
    with pytest.raises(LayerfuseError, match="MME has too few pictures, 14: redrawn"):
        compare_quickly(runs, suite, tmp_path)
    # A table of one run needs no resamples.
    assert compare_quickly(runs[:1], suite, tmp_path).runs[0].cells["MME"].questions == 20


# What does not matter, and what is said


def test_the_order_of_answers_does_not_matter(tmp_path: Path) -> None:
    write_mme(tmp_path / "mme", 3)
    suite = suite_of(column("MME", "mme"))
    first, second = mme_answers(0, 0.6, 3), mme_answers(1, 0.8, 3)
    runs = [run_of(tmp_path, name, "mme", a) for name, a in (("a", first), ("b", second))]
    expected = compare_quickly(runs, suite, tmp_path)

    shuffled = list(second.items())
    random.Random(0).shuffle(shuffled)
    run_of(tmp_path, "b", "mme", dict(shuffled))

    assert compare_quickly(runs, suite, tmp_path) == expected
    assert compare_quickly(runs, suite, tmp_path, seed=1) != expected


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    write_realmix(tmp_path / "realmix", 6, pictures=False)
    write_mme(tmp_path / "mme", 1)
    answers = right_answers(6, lambda number: True)
    runs = [run_of(tmp_path, name, "realmix", answers) for name in "ab"]
    run_of(tmp_path, "b", "mme", mme_answers(0, 0.5, 1))
    suite = suite_of(
        column("counting", "realmix", column="counting"),
        column("MME", "mme"),
        column("MM-Vet", "mm-vet"),
        column("GQA", "gqa"),
    )

    comparison = compare_quickly(runs, suite, tmp_path)

    assert comparison.missing == {
        "MME": "no answers of a",
        "MM-Vet": "layerfuse does not score it",
        "GQA": "no run has answers to it",
    }
    # No average over fewer columns, and no difference to what is not there.
    assert [run.average for run in comparison.runs] == [None, None]
    assert comparison.runs[1].cells["MME"].difference is None
    assert list(category_scores(comparison)) == ["all"]
    table = comparison_table(comparison, suite)
    assert [row[2:] for row in table.rows] == [["", "", "", ""], [table.rows[1][2], "", "", ""]]
    assert "MME: no answers of a" in table.notes


def test_a_run_without_answers_is_refused(tmp_path: Path) -> None:
    write_realmix(tmp_path / "realmix", 6, pictures=False)
    answers = right_answers(6, lambda number: True)
    runs = [run_of(tmp_path, "a", "realmix", answers)]
    (tmp_path / "model").mkdir()
    with pytest.raises(LayerfuseError, match="model has no answers to a benchmark of suite 'mine'"):
        compare_quickly([*runs, Run("b", tmp_path / "model")], REAL, tmp_path)
    with pytest.raises(LayerfuseError, match="there are no runs"):
        compare_quickly([], REAL, tmp_path)


def test_different_prompts_are_said(tmp_path: Path) -> None:
    write_realmix(tmp_path / "realmix", 6, pictures=False)
    answers = right_answers(6, lambda number: True)
    runs: list[Run] = []
    for name, prompt in (("a", "{question}"), ("b", "Say: {question}"), ("c", "{question}")):
        folder = tmp_path / name / "realmix"
        write_lines(
            folder / "answers.jsonl", [{"id": id, "output": said} for id, said in answers.items()]
        )
        asked = {"prompt": {"text": prompt, "max_new_tokens": 16}}
        (folder / "asked.json").write_text(json.dumps(asked))
        runs.append(Run(name, tmp_path / name))
    # Of another tool nothing is known.
    runs.append(run_of(tmp_path, "d", "realmix", answers))

    (note,) = compare_quickly(runs, REAL, tmp_path).notes

    assert note.startswith("real pictures: not all runs were asked in the same way")
    assert note.endswith("Asked alike: a, c; b")
    assert compare_quickly([runs[0], *runs[2:]], REAL, tmp_path).notes == []


# Tables, exactly


def compared(name: str, values: dict[str, float], average: float | None, **others: Any) -> Any:
    """A run whose columns differ from the baseline by `differences`."""
    differences = others.get("differences", {})
    cells: dict[str, Cell] = {}
    for key, value in values.items():
        best = 2000.0 if key == "MME" else 100.0
        cells[key] = Cell(value, best, value, 60, differences.get(key))
    return ComparedRun(name, cells, average, others.get("average_difference"))


BETTER = Difference(2.5, (0.5, 4.25), p=0.01, p_holm=0.02, better=8, worse=1, mcnemar=0.0390625)
WORSE = Difference(-100, (-150.5, -20), p=0.004, p_holm=0.008)
TIE = Difference(0.5, (-1, 2), p=0.4, p_holm=0.4)
SUITE = suite_of(
    column("GQA", "gqa", category="General"),
    column("SQA", "scienceqa", column="image accuracy", category="Knowledge"),
    column("MME", "mme", column="perception", category="General", divide=20),
    note="a note on the suite.",
)
COMPARISON = Comparison(
    suite="mine",
    columns=["GQA", "SQA", "MME"],
    categories={"GQA": "General", "SQA": "Knowledge", "MME": "General"},
    baseline="base_1",
    runs=[
        compared("base_1", {"GQA": 60, "SQA": 70.126, "MME": 1500}, 68.375),
        compared(
            "50% | <x>",
            {"GQA": 62.5, "MME": 1400},
            None,
            differences={"GQA": BETTER, "MME": WORSE},
            average_difference=TIE,
        ),
    ],
    missing={"SQA": "no answers of 50% | <x>"},
    resamples=1000,
    seed=0,
    notes=["MME: a note."],
)
PUBLISHED = [
    PublishedTable(
        paper="2410.1",
        title="A paper",
        table="Table 1",
        evidence="figure",
        note="Read off.",
        rows=[
            PublishedRow(
                model="LLaVA",
                note="With OCR.",
                scores={"gqa": 62, "scienceqa": 66.8, "mme": 1510.7, "pope": 85.9},
            ),
            PublishedRow(model="Other", evidence="code", scores={"mme/perception": 1480}),
            PublishedRow(model="Not of these", scores={"pope": 85}),
        ],
    ),
    PublishedTable(
        paper="2410.1",
        title="A paper",
        table="Table 2",
        evidence="code",
        note="Not shown.",
        rows=[PublishedRow(model="LLaVA", note="Nor this.", scores={"mme/cognition": 300})],
    ),
]
MEANING = (
    "+ and -: better or worse than base_1 beyond noise: paired bootstrap over pictures (1,000 "
    "resamples), p < 0.05 after Holm's correction for the number of columns. One training each: "
    "the noise between seeds is not in it."
)


def test_the_table_has_published_rows_below() -> None:
    table = comparison_table(COMPARISON, SUITE, PUBLISHED)

    assert table.head == ["model", "GQA", "SQA", "MME", "average"]
    assert table.rows == [
        ["base_1", "60.00", "70.13", "1500", "68.38"],
        ["50% | <x>", "62.50+", "", "1400-", ""],
        # 62, 66.8 and 1510.7 / 20: the headline of a benchmark has two names.
        ["LLaVA [2410.1, figure]", "62", "66.8", "1510.7", "68.11"],
        ["Other [2410.1, code]", "", "", "1480", ""],
    ]
    assert table.notes == [
        MEANING,
        "SQA: no answers of 50% | <x>",
        "MME: a note.",
        "suite mine: a note on the suite.",
        "LLaVA [2410.1]: With OCR.",
        "2410.1, Table 1: Read off.",
    ]


def test_markdown_exactly() -> None:
    table = comparison_table(COMPARISON, SUITE)
    assert written(table, "markdown") == (
        "| model | GQA | SQA | MME | average |\n"
        "| --- | --- | --- | --- | --- |\n"
        "| base_1 | 60.00 | 70.13 | 1500 | 68.38 |\n"
        "| 50% \\| <x> | 62.50+ |  | 1400- |  |\n"
        f"\n{MEANING}\n"
        "\nSQA: no answers of 50% | <x>\n"
        "\nMME: a note.\n"
        "\nsuite mine: a note on the suite.\n"
    )


def test_latex_exactly() -> None:
    comparison = replace(COMPARISON, notes=["two\nlines"])
    table = comparison_table(comparison, SUITE)
    assert written(table, "latex") == (
        "\\begin{tabular}{lrrrr}\n"
        "\\toprule\n"
        "model & GQA & SQA & MME & average \\\\\n"
        "\\midrule\n"
        "base\\_1 & 60.00 & 70.13 & 1500 & 68.38 \\\\\n"
        "50\\% \\textbar{} \\textless{}x\\textgreater{} & 62.50+ &  & 1400- &  \\\\\n"
        "\\bottomrule\n"
        "\\end{tabular}\n"
        f"% {MEANING}\n"
        "% SQA: no answers of 50% | <x>\n"
        "% two lines\n"
        "% suite mine: a note on the suite.\n"
    )
    special = Table([r"a\b", "{c}", "~^", "$#&"], [], [])
    assert (
        r"a\textbackslash{}b & \{c\} & \textasciitilde{}\textasciicircum{} & \$\#\& \\"
        in written(special, "latex")
    )


def test_csv_exactly() -> None:
    table = comparison_table(COMPARISON, SUITE, PUBLISHED)
    assert written(table, "csv") == (
        "model,GQA,SQA,MME,average\n"
        "base_1,60.00,70.13,1500,68.38\n"
        "50% | <x>,62.50+,,1400-,\n"
        '"LLaVA [2410.1, figure]",62,66.8,1510.7,68.11\n'
        '"Other [2410.1, code]",,,1480,\n'
    )
    with pytest.raises(ValueError, match="no text form 'terminal'"):
        written(table, "terminal")


def test_differences_exactly() -> None:
    assert difference_table(COMPARISON).rows == [
        ["50% | <x>", "GQA", "+2.50", "+0.50 to +4.25", "0.01", "0.02", "+8 -1: 0.0391"],
        ["50% | <x>", "MME", "-100.00", "-150.50 to -20.00", "0.004", "0.008", ""],
        ["50% | <x>", "average", "+0.50", "-1.00 to +2.00", "0.4", "0.4", ""],
    ]


def test_categories_are_shares_of_the_best_run() -> None:
    """By hand: General is (60 / 62.5 + 1) / 2 and (1 + 1400 / 1500) / 2; Knowledge is not whole."""
    scores = category_scores(COMPARISON)
    assert list(scores) == ["General"]
    assert scores["General"]["base_1"].relative == pytest.approx(0.98)
    assert scores["General"]["50% | <x>"].relative == pytest.approx((1 + 14 / 15) / 2)
    assert scores["General"]["base_1"].min_max == 0.5
    three = [*COMPARISON.runs, compared("c", {"GQA": 61.25, "MME": 1450}, None)]
    assert category_scores(replace(COMPARISON, runs=three))["General"]["c"].min_max == 0.5
    table = category_table(COMPARISON)
    assert table.head == ["model", "General"]
    assert table.rows == [["base_1", "0.980 (0.50)"], ["50% | <x>", "0.967 (0.50)"]]


def test_too_few_resamples_for_a_mark_are_said() -> None:
    few = replace(COMPARISON, resamples=70)
    notes = comparison_table(few, SUITE).notes
    assert "70 resamples are too few for marks in 2 columns: give --resamples 80 or more." in notes
    enough = replace(COMPARISON, resamples=80)
    assert not any("too few" in note for note in comparison_table(enough, SUITE).notes)


# Files of answers


def mme_items(tmp_path: Path) -> list[Item]:
    write_mme(tmp_path / "mme", 1)
    return BENCHMARKS["mme"].load(tmp_path / "mme")


ANSWER = '{"id": "q0/0", "answer": "0"}\n'
OTHERS = '{"id": "q1/0", "answer": "1"}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "answers.jsonl holds no answers"),
        ("\n \n", "answers.jsonl holds no answers"),
        (ANSWER, "answers 1 of the 2 questions of real pictures; the first .* is 'q1/0'"),
        (ANSWER + OTHERS + ANSWER, "line 3 answers 'q0/0' a second time"),
        (
            ANSWER + '\n{"id": "q7/0", "answer": "1"}',
            "line 3 answers 'q7/0', no question of real pictures, whose ids are such as 'q0/0'",
        ),
        ('{"id": "count/0001.jpg/1", "answer": "Yes"}', "no question of real pictures"),
        ('{"id": null, "answer": "Yes"}', "line 1 answers 'None', no question"),
        (ANSWER + '{"id": "q1/0", "answer": "1', "line 2 is no JSON, or cut off"),
        (ANSWER + '{"id": "q1/0", "answer": 1}', "line 2: the answer 1 is no text"),
        (ANSWER + '{"id": "q1/0", "answer": null}', "line 2: the answer None is no text"),
        (ANSWER + '{"id": "q1/0", "answer": NaN}', "line 2: the answer nan is no text"),
        (ANSWER + '{"id": "q1/0", "answer": ["1"]}', r"line 2: the answer \['1'\] is no text"),
        (ANSWER + '{"id": "q1/0"}', "line 2 holds no answer; expected one of answer, output, "),
        (ANSWER + "{}", "line 2 holds no answer; .*found: nothing"),
        (ANSWER + '{"answer": "1"}', "line 2: a line names no question: expected id or"),
        (ANSWER + '["q1/0", "1"]', "line 2 holds .*; expected: an object"),
        (ANSWER + '"1"', "line 2 holds '1'; expected: an object"),
        ("[" * 100_000, "line 1 is no JSON, or cut off"),
        # What is right beside what was said: which is which cannot be known.
        (
            ANSWER + '{"id": "q1/0", "answer": "1", "prediction": "5"}',
            "line 2 holds answer and prediction, and which of them the model said is not known",
        ),
    ],
)
def test_each_bad_file_of_answers_is_one_clear_error(
    tmp_path: Path, text: str, message: str
) -> None:
    write_realmix(tmp_path / "realmix", 2, pictures=False)
    benchmark = BENCHMARKS["realmix"]
    file = tmp_path / "answers.jsonl"
    file.write_text(text)
    with pytest.raises(LayerfuseError, match=message) as caught:
        judged_answers(file, benchmark, benchmark.load(tmp_path / "realmix"))
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff\xfe{}", "UTF-16"), (b'{"id": "\xe4"}', "not UTF-8"), (None, "cannot read")],
)
def test_files_that_are_no_text_are_refused(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    file = tmp_path / "answers.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(LayerfuseError, match=message):
        judged_answers(file, BENCHMARKS["mme"], mme_items(tmp_path))


@pytest.mark.parametrize("key", ["answer", "output", "text", "prediction"])
@pytest.mark.parametrize("id_key", ["id", "question_id"])
def test_answers_of_other_tools_are_read(tmp_path: Path, key: str, id_key: str) -> None:
    """With a byte order mark, empty lines, and separators of lines within an answer."""
    write_realmix(tmp_path / "realmix", 2, pictures=False)
    benchmark = BENCHMARKS["realmix"]
    lines = [
        {id_key: "q1/0", key: "1\u2028", "model_id": "m"},
        {id_key: "q0/0", key: "5", "prompt": "which one?"},
    ]
    text = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    file = tmp_path / "answers.jsonl"
    file.write_text("\ufeff" + text, encoding="utf-8")

    judged = judged_answers(file, benchmark, benchmark.load(tmp_path / "realmix"))

    assert [each.item.id for each in judged] == ["q0/0", "q1/0"]
    assert [each.judged.score for each in judged] == [0, 1]


def test_llavas_file_of_mme_is_read(tmp_path: Path) -> None:
    items = mme_items(tmp_path)
    lines: list[dict[str, str]] = []
    for item in items:
        prompt = f"{item.question}\nAnswer the question using a single word or phrase."
        lines.append({"question_id": item.together, "prompt": prompt, "text": "Yes"})
    write_lines(tmp_path / "mme.jsonl", lines)

    judged = judged_answers(tmp_path / "mme.jsonl", BENCHMARKS["mme"], items)

    assert [each.judged.score for each in judged] == [1, 0] * 14


def test_what_is_sent_to_a_server_is_read(tmp_path: Path) -> None:
    """An Excel file with the question and what is right beside the prediction, one left empty."""
    write_realmix(tmp_path / "realmix", 3, pictures=False)
    benchmark = BENCHMARKS["realmix"]
    # Any: openpyxl brings no types.
    book: Any = openpyxl.Workbook()
    head = ("index", "question", "answer", "prediction")
    rows = [("q2/0", "which?", "0", 2), ("q0/0", "which?", "0", None), ("q1/0", "?", "0", "1")]
    for cells in (head, *rows):
        book.active.append(cells)
    folder = tmp_path / "run"
    folder.mkdir()
    book.save(folder / "realmix.xlsx")
    file = folder / "realmix.xlsx"
    assert Run("run", folder).file_of("realmix") == file

    judged = judged_answers(file, benchmark, benchmark.load(tmp_path / "realmix"))

    assert [each.judged.score for each in judged] == [0, 1, 1]


def test_runs_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("lr=0.1", "b"):
        Path(name).mkdir()
    assert Run.parse("lr=0.1") == Run("lr=0.1", Path("lr=0.1"))
    assert Run.parse("low=lr=0.1") == Run("low", Path("lr=0.1"))
    assert Run.parse("b/../b/").name == "b"
    with pytest.raises(LayerfuseError, match="no folder c: give one that `layerfuse eval --suite`"):
        Run.parse("a=c")
    with pytest.raises(LayerfuseError, match="'=b' names no run"):
        Run.parse("=b")


def test_two_files_of_answers_to_one_benchmark_are_refused(tmp_path: Path) -> None:
    run = run_of(tmp_path, "a", "realmix", {"q0/0": "0"})
    assert run.file_of("realmix") == tmp_path / "a" / "realmix.jsonl"
    assert run.file_of("gqa") is None
    write_answers(tmp_path / "a" / "realmix" / "answers.jsonl", {"q0/0": "0"})
    with pytest.raises(LayerfuseError, match="answer realmix: remove one"):
        run.file_of("realmix")


# The command


def write_suite(folder: Path, suite: Suite) -> Path:
    file = folder / "suite.yaml"
    file.write_text(yaml.safe_dump(suite.model_dump(mode="json")))
    return file


@pytest.mark.parametrize("form", ["terminal", "markdown", "latex", "csv"])
def test_runs_are_compared_on_the_command_line(tmp_path: Path, form: str) -> None:
    write_realmix(tmp_path / "realmix", 12, pictures=False)
    for name, least in (("a", 6), ("b", 0)):
        run_of(tmp_path, name, "realmix", right_answers(12, lambda number, n=least: number >= n))
    suite = write_suite(tmp_path, REAL)
    arguments = ["compare", str(tmp_path / "a"), f"new={tmp_path / 'b'}", "--suite", str(suite)]
    options = ["--benchmarks", str(tmp_path), "--format", form, "--resamples", "100"]

    ended = CliRunner().invoke(
        app, [*arguments, *options, "--no-published", "--output", str(tmp_path / "out")]
    )

    assert ended.exit_code == 0, ended.output
    suffixes = {"markdown": ".md", "latex": ".tex", "csv": ".csv"}
    numbers = {"scores": "50.00", "differences": "+50.00", "categories": "0.500 (0.00)"}
    for table, number in numbers.items():
        for of_form, suffix in suffixes.items():
            text = (tmp_path / "out" / f"{table}{suffix}").read_text()
            assert number in text
            if of_form == form:
                assert text in ended.stdout
        assert number in ended.stdout
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert content["category_scores"]["numbers"]["a"] == {"relative": 0.5, "min_max": 0.0}
    assert [run["name"] for run in content["runs"]] == ["a", "new"]
    assert content["runs"][1]["cells"]["counting"]["difference"]["difference"] == 50


def test_published_rows_stand_below_a_run(tmp_path: Path) -> None:
    write_mme(tmp_path / "mme", 1)
    run = run_of(tmp_path, "a", "mme", mme_answers(0, 0.5, 1))
    suite = write_suite(tmp_path, suite_of(column("MME", "mme", column="perception")))
    said = io.StringIO()
    console = Console(file=said, width=200)

    comparison = report_comparison(
        [str(run.folder)], str(suite), benchmarks=tmp_path, form="csv", console=console
    )

    assert comparison.notes == ["28 questions were found; the published MME has 2374"]
    assert '"MMFuser-7B [2410.11829, figure]",1479.7' in said.getvalue()


def test_bad_answers_end_the_command_with_one_error(tmp_path: Path) -> None:
    write_realmix(tmp_path / "realmix", 6, pictures=False)
    run = run_of(tmp_path, "a", "realmix", {"q0/0": "0"})
    suite = write_suite(tmp_path, REAL)
    arguments = ["compare", str(run.folder), "--suite", str(suite), "--benchmarks", str(tmp_path)]

    ended = CliRunner().invoke(app, arguments)

    assert ended.exit_code == 2
    assert "answers 1 of the 6 questions of real pictures" in one_line(ended)


@pytest.mark.parametrize("option", ["--baseline=run", "--resamples=200", "--seed=1"])
def test_one_run_has_nothing_to_be_compared_with(tmp_path: Path, option: str) -> None:
    run = tmp_path / "run"
    run.mkdir()

    result = CliRunner().invoke(app, ["compare", str(run), "--suite=real", option])

    assert result.exit_code == 2
    assert "compares runs, and there is one" in one_line(result)
