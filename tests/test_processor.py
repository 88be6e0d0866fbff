"""Chat templates, image tokens and labels: only answers are labelled, training equals inference."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from layerfuse import Processor
from layerfuse.errors import LayerfuseError
from layerfuse.model.pretrained import load_tokenizer
from layerfuse.model.processor import IGNORED
from tests import tiny

TEMPLATES = Path(__file__).parent.parent / "recipes" / "templates"
TALK = [
    {"role": "user", "content": "<image>\nWhat colour?"},
    {"role": "assistant", "content": "red"},
    {"role": "user", "content": "Is red a colour? yes or no"},
    {"role": "assistant", "content": "yes"},
]


def make(template: str | None = tiny.CHAT_TEMPLATE, **options: Any) -> Processor:
    return Processor(
        tiny.image_processor(), tiny.tokenizer(template), patch_size=tiny.PATCH, **options
    )


def labelled(processor: Processor, encoded: dict[str, torch.Tensor]) -> list[str]:
    """The labelled stretches of text."""
    runs: list[list[int]] = []
    previous = IGNORED
    for label in encoded["labels"].tolist():
        if label != IGNORED:
            if previous == IGNORED:
                runs.append([])
            runs[-1].append(label)
        previous = label
    return [processor.tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("template", ["tiny", "short.jinja", "vicuna_v1.jinja"])
def test_only_answers_and_their_end_are_labelled(template: str) -> None:
    text = tiny.CHAT_TEMPLATE if template == "tiny" else (TEMPLATES / template).read_text()
    processor = make(text)
    encoded = processor.encode(TALK, [16])
    assert [part.strip() for part in labelled(processor, encoded)] == ["red</s>", "yes</s>"]
    assert int((encoded["input_ids"] == tiny.IMAGE_ID).sum()) == 16
    is_labelled = encoded["labels"] != IGNORED
    assert torch.equal(encoded["labels"][is_labelled], encoded["input_ids"][is_labelled])


@pytest.mark.parametrize("template", ["tiny", "short.jinja", "vicuna_v1.jinja"])
def test_the_prompt_is_what_stands_before_the_answer_in_training(template: str) -> None:
    text = tiny.CHAT_TEMPLATE if template == "tiny" else (TEMPLATES / template).read_text()
    processor = make(text)
    encoded = processor.encode(TALK, [16])
    picture = Image.new("RGB", (tiny.SIZE, tiny.SIZE))
    asked = processor.inputs([TALK[:1], TALK[:3]], [picture, picture])
    for row, start in enumerate(_answer_starts(encoded["labels"])):
        prompt = asked["input_ids"][row][asked["attention_mask"][row].bool()]
        assert prompt.tolist() == encoded["input_ids"][:start].tolist()


def _answer_starts(labels: torch.Tensor) -> list[int]:
    is_labelled = (labels != IGNORED).tolist()
    return [i for i, now in enumerate(is_labelled) if now and not is_labelled[i - 1]]


def test_an_answer_that_also_stands_in_the_question_is_labelled_once() -> None:
    processor = make()
    talk = [{"role": "user", "content": "Say yes: yes"}, {"role": "assistant", "content": "yes"}]
    assert labelled(processor, processor.encode(talk, [])) == ["yes</s>"]


def test_plain_prompt_is_image_then_caption() -> None:
    processor = make()
    talk = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "a cat"}]
    encoded = processor.encode(talk, [4], prompt="plain")
    assert processor.tokenizer.decode(encoded["input_ids"]) == "<image>" * 4 + "a cat</s>"
    assert labelled(processor, encoded) == ["a cat</s>"]


@pytest.mark.parametrize(
    ("images", "max_length", "message"),
    [
        ([16, 16], None, "1 <image> markers, 2 images"),
        ([16], 10, "max_length 10 would cut image tokens"),
        ([16], 30, "no token is labelled"),
    ],
)
def test_unusable_conversations(images: list[int], max_length: int | None, message: str) -> None:
    with pytest.raises(LayerfuseError, match=message):
        make().encode(TALK, images, max_length=max_length)


def test_long_samples_are_cut_at_the_end() -> None:
    processor = make()
    whole = processor.encode(TALK, [16])
    cut = processor.encode(TALK, [16], max_length=len(whole["input_ids"]) - 3)
    assert torch.equal(cut["input_ids"], whole["input_ids"][:-3])


def test_batches_are_left_padded_and_mix_images_and_text() -> None:
    processor = make()
    picture = Image.new("RGB", (50, 20), "blue")
    rows = [
        [{"role": "user", "content": "<image><image>\nSame?"}],
        [{"role": "user", "content": "A rather long question without any picture?"}],
    ]
    batch = processor.inputs(rows, [picture, picture])
    assert batch["pixel_values"].shape == (2, 3, tiny.SIZE, tiny.SIZE)
    assert (batch["input_ids"] == tiny.IMAGE_ID).sum(dim=1).tolist() == [32, 0]
    shorter = int(batch["attention_mask"].sum(dim=1).argmin())
    assert batch["attention_mask"][shorter, 0] == 0
    assert bool(batch["attention_mask"][:, -1].all())


def test_token_grid_and_image_size_decide_the_number_of_tokens() -> None:
    assert make().num_image_tokens(32, 48) == 24
    assert make(token_grid=(2, 3)).num_image_tokens(32, 48) == 6


def test_save_and_load(tmp_path: Path) -> None:
    processor = make(token_grid=(2, 2), fusion={"name": "concat", "projector": "linear"})
    processor.save_pretrained(tmp_path)
    loaded = Processor.from_pretrained(tmp_path)
    for name in ("patch_size", "token_grid", "fusion", "image_token", "chat_template"):
        assert vars(loaded)[name] == vars(processor)[name], name
    assert loaded.encode(TALK, [4])["labels"].tolist() == (
        processor.encode(TALK, [4])["labels"].tolist()
    )


def test_an_llm_without_chat_template() -> None:
    with pytest.raises(LayerfuseError, match="has no chat template; pass `chat_template`"):
        make(None)
    assert make(None, chat_template=tiny.CHAT_TEMPLATE).chat_template == tiny.CHAT_TEMPLATE


def test_an_image_token_that_the_tokenizer_lacks(tmp_path: Path) -> None:
    with pytest.raises(LayerfuseError, match=r"lacks the image token '<picture>'.*'<image>'"):
        make(image_token="<picture>")
    tiny.tokenizer(image=False).save_pretrained(tmp_path)
    assert "<image>" in load_tokenizer(str(tmp_path)).get_vocab()
    with pytest.raises(LayerfuseError, match="lacks the image token"):
        Processor(
            tiny.image_processor(), load_tokenizer(str(tmp_path), "<pic>"), image_token="<pic>"
        )


LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
STRICT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{{ m.content }}{% endfor %}"
)


def test_the_end_of_turn_is_labelled_behind_a_space() -> None:
    processor = make(LLAMA_2)
    answers = labelled(processor, processor.encode(TALK, [16]))
    assert [part.strip() for part in answers] == ["red </s>", "yes </s>"]


def test_the_end_of_turn_is_labelled_when_it_is_an_added_token() -> None:
    from tokenizers import AddedToken

    tokenizer = tiny.tokenizer(tiny.CHAT_TEMPLATE.replace("</s>", "<end_of_turn>"))
    tokenizer.add_tokens([AddedToken("<end_of_turn>", special=True)], special_tokens=True)
    processor = Processor(tiny.image_processor(), tokenizer, patch_size=tiny.PATCH)
    answers = labelled(processor, processor.encode(TALK, [16]))
    assert answers == ["red<end_of_turn>", "yes<end_of_turn>"]


def test_adding_the_image_token_keeps_the_other_special_tokens(tmp_path: Path) -> None:
    before = tiny.tokenizer(image=False)
    before.save_pretrained(tmp_path)
    after = load_tokenizer(str(tmp_path))
    assert set(before.all_special_tokens) <= set(after.all_special_tokens)
    assert after.convert_tokens_to_ids("<image>") == len(before)


def test_a_template_that_refuses_a_role_is_a_clear_error() -> None:
    talk = [{"role": "system", "content": "Be brief."}, *TALK]
    message = r"refuses the roles \['system', 'user'.*no system role"
    with pytest.raises(LayerfuseError, match=message):
        make(STRICT).encode(talk, [16])


def test_an_answer_around_an_image_is_labelled_without_the_image() -> None:
    processor = make()
    talk = [
        {"role": "user", "content": "Show it"},
        {"role": "assistant", "content": "see <image> end"},
    ]
    assert labelled(processor, processor.encode(talk, [3])) == ["see ", " end</s>"]


def ended(end: str) -> str:
    """A template whose turns end so."""
    return (
        "{% for m in messages %}{{ 'Q: ' if m.role == 'user' else 'A: ' }}{{ m.content }}"
        + end
        + "{% endfor %}"
    )


@pytest.mark.parametrize(
    ("template", "added", "end"),
    [
        (tiny.CHAT_TEMPLATE, None, "</s>"),
        (ended("<|end|>\n"), AddedToken("<|end|>", special=True), "<|end|>"),
        (ended(" <|im_end|>"), AddedToken("<|im_end|>", special=True), " <|im_end|>"),
        # an end token that the tokenizer's makers forgot to call special
        (ended("<|end|>\n"), AddedToken("<|end|>", special=False), "<|end|>"),
        (ended("\n"), None, "\n"),
        (ended("\n\n"), None, "\n"),
        # of ordinary text the first token: generation can stop at one token alone
        (ended("###\n"), None, "#"),
        (ended(".</s>"), None, ".</s>"),
    ],
)
def test_answers_stop_where_training_ends_them(
    template: str, added: AddedToken | None, end: str
) -> None:
    tokenizer = tiny.tokenizer(template)
    if added is not None:
        tokenizer.add_tokens([added], special_tokens=added.special)
    processor = Processor(tiny.image_processor(), tokenizer, patch_size=tiny.PATCH)
    encoded = processor.encode(TALK, [16])
    assert [part.strip(" ") for part in labelled(processor, encoded)] == [f"red{end}", f"yes{end}"]
    last = int(encoded["labels"][encoded["labels"] != IGNORED][-1])
    settings = GenerationConfig(eos_token_id=[2, 7])
    processor.turn_ends.set_stop_tokens(settings)
    stops: Any = settings.eos_token_id
    assert stops[:2] == [2, 7]
    assert last in stops
    # decided once: asked again, nothing changes
    processor.turn_ends.set_stop_tokens(settings)
    assert settings.eos_token_id == stops
    # what comes after the end is none of the answer
    said = [*tokenizer("red")["input_ids"], last, *tokenizer("ddd")["input_ids"]]
    expected = "red." if end == ".</s>" else "red"
    if end == ".</s>":
        said.insert(3, tokenizer(".")["input_ids"][0])
    assert processor.turn_ends.answer_texts(torch.tensor([said])) == [expected]


def test_one_stop_token_stays_a_number() -> None:
    settings = GenerationConfig(eos_token_id=2)
    make().turn_ends.set_stop_tokens(settings)
    assert settings.eos_token_id == 2


def test_a_full_stop_that_merges_with_the_newline_stops_too() -> None:
    """Byte-pair tokenizers have tokens such as a full stop with a newline."""
    alphabet = ["<pad>", "<s>", "</s>", "<image>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {token: index for index, token in enumerate([*alphabet, ".\u010a"])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[(".", "\u010a")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )
    tokenizer.chat_template = ended("\n")
    processor = Processor(tiny.image_processor(), tokenizer, patch_size=tiny.PATCH)
    merged = vocabulary[".\u010a"]
    assert merged in processor.turn_ends.end_tokens().merged
    row = [*tokenizer("red")["input_ids"], merged, *tokenizer("no")["input_ids"]]
    assert processor.turn_ends.answer_texts(torch.tensor([row])) == ["red."]


def test_a_template_that_ends_no_turn_has_no_stop_token_of_its_own() -> None:
    processor = make("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert processor.turn_ends.end_tokens().separate == [2]
    assert processor.turn_ends.end_tokens().merged == []
    assert not processor.turn_ends.ends_answers()
    # what stands between turns alone ends no last turn
    between = (
        "{% for m in messages %}{{ m.content }}{% if not loop.last %}</s>{% endif %}{% endfor %}"
    )
    assert not make(between).turn_ends.ends_answers()
    assert make(ended("\n")).turn_ends.ends_answers()
    assert make().turn_ends.ends_answers()


@pytest.mark.parametrize("call", ["strftime_now ('%d %b %Y')", 'strftime_now( "%d %b %Y" )'])
def test_a_date_in_the_template_is_the_same_on_every_day(tmp_path: Path, call: str) -> None:
    """Llama 3's template writes the day on which it is rendered."""
    date = "{% if strftime_now is defined %}{% set day = " + call + " %}{% endif %}"
    processor = make(date + "Today: {{ day }}\n" + tiny.CHAT_TEMPLATE)
    assert processor.chat.prompt(TALK[:1]).startswith("Today: 26 Jul 2024\n<|user|>")
    # saved so: others that use the template ask as training did
    processor.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = loaded.apply_chat_template(TALK, tokenize=False)
    assert text.startswith("Today: 26 Jul 2024\n")


def test_a_date_whose_format_is_computed_is_refused() -> None:
    template = "{% set day = '%d' %}{{ strftime_now(day + ' %b') }}" + tiny.CHAT_TEMPLATE

    with pytest.raises(LayerfuseError, match=r"today's date .*strftime_now\(day \+ ' %b'\)"):
        make(template)


def test_the_words_before_answers() -> None:
    words = make(ended("</s>")).chat.words_before_answers(TALK)
    first = "Q: ...</s>A: "
    assert [w.before for w in words] == [first, f"{first}...</s>{first}"]
    assert [w.since_question for w in words] == ["</s>A: "] * 2
