"""The feature cache on disk, `$LAYERFUSE_HOME/features/<encoder, preprocessing>/<layer>/`.

Shards are written whole or not at all and never changed. Each is a safetensors file with one
layer's features of many pictures; its header names the pictures by digest and holds checksums of
them and of itself.
"""

import json
import logging
import os
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from layerfuse.errors import LayerfuseError
from layerfuse.files import locked
from layerfuse.paths import home

log = logging.getLogger(__name__)

MAPPED_SHARDS = 1024
"""Shards that one reader keeps mapped: more than a study of 100 GB has, fewer than a process may
map."""


class Pair(NamedTuple):
    """What the cache holds of one picture in one layer: patch tokens (N, D) and summary (D,)."""

    patches: Tensor
    summary: Tensor


@dataclass(frozen=True)
class Entry:
    """Where one picture's features of one layer are, and their checksum."""

    file: Path
    row: int
    checksum: int


class ShardReader:
    """Reads entries from shards, of which it keeps the last `MAPPED_SHARDS` mapped into memory.

    A copy, such as one for another process, starts without any mapped file.
    """

    def __init__(self) -> None:
        self._tensors_of = lru_cache(maxsize=MAPPED_SHARDS)(_map)

    def __reduce__(self) -> tuple[type["ShardReader"], tuple[()]]:
        # Mapped files cannot be sent to another process, which maps what it reads itself.
        return ShardReader, ()

    def read(self, entry: Entry, *, verify: bool = False) -> Pair:
        """The features of an entry, as views into the mapped file.

        Args:
            entry: where they are.
            verify: whether to compare them with their checksum.

        Returns:
            Patch tokens (N, D) and summary (D,).

        Raises:
            OSError: the file is missing, unreadable or, looked at with `verify`, damaged. Not for
                the user: the feature store encodes the picture again.
        """
        tensors = self._tensors_of(entry.file)
        # (pictures, N, D) -> (N, D) and (pictures, D) -> (D,), without copying.
        pair = Pair(tensors.patches[entry.row], tensors.summary[entry.row])
        if verify and checksum(pair) != entry.checksum:
            raise OSError(f"{entry.file} is damaged")
        return pair


def checksum(pair: Pair) -> int:
    """CRC-32 of type, shape and bytes of both tensors."""
    # The types and shapes are part of it: damage to the file's own header changes nothing else.
    kinds = [(tensor.dtype, tuple(tensor.shape)) for tensor in pair]
    total = zlib.crc32(str(kinds).encode())
    for tensor in pair:
        # Viewed as bytes because numpy has no bfloat16.
        content = tensor.contiguous().view(torch.uint8).numpy()
        total = zlib.crc32(content.data.cast("B"), total)
    return total


def _map(file: Path) -> Pair:
    """The stacked tensors of a shard: patch tokens (pictures, N, D), summaries (pictures, D)."""
    try:
        # Mapped, not read: processes of one machine share the pages, and only rows that are used
        # come from the disk.
        with safe_open(file, framework="pt") as shard:
            return Pair(shard.get_tensor("patches"), shard.get_tensor("summary"))
    except SafetensorError as error:
        raise OSError(f"cannot read {file}: {error}") from error


def write_shard(
    folder: Path,
    pairs: Mapping[str, Pair],
    grid: tuple[int, int],
    about: dict[str, Any],
) -> Path:
    """Write the features of pictures under a name later than those of all shards before it.

    Args:
        folder: the layer's folder, made if it is missing.
        pairs: the features by the picture's digest.
        grid: rows and columns of the patch tokens.
        about: what `show` says of the shard: encoder, layer, dtype.

    Returns:
        The file.

    Raises:
        LayerfuseError: the disk is full or the folder may not be written; nothing is left behind.
    """
    checksums = {digest: checksum(pair) for digest, pair in pairs.items()}
    content = json.dumps([checksums, grid, about])
    # A safetensors header holds text alone.
    header = {"content": content, "checksum": str(zlib.crc32(content.encode()))}
    tensors = {
        "patches": torch.stack([pair.patches for pair in pairs.values()]),
        "summary": torch.stack([pair.summary for pair in pairs.values()]),
    }
    # In the order of writing; the process makes the names of two at the same time differ.
    file = folder / f"{time.time_ns():020d}-{os.getpid()}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _save_whole(file, tensors, header)
    # safetensors reports a full disk as an error of its own.
    except (OSError, SafetensorError) as error:
        raise LayerfuseError(f"cannot write {file}: {error}") from error
    return file


def _save_whole(file: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """Write a safetensors file, so that no reader meets half of it."""
    unfinished = file.with_suffix(".tmp")
    try:
        save_file(tensors, unfinished, metadata=header)
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


class Header(NamedTuple):
    """What a shard holds, by the picture's digest, its token grid, and words about it."""

    entries: dict[str, Entry]
    grid: tuple[int, int]
    about: dict[str, Any]


def read_header(file: Path) -> Header:
    """The header of a shard, without its features.

    Raises:
        OSError: the file is missing, unreadable or its header is damaged. Not for the user: what
            the file held is encoded again.
    """
    try:
        # A slice knows its shape before any of it is read.
        with safe_open(file, framework="pt") as shard:
            metadata = shard.metadata() or {}
            num_patches = shard.get_slice("patches").get_shape()[0]
            num_summaries = shard.get_slice("summary").get_shape()[0]
    except SafetensorError as error:
        raise OSError(f"cannot read {file}: {error}") from error
    content = metadata.get("content", "")
    if str(zlib.crc32(content.encode())) != metadata.get("checksum"):
        raise OSError(f"the header of {file} is damaged")
    # In the order of `write_shard`.
    checksums, grid, about = json.loads(content)
    # Shapes are outside the checksummed content: they must agree with it.
    if not num_patches == num_summaries == len(checksums):
        raise OSError(f"the header of {file} is damaged")
    entries = {}
    for row, (digest, expected) in enumerate(checksums.items()):
        entries[digest] = Entry(file, row, expected)
    return Header(entries, (grid[0], grid[1]), about)


def shards_of(folder: Path) -> list[Path]:
    """The shards of a layer's folder, oldest first."""
    return sorted(folder.glob("*.safetensors"))


def features_home() -> Path:
    """Where the cache is."""
    return home() / "features"


def layer_folders(prefix: str = "") -> dict[str, Path]:
    """The layers' folders by their names, <encoder and preprocessing>/<layer>.

    Args:
        prefix: only folders whose name begins so.
    """
    root = features_home()
    folders = {}
    for folder in sorted(root.glob("*/*")):
        name = str(folder.relative_to(root))
        if folder.is_dir() and name.startswith(prefix):
            folders[name] = folder
    return folders


def locked_space(space: Path) -> AbstractContextManager[None]:
    """A lock inside which no other process writes what this encoder makes.

    Args:
        space: the folder of the encoder and preprocessing.
    """

    def tell() -> None:
        log.warning("waiting for another process that works on %s", space)

    return locked(space / ".lock", tell)


def describe() -> Iterator[str]:
    """The content of the cache.

    Yields:
        One line per layer (encoder, layer, token grid, dtype, pictures, size), then the sum.
    """
    total = 0
    for name, folder in layer_folders().items():
        digests: set[str] = set()
        content = "damaged; see `layerfuse cache verify`"
        for file in shards_of(folder):
            try:
                entries, grid, about = read_header(file)
            except OSError:
                # `verify` names damaged shards and removes them.
                continue
            # A set, because a repaired picture is in two shards.
            digests.update(entries)
            # The same in all shards of a folder, whose name is made from it.
            content = f"{about['encoder']}, layer {about['layer']}, {grid}, {about['dtype']}"
        size = _size(folder)
        total += size
        yield f"{name}  {content}: {len(digests):,} pictures, {size / 1e9:.2f} GB"
    if total:
        yield f"{total / 1e9:.2f} GB in {features_home()}"
    else:
        yield f"{features_home()} is empty"


def _size(folder: Path) -> int:
    """The bytes of a layer's shards."""
    return sum(file.stat().st_size for file in shards_of(folder))


def drop_damaged() -> Iterator[str]:
    """Read every entry; drop the damaged ones, and what killed writers left.

    What is dropped is encoded again when it is needed. Nothing is done beyond what is asked of the
    iterator: go through it to the end.

    Yields:
        One line per damaged file.

    Raises:
        LayerfuseError: what is intact of a damaged file cannot be written elsewhere; the file stays
            as it is.
    """
    for folder in layer_folders().values():
        with locked_space(folder.parent):
            # Whoever holds the lock is the only writer: these were left by a killed one.
            for unfinished in folder.glob("*.tmp"):
                unfinished.unlink()
            for file in shards_of(folder):
                loss = _drop_if_damaged(file)
                if loss is not None:
                    yield loss


def _drop_if_damaged(file: Path) -> str | None:
    """Move what is intact of a damaged shard into another one. Returns a line that says what was
    lost, None for an intact shard."""
    reader = ShardReader()
    header = Header({}, (0, 0), {})
    intact: dict[str, Pair] = {}
    try:
        header = read_header(file)
        for digest, entry in header.entries.items():
            # Not with `verify`, which would give up at the first damaged entry.
            pair = reader.read(entry)
            if checksum(pair) == entry.checksum:
                intact[digest] = pair
        if len(intact) == len(header.entries):
            return None
        # Written before the damaged file goes: a killed `verify` loses nothing.
        if intact:
            write_shard(file.parent, intact, header.grid, header.about)
    except OSError:
        intact = {}
    # 0 stands for a header that cannot be read: nobody knows how many entries there were.
    num_lost = len(header.entries) - len(intact)
    file.unlink()
    return f"{file}: {num_lost or 'all'} damaged, {len(intact)} kept"


def clear(name: str | None) -> int:
    """Remove the cache or a part of it.

    Args:
        name: the beginning of the names, as `show` says them, of the folders to remove; None
            removes everything.

    Returns:
        The bytes that were freed.

    Raises:
        LayerfuseError: nothing has that name, or a folder cannot be removed.
    """
    chosen = layer_folders(name or "")
    if name and not chosen:
        raise LayerfuseError(f"nothing in the cache is called {name!r}; see `layerfuse cache list`")
    freed = 0
    for folder in chosen.values():
        # Inside the lock: no other process writes into what is removed.
        with locked_space(folder.parent):
            freed += _size(folder)
            try:
                shutil.rmtree(folder)
            except OSError as error:
                raise LayerfuseError(f"cannot remove {folder}: {error}") from error
    return freed
