"""Models put together from an encoder and an LLM: what stays, what is added, what is refused."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    Gemma3Config,
    GPT2Config,
    GPTNeoXJapaneseConfig,
)

from layerfuse import Answerer, FusionVLM, Processor
from layerfuse.errors import LayerfuseError
from layerfuse.model.config import configure
from layerfuse.model.pretrained import compose_processor
from tests import tiny
from tests.random_prompts import prompts


@dataclass(frozen=True)
class SavedParts:
    """Folders of an encoder and an LLM."""

    encoder: str
    llm: str


@pytest.fixture
def parts(tmp_path: Path) -> SavedParts:
    """An encoder and an LLM as ordinary local folders; the tokenizer knows no image token."""
    encoder = str(tmp_path / "encoder")
    AutoModel.from_config(tiny.vision_config("dinov2")).save_pretrained(encoder)
    tiny.image_processor().save_pretrained(encoder)

    llm = str(tmp_path / "llm")
    AutoModelForCausalLM.from_config(tiny.text_config("llama")).save_pretrained(llm)
    tiny.tokenizer(image=False).save_pretrained(llm)
    return SavedParts(encoder, llm)


@torch.no_grad()
def test_compose_keeps_pretrained_weights_and_adds_the_image_token(parts: SavedParts) -> None:
    model = FusionVLM.compose(
        encoder=parts.encoder,
        llm=parts.llm,
        layers=[2, 3],
        fusion={"name": "concat"},
    )

    stock_llm = AutoModelForCausalLM.from_pretrained(parts.llm)
    llm_weights = model.language_model.state_dict()
    for name, stock_weight in stock_llm.state_dict().items():
        # the embeddings may have got rows at their end
        assert torch.equal(llm_weights[name][: len(stock_weight)], stock_weight), name
    stock_tower_weights = AutoModel.from_pretrained(parts.encoder).state_dict()
    for name, weight in model.vision_tower.tower.state_dict().items():
        assert torch.equal(weight, stock_tower_weights[name]), name

    # "<image>" is new in this tokenizer of 260 tokens; the LLM has spare rows for it
    assert model.config.image_token_id == 260
    assert model.get_input_embeddings().weight.shape[0] == stock_llm.config.vocab_size
    # a spare row may be anything, even the likeliest next token
    assert model.generation_config.suppress_tokens == [260]


@torch.no_grad()
def test_a_full_vocabulary_grows_by_a_row_that_is_never_likeliest(parts: SavedParts) -> None:
    """A model must not answer with the image token."""
    without_spare_rows = tiny.text_config("llama", vocab_size=260)
    AutoModelForCausalLM.from_config(without_spare_rows).save_pretrained(parts.llm)

    model = FusionVLM.compose(
        encoder=tiny.vision_config(),
        llm=parts.llm,
        layers=[2],
        fusion={"name": "single"},
    )

    embeddings = model.get_input_embeddings().weight
    assert embeddings.shape[0] == 261
    # the logit of a mean row is the mean of the others' logits, never their maximum
    torch.testing.assert_close(embeddings[260], embeddings[:260].mean(dim=0))
    ids = torch.randint(4, 260, (3, 9))
    likeliest = model(input_ids=ids).logits.argmax(dim=-1)
    assert int(likeliest.max()) < 260


@torch.no_grad()
def test_ask_and_reload_with_auto_classes(parts: SavedParts, tmp_path: Path) -> None:
    model = FusionVLM.compose(
        encoder=parts.encoder,
        llm=parts.llm,
        layers=[2, 3],
        fusion={"name": "concat"},
    )
    processor = compose_processor(
        parts.encoder,
        parts.llm,
        model.config,
        chat_template=None,
        image_token=None,
    )
    answerer = Answerer(model.eval(), processor)
    picture = Image.new("RGB", (40, 50), "red")
    file = tmp_path / "picture.png"
    picture.save(file)

    answer = answerer.ask([picture], "What colour?", max_new_tokens=5)
    assert answerer.ask([file], "What colour?", max_new_tokens=5) == answer
    of_two = answerer.ask([picture, picture], "What colour?", max_new_tokens=5)
    assert isinstance(of_two, str)
    of_none = answerer.ask([], "What colour?", max_new_tokens=5)
    assert isinstance(of_none, str)

    # The folder alone must say which classes of layerfuse it is made for.
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    # Any: transformers does not annotate what its automatic classes make
    loaded_model: Any = AutoModelForImageTextToText.from_pretrained(folder)
    loaded_processor = AutoProcessor.from_pretrained(folder)
    assert isinstance(loaded_processor, Processor)
    reloaded = Answerer(loaded_model, loaded_processor)
    assert reloaded.ask([picture], "What colour?", max_new_tokens=5) == answer


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [9]}, "layer 9 does not exist: the encoder has 4 blocks"),
        ({"layers": "deep"}, "cannot read 'deep'"),
        ({"fusion": {"name": "mixer"}}, "unknown fusion strategy"),
        ({"fusion": {"name": "concat", "heads": 2}}, "valid options"),
        ({"encoder": tiny.text_config("llama")}, "not an encoder with patch tokens"),
        ({"layers": "1-4", "fusion": {"name": "inject_add", "placement": [7] * 4}}, "6 blocks"),
        ({"image_token_id": None}, "`image_token_id` must be given"),
        ({"llm_blocks": 7}, "llm.blocks 7 is not possible"),
        # of six blocks there are 0..5
        (
            {"layers": [4], "fusion": {"name": "inject_add", "placement": [4]}, "llm_blocks": 3},
            "the LLM has 3 blocks",
        ),
    ],
)
def test_bad_compositions_fail_before_weights_load(
    changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of real models take minutes to load."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were made")

    monkeypatch.setattr("layerfuse.model.vlm.load_llm", fail)
    monkeypatch.setattr("layerfuse.model.vlm.Encoder.from_config", fail)
    arguments: dict[str, Any] = {
        "encoder": tiny.vision_config(),
        "llm": tiny.text_config(),
        "layers": [2],
        "fusion": {"name": "concat"},
        "image_token_id": tiny.IMAGE_ID,
    }

    with pytest.raises(LayerfuseError, match=message):
        FusionVLM.compose(**{**arguments, **changes})


def test_the_saved_configuration_is_resolved() -> None:
    """-2 in a saved config would mean another layer in a deeper encoder."""
    config = configure(
        tiny.vision_config(),
        tiny.text_config(),
        "1,-2",
        {"name": "group_mean", "base": -1},
    )

    assert config.vision_layers == [1, 3]
    assert config.fusion is not None
    assert config.fusion["base"] == 4
    assert config.vision_config.num_hidden_layers == 4


def test_a_multimodal_llm_is_refused() -> None:
    # its own vision tower would stay in the model, unused
    text_config = tiny.text_config("gemma3").to_dict()
    multimodal = Gemma3Config(text_config=text_config)

    with pytest.raises(LayerfuseError, match="is a multimodal model"):
        FusionVLM.compose(
            encoder=tiny.vision_config(),
            llm=multimodal,
            layers=[2],
            fusion={"name": "single"},
            image_token_id=tiny.IMAGE_ID,
        )


def test_an_llm_that_keeps_its_blocks_elsewhere_is_refused() -> None:
    """Internal strategies would find no block to attach to."""
    gpt2 = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=300)

    with pytest.raises(LayerfuseError, match=r"keeps its blocks elsewhere than in `model\.layers`"):
        FusionVLM.compose(
            encoder=tiny.vision_config(),
            llm=gpt2,
            layers=[2],
            fusion={"name": "single"},
            image_token_id=tiny.IMAGE_ID,
        )


def model_with_deaf_blocks(strategy: str) -> FusionVLM:
    """A model whose LLM drops what it is called with before its blocks."""
    llm = GPTNeoXJapaneseConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=300,
        bos_token_id=1,
        eos_token_id=2,
    )
    return FusionVLM.compose(
        encoder=tiny.vision_config(),
        llm=llm,
        layers=[2],
        fusion={"name": strategy},
        image_token_id=tiny.IMAGE_ID,
    )


def test_blocks_that_an_internal_strategy_cannot_reach_are_told() -> None:
    """Nothing would be injected."""
    model = model_with_deaf_blocks("inject_add")

    with pytest.raises(LayerfuseError, match=r"gpt_neox_japanese does not pass on.*inject_add"):
        model(**prompts(model, [1]))


def test_an_external_strategy_needs_to_reach_no_blocks() -> None:
    model = model_with_deaf_blocks("single")

    assert model(**prompts(model, [1])).logits.isfinite().all()
