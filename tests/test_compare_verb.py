"""`layerfuse compare` on the command line."""

import io
import json
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from layerfuse.evaluate.compare_report import report_comparison
from layerfuse.evaluate.suites import Suite
from layerfuse_cli.app import app
from tests.compared import REAL, mme_answers, right_answers, run_of
from tests.made_up_benchmarks import (
    column,
    suite_of,
    write_mme,
    write_realmix,
)
from tests.studies import one_line


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
            if of_form == form and form != "csv":
                assert text in ended.stdout
        if form != "csv":
            assert number in ended.stdout
    if form == "csv":
        # One table, which a program reads; what else there is to say goes to the other stream.
        assert ended.stdout == (tmp_path / "out" / "scores.csv").read_text()
        assert "+ and -: better or worse than a beyond noise" in ended.stderr
        assert "tables of their own: differences, categories" in ended.stderr
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert content["category_scores"]["numbers"]["a"] == {"relative": 0.5, "min_max": 0.0}
    assert content["category_columns"]["numbers"] == {
        "all": ["counting"],
        "relative": ["counting"],
        "min_max": ["counting"],
    }
    assert [run["name"] for run in content["runs"]] == ["a", "new"]
    assert content["runs"][1]["cells"]["counting"]["difference"]["difference"] == 50


def test_a_file_as_output_is_refused_before_anything_is_printed(tmp_path: Path) -> None:
    write_realmix(tmp_path / "realmix", 12, pictures=False)
    run_of(tmp_path, "a", "realmix", right_answers(12, lambda _: True))
    suite = write_suite(tmp_path, REAL)
    file = tmp_path / "table.md"
    file.write_text("mine")
    arguments = ["compare", str(tmp_path / "a"), "--suite", str(suite), "--benchmarks"]

    ended = CliRunner().invoke(app, [*arguments, str(tmp_path), "--output", str(file)])

    assert ended.exit_code == 2
    assert "is a file: give the name of a folder by" in " ".join(ended.stderr.split())
    assert ended.stdout == ""
    assert file.read_text() == "mine"


def test_published_rows_stand_below_a_run(tmp_path: Path) -> None:
    write_mme(tmp_path / "mme", 1)
    run = run_of(tmp_path, "a", "mme", mme_answers(0, 0.5, 1))
    suite = write_suite(tmp_path, suite_of(column("MME", "mme", column="perception")))
    said = io.StringIO()
    console = Console(file=said, width=200)

    comparison = report_comparison(
        [str(run.folder)], str(suite), benchmarks=tmp_path, form="csv", console=console
    )

    assert len(comparison.notes) == 1
    assert "MME: 28 questions were found, and the published files have 2,374" in comparison.notes[0]
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


def test_a_folder_of_benchmarks_is_refused_where_none_has_files(tmp_path: Path) -> None:
    arguments = ["compare", "a", "b", "--suite", "offline", "--benchmarks", str(tmp_path)]
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 2
    assert "suite 'offline' needs no files: leave --benchmarks out" in one_line(refused)
