"""`llm.blocks`: an LLM of the first blocks of another one, with its final norm and head."""

import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.utils import logging as transformers_logging

from layerfuse import FusionVLM
from layerfuse.cost.recipe_table import show
from layerfuse.errors import LayerfuseError
from layerfuse.model.first_blocks import cut_config
from layerfuse.study.coordinate import study
from tests import tiny
from tests.random_prompts import prompts
from tests.studies import one_line, run_study, write_recipe

DEPTH = 6
"""blocks of the tiny LLMs"""
each_llm = pytest.mark.parametrize("family", tiny.LLMS)


# Any: causal LMs of transformers share no type
def whole_llm(family: str) -> Any:
    """An LLM with random weights, large enough that blocks differ in what they do."""
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(tiny.text_config(family)).eval()
    with torch.no_grad():
        for parameter in llm.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return llm


def cut_model(llm: str | Path, blocks: int, **options: Any) -> FusionVLM:
    """A model with the first blocks of an LLM in a folder."""
    settings: dict[str, Any] = {"layers": [2], "fusion": {"name": "single"}, **options}
    model = FusionVLM.compose(
        tiny.vision_config(),
        llm,
        image_token_id=tiny.IMAGE_ID,
        llm_blocks=blocks,
        **settings,
    )
    return model.eval()


def random_ids() -> Tensor:
    """Two rows that are longer than the window of families with sliding attention."""
    return torch.randint(4, 300, (2, 40))


@each_llm
@pytest.mark.parametrize("blocks", [1, 2, 4, DEPTH])
@torch.no_grad()
def test_logits_are_those_of_the_first_blocks(family: str, blocks: int, tmp_path: Path) -> None:
    """The final norm and the head read what the first blocks have made of the text."""
    whole = whole_llm(family)
    whole.save_pretrained(tmp_path)
    ids = random_ids()

    logits = cut_model(tmp_path, blocks)(input_ids=ids).logits

    expected = whole(input_ids=ids).logits
    if blocks < DEPTH:
        # entry k is what block k has made, the embeddings are entry 0
        hidden = whole(input_ids=ids, output_hidden_states=True).hidden_states[blocks]
        expected = whole.lm_head(whole.model.norm(hidden))
        # or nothing would have been cut
        assert not torch.allclose(expected, whole(input_ids=ids).logits, atol=0.1)
    torch.testing.assert_close(logits, expected)


@each_llm
@torch.no_grad()
def test_the_saved_model_is_an_ordinary_one_of_that_depth(family: str, tmp_path: Path) -> None:
    whole_llm(family).save_pretrained(tmp_path / "whole")
    model = cut_model(
        tmp_path / "whole", 2, layers=[1, 2], fusion={"name": "inject_add", "gate": True}
    )
    batch = prompts(model, [1, 0])
    expected = model(**batch).logits

    model.save_pretrained(tmp_path / "saved")
    # Any: transformers does not annotate what its automatic classes make
    loaded: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(loaded(**batch).logits, expected)

    # its LLM is stock: transformers alone reads it, and neither lacks nor leaves a weight
    model.language_model.save_pretrained(tmp_path / "llm")
    auto_model: Any = AutoModelForCausalLM
    llm, report = auto_model.from_pretrained(tmp_path / "llm", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert llm.config.num_hidden_layers == 2
    ids = random_ids()
    assert torch.equal(llm.eval()(input_ids=ids).logits, model(input_ids=ids).logits)


def test_what_is_said_of_every_block_is_cut() -> None:
    config = tiny.text_config("smollm3")
    # as many stop tokens as there are blocks
    config.eos_token_id = [2, 4, 5, 6, 7, 8]

    cut = cut_config("smollm3", config, 4).to_dict()

    assert cut["num_hidden_layers"] == 4
    assert cut["no_rope_layers"] == [1, 1, 1, 0]
    assert len(cut["layer_types"]) == 4
    assert cut["eos_token_id"] == [2, 4, 5, 6, 7, 8]
    # that of the whole LLM may be in use elsewhere
    assert config.num_hidden_layers == DEPTH
    assert len(config.to_dict()["layer_types"]) == DEPTH


@pytest.mark.parametrize(
    ("placement", "expected"),
    [("proportional", [0, 2]), ("last", [1, 2]), ("first", [1, 2]), ([0, 1], [0, 1])],
)
def test_internal_strategies_place_within_the_blocks(placement: Any, expected: list[int]) -> None:
    """Layers 2 and 4 of 4 lie before blocks 0 and 2 of 3; of 6 blocks they would before 2 and 5."""
    model = cut_model_of_config(3, {"name": "inject_add", "placement": placement})

    features = model.encode_images(torch.randn(1, 3, tiny.SIZE, tiny.SIZE))

    assert sorted(model.fuse(features).memory) == expected


def cut_model_of_config(blocks: int, fusion: dict[str, Any]) -> FusionVLM:
    """A model with random weights, whose LLM was never whole."""
    return FusionVLM.compose(
        tiny.vision_config(),
        tiny.text_config(),
        [2, 4],
        fusion,
        image_token_id=tiny.IMAGE_ID,
        llm_blocks=blocks,
    )


@pytest.mark.parametrize("blocks", [0, -1, DEPTH + 1])
def test_blocks_that_do_not_exist_are_refused(blocks: int) -> None:
    with pytest.raises(LayerfuseError, match=rf"llm\.blocks {blocks} .* llama has 6 .* 1\.\.6"):
        cut_model_of_config(blocks, {"name": "concat"})


def test_a_placement_beyond_the_blocks_is_refused() -> None:
    with pytest.raises(LayerfuseError, match="the LLM has 3 blocks"):
        cut_model_of_config(3, {"name": "inject_add", "placement": [2, 5]})


def test_an_llm_whose_last_blocks_share_keys_is_refused() -> None:
    """Its blocks are counted from the end: cut, others would share."""
    # Any: transformers does not annotate its automatic classes
    auto_config: Any = AutoConfig
    config = auto_config.for_model("gemma3n_text", num_hidden_layers=6, num_kv_shared_layers=2)

    with pytest.raises(LayerfuseError, match=r"the last blocks of g \(gemma3n_text\) share keys"):
        cut_config("g", config, 3)


class KeptRecords(logging.Handler):
    """Keeps the messages that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def test_nothing_is_said_of_weights_that_are_left_out(tmp_path: Path) -> None:
    """They are left out on purpose; transformers would list them as unexpected."""
    whole_llm("llama").save_pretrained(tmp_path)
    kept = KeptRecords()
    transformers_logging.add_handler(kept)
    verbosity = transformers_logging.get_verbosity()
    try:
        transformers_logging.set_verbosity_warning()
        cut_model(tmp_path, 2)
        # what goes wrong afterwards is said as before
        assert transformers_logging.get_verbosity() == transformers_logging.WARNING
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.remove_handler(kept)

    assert not kept.messages


def with_blocks(recipe: dict[str, Any], blocks: int) -> dict[str, Any]:
    """The recipe with so many of its LLM's six blocks."""
    return {**recipe, "llm": {"model": recipe["llm"], "blocks": blocks}}


def test_show_counts_the_blocks_that_are_kept(recipe: dict[str, Any], tmp_path: Path) -> None:
    printed = io.StringIO()
    arms = {}
    for blocks in (1, 2, 3):
        file = write_recipe(tmp_path, with_blocks(recipe, blocks))
        _, arms[blocks] = show(file, console=Console(file=printed, width=200))

    for number in ("parameters", "flops"):
        counted = [vars(arms[blocks][0])[number]["llm"] for blocks in (1, 2, 3)]
        # every block costs the same
        assert counted[1] - counted[0] == counted[2] - counted[1] > 0
    assert "the first 2 blocks (llm.blocks, a screening device) of width 32" in printed.getvalue()


def test_a_study_with_a_cut_llm_is_called_a_screening(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    file = write_recipe(tmp_path, {**with_blocks(recipe, 2), "keep_models": "all"})

    folder = tmp_path / "study"

    page = study(file, output=folder, console=Console(quiet=True)).read_text()

    headline = json.loads((folder / "summary.json").read_text())["findings"]["headline"]
    assert "This is a screening: the LLM was cut to its first 2 blocks (llm.blocks)" in headline
    assert headline in page
    saved_models = list(folder.glob("arms/*/model"))
    assert len(saved_models) == 2
    for saved in saved_models:
        model = FusionVLM.from_pretrained(saved)
        assert model.config.text_config.num_hidden_layers == 2
        assert len(model.get_decoder().layers) == 2


def test_a_study_with_too_many_blocks_stops_before_training(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    file = write_recipe(tmp_path, with_blocks(recipe, 7))

    result = run_study(file, tmp_path / "study")

    assert result.exit_code == 2
    assert "llm.blocks 7 is not possible" in one_line(result)
    assert not list((tmp_path / "study").glob("arms/*"))


def test_all_blocks_are_no_screening(recipe: dict[str, Any], tmp_path: Path) -> None:
    """As many blocks as the LLM has are the same runs as no `llm.blocks`."""
    file = write_recipe(tmp_path, with_blocks(recipe, 6))

    study(file, output=tmp_path / "study", console=Console(quiet=True))
    printed = io.StringIO()
    show(file, console=Console(file=printed, width=200))

    assert "6 blocks of width 32" in printed.getvalue()
    assert "screening" not in printed.getvalue()
    summary = json.loads((tmp_path / "study/summary.json").read_text())
    assert "screening" not in summary["findings"]["headline"]
    saved = yaml.safe_load((tmp_path / "study/recipe.yaml").read_text())
    assert "blocks" not in saved["llm"]
