"""A feature cache of a tiny encoder that counts the pictures it sees."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
from filelock import FileLock
from PIL import Image

from layerfuse.data import feature_shards as shards
from layerfuse.data.feature_store import FeatureStore, cached_features
from layerfuse.vision.encoder import Encoder
from layerfuse.vision.features import Features
from layerfuse.vision.picture import Picture
from tests import tiny


class CountingEncoder(Encoder):
    """An encoder that counts the pictures it sees, and may be interrupted after some batches."""

    # Of the class, because the store makes its own encoders.
    seen = 0
    batches_left = 1000

    def forward(self, pixel_values: torch.Tensor) -> Features:
        if CountingEncoder.batches_left == 0:
            raise KeyboardInterrupt
        CountingEncoder.batches_left -= 1
        CountingEncoder.seen += len(pixel_values)
        return super().forward(pixel_values)


def make_pictures(folder: Path, count: int = 10) -> list[Picture]:
    """So many pictures of 40 x 30 pixels, each of a colour of its own, as files of the folder."""
    pictures = []
    for number in range(count):
        file = folder / f"{number}.png"
        image = Image.new("RGB", (40, 30), f"rgb({20 * number},0,90)")
        image.save(file)
        pictures.append(Picture(str(file)))
    return pictures


def load_encoder(layers: list[int]) -> Encoder:
    """The counting encoder with these layers, whose patches are pooled to 2 x 2."""
    # The same weights each time: an encoder's weights are part of the address of its features.
    torch.manual_seed(3)
    tower = Encoder.from_config(tiny.vision_config("dinov2"), [4], None).tower
    return CountingEncoder(tower, layers, (2, 2)).eval()


def encode(
    pictures: list[Picture],
    layers: tuple[int, ...] = (1, 3),
    *,
    stop_after: int = 1000,
    **options: Any,
) -> FeatureStore:
    """The features of pictures, from the cache or encoded two at a time.

    Args:
        pictures: any.
        layers: of the encoder.
        stop_after: batches until the user interrupts.
        options: of `cached_features`.

    Returns:
        The store; `CountingEncoder.seen` says how many pictures were encoded for it.
    """
    CountingEncoder.seen = 0
    CountingEncoder.batches_left = stop_after
    options.setdefault("batch_size", 2)
    load = partial(load_encoder, list(layers))
    return cached_features(load, tiny.image_processor(), pictures, **options)


def same(one: Features, other: Features) -> bool:
    """Whether all features are equal to the bit."""
    if one.grid != other.grid:
        return False
    tensors = one.patches + one.summary
    other_tensors = other.patches + other.summary
    for tensor, other_tensor in zip(tensors, other_tensors, strict=True):
        if not torch.equal(tensor, other_tensor):
            return False
    return True


def pictures_by_layer() -> list[int]:
    """How many distinct pictures the cache holds of each layer, as `cache list` says."""
    lines = list(shards.describe())
    counts = []
    # The last line is the sum.
    for line in lines[:-1]:
        before, _, _ = line.partition(" pictures")
        counts.append(int(before.split()[-1]))
    return counts


def shard_files(home: Path) -> list[Path]:
    """All shards of the cache."""
    return sorted(home.rglob("*.safetensors"))


def change_last_byte(file: Path) -> None:
    """Damage the last picture's features in a shard."""
    content = file.read_bytes()
    # The features of these pictures do not end with 0x3f.
    file.write_bytes(content[:-1] + b"?")


def damage_all(home: Path) -> None:
    """Damage the last picture's features in all shards."""
    for file in shard_files(home):
        change_last_byte(file)


@dataclass
class LockHolder:
    """Who holds a lock in another thread."""

    was_told: bool = False
    """whether the lock was given back because of the event"""


@contextmanager
def another_holds_the_lock(home: Path, until: Event, seconds: float) -> Iterator[LockHolder]:
    """Hold the lock of the only encoder's features in another thread.

    Args:
        home: of the cache.
        until: the event that ends it.
        seconds: after which it ends at the latest.

    Yields:
        The holder, which is done when the block ends.
    """
    (lock,) = home.glob("features/*/.lock")
    holder = LockHolder()
    holds = Event()

    def hold() -> None:
        with FileLock(lock):
            holds.set()
            holder.was_told = until.wait(seconds)

    thread = Thread(target=hold)
    thread.start()
    # Only now does whoever comes find the lock taken.
    holds.wait()
    yield holder
    thread.join()
