"""Shared fixtures. No test may reach a network, but for the ones that pull local models."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForCausalLM
from transformers.utils import logging

from layerfuse.local_models.registry import pull
from tests import tiny

logging.set_verbosity_error()
logging.disable_progress_bar()


# workers side by side share the cores
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else torch.get_num_threads()


# The longest tests, longest first.
LONG_TESTS = (
    "test_depth_profile_of_a_real_encoder",
    "test_ray_gives_the_same_results_and_survives_a_dead_worker",
    "test_killed_at_random_moments_and_started_again",
    "test_two_processes_are_one",
    "test_two_processes_under_fsdp2_are_one",
    "test_a_shrunken_quickstart_on_real_models",
    "test_python_snippets_of_the_readme_run",
    "test_every_strategy_runs_in_one_study",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests come first: at the end of a run no worker is left alone with one."""

    def rank(item: pytest.Item) -> int:
        name = item.name.split("[")[0]
        if name in LONG_TESTS:
            return LONG_TESTS.index(name)
        return len(LONG_TESTS)

    items.sort(key=rank)


def pytest_collection_finish() -> None:
    """Take what the imports left out of every later garbage collection.

    The modules of torch and transformers are about a million objects that live until the end. A
    full collection walks them for 0.3 s, and accelerate asks for one in every training: half of the
    time of a training of a tiny model.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    """One seed; one thread for tiny models, whose products are too small to share: on a busy
    machine threads that wait for each other take many times longer."""
    torch.manual_seed(0)
    torch.set_num_threads(THREADS if request.node.get_closest_marker("real") else 1)


@pytest.fixture(scope="session")
def local_models() -> None:
    """The local models in the cache folder."""
    pull("dinov2-small")
    pull("smollm2-135m-instruct")
    pull("all-minilm-l6-v2")


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A study of two arms of tiny models as plain data."""
    monkeypatch.setenv("LAYERFUSE_HOME", str(tmp_path / "home"))
    AutoModel.from_config(tiny.vision_config("dinov2")).save_pretrained(tmp_path / "encoder")
    tiny.image_processor().save_pretrained(tmp_path / "encoder")
    AutoModelForCausalLM.from_config(tiny.text_config("llama")).save_pretrained(tmp_path / "llm")
    tiny.tokenizer().save_pretrained(tmp_path / "llm")
    records = []
    for k in range(8):
        Image.new("RGB", (40, 30), f"rgb({30 * k},0,90)").save(tmp_path / f"{k}.png")
        talk = [{"from": "human", "value": "<image> n?"}, {"from": "gpt", "value": str(k % 2)}]
        records.append({"id": str(k), "image": f"{k}.png", "conversations": talk})
    (tmp_path / "data.json").write_text(json.dumps(records))
    data = {"path": "data.json"}
    stage = {"data": data, "learning_rates": {"fusion": 1e-3}, "batch_size": 4, "steps": 2}
    return {
        "name": "tiny",
        "encoder": str(tmp_path / "encoder"),
        "llm": str(tmp_path / "llm"),
        "dtype": "float32",
        "arms": [
            {"name": "one", "layers": [3], "fusion": {"name": "single"}},
            {"name": "two", "layers": [1, 3], "fusion": {"name": "concat"}},
        ],
        "stages": {"align": stage},
        "evaluate": {"data": data, "max_new_tokens": 2},
    }
