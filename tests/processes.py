"""Processes that a test may kill, forked from one that has imported everything.

To import torch, transformers and layerfuse takes 6 s, a fork some milliseconds.
"""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

# A server that forks: this process has threads by now, whose locks no copy of it could open again.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.preloaded"])


def start(target: Callable[..., None], *args: Any) -> BaseProcess:
    """Start a process that calls a function.

    Args:
        target: a function of a module, which the process imports by its name.
        args: of the function.
    """
    process = FORKS.Process(
        target=_call,
        args=(dict(os.environ), target, *args),
    )
    process.start()
    return process


def _call(environment: dict[str, str], target: Callable[..., None], *args: Any) -> None:
    """Call the target in the environment of the test that starts it."""
    # The process that forks has the environment of the test that came first.
    os.environ.clear()
    os.environ.update(environment)
    target(*args)
