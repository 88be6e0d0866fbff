"""Tokens as a model generates them: it works in a thread of its own, which is always joined."""

import atexit
import queue
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer


@dataclass(frozen=True)
class SaidSoFar:
    """An answer while it is written.

    Attributes:
        text: of the answer so far, without spaces around it.
        tokens: generated so far, with those that end the turn.
    """

    text: str
    tokens: list[int]


class _Handover(BaseStreamer):
    """Puts what `generate` gives it into a queue.

    Args:
        waiting: gets the tokens of every step.
    """

    def __init__(self, waiting: "queue.Queue[list[int] | None]") -> None:
        self.waiting = waiting
        self.has_prompt = False

    # transformers types neither method
    def put(self, value: Tensor) -> None:
        """Take the prompt, which comes first and is no answer, or the tokens of a step."""
        if not self.has_prompt:
            self.has_prompt = True
            return
        # Any: torch does not type lists of a tensor's values
        tokens: Any = value.reshape(-1)
        self.waiting.put(tokens.tolist())

    def end(self) -> None:
        """Do nothing: the thread says when it is done, also after an error."""


class _Left(StoppingCriteria):
    """Stops generation when nobody reads on.

    Args:
        left: is set then.
    """

    def __init__(self, left: threading.Event) -> None:
        self.left = left

    # transformers asks for a verdict on every row, and declares other tensors than it gives
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_ids: Tensor, scores: Tensor, **kwargs: Any
    ) -> Tensor:
        """(rows,): whether each row is done."""
        done = input_ids.new_zeros(len(input_ids)).bool()
        return done | self.left.is_set()


def stream_tokens(
    generate: Callable[[BaseStreamer, StoppingCriteriaList], object],
) -> Generator[list[int], None, None]:
    """Run generation of one row in a thread, and give its tokens as they come.

    Args:
        generate: generates with this streamer and these further criteria.

    Yields:
        All tokens of the answer so far, after every step.

    Raises:
        Exception: whatever `generate` raised, here instead of in its thread.
    """
    waiting: queue.Queue[list[int] | None] = queue.Queue()
    left = threading.Event()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            generate(_Handover(waiting), StoppingCriteriaList([_Left(left)]))
        # Kept for the reader, who raises it: a thread's own errors go nowhere.
        except BaseException as error:
            errors.append(error)
        finally:
            waiting.put(None)

    # A daemon: a process that is told to end does not wait for the rest of an answer.
    thread = threading.Thread(target=work, name="layerfuse-answer", daemon=True)

    def leave() -> None:
        """Stop the model at its next token, and wait for that."""
        left.set()
        thread.join()

    thread.start()
    # An answer that is read no further may be open when the process ends. Left to work on in torch
    # while Python goes, its thread would abort the process.
    atexit.register(leave)
    tokens: list[int] = []
    try:
        while True:
            step = waiting.get()
            if step is None:
                break
            tokens.extend(step)
            yield list(tokens)
    finally:
        leave()
        atexit.unregister(leave)
    if errors:
        raise errors[0]
