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
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from layerfuse.data import feature_shards as shards
from layerfuse.data.feature_shards import Entry, Pair, ShardReader
from layerfuse.errors import LayerfuseError
from layerfuse.hardware import device
from layerfuse.progress import Progress, silent
from layerfuse.vision.encoder import Encoder
from layerfuse.vision.features import Features
from layerfuse.vision.picture import Picture

Result = TypeVar("Result")

LIMIT_GB = "LAYERFUSE_CACHE_GB"
DEFAULT_GB = "100"
SHARD_BYTES = 2**28
"""A shard is written when it is about this large."""
SHARD_SECONDS = 60
"""A shard is written after this time even if it is small: a stopped pass loses no more."""
AHEAD = 4096
"""Pictures that threads work on at once."""
DECODERS = 4
"""Processes that decode pictures while a GPU encodes others."""

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
    """of the pictures' bytes, by the picture's name"""
    layers: tuple[int, ...]
    grid: tuple[int, int]
    """rows and columns of the patch tokens"""
    load: Callable[[], Encoder]
    """makes the encoder on the CPU"""
    image_processor: Any  # of transformers, whose image processors share no typed base
    batch_size: int
    folders: dict[int, Path]
    """of each layer"""
    entries: dict[int, dict[str, Entry]]
    """by layer and the picture's digest"""
    bad: dict[str, str] = field(default_factory=dict)
    """pictures that cannot be decoded, with the reason"""

    def __post_init__(self) -> None:
        self.checked: set[tuple[int, str]] = set()
        self.reader = ShardReader()
        self.repair_encoder: Encoder | None = None

    def features(self, pictures: Sequence[Picture]) -> Features:
        """The features of pictures, from disk.

        Args:
            pictures: some of the store's, in any order, repeated or not.

        Returns:
            For each layer the patch tokens (pictures, N, D) and the summaries (pictures, D), in
            the order of `pictures`.

        Raises:
            LayerfuseError: the features were removed or a picture to repair changed meanwhile.
        """
        patches = []
        summaries = []
        for layer in self.layers:
            pairs = [self._pair(layer, picture.name) for picture in pictures]
            # Copied here out of the mapped files, into one tensor per layer.
            patches.append(torch.stack([pair.patches for pair in pairs]))
            summaries.append(torch.stack([pair.summary for pair in pairs]))
        return Features(self.layers, tuple(patches), tuple(summaries), self.grid)

    def restrict(self, layers: Iterable[int]) -> "FeatureStore":
        """The same pictures with only these layers, ascending."""
        return replace(self, layers=tuple(sorted(set(layers))))

    def __getstate__(self) -> dict[str, Any]:
        # The repair encoder is large, and another process loads its own if it needs one.
        return {**vars(self), "repair_encoder": None}

    def _pair(self, layer: int, name: str) -> Pair:
        """One picture's features of one layer, repaired if they are damaged."""
        digest = self.digests[name]
        entry = self.entries[layer].get(digest)
        if entry is not None:
            try:
                # Checksums cost as much as reading: once per entry and process is enough.
                verify = (layer, digest) not in self.checked
                pair = self.reader.read(entry, verify=verify)
                self.checked.add((layer, digest))
                return pair
            except OSError as error:
                log.warning("%s", error)
        # Other processes and `cache verify` put what is intact into later files.
        index_entries(self)
        if not self.folders[layer].is_dir():
            raise LayerfuseError(
                f"{self.folders[layer]} was removed while in use; start the study again"
            )
        later_entry = self.entries[layer].get(digest)
        if later_entry is not None and later_entry != entry:
            return self._pair(layer, name)
        return self._repair(layer, name)

    def _repair(self, layer: int, name: str) -> Pair:
        """Encode a damaged entry again, on the CPU, and keep it."""
        log.warning("encoding %s again", name)
        if self.repair_encoder is None:
            self.repair_encoder = self.load()
        # In a batch as large as it was in, at the place where it was: kernels round differently
        # for other sizes and places, and the bits must be the same.
        digest = self.digests[name]
        # Of two pictures with the same bytes the first was encoded.
        place = list(self.digests.values()).index(digest)
        row = place % self.batch_size
        start = place - row
        size = min(self.batch_size, len(self.digests) - start)
        pixels, _ = self.pixels([name])
        # (1, 3, height, width) -> (size, 3, height, width)
        with torch.inference_mode():
            features = self.repair_encoder(pixels[0].repeat(size, 1, 1, 1))
        index = features.layers.index(layer)
        pair = Pair(features.patches[index][row], features.summary[index][row])
        # Whoever holds the lock removes unfinished files, which would be those of this repair.
        with shards.locked_space(self.folders[layer].parent):
            self.write(layer, {digest: pair}, self.repair_encoder)
        return pair

    def pixels(self, names: Sequence[str]) -> tuple[Tensor, dict[str, str]]:
        """Decode and preprocess one batch.

        Args:
            names: of the batch's pictures.

        Returns:
            Pixels (pictures, 3, height, width), grey where a picture cannot be decoded, and the
            reason by the name of each such picture.

        Raises:
            LayerfuseError: a picture is missing or changed since its digest was taken.
        """
        images = []
        bad = {}
        for name in names:
            # Read once, so that the bytes that are checked are those that are decoded.
            content = self.pictures[name].read()
            if sha256(content).hexdigest() != self.digests[name]:
                raise LayerfuseError(f"{name} changed while the study ran; start it again")
            try:
                images.append(Picture(name, partial(bytes, content)).open())
            except LayerfuseError as error:
                bad[name] = str(error)
                # A place holder keeps the others at their places in the batch.
                images.append(Image.new("RGB", (64, 64)))
        inputs = self.image_processor(images, return_tensors="pt")
        return inputs["pixel_values"], bad

    def missing(self, names: Sequence[str]) -> list[str]:
        """Those of the pictures without an entry in some layer."""
        missing = []
        for name in names:
            digest = self.digests[name]
            if any(digest not in entries for entries in self.entries.values()):
                missing.append(name)
        return missing

    def write(self, layer: int, pairs: dict[str, Pair], encoder: Encoder) -> None:
        """Keep features of a layer on disk.

        Args:
            layer: of the encoder.
            pairs: the features by the picture's digest; nothing is written if there are none.
            encoder: what made them.

        Raises:
            LayerfuseError: the disk is full or the folder may not be written.
        """
        if not pairs:
            return
        about = {
            "encoder": encoder.tower.config.model_type,
            "layer": layer,
            "dtype": str(encoder.tower.dtype),
            "width": encoder.tower.config.hidden_size,
            "grid": list(self.grid),
        }
        file = shards.write_shard(self.folders[layer], pairs, self.grid, about)
        # Read back, so that memory knows what the file says and nothing else.
        self.entries[layer].update(shards.read_header(file).entries)


def digests_of(pictures: Iterable[Picture], progress: Progress = silent) -> dict[str, str]:
    """The SHA-256 of every picture's bytes, by its name.

    Args:
        pictures: any, repeated or not.
        progress: told of every picture.

    Raises:
        LayerfuseError: a picture is missing or cannot be read.
    """
    distinct = {picture.name: picture for picture in pictures}
    digests: dict[str, str] = {}
    # In threads because reading and hashing leave Python's global lock free.
    results = in_threads(Picture.digest, distinct)
    for name, digest in zip(distinct, results, strict=True):
        digests[name] = digest
        progress("reading pictures", len(digests), len(distinct))
    return digests


def in_threads(
    function: Callable[[Picture], Result], pictures: dict[str, Picture]
) -> Iterator[Result]:
    """The results of a function for all pictures, in their order.

    Args:
        function: called in several threads at once.
        pictures: by name.
    """
    remaining = list(pictures.values())
    with ThreadPoolExecutor() as pool:
        # A part at a time: the pool would else hold a task for every picture of a large study.
        for start in range(0, len(remaining), AHEAD):
            yield from pool.map(function, remaining[start : start + AHEAD])


def cached_features(
    load: Callable[[], Encoder],
    image_processor: Any,  # of transformers, whose image processors share no typed base
    pictures: Iterable[Picture],
    *,
    digests: dict[str, str] | None = None,
    batch_size: int = 32,
    progress: Progress = silent,
) -> FeatureStore:
    """The features of all distinct pictures, from disk where they were computed before.

    Several processes may do this at once: one encodes, the others wait for it.

    Args:
        load: makes the encoder on the CPU (here, and where an entry must be repaired).
        image_processor: of transformers; its settings are part of the features' address.
        pictures: any, repeated or not.
        digests: those of `digests_of` if they are known.
        batch_size: pictures that are encoded at once.
        progress: told of every batch that is encoded.

    Returns:
        The store; pictures that cannot be decoded are named in its `bad`.

    Raises:
        LayerfuseError: the features would exceed $LAYERFUSE_CACHE_GB (default 100) or the free
            disk space, the cache may not be written, or a picture changes meanwhile.
    """
    # Before the encoder is loaded: a limit that cannot be read is a mistake even if all is cached.
    limit_gb()
    encoder = load().to(device())
    encoder_digests = encoder.digests()
    settings = json.dumps(image_processor.to_dict(), sort_keys=True, default=str)
    # The digest at 0 is of what comes before all layers: it names the space that they share.
    address = sha256((encoder_digests[0] + settings).encode()).hexdigest()
    space = shards.features_home() / address[:16]
    # A layer's own digest covers the blocks up to it: encoders that differ above share it.
    folders = {}
    for layer in encoder.layers:
        folders[layer] = space / f"{layer:02d}-{encoder_digests[layer][:12]}"
    distinct = {picture.name: picture for picture in pictures}
    known = digests or digests_of(distinct.values())
    store = FeatureStore(
        pictures=distinct,
        digests={name: known[name] for name in distinct},
        layers=encoder.layers,
        # Known as soon as a shard is read or a batch is encoded.
        grid=(0, 0),
        load=load,
        image_processor=image_processor,
        batch_size=batch_size,
        folders=folders,
        entries={},
    )
    try:
        space.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LayerfuseError(f"cannot make the cache folder {space}: {error}") from error
    with shards.locked_space(space):
        # Inside the lock: another process may just have encoded the same pictures.
        index_entries(store)
        _encode(store, encoder, progress)
    index_entries(store)
    return store


def index_entries(store: FeatureStore) -> None:
    """Find the entries of the store's pictures on disk.

    Args:
        store: gets them in its `entries`.
    """
    wanted = set(store.digests.values())
    for layer, folder in store.folders.items():
        entries: dict[str, Entry] = {}
        # Oldest first: a repaired entry in a later shard replaces the damaged one.
        for file in shards.shards_of(folder):
            try:
                header = shards.read_header(file)
            except OSError as error:
                log.warning("%s: what it held is encoded again", error)
                continue
            store.grid = header.grid
            for digest, entry in header.entries.items():
                if digest in wanted:
                    entries[digest] = entry
        store.entries[layer] = entries


@torch.inference_mode()
def _encode(store: FeatureStore, encoder: Encoder, progress: Progress) -> None:
    """Encode every batch in which an entry is missing, and write what is missing."""
    _remove_unfinished(store)
    batches = _incomplete_batches(store)
    num_workers = DECODERS
    if device().type == "cpu":
        # The encoder needs all cores itself.
        num_workers = 0
    # The names take the place of a dataset's samples; the collate function reads the pictures.
    names_to_pixels: Any = store.pixels
    dataset: Any = batches
    loader = DataLoader(dataset, None, collate_fn=names_to_pixels, num_workers=num_workers)
    unwritten: dict[int, dict[str, Pair]] = {layer: {} for layer in store.layers}
    unwritten_bytes = 0
    written_at = time.monotonic()
    for done, (batch, (pixels, bad)) in enumerate(zip(batches, loader, strict=True), start=1):
        store.bad.update(bad)
        new_names = [name for name in store.missing(batch) if name not in bad]
        if new_names:
            features = encoder(pixels.to(device())).to("cpu")
            store.grid = features.grid
            # Before each shard: other processes fill the same disk.
            if unwritten_bytes == 0:
                _check_space(store, features)
            for name in new_names:
                unwritten_bytes += _keep_missing(
                    store,
                    unwritten,
                    features=features,
                    name=name,
                    row=batch.index(name),
                )
        progress("encoding pictures", done, len(batches))
        # All layers together: a stopped pass seldom leaves a picture in only some of them.
        is_late = time.monotonic() - written_at > SHARD_SECONDS
        is_large = unwritten_bytes >= SHARD_BYTES * len(unwritten)
        if is_late or is_large or done == len(batches):
            for layer, pairs in unwritten.items():
                store.write(layer, pairs, encoder)
                pairs.clear()
            unwritten_bytes = 0
            written_at = time.monotonic()


def _remove_unfinished(store: FeatureStore) -> None:
    """Remove what a killed writer left: whoever holds the lock is the only writer."""
    for folder in store.folders.values():
        for unfinished in folder.glob("*.tmp"):
            unfinished.unlink()


def _incomplete_batches(store: FeatureStore) -> list[list[str]]:
    """The names of the pictures of each batch in which an entry is missing."""
    names = list(store.digests)
    batches = []
    # Cut from all pictures, not from the missing ones: a continued pass makes the same batches.
    for start in range(0, len(names), store.batch_size):
        batch = names[start : start + store.batch_size]
        if store.missing(batch):
            batches.append(batch)
    return batches


def _keep_missing(
    store: FeatureStore,
    unwritten: dict[int, dict[str, Pair]],
    *,
    features: Features,
    name: str,
    row: int,
) -> int:
    """Put one picture's features of the layers that lack them into `unwritten`.

    Args:
        store: knows what is on disk.
        unwritten: the features to be written, by layer and digest.
        features: of the picture's batch.
        name: the picture's.
        row: the picture's place in the batch.

    Returns:
        The bytes of its patch tokens.
    """
    digest = store.digests[name]
    num_bytes = 0
    for index, layer in enumerate(features.layers):
        if digest in store.entries[layer]:
            continue
        pair = Pair(features.patches[index][row], features.summary[index][row])
        # The first of two pictures with the same bytes stays.
        kept_pair = unwritten[layer].setdefault(digest, pair)
        num_bytes += kept_pair.patches.nbytes
    return num_bytes


def limit_gb() -> float:
    """The size that the cache may have, from $LAYERFUSE_CACHE_GB.

    Raises:
        LayerfuseError: it is not a number.
    """
    limit = os.environ.get(LIMIT_GB, DEFAULT_GB)
    # Not `float`, which takes "nan" and "inf".
    if not re.fullmatch(r"\d+(\.\d+)?", limit):
        raise LayerfuseError(f"${LIMIT_GB} must be a number of GB, not {limit!r}")
    return float(limit)


def _check_space(store: FeatureStore, features: Features) -> None:
    """Raise LayerfuseError, before anything is written, if the missing features will not fit."""
    # Every picture takes as many bytes in every layer.
    picture_bytes = features.patches[0][0].nbytes + features.summary[0][0].nbytes
    # A set, because pictures with the same bytes are kept once.
    digests = set(store.digests.values())
    num_missing = 0
    for entries in store.entries.values():
        num_missing += len(digests - entries.keys())
    needed_gb = picture_bytes / 1e9 * num_missing
    root = shards.features_home()
    held_gb = sum(file.stat().st_size for file in root.rglob("*.safetensors")) / 1e9
    limit = limit_gb()
    free_gb = shutil.disk_usage(root).free / 1e9
    if held_gb + needed_gb > limit or needed_gb > free_gb:
        raise LayerfuseError(
            f"the missing features need {needed_gb:.3g} GB beside the {held_gb:.3g} GB in {root}; "
            f"${LIMIT_GB} allows {limit:g} GB and {free_gb:.1f} GB of the disk are free. "
            "Raise the limit, run `layerfuse cache clear`, or set `cache_features: false`"
        )
