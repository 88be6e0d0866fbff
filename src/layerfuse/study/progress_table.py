"""The progress of a running study."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from layerfuse.study.plan import PlannedRun


class LiveTable(Progress):
    """One row per run with what it is doing, and one for the preparation; redrawn in place on a
    terminal, elsewhere (a log file) a line per event."""

    def __init__(self, runs: list[PlannedRun], console: Console) -> None:
        name, note = (TextColumn(f"{{task.{field}}}") for field in ("description", "fields[note]"))
        columns = (name, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), note)
        super().__init__(*columns, console=console, disable=not console.is_terminal)
        names = ("preparing", *(run.name for run in runs))
        self.rows = {row: self.add_task(row, start=False, total=None, note="") for row in names}
        self.phases: dict[str, str] = {}
        self.seconds: list[float] = []
        self.left = len(runs)

    def step(self, phase: str, done: int, total: int, note: str = "", run: str = "") -> None:
        """Progress of a phase of a run, or of the preparation."""
        row = self.rows[run or "preparing"]
        if self.phases.get(run) != phase:
            self.phases[run] = phase
            self.reset(row, total=total)
            self._say(f"{run}: {phase} ({total})" if run else f"{phase} ({total})")
        self.update(row, completed=done, total=total, note=f"{phase} {note}")

    def finish(self, run: PlannedRun, score: float, seconds: float | None) -> None:
        """Show a run's score; `seconds` is None for a run that was finished before."""
        self.left -= 1
        self.seconds += [] if seconds is None else [seconds]
        self.update(self.rows[run.name], completed=1, total=1, note=f"accuracy {score:.3f}")
        mean = sum(self.seconds) / max(len(self.seconds), 1)
        rest = f", about {self.left * mean / 60:.0f} min left" if self.left and mean else ""
        self._say(f"{run.name}: accuracy {score:.3f}{rest}")

    def _say(self, text: str) -> None:
        if self.disable:
            self.console.print(f"{time.strftime('%H:%M:%S')}  {text}", soft_wrap=True)
