"""The live table of a running study."""

import time

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from layerfuse.study.arms import Run


class LiveTable:
    """One row per run with its state, and a progress bar of what goes on now.

    On a terminal it redraws in place; elsewhere (a log file) it prints a line per event.
    """

    def __init__(self, runs: list[Run], console: Console) -> None:
        self.console = console
        self.states: dict[str, str] = {run.name: "waiting" for run in runs}
        self.scores: dict[str, float] = {}
        self.seconds: list[float] = []
        count = ("{task.completed}/{task.total}", TimeRemainingColumn(), "{task.fields[note]}")
        self.bar = Progress("{task.description}", BarColumn(), *count, console=console)
        self.task = self.bar.add_task("preparing", total=None, note="")
        self.phase = ""
        self.live = Live(get_renderable=self._draw, console=console, refresh_per_second=4)

    def __enter__(self) -> "LiveTable":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.live.stop()

    def step(self, phase: str, done: int, total: int, note: str = "") -> None:
        """Progress of the current phase."""
        if phase != self.phase:
            self.phase = phase
            self.bar.reset(self.task, description=phase, total=total, completed=done, note=note)
            self._log(f"{phase} ({total})")
            return
        self.bar.update(self.task, completed=done, total=total)
        if note:
            self.bar.update(self.task, note=note)

    def start(self, run: Run) -> None:
        self.states[run.name] = "running"
        self.phase = ""

    def note(self, run: Run, text: str) -> None:
        """What a run elsewhere is doing."""
        self.states[run.name] = text

    def finish(self, run: Run, score: float, seconds: float | None) -> None:
        """Show a run's score; `seconds` is None for a run that was finished before."""
        self.states[run.name] = "done" if seconds is not None else "done before"
        self.scores[run.name] = score
        if seconds is not None:
            self.seconds.append(seconds)
        left = self._time_left()
        self._log(f"{run.name}: accuracy {score:.3f}" + (f", {left}" if left else ""))

    def _log(self, text: str) -> None:
        if not self.console.is_terminal:
            self.console.print(f"{time.strftime('%H:%M:%S')}  {text}", soft_wrap=True)

    def _time_left(self) -> str:
        left = sum(not state.startswith("done") for state in self.states.values())
        if not left or not self.seconds:
            return ""
        return f"about {left * sum(self.seconds) / len(self.seconds) / 60:.0f} min left"

    def _draw(self) -> Group:
        table = Table("arm", "state", "mean accuracy", box=None, padding=(0, 2))
        for name, state in self.states.items():
            score = f"{self.scores[name]:.3f}" if name in self.scores else ""
            table.add_row(name, state, score, style="dim" if state == "waiting" else None)
        return Group(table, self.bar, Text(self._time_left(), style="dim"))
