"""The feature cache on disk, `$LAYERFUSE_HOME/features/<encoder, preprocessing>/<layer>/`: shards
that are written whole or not at all and never changed, safetensors files with one layer's features
of many pictures. The header names the pictures by digest and holds checksums of them and itself.
"""

import json
import logging
import os
import shutil
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from layerfuse.files import locked
from layerfuse.paths import home

log = logging.getLogger(__name__)
Say = Callable[[str], None]
Pair = tuple[Tensor, Tensor]
"""Patch tokens (N, D) and summary (D,) of one picture in one layer."""


@dataclass(frozen=True)
class Entry:
    """Where one picture's features of one layer are, and their checksum."""

    file: Path
    row: int
    checksum: int

    def read(self, verify: bool = False) -> Pair:
        """A view into the mapped file. Raises OSError if it is missing, unreadable or, looked at
        with `verify`, damaged."""
        patches, summary = _map(self.file)
        pair = patches[self.row], summary[self.row]
        if verify and checksum(pair) != self.checksum:
            raise OSError(f"{self.file} is damaged")
        return pair


def checksum(pair: Pair) -> int:
    """CRC-32 of type, shape and bytes of both tensors."""
    shapes = str([(x.dtype, tuple(x.shape)) for x in pair]).encode()
    patches, summary = (x.contiguous().view(torch.uint8).numpy().data.cast("B") for x in pair)
    return zlib.crc32(summary, zlib.crc32(patches, zlib.crc32(shapes)))


@cache
def _map(file: Path) -> Pair:
    try:
        with safe_open(file, framework="pt") as shard:
            return shard.get_tensor("patches"), shard.get_tensor("summary")
    except SafetensorError as error:
        raise OSError(f"cannot read {file}: {error}") from error


def write_shard(
    folder: Path, pairs: Mapping[str, Pair], grid: tuple[int, int], about: dict[str, Any]
) -> Path:
    """Write the features of pictures, by digest, under a name later than those of all before it.

    Raises OSError (disk full, no permission) and leaves nothing behind.
    """
    content = json.dumps([{k: checksum(pair) for k, pair in pairs.items()}, grid, about])
    header = {"content": content, "checksum": str(zlib.crc32(content.encode()))}
    patches, summary = zip(*pairs.values(), strict=True)
    file = folder / f"{time.time_ns():020d}-{os.getpid()}.safetensors"
    unfinished = file.with_suffix(".tmp")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        tensors = {"patches": torch.stack(patches), "summary": torch.stack(summary)}
        save_file(tensors, unfinished, metadata=header)
        unfinished.replace(file)
    except SafetensorError as error:
        raise OSError(f"cannot write {file}: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)
    return file


class Header(NamedTuple):
    """What a shard holds, by the picture's digest, its token grid, and words about it."""

    entries: dict[str, Entry]
    grid: tuple[int, int]
    about: dict[str, Any]


def read_header(file: Path) -> Header:
    """The header of a shard, without its features. Raises OSError if it is damaged."""
    try:
        with safe_open(file, framework="pt") as shard:
            found = shard.metadata() or {}
            rows = [shard.get_slice(name).get_shape()[0] for name in ("patches", "summary")]
    except SafetensorError as error:
        raise OSError(f"cannot read {file}: {error}") from error
    content = found.get("content", "")
    intact = str(zlib.crc32(content.encode())) == found.get("checksum")
    checksums, grid, about = json.loads(content) if intact else ({}, (0, 0), {})
    if rows != 2 * [len(checksums)]:
        raise OSError(f"the header of {file} is damaged")
    entries = {k: Entry(file, row, own) for row, (k, own) in enumerate(checksums.items())}
    return Header(entries, (grid[0], grid[1]), about)


def shards_of(folder: Path) -> list[Path]:
    """The shards of a layer's folder, oldest first."""
    return sorted(folder.glob("*.safetensors"))


def features_home() -> Path:
    """Where the cache is."""
    return home() / "features"


def layer_folders(name: str = "") -> dict[str, Path]:
    """Every layer's folder by its name, <encoder and preprocessing>/<layer>, that begins so."""
    root = features_home()
    found = sorted(folder for folder in root.glob("*/*") if folder.is_dir())
    named = {str(folder.relative_to(root)): folder for folder in found}
    return {own: folder for own, folder in named.items() if own.startswith(name)}


def alone(space: Path) -> AbstractContextManager[None]:
    """Inside, no other process writes what this encoder makes."""
    wait = partial(log.warning, "waiting for another process that works on %s", space)
    return locked(space / ".lock", wait)


def show(say: Say) -> None:
    """One line per layer: encoder, layer, token grid, dtype, distinct pictures, size; the sum."""
    total = 0
    for name, folder in layer_folders().items():
        pictures: set[str] = set()
        what = "damaged; see `layerfuse cache verify`"
        for file in shards_of(folder):
            try:
                entries, grid, about = read_header(file)
            except OSError:
                continue  # `verify` names and removes it
            pictures |= set(entries)
            what = f"{about['encoder']}, layer {about['layer']}, {grid}, {about['dtype']}"
        size = _size(folder)
        total += size
        say(f"{name}  {what}: {len(pictures):,} pictures, {size / 1e9:.2f} GB")
    say(f"{total / 1e9:.2f} GB in {features_home()}" if total else f"{features_home()} is empty")


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in shards_of(folder))


def verify(say: Say) -> int:
    """Read every entry; drop the damaged ones, and what killed writers left. Returns the number of
    files that were mended; what is dropped is encoded again when it is needed."""
    mended = 0
    for folder in layer_folders().values():
        with alone(folder.parent):
            for stale in folder.glob("*.tmp"):
                stale.unlink()
            for file in shards_of(folder):
                entries, kept = {}, {}
                try:
                    entries, grid, about = read_header(file)
                    pairs = {digest: entry.read() for digest, entry in entries.items()}
                    kept = {k: x for k, x in pairs.items() if checksum(x) == entries[k].checksum}
                    if len(kept) == len(entries):
                        continue
                    if kept:
                        write_shard(folder, kept, grid, about)
                except OSError:
                    kept = {}
                mended += 1
                say(f"{file}: {len(entries) - len(kept) or 'all'} damaged, {len(kept)} kept")
                file.unlink()
    return mended


def clear(name: str | None) -> int:
    """Remove everything, or the folders whose name in `show` begins with `name`; the bytes freed.

    Raises ValueError if nothing has that name.
    """
    chosen = layer_folders(name or "")
    if name and not chosen:
        raise ValueError(f"nothing in the cache is called {name!r}; see `layerfuse cache list`")
    freed = 0
    for folder in chosen.values():
        with alone(folder.parent):
            freed += _size(folder)
            shutil.rmtree(folder)
    return freed
