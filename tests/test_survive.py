"""A study that is killed at random moments, or fills the disk, ends as an undisturbed one does."""

import bisect
import json
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
from rich.console import Console
from safetensors.torch import load_file

from layerfuse.study.coordinate import study
from layerfuse.study.progress_table import LiveTable
from tests.processes import start
from tests.studies import comparable_results, read_results, write_recipe


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
            # SIGKILL, as the kernel sends it when memory runs out: nothing can be tidied up.
            kill = partial(os.kill, os.getpid(), signal.SIGKILL)
            timer = threading.Timer(self.moment.seconds, kill)
            # A study that is done before its moment need not wait for it.
            timer.daemon = True
            timer.start()
        self.times.append(time.perf_counter())

    def step(self, phase: str, done: int, total: int, note: str = "", run: str = "") -> None:
        """In the place of the table's."""
        self.file.write_text(f"{run} {phase} {done}/{total}")
        self.tick()


def study_watched(
    recipe: Path,
    folder: Path,
    moment: Moment | None,
    largest_file: int | None,
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
        # A write beyond the limit fails as one on a full disk does.
        limits = (largest_file, largest_file)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    clock = Clock(folder.with_suffix(".last_report"), moment)
    LiveTable.step = clock.step  # type: ignore[method-assign]
    with open(os.devnull, "w") as nowhere:
        study(recipe, output=folder, console=Console(file=nowhere))
    clock.tick()
    folder.with_suffix(".times").write_text(json.dumps(clock.times))


def end_of(
    recipe: Path,
    folder: Path,
    moment: Moment | None = None,
    largest_file: int | None = None,
) -> int:
    """The exit code of a process with a watched study: -9 if it was killed."""
    process = start(study_watched, recipe, folder, moment, largest_file)
    process.join()
    last_report = folder.with_suffix(".last_report").read_text()
    # pytest shows this if the test fails: it says where the kill has hit.
    print(folder.name, process.exitcode, last_report)
    assert process.exitcode is not None
    return process.exitcode


def random_moment(draw: random.Random, times: list[float], share: float) -> Moment:
    """A moment in the first part of an undisturbed study.

    Args:
        draw: the source of random numbers.
        times: of the undisturbed study's reports, in seconds, the first at its start.
        share: of the whole time, 0..1, from which the moment is drawn.
    """
    duration = times[-1] - times[0]
    at = times[0] + draw.uniform(0, share) * duration
    last_report = bisect.bisect(times, at) - 1
    return Moment(last_report, at - times[last_report])


def assert_same_studies(study_a: Path, study_b: Path) -> None:
    """Results, predictions and trained weights are equal to the last bit."""
    assert comparable_results(study_a) == comparable_results(study_b)
    for result in read_results(study_a):
        run_a = study_a / result["folder"]
        run_b = study_b / result["folder"]
        predictions_a = (run_a / "predictions.jsonl").read_bytes()
        predictions_b = (run_b / "predictions.jsonl").read_bytes()
        assert predictions_a == predictions_b

        weights_a = load_file(run_a / "model" / "model.safetensors")
        weights_b = load_file(run_b / "model" / "model.safetensors")
        assert weights_a.keys() == weights_b.keys()
        for name, weight in weights_a.items():
            assert torch.equal(weight, weights_b[name]), name


@pytest.fixture
def two_stages(recipe: dict[str, Any], tmp_path: Path) -> Path:
    """The file of a recipe whose runs save checkpoints in both of their stages, LoRA in one."""
    align = {
        **recipe["stages"]["align"],
        "steps": 6,
        "checkpoint_steps": 2,
    }
    finetune = {
        **align,
        "learning_rates": {"fusion": 1e-3, "llm": 1e-3},
        "lora": {"r": 2},
        "checkpoint_steps": 1,
    }
    recipe["stages"] = {"align": align, "finetune": finetune}
    # The weights of every run are compared.
    recipe["keep_models"] = "all"
    return write_recipe(tmp_path, recipe)


@pytest.mark.parametrize(
    ("seed", "rounds"),
    [
        (12, 2),
        pytest.param(1, 20, marks=pytest.mark.slow),
    ],
)
def test_killed_at_random_moments_and_started_again(
    two_stages: Path,
    tmp_path: Path,
    seed: int,
    rounds: int,
) -> None:
    """Each study is killed twice, then gets through; another one begins on a full disk."""
    whole = tmp_path / "whole"
    full = tmp_path / "full"
    assert end_of(two_stages, whole) == 0
    # Too small for a checkpoint: the study fails, and goes on when there is space again.
    assert end_of(two_stages, full, largest_file=30_000) == 1
    assert end_of(two_stages, full) == 0
    assert_same_studies(whole, full)

    times = json.loads(whole.with_suffix(".times").read_text())
    draw = random.Random(seed)
    exit_codes = []
    for number in range(rounds):
        folder = tmp_path / f"killed{number}"
        first_moment = random_moment(draw, times, share=1)
        # The second one has less to do, and may be through before its moment.
        second_moment = random_moment(draw, times, share=0.5)
        exit_codes.append(end_of(two_stages, folder, first_moment))
        exit_codes.append(end_of(two_stages, folder, second_moment))
        assert end_of(two_stages, folder) == 0
        assert_same_studies(whole, folder)
        assert not list(folder.rglob("*.tmp"))
    # Otherwise the moments would lie where nothing is left to disturb.
    assert exit_codes.count(-signal.SIGKILL) > rounds
