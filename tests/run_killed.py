"""Run a study in forked processes that die at random moments until one of them gets through.

Arguments: recipe, folder of an undisturbed study, folder of the disturbed one, seed, kills. Prints
what each attempt was doing when it died.
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

from layerfuse.study.live import LiveTable
from layerfuse.study.run import study


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


def watched(self: LiveTable, phase: str, done: int, total: int, note: str = "") -> None:
    Path(sys.argv[3] + ".phase").write_text(f"{phase} {done}/{total}")


if __name__ == "__main__":
    recipe, whole, disturbed = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    draw, kills = random.Random(int(sys.argv[4])), int(sys.argv[5])
    LiveTable.step = watched
    started = time.monotonic()
    if attempt(recipe, whole, whole.with_suffix(".home"), None, None):
        sys.exit("the undisturbed study failed")
    length = time.monotonic() - started
    home = disturbed.with_suffix(".home")
    failed = attempt(recipe, disturbed, home, None, 30_000)  # the disk is full
    print("disk full:", Path(sys.argv[3] + ".phase").read_text(), os.waitstatus_to_exitcode(failed))
    for _ in range(kills):
        status = attempt(recipe, disturbed, home, draw.uniform(0, length), None)
        print(
            "killed:", Path(sys.argv[3] + ".phase").read_text(), os.waitstatus_to_exitcode(status)
        )
    if attempt(recipe, disturbed, home, None, None):
        sys.exit("the study did not get through")
