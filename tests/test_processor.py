"""Chat templates, image tokens and labels: only answers are labelled, training equals inference."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from layerfuse import Processor
from layerfuse.errors import LayerfuseError
from layerfuse.model.pretrained import load_tokenizer
from layerfuse.model.processor import IGNORED
from tests import tiny
from tests.conversations import (
    TALK,
    labelled,
    labelled_without_spaces,
    processor_of_template,
    template_with_end,
)

FOLDER_OF_TEMPLATES = Path(__file__).parent.parent / "recipes" / "templates"
TEMPLATES = {
    "tiny": tiny.CHAT_TEMPLATE,
    "short.jinja": (FOLDER_OF_TEMPLATES / "short.jinja").read_text(),
    "vicuna_v1.jinja": (FOLDER_OF_TEMPLATES / "vicuna_v1.jinja").read_text(),
}
each_template = pytest.mark.parametrize("template", TEMPLATES)


@each_template
def test_only_answers_and_their_end_are_labelled(template: str) -> None:
    processor = processor_of_template(TEMPLATES[template])

    encoded = processor.encode(TALK, [16])

    assert [part.strip() for part in labelled(processor, encoded)] == ["red</s>", "yes</s>"]
    assert int((encoded["input_ids"] == tiny.IMAGE_ID).sum()) == 16
    # the model itself shifts labels by one: here they stand at their own tokens
    is_labelled = encoded["labels"] != IGNORED
    assert torch.equal(encoded["labels"][is_labelled], encoded["input_ids"][is_labelled])


def starts_of_answers(labels: torch.Tensor) -> list[int]:
    """The place of the first labelled token of each answer."""
    starts: list[int] = []
    previous = IGNORED
    for place, label in enumerate(labels.tolist()):
        if label != IGNORED and previous == IGNORED:
            starts.append(place)
        previous = label
    return starts


@each_template
def test_the_prompt_is_what_stands_before_the_answer_in_training(template: str) -> None:
    """One space more, and the model is asked something that it never saw."""
    processor = processor_of_template(TEMPLATES[template])
    picture = Image.new("RGB", (tiny.SIZE, tiny.SIZE))
    up_to_first_question = TALK[:1]
    up_to_second_question = TALK[:3]

    trained = processor.encode(TALK, [16])
    asked = processor.inputs([up_to_first_question, up_to_second_question], [picture, picture])

    for row, start in enumerate(starts_of_answers(trained["labels"])):
        is_text = asked["attention_mask"][row].bool()
        prompt = asked["input_ids"][row][is_text]
        assert prompt.tolist() == trained["input_ids"][:start].tolist()


def test_an_answer_that_also_stands_in_the_question_is_labelled_once() -> None:
    processor = processor_of_template()
    # searched for by its characters, the answer would be found in the question first
    talk = [
        {"role": "user", "content": "Say yes: yes"},
        {"role": "assistant", "content": "yes"},
    ]

    encoded = processor.encode(talk, [])

    assert labelled(processor, encoded) == ["yes</s>"]


def test_an_answer_around_an_image_is_labelled_without_the_image() -> None:
    """A model that learned to write image tokens would write them."""
    processor = processor_of_template()
    talk = [
        {"role": "user", "content": "Show it"},
        {"role": "assistant", "content": "see <image> end"},
    ]

    encoded = processor.encode(talk, [3])

    assert labelled(processor, encoded) == ["see ", " end</s>"]


def test_plain_prompt_is_image_then_caption() -> None:
    processor = processor_of_template()
    talk = [
        {"role": "user", "content": "<image>"},
        {"role": "assistant", "content": "a cat"},
    ]

    # LLaVA's alignment: nothing of a chat template
    encoded = processor.encode(talk, [4], prompt="plain")

    assert processor.tokenizer.decode(encoded["input_ids"]) == "<image>" * 4 + "a cat</s>"
    assert labelled(processor, encoded) == ["a cat</s>"]


@pytest.mark.parametrize(
    ("images", "max_length", "message"),
    [
        ([16, 16], None, "1 <image> markers, 2 images"),
        ([16], 10, "max_length 10 would cut image tokens"),
        # the first answer begins after these
        ([16], 30, "no token is labelled"),
    ],
)
def test_unusable_conversations(images: list[int], max_length: int | None, message: str) -> None:
    processor = processor_of_template()

    with pytest.raises(LayerfuseError, match=message):
        processor.encode(TALK, images, max_length=max_length)


def test_long_samples_are_cut_at_the_end() -> None:
    processor = processor_of_template()
    whole = processor.encode(TALK, [16])

    cut = processor.encode(TALK, [16], max_length=len(whole["input_ids"]) - 3)

    assert torch.equal(cut["input_ids"], whole["input_ids"][:-3])


def test_batches_are_left_padded_and_mix_images_and_text() -> None:
    processor = processor_of_template()
    # neither the encoder's size nor its ratio
    picture = Image.new("RGB", (50, 20), "blue")
    rows = [
        [{"role": "user", "content": "<image><image>\nSame?"}],
        [{"role": "user", "content": "A rather long question without any picture?"}],
    ]

    batch = processor.inputs(rows, [picture, picture])

    assert batch["pixel_values"].shape == (2, 3, tiny.SIZE, tiny.SIZE)
    assert (batch["input_ids"] == tiny.IMAGE_ID).sum(dim=1).tolist() == [32, 0]
    # the answer continues every row at its right end
    shorter = int(batch["attention_mask"].sum(dim=1).argmin())
    assert batch["attention_mask"][shorter, 0] == 0
    assert bool(batch["attention_mask"][:, -1].all())


def test_token_grid_and_image_size_decide_the_number_of_tokens() -> None:
    # 4 × 6 patches of 8 × 8 pixels
    assert processor_of_template().num_image_tokens(32, 48) == 24
    assert processor_of_template(token_grid=(2, 3)).num_image_tokens(32, 48) == 6


def test_save_and_load(tmp_path: Path) -> None:
    processor = processor_of_template(
        token_grid=(2, 2),
        fusion={"name": "concat", "projector": "linear"},
    )

    processor.save_pretrained(tmp_path)
    loaded = Processor.from_pretrained(tmp_path)

    # transformers saves every attribute that has the name of an argument, and no other
    for name in ("patch_size", "token_grid", "fusion", "image_token", "chat_template"):
        assert vars(loaded)[name] == vars(processor)[name], name
    labels = processor.encode(TALK, [4])["labels"]
    assert loaded.encode(TALK, [4])["labels"].tolist() == labels.tolist()


def test_an_llm_without_chat_template() -> None:
    with pytest.raises(LayerfuseError, match="has no chat template; pass `chat_template`"):
        processor_of_template(None)

    processor = processor_of_template(None, chat_template=tiny.CHAT_TEMPLATE)
    assert processor.chat_template == tiny.CHAT_TEMPLATE


def test_an_image_token_that_the_tokenizer_lacks(tmp_path: Path) -> None:
    """It would be read as several tokens of ordinary text."""
    with pytest.raises(LayerfuseError, match=r"lacks the image token '<picture>'.*'<image>'"):
        processor_of_template(image_token="<picture>")

    # the usual one is added to an LLM's tokenizer; a name that a user gives must be there
    tiny.tokenizer(image=False).save_pretrained(tmp_path)
    assert "<image>" in load_tokenizer(str(tmp_path)).get_vocab()
    tokenizer = load_tokenizer(str(tmp_path), "<pic>")
    with pytest.raises(LayerfuseError, match="lacks the image token"):
        Processor(tiny.image_processor(), tokenizer, image_token="<pic>")


def test_adding_the_image_token_keeps_the_other_special_tokens(tmp_path: Path) -> None:
    before = tiny.tokenizer(image=False)
    before.save_pretrained(tmp_path)

    after = load_tokenizer(str(tmp_path))

    assert set(before.all_special_tokens) <= set(after.all_special_tokens)
    # behind all others: no token may get another id
    assert after.convert_tokens_to_ids("<image>") == len(before)


def test_a_template_that_refuses_a_role_is_a_clear_error() -> None:
    processor = processor_of_template(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    talk = [{"role": "system", "content": "Be brief."}, *TALK]

    message = r"refuses the roles \['system', 'user'.*no system role"
    with pytest.raises(LayerfuseError, match=message):
        processor.encode(talk, [16])


@pytest.mark.parametrize("mistake", ["{{ 1 / 0 }}", "{{ 'a' + 1 }}"])
def test_a_template_that_computes_nonsense_is_a_clear_error(mistake: str) -> None:
    """Such errors are Python's own, not the template library's."""
    processor = processor_of_template(tiny.CHAT_TEMPLATE + mistake)

    with pytest.raises(LayerfuseError, match="the chat template refuses the roles"):
        processor.encode(TALK, [16])
    with pytest.raises(LayerfuseError, match="the chat template refuses the roles"):
        processor.apply_chat_template([{"role": "user", "content": "Why?"}])


@pytest.mark.parametrize("call", ["strftime_now ('%d %b %Y')", 'strftime_now( "%d %b %Y" )'])
def test_a_date_in_the_template_is_the_same_on_every_day(tmp_path: Path, call: str) -> None:
    """Llama 3's template writes the day on which it is rendered."""
    date = "{% if strftime_now is defined %}{% set day = " + call + " %}{% endif %}"
    processor = processor_of_template(date + "Today: {{ day }}\n" + tiny.CHAT_TEMPLATE)
    assert processor.chat.prompt(TALK[:1]).startswith("Today: 26 Jul 2024\n<|user|>")

    # the template is saved like that: programs without layerfuse ask as training did
    processor.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert text.startswith("Today: 26 Jul 2024\n")


def test_a_date_under_another_name_is_refused() -> None:
    renamed = "{% set now = strftime_now %}{{ now('%S') }}"

    with pytest.raises(LayerfuseError, match="today's date"):
        processor_of_template(renamed + tiny.CHAT_TEMPLATE)


def test_a_date_whose_format_is_computed_is_refused() -> None:
    computed = "{% set day = '%d' %}{{ strftime_now(day + ' %b') }}"

    with pytest.raises(LayerfuseError, match=r"today's date .*strftime_now\(day \+ ' %b'\)"):
        processor_of_template(computed + tiny.CHAT_TEMPLATE)


def test_the_words_before_answers() -> None:
    processor = processor_of_template(template_with_end("</s>"))

    first, second = processor.chat.words_before_answers(TALK)

    assert first.before == "Q: ...</s>A: "
    assert second.before == "Q: ...</s>A: ...</s>Q: ...</s>A: "
    assert first.since_question == "</s>A: "
    assert second.since_question == "</s>A: "


def test_the_end_of_turn_is_labelled_behind_a_space() -> None:
    """Llama 2's template writes a space before the end of sequence."""
    processor = processor_of_template(
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
    )

    assert labelled_without_spaces(processor, TALK) == ["red </s>", "yes </s>"]
