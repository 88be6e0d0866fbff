"""The options of a strategy are read once from what a model or processor saves."""

from typing import Any

import pytest

from layerfuse import Processor
from layerfuse.errors import LayerfuseError
from layerfuse.fusion import FUSIONS
from layerfuse.fusion.concat import Concat, ConcatConfig
from layerfuse.model.config import FusionConfig, resolve_strategy, strategy_of
from layerfuse.vision.encoder import patch_grid
from layerfuse.vision.selection import select
from tests import tiny


def test_config_and_processor_share_the_parsed_strategy() -> None:
    model = tiny.model("concat")
    processor = tiny.processor(model)

    assert model.config.strategy is model.config.strategy
    assert processor.image_tokens == model.config.image_tokens
    assert processor.image_tokens.strategy is model.config.strategy


def test_a_changed_field_is_another_strategy() -> None:
    """What was parsed before must not outlive the field that it was made from."""
    config = FusionConfig(fusion={"name": "concat"})
    assert config.strategy.options.projector == "mlp"

    config.fusion = {"name": "concat", "projector": "linear"}

    assert config.strategy.options.projector == "linear"


def test_a_strategy_that_is_registered_again_is_the_new_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in a notebook whose cell is run again."""

    class ConcatOfNotebook(Concat):
        """The same under another class."""

    assert strategy_of({"name": "concat"}).module is Concat

    monkeypatch.setitem(FUSIONS, "concat", (ConcatConfig, ConcatOfNotebook))

    assert strategy_of({"name": "concat"}).module is ConcatOfNotebook


@pytest.mark.parametrize(
    ("fusion", "message"),
    [
        ("concat", "a fusion is a mapping"),
        ({"name": "concatt"}, "unknown fusion strategy 'concatt'"),
        ({"name": "concat", "size": 3}, "valid options: "),
    ],
)
def test_what_is_no_strategy_is_named_each_time(fusion: Any, message: str) -> None:
    for _ in range(2):
        with pytest.raises(LayerfuseError, match=message):
            strategy_of(fusion)


def test_layers_in_options_are_those_of_the_encoder() -> None:
    selection = select([1, 3], depth=4)

    strategy = resolve_strategy({"name": "group_mean", "base": -2}, selection)

    assert strategy.options.base == 3


def test_pixels_that_fill_no_patch_are_not_counted() -> None:
    assert patch_grid(height=31, width=40, patch_size=8) == (3, 5)


def test_settings_of_a_processor_are_named() -> None:
    """Eight in a row were easy to mix up."""
    make_processor: Any = Processor
    with pytest.raises(TypeError, match="positional"):
        make_processor(tiny.image_processor(), tiny.tokenizer(), tiny.PATCH)
