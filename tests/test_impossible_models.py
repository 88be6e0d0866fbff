"""Configurations of models that nobody could build are one message, not a traceback."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from layerfuse.cost.recipe_table import show
from layerfuse.errors import LayerfuseError
from layerfuse.model.pretrained import text_config_of
from layerfuse.vision.encoder import load_vision_config
from tests import tiny

CLIP = tiny.vision_config("clip").to_dict()
DINOV2 = tiny.vision_config("dinov2").to_dict()
LLAMA = tiny.text_config("llama").to_dict()


def write_recipe(folder: Path, **changes: Any) -> Path:
    """Write a recipe of a tiny encoder and a tiny LLM, which needs no files."""
    recipe = {
        "name": "tiny",
        "encoder": {"model": "some/encoder", "config": CLIP},
        "llm": {"model": "some/llm", "config": LLAMA},
        "arms": [{"layers": [4], "fusion": {"name": "single"}}],
        "stages": {
            "align": {"data": {"scenes": {"count": 3}}, "learning_rates": {"fusion": 1.0}},
        },
        "evaluate": {"data": {"scenes": {"count": 3}}},
        **changes,
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "needs a model_type"),
        ({"model_type": 3}, r"needs a model_type, .* \(it is 3\)"),
        ({"model_type": "nope"}, r"Unrecognized model identifier: nope\. Compare"),
        ({**DINOV2, "hidden_size": "x"}, "'hidden_size' expected int, got str"),
        ({**DINOV2, "hidden_size": 7}, "hidden_size 7 is no multiple of num_attention_heads 3"),
        ({**DINOV2, "hidden_size": 0}, "hidden_size is 0; valid"),
        ({**DINOV2, "num_attention_heads": 0}, "num_attention_heads is 0; valid"),
        ({"model_type": "dinov2", "num_hidden_layers": 0}, "num_hidden_layers is 0; valid"),
        ({**DINOV2, "patch_size": 0}, "patch_size is 0; valid"),
        # Layerfuse's grids are of square patches
        ({**DINOV2, "patch_size": [8, 4]}, r"has \[8, 4\] as patch_size; one side"),
        ({**DINOV2, "image_size": 5}, "image_size is 5; valid: at least its patch_size, 8"),
        ({**DINOV2, "image_size": -5}, "image_size is -5; valid"),
        ({**DINOV2, "hidden_act": "nope"}, "some/model: unknown value 'nope'"),
        ({**CLIP, "hidden_size": 7}, "hidden size .7. is not a multiple"),
        ({**CLIP, "image_size": [32, 32]}, "no encoder can be made of"),
        (LLAMA, "'llama' is not an encoder"),
    ],
)
def test_an_encoder_that_cannot_be_built(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(LayerfuseError, match=message):
        load_vision_config("some/model", settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "nope"}, "no LLM can be made of the configuration of some/model"),
        # Its blocks take no attention mask and pass nothing on
        ({"model_type": "mamba", "num_hidden_layers": 2}, "has no attention heads"),
        ({**LLAMA, "num_hidden_layers": 0}, "num_hidden_layers is 0; valid"),
        ({**LLAMA, "num_key_value_heads": 3}, "4 is no multiple of num_key_value_heads 3"),
        ({**LLAMA, "vocab_size": 0}, "vocab_size is 0; valid"),
        ({**LLAMA, "hidden_act": "nope"}, "unknown value 'nope'"),
    ],
)
def test_an_llm_that_cannot_be_built(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(LayerfuseError, match=message):
        text_config_of("some/model", settings)


def test_a_configuration_that_can_be_built_is_that_of_its_folder(tmp_path: Path) -> None:
    """Written in the recipe or read from a folder, it is one configuration."""
    tiny.vision_config().save_pretrained(tmp_path / "encoder")
    tiny.text_config().save_pretrained(tmp_path / "llm")

    vision = load_vision_config(str(tmp_path / "encoder"))
    text = text_config_of(str(tmp_path / "llm"))

    assert load_vision_config("some/model", CLIP).to_diff_dict() == vision.to_diff_dict()
    assert text_config_of("some/model", LLAMA).to_diff_dict() == text.to_diff_dict()


def test_a_missing_model_is_named_alike_by_training_and_by_show(tmp_path: Path) -> None:
    """The same advice, whoever reads the configuration."""
    missing = str(tmp_path / "none")
    recipe = write_recipe(tmp_path, encoder=missing)

    with pytest.raises(LayerfuseError) as in_training:
        load_vision_config(missing)
    with pytest.raises(LayerfuseError) as in_show:
        show(recipe, console=Console(quiet=True))

    assert str(in_training.value) == str(in_show.value)
    assert "no such folder, and no hub answered" in str(in_show.value)


def test_a_damaged_configuration_in_a_folder_is_not_called_missing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": ')

    with pytest.raises(LayerfuseError, match=r"cannot read the LLM .*config\.json"):
        text_config_of(str(tmp_path))


def test_a_configuration_of_an_unknown_type_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nope"}')

    with pytest.raises(LayerfuseError, match="no encoder can be made of the configuration"):
        load_vision_config(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # A square of 32 pixels has 4 x 4 patches
        ({"token_grid": [100, 100]}, r"token_grid \[100, 100\] is larger than the 4 x 4 patches"),
        ({"token_grid": [4, 5]}, r"token_grid \[4, 5\] is larger .* valid: up to 4 rows"),
    ],
)
def test_a_token_grid_has_no_more_tokens_than_patches(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(LayerfuseError, match=message):
        show(write_recipe(tmp_path, **changes), console=Console(quiet=True))


@pytest.mark.parametrize(
    ("image_size", "message"),
    [
        (0, r"encoder\.image_size: Input should be greater than 0"),
        (-5, r"encoder\.image_size: Input should be greater than 0"),
        (5, "pictures of 5 pixels are smaller than a patch of 8"),
    ],
)
def test_a_picture_holds_a_patch(tmp_path: Path, image_size: int, message: str) -> None:
    encoder = {"model": "some/encoder", "config": CLIP, "image_size": image_size}

    with pytest.raises(LayerfuseError, match=message):
        show(write_recipe(tmp_path, encoder=encoder), console=Console(quiet=True))


def test_a_size_of_equal_sides_is_that_of_a_square(tmp_path: Path) -> None:
    encoder = {"model": "some/encoder", "config": {**DINOV2, "image_size": [32, 32]}}

    _, arms = show(write_recipe(tmp_path, encoder=encoder), console=Console(quiet=True))

    assert arms[0].visual_tokens == 16


def test_a_size_of_unequal_sides_cannot_be_shown(tmp_path: Path) -> None:
    encoder = {"model": "some/encoder", "config": {**DINOV2, "image_size": [32, 64]}}

    with pytest.raises(LayerfuseError, match=r"\[32, 64\], and `show` counts squares alone"):
        show(write_recipe(tmp_path, encoder=encoder), console=Console(quiet=True))
