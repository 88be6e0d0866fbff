"""Files that are written whole or not at all, and locks between processes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_text(file: Path, text: str) -> None:
    """Write a file, and its folder, so that whoever reads it finds the old text or the new.

    Args:
        file: is replaced if it exists.
        text: written as UTF-8.

    Raises:
        OSError: the disk is full or the folder may not be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(file.name + ".tmp")
    # Renamed when it is complete: a rename replaces the old file at once.
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(file)


@contextmanager
def locked(file: Path, taken: Callable[[], Any]) -> Iterator[None]:
    """A lock that one process holds at a time.

    Args:
        file: the lock, made if it is missing.
        taken: called before this process waits for another that holds the lock; what it raises
            ends the wait.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(file)
    try:
        held = lock.acquire(blocking=False)
    except Timeout:
        taken()
        held = lock.acquire()
    with held:
        yield
