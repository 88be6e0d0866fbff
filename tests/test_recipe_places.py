"""Mistakes in recipes are named with their place, and accepted nowhere without a word."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from layerfuse.cost.recipe_table import show
from layerfuse.errors import LayerfuseError
from layerfuse.recipe.reader import load_recipe
from tests import tiny

STAGE: dict[str, Any] = {
    "data": {"scenes": {"count": 3}},
    "learning_rates": {"fusion": 1.0},
}


def write_recipe(folder: Path, **changes: Any) -> Path:
    """Write a recipe of a tiny encoder and a tiny LLM, which needs no files."""
    recipe = {
        "name": "tiny",
        "encoder": {"model": "some/encoder", "config": tiny.vision_config().to_dict()},
        "llm": {"model": "some/llm", "config": tiny.text_config().to_dict()},
        "arms": [{"layers": [4], "fusion": {"name": "single"}}],
        "stages": {"align": STAGE},
        "evaluate": {"data": {"scenes": {"count": 3}}},
        **changes,
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def show_quietly(recipe: Path) -> None:
    """Resolve a recipe and print nothing."""
    show(recipe, console=Console(quiet=True))


def test_a_mistake_of_the_whole_recipe_has_a_place(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, foo=1)

    with pytest.raises(LayerfuseError) as refused:
        load_recipe(recipe)

    lines = str(refused.value).splitlines()
    assert lines[1].startswith("  top level: foo: unknown key; valid: name, description")


@pytest.mark.parametrize("name", ["a/b", "../a", "", ".", "..", "a b", "-a", "a\\b"])
def test_stages_are_named_as_files_can_be(tmp_path: Path, name: str) -> None:
    recipe = write_recipe(tmp_path, stages={name: STAGE})

    with pytest.raises(LayerfuseError, match=r"  stages: '.*' cannot name a stage"):
        load_recipe(recipe)


@pytest.mark.parametrize("name", ["align", "stage-1.5", "2", "größer"])
def test_ordinary_names_of_stages(tmp_path: Path, name: str) -> None:
    recipe = load_recipe(write_recipe(tmp_path, stages={name: STAGE}))

    assert list(recipe.stages) == [name]


@pytest.mark.parametrize(
    ("place", "changes"),
    [
        ("learning_rates.llm", {"learning_rates": {"llm": float("inf")}}),
        ("learning_rates.llm", {"learning_rates": {"llm": float("nan")}}),
        ("weight_decay", {"weight_decay": float("inf")}),
        ("epochs", {"epochs": float("inf")}),
        ("warmup", {"warmup": float("nan")}),
    ],
)
def test_numbers_of_a_stage_are_finite(tmp_path: Path, place: str, changes: dict[str, Any]) -> None:
    recipe = write_recipe(tmp_path, stages={"align": {**STAGE, **changes}})

    with pytest.raises(LayerfuseError, match=rf"stages\.align\.{place}: .*finite number"):
        load_recipe(recipe)


def test_show_names_unknown_families_of_a_stage(tmp_path: Path) -> None:
    """As training would, when it draws the scenes."""
    scenes = {"count": 3, "families": ["colour", "taste"], "questions": 1}
    stage = {**STAGE, "data": {"scenes": scenes}}
    recipe = write_recipe(tmp_path, stages={"align": stage})

    with pytest.raises(LayerfuseError, match=r"stage 'align': unknown .* \['taste'\]; valid:"):
        show_quietly(recipe)


def test_show_names_too_few_families_of_the_test(tmp_path: Path) -> None:
    scenes = {"count": 3, "families": ["colour"], "questions": 2}
    recipe = write_recipe(tmp_path, evaluate={"data": {"scenes": scenes}})

    with pytest.raises(LayerfuseError, match="evaluate: questions must lie between 1 and 1"):
        show_quietly(recipe)


def test_show_names_a_missing_chat_template(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, chat_template="none.jinja")

    with pytest.raises(LayerfuseError, match=r"none\.jinja"):
        show_quietly(recipe)


@pytest.mark.parametrize("model", ["encoder", "llm"])
def test_an_override_of_a_key_of_a_model_that_is_plain_text(tmp_path: Path, model: str) -> None:
    """Text means `model: <text>`, beside which other keys can stand."""
    file = write_recipe(tmp_path, **{model: "./some/model"})

    recipe = load_recipe(file, [f"{model}.image_size=56"])

    source = getattr(recipe, model)
    assert source.image_size == 56
    assert source.model == str(tmp_path / "some/model")


def test_other_texts_hold_no_keys(tmp_path: Path) -> None:
    with pytest.raises(LayerfuseError, match="'name' holds no keys"):
        load_recipe(write_recipe(tmp_path), ["name.encoder=x"])
