"""Features of a frozen encoder: each picture encoded once, kept on disk, shared by all arms.

A layer's features are addressed by the picture's bytes, the preprocessing, and the weights and
settings of the encoder up to that layer. Pictures are encoded in batches fixed by their order, so
that a pass that was stopped and continued makes the same bits.
"""

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from layerfuse.data import feature_shards as shards
from layerfuse.data.feature_shards import Entry, Pair
from layerfuse.data.picture import Picture
from layerfuse.hardware import device
from layerfuse.vision.encoder import Encoder
from layerfuse.vision.features import Features

Progress = Callable[[int, int], None]
LIMIT_GB, DEFAULT_GB = "LAYERFUSE_CACHE_GB", "100"
SHARD_BYTES, SHARD_SECONDS = 2**28, 60  # when a shard is written: so large, or so late
AHEAD = 4096  # pictures that threads work on at once
DECODERS = 4  # processes that decode pictures while a GPU encodes others

log = logging.getLogger(__name__)


@dataclass
class FeatureStore:
    """Cached features of a set of pictures, looked up by picture.

    Every entry is checked when it is first read; a damaged one is encoded again. Holds no tensors:
    a copy for another process is small.
    """

    pictures: dict[str, Picture]
    """by name, in the order in which they are encoded"""
    digests: dict[str, str]
    layers: tuple[int, ...]
    grid: tuple[int, int]
    load: Callable[[], Encoder]
    image_processor: Any
    batch_size: int
    folders: dict[int, Path]
    entries: dict[int, dict[str, Entry]]
    bad: dict[str, str] = field(default_factory=dict)
    """pictures that cannot be decoded, with the reason"""

    def __post_init__(self) -> None:
        self.checked: set[tuple[int, str]] = set()
        self.mender: Encoder | None = None

    def features(self, pictures: Sequence[Picture]) -> Features:
        """The features of `pictures`, in that order. Raises OSError if they were removed."""
        pairs = [[self._pair(layer, picture.name) for picture in pictures] for layer in self.layers]
        patches = tuple(torch.stack([p for p, _ in own]) for own in pairs)
        summary = tuple(torch.stack([s for _, s in own]) for own in pairs)
        return Features(self.layers, patches, summary, self.grid)

    def restrict(self, layers: Iterable[int]) -> "FeatureStore":
        """The same pictures with only these layers, ascending."""
        return replace(self, layers=tuple(sorted(set(layers))))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "mender": None}

    def _pair(self, layer: int, name: str) -> Pair:
        digest = self.digests[name]
        if entry := self.entries[layer].get(digest):
            try:
                pair = entry.read(verify=(layer, digest) not in self.checked)
                self.checked.add((layer, digest))
                return pair
            except OSError as error:
                log.warning("%s", error)
        _index(self)  # other processes and `cache verify` put what is intact into later files
        if not self.folders[layer].is_dir():
            raise OSError(f"{self.folders[layer]} was removed while in use; start the study again")
        if self.entries[layer].get(digest) not in (None, entry):
            return self._pair(layer, name)
        return self._repair(layer, name)

    def _repair(self, layer: int, name: str) -> Pair:
        """Encode a damaged entry again, on the CPU, and keep it; in a batch as large as it was in,
        at the place where it was, so that the bits are the same."""
        log.warning("encoding %s again", name)
        self.mender = self.mender or self.load()
        digest = self.digests[name]
        place = list(self.digests.values()).index(digest)
        start = place - place % self.batch_size
        size = min(self.batch_size, len(self.digests) - start)
        with torch.inference_mode():
            features = self.mender(self.pixels([name])[0].repeat(size, 1, 1, 1))
        index = features.layers.index(layer)
        pair = features.patches[index][place - start], features.summary[index][place - start]
        with shards.alone(self.folders[layer].parent):
            self.write(layer, {digest: pair}, self.mender)
        return pair

    def pixels(self, names: Sequence[str]) -> tuple[Tensor, dict[str, str]]:
        """A batch's pixels, grey where a picture cannot be decoded, and those with the reason."""
        images, bad = [], {}
        for name in names:
            content = self.pictures[name].read()  # once: what is checked is decoded
            if sha256(content).hexdigest() != self.digests[name]:
                raise OSError(f"{name} changed while the study ran; start it again")
            try:
                images.append(Picture(name, partial(bytes, content)).open())
            except ValueError as error:
                bad[name] = str(error)
                images.append(Image.new("RGB", (64, 64)))
        return self.image_processor(images, return_tensors="pt")["pixel_values"], bad

    def missing(self, names: Sequence[str]) -> list[str]:
        """Those of the pictures without an entry in some layer."""
        own = self.entries.values()
        return [n for n in names if any(self.digests[n] not in found for found in own)]

    def write(self, layer: int, pairs: dict[str, Pair], encoder: Encoder) -> None:
        """Keep entries of a layer on disk."""
        if pairs:
            config, dtype = encoder.tower.config, str(encoder.tower.dtype)
            about = {"encoder": config.model_type, "layer": layer, "dtype": dtype}
            about |= {"width": config.hidden_size, "grid": list(self.grid)}
            file = shards.write_shard(self.folders[layer], pairs, self.grid, about)
            self.entries[layer].update(shards.read_header(file).entries)


def digests_of(
    pictures: Iterable[Picture], progress: Progress = lambda done, total: None
) -> dict[str, str]:
    """The SHA-256 of every picture's bytes, by its name."""
    distinct = {picture.name: picture for picture in pictures}
    digests: dict[str, str] = {}
    for name, digest in zip(distinct, in_threads(Picture.digest, distinct), strict=True):
        digests[name] = digest
        progress(len(digests), len(distinct))
    return digests


def in_threads(function: Callable[[Picture], Any], pictures: dict[str, Picture]) -> Iterator[Any]:
    """The results for all pictures, in their order."""
    given = list(pictures.values())
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(given), AHEAD):
            yield from pool.map(function, given[start : start + AHEAD])


def cached_features(
    load: Callable[[], Encoder],
    image_processor: Any,
    pictures: Iterable[Picture],
    *,
    digests: dict[str, str] | None = None,
    batch_size: int = 32,
    progress: Progress = lambda done, total: None,
) -> FeatureStore:
    """The features of all distinct pictures, from disk where they were computed before.

    `load` makes the encoder on the CPU (here, and where an entry must be repaired), `digests` are
    those of `digests_of` if they are known. Several processes may do this at once: one encodes,
    the others wait for it. Pictures that cannot be decoded are
    named in `bad`. Raises OSError if the features would exceed $LAYERFUSE_CACHE_GB (default 100) or
    the free disk space, or if a picture changes meanwhile.
    """
    encoder = load().to(device())
    own = encoder.digests()
    settings = json.dumps(image_processor.to_dict(), sort_keys=True, default=str)
    space = shards.features_home() / sha256((own[0] + settings).encode()).hexdigest()[:16]
    folders = {k: space / f"{k:02d}-{own[k][:12]}" for k in encoder.layers}
    distinct = {picture.name: picture for picture in pictures}
    known = digests or digests_of(distinct.values())
    layers, rest = encoder.layers, (load, image_processor, batch_size, folders, {})
    store = FeatureStore(distinct, {k: known[k] for k in distinct}, layers, (0, 0), *rest)
    space.mkdir(parents=True, exist_ok=True)
    with shards.alone(space):
        _index(store)
        _encode(store, encoder, progress)
    _index(store)
    return store


def _index(store: FeatureStore) -> None:
    """Find the entries of the store's pictures; later shards replace earlier ones."""
    wanted = set(store.digests.values())
    for layer, folder in store.folders.items():
        store.entries[layer] = {}
        for file in shards.shards_of(folder):
            try:
                header = shards.read_header(file)
            except OSError as error:
                log.warning("%s: what it held is encoded again", error)
                continue
            store.grid = header.grid
            store.entries[layer].update(
                {digest: entry for digest, entry in header.entries.items() if digest in wanted}
            )


@torch.inference_mode()
def _encode(store: FeatureStore, encoder: Encoder, progress: Progress) -> None:
    """Encode every batch in which an entry is missing, and write what is missing."""
    for stale in (file for folder in store.folders.values() for file in folder.glob("*.tmp")):
        stale.unlink()  # a killed writer's: whoever holds the lock is alone
    names, size = list(store.digests), store.batch_size
    every = [names[start : start + size] for start in range(0, len(names), size)]
    batches: Any = [batch for batch in every if store.missing(batch)]
    kept: dict[int, dict[str, Pair]] = {layer: {} for layer in store.layers}
    held, written = 0, time.monotonic()
    decode: Any = store.pixels
    workers = 0 if device().type == "cpu" else DECODERS
    pixels_of = DataLoader(batches, None, collate_fn=decode, num_workers=workers)
    for done, (batch, (pixels, bad)) in enumerate(zip(batches, pixels_of, strict=True), start=1):
        store.bad |= bad
        if new := [name for name in store.missing(batch) if name not in bad]:
            features = encoder(pixels.to(device())).to("cpu")
            store.grid = features.grid
            if not held:
                _check_space(store, features)
            for name in new:
                digest, at = store.digests[name], batch.index(name)
                for index, layer in enumerate(features.layers):
                    if digest not in store.entries[layer]:
                        pair = features.patches[index][at], features.summary[index][at]
                        held += kept[layer].setdefault(digest, pair)[0].nbytes
        progress(done, len(batches))
        late = time.monotonic() - written > SHARD_SECONDS or done == len(batches)
        if late or held >= SHARD_BYTES * len(kept):
            for layer, pairs in kept.items():
                store.write(layer, pairs, encoder)
                pairs.clear()
            held, written = 0, time.monotonic()


def _check_space(store: FeatureStore, features: Features) -> None:
    """Raise OSError, before anything is written, if the missing features will not fit."""
    each = (features.patches[0][0].nbytes + features.summary[0][0].nbytes) / 1e9
    digests = set(store.digests.values())
    need = each * sum(len(digests - own.keys()) for own in store.entries.values())
    root = shards.features_home()
    held = sum(file.stat().st_size for file in root.rglob("*.safetensors")) / 1e9
    given = os.environ.get(LIMIT_GB, DEFAULT_GB)
    if not re.fullmatch(r"\d+(\.\d+)?", given):
        raise ValueError(f"${LIMIT_GB} must be a number of GB, not {given!r}")
    free = shutil.disk_usage(root).free / 1e9
    if held + need > float(given) or need > free:
        raise OSError(
            f"the missing features need {need:.3g} GB beside the {held:.3g} GB in {root}; "
            f"${LIMIT_GB} allows {given} GB and {free:.1f} GB of the disk are free. "
            "Raise the limit, run `layerfuse cache clear`, or set `cache_features: false`"
        )
