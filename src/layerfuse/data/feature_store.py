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
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader

from layerfuse.data import feature_shards as shards
from layerfuse.data.feature_index import FeatureIndex
from layerfuse.data.feature_shards import Pair, ShardReader
from layerfuse.data.picture_batches import PictureBatches
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
class ReaderState:
    """What a process learns while it reads features: files that it has open, entries that it has
    checked, and the encoder for repairs."""

    reader: ShardReader = field(default_factory=ShardReader)
    checked: set[tuple[int, str]] = field(default_factory=set)
    """entries whose checksums were compared, as layer and the picture's digest"""
    repair_encoder: Encoder | None = None
    """None until an entry must be encoded again"""

    def __getstate__(self) -> dict[str, Any]:
        # The repair encoder is large, and another process loads its own if it needs one.
        return {**vars(self), "repair_encoder": None}


@dataclass(frozen=True)
class FeatureStore:
    """Cached features of a set of pictures, looked up by picture.

    Every entry is checked when it is first read; a damaged one is encoded again. Holds no tensors:
    a copy for another process is small.
    """

    batches: PictureBatches
    """the pictures, as they are encoded"""
    layers: tuple[int, ...]
    grid: tuple[int, int]
    """rows and columns of the patch tokens; (0, 0) if no picture can be decoded"""
    load: Callable[[], Encoder]
    """makes the encoder on the CPU"""
    index: FeatureIndex
    """where the features are"""
    bad: dict[str, str]
    """pictures that cannot be decoded, with the reason"""
    state: ReaderState = field(default_factory=ReaderState)
    """changes while features are read; nothing else of a store does but its index"""

    @property
    def pictures(self) -> dict[str, Picture]:
        """All pictures, by name."""
        return self.batches.pictures

    @property
    def digests(self) -> dict[str, str]:
        """Of the pictures' bytes, by the picture's name."""
        return self.batches.digests

    @property
    def folders(self) -> dict[int, Path]:
        """Where the features of each layer are."""
        return self.index.folders

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
        # With files of its own: those of other layers need not stay open.
        return replace(self, layers=tuple(sorted(set(layers))), state=ReaderState())

    def _pair(self, layer: int, name: str) -> Pair:
        """One picture's features of one layer, repaired if they are damaged."""
        digest = self.digests[name]
        entry = self.index.entries[layer].get(digest)
        if entry is not None:
            try:
                # Checksums cost as much as reading: once per entry and process is enough.
                verify = (layer, digest) not in self.state.checked
                pair = self.state.reader.read(entry, verify=verify)
                self.state.checked.add((layer, digest))
                return pair
            except OSError as error:
                log.warning("%s", error)
        # Other processes and `cache verify` put what is intact into later files.
        self.index.read()
        if not self.folders[layer].is_dir():
            raise LayerfuseError(
                f"{self.folders[layer]} was removed while in use; start the study again"
            )
        later_entry = self.index.entries[layer].get(digest)
        if later_entry is not None and later_entry != entry:
            return self._pair(layer, name)
        return self._repair(layer, name)

    def _repair(self, layer: int, name: str) -> Pair:
        """Encode a damaged entry again, on the CPU, and keep it."""
        log.warning("encoding %s again", name)
        if self.state.repair_encoder is None:
            self.state.repair_encoder = self.load()
        encoder = self.state.repair_encoder
        # In a batch as large as it was in, at the place where it was: kernels round differently
        # for other sizes and places, and the bits must be the same.
        digest = self.digests[name]
        place = self.batches.place(digest)
        pixels, _ = self.batches.pixels([name])
        # (1, 3, height, width) -> (batch_size, 3, height, width)
        with torch.inference_mode():
            features = encoder(pixels[0].repeat(place.batch_size, 1, 1, 1))
        layer_index = features.layers.index(layer)
        pair = Pair(
            features.patches[layer_index][place.row],
            features.summary[layer_index][place.row],
        )
        # Whoever holds the lock removes unfinished files, which would be those of this repair.
        with shards.locked_space(self.folders[layer].parent):
            self.index.write(layer, {digest: pair}, grid=self.grid, encoder=encoder)
        return pair


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
    batches = PictureBatches(
        pictures=distinct,
        digests={name: known[name] for name in distinct},
        image_processor=image_processor,
        batch_size=batch_size,
    )
    try:
        space.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LayerfuseError(f"cannot make the cache folder {space}: {error}") from error
    with shards.locked_space(space):
        # Inside the lock: another process may just have encoded the same pictures.
        index = FeatureIndex(folders, batches.digests.values())
        bad = _encode(batches, index, encoder, progress)
    index.read()
    return FeatureStore(
        batches=batches,
        layers=encoder.layers,
        grid=index.grid or (0, 0),
        load=load,
        index=index,
        bad=bad,
    )


@torch.inference_mode()
def _encode(
    batches: PictureBatches,
    index: FeatureIndex,
    encoder: Encoder,
    progress: Progress,
) -> dict[str, str]:
    """Encode every batch in which an entry is missing, and write what is missing.

    Returns:
        Why pictures cannot be decoded, by the picture's name.
    """
    _remove_unfinished(index)
    incomplete = _incomplete_batches(batches, index)
    num_workers = DECODERS
    if device().type == "cpu":
        # The encoder needs all cores itself.
        num_workers = 0
    # The names take the place of a dataset's samples; the collate function reads the pictures.
    names_to_pixels: Any = batches.pixels
    dataset: Any = incomplete
    loader = DataLoader(dataset, None, collate_fn=names_to_pixels, num_workers=num_workers)
    bad: dict[str, str] = {}
    unwritten: dict[int, dict[str, Pair]] = {layer: {} for layer in encoder.layers}
    unwritten_bytes = 0
    # Known as soon as a batch is encoded; nothing is written before.
    grid = (0, 0)
    written_at = time.monotonic()
    for done, (names, (pixels, bad_of_batch)) in enumerate(
        zip(incomplete, loader, strict=True), start=1
    ):
        bad.update(bad_of_batch)
        rows: dict[str, int] = {}
        for row, name in enumerate(names):
            digest = batches.digests[name]
            if name not in bad and index.lacks(digest):
                # The first of two pictures with the same bytes is kept.
                rows.setdefault(digest, row)
        if rows:
            features = encoder(pixels.to(device())).to("cpu")
            grid = features.grid
            # Before each shard: other processes fill the same disk.
            if unwritten_bytes == 0:
                _check_space(index, features)
            unwritten_bytes += _add_missing(unwritten, rows, features, index)
        progress("encoding pictures", done, len(incomplete))
        # All layers together: a stopped pass seldom leaves a picture in only some of them.
        is_late = time.monotonic() - written_at > SHARD_SECONDS
        is_large = unwritten_bytes >= SHARD_BYTES * len(unwritten)
        if is_late or is_large or done == len(incomplete):
            for layer, pairs in unwritten.items():
                index.write(layer, pairs, grid=grid, encoder=encoder)
                pairs.clear()
            unwritten_bytes = 0
            written_at = time.monotonic()
    return bad


def _remove_unfinished(index: FeatureIndex) -> None:
    """Remove what a killed writer left: whoever holds the lock is the only writer."""
    for folder in index.folders.values():
        for unfinished in folder.glob("*.tmp"):
            unfinished.unlink()


def _incomplete_batches(batches: PictureBatches, index: FeatureIndex) -> list[list[str]]:
    """The names of the pictures of each batch in which an entry is missing."""
    incomplete = []
    # Cut from all pictures, not from the missing ones: a continued pass makes the same batches.
    for names in batches.names():
        if any(index.lacks(batches.digests[name]) for name in names):
            incomplete.append(names)
    return incomplete


def _add_missing(
    unwritten: dict[int, dict[str, Pair]],
    rows: dict[str, int],
    features: Features,
    index: FeatureIndex,
) -> int:
    """Put the features of a batch's pictures, of the layers that lack them, into `unwritten`.

    Args:
        unwritten: the features to be written, by layer and the picture's digest.
        rows: the pictures' rows in the batch, by the picture's digest.
        features: of the batch.
        index: knows what is on disk.

    Returns:
        The bytes of their patch tokens.
    """
    num_bytes = 0
    for digest, row in rows.items():
        for place, layer in enumerate(features.layers):
            # A picture with the same bytes may wait from a batch before.
            if digest in index.entries[layer] or digest in unwritten[layer]:
                continue
            pair = Pair(features.patches[place][row], features.summary[place][row])
            unwritten[layer][digest] = pair
            num_bytes += pair.patches.nbytes
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


def _check_space(index: FeatureIndex, features: Features) -> None:
    """Raise LayerfuseError, before anything is written, if the missing features will not fit."""
    # Every picture takes as many bytes in every layer.
    picture_bytes = features.patches[0][0].nbytes + features.summary[0][0].nbytes
    needed_gb = picture_bytes / 1e9 * index.num_missing()
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
