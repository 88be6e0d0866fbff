"""`layerfuse eval --suite`: what there is is asked, the rest is named, and all is printed."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner, Result

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.benchmarks import BENCHMARKS
from layerfuse.evaluate.suite_run import evaluate_suite, look_for
from layerfuse.evaluate.suites import load_suite
from layerfuse_cli.app import app
from tests import tiny
from tests.made_up_benchmarks import (
    column,
    suite_of,
    write_mme,
    write_realmix,
    write_refcoco,
    write_scienceqa,
)
from tests.studies import one_line, read_lines

SUITE = suite_of(
    column("counting", "realmix", column="counting", category="numbers"),
    column("SQA", "scienceqa"),
    column("RefCOCO", "refcoco"),
    column("MM-Vet", "mm-vet"),
    column("OCRBench", "ocrbench", divide=10),
)
"""Three benchmarks that `benchmarks` writes, one that is not scored, and one without files."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random model."""
    return tiny.save_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def benchmarks(tmp_path: Path) -> Path:
    """A folder with three benchmarks."""
    folder = tmp_path / "benchmarks"
    write_realmix(folder / "realmix")
    write_scienceqa(folder / "scienceqa")
    write_refcoco(folder / "refcoco")
    return folder


def run_eval(model: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["eval", str(model), *options])


def write_suite(folder: Path, **changes: Any) -> Path:
    """`SUITE` as a file."""
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump({**SUITE.model_dump(mode="json"), **changes}))
    return file


def test_a_suite_asks_what_there_is_and_says_what_is_missing(
    model: Path, benchmarks: Path, tmp_path: Path
) -> None:
    (benchmarks / "ocrbench").mkdir()
    output = tmp_path / "out"
    suite = write_suite(tmp_path)
    options = ("--suite", str(suite), "--benchmarks", str(benchmarks), "--output", str(output))

    ended = run_eval(model, *options)

    assert ended.exit_code == 0, ended.output
    said = one_line(ended)
    assert "not available: mm-vet: layerfuse does not score it" in said
    # The folder is there, and empty.
    assert "not available: ocrbench: no files in" in said
    assert "expected: OCRBench.json, OCRBench_Images/" in said
    assert "No average: MM-Vet, OCRBench missing." in said
    assert f"answers and scores: {output}" in said
    # One bar: all questions of the suite, 6 and 4 and 3.
    assert said.count("(13)") == 1
    assert "suite mine (13)" in said
    scores = json.loads((output / "suite.json").read_text())
    assert scores["average"] is None
    assert scores["averaged"] == []
    assert [each["missing"] == "" for each in scores["columns"]] == [True] * 3 + [False] * 2
    assert [each["questions"] for each in scores["columns"]] == [3, 2, 3, 0, 0]
    for name, count in (("realmix", 6), ("scienceqa", 4), ("refcoco", 3)):
        assert len(read_lines(output / name / "answers.jsonl")) == count

    again = run_eval(model, *options, "--partial-average", "--batch-size", "1")

    assert again.exit_code == 0, again.output
    assert "Average over 3 of 5 columns (counting, SQA, RefCOCO): " in one_line(again)
    assert "Not comparable with the paper's." in one_line(again)


def test_a_folder_for_scoring_alone_stops_no_other_benchmark(
    model: Path, benchmarks: Path, tmp_path: Path
) -> None:
    shutil.rmtree(benchmarks / "realmix" / "images")

    ended = run_eval(model, "--suite", str(write_suite(tmp_path)), "--benchmarks", str(benchmarks))

    assert ended.exit_code == 0, ended.output
    said = one_line(ended)
    assert f"not available: realmix: {benchmarks / 'realmix'} has none of its pictures" in said
    assert "No average: counting, MM-Vet, OCRBench missing." in said


def test_answers_lie_in_the_models_folder_by_default(benchmarks: Path, tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "model")
    suite = suite_of(column("SQA", "scienceqa"))

    folder = evaluate_suite(model, suite, benchmarks=benchmarks, console=Console(quiet=True))

    assert folder == model / "suites" / "mine"
    scores = json.loads((folder / "suite.json").read_text())
    (answered,) = scores["columns"]
    assert scores["average"] == answered["value"] == answered["averaged"]
    # What it wrote is no part of the model.
    evaluate_suite(model, suite, benchmarks=benchmarks, console=Console(quiet=True))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("realmix/images/3.png", r"real pictures: 1 of 6 pictures are missing, .*3\.png"),
        ("scienceqa/pid_splits.json", r"pid_splits\.json"),
        ("realmix/test.json", r"no .*test\.json; expected: test\.json, images/"),
    ],
)
def test_what_is_there_in_part_is_refused_before_the_model_is_loaded(
    benchmarks: Path, tmp_path: Path, file: str, message: str
) -> None:
    (benchmarks / file).unlink()
    with pytest.raises(LayerfuseError, match=message):
        # There is no model: it is not looked for.
        evaluate_suite(tmp_path / "none", SUITE, benchmarks=benchmarks)


def test_a_column_that_is_not_reported_is_refused_before_anything_is_asked(
    benchmarks: Path,
) -> None:
    misspelt = suite_of(column("counts", "realmix", column="count"))
    with pytest.raises(LayerfuseError, match="'counts': real pictures reports no 'count'; valid: "):
        look_for(misspelt, benchmarks)


def test_a_benchmark_without_a_prompt_is_refused(benchmarks: Path, tmp_path: Path) -> None:
    words = tmp_path / "words.yaml"
    words.write_text("gqa: {text: '{question}'}")
    suite = suite_of(column("SQA", "scienceqa")).model_copy(update={"prompts": str(words)})
    with pytest.raises(LayerfuseError, match=r"words\.yaml' have none for benchmark 'scienceqa'"):
        look_for(suite, benchmarks)


def test_a_suite_of_which_nothing_is_there_is_refused(tmp_path: Path) -> None:
    console = Console(file=io.StringIO())
    with pytest.raises(LayerfuseError, match=r"no benchmark of suite .* can be asked: .*--bench"):
        evaluate_suite(tmp_path, SUITE, benchmarks=tmp_path / "none", console=console)


def test_a_limit_asks_some_questions_of_each_group(tmp_path: Path) -> None:
    """Two questions about a picture of MME are judged together, and so are asked together."""
    write_mme(tmp_path / "mme", 3)
    suite = suite_of(column("MME", "mme"))
    for task in (tmp_path / "mme").iterdir():
        for number in range(3):
            (task / f"000{number}.jpg").write_bytes(f"{task.name} {number}".encode())

    few = look_for(suite, tmp_path, limit=1)
    more = look_for(suite, tmp_path, limit=30)

    (asked,) = few.available
    assert len(asked.items) == 28
    assert len({item.group for item in asked.items}) == 14
    assert len({item.together for item in asked.items}) == 14
    # A whole pair more than the first of each task.
    assert len(more.available[0].items) == 30
    assert "MME: 28 of 84 questions were asked (--limit 1)" in few.notes[-1]
    all_of_them = look_for(suite, tmp_path, limit=500)
    assert len(all_of_them.available[0].items) == 84
    # Nothing was left out of the score.
    assert not any("--limit" in note for note in all_of_them.notes)


def test_a_limit_makes_no_question_closed(tmp_path: Path) -> None:
    """Of few questions the right answers are few; the benchmark has more than can be compared."""
    write_realmix(tmp_path / "realmix", 70, pictures=False, categories=["counting"])
    (tmp_path / "realmix" / "images").mkdir()
    for number in range(70):
        (tmp_path / "realmix" / "images" / f"{number}.png").touch()

    few = look_for(suite_of(column("all", "realmix")), tmp_path, limit=3)

    assert len(few.available[0].items) < 70
    assert few.available[0].possible == {}


def test_notes_of_benchmarks_stand_below_the_scores(tmp_path: Path) -> None:
    write_mme(tmp_path / "mme", 1)
    for task in (tmp_path / "mme").iterdir():
        (task / "0000.jpg").write_bytes(b"a picture")
    suite = suite_of(column("MME", "mme"))
    found = look_for(suite, tmp_path)
    (note,) = found.notes
    assert note.startswith("MME: 28 questions were found, and the published files have 2,374")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --suite NAME, --data FILE"),
        (["--suite", "offline", "--data", "x.json"], "give --suite NAME, --data FILE"),
        (["--suite", "offline", "--split", "test"], "--split goes with --data alone"),
        (["--suite", "offline", "--column", "a=b"], "--column goes with --data alone"),
        (["--suite", "offline", "--ignore-column", "b"], "--ignore-column goes with --data alone"),
        (["--suite", "offline", "--literal-answers"], "--literal-answers goes with --data alone"),
        (["--suite", "offline", "--max-new-tokens", "5"], "--max-new-tokens goes with --data"),
        (["--suite", "offline", "--controls"], "--controls goes with --data alone"),
        (["--suite", "offline", "--seed", "0"], "--seed goes with --data alone"),
        (["--suite", "offline", "--benchmarks", "x"], "needs no files: leave --benchmarks out"),
        (["--suite", "igva", "--partial-average"], "no average: leave --partial-average out"),
        (["--data", "x.json", "--benchmarks", "x"], "--benchmarks goes with --suite"),
        (["--data", "x.json", "--partial-average"], "--partial-average goes with --suite alone"),
        (["--data", __file__, "--split", "test"], "--split is of a dataset"),
    ],
)
def test_options_that_would_change_nothing_are_refused(options: list[str], message: str) -> None:
    ended = run_eval(Path("no model"), *options)
    assert ended.exit_code == 2
    assert message in one_line(ended)


def test_a_folder_that_cannot_be_made_is_one_clear_error(
    model: Path, benchmarks: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    suite = suite_of(column("SQA", "scienceqa"))
    with pytest.raises(LayerfuseError, match=r"cannot write .*file/out/scienceqa/asked\.json"):
        evaluate_suite(
            model,
            suite,
            benchmarks=benchmarks,
            output=tmp_path / "file" / "out",
            console=Console(quiet=True),
        )


def test_closed_questions_are_also_answered_by_likelihood(
    model: Path, benchmarks: Path, tmp_path: Path
) -> None:
    """ScienceQA has options; where a box is right nothing can be chosen."""
    screen = io.StringIO()

    folder = evaluate_suite(
        model,
        suite_of(column("SQA", "scienceqa", column="accuracy"), column("RefCOCO", "refcoco")),
        benchmarks=benchmarks,
        output=tmp_path / "out",
        likelihood=True,
        console=Console(file=screen, width=120),
    )

    lines = read_lines(folder / "scienceqa" / "choices.jsonl")
    right = {
        item.id: item.answers[0] for item in BENCHMARKS["scienceqa"].load(benchmarks / "scienceqa")
    }
    for line in lines:
        likelihoods = line["log_likelihoods"]
        assert line["chosen"] == max(likelihoods, key=lambda letter: likelihoods[letter])
        assert line["score"] == float(line["chosen"] == right[line["id"]])
    assert len(lines) == len(right)
    scores = json.loads((folder / "suite.json").read_text())
    science, boxes = scores["by_likelihood"]
    assert science["value"] == pytest.approx(100 * sum(x["score"] for x in lines) / len(lines))
    assert boxes["value"] is None
    assert "open" in boxes["missing"]
    assert "by likelihood" in screen.getvalue()
    assert not (folder / "refcoco" / "choices.jsonl").exists()


def test_one_benchmark_prints_all_its_numbers(
    model: Path, benchmarks: Path, tmp_path: Path
) -> None:
    screen = io.StringIO()

    folder = evaluate_suite(
        model,
        load_suite("scienceqa"),
        benchmarks=benchmarks,
        output=tmp_path / "out",
        console=Console(file=screen, width=120),
    )

    columns = json.loads((folder / "scienceqa" / "scores.json").read_text())["columns"]
    assert {"image accuracy", "accuracy", "NAT"} <= {column["name"] for column in columns}
    for each in columns:
        assert each["name"] in screen.getvalue()
        assert f"{each['value']:.2f}" in screen.getvalue()
