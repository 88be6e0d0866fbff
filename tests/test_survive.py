"""A study that is killed at random moments, or fills the disk, ends as an undisturbed one does; bad
samples are left out by name, or stop it."""

import bisect
import json
import math
import os
import random
import resource
import signal
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

from layerfuse.cli import app
from layerfuse.study.coordinate import study
from layerfuse.study.progress_table import LiveTable
from tests.processes import start
from tests.test_study import comparable, lines, write


@dataclass(frozen=True)
class Moment:
    """So many seconds after so many reports of progress: a machine that became slower or faster
    since this was measured reaches it all the same."""

    reports: int
    seconds: float


class Clock:
    """Counts the reports of progress of a study, notes their times, and kills at a moment.

    Args:
        file: gets the last report.
        moment: of the kill; None to be left alone.
    """

    def __init__(self, file: Path, moment: Moment | None = None) -> None:
        self.file = file
        self.moment = moment
        self.times: list[float] = []
        file.write_text("nothing yet")
        self.tick()

    def tick(self) -> None:
        """Note the time; start the timer of the kill if its count is reached."""
        if self.moment is not None and len(self.times) == self.moment.reports:
            kill = partial(os.kill, os.getpid(), signal.SIGKILL)
            timer = threading.Timer(self.moment.seconds, kill)
            timer.daemon = True
            timer.start()
        self.times.append(time.perf_counter())

    def step(self, phase: str, done: int, total: int, note: str = "", run: str = "") -> None:
        """In the place of the table's."""
        self.file.write_text(f"{run} {phase} {done}/{total}")
        self.tick()


def study_watched(
    recipe: Path, folder: Path, moment: Moment | None, largest_file: int | None
) -> None:
    """A study with a cache of its own; its reports' times are in a file beside it.

    Args:
        recipe: the recipe's file.
        folder: of the study.
        moment: when this process is killed; None to be left alone.
        largest_file: bytes; None for no limit.
    """
    os.environ["LAYERFUSE_HOME"] = str(folder.with_suffix(".home"))
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    clock = Clock(folder.with_suffix(".last_report"), moment)
    LiveTable.step = clock.step  # type: ignore[method-assign]
    with open(os.devnull, "w") as nowhere:
        study(recipe, output=folder, console=Console(file=nowhere))
    clock.tick()
    folder.with_suffix(".times").write_text(json.dumps(clock.times))


def end_of(
    recipe: Path, folder: Path, moment: Moment | None = None, largest_file: int | None = None
) -> int:
    """The exit code of a process with a watched study: -9 if it was killed."""
    process = start(study_watched, recipe, folder, moment, largest_file)
    process.join()
    last_report = folder.with_suffix(".last_report").read_text()
    print(folder.name, process.exitcode, last_report)  # pytest shows it if the test fails
    assert process.exitcode is not None
    return process.exitcode


def assert_same_studies(one: Path, other: Path) -> None:
    """Results, predictions and trained weights are equal to the last bit."""
    assert comparable(one / "results.jsonl") == comparable(other / "results.jsonl")
    for result in lines(one / "results.jsonl"):
        runs = [folder / result["folder"] for folder in (one, other)]
        predictions = [run / "predictions.jsonl" for run in runs]
        assert predictions[0].read_bytes() == predictions[1].read_bytes()
        weights, others = (load_file(run / "model" / "model.safetensors") for run in runs)
        assert weights.keys() == others.keys()
        assert all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.mark.parametrize(("seed", "rounds"), [(12, 2), pytest.param(1, 20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_started_again(
    recipe: dict[str, Any], tmp_path: Path, seed: int, rounds: int
) -> None:
    """Each study is killed twice, then gets through; another one begins on a full disk."""
    stage = {**recipe["stages"]["align"], "steps": 6, "checkpoint_steps": 2}
    rates = {"learning_rates": {"fusion": 1e-3, "llm": 1e-3}, "lora": {"r": 2}}
    recipe["stages"] = {"align": stage, "finetune": {**stage, **rates, "checkpoint_steps": 1}}
    recipe["keep_models"] = "all"
    path = write(tmp_path, recipe)
    whole, full = tmp_path / "whole", tmp_path / "full"
    assert end_of(path, whole) == 0
    assert end_of(path, full, largest_file=30_000) == 1
    assert end_of(path, full) == 0
    assert_same_studies(whole, full)

    times = json.loads(whole.with_suffix(".times").read_text())
    draw = random.Random(seed)

    def moment(share: float) -> Moment:
        """A random one of the first part of the undisturbed study's time."""
        at = times[0] + draw.uniform(0, share) * (times[-1] - times[0])
        reports = bisect.bisect(times, at) - 1
        return Moment(reports, at - times[reports])

    ends = []
    for k in range(rounds):
        folder = tmp_path / f"killed{k}"
        # The second one has less to do, and may be through before its moment.
        ends += [end_of(path, folder, moment(1)), end_of(path, folder, moment(0.5))]
        assert end_of(path, folder) == 0
        assert_same_studies(whole, folder)
        assert not list(folder.rglob("*.tmp"))
    assert ends.count(-9) > rounds


@pytest.fixture
def damaged(recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A study whose eight samples hold five bad ones, each bad in its own way."""
    (tmp_path / "0.png").unlink()
    (tmp_path / "1.png").write_text("no picture")
    Image.effect_noise((40, 30), 60).convert("RGB").save(tmp_path / "2.png")
    whole = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(whole[: len(whole) // 2])
    records = json.loads((tmp_path / "data.json").read_text())
    records[3]["conversations"][0]["value"] = "<image> " + "long " * 3000
    records[4]["conversations"] = [{"from": "human", "value": "<image> n?"}]
    (tmp_path / "data.json").write_text(json.dumps(records))
    (tmp_path / "test.json").write_text(json.dumps(records[5:]))
    recipe["evaluate"]["data"] = {"path": "test.json"}
    recipe["stages"]["align"]["steps"] = 3
    return recipe


@pytest.mark.parametrize("cached", [True, False])
def test_bad_samples_are_left_out_by_name(
    damaged: dict[str, Any], tmp_path: Path, cached: bool
) -> None:
    settings = {**damaged, "on_bad_sample": "skip", "cache_features": cached}
    path = write(tmp_path, settings)
    found = CliRunner().invoke(app, ["study", str(path), "--output", str(tmp_path / "study")])
    assert found.exit_code == 0, found.output
    said = " ".join(found.output.split())
    assert "align: 5 bad samples are left out" in said
    left_out = json.loads((tmp_path / "study" / "left_out.json").read_text())
    reasons = dict(left_out["align"].values())
    expected = {
        "0": "no image file",
        "1": "cannot read the image",
        "2": "cannot read the image",
        "3": "no token is labelled",
        "4": "no answer to learn from",
    }
    assert sorted(reasons) == sorted(expected)
    assert all(text in reasons[name] for name, text in expected.items())
    for result in lines(tmp_path / "study" / "results.jsonl"):
        losses = [loss for _, loss in result["losses"]["align"]]
        assert len(losses) == 3
        assert all(math.isfinite(loss) and loss > 0 for loss in losses)


def test_bad_samples_stop_the_study_by_default(damaged: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path, damaged)
    found = CliRunner().invoke(app, ["study", str(path), "--output", str(tmp_path / "study")])
    assert found.exit_code == 2
    said = " ".join(found.output.split())
    assert "sample 0: no image file" in said
    assert "4 of 8 samples of align are bad" in said  # the fifth is found when it is decoded
    assert "`on_bad_sample: skip` leaves such samples out" in said
    assert not (tmp_path / "study").exists()


def test_no_usable_sample_is_an_error(damaged: dict[str, Any], tmp_path: Path) -> None:
    records = json.loads((tmp_path / "data.json").read_text())[:2]
    (tmp_path / "data.json").write_text(json.dumps(records))
    with pytest.raises(ValueError, match="no usable sample of align is left; the first: sample 0"):
        study(write(tmp_path, {**damaged, "on_bad_sample": "skip"}), output=tmp_path / "study")


def test_constants_are_measured_on_pictures_that_the_cache_lacks(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    """A first stage with random crops, a test on other pictures, a strategy with constants."""
    records = json.loads((tmp_path / "data.json").read_text())
    (tmp_path / "test.json").write_text(json.dumps(records[4:]))
    recipe["stages"]["align"] |= {"random_crop": 0.5, "data": {"path": "data.json", "limit": 4}}
    recipe["evaluate"]["data"] = {"path": "test.json"}
    recipe["arms"][1]["fusion"]["normalize"] = "standardize"
    study(write(tmp_path, recipe), output=tmp_path / "study")


@pytest.mark.parametrize("changes", [{"random_crop": 0.5}, {"learning_rates": {"vision": 1e-4}}])
def test_the_cache_is_off_where_it_would_be_wrong_and_says_so(
    recipe: dict[str, Any], tmp_path: Path, changes: dict[str, Any]
) -> None:
    recipe["stages"]["align"] |= changes
    path = write(tmp_path, recipe)
    found = CliRunner().invoke(app, ["study", str(path), "--output", str(tmp_path / "study")])
    assert found.exit_code == 0, found.output
    said = " ".join(found.output.split())
    assert "its pictures are encoded as they come, not from the cache" in said
    assert ("align crops pictures" in said) == ("random_crop" in changes)
    again = CliRunner().invoke(app, ["study", str(path), "--output", str(tmp_path / "again")])
    assert again.exit_code == 0
    assert comparable(tmp_path / "study" / "results.jsonl") == comparable(
        tmp_path / "again" / "results.jsonl"
    )


def test_an_unwritable_folder_is_one_clear_error(recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = write(tmp_path, recipe)
    output = str(tmp_path / "file" / "study")
    found = CliRunner().invoke(app, ["study", str(path), "--output", output])
    assert found.exit_code == 2
    assert "file/study" in "".join(found.output.split())
