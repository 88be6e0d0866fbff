"""Tables of compared runs, as they are written, to the last character."""

from dataclasses import replace
from typing import Any

import pytest

from layerfuse.evaluate.category_scores import category_scores
from layerfuse.evaluate.compare import Cell, ComparedRun, Comparison, Difference
from layerfuse.evaluate.compare_table import (
    Table,
    category_table,
    comparison_table,
    difference_table,
    written,
)
from layerfuse.evaluate.published import PublishedRow, PublishedTable
from tests.made_up_benchmarks import (
    column,
    suite_of,
)


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
UNCORRECTED = "The mark of the average is of one test of its own, uncorrected."


def test_the_table_has_published_rows_below() -> None:
    table = comparison_table(COMPARISON, SUITE, PUBLISHED)

    assert table.head == ["model", "GQA", "SQA", "MME", "average"]
    assert table.marked_rows() == [
        ["base_1", "60.00", "70.13", "1500.0", "68.38"],
        ["50% | <x>", "62.50+", "", "1400.0-", ""],
        # 62, 66.8 and 1510.7 / 20: the headline of a benchmark has two names.
        ["LLaVA [2410.1, figure]", "62", "66.8", "1510.7", "68.11"],
        ["Other [2410.1, code]", "", "", "1480", ""],
    ]
    assert table.notes == [
        MEANING,
        UNCORRECTED,
        "SQA: no answers of 50% | <x>",
        "MME: a note.",
        "suite mine: a note on the suite.",
        "LLaVA [2410.1]: With OCR.",
        "2410.1, Table 1: Read off.",
    ]


def test_numbers_have_the_last_digit_of_published_ones() -> None:
    """MME and CIDEr have one decimal in papers, OCRBench counts answers."""
    suite = suite_of(
        column("MME", "mme"),
        column("CIDEr", "refcocog-captions", column="val"),
        column("Key Information", "ocrbench", column="Key Information Extraction"),
    )
    cells = {
        "MME": Cell(1531.28, 2000, 1531.28, 2000),
        "CIDEr": Cell(60.54, 1000, 60.54, 10),
        "Key Information": Cell(41, 100, 41, 100),
    }
    comparison = replace(
        COMPARISON, columns=list(cells), runs=[ComparedRun("a", cells, None)], missing={}
    )
    assert comparison_table(comparison, suite).rows == [["a", "1531.3", "60.5", "41", ""]]


def test_the_average_that_is_not_there_has_no_note() -> None:
    without = [COMPARISON.runs[0], replace(COMPARISON.runs[1], average_difference=None)]
    notes = comparison_table(replace(COMPARISON, runs=without), SUITE).notes
    assert MEANING in notes
    assert UNCORRECTED not in notes


def test_markdown_exactly() -> None:
    table = comparison_table(COMPARISON, SUITE)
    assert written(table, "markdown") == (
        "| model | GQA | SQA | MME | average |\n"
        "| --- | --- | --- | --- | --- |\n"
        "| base_1 | 60.00 | 70.13 | 1500.0 | 68.38 |\n"
        "| 50% \\| <x> | 62.50+ |  | 1400.0- |  |\n"
        f"\n{MEANING}\n"
        f"\n{UNCORRECTED}\n"
        "\nSQA: no answers of 50% | <x>\n"
        "\nMME: a note.\n"
        "\nsuite mine: a note on the suite.\n"
    )


@pytest.mark.parametrize("name", ["[ours] A", "*B"])
def test_latex_reads_no_name_as_a_part_of_a_command(name: str) -> None:
    """`\\\\*` and `\\\\[` are other commands than the end of a row."""
    table = Table(["model", "GQA"], [[name, "1.00"]], [])

    assert f"\n{{}}{name} & 1.00" in written(table, "latex")


def test_latex_exactly() -> None:
    comparison = replace(COMPARISON, notes=["two\nlines"])
    table = comparison_table(comparison, SUITE)
    assert written(table, "latex") == (
        "\\begin{tabular}{lrrrr}\n"
        "\\toprule\n"
        "model & GQA & SQA & MME & average \\\\\n"
        "\\midrule\n"
        "base\\_1 & 60.00 & 70.13 & 1500.0 & 68.38 \\\\\n"
        "50\\% \\textbar{} \\textless{}x\\textgreater{} & 62.50+ &  & 1400.0- &  \\\\\n"
        "\\bottomrule\n"
        "\\end{tabular}\n"
        f"% {MEANING}\n"
        f"% {UNCORRECTED}\n"
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
        # Numbers are numbers to programs: marks stand in columns of their own.
        "model,GQA,GQA differs,SQA,MME,MME differs,average\n"
        "base_1,60.00,,70.13,1500.0,,68.38\n"
        "50% | <x>,62.50,+,,1400.0,-,\n"
        '"LLaVA [2410.1, figure]",62,,66.8,1510.7,,68.11\n'
        '"Other [2410.1, code]",,,,1480,,\n'
    )
    assert written(Table(["model", "column"], [], []), "csv") == "model,column\n"
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
    # Of Knowledge nothing can be compared.
    assert table.notes[1:] == ["General: over 2 of 2: GQA, MME", "Knowledge: over 0 of 1"]


def test_categories_say_over_which_of_their_columns_they_are() -> None:
    runs = [
        compared("a", {"GQA": 60, "MME": 0}, None),
        compared("b", {"GQA": 60, "MME": 0, "SQA": 70}, None),
    ]
    table = category_table(replace(COMPARISON, runs=runs))

    # No notes are in CSV.
    assert written(table, "csv") == (
        "model,General (1 of 2: GQA; place 0 of 2)\na,1.000\nb,1.000\n"
    )
    assert table.notes[1:] == [
        "General: over 1 of 2: GQA; the place over 0 of 2",
        "Knowledge: over 0 of 1",
    ]


def test_too_few_resamples_for_a_mark_are_said() -> None:
    # 2 · 2 / (79 + 1) is 0.05, which is not below it.
    few = replace(COMPARISON, resamples=79)
    notes = comparison_table(few, SUITE).notes
    assert "79 resamples are too few for marks in 2 columns: give --resamples 80 or more." in notes
    enough = replace(COMPARISON, resamples=80)
    assert not any("too few" in note for note in comparison_table(enough, SUITE).notes)
