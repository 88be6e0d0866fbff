"""One model answers one question on the page: word by word, then what the answer rests on."""

import logging
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.answer import Answerer
from layerfuse.explain.contributions import contributions, stored_means
from layerfuse.explain.demo_explanation import (
    contributions_for_page,
    image_address,
    maps_for_page,
    weights_for_page,
    words_for_page,
)
from layerfuse.explain.demo_models import BrokenModel, ShownModel
from layerfuse.explain.demo_paths import without_paths
from layerfuse.explain.feature_maps import feature_maps
from layerfuse.explain.reading import EncodedPrompt, layer_weights, read
from layerfuse.explain.trace import trace_answer
from layerfuse.vision.picture import Picture

LONGEST_QUESTION = 500
"""in characters; what is longer is cut, and the page says so"""
MOST_TYPED = 10_000
"""characters that the browser sends; more could not be sent in one request"""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AnswerColumn:
    """What a model's column shows.

    Attributes:
        name: of the model.
        state: `idle`, `waiting`, `writing`, `explaining`, `done`, `stopped`, `refused` or `error`.
        question: that is answered.
        text: of the answer so far.
        error: what went wrong, for people.
        seen: what the answer rests on, as far as it is known: see `explain`.
    """

    name: str
    state: str
    question: str = ""
    text: str = ""
    error: str = ""
    seen: dict[str, Any] | None = None

    def for_page(self) -> dict[str, Any]:
        """The column as plain values."""
        return dict(vars(self))


def shortened(question: str) -> tuple[str, str]:
    """Cut a long question.

    Args:
        question: as it was typed.

    Returns:
        The question without spaces around it, of at most `LONGEST_QUESTION` characters, and what
        the page says of it; nothing where it was not cut.
    """
    whole = question.strip()
    if len(whole) <= LONGEST_QUESTION:
        return whole, ""
    length = f"{len(whole):,}"
    if len(question) >= MOST_TYPED:
        # The browser has cut it already.
        length = f"{MOST_TYPED:,} or more"
    notice = f"The question has {length} characters: only the first {LONGEST_QUESTION} were asked."
    return whole[:LONGEST_QUESTION].rstrip(), notice


def answer_column(
    model: ShownModel, picture: Picture, question: str, max_new_tokens: int
) -> Generator[AnswerColumn, None, None]:
    """Answer a question, column after column, and never raise: other columns go on.

    Args:
        model: that answers.
        picture: asked about.
        question: the question.
        max_new_tokens: longest answer, in tokens.

    Yields:
        The column whenever it has changed.
    """
    if isinstance(model, BrokenModel):
        yield AnswerColumn(model.name, "error", question, error=model.error)
        return
    shown = AnswerColumn(model.name, "writing", question)
    try:
        with closing(
            _answer(model.name, model.answerer, picture, question, max_new_tokens)
        ) as columns:
            for shown in columns:
                yield shown
    except LayerfuseError as error:
        yield AnswerColumn(model.name, "error", question, shown.text, without_paths(str(error)))
    # Whatever a model raises belongs into its column; the traceback goes to the terminal.
    except Exception as error:
        _log.exception("%s failed", model.name)
        reason = f"This model failed ({type(error).__name__}); the terminal says more."
        yield AnswerColumn(model.name, "error", question, shown.text, reason)


def _answer(
    name: str, answerer: Answerer, picture: Picture, question: str, max_new_tokens: int
) -> Generator[AnswerColumn, None, None]:
    """The columns of one answer, the last of which is complete."""
    began = time.perf_counter()
    reading = read(answerer, picture, question, max_new_tokens)
    text = ""
    tokens: list[int] = []
    # Closed when the page reads no further: the model stops then.
    with closing(answerer.stream_generated(reading.inputs(), max_new_tokens)) as words:
        for said in words:
            text = said.text
            tokens = said.tokens
            yield AnswerColumn(name, "writing", question, text)
    seconds = time.perf_counter() - began
    seen: dict[str, Any] = {"seconds": round(seconds, 2)}
    yield AnswerColumn(name, "explaining", question, text, seen=seen)
    for part in explain(answerer, reading, tokens):
        seen = {**seen, **part}
        yield AnswerColumn(name, "explaining", question, text, seen=seen)
    yield AnswerColumn(name, "done", question, text, seen=seen)


def explain(
    answerer: Answerer, reading: EncodedPrompt, tokens: list[int]
) -> Iterator[dict[str, Any]]:
    """What an answer rests on, the quick parts first.

    Args:
        answerer: that answered.
        reading: the question and its picture.
        tokens: of the answer.

    Yields:
        `picture` as the encoder saw it, `grid` and `words` with their attention; `maps` of layers
        and `weights` of those; then `contributions` of layers, and what they were replaced by.
    """
    generated = torch.tensor(tokens, dtype=torch.long, device=reading.prompt.device)
    trace = trace_answer(answerer, reading, generated=generated)
    yield {"picture": image_address(reading.picture, "JPEG"), **words_for_page(trace)}
    weights = layer_weights(reading, answerer.model.config.selection)
    yield {
        "maps": maps_for_page(feature_maps(answerer, reading)),
        "weights": weights_for_page(weights),
    }
    means = stored_means(answerer, reading)
    # The answers without each layer are not shown: one token of each is all that is generated.
    of_layers = contributions(answerer, reading, trace, means, max_new_tokens=1)
    yield {"contributions": contributions_for_page(of_layers), "means": means.source}
