"""Which runs a study does when it is started again: those that are not done, and no others."""

import io
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from layerfuse.data.collate import SampleDataset
from layerfuse.data.from_records import Reading, from_columns
from layerfuse.data.lazy_records import Samples
from layerfuse.data.sample import Sample
from layerfuse.data.sample_sets import SampleSets
from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.answer import Answerer
from layerfuse.evaluate.predict import predict
from layerfuse.evaluate.records import AnswerRecord
from layerfuse.study import execute
from layerfuse.study.coordinate import study
from layerfuse.study.execute import run_one
from tests.processes import start
from tests.studies import (
    comparable_results,
    cut_in_half,
    read_left_out,
    read_lines,
    read_results,
    read_samples,
    times_of_results,
    write_recipe,
    write_samples,
)


def run_folders(study_folder: Path) -> set[str]:
    """The folders of a study's finished runs. A run on other data has another folder."""
    return {result["folder"] for result in read_results(study_folder)}


def study_killed_in_the_second_arm(recipe: Path, folder: Path) -> None:
    """Run in a process of its own: SIGKILL between the training and the test of an arm."""

    def predict_or_die(answerer: Answerer, *args: Any) -> list[AnswerRecord]:
        # The second arm is the one of two layers.
        if len(answerer.model.config.vision_layers) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return predict(answerer, *args)

    execute.predict = predict_or_die
    study(recipe, output=folder)


@pytest.mark.parametrize("keep_models", ["best", "none"])
def test_killed_and_started_again_gives_the_same_results(
    recipe: dict[str, Any],
    tmp_path: Path,
    keep_models: str,
) -> None:
    """The first arm, which was done before the kill, is not run again; the second one, which was
    killed in its test, is not trained again."""
    recipe["keep_models"] = keep_models
    path = write_recipe(tmp_path, recipe)
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
    study(path, output=whole)
    # A process of its own, since SIGKILL ends it.
    process = start(study_killed_in_the_second_arm, path, killed)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (first,) = killed.glob("arms/*/result.json")
    assert first.parent.name.startswith("one")
    first_written = first.stat().st_mtime_ns

    screen = io.StringIO()
    study(path, output=killed, console=Console(file=screen, width=200))

    assert first.stat().st_mtime_ns == first_written
    # eight questions, whose right answers are read too
    assert "two · seed 0: evaluate (16)" in screen.getvalue()
    assert "two · seed 0: align" not in screen.getvalue()
    assert comparable_results(killed) == comparable_results(whole)
    for name in ("one", "two"):
        pattern = f"arms/{name}*/predictions.jsonl"
        continued_answers = next(killed.glob(pattern)).read_text()
        whole_answers = next(whole.glob(pattern)).read_text()
        assert continued_answers == whole_answers
    # What only an interrupted run needs is gone.
    assert not list(killed.glob("arms/*/stages"))
    num_models = len(list(killed.glob("arms/*/model")))
    assert num_models == (1 if keep_models == "best" else 0)


def test_adding_an_arm_runs_only_that_arm(recipe: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "study"
    study(write_recipe(tmp_path, recipe), output=folder)
    before = times_of_results(folder)
    third = {"name": "three", "layers": "all", "fusion": {"name": "group_mean"}}
    recipe["arms"].append(third)

    study(write_recipe(tmp_path, recipe), output=folder)

    assert len(read_results(folder)) == 3
    after = times_of_results(folder)
    for result_file, written in before.items():
        assert after[result_file] == written


@pytest.mark.parametrize("cached", [True, False])
def test_changed_or_repaired_pictures_make_other_runs(
    recipe: dict[str, Any],
    tmp_path: Path,
    cached: bool,
) -> None:
    recipe["on_bad_sample"] = "skip"
    recipe["cache_features"] = cached
    path = write_recipe(tmp_path, recipe)
    picture = tmp_path / "1.png"
    whole = picture.read_bytes()

    def folders_of_study() -> set[str]:
        study(path, output=tmp_path / "study")
        return run_folders(tmp_path / "study")

    cut_in_half(picture)
    with_half_picture = folders_of_study()
    # Whole again, the sample is no longer left out: runs without it are other runs.
    picture.write_bytes(whole)
    with_repaired_picture = folders_of_study()
    unchanged = folders_of_study()
    picture.write_bytes(b"")
    with_empty_picture = folders_of_study()

    assert unchanged == with_repaired_picture
    assert not with_half_picture & with_repaired_picture
    assert not with_repaired_picture & with_empty_picture
    # Both leave the sample out, but for another reason: its picture has other bytes.
    assert not with_half_picture & with_empty_picture


def test_arms_are_compared_on_the_same_samples(recipe: dict[str, Any], tmp_path: Path) -> None:
    """An arm of more tokens makes a sample too long for all; other words are other samples."""
    samples = read_samples(tmp_path)
    samples[7]["conversations"][0]["value"] = "<image> n?" + " n" * 40
    write_samples(tmp_path, samples)
    # What the longest sample needs with the 16 image tokens of the first two arms.
    recipe["stages"]["align"]["max_length"] = 122
    recipe["on_bad_sample"] = "skip"
    folder = tmp_path / "study"

    study(write_recipe(tmp_path, recipe), output=folder)
    first_runs = run_folders(folder)
    assert len(read_left_out(folder)["align"]) == 0

    samples[0]["conversations"][1]["value"] = "1"
    write_samples(tmp_path, samples)
    study(write_recipe(tmp_path, recipe), output=folder)
    runs_on_other_words = run_folders(folder)
    assert len(read_left_out(folder)["align"]) == 0
    assert not first_runs & runs_on_other_words

    # `token_concat` appends tokens of early layers, so that the longest sample no longer fits.
    longer = {"name": "long", "layers": [1, 3], "fusion": {"name": "token_concat"}}
    recipe["arms"].append(longer)
    study(write_recipe(tmp_path, recipe), output=folder)
    runs_without_the_longest = run_folders(folder)
    assert len(read_left_out(folder)["align"]) == 1
    assert len(runs_without_the_longest) == 3
    assert not runs_without_the_longest & runs_on_other_words


def test_another_process_must_have_the_same_samples(recipe: dict[str, Any], tmp_path: Path) -> None:
    """A worker on another machine, whose copy of the data is not the same, must not train."""
    folder = tmp_path / "study"
    study(write_recipe(tmp_path, recipe), output=folder)
    run = read_results(folder)[0]["folder"]
    result_file = folder / run / "result.json"
    # As if the run had not been done yet.
    result_file.unlink()

    run_one(folder, run, [])

    assert result_file.exists()
    text = (tmp_path / "data.json").read_text()
    other_answers = text.replace('"value": "1"', '"value": "2"')
    (tmp_path / "data.json").write_text(other_answers)
    with pytest.raises(LayerfuseError, match="this process has other data files"):
        run_one(folder, run, [])


def recipe_with_a_stage_named_evaluate(recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train on samples 0 to 4, of which 0 is bad; test on samples 5 to 7, of which 7 is bad."""
    samples = read_samples(folder)
    write_samples(folder, samples[:5], "train.json")
    write_samples(folder, samples[5:], "test.json")
    (folder / "0.png").unlink()
    (folder / "7.png").write_text("no picture")
    stage = {**recipe["stages"]["align"], "data": {"path": "train.json"}}
    test = {**recipe["evaluate"], "data": {"path": "test.json"}}
    return {
        **recipe,
        "stages": {"evaluate": stage},
        "evaluate": test,
        "on_bad_sample": "skip",
    }


@pytest.fixture
def trained_ids(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The ids of the samples that any training reads from now on."""
    ids: set[str] = set()

    class WatchedDataset(SampleDataset):
        def __getitem__(self, index: int) -> Sample:
            sample = super().__getitem__(index)
            ids.add(sample.id)
            return sample

    monkeypatch.setattr("layerfuse.train.arm.SampleDataset", WatchedDataset)
    return ids


def test_a_stage_named_evaluate_trains_on_its_own_data(
    recipe: dict[str, Any],
    tmp_path: Path,
    trained_ids: set[str],
) -> None:
    """It has the name of the test, whose pictures and answers it never meets."""
    recipe = recipe_with_a_stage_named_evaluate(recipe, tmp_path)
    folder = tmp_path / "study"
    screen = io.StringIO()

    study(
        write_recipe(tmp_path, recipe),
        output=folder,
        console=Console(file=screen, width=200),
    )

    assert trained_ids == {"1", "2", "3", "4"}
    bad_ids = {}
    for label, bad_samples in read_left_out(folder).items():
        bad_ids[label] = [sample_id for sample_id, _ in bad_samples.values()]
    assert bad_ids == {"evaluate": ["0"], "evaluate (test)": ["7"]}

    # How far each phase is, by its name and its number of steps or questions.
    phases = []
    for line in screen.getvalue().splitlines():
        phases.append(line.split("one · seed 0: ")[-1])
    assert "evaluate (2)" in phases
    assert "evaluate (test) (4)" in phases

    result = read_results(folder)[0]
    assert list(result["seconds"]) == ["evaluate", "evaluate (test)"]
    # Curves are of training alone: the test has none.
    steps = [step for step, _ in result["losses"]["evaluate"]]
    assert steps == [1, 2]
    predictions = folder / result["folder"] / "predictions.jsonl"
    tested_ids = [answer["sample"] for answer in read_lines(predictions)]
    assert tested_ids == ["5", "6"]

    # Another process reads from files which samples belong to which of the two.
    trained_ids.clear()
    expected = predictions.read_text()
    (folder / result["folder"] / "result.json").unlink()
    run_one(folder, result["folder"], [])
    assert trained_ids == {"1", "2", "3", "4"}
    assert predictions.read_text() == expected


def test_a_sample_that_moves_into_the_test_makes_other_runs(tmp_path: Path) -> None:
    records = []
    for number in range(4):
        # Without ids of their own, samples are named by their place, which differs after the move.
        records.append({"id": str(number), "question": "?", "answer": str(number)})
    convert = partial(from_columns, reading=Reading(tmp_path))

    def digest_of_split(train_samples: int) -> str:
        # The stage has the name of the test: only the border between the two tells them apart.
        train = Samples(records[:train_samples], convert)
        test = Samples(records[train_samples:], convert)
        return SampleSets({"evaluate": train}, test).digest({})

    assert digest_of_split(2) != digest_of_split(3)
