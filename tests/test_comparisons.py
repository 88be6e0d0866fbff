"""Pages that set several studies of the same arms side by side."""

import json
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import spearmanr

from docs.comparisons import Column, comparison, costs, measured
from layerfuse.study.findings import state_findings
from layerfuse.study.report import summary_content
from layerfuse.study.summary import summarize
from tests.made_up_studies import finished_run, random_answers, save_study

SHALLOW = {"one": 0.9, "two": 0.7, "three": 0.5, "four|five": 0.3, "alone": 0.1}
DEEP = {"one": 0.6, "two": 0.8, "three": 0.4, "four|five": 0.2, "late": 0.95}


def column_of(folder: Path, title: str, rates: dict[str, float]) -> Column:
    """A finished study of arms that answer this share right, two seeds each."""
    runs = []
    for place, (arm, rate) in enumerate(rates.items()):
        for seed in (0, 1):
            answers = random_answers(rate, seed=10 * place + seed, pictures=150)
            runs.append(finished_run(arm, seed, answers))
    save_study(folder, runs)
    summary = summarize(runs, "one")
    content = summary_content(summary, state_findings(summary))
    (folder / "summary.json").write_text(json.dumps(content))
    return Column(title, folder)


@pytest.fixture
def columns(tmp_path: Path) -> list[Column]:
    """Two studies that share four arms."""
    return [
        column_of(tmp_path / "shallow", "few blocks", SHALLOW),
        column_of(tmp_path / "deep", "all blocks", DEEP),
    ]


def scores_of(column: Column) -> dict[str, float]:
    """The score of each arm, as the study's summary has it."""
    return {arm["arm"]: arm["mean"]["score"] for arm in column.summary()["arms"]}


def cells_of(lines: list[str], first: str) -> list[str]:
    """The cells of the line that begins with this one."""
    for line in lines:
        # A bar within a name is written with a stroke before it.
        cells = [cell.strip() for cell in line.replace("\\|", "/").strip("|").split(" | ")]
        if cells[0] == first:
            return cells
    raise AssertionError(f"no line begins with {first}")


def test_arms_stand_in_the_order_of_the_last_study(columns: list[Column]) -> None:
    lines = comparison(columns)

    names = [line.split(" | ")[0].removeprefix("| ") for line in lines[2:8]]
    assert names == ["late", "two", "one", "three", "four\\|five", "alone"]


def test_scores_have_their_ranks_within_their_study(columns: list[Column]) -> None:
    lines = comparison(columns)

    shallow, deep = (scores_of(column) for column in columns)
    assert cells_of(lines, "one") == ["one", f"{shallow['one']:.3f} (1)", f"{deep['one']:.3f} (3)"]
    assert cells_of(lines, "four/five")[1] == f"{shallow['four|five']:.3f} (4)"
    # What one of the studies does not have.
    assert cells_of(lines, "late") == ["late", "", f"{deep['late']:.3f} (1)"]
    assert cells_of(lines, "alone") == ["alone", f"{shallow['alone']:.3f} (5)", ""]


def test_the_order_is_compared_over_the_arms_of_both(columns: list[Column]) -> None:
    lines = comparison(columns)

    shallow, deep = (scores_of(column) for column in columns)
    common = ["one", "two", "three", "four|five"]
    # Any: scipy's types do not say what the result holds.
    expected: Any = spearmanr([shallow[name] for name in common], [deep[name] for name in common])
    cells = cells_of(lines, "few blocks")
    assert cells[-1].startswith(f"{expected.statistic:+.2f} (")
    assert cells[-1].endswith("), 4 arms")
    assert cells[1] == "2"
    # The last study is what the others are compared with.
    assert cells_of(lines, "all blocks")[-1] == ""


@pytest.mark.parametrize(
    ("state", "mark"),
    [("flat", ""), ("still improving", " ↑"), ("blind", " ×"), ("unstable", " ×")],
)
def test_what_an_arm_had_still_to_learn_is_marked(
    columns: list[Column], state: str, mark: str
) -> None:
    summary = columns[0].summary()
    for name in SHALLOW:
        summary["learning"][name]["state"] = "flat"
    summary["learning"]["two"]["state"] = state
    (columns[0].folder / "summary.json").write_text(json.dumps(summary))

    lines = comparison(columns)

    assert cells_of(lines, "two")[1] == f"{scores_of(columns[0])['two']:.3f} (2){mark}"
    unfinished = 0 if state == "flat" else 1
    assert cells_of(lines, "few blocks")[3] == f"{unfinished} of 5"


def test_studies_without_results_are_left_out(columns: list[Column], tmp_path: Path) -> None:
    missing = Column("not run", tmp_path / "missing")

    assert measured([missing, *columns]) == columns


def test_costs_are_those_of_training(columns: list[Column]) -> None:
    file = columns[0].folder / "results.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    for seconds, record in zip([100, 120, 140, 160, 90, 90, 90, 90, 90, 90], records, strict=True):
        record["seconds"] = {"finetune": seconds, "evaluate": 1000}
        record["losses"] = {"finetune": [[1, 2.0], [800, 0.1]]}
    text = "".join(json.dumps(record) + "\n" for record in records)
    file.write_text(text)

    lines = costs(columns[:1])

    assert cells_of(lines, "few blocks") == ["few blocks", "800", "106"]
