"""Closed sets of answers: the tokens that the answers of the training data are made of."""

from collections.abc import Mapping
from typing import Literal

from layerfuse.data.lazy_records import Samples
from layerfuse.data.sample import Sample
from layerfuse.model.processor import IGNORED, Processor
from layerfuse.recipe.schema import Recipe


class ClosedAnswers:
    """The tokens that all stages of a recipe label: of answers, and their ends. They are the same
    in every run of a study, and are found once.

    Args:
        recipe: says how the stages write conversations.
        samples: of each stage, all usable. Not of a subset: arms of every size choose among the
            same answers.
    """

    def __init__(self, recipe: Recipe, samples: Mapping[str, Samples]) -> None:
        self.recipe = recipe
        self.samples = samples
        self._tokens: frozenset[int] | None = None

    def tokens(self, processor: Processor) -> frozenset[int]:
        """Their ids.

        Args:
            processor: of any arm: all label the same tokens.
        """
        if self._tokens is None:
            tokens: set[int] = set()
            for name, stage in self.recipe.stages.items():
                for sample in self.samples[name]:
                    tokens |= labelled_tokens(sample, processor, stage.prompt)
            self._tokens = frozenset(tokens)
        return self._tokens


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
