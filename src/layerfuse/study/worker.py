"""A process that does runs of a study, one after another, as another process tells it.

`python -m layerfuse.study.worker STUDY --threads N --replies FD [--module MODULE ...]` reads the
folders of runs from its standard input, a line of JSON each, and replies on a pipe in the same
way. It ends when its input ends: with the process that started it, however that one ends.
"""

import argparse
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import torch
from transformers.utils import logging as transformers_logging

from layerfuse.errors import LayerfuseError
from layerfuse.study.execute import LOG, OpenedStudy, open_study, run_arm

PROGRESS_SECONDS = 0.5
"""Within a phase, progress is told at most this often."""
STDOUT, STDERR = 1, 2


@dataclass(frozen=True)
class Reply:
    """What a worker tells of its run: how far it is, that it is done, or that it failed."""

    progress: tuple[str, int, int, str] | None = None
    """phase, units done, units in all, a remark"""
    seconds: float | None = None
    """that the finished run took"""
    failure: str | None = None
    """why the run failed"""
    is_user_error: bool = False
    """whether the user can mend the failure"""

    def to_line(self) -> str:
        """The reply as a line of JSON."""
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def from_line(cls, line: str) -> "Reply":
        """Read what `to_line` gave."""
        return cls(**json.loads(line))


class ProgressReplies:
    """Tells the progress of a run, each phase from its first step, but not every step.

    Args:
        replies: the pipe to the process that waits for them.
    """

    def __init__(self, replies: TextIO) -> None:
        self.replies = replies
        self.phase = ""
        self.told = 0.0

    def __call__(self, phase: str, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        # Steps of tiny models take milliseconds.
        if phase == self.phase and done < total and now - self.told < PROGRESS_SECONDS:
            return
        self.phase = phase
        self.told = now
        send(self.replies, Reply(progress=(phase, done, total, note)))


def send(replies: TextIO, reply: Reply) -> None:
    """Write a reply at once."""
    replies.write(reply.to_line())
    replies.flush()


def write_output_to(log: Path) -> None:
    """Let all that this process and its libraries print go to the end of a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, STDOUT)
    os.dup2(file, STDERR)
    os.close(file)


def work(study: Path, modules: Sequence[str], replies: TextIO) -> None:
    """Do the runs whose folders come in, until there are no more or one fails.

    Args:
        study: the study's folder.
        modules: what to import for user strategies.
        replies: the pipe to the process that sends the folders.
    """
    # Samples and the index of the features are read once for all runs.
    opened: OpenedStudy | None = None
    for line in sys.stdin:
        folder = json.loads(line)
        write_output_to(study / folder / LOG)
        started = time.perf_counter()
        try:
            if opened is None:
                opened = open_study(study, modules)
            run_arm(opened.job, opened.run_of(folder), ProgressReplies(replies))
        except Exception as error:
            # Whatever it is: the other runs go on, and the log keeps the traceback.
            traceback.print_exc()
            is_user_error = isinstance(error, LayerfuseError)
            message = str(error)
            if not is_user_error:
                message = f"{type(error).__name__}: {error}"
            send(replies, Reply(failure=message, is_user_error=is_user_error))
            # What a failure leaves in memory must not touch the next run: a new process does it.
            return
        send(replies, Reply(seconds=time.perf_counter() - started))


def main() -> None:
    """Be a worker."""
    parser = argparse.ArgumentParser(description="Do runs of a study as another process tells.")
    parser.add_argument("study", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--replies", type=int, required=True)
    parser.add_argument("--module", dest="modules", action="append", default=[])
    arguments = parser.parse_args()
    # Ctrl-C reaches all processes of a terminal: the one that started this one ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(arguments.threads)
    # The table shows the progress.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with open(arguments.replies, "w", encoding="utf-8") as replies:
        work(arguments.study, arguments.modules, replies)


if __name__ == "__main__":
    main()
