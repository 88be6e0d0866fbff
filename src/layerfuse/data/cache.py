"""Features of a frozen encoder, computed once per set of pictures and shared by all arms."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from layerfuse.data.samples import Picture
from layerfuse.encoder import Encoder, Features
from layerfuse.local_models import home

Progress = Callable[[int, int], None]
"""(pictures done, pictures in all)"""


class FeatureStore:
    """Cached features of a set of pictures, looked up by picture."""

    def __init__(
        self,
        rows: dict[str, int],
        layers: tuple[int, ...],
        patches: list[Tensor],
        summary: list[Tensor],
        grid: tuple[int, int],
    ) -> None:
        self.rows = rows
        self.layers = layers
        self.patches = patches
        self.summary = summary
        self.grid = grid

    def features(self, pictures: Sequence[Picture]) -> Features:
        """The features of `pictures`, in that order."""
        rows = torch.tensor([self.rows[picture.name] for picture in pictures])
        patches = tuple(x[rows] for x in self.patches)
        return Features(self.layers, patches, tuple(x[rows] for x in self.summary), self.grid)

    def restrict(self, layers: Iterable[int]) -> "FeatureStore":
        """The same pictures with only these layers, ascending."""
        chosen = tuple(sorted(set(layers)))
        where = [self.layers.index(layer) for layer in chosen]
        patches, summary = [self.patches[i] for i in where], [self.summary[i] for i in where]
        return FeatureStore(self.rows, chosen, patches, summary, self.grid)


def cached_features(
    encoder: Encoder,
    image_processor: Any,
    pictures: Iterable[Picture],
    *,
    batch_size: int = 32,
    progress: Progress = lambda done, total: None,
) -> FeatureStore:
    """The features of all distinct pictures, from disk where they were computed before.

    One file per layer under `$LAYERFUSE_HOME/features`, named by the content of the pictures, the
    preprocessing, and the weights and settings of the encoder up to that layer; each is written
    whole or not at all. Raises ValueError naming a picture that cannot be read.
    """
    distinct = list({picture.name: picture for picture in pictures}.values())
    digests = [picture.digest() for picture in distinct]
    content = hashlib.sha256(" ".join(digests).encode())
    content.update(json.dumps(image_processor.to_dict(), sort_keys=True, default=str).encode())
    files = {
        layer: home() / "features" / f"{_join(content.hexdigest(), digest)}.safetensors"
        for layer, digest in encoder.digests().items()
    }
    missing = tuple(layer for layer, file in files.items() if not file.exists())
    if missing and distinct:
        _encode(encoder, image_processor, distinct, missing, files, batch_size, progress)
    patches, summary, grid = [], [], (0, 0)
    for layer in encoder.layers if distinct else ():
        with safe_open(files[layer], framework="pt") as stored:
            patches.append(stored.get_tensor("patches"))
            summary.append(stored.get_tensor("summary"))
            grid = tuple(json.loads(stored.metadata()["grid"]))
    rows = {picture.name: row for row, picture in enumerate(distinct)}
    return FeatureStore(rows, encoder.layers, patches, summary, (grid[0], grid[1]))


def _join(*parts: str) -> str:
    return hashlib.sha256("-".join(parts).encode()).hexdigest()[:32]


@torch.inference_mode()
def _encode(
    encoder: Encoder,
    image_processor: Any,
    pictures: list[Picture],
    layers: tuple[int, ...],
    files: dict[int, Path],
    batch_size: int,
    progress: Progress,
) -> None:
    device = next(encoder.parameters()).device
    patches: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    summary: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    grid = (0, 0)
    for start in range(0, len(pictures), batch_size):
        images = [picture.open() for picture in pictures[start : start + batch_size]]
        pixels = image_processor(images, return_tensors="pt")["pixel_values"]
        features = encoder(pixels.to(device))
        grid = features.grid
        for layer in layers:
            index = features.layers.index(layer)
            patches[layer].append(features.patches[index].cpu())
            summary[layer].append(features.summary[index].cpu())
        progress(min(start + batch_size, len(pictures)), len(pictures))
    for layer in layers:
        whole = {"patches": torch.cat(patches.pop(layer)), "summary": torch.cat(summary.pop(layer))}
        files[layer].parent.mkdir(parents=True, exist_ok=True)
        unfinished = files[layer].with_suffix(f".{os.getpid()}")
        save_file(
            {name: tensor.contiguous() for name, tensor in whole.items()},
            unfinished,
            metadata={"grid": json.dumps(list(grid))},
        )
        unfinished.replace(files[layer])
