"""Many runs at once on this machine: the results of one after another, apart, and never orphans."""

import io
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from layerfuse.errors import LayerfuseError
from layerfuse.study.coordinate import study
from tests.processes import start
from tests.studies import comparable_results, read_results, times_of_results, write_recipe

TWO_AT_ONCE = "resources.arms_at_once=2"
ROOT = Path(__file__).parent.parent
# A module that workers import, as they do those of a user's own strategies: the run of the arm
# `one` with seed 0 ends in its first step.
TROUBLE = """
import os
import shutil
import signal
import sys

from layerfuse.errors import LayerfuseError
from layerfuse.train.trainer import FusionTrainer

training_step = FusionTrainer.training_step
REPLIES = [int(word.split("=")[1]) for word in sys.argv if word.startswith("--replies=")]


def step_or_end(self, *args, **kwargs):
    if "one.seed0" in str(self.args.output_dir):
        END
    return training_step(self, *args, **kwargs)


FusionTrainer.training_step = step_or_end
"""
DIE = "os.kill(os.getpid(), signal.SIGKILL)"
WRITE_HALF_A_REPLY = 'os.write(REPLIES[0], b"{"); os.kill(os.getpid(), signal.SIGKILL)'
ADVISE = 'raise LayerfuseError("lower the learning rates")'


@pytest.fixture
def four_runs(recipe: dict[str, Any]) -> dict[str, Any]:
    """Two arms with two seeds each: a worker does more than one run."""
    recipe["seeds"] = [0, 1]
    return recipe


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """This process computes as on a machine of so many cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """What is done in this process is done as in a worker."""
    with torch_threads(1):
        yield


@pytest.fixture
def two_threads() -> Iterator[None]:
    """As on a machine of two cores."""
    with torch_threads(2):
        yield


def make_trouble(folder: Path, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let workers find a module `trouble` in this folder."""
    (folder / "trouble.py").write_text(TROUBLE.replace("END", end))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(ROOT / "src")]))


def run_name(result: dict[str, Any]) -> str:
    return f"{result['arm']} · seed {result['seed']}"


def test_runs_side_by_side_are_those_of_one_after_another(
    four_runs: dict[str, Any],
    tmp_path: Path,
    one_thread: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the last bit, whichever worker did a run and whatever it did before. A worker that dies
    costs its own run, and that only until the study is continued."""
    path = write_recipe(tmp_path, four_runs)
    expected = tmp_path / "one_by_one"
    study(path, output=expected)
    make_trouble(tmp_path, DIE, monkeypatch)
    folder = tmp_path / "side_by_side"
    screen = io.StringIO()

    with pytest.raises(RuntimeError, match="1 of 4 runs failed") as failure:
        study(
            path,
            (TWO_AT_ONCE,),
            output=folder,
            modules=["trouble"],
            console=Console(file=screen, width=200),
        )

    assert "one · seed 0: its process was killed" in str(failure.value)
    shown = screen.getvalue()
    assert "2 runs at once with 1 thread each" in shown
    assert "one · seed 0: failed: its process was killed" in shown
    finished = read_results(folder)
    assert len(finished) == 3
    for result in finished:
        # The progress of each is shown, and each has a log of its own.
        assert f"{run_name(result)}: align (2)" in shown
        assert f"{run_name(result)}: evaluate (16)" in shown
        assert (folder / result["folder"] / "log.txt").exists()
    surroundings = json.loads((folder / "environment.json").read_text())
    assert surroundings["arms at once"] == "2"
    assert surroundings["cpu threads"] == "1"

    written = times_of_results(folder)
    study(path, output=folder)

    for result_file, time_written in written.items():
        assert times_of_results(folder)[result_file] == time_written
    assert comparable_results(folder) == comparable_results(expected)
    for result in read_results(expected):
        answers = Path(result["folder"]) / "predictions.jsonl"
        assert (folder / answers).read_bytes() == (expected / answers).read_bytes()


def test_the_last_run_of_several_has_the_threads_of_the_others(
    four_runs: dict[str, Any], tmp_path: Path, two_threads: None
) -> None:
    """Other numbers of threads add up in another order."""
    path = write_recipe(tmp_path, four_runs)
    folder = tmp_path / "study"
    study(path, (TWO_AT_ONCE,), output=folder)
    expected = comparable_results(folder)
    last = folder / read_results(folder)[-1]["folder"]
    shutil.rmtree(last)

    study(path, (TWO_AT_ONCE,), output=folder)

    # Done by a worker, not by this process.
    assert (last / "log.txt").exists()
    assert json.loads((folder / "environment.json").read_text())["cpu threads"] == "1"
    assert comparable_results(folder) == expected


@pytest.mark.slow
def test_a_worker_that_dies_within_a_reply_costs_its_own_run(
    four_runs: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Half a reply is none: the study would end in it, or wait for it for ever."""
    make_trouble(tmp_path, WRITE_HALF_A_REPLY, monkeypatch)
    path = write_recipe(tmp_path, four_runs)
    folder = tmp_path / "study"

    with pytest.raises(RuntimeError, match="1 of 4 runs failed"):
        study(path, (TWO_AT_ONCE,), output=folder, modules=["trouble"])

    assert len(read_results(folder)) == 3


@pytest.mark.slow
def test_a_run_that_the_user_can_mend_is_named_and_stops_no_other(
    four_runs: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_trouble(tmp_path, ADVISE, monkeypatch)
    path = write_recipe(tmp_path, four_runs)
    folder = tmp_path / "study"

    message = "1 of 4 runs failed. one · seed 0: lower the learning rates"
    with pytest.raises(LayerfuseError, match=message):
        study(path, (TWO_AT_ONCE,), output=folder, modules=["trouble"])

    assert len(read_results(folder)) == 3
    (log,) = folder.glob("arms/one.seed0.*/log.txt")
    assert "Traceback" in log.read_text()


def workers_of(folder: Path) -> list[int]:
    """The processes that work on a study in a folder, by their numbers."""
    listed = subprocess.run(["ps", "-ww", "-eo", "pid,args"], capture_output=True, text=True).stdout
    numbers = []
    for line in listed.splitlines():
        if "layerfuse.study.worker" in line and str(folder) in line:
            numbers.append(int(line.split()[0]))
    return numbers


def wait_for_training(folder: Path, runs: int) -> None:
    """Wait until so many runs have saved a checkpoint, two minutes at most."""
    for _ in range(1200):
        saved = list(folder.glob("arms/*/stages/*/checkpoint-*/complete"))
        if len(saved) >= runs:
            return
        time.sleep(0.1)
    raise TimeoutError(f"no training in {folder}")


def wait_for_the_end_of_workers(folder: Path) -> None:
    """Wait until no process works on a study, ten seconds at most."""
    for _ in range(100):
        if not workers_of(folder):
            return
        time.sleep(0.1)
    raise TimeoutError(f"still there: {workers_of(folder)}")


def study_two_at_once(recipe: Path, folder: Path) -> None:
    """Run in a process of its own, which is stopped."""
    study(recipe, (TWO_AT_ONCE,), output=folder)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_the_study_which_then_continues(
    recipe: dict[str, Any],
    tmp_path: Path,
    one_thread: None,
    how: signal.Signals,
) -> None:
    """Left alone, they would train on, and write into the folder of the continued study."""
    # Some seconds, so that they are in the middle of it.
    recipe["stages"]["align"]["steps"] = 200
    recipe["stages"]["align"]["checkpoint_steps"] = 5
    path = write_recipe(tmp_path, recipe)
    study(path, output=tmp_path / "whole")
    folder = tmp_path / "stopped"
    process = start(study_two_at_once, path, folder)
    wait_for_training(folder, runs=2)
    assert len(workers_of(folder)) == 2
    assert process.pid is not None

    os.kill(process.pid, how)
    process.join()

    assert process.exitcode != 0
    wait_for_the_end_of_workers(folder)
    assert not (folder / "report.html").exists()
    study(path, (TWO_AT_ONCE,), output=folder)
    assert comparable_results(folder) == comparable_results(tmp_path / "whole")
