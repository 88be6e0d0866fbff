"""The one protocol by which long work reports how far it is."""

from typing import Protocol


class Progress(Protocol):
    """Called as long work advances; what it does with the numbers is the caller's business."""

    def __call__(self, phase: str, done: int, total: int, note: str = "") -> None:
        """Report one step.

        Args:
            phase: what is being done, such as `encoding pictures`.
            done: units finished so far, 0..total.
            total: units in this phase.
            note: a short remark, such as the current loss.
        """
        ...


def silent(phase: str, done: int, total: int, note: str = "") -> None:
    """Report nothing."""
