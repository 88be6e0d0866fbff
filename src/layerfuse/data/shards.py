"""Shards of the feature cache: a safetensors file with one layer's features of many pictures.

A shard is written whole or not at all and never changed. Its header names the pictures by digest
and holds a checksum of each one's features and of itself.
"""

import json
import os
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

Pair = tuple[Tensor, Tensor]
"""Patch tokens (N, D) and summary (D,) of one picture in one layer."""


@dataclass(frozen=True)
class Entry:
    """Where one picture's features of one layer are, and their checksum."""

    file: Path
    row: int
    checksum: int

    def read(self) -> Pair:
        """A view into the mapped file. Raises OSError if the file is missing or unreadable."""
        patches, summary = _map(self.file)
        return patches[self.row], summary[self.row]

    def is_intact(self, pair: Pair) -> bool:
        return checksum(pair) == self.checksum


def checksum(pair: Pair) -> int:
    """CRC-32 of the bytes of both tensors."""
    patches, summary = (x.contiguous().view(torch.uint8).numpy().data.cast("B") for x in pair)
    return zlib.crc32(summary, zlib.crc32(patches))


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
    """What a shard says of itself: places by the picture's digest, token grid, and for people the
    encoder, layer and dtype."""

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
