"""The one protocol by which long work reports how far it is, and a bar that shows it."""

from typing import Protocol

from rich.console import Console
from rich.progress import MofNCompleteColumn, TaskID
from rich.progress import Progress as Bar


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


def progress_bar(console: Console) -> Bar:
    """Make a progress bar with a count and the time left.

    Args:
        console: where it is shown.

    Returns:
        The bar, to be entered as a context.
    """
    return Bar(
        *Bar.get_default_columns(),
        MofNCompleteColumn(),
        console=console,
    )


def shown_on(bar: Bar) -> Progress:
    """Show reported progress on a bar, a line for each phase.

    Args:
        bar: an entered progress bar.

    Returns:
        What long work calls as it advances.
    """
    tasks: dict[str, TaskID] = {}

    def show(phase: str, done: int, total: int, note: str = "") -> None:
        # The bar has no room for notes
        if phase not in tasks:
            tasks[phase] = bar.add_task(phase, total=total)
        bar.update(tasks[phase], completed=done)

    return show
