"""Features of a frozen encoder: each picture encoded once, kept on disk, shared by all arms.

A layer's features are addressed by the picture's bytes, the preprocessing, and the weights and
settings of the encoder up to that layer. Pictures are encoded in batches fixed by their order, so
that a pass that was stopped and continued makes the same bits.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from layerfuse.data import shards
from layerfuse.data.samples import Picture
from layerfuse.data.shards import Entry, Pair
from layerfuse.encoder import Encoder, Features

Progress = Callable[[int, int], None]
LIMIT_GB, DEFAULT_GB = "LAYERFUSE_CACHE_GB", "100"
SHARD_BYTES, SHARD_SECONDS = 2**28, 60  # when a shard is written: so large, or so late
DECODERS = 4  # processes that decode pictures while a GPU encodes others

log = logging.getLogger(__name__)


@dataclass
class FeatureStore:
    """Cached features of a set of pictures, looked up by picture.

    Every entry is checked when it is first read; a damaged one is encoded again. Holds no tensors:
    a copy for another process is small.
    """

    pictures: list[Picture]
    digests: list[str]
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
        self.rows = {picture.name: row for row, picture in enumerate(self.pictures)}
        self.checked: set[tuple[int, int]] = set()
        self.mender: Encoder | None = None

    def features(self, pictures: Sequence[Picture]) -> Features:
        """The features of `pictures`, in that order."""
        rows = [self.rows[picture.name] for picture in pictures]
        pairs = [[self._pair(layer, row) for row in rows] for layer in self.layers]
        patches = tuple(torch.stack([p for p, _ in own]) for own in pairs)
        summary = tuple(torch.stack([s for _, s in own]) for own in pairs)
        return Features(self.layers, patches, summary, self.grid)

    def restrict(self, layers: Iterable[int]) -> "FeatureStore":
        """The same pictures with only these layers, ascending."""
        return replace(self, layers=tuple(sorted(set(layers))))

    def _pair(self, layer: int, row: int) -> Pair:
        entry = self.entries[layer][self.digests[row]]
        try:
            pair = entry.read()
            intact = (layer, row) in self.checked or shards.checksum(pair) == entry.checksum
        except OSError:
            intact = False
        if not intact:
            pair = self._repair(layer, row)
        self.checked.add((layer, row))
        return pair

    def _repair(self, layer: int, row: int) -> Pair:
        """Encode the batch of a damaged entry again, on the CPU, and keep the entry."""
        picture, digest = self.pictures[row], self.digests[row]
        log.warning("the cached features of %s are damaged: encoding it again", picture.name)
        self.mender = self.mender or self.load().cpu()
        start = row - row % self.batch_size
        batch = range(start, min(start + self.batch_size, len(self.pictures)))
        with torch.inference_mode():
            features = self.mender(self.pixels(batch)[0])
        index = features.layers.index(layer)
        pairs = zip(features.patches[index], features.summary[index], strict=True)
        mended = dict(zip(self.digests[batch.start : batch.stop], pairs, strict=True))
        self.write(layer, mended, self.mender)
        return mended[digest]

    def pixels(self, batch: range) -> tuple[Tensor, dict[str, str]]:
        """A batch's pixels, grey where a picture cannot be decoded, and those with the reason."""
        images, bad = [], {}
        for row in batch:
            picture = self.pictures[row]
            held = Picture(picture.name, picture.read())
            if held.digest() != self.digests[row]:
                raise OSError(f"{picture.name} changed while the study ran; start it again")
            try:
                images.append(held.open())
            except ValueError as error:
                bad[picture.name] = str(error)
                images.append(Image.new("RGB", (64, 64)))
        return self.image_processor(images, return_tensors="pt")["pixel_values"], bad

    def missing(self, batch: range) -> list[int]:
        """The rows of a batch without an entry in some layer."""
        own = self.entries.values()
        return [row for row in batch if any(self.digests[row] not in found for found in own)]

    def write(self, layer: int, pairs: dict[str, Pair], encoder: Encoder) -> None:
        """Keep entries of a layer on disk."""
        if pairs:
            config = encoder.tower.config
            about = {"encoder": config.model_type, "layer": layer, "dtype": str(encoder.dtype)}
            about |= {"width": config.hidden_size, "grid": list(self.grid)}
            file = shards.write_shard(self.folders[layer], pairs, self.grid, about)
            self.entries[layer].update(shards.read_header(file).entries)


def cached_features(
    load: Callable[[], Encoder],
    image_processor: Any,
    pictures: Iterable[Picture],
    *,
    batch_size: int = 32,
    progress: Progress = lambda done, total: None,
) -> FeatureStore:
    """The features of all distinct pictures, from disk where they were computed before.

    `load` makes the encoder (here, and again where an entry must be repaired). Several processes
    may do this at once: one encodes, the others wait for it. Pictures that cannot be decoded are
    named in `bad`. Raises OSError if the features would exceed $LAYERFUSE_CACHE_GB (default 100) or
    the free disk space, or if a picture changes meanwhile.
    """
    distinct = list({picture.name: picture for picture in pictures}.values())
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(Picture.digest, distinct))
    encoder = load()
    own = encoder.digests()
    settings = json.dumps(image_processor.to_dict(), sort_keys=True, default=str)
    space = shards.features_home() / hashlib.sha256((own[0] + settings).encode()).hexdigest()[:16]
    folders = {k: space / f"{k:02d}-{own[k][:12]}" for k in encoder.layers}
    store = FeatureStore(
        distinct, digests, encoder.layers, (0, 0), load, image_processor, batch_size, folders, {}
    )
    space.mkdir(parents=True, exist_ok=True)
    with FileLock(space / ".lock"):
        _index(store)
        _encode(store, encoder, progress)
    _index(store)
    return store


def _index(store: FeatureStore) -> None:
    """Find the entries of the store's pictures; later shards replace earlier ones."""
    wanted = set(store.digests)
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
    device = next(encoder.parameters()).device
    for stale in (file for folder in store.folders.values() for file in folder.glob("*.tmp")):
        stale.unlink()  # a killed writer's: whoever holds the lock is alone
    count, size = len(store.pictures), store.batch_size
    every = [range(start, min(start + size, count)) for start in range(0, count, size)]
    batches: Any = [batch for batch in every if store.missing(batch)]
    kept: dict[int, dict[str, Pair]] = {layer: {} for layer in store.layers}
    written = time.monotonic()
    workers = 0 if device.type == "cpu" else DECODERS
    decode: Any = store.pixels
    pixels_of = DataLoader(batches, None, collate_fn=decode, num_workers=workers)
    for done, (batch, (pixels, bad)) in enumerate(zip(batches, pixels_of, strict=True)):
        store.bad |= bad
        features = encoder(pixels.to(device)).to("cpu")
        store.grid = features.grid
        if not done:
            _check_space(store, features)
        for row in store.missing(batch):
            if store.pictures[row].name in bad:
                continue
            for index, layer in enumerate(features.layers):
                if store.digests[row] not in store.entries[layer]:
                    at = row - batch.start
                    pair = features.patches[index][at], features.summary[index][at]
                    kept[layer].setdefault(store.digests[row], pair)
        progress(batch.stop, count)
        held = len(kept[store.layers[0]]) * features.patches[0][0].nbytes
        late = time.monotonic() - written > SHARD_SECONDS or done + 1 == len(batches)
        if late or held >= SHARD_BYTES:
            for layer, pairs in kept.items():
                store.write(layer, pairs, encoder)
                pairs.clear()
            written = time.monotonic()


def _check_space(store: FeatureStore, features: Features) -> None:
    """Raise OSError, before anything is written, if the missing features will not fit."""
    each = (features.patches[0][0].nbytes + features.summary[0][0].nbytes) / 1e9
    need = each * sum(len(set(store.digests) - own.keys()) for own in store.entries.values())
    root = shards.features_home()
    held = sum(file.stat().st_size for file in root.rglob("*.*")) / 1e9
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
