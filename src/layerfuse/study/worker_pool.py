"""Runs side by side on this machine: one process per share of it, kept for many runs.

A process of its own imports torch and transformers once, not once per run. What it has done before
does not change a run: each run draws from its own seed, and a process whose run failed is replaced.
"""

import json
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from typing import IO

from layerfuse.errors import LayerfuseError
from layerfuse.study.execute import (
    LOG,
    Job,
    RunFailures,
    TimedRun,
    die_with_parent,
    last_words,
)
from layerfuse.study.plan import PlannedRun
from layerfuse.study.progress_table import LiveTable
from layerfuse.study.side_by_side import MachineShare
from layerfuse.study.worker import Reply


@dataclass(frozen=True)
class Heard:
    """What came out of a worker's pipe."""

    worker: "Worker"
    reply: Reply | None
    """None: the worker has ended, and its pipe with it"""


class Worker:
    """A process that does one run after another, as the process that started it sees it.

    Args:
        job: the study.
        share: of the machine.
        run: its first.
        heard: gets its replies.
    """

    def __init__(
        self,
        job: Job,
        share: MachineShare,
        run: PlannedRun,
        heard: SimpleQueue[Heard],
    ) -> None:
        self.job = job
        self.share = share
        self.run: PlannedRun | None = run
        command = [sys.executable, "-m", "layerfuse.study.worker", str(job.study.resolve())]
        command.append(f"--threads={share.threads}")
        for module in job.modules:
            command.append(f"--module={module}")
        read_end, write_end = os.pipe()
        with self._empty_log(run) as log:
            self.process = subprocess.Popen(
                [*command, f"--replies={write_end}"],
                stdin=subprocess.PIPE,
                # Until its first run it has no file of its own to write to.
                stdout=log,
                stderr=log,
                pass_fds=[write_end],
                env=share.environment(),
                preexec_fn=die_with_parent,
                bufsize=0,
            )
        # Only the worker holds it open: the pipe ends with the worker.
        os.close(write_end)
        replies = os.fdopen(read_end, encoding="utf-8")
        Thread(target=self._listen, args=(replies, heard), daemon=True).start()
        self._tell(run)

    def begin(self, run: PlannedRun) -> None:
        """Start the next run."""
        self._empty_log(run).close()
        self.run = run
        self._tell(run)

    def finish(self) -> None:
        """Let the process end by itself, and wait for it."""
        self._input().close()
        self.process.wait()

    def kill(self) -> None:
        """End the process at once, if it has not ended yet."""
        self._input().close()
        self.process.kill()
        self.process.wait()

    def cause_of_death(self) -> str:
        """Why the process has ended within a run."""
        code = self.process.wait()
        if code == -signal.SIGKILL:
            return (
                "its process was killed, as the kernel does when memory runs out: lower "
                "`resources.arms_at_once`"
            )
        return f"its process ended with code {code}"

    def _empty_log(self, run: PlannedRun) -> IO[str]:
        log = self.job.study / run.folder / LOG
        log.parent.mkdir(parents=True, exist_ok=True)
        return log.open("w", encoding="utf-8")

    def _input(self) -> IO[bytes]:
        assert self.process.stdin is not None  # it is a pipe
        return self.process.stdin

    def _tell(self, run: PlannedRun) -> None:
        # If it has just ended, its end of the other pipe says so, too.
        with suppress(BrokenPipeError):
            self._input().write(json.dumps(run.folder).encode() + b"\n")

    def _listen(self, replies: IO[str], heard: SimpleQueue[Heard]) -> None:
        """Pass on what the process replies, in a thread of its own."""
        with replies:
            for line in replies:
                # A process that was killed may have written a part of its last reply.
                if line.endswith("\n"):
                    heard.put(Heard(self, Reply.from_line(line)))
        heard.put(Heard(self, None))


class WorkerPool:
    """The workers of a study, one for each share of the machine.

    Args:
        job: the study.
        todo: the runs to do.
        table: shows the progress.
    """

    def __init__(self, job: Job, todo: list[PlannedRun], table: LiveTable) -> None:
        self.job = job
        self.table = table
        self.waiting = deque(todo)
        self.heard: SimpleQueue[Heard] = SimpleQueue()
        self.failures = RunFailures(len(todo))
        self.workers: set[Worker] = set()

    def start(self, share: MachineShare) -> None:
        """Start a worker with the next run."""
        worker = Worker(self.job, share, self.waiting.popleft(), self.heard)
        self.workers.add(worker)

    def is_busy(self) -> bool:
        """Whether a run is being done or waits."""
        if self.waiting:
            return True
        return any(worker.run is not None for worker in self.workers)

    def next_event(self) -> TimedRun | None:
        """Wait for a worker's reply, and act on it.

        Returns:
            The run that it has finished; None for any other reply.
        """
        event = self.heard.get()
        if event.reply is None:
            self._replace(event.worker)
            return None
        return self._read(event.worker, event.reply)

    def kill(self) -> None:
        """End all workers at once."""
        for worker in self.workers:
            worker.kill()

    def finish(self) -> None:
        """Let all workers end by themselves: trackers may have curves to send."""
        for worker in self.workers:
            worker.finish()

    def _replace(self, worker: Worker) -> None:
        """Start a worker in the place of one that has ended."""
        self.workers.discard(worker)
        if worker.run is not None:
            self._fail(worker.run, _lost(self.job, worker.run, worker))
        worker.kill()
        if self.waiting:
            self.start(worker.share)

    def _read(self, worker: Worker, reply: Reply) -> TimedRun | None:
        """Act on what a worker says of its run."""
        run = worker.run
        if run is None:
            raise RuntimeError(f"a worker without a run replies {reply}")
        if reply.progress is not None:
            phase, done, total, note = reply.progress
            self.table.step(phase, done, total, note, run=run.name)
            return None
        worker.run = None
        if reply.seconds is None:
            # The worker ends now, and is replaced when that is heard of.
            self._fail(run, _failed(self.job, run, reply))
            return None
        if self.waiting:
            worker.begin(self.waiting.popleft())
        return TimedRun(run, reply.seconds)

    def _fail(self, run: PlannedRun, error: Exception) -> None:
        self.failures.add(run, error)
        self.table.fail(run.name, str(error))


def run_side_by_side(
    job: Job,
    todo: list[PlannedRun],
    table: LiveTable,
    divided: Sequence[MachineShare],
) -> Iterator[TimedRun]:
    """As many runs at once as there are shares of this machine, each in a process of its own.

    The processes end with this one, whatever ends it (Linux; elsewhere each ends its run first).

    Args:
        job: the study.
        todo: the runs to do.
        table: shows the progress.
        divided: the shares, not more than runs.

    Yields:
        Every run as soon as it is done.

    Raises:
        LayerfuseError: with the first failure, when all other runs are done, if the user can mend
            all of them.
        RuntimeError: with the first failure that the user cannot mend, and where its log is.
    """
    pool = WorkerPool(job, todo, table)
    try:
        for share in divided:
            pool.start(share)
        while pool.is_busy():
            finished = pool.next_event()
            if finished is not None:
                yield finished
        pool.finish()
    finally:
        pool.kill()
    pool.failures.raise_any()


def _lost(job: Job, run: PlannedRun, worker: Worker) -> Exception:
    """The error for a run whose process has died."""
    log = job.study / run.folder / LOG
    words = "\n".join(last_words(log))
    return RuntimeError(f"{worker.cause_of_death()}; the end of {log}:\n{words}")


def _failed(job: Job, run: PlannedRun, reply: Reply) -> Exception:
    """The error for a run that has failed in a process that could still say why."""
    if reply.is_user_error:
        return LayerfuseError(reply.failure)
    return RuntimeError(f"{reply.failure}; its traceback is in {job.study / run.folder / LOG}")
