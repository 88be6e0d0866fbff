"""How a machine is divided among runs that are done at once."""

from pathlib import Path
from typing import Any

import pytest
import torch

from layerfuse.errors import LayerfuseError
from layerfuse.fusion import FUSIONS
from layerfuse.model.config import FusionConfig
from layerfuse.recipe.reader import load_recipe
from layerfuse.recipe.schema import Recipe
from layerfuse.study.check import check_arms
from layerfuse.study.side_by_side import MachineShare, run_bytes, shares
from tests.studies import write_recipe

TOKENS = {"align": [30, 42, 42, 42]}
"""lengths of the samples of the only stage"""
PLACE = "layerfuse.study.side_by_side"


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of its own, with more memory than these tests need."""
    monkeypatch.setattr(f"{PLACE}.free_memory", lambda: 10**12)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)


def checked(
    recipe: dict[str, Any], folder: Path, **resources: Any
) -> tuple[Recipe, list[FusionConfig]]:
    """A recipe with these resources, and the configurations of its arms."""
    recipe["resources"] = resources
    loaded = load_recipe(write_recipe(folder, recipe))
    return loaded, check_arms(loaded)


def divided(
    recipe: dict[str, Any],
    folder: Path,
    num_runs: int,
    **resources: Any,
) -> list[MachineShare]:
    loaded, configs = checked(recipe, folder, **resources)
    return shares(loaded, configs, TOKENS, num_runs=num_runs)


@pytest.mark.usefixtures("eight_cores")
@pytest.mark.parametrize(
    ("num_runs", "resources", "at_once", "threads"),
    [
        (20, {}, 8, 1),
        (3, {}, 3, 2),
        (1, {}, 1, 8),
        (0, {}, 1, 8),
        (20, {"arms_at_once": 2}, 2, 4),
        (20, {"arms_at_once": 1}, 1, 8),
        (20, {"processes": 2}, 1, 8),
    ],
)
def test_cores_are_shared_by_as_many_runs_as_there_are(
    recipe: dict[str, Any],
    tmp_path: Path,
    num_runs: int,
    resources: dict[str, Any],
    at_once: int,
    threads: int,
) -> None:
    assert divided(recipe, tmp_path, num_runs, **resources) == [MachineShare(threads)] * at_once


@pytest.mark.usefixtures("eight_cores")
def test_runs_at_once_must_fit_into_the_memory_that_is_free(
    recipe: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded, configs = checked(recipe, tmp_path)
    needed = run_bytes(loaded, configs, TOKENS)

    monkeypatch.setattr(f"{PLACE}.free_memory", lambda: 3 * needed)
    assert len(divided(recipe, tmp_path, 20)) == 3

    monkeypatch.setattr(f"{PLACE}.free_memory", lambda: needed // 2)
    # One is always tried: it may need less than is estimated.
    assert len(divided(recipe, tmp_path, 20)) == 1
    # Who gives a number knows better.
    assert len(divided(recipe, tmp_path, 20, arms_at_once=4)) == 4


def test_more_that_trains_and_longer_batches_need_more_memory(
    recipe: dict[str, Any],
    tmp_path: Path,
) -> None:
    loaded, configs = checked(recipe, tmp_path)
    frozen = run_bytes(loaded, configs, TOKENS)
    longer = run_bytes(loaded, configs, {"align": [420] * 4})
    rates = {"fusion": 1e-3, "llm": 1e-3}
    recipe["stages"]["align"]["learning_rates"] = rates
    whole_llm = run_bytes(*checked(recipe, tmp_path), TOKENS)
    # The projector is in the fusion already.
    rates["projector"] = 1e-2
    assert run_bytes(*checked(recipe, tmp_path), TOKENS) == whole_llm
    recipe["stages"]["align"]["lora"] = {"r": 2}
    adapters = run_bytes(*checked(recipe, tmp_path), TOKENS)

    assert frozen < adapters < whole_llm
    assert frozen < longer


@pytest.mark.usefixtures("eight_cores")
def test_each_gpu_that_is_visible_gets_a_run(
    recipe: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded, configs = checked(recipe, tmp_path)
    monkeypatch.setattr(f"{PLACE}.device", lambda: torch.device("cuda"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")

    of_gpus = shares(loaded, configs, TOKENS, num_runs=20)

    assert of_gpus == [MachineShare(4, "2"), MachineShare(4, "5")]
    variables = of_gpus[1].environment()
    assert variables["CUDA_VISIBLE_DEVICES"] == "5"
    assert variables["OMP_NUM_THREADS"] == "4"


def test_small_steps_are_made_faster_unless_the_user_decides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    capacity = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.delenv(capacity, raising=False)
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    variables = MachineShare(1).environment()
    assert int(variables[capacity]) > 2000
    assert int(variables["MALLOC_TRIM_THRESHOLD_"]) >= 2**30
    monkeypatch.setenv(capacity, "64")
    assert MachineShare(1).environment()[capacity] == "64"


@pytest.mark.usefixtures("eight_cores")
def test_strategies_that_only_this_process_knows_are_not_sent_to_others(
    recipe: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded, configs = checked(recipe, tmp_path)
    for config in configs:
        _, strategy = FUSIONS[config.strategy.name]
        # As if it had been registered by a script of the user.
        monkeypatch.setattr(strategy, "__module__", "my_fusion")

    assert len(shares(loaded, configs, TOKENS, num_runs=20)) == 1
    # Processes that import the script know them too.
    assert len(shares(loaded, configs, TOKENS, num_runs=20, modules=["my_fusion"])) == 8


def test_arms_of_several_processes_are_not_done_at_once(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(LayerfuseError, match=r"arms_at_once 2 and processes 2.*set one"):
        checked(recipe, tmp_path, arms_at_once=2, processes=2)
