"""An LLM whose head is its table of embeddings has that table once, in training and in `show`."""

from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from layerfuse import FusionVLM
from layerfuse.cost.flops import count
from layerfuse.cost.recipe_table import show
from layerfuse.model.config import configure
from tests import tiny

TABLE = 320 * 32
"""parameters of the embeddings of the tiny LLM: words x width"""


def composed(tied: bool) -> FusionVLM:
    """A tiny model with weights, as training makes it."""
    return FusionVLM.compose(
        encoder=tiny.vision_config(),
        llm=tiny.text_config(tie_word_embeddings=tied),
        layers=[4],
        fusion={"name": "single"},
        image_token_id=tiny.IMAGE_ID,
    )


def parameters_of(part: Any) -> int:
    """The number of parameters of a module with weights; shared ones count once."""
    return sum(weight.numel() for weight in part.parameters())


def counted(tied: bool) -> dict[str, int]:
    """The parameters of the same model by part, counted without weights."""
    text = tiny.text_config(tie_word_embeddings=tied)
    config = configure(tiny.vision_config(), text, [4], {"name": "single"})
    _, parameters = count(config)
    return parameters


def test_a_tied_head_is_counted_as_composed_models_hold_it() -> None:
    """Counted twice, SmolLM2-135M would have 163 M parameters."""
    model = composed(tied=True)

    parameters = counted(tied=True)

    assert parameters["llm"] == parameters_of(model.language_model)
    assert parameters["fusion"] == parameters_of(model.fusion)
    assert parameters["vision"] == parameters_of(model.vision_tower)


def test_a_head_of_its_own_is_counted_beside_the_embeddings() -> None:
    parameters = counted(tied=False)

    assert parameters["llm"] == parameters_of(composed(tied=False).language_model)
    assert parameters["llm"] == counted(tied=True)["llm"] + TABLE


def test_a_stage_that_trains_a_tied_llm_trains_its_table_once(tmp_path: Path) -> None:
    recipe = {
        "name": "tied",
        "encoder": {"model": "encoder", "config": tiny.vision_config().to_dict()},
        "llm": {
            "model": "llm",
            "config": tiny.text_config(tie_word_embeddings=True).to_dict(),
        },
        "arms": [{"layers": [4], "fusion": {"name": "single"}}],
        "stages": {
            "finetune": {
                "data": {"scenes": {"count": 3}},
                "learning_rates": {"fusion": 1.0, "llm": 1.0},
            },
        },
        "evaluate": {"data": {"scenes": {"count": 3}}},
    }
    file = tmp_path / "tied.yaml"
    file.write_text(yaml.safe_dump(recipe))

    _, arms = show(file, console=Console(quiet=True))

    model = composed(tied=True)
    expected = parameters_of(model.language_model) + parameters_of(model.fusion)
    assert arms[0].trained == {"finetune": expected}
