"""Run a study several times in forked processes that are killed at random moments, on a full disk,
and undisturbed.

Arguments: recipe, folder of the undisturbed study (the others are beside it), seed, number of
killed ones. Prints folder, exit code and what was going on for each process that was disturbed.
"""

import os
import random
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from rich.console import Console

from layerfuse.study.coordinate import study
from layerfuse.study.progress_table import LiveTable


def attempt(recipe: str, folder: Path, home: Path, delay: float | None, limit: int | None) -> int:
    """The wait status of a child that runs the study, and is killed after `delay` seconds or may
    not write a file of more than `limit` bytes."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    os.environ["LAYERFUSE_HOME"] = str(home)
    torch.set_num_threads(1)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if delay is not None:
        timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    with open(os.devnull, "w") as nowhere:
        study(recipe, output=folder, console=Console(file=nowhere))
    os._exit(0)


def watched(
    self: LiveTable, phase: str, done: int, total: int, note: str = "", run: str = ""
) -> None:
    Path(sys.argv[2] + ".phase").write_text(f"{run} {phase} {done}/{total}")


def disturb(recipe: str, folder: Path, delays: list[float | None], limit: int | None) -> None:
    """Run a study until it gets through, killed after each of the delays."""
    home = folder.with_suffix(".home")
    for delay in delays:
        status = os.waitstatus_to_exitcode(attempt(recipe, folder, home, delay, limit))
        print(folder.name, status, Path(sys.argv[2] + ".phase").read_text())
    if attempt(recipe, folder, home, None, None):
        sys.exit(f"{folder.name} did not get through")


if __name__ == "__main__":
    recipe, whole = sys.argv[1], Path(sys.argv[2])
    draw, rounds = random.Random(int(sys.argv[3])), int(sys.argv[4])
    LiveTable.step = watched
    started = time.monotonic()
    disturb(recipe, whole, [], None)
    length = time.monotonic() - started
    disturb(recipe, whole.with_name("full"), [None], 30_000)  # the disk is full
    for k in range(rounds):
        delays: list[float | None] = [draw.uniform(0, length), draw.uniform(0, length / 2)]
        disturb(recipe, whole.with_name(f"killed{k}"), delays, None)
