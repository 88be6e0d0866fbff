"""What people do with any model of transformers: PEFT, Trainer, more tokens, longer chats."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import DynamicCache, EvalPrediction, Trainer, TrainingArguments

from layerfuse import FusionVLM
from layerfuse.errors import LayerfuseError
from layerfuse.fusion import FUSIONS
from layerfuse.fusion.base import Fused
from layerfuse.vision.features import Features
from tests import tiny
from tests.random_prompts import prompts, prompts_with_images_at

CLOSED: dict[str, dict[str, Any]] = {"inject_add": {"gate": True}}
"""options with which a strategy begins behind closed gates"""
IMAGE_TOKENS = 16
NEW_TOKENS = 6


def labelled_answers(batch: dict[str, Tensor]) -> Tensor:
    """Labels of the last tokens of each row, so that there is a prompt before them."""
    labels = batch["input_ids"].clone()
    labels[:, :-5] = -100
    return labels


@pytest.mark.parametrize("strategy", list(FUSIONS))
def test_peft_trains_the_fusion_and_what_it_saves_is_what_it_trained(
    strategy: str, tmp_path: Path
) -> None:
    """PEFT copies what `modules_to_save` names: hooks must reach the copy, not the original."""
    model = tiny.model(strategy, open_gates=False, **CLOSED.get(strategy, {}))
    settings = LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["fusion"])
    # Any: PEFT wraps a model in a class that types nothing of it
    adapted: Any = get_peft_model(model, settings)
    batch = prompts(model, [1, 2])
    adapted.train()
    trained: dict[str, Tensor] = {}
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            trained[name] = parameter.detach().clone()
    optimizer = torch.optim.Adam(adapted.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        adapted(**batch, labels=labelled_answers(batch)).loss.backward()
        optimizer.step()

    unmoved: list[str] = []
    for name, parameter in adapted.named_parameters():
        if name in trained and torch.equal(parameter, trained[name]):
            unmoved.append(name)
    assert unmoved == []

    adapted.eval()
    with torch.no_grad():
        expected = adapted(**batch).logits
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, expected, atol=1e-4, rtol=0)
        merged.save_pretrained(tmp_path / "model")
        loaded = FusionVLM.from_pretrained(tmp_path / "model")
        torch.testing.assert_close(loaded(**batch).logits, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_wrapped_fusion_is_the_one_that_injects() -> None:
    """Gates that PEFT's copy opens change the logits; those of the original do not."""
    model = tiny.model("inject_cross", open_gates=False)
    adapted: Any = get_peft_model(
        model, LoraConfig(target_modules=["q_proj"], modules_to_save=["fusion"])
    )
    batch = prompts(model, [1])
    before = adapted(**batch).logits
    for name, parameter in adapted.named_parameters():
        if "original_module" in name and name.endswith("gate"):
            parameter.fill_(1)
    assert torch.equal(adapted(**batch).logits, before)
    for name, parameter in adapted.named_parameters():
        if "modules_to_save" in name and name.endswith("gate"):
            parameter.fill_(1)
    assert not torch.equal(adapted(**batch).logits, before)


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows of one image each, as a data set of `Trainer`."""

    def __init__(self, model: FusionVLM, number: int) -> None:
        self.batch = prompts(model, [1] * number)

    def __len__(self) -> int:
        return len(self.batch["input_ids"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = {name: values[index] for name, values in self.batch.items()}
        return {**row, "labels": row["input_ids"]}


@pytest.mark.parametrize("strategy", ["concat", "inject_cross"])
def test_trainer_evaluates_with_metrics(strategy: str, tmp_path: Path) -> None:
    """What a metric gets are the logits alone, of all rows."""
    model = tiny.model(strategy)
    rows = Rows(model, 5)
    seen: list[Any] = []

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction.predictions)
        return {"rows": float(len(prediction.label_ids))}

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            per_device_eval_batch_size=2,
            report_to="none",
            use_cpu=True,
            remove_unused_columns=False,
        ),
        eval_dataset=rows,
        compute_metrics=metrics,
    )
    result = trainer.evaluate()

    assert result["eval_rows"] == 5
    with torch.no_grad():
        expected = model(**rows.batch).logits
    torch.testing.assert_close(torch.tensor(seen[0]), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.filterwarnings("ignore:.*embeddings will be initialized.*")
@torch.no_grad()
def test_resized_vocabularies(closed: bool, tmp_path: Path) -> None:
    """Both tables grow, old tokens keep their logits, and what is saved can be loaded."""
    model = tiny.model("concat")
    if closed:
        model.close_answers([2, 7, 9])
    batch = prompts(model, [1, 2])
    before = model(**batch).logits

    model.resize_token_embeddings(330, mean_resizing=False)

    after = model(**batch).logits
    assert after.shape[-1] == 330
    assert torch.equal(after[..., :320], before)
    assert model.config.text_config.vocab_size == 330
    assert model.get_input_embeddings().weight.shape[0] == 330
    model.save_pretrained(tmp_path / "model")
    loaded = FusionVLM.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded(**batch).logits, after)


def answers(model: FusionVLM, **inputs: Any) -> list[list[int]]:
    """Greedy answers of six tokens."""
    tokens: Any = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return tokens[:, -NEW_TOKENS:].tolist()


@pytest.mark.parametrize("strategy", list(FUSIONS))
@torch.no_grad()
def test_a_chat_goes_on_from_the_cache_of_its_beginning(strategy: str) -> None:
    """As from the whole chat: the cache holds the picture, and a second question follows."""
    model = tiny.model(strategy)
    batch = prompts(model, [1])
    visual: dict[str, Any] = {"pixel_values": batch["pixel_values"]}
    if model.fusion.reads == "sentence":
        visual["instruction"] = batch["instruction"]
    elif model.fusion.reads == "prompt":
        visual["instruction"] = model.prompt_embedding(batch["input_ids"])
    cache = DynamicCache(config=model.config.text_config)
    model(
        input_ids=batch["input_ids"],
        past_key_values=cache,
        use_cache=True,
        **visual,
    )
    whole = torch.cat([batch["input_ids"], torch.randint(4, 300, (1, 7))], dim=1)
    ones = torch.ones_like(whole)

    expected = answers(model, input_ids=whole, attention_mask=ones, **visual)
    continued = answers(
        model, input_ids=whole, attention_mask=ones, past_key_values=cache, **visual
    )

    assert continued == expected


@pytest.mark.parametrize("strategy", ["concat", "inject_add", "inject_cross"])
@torch.no_grad()
def test_a_chat_goes_on_with_another_picture(strategy: str) -> None:
    """The cache holds the first one; strategies that look at all pictures at once say so."""
    model = tiny.model(strategy)
    chat = prompts_with_images_at([[3, 30]])
    cache = DynamicCache(config=model.config.text_config)
    model(
        input_ids=chat["input_ids"][:, :25],
        pixel_values=chat["pixel_values"][:1],
        past_key_values=cache,
        use_cache=True,
    )
    if strategy == "inject_cross":
        with pytest.raises(LayerfuseError, match="leave `past_key_values` out"):
            answers(model, **chat, past_key_values=cache)
        return
    assert answers(model, **chat, past_key_values=cache) == answers(model, **chat)


@torch.no_grad()
def test_a_chat_that_goes_on_keeps_what_guides_each_picture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For strategies whose blocks look at pictures that the cache holds: each is fused again, with
    the instruction of its own row."""
    model = tiny.model("inject_cross")
    chat = prompts(model, [1, 2])
    cache = DynamicCache(config=model.config.text_config)
    model(
        input_ids=chat["input_ids"][:, :-1],
        pixel_values=chat["pixel_values"],
        past_key_values=cache,
        use_cache=True,
    )
    instruction = torch.tensor([[1.0], [2.0]])
    given: list[tuple[Any, Any]] = []
    fuse = model.fuse

    def note_and_fuse(features: Features, instruction: Any = None, guidance: Any = None) -> Fused:
        given.append((instruction, guidance))
        return fuse(features)

    monkeypatch.setattr(model, "fuse", note_and_fuse)
    answers(model, **chat, instruction=instruction, guidance="uniform", past_key_values=cache)

    ((of_images, guidance),) = given
    assert of_images.tolist() == [[1.0], [2.0], [2.0]]
    assert guidance == "uniform"


def test_prompts_cannot_be_cut_within_a_picture() -> None:
    """Rather than placing half of a picture."""
    model = tiny.model("concat")
    with pytest.raises(LayerfuseError, match="prefill_chunk_size cuts the tokens of a picture"):
        answers(model, **prompts(model, [1]), prefill_chunk_size=8)


def test_image_tokens_need_images_and_images_must_be_there() -> None:
    """A text with empty places would be answered without an error."""
    model = tiny.model("concat")
    batch = prompts(model, [1])
    pixels = batch.pop("pixel_values")
    with pytest.raises(LayerfuseError, match="neither pixel_values nor features nor visual"):
        model(**batch)
    with pytest.raises(LayerfuseError, match="neither pixel_values nor features nor visual"):
        answers(model, **batch)
    with pytest.raises(LayerfuseError, match="holds no image: leave it out"):
        model(**batch, pixel_values=pixels[:0])
    with pytest.raises(LayerfuseError, match="Tiles, as the processor of LLaVA-NeXT makes them"):
        model(**batch, pixel_values=pixels[:, None].expand(-1, 5, -1, -1, -1))


def test_second_derivatives_of_deformable_attention_are_refused() -> None:
    """They would lack what the sampling weights contribute, without saying so."""
    model = tiny.model("deformable")
    value = model.fusion.get_parameter("cross.value.weight")
    tokens = model.get_image_features(torch.randn(1, 3, tiny.SIZE, tiny.SIZE)).pooler_output
    assert isinstance(tokens, Tensor)
    (gradient,) = torch.autograd.grad(tokens.pow(2).sum(), value, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.pow(2).sum().backward()
