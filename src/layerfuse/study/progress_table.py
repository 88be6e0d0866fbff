"""The progress of a running study."""

from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from layerfuse.progress import ProgressLines, duration

PREPARING = "preparing"


class LiveTable(Progress):
    """One row per run with what it is doing, and one for the preparation.

    Redrawn in place on a terminal; elsewhere, such as in a log file, a line per event, and every
    half minute for each run.

    Args:
        names: of the runs.
        console: where to draw.
    """

    def __init__(self, names: Sequence[str], console: Console) -> None:
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.rows = {}
        for name in [PREPARING, *names]:
            self.rows[name] = self.add_task(name, start=False, total=None, note="")
        self.lines = ProgressLines(console)
        self.phases: dict[str, str] = {}
        self.running: set[str] = set()
        self.seconds: list[float] = []
        self.num_left = len(names)

    def add_runs(self, names: Sequence[str]) -> None:
        """Add a row for each run that has none.

        Args:
            names: of runs.
        """
        for name in names:
            if name not in self.rows:
                self.rows[name] = self.add_task(name, start=False, total=None, note="")
                self.num_left += 1

    def step(
        self,
        phase: str,
        done: int,
        total: int,
        note: str = "",
        *,
        run: str = "",
    ) -> None:
        """Show progress.

        Args:
            phase: what is being done.
            done: units finished so far.
            total: units in this phase.
            note: a short remark, such as the current loss.
            run: the run's name; none for the preparation.
        """
        row = self.rows[run or PREPARING]
        if run:
            self.running.add(run)
        if self.phases.get(run) != phase:
            self.phases[run] = phase
            # A phase has a bar and a remaining time of its own.
            self.reset(row, total=total)
        if self.disable:
            self.lines.report(phase, done, total, note, job=run)
        self.update(row, completed=done, total=total, note=f"{phase} {note}")

    def note(self, run: str, text: str) -> None:
        """Show what a run in another process says of itself."""
        self.update(self.rows[run], note=text)

    def finish(
        self,
        run: str,
        score: float,
        seconds: float | None,
        log_likelihood: float | None = None,
    ) -> None:
        """Show a run's score.

        Args:
            run: the run's name.
            score: mean accuracy, 0..1.
            seconds: that the run took; None if it was finished before.
            log_likelihood: of the right answers, in nats a token; None if it was not measured.
        """
        self.num_left -= 1
        if seconds is not None:
            self.seconds.append(seconds)
        result = f"accuracy {score:.3f}"
        if log_likelihood is not None:
            result += f", log-likelihood {log_likelihood:.3f}"
        self.update(self.rows[run], completed=1, total=1, note=result)
        event = f"{run}: {result}"
        if self.num_left and self.seconds:
            mean_seconds = sum(self.seconds) / len(self.seconds)
            # Runs side by side end together.
            seconds_left = self.num_left * mean_seconds / max(1, len(self.running))
            event += f", {duration(seconds_left)} left"
        self.running.discard(run)
        self._say(event)

    def fail(self, run: str, reason: str) -> None:
        """Show that a run failed while others go on.

        Args:
            run: the run's name.
            reason: why; its first line is shown.
        """
        self.num_left -= 1
        self.running.discard(run)
        event = f"failed: {reason.splitlines()[0]}"
        self.update(self.rows[run], note=event)
        self._say(f"{run}: {event}")

    def _say(self, text: str) -> None:
        """Print an event where nothing is redrawn."""
        if self.disable:
            self.lines.say(text)
