"""A conversation, processors of tiny tokenizers, and what of a conversation is labelled."""

from typing import Any

import torch

from layerfuse import Processor
from layerfuse.model.processor import IGNORED
from tests import tiny

TALK = [
    {"role": "user", "content": "<image>\nWhat colour?"},
    {"role": "assistant", "content": "red"},
    {"role": "user", "content": "Is red a colour? yes or no"},
    {"role": "assistant", "content": "yes"},
]
"""two turns, the first with an image; the second question holds its answer"""


def processor_of_template(template: str | None = tiny.CHAT_TEMPLATE, **options: Any) -> Processor:
    """A processor whose tokenizer has that chat template."""
    return processor_of_tokenizer(tiny.tokenizer(template), **options)


# Any: tokenizers of transformers share no type that says what they have
def processor_of_tokenizer(tokenizer: Any, **options: Any) -> Processor:
    """A processor for pictures of 4 × 4 patches with that tokenizer."""
    return Processor(
        tiny.image_processor(),
        tokenizer,
        patch_size=tiny.PATCH,
        **options,
    )


def template_with_end(end: str) -> str:
    """A chat template whose turns, of both roles, end with these characters."""
    return (
        "{% for m in messages %}{{ 'Q: ' if m.role == 'user' else 'A: ' }}{{ m.content }}"
        + end
        + "{% endfor %}"
    )


def labelled(processor: Processor, encoded: dict[str, torch.Tensor]) -> list[str]:
    """The labelled stretches of text."""
    stretches: list[list[int]] = []
    previous = IGNORED
    for label in encoded["labels"].tolist():
        if label != IGNORED:
            if previous == IGNORED:
                stretches.append([])
            stretches[-1].append(label)
        previous = label
    return [processor.tokenizer.decode(stretch) for stretch in stretches]


def labelled_without_spaces(processor: Processor, messages: list[dict[str, str]]) -> list[str]:
    """The same of a conversation with one image of 16 tokens, without spaces around each stretch:
    templates write them, and they belong to the answers."""
    encoded = processor.encode(messages, [16])
    return [stretch.strip(" ") for stretch in labelled(processor, encoded)]
