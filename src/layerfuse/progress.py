"""The one protocol by which long work reports how far it is, and what shows it.

On a terminal a bar is redrawn in place. Elsewhere, such as in a log file, a line appears when a
phase begins and every half minute.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console
from rich.progress import MofNCompleteColumn, TaskID
from rich.progress import Progress as Bar

LINE_SECONDS = 30.0
"""Between two lines of one phase, where nothing is redrawn."""


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


@dataclass
class _Phase:
    """What a job is doing, and how far it was when this was first and last shown."""

    name: str
    began: float
    done_at_first: int
    shown: float


class ProgressLines:
    """Progress as lines: what is done, how far it is, and the time left.

    Args:
        console: where they are printed.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.phases: dict[str, _Phase] = {}

    def report(
        self,
        phase: str,
        done: int,
        total: int,
        note: str = "",
        *,
        job: str = "",
    ) -> None:
        """Take one step into account, and print a line if one is due.

        Args:
            phase: what is being done.
            done: units finished so far.
            total: units in this phase.
            note: a short remark.
            job: one of several that are done at once; each has phases of its own.
        """
        now = time.monotonic()
        title = phase
        if job:
            title = f"{job}: {phase}"
        current = self.phases.get(job)
        if current is None or current.name != phase:
            self.phases[job] = _Phase(phase, now, done, shown=now)
            self.say(f"{title} ({total})")
            return
        if now - current.shown < LINE_SECONDS:
            return
        current.shown = now
        line = f"{title} {done}/{total}"
        # What a continued phase found done took no time now.
        done_now = done - current.done_at_first
        if done_now > 0:
            seconds_left = (now - current.began) / done_now * (total - done)
            line += f", {duration(seconds_left)} left"
        if note:
            line += f", {note}"
        self.say(line)

    def say(self, text: str) -> None:
        """Print a line with the time of day."""
        self.console.print(f"{time.strftime('%H:%M:%S')}  {text}", soft_wrap=True)


def duration(seconds: float) -> str:
    """A time to wait in words, such as `about 3 min`."""
    if seconds < 90:
        return f"about {seconds:.0f} s"
    if seconds < 90 * 60:
        return f"about {seconds / 60:.0f} min"
    return f"about {seconds / 3600:.1f} h"


@contextmanager
def shown_progress(console: Console) -> Iterator[Progress]:
    """Show reported progress while the context lasts, a bar or lines for each phase.

    Args:
        console: where it is shown.

    Yields:
        What long work calls as it advances.
    """
    if not console.is_terminal:
        yield ProgressLines(console).report
        return
    columns = [*Bar.get_default_columns(), MofNCompleteColumn()]
    with Bar(*columns, console=console) as bar:
        tasks: dict[str, TaskID] = {}

        def show(phase: str, done: int, total: int, note: str = "") -> None:
            # The bar has no room for notes
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=total)
            bar.update(tasks[phase], completed=done)

        yield show
