"""`device_batch_size` bounds the rows of a forward pass, and changes nothing else."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from layerfuse import FusionVLM, Processor
from layerfuse.data.collate import Collator
from layerfuse.data.sample import Sample
from layerfuse.data.sources import load
from layerfuse.recipe.reader import load_recipe
from layerfuse.study.coordinate import study
from layerfuse.train.arm import Trained, train_arm
from layerfuse.train.passes import split_rows, with_waiting
from layerfuse.vision.encoder import Encoder
from layerfuse.vision.picture import Picture
from tests import tiny
from tests.studies import read_results, save_sentence_encoder, write_recipe, write_samples

# Answers of each conversation in a batch: as many each, or not.
TURNS = {"fixed": [2, 2, 2], "variable": [1, 5, 2]}
TWO_PROCESSES = "resources.processes=2"


def conversation(answers: int, picture: Picture | None, name: str = "s") -> Sample:
    """So many questions, the first about the picture if there is one, with their answers."""
    messages: list[dict[str, str]] = []
    for turn in range(answers):
        # Of different lengths, so that there is padding.
        messages.append({"role": "user", "content": "How many" + " more" * turn + f" {name}?"})
        messages.append({"role": "assistant", "content": "n" * (turn % 3 + 1)})
    pictures: tuple[Picture, ...] = ()
    if picture is not None:
        messages[0]["content"] = "<image>\n" + messages[0]["content"]
        pictures = (picture,)
    return Sample(name, pictures, tuple(messages))


def noise(folder: Path, name: str) -> Picture:
    file = folder / f"{name}.png"
    Image.effect_noise((40, 30), 80).convert("RGB").save(file)
    return Picture(str(file))


def batch_of(processor: Processor, samples: list[Sample]) -> dict[str, Any]:
    return Collator(processor, "chat", 2048, store=None)(samples)


def gradients_of(model: FusionVLM, batches: list[dict[str, Any]]) -> dict[str, Tensor]:
    """What the batches of one step add up to, for every parameter."""
    labelled = 0
    for batch in batches:
        labelled += int((batch["labels"][:, 1:] != -100).sum())
    model.zero_grad()
    for batch in batches:
        model(**batch, num_items_in_batch=labelled).loss.backward()
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


@pytest.fixture(params=["text_routed", "instruction_weighted"])
def model(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model of each guided strategy, all of which trains."""
    monkeypatch.setenv("LAYERFUSE_HOME", str(tmp_path / "home"))
    options: dict[str, Any] = {}
    if request.param == "instruction_weighted":
        save_sentence_encoder(tmp_path / "sentences")
        sentences = str(tmp_path / "sentences")
        options = {"sentence_encoder": sentences, "sentence_width": 16, "regularizer": "off"}
    return tiny.model(request.param, **options).train()


@pytest.mark.parametrize("at_once", [1, 2, 4])
@pytest.mark.parametrize("turns", list(TURNS))
def test_passes_have_the_gradient_of_the_whole(
    model: FusionVLM, tmp_path: Path, turns: str, at_once: int
) -> None:
    """Of the encoder too. One conversation of each batch is text alone."""
    samples = [conversation(3, None, "text")]
    for number, answers in enumerate(TURNS[turns]):
        samples.append(conversation(answers, noise(tmp_path, str(number)), str(number)))
    batch = batch_of(tiny.processor(model), samples)

    passes = split_rows(batch, at_once, model.config.image_token_id)

    rows = [len(part["input_ids"]) for part in passes]
    assert sum(rows) == len(batch["input_ids"]) == 3 + sum(TURNS[turns])
    assert max(rows) == at_once
    expected = gradients_of(model, [batch])
    gradients = gradients_of(model, passes)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=2e-6, rtol=1e-4, msg=name)


def test_passes_are_not_padded_for_each_other(model: FusionVLM, tmp_path: Path) -> None:
    batch = batch_of(tiny.processor(model), [conversation(5, noise(tmp_path, "picture"))])

    first, *_, last = split_rows(batch, 1, model.config.image_token_id)

    assert first["input_ids"].shape[1] < last["input_ids"].shape[1]
    assert bool(first["attention_mask"].all())


def test_waiting_for_other_processes_learns_nothing(model: FusionVLM, tmp_path: Path) -> None:
    batch = batch_of(tiny.processor(model), [conversation(2, noise(tmp_path, "picture"))])
    passes = split_rows(batch, 1, model.config.image_token_id)

    waiting = with_waiting(passes, 5)

    assert len(waiting) == 5
    expected = gradients_of(model, passes)
    for name, gradient in gradients_of(model, waiting).items():
        assert torch.equal(gradient, expected[name]), name


def test_a_pass_of_text_alone_can_have_a_masked_picture(model: FusionVLM, tmp_path: Path) -> None:
    """Where processes wait for each other's encoder, all must run it; nothing is learned of it."""
    samples = [conversation(2, noise(tmp_path, "picture")), conversation(2, None)]
    batch = batch_of(tiny.processor(model), samples)
    expected = gradients_of(model, [batch])

    passes = split_rows(batch, 1, model.config.image_token_id, needs_picture=True)

    for part in passes:
        assert len(part["pixel_values"]) == 1
    for name, gradient in gradients_of(model, passes).items():
        torch.testing.assert_close(gradient, expected[name], atol=2e-6, rtol=1e-4, msg=name)


def test_pictures_keep_their_rows(tmp_path: Path) -> None:
    """A conversation that shows a second picture later on, between others."""
    model = tiny.model("text_routed").train()
    first, second = noise(tmp_path, "first"), noise(tmp_path, "second")
    messages = (
        {"role": "user", "content": "<image> a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "<image> c"},
        {"role": "assistant", "content": "d"},
    )
    samples = [conversation(1, second), Sample("two", (first, second), messages)]
    batch = batch_of(tiny.processor(model), samples)
    assert batch["image_index"].tolist() == [0, 1, 1, 0]

    passes = split_rows(batch, 1, model.config.image_token_id)

    assert [len(part["pixel_values"]) for part in passes] == [1, 1, 2]
    pixels = [part["pixel_values"][part["image_index"]] for part in passes]
    assert torch.equal(torch.cat(pixels), batch["pixel_values"][batch["image_index"]])


@pytest.fixture
def guided_recipe(recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A recipe of one guided arm, and samples of one to four answers."""
    samples = []
    for number in range(8):
        talk = []
        for turn in range(number % 4 + 1):
            talk.append({"from": "human", "value": "n" * (turn + 1) + f" {number}?"})
            talk.append({"from": "gpt", "value": str(turn)})
        sample: dict[str, Any] = {"id": str(number), "conversations": talk}
        # One is text alone.
        if number != 5:
            talk[0]["value"] = "<image> " + talk[0]["value"]
            sample["image"] = f"{number}.png"
        samples.append(sample)
    write_samples(tmp_path, samples)
    recipe["arms"] = [{"name": "one", "layers": [1, 3], "fusion": {"name": "text_routed"}}]
    recipe["baseline"] = "one"
    align = recipe["stages"]["align"]
    align["learning_rates"] = {"fusion": 1e-2, "llm": 1e-3}
    # Any sample beside any other: with batches of equal lengths processes had as many rows each.
    align["group_by"] = "none"
    align["steps"] = 4
    recipe["keep_models"] = "all"
    return recipe


def train(recipe: dict[str, Any], tmp_path: Path, name: str) -> Trained:
    loaded = load_recipe(write_recipe(tmp_path, recipe))
    (arm,) = loaded.all_arms()
    samples = {"align": load(loaded.stages["align"].data)}
    return train_arm(loaded, arm, 0, samples=samples, store=None, folder=tmp_path / name)


@pytest.mark.parametrize("encoder_trains", [False, True])
def test_training_keeps_to_the_rows_and_stays_the_same(
    guided_recipe: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    encoder_trains: bool,
) -> None:
    """A frozen encoder sees the pictures of a batch once, in however many passes their rows are."""
    forward, encode = FusionVLM.forward, Encoder.forward
    rows: list[int] = []
    encoded: list[int] = []

    def count_rows(self: FusionVLM, *args: Any, **options: Any) -> Any:
        rows.append(len(options["input_ids"]))
        return forward(self, *args, **options)

    def count_pictures(self: Encoder, pixel_values: Tensor) -> Any:
        encoded.append(len(pixel_values))
        return encode(self, pixel_values)

    align = guided_recipe["stages"]["align"]
    if encoder_trains:
        align["learning_rates"]["vision"] = 1e-3
    whole = train(guided_recipe, tmp_path, "whole")
    align["device_batch_size"] = 2
    monkeypatch.setattr(FusionVLM, "forward", count_rows)
    monkeypatch.setattr(Encoder, "forward", count_pictures)

    split = train(guided_recipe, tmp_path, "split")

    # Four steps of four samples, two epochs: of 2 * (1 + 2 + 3 + 4) rows each.
    assert sum(rows) == 40
    assert max(rows) == 2
    if not encoder_trains:
        assert sum(encoded) == 2 * 7
    whole_losses = [loss for _, loss in whole.losses["align"]]
    assert [loss for _, loss in split.losses["align"]] == pytest.approx(whole_losses, abs=2e-4)


def test_without_a_limit_a_batch_is_one_pass(
    guided_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = FusionVLM.forward
    calls: list[int] = []

    def count_rows(self: FusionVLM, *args: Any, **options: Any) -> Any:
        calls.append(len(options["input_ids"]))
        return forward(self, *args, **options)

    monkeypatch.setattr(FusionVLM, "forward", count_rows)

    train(guided_recipe, tmp_path, "whole")

    assert len(calls) == 4


@pytest.mark.slow
def test_processes_with_other_numbers_of_rows_are_one(
    guided_recipe: dict[str, Any], tmp_path: Path
) -> None:
    """Each has two samples a step, and up to eight rows: all do as many passes."""
    guided_recipe["stages"]["align"]["device_batch_size"] = 1
    guided_recipe["seeds"] = [0]
    path = write_recipe(tmp_path, guided_recipe)
    losses = {}
    for name, overrides in (("one", ()), ("two", (TWO_PROCESSES,))):
        study(path, overrides, output=tmp_path / name)
        losses[name] = read_losses(tmp_path / name)

    assert losses["two"] == pytest.approx(losses["one"], abs=1e-4)


def read_losses(folder: Path) -> list[float]:
    """The losses of a study's only stage."""
    (result,) = read_results(folder)
    return [loss for _, loss in result["losses"]["align"]]
