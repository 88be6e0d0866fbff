"""Names of runs: what decides a result is in them, and what a recipe does not set is not.

A study trains again whatever has another name, so a name must outlive new versions of recipes.
"""

import hashlib
import json
from typing import Any

import pytest

import layerfuse
from layerfuse.recipe.schema import Recipe
from layerfuse.study.plan import PlannedRun, runs

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "encoder": "some/encoder",
    "llm": "some/llm",
    "dtype": "float32",
    "arms": [{"layers": [3], "fusion": {"name": "single"}}],
    "stages": {
        "align": {"data": {"path": "a.json"}, "learning_rates": {"fusion": 1.0}},
    },
    "evaluate": {"data": {"path": "b.json"}},
}
"""A recipe that sets nothing but what it must."""

DATA_SETTINGS: dict[str, Any] = {
    "scenes": None,
    "images": None,
    "dataset": None,
    "columns": {},
    "ignore_columns": [],
    "literal_answers": False,
    "split": "train",
    "limit": None,
}
SETTINGS: dict[str, Any] = {
    "encoder": {"model": "some/encoder"},
    "llm": {"model": "some/llm"},
    "image_token": None,
    "token_grid": None,
    "image_aspect_ratio": None,
    "dtype": "float32",
    "attn_implementation": "sdpa",
    "cache_features": True,
    "stages": {
        "align": {
            "data": {**DATA_SETTINGS, "path": "a.json"},
            "learning_rates": {"fusion": 1.0},
            "lora": None,
            "prompt": "chat",
            "guidance": None,
            "batch_size": 128,
            "device_batch_size": None,
            "epochs": 1.0,
            "steps": None,
            "schedule": "cosine",
            "warmup": 0.03,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "max_length": 2048,
            "group_by_length": True,
            "random_crop": None,
            "activation_checkpointing": False,
            "checkpoint_steps": None,
        }
    },
    "evaluate": {
        "data": {**DATA_SETTINGS, "path": "b.json"},
        "batch_size": 32,
        "max_new_tokens": 16,
        "controls": ["shuffled", "mean"],
    },
    "liger": False,
    "samples": "digest of the samples",
    "layerfuse": layerfuse.__version__,
    "layers": [3],
    "fusion": {"name": "single"},
    "seed": 0,
}
"""All that the name of its run is made of, with the defaults of the first recipes.

No field comes to these: one that recipes gain later enters a name only where it is set.
"""


def run_of(**stage_changes: Any) -> PlannedRun:
    """The only run of the recipe, its stage changed."""
    stage = {**RECIPE["stages"]["align"], **stage_changes}
    recipe = Recipe.model_validate({**RECIPE, "stages": {"align": stage}})
    (run,) = runs(recipe, "digest of the samples")
    return run


def test_a_run_is_named_by_what_the_first_recipes_said() -> None:
    text = json.dumps(SETTINGS, sort_keys=True)

    assert run_of().key == hashlib.sha256(text.encode()).hexdigest()[:8]


def test_a_default_that_is_written_down_is_the_same_run() -> None:
    assert run_of(group_by="length").key == run_of().key


@pytest.mark.parametrize(
    "changes",
    [
        {"group_by": "modality_length"},
        {"group_by": "none"},
        {"learning_rates": {"fusion": 1.0, "projector": 2.0}},
        {"data": {"path": "a.json", "subset": 5}},
    ],
    ids=str,
)
def test_what_changes_the_training_is_another_run(changes: dict[str, Any]) -> None:
    assert run_of(**changes).key != run_of().key


def test_a_run_of_one_data_size_is_that_of_its_subset() -> None:
    sizes = Recipe.model_validate({**RECIPE, "data_sizes": [5, 9]})

    (run,) = runs(sizes.of_size(5), "digest of the samples")

    assert run.key == run_of(data={"path": "a.json", "subset": 5}).key
    # Which other sizes a study has is nothing to a run.
    without = sizes.model_copy(update={"data_sizes": None})
    assert runs(sizes, "digest of the samples") == runs(without, "digest of the samples")
