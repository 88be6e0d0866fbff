"""Several processes are one: data parallel, FSDP2, and many arms at once with Ray."""

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
import yaml
from safetensors.torch import load_file

from layerfuse.errors import LayerfuseError
from layerfuse.recipe.reader import load_recipe
from layerfuse.study import execute
from layerfuse.study.coordinate import study
from layerfuse.study.plan import runs
from tests.test_study import comparable, lines, write

ROOT = Path(__file__).parent.parent


@pytest.fixture
def mixed(recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A study of one arm in two stages on samples of which half are text alone, two in a batch: at
    most steps one process of two sees no picture, at some neither does."""
    records = json.loads((tmp_path / "data.json").read_text())
    for k, record in enumerate(records):
        record["conversations"][0]["value"] = "<image> n?" + " n" * (k % 3)
        if k % 2:
            del record["image"]
            record["conversations"][0]["value"] = f"What is {k}?"
    (tmp_path / "data.json").write_text(json.dumps(records))
    stage = {"data": {"path": "data.json"}, "batch_size": 2, "group_by_length": False}
    rates = {"fusion": 1e-3, "llm": 1e-3}
    lora = {"lora": {"r": 2}, "learning_rates": rates, "steps": 6}
    recipe["stages"] = {
        "align": {**stage, "learning_rates": rates, "steps": 8, "activation_checkpointing": True},
        "finetune": {**stage, **lora},
    }
    recipe["stages"]["finetune"]["random_crop"] = 0.7  # for an epoch and a half
    recipe["arms"] = [{"name": "one", "layers": [1, 3], "fusion": {"name": "inject_cross"}}]
    return {**recipe, "baseline": "one", "keep_models": "all"}


def assert_same(one: Path, other: Path) -> None:
    for a, b in zip(lines(one / "results.jsonl"), lines(other / "results.jsonl"), strict=True):
        assert a["losses"].keys() == b["losses"].keys()
        for stage, curve in a["losses"].items():
            assert [loss for _, loss in curve] == pytest.approx(
                [loss for _, loss in b["losses"][stage]], abs=1e-4
            ), stage
        files = [f / r["folder"] / "model/model.safetensors" for f, r in ((one, a), (other, b))]
        weights = [load_file(file) for file in files]
        assert weights[0].keys() == weights[1].keys()
        for name, value in weights[0].items():
            assert float((value - weights[1][name]).abs().max()) < 1e-4, name


def test_two_processes_are_one(mixed: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path, mixed)
    study(path, output=tmp_path / "one")
    study(path, ("resources.processes=2",), output=tmp_path / "two")
    assert_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("vision", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_two_processes_under_fsdp2_are_one(
    mixed: dict[str, Any], tmp_path: Path, vision: bool
) -> None:
    if vision:
        rates = mixed["stages"]["align"]["learning_rates"]
        mixed["stages"]["align"]["learning_rates"] = {**rates, "vision": 1e-3}
    path = write(tmp_path, mixed)
    study(path, output=tmp_path / "one")
    two = tmp_path / "two"
    two.mkdir()
    for file in (tmp_path / "one").iterdir():
        if file.suffix in (".yaml", ".json"):
            (two / file.name).write_bytes(file.read_bytes())
    environment = json.loads((two / "environment.json").read_text())
    (run,) = runs(load_recipe(two / "recipe.yaml"), environment["samples"])
    config = ROOT / "src/layerfuse/study/accelerate/fsdp2.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=2"]
    command += ["--main_process_port=0", f"--config_file={config}", "-m", "tests.fsdp_on_cpu"]
    command += [str(two), run.folder, str(tmp_path / "sharded")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = ("DTensor" if vision else "Parameter", "Parameter")
    assert (tmp_path / "sharded").read_text().splitlines() == [
        f"fusion:DTensor language_model:DTensor vision_tower:{kind}" for kind in (first, second)
    ]
    result = (two / run.folder / "result.json").read_text()
    (two / "results.jsonl").write_text(result + "\n")
    assert_same(tmp_path / "one", two)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("how", ["zero2", "zero3"])
def test_two_processes_under_deepspeed_are_one(
    mixed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    path = write(tmp_path, mixed)
    study(path, output=tmp_path / "one")
    if not torch.cuda.is_available():
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    settings = ("resources.processes=2", f"resources.accelerate={how}")
    study(path, settings, output=tmp_path / "two")
    assert_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_no_process_of_a_killed_study_trains_on(mixed: dict[str, Any], tmp_path: Path) -> None:
    mixed["stages"]["align"]["steps"] = 2000
    path = write(tmp_path, mixed)
    command = [sys.executable, "-m", "layerfuse.cli", "study", str(path), "resources.processes=2"]
    running = subprocess.Popen(
        [*command, "--output", str(tmp_path / "two")], stdout=subprocess.DEVNULL
    )

    def training() -> list[str]:
        texts = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if p.exists()]
        return [str(text) for text in texts if str(tmp_path / "two").encode() in text]

    progress = tmp_path / "two" / "arms"
    for _ in range(120):
        if list(progress.glob("*/progress")):
            break
        time.sleep(1)
    assert len(training()) >= 3
    running.kill()
    running.wait()
    time.sleep(3)
    assert training() == []


def test_a_batch_that_cannot_be_split_is_one_clear_error(
    mixed: dict[str, Any], tmp_path: Path
) -> None:
    mixed["stages"]["align"]["batch_size"] = 3
    path = write(tmp_path, mixed)
    with pytest.raises(ValueError, match="batch_size 3 cannot be split over 2 processes"):
        study(path, ("resources.processes=2",), output=tmp_path / "two")


@pytest.mark.slow
def test_fsdp_that_would_not_shard_is_one_clear_error(
    mixed: dict[str, Any], tmp_path: Path
) -> None:
    path = write(tmp_path, mixed)
    settings = ("resources.processes=2", "resources.accelerate=fsdp2")
    with pytest.raises(LayerfuseError, match=r"FSDP needs GPUs: on CPU accelerate would train"):
        study(path, settings, output=tmp_path / "two")


def test_a_study_refuses_to_be_one_process_of_many(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"with `resources\.processes=N`"):
        study(write(tmp_path, recipe), output=tmp_path / "study")


KILLER = """
import os, signal
from pathlib import Path
from layerfuse.train.trainer import FusionTrainer
step = FusionTrainer.training_step
def dies_once(self, *args, **kwargs):
    mark = Path(os.environ["LAYERFUSE_HOME"]) / "died"
    if self.state.global_step == 3 and not mark.exists():
        mark.write_text(str(self.args.output_dir))
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)
FusionTrainer.training_step = dies_once
"""


def test_ray_gives_the_same_results_and_survives_a_dead_worker(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two arms are added to a study that has one: they run side by side, one of their workers is
    killed in its fourth step, and the first arm is not run again."""
    recipe["stages"]["align"] |= {"steps": 5, "checkpoint_steps": 1}
    arms = [*recipe["arms"], {"name": "three", "layers": [2], "fusion": {"name": "single"}}]
    local, ray = tmp_path / "local", tmp_path / "ray"
    study(write(tmp_path, {**recipe, "arms": arms[:1]}), output=ray)
    (first,) = ray.glob("arms/*/result.json")
    stamp = first.stat().st_mtime_ns
    path = write(tmp_path, {**recipe, "arms": arms})
    study(path, output=local)

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    (tmp_path / "killer.py").write_text(KILLER)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    study(path, output=ray, engine="ray", modules=["killer"])
    assert (tmp_path / "home" / "died").exists()
    assert first.stat().st_mtime_ns == stamp
    assert len(lines(ray / "results.jsonl")) == 3
    assert comparable(ray / "results.jsonl") == comparable(local / "results.jsonl")


@pytest.mark.parametrize("mendable", [False, True])
def test_a_failed_process_is_a_message_only_if_the_user_can_mend_it(
    mendable: bool, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    def fail(command: list[str], stdout: Any, **_: Any) -> subprocess.CompletedProcess[bytes]:
        stdout.write("KeyError: 'a bug'")
        if mendable:
            (tmp_path / "run" / execute.MENDABLE).write_text("lower the learning rates")
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(subprocess, "run", fail)
    expected: type[Exception] = RuntimeError
    message = "a bug"
    if mendable:
        expected = LayerfuseError
        message = "^lower the learning rates$"
    with pytest.raises(expected, match=message):
        execute.launch(load_recipe(tmp_path / "recipe.yaml"), tmp_path, "run", [])
