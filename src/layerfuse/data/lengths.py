"""How many tokens conversations become, and whether they keep to the limits of an LLM."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from layerfuse.data.lazy_records import Samples
from layerfuse.data.sample import Sample
from layerfuse.data.sample_sets import BadSample, BadSamples
from layerfuse.errors import LayerfuseError
from layerfuse.model.chat_template import written
from layerfuse.model.processor import IGNORED, Processor
from layerfuse.progress import Progress

PROGRESS_SAMPLES = 1000
"""Samples between two reports of the progress."""


def positions_of(text_config: PreTrainedConfig) -> int | None:
    """The tokens that an LLM can tell the places of; None where its configuration names no limit.

    Args:
        text_config: the LLM's.
    """
    # As a dictionary, because not every type of LLM has the setting.
    return text_config.to_dict().get("max_position_embeddings")


@dataclass(frozen=True)
class Limits:
    """What an encoded conversation must keep to."""

    image_tokens: int
    """of a picture, with the arm that makes the most"""
    positions: int | None
    """tokens that the LLM can tell the places of; None where its configuration names no limit"""


def _whole(sample: Sample) -> list[Sample]:
    """The sample itself."""
    return [sample]


class Lengths:
    """Encodes conversations as training does, and counts their tokens.

    Args:
        processor: of any arm; they differ in the number of image tokens alone.
        limits: what each conversation must keep to.
        progress: is told of the samples that are checked.
        phase: what the progress is called.
    """

    def __init__(
        self, processor: Processor, limits: Limits, progress: Progress, phase: str
    ) -> None:
        self.processor = processor
        self.limits = limits
        self.progress = progress
        self.phase = phase
        self.tokens: list[int] = []
        self.ends = processor.turn_ends.end_tokens()
        self.stop_tokens = torch.tensor([*self.ends.separate, *self.ends.merged])

    def measure(
        self,
        samples: Samples,
        *,
        prompt: Literal["chat", "plain"],
        max_length: int | None,
        room: int = 0,
        split: Callable[[Sample], Iterable[Sample]] = _whole,
    ) -> BadSamples:
        """Encode some samples.

        Args:
            samples: all readable.
            prompt: how they are encoded.
            max_length: tokens that are left of a longer one; None leaves all.
            room: tokens that must be left of the LLM's positions.
            split: what of a sample is encoded on its own, such as each of its questions.

        Returns:
            Those that cannot be encoded or are too long; the tokens of all others are kept.
        """
        bad = {}
        for done, (index, sample) in enumerate(zip(samples.order, samples, strict=True), start=1):
            try:
                lengths = []
                for part in split(sample):
                    lengths.append(self._length(part, prompt, max_length, room))
                # Only now: a later part may be bad.
                self.tokens.extend(lengths)
            except LayerfuseError as error:
                reason = f"sample {sample.id}: {error} {samples.place(index)}"
                bad[index] = BadSample(sample.id, reason)
            # Each report redraws a line, which takes longer than a sample does.
            if done % PROGRESS_SAMPLES == 0:
                self.progress(self.phase, done, len(samples))
        return bad

    def _refuse_early_end(self, sample: Sample, encoded: dict[str, Tensor]) -> None:
        """Raise LayerfuseError for an answer that holds what ends answers: generation would stop
        there."""
        labelled = encoded["labels"] != IGNORED
        # An answer's last token, which ends it, is followed by none that is learned.
        inside = encoded["input_ids"][:-1][labelled[:-1] & labelled[1:]]
        early = inside[torch.isin(inside, self.stop_tokens)]
        if len(early) > 0:
            self._refuse_end(self.processor.tokenizer.decode(early[:1]))
        for message in sample.messages:
            if message["role"] != "assistant":
                continue
            early_words = self.ends.early_stop(written(message["content"]).strip())
            if early_words:
                self._refuse_end(early_words)

    def _refuse_end(self, end: str) -> None:
        """Raise LayerfuseError for an answer that holds that end of a turn."""
        raise LayerfuseError(
            f"an answer holds {end!r}, at which the chat template ends a turn: a model would "
            "stop there. Give a `chat_template` that ends turns otherwise, such as with "
            "`{{ eos_token }}`, or another answer"
        )

    def _length(
        self,
        sample: Sample,
        prompt: Literal["chat", "plain"],
        max_length: int | None,
        room: int,
    ) -> int:
        """The tokens of a conversation before it is cut."""
        encode = partial(
            self.processor.encode,
            list(sample.messages),
            [self.limits.image_tokens] * len(sample.pictures),
            prompt=prompt,
        )
        encoded = encode()
        if prompt == "chat":
            self._refuse_early_end(sample, encoded)
        whole = len(encoded["input_ids"])
        remaining = whole
        if max_length is not None and whole > max_length:
            # Raises where the cut takes image tokens or all answers.
            remaining = len(encode(max_length=max_length)["input_ids"])
        positions = self.limits.positions
        if positions is not None and remaining + room > positions:
            need = f"{remaining} tokens"
            if room:
                need += f" and {room} for the answer (max_new_tokens)"
            raise LayerfuseError(
                f"{need}, but the LLM has {positions} positions (max_position_embeddings): "
                "shorten it, cut training to fewer tokens by `max_length`, or take fewer image "
                "tokens by `token_grid`"
            )
        return whole
