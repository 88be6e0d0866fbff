"""Shared fixtures. No test may reach a network, but for the ones that pull local models."""

import os

# Read when transformers and tokenizers are imported, so set before.
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

THREADS = torch.get_num_threads()
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers side by side share the cores.
    THREADS = 1

# The longest tests, longest first.
LONG_TESTS = (
    "test_depth_profile_of_a_real_encoder",
    "test_killed_at_random_moments_and_started_again",
    "test_two_processes_are_one",
    "test_a_shrunken_quickstart_on_real_models",
    "test_python_snippets_of_the_readme_run",
    "test_every_strategy_runs_in_one_study",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests come first: at the end of a run no worker is left alone with one."""

    def rank(item: pytest.Item) -> int:
        # Without the parameters
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
    """One seed for all tests, and one thread for those of tiny models."""
    torch.manual_seed(0)
    num_threads = 1
    # The products of tiny models are too small to share: on a busy machine threads that wait for
    # each other take many times longer.
    if request.node.get_closest_marker("real"):
        num_threads = THREADS
    torch.set_num_threads(num_threads)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, not yet there, of this test's own models, scenes and cached features."""
    folder = tmp_path / "home"
    monkeypatch.setenv("LAYERFUSE_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def local_models() -> None:
    """The local models in the cache folder."""
    pull("dinov2-small")
    pull("smollm2-135m-instruct")
    pull("all-minilm-l6-v2")


def _save_models(folder: Path) -> None:
    """Save a tiny encoder and a tiny LLM with what prepares their inputs."""
    vision_config = tiny.vision_config("dinov2")
    AutoModel.from_config(vision_config).save_pretrained(folder / "encoder")
    tiny.image_processor().save_pretrained(folder / "encoder")
    text_config = tiny.text_config("llama")
    AutoModelForCausalLM.from_config(text_config).save_pretrained(folder / "llm")
    tiny.tokenizer().save_pretrained(folder / "llm")


def _save_samples(folder: Path) -> None:
    """Save eight pictures, and a LLaVA file with one question about each."""
    records = []
    for number in range(8):
        name = f"{number}.png"
        picture = Image.new("RGB", (40, 30), f"rgb({30 * number},0,90)")
        picture.save(folder / name)
        answer = str(number % 2)
        conversation = [
            {"from": "human", "value": "<image> n?"},
            {"from": "gpt", "value": answer},
        ]
        record = {
            "id": str(number),
            "image": name,
            "conversations": conversation,
        }
        records.append(record)
    (folder / "data.json").write_text(json.dumps(records))


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A study of two arms of tiny models as plain data."""
    # Not by `home`, which some test files replace.
    monkeypatch.setenv("LAYERFUSE_HOME", str(tmp_path / "home"))
    _save_models(tmp_path)
    _save_samples(tmp_path)
    data = {"path": "data.json"}
    stage = {
        "data": data,
        "learning_rates": {"fusion": 1e-3},
        "batch_size": 4,
        "steps": 2,
    }
    one_layer = {
        "name": "one",
        "layers": [3],
        "fusion": {"name": "single"},
    }
    two_layers = {
        "name": "two",
        "layers": [1, 3],
        "fusion": {"name": "concat"},
    }
    return {
        "name": "tiny",
        "encoder": str(tmp_path / "encoder"),
        "llm": str(tmp_path / "llm"),
        "dtype": "float32",
        "arms": [one_layer, two_layers],
        "stages": {"align": stage},
        "evaluate": {"data": data, "max_new_tokens": 2},
        # One after another in this process: it has imported everything.
        "resources": {"arms_at_once": 1},
    }
