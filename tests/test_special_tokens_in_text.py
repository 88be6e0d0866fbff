"""Names of special tokens that people write, such as `</s>`, are text: only the chat template's own
are special tokens."""

import json
import pickle
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from layerfuse import Processor
from layerfuse.model.processor import IGNORED
from tests import tiny

END = "</s>"
OTHER_END = "<|stop-of-another-tokenizer|>"
IMAGE_TOKENS = 3
TALK = [
    {"role": "system", "content": "Explain HTML; </s> is a tag."},
    {"role": "user", "content": "<image>\nIs <s>old</s> struck?"},
    {"role": "assistant", "content": "write </s>to end, </s> then more"},
    {"role": "user", "content": "</s>"},
    {"role": "assistant", "content": "<s></s>"},
]
# A template with an end token, one that begins with a token and one that trims what people write.
TEMPLATES = {
    "ends": (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    ),
    "begins": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}"
        "{{ eos_token }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    ),
    "trims": (
        "{% for m in messages %}{{ bos_token }}{{ m.role }}\n{{ m.content | trim }}"
        "{{ eos_token }}{% endfor %}"
    ),
}
KINDS = [
    "bytes",
    "bytes with a space before words",
    "a space before each stretch",
    "a space before the text",
    "a normalizer's space",
    "unigram",
]


def byte_level(specials: list[str], add_prefix_space: bool) -> Tokenizer:
    """One token a byte, and one for `</`, as merges make it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*specials, *alphabet, "</"])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[("<", "/")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    core.decoder = decoders.ByteLevel()
    return core


def characters() -> list[str]:
    """Of ASCII, with that of SentencePiece for spaces."""
    printable = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    return ["\u2581", "\n", *printable]


def sentencepiece(specials: list[str], prepend_scheme: str) -> Tokenizer:
    """One token a character, and one for `</`; a space may be put before words."""
    vocabulary = {token: index for index, token in enumerate([*specials, *characters(), "</"])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[("<", "/")]))
    if prepend_scheme == "normalizer":
        # as Llama 2's tokenizer was first converted
        core.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    core.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse()])
    return core


def unigram(specials: list[str]) -> Tokenizer:
    """Pieces with scores. The names of special tokens are pieces too, which text would become."""
    pieces = [(name, 0.0) for name in specials]
    pieces.extend((character, -1.0) for character in characters())
    core = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    core.decoder = decoders.Metaspace(prepend_scheme="never")
    return core


def make_tokenizer(kind: str, end: str = END, begin: str = "<s>") -> Any:
    """A tokenizer of transformers.

    Args:
        kind: one of `KINDS`.
        end: the name of its token 2, which ends turns.
        begin: the name of its token 1.
    """
    specials = ["<pad>", begin, end, "<image>"]
    if kind == "bytes":
        core = byte_level(specials, add_prefix_space=False)
    elif kind == "bytes with a space before words":
        core = byte_level(specials, add_prefix_space=True)
    elif kind == "a space before each stretch":
        core = sentencepiece(specials, "always")
    elif kind == "a space before the text":
        core = sentencepiece(specials, "first")
    elif kind == "a normalizer's space":
        core = sentencepiece(specials, "normalizer")
    else:
        core = unigram(specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=begin,
        eos_token=end,
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )


def make(kind: str, template: str = "ends", end: str = END, begin: str = "<s>") -> Processor:
    """A processor with such a tokenizer and one of `TEMPLATES`."""
    return Processor(
        tiny.image_processor(),
        make_tokenizer(kind, end, begin),
        patch_size=tiny.PATCH,
        chat_template=TEMPLATES[template],
    )


def make_reference(kind: str, template: str = "ends") -> Processor:
    """The same with other names of special tokens, to which `</s>` is text like any other."""
    return make(kind, template, end=OTHER_END, begin="<|start-of-another-tokenizer|>")


def labelled(encoded: dict[str, torch.Tensor]) -> list[list[int]]:
    """The labels of each answer."""
    runs: list[list[int]] = []
    previous = IGNORED
    for label in encoded["labels"].tolist():
        if label != IGNORED:
            if previous == IGNORED:
                runs.append([])
            runs[-1].append(label)
        previous = label
    return runs


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_training_is_that_of_a_tokenizer_to_which_the_names_are_text(
    kind: str, template: str
) -> None:
    encoded = make(kind, template).encode(TALK, [IMAGE_TOKENS])

    expected = make_reference(kind, template).encode(TALK, [IMAGE_TOKENS])
    assert encoded["input_ids"].tolist() == expected["input_ids"].tolist()
    assert encoded["labels"].tolist() == expected["labels"].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_plain_prompts_too(kind: str) -> None:
    encoded = make(kind).encode(TALK, [IMAGE_TOKENS], prompt="plain")

    expected = make_reference(kind).encode(TALK, [IMAGE_TOKENS], prompt="plain")
    assert encoded["input_ids"].tolist() == expected["input_ids"].tolist()
    assert encoded["labels"].tolist() == expected["labels"].tolist()


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_questions_too(kind: str, template: str) -> None:
    # rows of several lengths, one of them without any name
    rows = [TALK[:2], [{"role": "user", "content": "Nothing special?"}], TALK[:4]]

    asked = make(kind, template).text_inputs(rows, IMAGE_TOKENS)

    expected = make_reference(kind, template).text_inputs(rows, IMAGE_TOKENS)
    assert asked["input_ids"].tolist() == expected["input_ids"].tolist()
    assert asked["attention_mask"].tolist() == expected["attention_mask"].tolist()


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_questions_that_transformers_prepares_too(kind: str, template: str) -> None:
    processor = make(kind, template)
    rows = [
        [{"role": "user", "content": "Nothing special?"}],
        [{"role": "user", "content": "</s>"}],
    ]

    prepared = processor.apply_chat_template(
        rows,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )

    asked = processor.text_inputs(rows, IMAGE_TOKENS)
    assert prepared["input_ids"].tolist() == asked["input_ids"].tolist()
    assert prepared["attention_mask"].tolist() == asked["attention_mask"].tolist()


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_one_end_token_is_learned_an_answer(kind: str, template: str) -> None:
    """A model that learned those of people would stop where they wrote the name."""
    processor = make(kind, template)

    answers = labelled(processor.encode(TALK, [IMAGE_TOKENS]))

    assert [answer.count(2) for answer in answers] == [1, 1]
    assert [answer[-1] for answer in answers] == [2, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_the_decoded_answer_is_what_was_written(kind: str) -> None:
    processor = make(kind)

    answers = labelled(processor.encode(TALK, [IMAGE_TOKENS]))

    # the last `</s>` of each is the end token
    texts = [processor.tokenizer.decode(answer).strip() for answer in answers]
    assert texts == ["write </s>to end, </s> then more</s>", "<s></s></s>"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_may_say_the_name(kind: str) -> None:
    processor = make(kind)
    settings = GenerationConfig(eos_token_id=2)
    first, second = labelled(processor.encode(TALK, [IMAGE_TOKENS]))

    processor.turn_ends.set_stop_tokens(settings)
    said = [
        processor.turn_ends.answer_texts(torch.tensor([first])),
        processor.turn_ends.answer_texts(torch.tensor([second])),
    ]

    # no letter of the name became a token at which answers stop
    assert settings.eos_token_id == 2
    assert said == [["write </s>to end, </s> then more"], ["<s></s>"]]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_what_stands_before_the_answer_in_training(kind: str, template: str) -> None:
    processor = make(kind, template)
    encoded = processor.encode(TALK[:3], [IMAGE_TOKENS])

    asked = processor.text_inputs([TALK[:2]], IMAGE_TOKENS)

    # the first labelled token
    answer_start = int((encoded["labels"] != IGNORED).int().argmax())
    assert asked["input_ids"][0].tolist() == encoded["input_ids"][:answer_start].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_texts_without_names_have_the_tokens_of_the_tokenizer(kind: str) -> None:
    processor = make(kind)
    talk = [
        {"role": "user", "content": "What is < s > in </ s>?"},
        {"role": "assistant", "content": "text"},
    ]

    encoded = processor.encode(talk, [])

    # what the template writes, made tokens of by the tokenizer alone
    text = "<|user|>What is < s > in </ s>?\n<|assistant|>text</s>\n"
    expected = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert encoded["input_ids"].tolist() == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("option", ["lstrip", "rstrip", "single_word", "normalized"])
def test_special_tokens_that_take_more_or_less_than_their_name(kind: str, option: str) -> None:
    """Those that swallow the spaces around them would change the text beside the name."""
    options = {option: True}
    template = "{% for m in messages %}{{ m.content }} <|im_end|> {% endfor %}"
    ids = {}
    for name in ("<|im_end|>", OTHER_END):
        tokenizer = make_tokenizer(kind)
        added = AddedToken(name, special=True, **options)
        tokenizer.add_tokens([added], special_tokens=True)
        processor = Processor(
            tiny.image_processor(),
            tokenizer,
            patch_size=tiny.PATCH,
            chat_template=template.replace("<|im_end|>", name),
        )
        talk = [
            {"role": "user", "content": "two  <|im_end|>  spaces, x<|im_end|>y none"},
            {"role": "assistant", "content": "<|im_end|> "},
        ]
        ids[name] = processor.encode(talk, [])["input_ids"].tolist()

    assert ids["<|im_end|>"] == ids[OTHER_END]


@pytest.mark.parametrize("kind", ["a space before each stretch", "unigram"])
def test_characters_that_the_vocabulary_lacks_are_no_names(kind: str) -> None:
    """The token that stands for them is special, too, but no word begins behind it."""
    ids = {}
    for end in (END, OTHER_END):
        tokenizer = make_tokenizer(kind, end)
        settings = json.loads(tokenizer.backend_tokenizer.to_str())
        # token 0, which is special
        settings["model"]["unk_token"] = "<pad>"
        backend = Tokenizer.from_str(json.dumps(settings))
        processor = Processor(
            tiny.image_processor(),
            PreTrainedTokenizerFast(
                tokenizer_object=backend,
                eos_token=end,
                pad_token="<pad>",
                additional_special_tokens=["<image>"],
            ),
            patch_size=tiny.PATCH,
            chat_template="{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
        )
        talk = [
            {"role": "user", "content": "caf\u00e9</s>\u00e9b"},
            {"role": "assistant", "content": "\u00e9</s>"},
        ]
        ids[end] = processor.encode(talk, [])["input_ids"].tolist()

    assert ids[END] == ids[OTHER_END]
    # else the test would show nothing
    assert 0 in ids[END]


def test_a_name_that_begins_with_another_name() -> None:
    tokenizer = make_tokenizer("bytes")
    longer = AddedToken("</s>s", special=True)
    tokenizer.add_tokens([longer], special_tokens=True)
    processor = Processor(
        tiny.image_processor(),
        tokenizer,
        patch_size=tiny.PATCH,
        chat_template=TEMPLATES["ends"],
    )
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "</s>s and </s>"}]

    encoded = processor.encode(talk, [])

    (answer,) = labelled(encoded)
    assert answer.count(2) == 1
    assert tokenizer.convert_tokens_to_ids("</s>s") not in answer
    assert tokenizer.decode(answer) == "</s>s and </s></s>"


def test_tokens_that_are_added_but_not_special_stay_tokens() -> None:
    """Such as `<think>`, which belongs into what a model says."""
    tokenizer = make_tokenizer("bytes")
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    processor = Processor(
        tiny.image_processor(),
        tokenizer,
        patch_size=tiny.PATCH,
        chat_template=TEMPLATES["ends"],
    )
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "<think>a</s>b"}]

    (answer,) = labelled(processor.encode(talk, []))

    assert answer[0] == tokenizer.convert_tokens_to_ids("<think>")
    assert answer.count(2) == 1


def test_the_template_sees_texts_without_names_as_they_are() -> None:
    """One that asks for certain words, as templates for reasoning do, still finds them."""
    template = (
        "{% for m in messages %}{% if '</think>' in m.content %}"
        "{{ m.content.split('</think>')[1] }}"
        "{% else %}{{ m.content }}{% endif %}</s>{% endfor %}"
    )
    processor = Processor(
        tiny.image_processor(),
        make_tokenizer("bytes"),
        patch_size=tiny.PATCH,
        chat_template=template,
    )

    prompt = processor.chat.prompt([{"role": "user", "content": "hm</think>Is </s> text?"}])

    assert prompt == "Is </s> text?</s>"


def test_what_only_looks_like_a_stand_in_stays_as_it_is() -> None:
    """Private-use characters are those of icon fonts, too."""
    # the marks of answers, and stand-ins for names that the tokenizer does not have
    strange = "\ue000 \ue001 \ue0037\ue004 \ue00399\ue004"
    processor = make("bytes")
    talk = [{"role": "user", "content": strange}, {"role": "assistant", "content": strange}]

    encoded = processor.encode(talk, [])
    prompt = processor.chat.prompt(talk[:1])

    text = f"<|user|>{strange}\n<|assistant|>"
    assert processor.tokenizer.decode(encoded["input_ids"]) == text + strange + "</s>\n"
    assert prompt == text


def test_a_sample_is_cut_as_any_other() -> None:
    processor = make("bytes")
    whole = processor.encode(TALK, [IMAGE_TOKENS])

    cut = processor.encode(TALK, [IMAGE_TOKENS], max_length=len(whole["input_ids"]) - 4)

    assert cut["input_ids"].tolist() == whole["input_ids"][:-4].tolist()
    assert cut["labels"].tolist() == whole["labels"][:-4].tolist()


def test_the_tokenizer_itself_stays_as_it_was() -> None:
    processor = make("bytes")
    before = processor.tokenizer.backend_tokenizer.to_str()

    processor.encode(TALK, [IMAGE_TOKENS])

    assert processor.tokenizer.backend_tokenizer.to_str() == before
    # the rest of transformers still reads the name as the token
    assert processor.tokenizer("</s>")["input_ids"] == [2]


def test_a_processor_that_was_used_is_saved_and_loaded(tmp_path: Any) -> None:
    processor = make("a space before each stretch")
    encoded = processor.encode(TALK, [IMAGE_TOKENS])

    processor.save_pretrained(tmp_path)
    loaded: Any = Processor.from_pretrained(tmp_path)

    assert loaded.encode(TALK, [IMAGE_TOKENS])["input_ids"].tolist() == (
        encoded["input_ids"].tolist()
    )


def test_a_processor_that_was_used_goes_to_other_processes() -> None:
    """Loaders of batches pickle it."""
    processor = make("bytes")
    encoded = processor.encode(TALK, [IMAGE_TOKENS])

    copy = pickle.loads(pickle.dumps(processor))

    again = copy.encode(TALK, [IMAGE_TOKENS])
    assert again["input_ids"].tolist() == encoded["input_ids"].tolist()
