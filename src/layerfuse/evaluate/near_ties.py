"""What is too close to call, so that answers do not depend on the batch.

A sum is rounded by the shape of what is computed together: by how many rows a batch has, how far
they are padded, how many threads share them, and whether features come from a cache. In bfloat16
that moves logits by a few roundings, and where the two likeliest tokens are nearer than that,
another batch would give another answer. Such a question is asked again by itself, with its own
picture and in one thread, so that nothing else shapes it.
"""

from collections.abc import Collection, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

ROUNDINGS = 4.0
"""How far a batch may move the difference of the two likeliest tokens, in roundings of the larger
of the highest logit and its distance from the mean. Measured in bfloat16: up to 2.5 with the first
two blocks of SmolLM2-135M, trained, and up to 1.0 with all thirty."""


def reach(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """How far the difference of two logits may move with the batch.

    Args:
        logits: (rows, vocabulary), in whatever type they are by now; minus infinity for tokens that
            cannot be said.
        dtype: in which the LLM computed them.

    Returns:
        (rows,).
    """
    highest = logits.amax(dim=-1)
    mean = logits.mean(dim=-1)
    if mean.isneginf().any():
        can_be_said = logits.isfinite()
        mean = logits.where(can_be_said, 0.0).sum(dim=-1) / can_be_said.sum(dim=-1)
    # All logits may lie below zero: softmax knows differences alone.
    size = torch.maximum(highest.abs(), highest - mean)
    return ROUNDINGS * torch.finfo(dtype).eps * size


class NearTies(LogitsProcessor):
    """Notes in which rows generation chose between two tokens that were too close to call.

    Args:
        dtype: in which the LLM computes logits.
        ends: tokens that end an answer, or pad a row behind it: what follows one is no choice.
    """

    def __init__(self, dtype: torch.dtype, ends: Collection[int]) -> None:
        self.dtype = dtype
        self.ends = torch.tensor(sorted(ends))
        self.ended: Tensor | None = None
        self.too_close: Tensor | None = None
        """(rows,), of all steps so far"""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        best, second = scores.topk(2).values.unbind(dim=-1)
        too_close = best - second <= reach(scores, self.dtype)
        if self.ended is None or self.too_close is None:
            # The last token is the prompt's.
            self.ended = torch.zeros_like(too_close)
            self.too_close = too_close
        else:
            self.ended = self.ended | torch.isin(input_ids[:, -1], self.ends.to(input_ids.device))
            self.too_close = self.too_close | (too_close & ~self.ended)
        return scores

    def rows(self) -> list[int]:
        """The places of those rows in the batch."""
        if self.too_close is None:
            return []
        # Any: torch does not type lists of a tensor's values
        places: Any = self.too_close.nonzero()[:, 0]
        return places.tolist()


@contextmanager
def by_itself() -> Generator[None, None, None]:
    """Compute in one thread: on a CPU their number rounds sums too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
