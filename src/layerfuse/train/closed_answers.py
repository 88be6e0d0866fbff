"""Closed sets of answers: the tokens that the answers of the training data are made of."""

from collections.abc import Mapping
from typing import Literal

from layerfuse.data.lazy_records import Samples
from layerfuse.data.sample import Sample
from layerfuse.model.processor import IGNORED, Processor
from layerfuse.recipe.schema import Recipe


def trained_answer_tokens(
    recipe: Recipe, samples: Mapping[str, Samples], processor: Processor
) -> set[int]:
    """The tokens that all stages of a recipe label: of answers, and their ends.

    Args:
        recipe: says how the stages write conversations.
        samples: of each stage, all usable.
        processor: of any arm: all label the same tokens.

    Returns:
        Token ids.
    """
    tokens: set[int] = set()
    for name, stage in recipe.stages.items():
        for sample in samples[name]:
            tokens |= labelled_tokens(sample, processor, stage.prompt)
    return tokens


def labelled_tokens(
    sample: Sample, processor: Processor, prompt: Literal["chat", "plain"]
) -> set[int]:
    """The tokens of a conversation that training compares.

    Args:
        sample: a conversation.
        processor: of any arm.
        prompt: how the conversation is written.

    Returns:
        Token ids.
    """
    # Which tokens are labelled does not depend on how many a picture has
    encoded = processor.encode(list(sample.messages), [1] * len(sample.pictures), prompt=prompt)
    labels = encoded["labels"]
    return {int(token) for token in labels[labels != IGNORED]}
