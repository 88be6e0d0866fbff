"""Where answers end: training labels an end, and generation stops there."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from layerfuse.model.processor import IGNORED
from tests import tiny
from tests.conversations import (
    TALK,
    labelled,
    labelled_without_spaces,
    processor_of_template,
    processor_of_tokenizer,
    template_with_end,
)

NEWLINE = "\u010a"
"""how byte-level tokenizers write a newline in their vocabulary"""


@dataclass(frozen=True)
class End:
    """How a chat template ends its turns, and what training and generation make of that.

    Attributes:
        template: the chat template.
        labelled: what is labelled behind the answer.
        added: a token that the tokenizer must get for this template.
        stop_text: the text at which generation stops, for an end of several tokens.
    """

    template: str
    labelled: str
    added: AddedToken | None = None
    stop_text: str | None = None


ENDS = [
    End(tiny.CHAT_TEMPLATE, labelled="</s>"),
    End(
        template_with_end("<|end|>\n"),
        labelled="<|end|>",
        added=AddedToken("<|end|>", special=True),
    ),
    End(
        template_with_end(" <|im_end|>"),
        labelled=" <|im_end|>",
        added=AddedToken("<|im_end|>", special=True),
    ),
    # an end token that the tokenizer's makers forgot to call special
    End(
        template_with_end("<|end|>\n"),
        labelled="<|end|>",
        added=AddedToken("<|end|>", special=False),
    ),
    End(template_with_end("\n"), labelled="\n"),
    # what the answer is not, before a token that ends it
    End(template_with_end("#</s>"), labelled="#</s>"),
    # several tokens of ordinary text
    End(template_with_end("\n\n"), labelled="\n\n", stop_text="\n\n"),
    End(template_with_end("###"), labelled="###", stop_text="###"),
    End(template_with_end("\n###\n"), labelled="\n###\n", stop_text="\n###\n"),
    End(template_with_end(" ### "), labelled=" ###", stop_text="###"),
    # the end token of another LLM
    End(template_with_end("<|im_end|>"), labelled="<|im_end|>", stop_text="<|im_end|>"),
]


@pytest.mark.parametrize("end", ENDS)
def test_answers_stop_where_training_ends_them(end: End) -> None:
    tokenizer = tiny.tokenizer(end.template)
    if end.added is not None:
        tokenizer.add_tokens([end.added], special_tokens=end.added.special)
    processor = processor_of_tokenizer(tokenizer)

    # training
    expected_labels = [f"red{end.labelled}", f"yes{end.labelled}"]
    assert labelled_without_spaces(processor, TALK) == expected_labels
    labels = processor.encode(TALK, [16])["labels"]
    last_label = int(labels[labels != IGNORED][-1])

    # generation: the LLM's own stop tokens stay, and come first
    settings = GenerationConfig(eos_token_id=[2, 7])
    processor.turn_ends.set_stop_tokens(settings)
    # Any: transformers' GenerationConfig declares no types
    stops: Any = settings.eos_token_id
    assert stops[:2] == [2, 7]
    if end.stop_text is None:
        assert last_label in stops
        assert settings.stop_strings is None
    else:
        # no token of the end alone may stop an answer that holds it
        assert stops == [2, 7]
        assert settings.stop_strings == [end.stop_text]
    # decided once: asked again, nothing changes
    processor.turn_ends.set_stop_tokens(settings)
    assert settings.eos_token_id == stops
    assert settings.stop_strings in (None, [end.stop_text])

    # rows of a batch go on until the longest has ended: what comes then is none of the answer
    generated = [*tokenizer(f"red{end.labelled}ddd")["input_ids"]]
    assert processor.turn_ends.answer_texts(torch.tensor([generated])) == ["red"]


@pytest.mark.parametrize("answer", ["# of 3", "C# and ##", "<"])
def test_a_part_of_an_end_is_an_answer_like_any_other(answer: str) -> None:
    processor = processor_of_template(template_with_end(" ###\n"))
    ends = processor.turn_ends.end_tokens()

    said = processor.tokenizer(f"{answer} ###\nQ: ")["input_ids"]

    assert ends.early_stop(answer) == ""
    assert processor.turn_ends.answer_texts(torch.tensor([said])) == [answer]


@pytest.mark.parametrize(
    ("answer", "early"),
    [
        ("a ### b", "###"),
        # the answer's last character would be taken for the first of the end
        ("C#", "#"),
    ],
)
def test_answers_at_which_generation_would_stop_early_are_known(answer: str, early: str) -> None:
    ends = processor_of_template(template_with_end("###")).turn_ends.end_tokens()

    assert ends.early_stop(answer) == early


def test_the_llms_own_stop_texts_stay() -> None:
    settings = GenerationConfig(stop_strings="END")

    processor_of_template(template_with_end("###")).turn_ends.set_stop_tokens(settings)

    assert settings.stop_strings == ["END", "###"]


def test_the_end_of_turn_is_labelled_when_it_is_an_added_token() -> None:
    tokenizer = tiny.tokenizer(tiny.CHAT_TEMPLATE.replace("</s>", "<end_of_turn>"))
    tokenizer.add_tokens([AddedToken("<end_of_turn>", special=True)], special_tokens=True)
    processor = processor_of_tokenizer(tokenizer)

    answers = labelled(processor, processor.encode(TALK, [16]))

    assert answers == ["red<end_of_turn>", "yes<end_of_turn>"]


def test_one_stop_token_stays_a_number() -> None:
    """transformers reads both, but other programs expect the number."""
    settings = GenerationConfig(eos_token_id=2)

    processor_of_template().turn_ends.set_stop_tokens(settings)

    assert settings.eos_token_id == 2


def test_a_full_stop_that_merges_with_the_newline_stops_too() -> None:
    """Byte-pair tokenizers have tokens such as a full stop with a newline."""
    special = ["<pad>", "<s>", "</s>", "<image>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*special, *alphabet, "." + NEWLINE]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[(".", NEWLINE)]))
    # with the regular expression, the newline would be split off before anything is merged
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )
    tokenizer.chat_template = template_with_end("\n")
    processor = processor_of_tokenizer(tokenizer)

    merged = vocabulary["." + NEWLINE]
    generated = [*tokenizer("red")["input_ids"], merged, *tokenizer("no")["input_ids"]]

    assert merged in processor.turn_ends.end_tokens().merged
    assert processor.turn_ends.answer_texts(torch.tensor([generated])) == ["red."]


def test_a_template_that_ends_no_turn_has_no_stop_token_of_its_own() -> None:
    """A model that is trained with it never learns to stop."""
    processor = processor_of_template("{% for m in messages %}{{ m.content }}{% endfor %}")

    assert processor.turn_ends.end_tokens().separate == [2]
    assert processor.turn_ends.end_tokens().merged == []
    assert not processor.turn_ends.ends_answers()


def test_a_template_ends_answers_where_it_ends_the_last_turn() -> None:
    between_turns_alone = processor_of_template(
        "{% for m in messages %}{{ m.content }}{% if not loop.last %}</s>{% endif %}{% endfor %}"
    )

    assert not between_turns_alone.turn_ends.ends_answers()
    assert processor_of_template(template_with_end("\n")).turn_ends.ends_answers()
    assert processor_of_template().turn_ends.ends_answers()
