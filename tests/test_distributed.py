"""Several processes are one: data parallel, FSDP2, DeepSpeed, and many arms at once with Ray."""

import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from layerfuse.errors import LayerfuseError
from layerfuse.recipe.reader import load_recipe
from layerfuse.study import execute
from layerfuse.study.coordinate import study
from layerfuse.study.plan import PlannedRun, runs
from tests.studies import (
    comparable_results,
    read_results,
    read_samples,
    write_recipe,
    write_samples,
)

ROOT = Path(__file__).parent.parent
FSDP2_CONFIG = ROOT / "src/layerfuse/study/accelerate/fsdp2.yaml"
TWO_PROCESSES = "resources.processes=2"
# Processes add up the gradients of their shares in another order than one process does.
TOLERANCE = 1e-4


NEEDS_DEEPSPEED = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)
ZERO_STAGES = [pytest.param(stage, marks=NEEDS_DEEPSPEED) for stage in ("zero2", "zero3")]


def share_by_deepspeed(zero_stage: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The setting that lets processes share a model by DeepSpeed, on what this machine has."""
    if not torch.cuda.is_available():
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    return f"resources.accelerate={zero_stage}"


def make_half_text(folder: Path) -> None:
    """Take the picture out of every second sample; lengths differ, so that batches are padded."""
    samples = read_samples(folder)
    for number, sample in enumerate(samples):
        question = sample["conversations"][0]
        question["value"] = "<image> n?" + " n" * (number % 3)
        if number % 2 == 1:
            del sample["image"]
            question["value"] = f"What is {number}?"
    write_samples(folder, samples)


@pytest.fixture
def mixed(recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A study of one arm in two stages on samples of which half are text alone, two in a batch: at
    most steps one process of two sees no picture, at some neither does."""
    make_half_text(tmp_path)
    rates = {"fusion": 1e-3, "llm": 1e-3}
    align = {
        "data": {"path": "data.json"},
        "batch_size": 2,
        # Samples of a similar length would put all texts into batches of their own.
        "group_by": "none",
        "learning_rates": rates,
        "steps": 8,
        "activation_checkpointing": True,
    }
    # Six steps of two are an epoch and a half of eight: the crops differ from epoch to epoch.
    finetune = {
        "data": {"path": "data.json"},
        "batch_size": 2,
        "group_by": "none",
        "learning_rates": rates,
        "steps": 6,
        "lora": {"r": 2},
        "random_crop": 0.7,
    }
    arm = {"name": "one", "layers": [1, 3], "fusion": {"name": "inject_cross"}}
    return {
        **recipe,
        "arms": [arm],
        "baseline": "one",
        "stages": {"align": align, "finetune": finetune},
        # The trained weights are compared.
        "keep_models": "all",
    }


def losses_of(curve: list[tuple[int, float]]) -> list[float]:
    """The losses of a curve of (step, loss)."""
    return [loss for _, loss in curve]


def assert_same(study_a: Path, study_b: Path) -> None:
    """Losses of every step and all trained weights are the same up to rounding."""
    results_a = read_results(study_a)
    results_b = read_results(study_b)
    for result_a, result_b in zip(results_a, results_b, strict=True):
        assert result_a["losses"].keys() == result_b["losses"].keys()
        for stage, curve in result_a["losses"].items():
            losses_a = losses_of(curve)
            losses_b = losses_of(result_b["losses"][stage])
            assert losses_a == pytest.approx(losses_b, abs=TOLERANCE), stage

        weights_a = load_file(study_a / result_a["folder"] / "model/model.safetensors")
        weights_b = load_file(study_b / result_b["folder"] / "model/model.safetensors")
        assert weights_a.keys() == weights_b.keys()
        for name, weight in weights_a.items():
            difference = (weight - weights_b[name]).abs().max()
            assert float(difference) < TOLERANCE, name


def test_two_processes_are_one(mixed: dict[str, Any], tmp_path: Path) -> None:
    # Answered along training by the first process, while the other one waits.
    mixed["evaluate"]["validation"] = {"path": "data.json"}
    path = write_recipe(tmp_path, mixed)
    study(path, output=tmp_path / "one")

    study(path, (TWO_PROCESSES,), output=tmp_path / "two")

    assert_same(tmp_path / "one", tmp_path / "two")
    (one,) = read_results(tmp_path / "one")
    (two,) = read_results(tmp_path / "two")
    assert len(one["along"]) == 4
    for point_of_one, point_of_two in zip(one["along"], two["along"], strict=True):
        assert point_of_two["samples"] == point_of_one["samples"]
        assert point_of_two["loss"] == pytest.approx(point_of_one["loss"], abs=TOLERANCE)


# A module that workers import, as they do those of a user's own strategies: the first of them that
# has done so many steps kills itself. The mark keeps all others, and its successor, alive.
KILLER = """
import os
import signal
from pathlib import Path

from layerfuse.train.trainer import FusionTrainer

training_step = FusionTrainer.training_step


def step_or_die(self, *args, **kwargs):
    mark = Path(os.environ["LAYERFUSE_HOME"]) / "died"
    if self.state.global_step == STEPS and not mark.exists():
        mark.write_text(str(self.args.output_dir))
        os.kill(os.getpid(), signal.SIGKILL)
    return training_step(self, *args, **kwargs)


FusionTrainer.training_step = step_or_die
"""


def let_one_process_die(after: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the processes that import a module `killer` find it."""
    (folder / "killer.py").write_text(KILLER.replace("STEPS", str(after)))
    # They are no children of this one, and find modules by this variable alone.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(ROOT)]))


@pytest.mark.slow
@pytest.mark.parametrize("sharing", ["none", *ZERO_STAGES])
def test_two_processes_that_are_stopped_in_their_second_epoch_are_one(
    mixed: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sharing: str,
) -> None:
    """Every epoch has an order of its own, and the one that is continued has the order that it
    had."""
    # An epoch is four steps of two.
    mixed["stages"]["align"]["checkpoint_steps"] = 1
    path = write_recipe(tmp_path, mixed)
    study(path, output=tmp_path / "one")
    settings = (TWO_PROCESSES,)
    if sharing != "none":
        settings = (TWO_PROCESSES, share_by_deepspeed(sharing, monkeypatch))
    let_one_process_die(5, tmp_path, monkeypatch)
    two = tmp_path / "two"
    with pytest.raises(RuntimeError, match=r"the processes of .* failed"):
        study(path, settings, output=two, modules=["killer"])
    assert list(two.glob("arms/*/stages/align/checkpoint-5/complete"))

    study(path, settings, output=two)

    assert_same(tmp_path / "one", two)


def prepare_only_run(prepared: Path, study_folder: Path) -> PlannedRun:
    """Make a second folder for a study of one run, as it is just before the run.

    Args:
        prepared: folder of the study that has done the run.
        study_folder: the new one.

    Returns:
        The run.
    """
    study_folder.mkdir()
    for file in prepared.iterdir():
        # The resolved recipe, the environment and what tells the samples and their features.
        if file.suffix in (".yaml", ".json"):
            (study_folder / file.name).write_bytes(file.read_bytes())
    environment = json.loads((study_folder / "environment.json").read_text())
    (run,) = runs(load_recipe(study_folder / "recipe.yaml"), environment["samples"])
    return run


def one_process_and_fsdp2(recipe: dict[str, Any], tmp_path: Path) -> list[str]:
    """Make a study of one run in one process, `one`, and in two under FSDP2, `two`.

    Returns:
        What was sharded, a line a stage.
    """
    path = write_recipe(tmp_path, recipe)
    one = tmp_path / "one"
    two = tmp_path / "two"
    sharding_file = tmp_path / "sharded"
    study(path, output=one)
    run = prepare_only_run(one, two)

    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes=2",
        # Any free port: other tests may run at the same time.
        "--main_process_port=0",
        f"--config_file={FSDP2_CONFIG}",
        "-m",
        "tests.fsdp_on_cpu",
        str(two),
        run.folder,
        str(sharding_file),
    ]
    launched = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert launched.returncode == 0, launched.stderr[-4000:]
    result = (two / run.folder / "result.json").read_text()
    (two / "results.jsonl").write_text(result + "\n")
    return sharding_file.read_text().splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("vision", [True, False])
def test_two_processes_under_fsdp2_are_one(
    mixed: dict[str, Any],
    tmp_path: Path,
    vision: bool,
) -> None:
    """A frozen encoder is not sharded: each process would wait for it at every batch. The second
    stage reads what the first has written, and computes attention as it did."""
    mixed["attn_implementation"] = "eager"
    if vision:
        align = mixed["stages"]["align"]
        align["learning_rates"] = {**align["learning_rates"], "vision": 1e-3}
    sharding = one_process_and_fsdp2(mixed, tmp_path)

    # A sharded parameter is a DTensor. The encoder trains in the first stage at most.
    encoder_in_align = "Parameter"
    if vision:
        encoder_in_align = "DTensor"
    assert sharding == [
        f"attention:eager fusion:DTensor language_model:DTensor vision_tower:{encoder_in_align}",
        "attention:eager fusion:DTensor language_model:DTensor vision_tower:Parameter",
    ]
    assert_same(tmp_path / "one", tmp_path / "two")


@pytest.fixture
def guided(mixed: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A study of a guided arm whose samples have one to three questions, a row each: a pass
    computes one row, and each process waits for the other one in every pass."""
    samples = read_samples(tmp_path)
    for number, sample in enumerate(samples):
        first = sample["conversations"]
        more = [{"from": "human", "value": "And now?"}, first[1]]
        sample["conversations"] = [*first, *more * (number % 3)]
    write_samples(tmp_path, samples)
    mixed["arms"][0]["fusion"] = {"name": "text_routed"}
    align = mixed["stages"]["align"]
    align["batch_size"] = 4
    align["device_batch_size"] = 1
    align["learning_rates"] = {**align["learning_rates"], "vision": 1e-3}
    return {**mixed, "stages": {"align": align}}


@pytest.mark.slow
def test_guided_rows_under_fsdp2_are_those_of_one_process(
    guided: dict[str, Any], tmp_path: Path
) -> None:
    """Every pass needs a picture for the encoder that trains."""
    one_process_and_fsdp2(guided, tmp_path)

    assert_same(tmp_path / "one", tmp_path / "two")


def one_process_and_deepspeed(
    recipe: dict[str, Any], zero_stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Make a study in one process, `one`, and in two under DeepSpeed, `two`."""
    path = write_recipe(tmp_path, recipe)
    study(path, output=tmp_path / "one")
    settings = (TWO_PROCESSES, share_by_deepspeed(zero_stage, monkeypatch))
    study(path, settings, output=tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", ZERO_STAGES)
def test_two_processes_under_deepspeed_are_one(
    mixed: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    zero_stage: str,
) -> None:
    one_process_and_deepspeed(mixed, zero_stage, tmp_path, monkeypatch)

    assert_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", ZERO_STAGES)
def test_guided_rows_under_deepspeed_are_those_of_one_process(
    guided: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    zero_stage: str,
) -> None:
    one_process_and_deepspeed(guided, zero_stage, tmp_path, monkeypatch)

    assert_same(tmp_path / "one", tmp_path / "two")


def commands_that_name(folder: Path) -> list[bytes]:
    """The command lines of the machine's processes that have this folder in them."""
    commands = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        # A process may end between being listed and being read.
        if file.exists():
            command = file.read_bytes()
            if str(folder).encode() in command:
                commands.append(command)
    return commands


def wait_for_training(folder: Path) -> None:
    """Wait until a run of a study has reported progress, two minutes at most."""
    for _ in range(120):
        if list(folder.glob("arms/*/progress")):
            return
        time.sleep(1)


@pytest.mark.slow
def test_no_process_of_a_killed_study_trains_on(mixed: dict[str, Any], tmp_path: Path) -> None:
    """Left alone, they would hold their GPUs until somebody looks."""
    # More than it will do.
    mixed["stages"]["align"]["steps"] = 2000
    path = write_recipe(tmp_path, mixed)
    folder = tmp_path / "two"
    command = [
        sys.executable,
        "-m",
        "layerfuse_cli.app",
        "study",
        str(path),
        TWO_PROCESSES,
        "--output",
        str(folder),
    ]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    wait_for_training(folder)
    # The study itself and its two processes, at least: they have a launcher.
    assert len(commands_that_name(folder)) >= 3

    running.kill()
    running.wait()

    time.sleep(3)
    assert commands_that_name(folder) == []


def test_a_batch_that_cannot_be_split_is_one_clear_error(
    mixed: dict[str, Any],
    tmp_path: Path,
) -> None:
    mixed["stages"]["align"]["batch_size"] = 3
    path = write_recipe(tmp_path, mixed)

    with pytest.raises(ValueError, match="batch_size 3 cannot be split over 2 processes"):
        study(path, (TWO_PROCESSES,), output=tmp_path / "two")


@pytest.mark.slow
def test_fsdp_that_would_not_shard_is_one_clear_error(
    mixed: dict[str, Any],
    tmp_path: Path,
) -> None:
    path = write_recipe(tmp_path, mixed)
    settings = (TWO_PROCESSES, "resources.accelerate=fsdp2")

    with pytest.raises(LayerfuseError, match=r"FSDP needs GPUs: on CPU accelerate would train"):
        study(path, settings, output=tmp_path / "two")


def test_a_study_refuses_to_be_one_process_of_many(
    recipe: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Started by `torchrun`, each process would do the whole study in the same folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")

    with pytest.raises(ValueError, match=r"with `resources\.processes=N`"):
        study(write_recipe(tmp_path, recipe), output=tmp_path / "study")


@pytest.mark.slow
def test_ray_gives_the_same_results_and_survives_a_dead_worker(
    recipe: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two arms are added to a study that has one: they run side by side, one of their workers is
    killed in its fourth step, and the first arm is not run again."""
    align = recipe["stages"]["align"]
    align["steps"] = 5
    align["checkpoint_steps"] = 1
    third = {"name": "three", "layers": [2], "fusion": {"name": "single"}}
    all_arms = [*recipe["arms"], third]
    local = tmp_path / "local"
    ray = tmp_path / "ray"
    recipe["arms"] = all_arms[:1]
    study(write_recipe(tmp_path, recipe), output=ray)
    (first_result,) = ray.glob("arms/*/result.json")
    first_written = first_result.stat().st_mtime_ns
    recipe["arms"] = all_arms
    path = write_recipe(tmp_path, recipe)
    study(path, output=local)

    # Otherwise Ray looks for a token in the user's home.
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    let_one_process_die(3, tmp_path, monkeypatch)
    study(path, output=ray, engine="ray", modules=["killer"])

    assert (tmp_path / "home" / "died").exists()
    assert first_result.stat().st_mtime_ns == first_written
    assert len(read_results(ray)) == 3
    assert comparable_results(ray) == comparable_results(local)


def launch_failing_process(
    recipe: dict[str, Any],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    advice: str | None,
) -> None:
    """Launch a run of two processes that fails, and write what its processes would.

    Args:
        recipe: the recipe.
        folder: of the study.
        monkeypatch: replaces the processes.
        advice: what the user can do about it; None for a bug.
    """

    def fail(command: list[str], stdout: Any, **_: Any) -> subprocess.CompletedProcess[bytes]:
        stdout.write("KeyError: 'a bug'")
        if advice is not None:
            (folder / "run" / execute.USER_ERROR).write_text(advice)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(subprocess, "run", fail)
    loaded = load_recipe(write_recipe(folder, recipe))
    execute.launch(loaded, folder, "run", [])


def test_a_failed_process_with_advice_is_a_message_for_the_user(
    recipe: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(LayerfuseError, match=r"^lower the learning rates$"):
        launch_failing_process(recipe, tmp_path, monkeypatch, advice="lower the learning rates")


def test_a_failed_process_without_advice_is_a_bug_with_its_log(
    recipe: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        launch_failing_process(recipe, tmp_path, monkeypatch, advice=None)
