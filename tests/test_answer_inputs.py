"""A model is asked with the pixels and the prompt that it was trained on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from layerfuse.data.collate import Collator
from layerfuse.data.sample import Sample
from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.answer import Answerer
from layerfuse.evaluate.predict import predict
from layerfuse.recipe.data_source import Data
from layerfuse.recipe.evaluate_settings import Evaluation
from layerfuse.vision.picture import Picture
from tests import tiny

ONE_TOKEN = Evaluation(data=Data(path="held out"), max_new_tokens=1)


@pytest.fixture
def answerer() -> Answerer:
    """A tiny random model."""
    model = tiny.model("single")
    return Answerer(model, tiny.processor(model))


def question_sample(file: Path, question: str) -> Sample:
    """A sample of the test or of the training that asks about one picture."""
    return Sample(
        "s",
        (Picture(str(file)),),
        (
            {"role": "user", "content": question},
            {"role": "assistant", "content": "a"},
        ),
    )


def turned_photo(file: Path) -> None:
    """Upside down, as phones save photos, with a tag that says so."""
    exif = Image.Exif()
    # The tag of the orientation: turned by 180 degrees
    exif[0x0112] = 3
    gradient = Image.linear_gradient("L")
    gradient.convert("RGB").save(file, exif=exif)


def transparent(file: Path) -> None:
    """Transparent towards the middle."""
    picture = Image.linear_gradient("L").convert("RGB")
    picture.putalpha(Image.radial_gradient("L"))
    picture.save(file)


def transparent_palette(file: Path) -> None:
    """Of indexed colours, of which one is transparent."""
    gradient = Image.linear_gradient("L")
    gradient.convert("P").save(file, transparency=200)


def of_16_bits(file: Path) -> None:
    """In grey levels of 0..65535."""
    levels = 16 * np.arange(64 * 64, dtype="u2")
    Image.fromarray(levels.reshape(64, 64)).save(file)


def for_print(file: Path) -> None:
    """In the four colours of print."""
    Image.linear_gradient("L").convert("CMYK").save(file)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("turned.jpg", turned_photo),
        ("turned.tif", turned_photo),
        ("turned.png", turned_photo),
        ("transparent.png", transparent),
        ("palette.png", transparent_palette),
        ("palette.gif", transparent_palette),
        ("16.png", of_16_bits),
        ("16.tif", of_16_bits),
        ("print.jpg", for_print),
        ("print.tif", for_print),
    ],
)
def test_a_picture_is_asked_about_as_it_is_trained_on(
    tmp_path: Path,
    answerer: Answerer,
    name: str,
    make: Callable[[Path], None],
) -> None:
    """A file, an opened image and a sample of the test reach the encoder with the same pixels."""
    file = tmp_path / name
    make(file)
    sample = question_sample(file, "<image>what?")
    encoded_pixels: list[Tensor] = []
    answerer.model.vision_tower.register_forward_pre_hook(
        lambda module, args: encoded_pixels.append(args[0])
    )

    answerer.ask([file], "what?", max_new_tokens=1)
    with Image.open(file) as opened:
        answerer.ask([opened], "what?", max_new_tokens=1)
    predict(answerer, [sample], ONE_TOKEN)

    batch = Collator(answerer.processor, "chat", 2048, None)([sample])
    # the test asks, and then reads the right answer
    assert len(encoded_pixels) == 4
    for pixels in encoded_pixels:
        assert torch.equal(pixels, batch["pixel_values"])


@pytest.mark.parametrize(
    ("question", "with_marker"),
    [
        # A question that does not say where the picture stands has it in front
        ("what?", "<image>\nwhat?"),
        ("what <image> is?", "what <image> is?"),
        ("<image>\nwhat?", "<image>\nwhat?"),
    ],
)
def test_ask_and_the_test_and_training_give_the_same_prompt(
    question: str, with_marker: str, answerer: Answerer, tmp_path: Path
) -> None:
    file = tmp_path / "a.png"
    Image.new("RGB", (40, 30), "red").save(file)
    sample = question_sample(file, with_marker)
    prompts: list[Tensor] = []

    def note_prompt(
        module: torch.nn.Module,
        args: Any,
        named: dict[str, Any],
    ) -> None:
        prompts.append(named["input_ids"])

    answerer.model.register_forward_pre_hook(note_prompt, with_kwargs=True)

    answerer.ask([file], question, max_new_tokens=1)
    predict(answerer, [sample], ONE_TOKEN)

    # the test reads the right answer first
    asked, answered, tested = prompts
    assert torch.equal(asked, tested)
    assert torch.equal(answered[:, : asked.shape[1]], asked)
    # The row of the training goes on with the answer
    batch = Collator(answerer.processor, "chat", 2048, None)([sample])
    prompt_length = asked.shape[1]
    assert torch.equal(batch["input_ids"][:, :prompt_length], asked)


def test_answers_are_greedy_whatever_the_llm_was_released_with() -> None:
    """Qwen2.5's instruct models, for one, are released with a penalty of repeated words."""
    picture = Image.new("RGB", (40, 30), "teal")
    model = tiny.model("concat", seed=1)
    answerer = Answerer(model, tiny.processor(model))
    greedy = answerer.ask([picture], "Is it A or B?", 12)

    model.generation_config.repetition_penalty = 5.0
    model.generation_config.no_repeat_ngram_size = 1
    model.generation_config.num_beams = 3

    assert answerer.ask([picture], "Is it A or B?", 12) == greedy
    assert [*answerer.stream([picture], "Is it A or B?", 12)][-1] == greedy


@pytest.mark.parametrize("mode", ["F", "I"])
def test_an_image_that_cannot_be_read_is_named(answerer: Answerer, mode: str) -> None:
    """Neither says which of its samples is white."""
    image = Image.new(mode, (8, 8))

    with pytest.raises(LayerfuseError, match="the given image"):
        answerer.ask([image], "what?", max_new_tokens=1)


@pytest.mark.parametrize("pictures", [0, 1])
def test_more_markers_than_pictures_are_named(answerer: Answerer, pictures: int) -> None:
    """Nobody could say which of them is a picture."""
    images = [Image.new("RGB", (8, 8))] * pictures

    with pytest.raises(LayerfuseError, match=f"2 <image> markers for {pictures} pictures"):
        answerer.ask(images, "Is <image> like <image>?", max_new_tokens=1)
