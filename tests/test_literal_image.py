"""A literal `<image>`, as in a question about HTML: text on request, and no picture."""

from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from layerfuse import Processor
from layerfuse.errors import LayerfuseError
from layerfuse.model.chat_template import LITERAL_IMAGE, literal, question_of, written
from layerfuse.model.processor import IGNORED
from tests import tiny

IMAGE_TOKENS = 2
TALK = [
    {"role": "user", "content": f"<image>\nIs {LITERAL_IMAGE} a tag?"},
    {"role": "assistant", "content": f"{LITERAL_IMAGE} is none, <img> is."},
]


def make_tokenizer(image_token: str, special: bool = True) -> Any:
    """A tokenizer of bytes.

    Args:
        image_token: the name of its token 3.
        special: whether it is called special.
    """
    tokens = ["<pad>", "<s>", "</s>", image_token, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    added = AddedToken(image_token, special=special, normalized=False)
    tokenizer.add_tokens([added], special_tokens=special)
    return tokenizer


def make(image_token: str = "<image>", special: bool = True) -> Processor:
    """A processor with such a tokenizer."""
    return Processor(
        tiny.image_processor(),
        make_tokenizer(image_token, special),
        patch_size=tiny.PATCH,
        image_token=image_token,
        chat_template=tiny.CHAT_TEMPLATE,
    )


def expected_tokens(text: str) -> list[int]:
    """The tokens of a text to which `<image>` is text; `<|picture|>` is its token 3."""
    tokenizer = make_tokenizer("<|picture|>")
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def labelled_text(processor: Processor, encoded: dict[str, torch.Tensor]) -> str:
    """The text of all labels."""
    labels = encoded["labels"]
    return processor.tokenizer.decode(labels[labels != IGNORED])


# The token that the processor adds to most LLMs, the same in a tokenizer whose makers did not call
# it special, and one that an LLM has of its own.
IMAGE_TOKEN_KINDS = pytest.mark.parametrize(
    ("image_token", "special"),
    [("<image>", True), ("<image>", False), ("<|picture|>", True)],
)


def test_a_literal_is_written_back() -> None:
    text = "<image> and <image>, not <Image>"

    assert literal(text) == f"{LITERAL_IMAGE} and {LITERAL_IMAGE}, not <Image>"
    assert written(literal(text)) == text


@IMAGE_TOKEN_KINDS
def test_training_reads_it_as_text(image_token: str, special: bool) -> None:
    processor = make(image_token, special)

    encoded = processor.encode(TALK, [IMAGE_TOKENS])

    # of the two places where `<image>` is written one is a picture
    pictures = "<|picture|>" * IMAGE_TOKENS
    question = f"<|user|>{pictures}\nIs <image> a tag?"
    answer = "<|assistant|><image> is none, <img> is.</s>"
    assert encoded["input_ids"].tolist() == expected_tokens(question + answer)
    assert labelled_text(processor, encoded) == "<image> is none, <img> is.</s>"


@IMAGE_TOKEN_KINDS
def test_plain_prompts_read_it_as_text(image_token: str, special: bool) -> None:
    processor = make(image_token, special)

    encoded = processor.encode(TALK, [IMAGE_TOKENS], prompt="plain")

    pictures = "<|picture|>" * IMAGE_TOKENS
    text = pictures + "<image> is none, <img> is.</s>"
    assert encoded["input_ids"].tolist() == expected_tokens(text)
    assert labelled_text(processor, encoded) == "<image> is none, <img> is.</s>"


@IMAGE_TOKEN_KINDS
def test_questions_read_it_as_text(image_token: str, special: bool) -> None:
    processor = make(image_token, special)

    asked = processor.text_inputs([TALK[:1]], IMAGE_TOKENS)

    pictures = "<|picture|>" * IMAGE_TOKENS
    text = f"<|user|>{pictures}\nIs <image> a tag?<|assistant|>"
    assert asked["input_ids"][0].tolist() == expected_tokens(text)


def test_beside_a_picture_it_stays_text() -> None:
    processor = make()
    talk = [{"role": "user", "content": f"<image>{LITERAL_IMAGE}<image>"}]

    asked = processor.text_inputs([talk], 1)

    text = "<|user|><|picture|><image><|picture|><|assistant|>"
    assert asked["input_ids"][0].tolist() == expected_tokens(text)


def test_it_counts_as_no_picture() -> None:
    processor = make()
    talk = [{"role": "user", "content": LITERAL_IMAGE}, {"role": "assistant", "content": "yes"}]

    encoded = processor.encode(talk, [])

    assert not bool((encoded["input_ids"] == processor.image_token_id).any())
    # an image that no marker places
    with pytest.raises(LayerfuseError, match="0 <image> markers, 1 images"):
        processor.encode(talk, [IMAGE_TOKENS])


def test_a_model_may_say_it() -> None:
    processor = make()
    encoded = processor.encode(TALK, [IMAGE_TOKENS])

    answer = encoded["labels"][encoded["labels"] != IGNORED]
    said = processor.turn_ends.answer_texts(answer[None])

    assert said == ["<image> is none, <img> is."]


def test_the_question_that_guides_is_what_people_wrote() -> None:
    assert question_of(TALK) == "Is <image> a tag?"
    assert question_of(TALK, image_token="<|picture|>") == "Is <image> a tag?"


def test_the_words_before_answers_are_what_people_wrote() -> None:
    talk = [{"role": "system", "content": f"About {LITERAL_IMAGE}."}, *TALK]

    (words,) = make().chat.words_before_answers(talk)

    assert words.before.startswith("<|system|>About <image>.")


def test_the_prompt_is_what_people_wrote() -> None:
    assert make().chat.prompt(TALK[:1]) == "<|user|><image>\nIs <image> a tag?<|assistant|>"


def test_it_is_text_beside_a_picture() -> None:
    processor = make()
    picture = Image.new("RGB", (8, 8))

    text = processor.apply_chat_template(TALK[:1])
    inputs = processor.apply_chat_template(
        TALK[:1],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"images": [picture]},
    )

    assert text == "<|user|><image>\nIs <image> a tag?"
    expected = processor.inputs([TALK[:1]], [picture])
    assert inputs["input_ids"].tolist() == expected["input_ids"].tolist()
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])


def test_transformers_may_be_told_that_it_is_text() -> None:
    processor = make()
    talk = [{"role": "user", "content": f"Is {LITERAL_IMAGE} a tag?"}]

    ids = processor.apply_chat_template(talk, tokenize=True, sanitize_control_tokens=True)

    assert ids == [expected_tokens("<|user|>Is <image> a tag?")]
