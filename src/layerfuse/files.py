"""Files that are written whole or not at all, and locks between processes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_text(file: Path, text: str) -> None:
    """Write a file, and its folder, so that whoever reads it finds the old text or the new."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(file.name + ".tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(file)


@contextmanager
def locked(file: Path, taken: Callable[[], Any]) -> Iterator[None]:
    """Inside, this process alone holds the lock; `taken` is called before it waits for another."""
    from filelock import FileLock, Timeout

    lock = FileLock(file)
    try:
        held = lock.acquire(blocking=False)
    except Timeout:
        taken()
        held = lock.acquire()
    with held:
        yield
