"""Files and folders that are written whole or not at all, and locks between processes."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml
from safetensors import SafetensorError

from layerfuse.errors import LayerfuseError


def write_text(file: Path, text: str) -> None:
    """Write a file, and its folder, so that whoever reads it finds the old text or the new.

    Args:
        file: is replaced if it exists.
        text: written as UTF-8.

    Raises:
        LayerfuseError: the disk is full or the folder may not be written.
    """
    unfinished = file.with_name(file.name + ".tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Renamed when it is complete: a rename replaces the old file at once.
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(file)
    except OSError as error:
        raise LayerfuseError(f"cannot write {file}: {error}") from error


def refuse_unwritable(folder: Path) -> None:
    """Find out before long work that its results could not be written.

    Args:
        folder: of the results; need not exist, and is not made.

    Raises:
        LayerfuseError: it is no folder, or may not be made or written.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise LayerfuseError(f"cannot write to {folder}: {place} is no folder that may be written")


def refuse_filled(folder: Path) -> None:
    """Raise LayerfuseError for a folder to be written that holds something already.

    Args:
        folder: may exist if it is empty. The current one is refused: a new folder takes its place,
            and whoever stands in the old one would see nothing.
    """
    if folder.resolve() == Path.cwd():
        raise LayerfuseError(
            f"{folder} is the current folder, which cannot be replaced: give another --output, "
            "such as a new folder in it"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LayerfuseError(f"{folder} is there already: remove it, or give another --output")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder that is there when all of it is written.

    Args:
        folder: may exist if it is empty.

    Yields:
        An empty folder beside it, to write into. It takes the folder's name at the end, and is
        removed after an error.

    Raises:
        LayerfuseError: the folder holds something, the disk is full, or it may not be written.
    """
    refuse_filled(folder)
    # a link to a folder is kept, and a name such as `a/..` has a last part
    folder = folder.resolve()
    # a name that nothing else has; what stands beside the folder is not ours
    unfinished = folder.with_name(f"{folder.name}.{uuid4().hex}.tmp")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        unfinished.replace(folder)
    # SafetensorError: weights that could not be written
    except (OSError, SafetensorError) as error:
        raise LayerfuseError(f"cannot write {folder}: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def locked(file: Path, before_waiting: Callable[[], None]) -> Iterator[None]:
    """A lock that one process holds at a time.

    Args:
        file: the lock, made if it is missing.
        before_waiting: called before this process waits for another that holds the lock; what it
            raises ends the wait.

    Raises:
        LayerfuseError: the file cannot be made.
    """
    from filelock import FileLock, Timeout

    # A lock of the operating system: it is free again when the process that held it was killed.
    lock = FileLock(file)
    try:
        held = lock.acquire(blocking=False)
    except Timeout:
        before_waiting()
        held = lock.acquire()
    # After Timeout, which is an OSError itself.
    except OSError as error:
        raise LayerfuseError(f"cannot lock {file}: {error}") from error
    with held:
        yield


# Any: YAML holds anything
def read_yaml(text: str) -> Any:
    """Read YAML, in which a key stands once in a mapping: of two, the first would be lost.

    Args:
        text: a document.

    Returns:
        Its content.

    Raises:
        YAMLError: it is not valid, or a key stands twice.
    """
    waiting = [yaml.compose(text, Loader=yaml.SafeLoader)]
    looked_at: set[int] = set()
    while waiting:
        node = waiting.pop()
        # What aliases repeat is one node at several places.
        if id(node) in looked_at or not isinstance(node, yaml.CollectionNode):
            continue
        looked_at.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
            continue
        keys: set[str] = set()
        for key, value in node.value:
            waiting.append(value)
            # Merges (`<<`) are mappings that give what is not said beside them.
            if not isinstance(key, yaml.ScalarNode) or key.tag.endswith(":merge"):
                continue
            if key.value in keys:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} stands twice in one mapping",
                    problem_mark=key.start_mark,
                )
            keys.add(key.value)
    return yaml.safe_load(text)
