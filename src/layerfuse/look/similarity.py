"""How alike the layers of an encoder are.

One pass over pictures, groups of layers with their representatives, a file and a figure.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import logging as transformers_logging

from layerfuse.data.feature_store import FeatureStore, cached_features
from layerfuse.errors import LayerfuseError
from layerfuse.files import write_text
from layerfuse.hardware import DTYPES
from layerfuse.look.accumulate import LayerStatistics
from layerfuse.look.figures import TITLES, draw_similarity
from layerfuse.look.grouping import all_groups, best_count
from layerfuse.look.output import conditioning_table, similarity_table
from layerfuse.look.pictures import batches, find_pictures, require_look
from layerfuse.look.similarity_report import (
    LayerMeasurements,
    SimilarityReport,
    SimilaritySettings,
    rounded,
)
from layerfuse.model.pretrained import load_image_processor
from layerfuse.progress import Progress, shown_progress, silent
from layerfuse.vision.aspect_ratio import ImageAspectRatio
from layerfuse.vision.encoder import Encoder, load_encoder
from layerfuse.vision.features import Features
from layerfuse.vision.picture import Picture

MEASURES = tuple(TITLES)
"""Matrices that groups can come from."""
SAVE_SECONDS = 60
"""How often an unfinished pass is saved."""
FILE = "similarity.json"


@dataclass(frozen=True)
class _Checkpoint:
    """The file from which a killed pass resumes.

    `key` says what the pass depends on: another encoder, picture or seed must start anew.
    """

    file: Path
    key: str

    def load(self) -> dict[str, Tensor] | None:
        """The saved state, or None if there is none of the same pass."""
        if not self.file.exists():
            return None
        try:
            state = load_file(self.file)
        except SafetensorError as error:
            raise LayerfuseError(
                f"{self.file} is damaged ({error}): delete it to restart"
            ) from error
        saved_key = bytes(state.pop("key").tolist()).decode()
        # Sums of other pictures or weights must not be added to
        if saved_key != self.key:
            return None
        return state

    def save(self, state: dict[str, Tensor]) -> None:
        """Write a state whole or not at all."""
        tensors = {}
        for name, tensor in state.items():
            tensors[name] = tensor.contiguous()
        # A safetensors file holds tensors only, so the text goes in as bytes
        tensors["key"] = torch.tensor(list(self.key.encode()))
        # The process in the name keeps two passes in one folder apart
        written = self.file.with_suffix(f".{os.getpid()}")
        try:
            save_file(tensors, written)
            written.replace(self.file)
        except (OSError, SafetensorError) as error:
            raise LayerfuseError(f"{self.file} cannot be written: {error}") from error


@torch.inference_mode()
def measure(
    encoders: Sequence[Encoder],
    processors: Sequence[Any],
    pictures: Sequence[Picture],
    *,
    batch_size: int = 16,
    seed: int = 0,
    unfinished: Path | None = None,
    stores: Sequence[FeatureStore] | None = None,
    progress: Progress = silent,
) -> LayerStatistics:
    """Make one pass over the pictures through every encoder.

    Args:
        encoders: the encoder to look at, and others to compare with.
        processors: the image processor of each (`Any`: transformers gives them no common type).
        pictures: what to look at.
        batch_size: pictures encoded at once.
        seed: draws the tokens.
        unfinished: file where sums are saved each minute; a killed pass continues from it if
            encoders, pictures and seed are the same.
        stores: the cached features of all pictures, of each encoder; None encodes them.
        progress: told of every batch, in pictures.

    Returns:
        The statistics of all pictures.

    Raises:
        LayerfuseError: a picture cannot be used, which is named, or `unfinished` is damaged.
    """
    statistics = LayerStatistics(len(pictures), seed)
    # All encoders are on one device
    device = next(encoders[0].parameters()).device
    checkpoint = None
    if unfinished is not None:
        key = _key(encoders, processors, pictures, seed)
        checkpoint = _Checkpoint(unfinished, key)
        state = checkpoint.load()
        if state is not None:
            statistics.restore(state, device)

    phase = "looking at pictures"
    # A resumed pass starts where it was saved
    progress(phase, statistics.done, len(pictures))
    saved = time.monotonic()
    if stores is None:
        all_features = _encoded(encoders, processors, pictures, batch_size, statistics.done)
    else:
        all_features = _read(stores, pictures, batch_size, statistics.done)
    for names, features in all_features:
        statistics.add([of_encoder.to(device) for of_encoder in features], names)
        progress(phase, statistics.done, len(pictures))
        if checkpoint is not None and time.monotonic() - saved > SAVE_SECONDS:
            checkpoint.save(statistics.state())
            saved = time.monotonic()
    return statistics


def _encoded(
    encoders: Sequence[Encoder],
    processors: Sequence[Any],
    pictures: Sequence[Picture],
    batch_size: int,
    start: int,
) -> Iterator[tuple[list[str], list[Features]]]:
    """Names of pictures, and their features by each encoder, batch by batch."""
    device = next(encoders[0].parameters()).device
    for names, pixels in batches(pictures, processors, batch_size, start):
        features: list[Features] = []
        for encoder, pixels_of_encoder in zip(encoders, pixels, strict=True):
            features.append(encoder(pixels_of_encoder.to(device)))
        yield names, features


def _read(
    stores: Sequence[FeatureStore], pictures: Sequence[Picture], batch_size: int, start: int
) -> Iterator[tuple[list[str], list[Features]]]:
    """The same from the cache."""
    for begin in range(start, len(pictures), batch_size):
        batch = pictures[begin : begin + batch_size]
        yield [picture.name for picture in batch], [store.features(batch) for store in stores]


def _key(
    encoders: Sequence[Encoder],
    processors: Sequence[Any],
    pictures: Sequence[Picture],
    seed: int,
) -> str:
    """A digest of all that the sums depend on."""
    # The last layer's digest covers the weights of all layers before it
    weights = [encoder.digests()[encoder.layers[-1]] for encoder in encoders]
    names: list[Any]
    if isinstance(pictures, list):
        names = [picture.name for picture in pictures]
    else:
        # Rows of a dataset are not all read for their names: their number and the first must do
        names = [len(pictures), pictures[0].name]
    settings = [
        weights,
        [processor.to_dict() for processor in processors],
        names,
        seed,
    ]
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def similarity(
    encoder: str,
    images: str | None = None,
    *,
    other: str | None = None,
    by: str = "cosine",
    groups: int = 3,
    split: str = "train",
    limit: int | None = None,
    batch_size: int = 16,
    dtype: str = "float32",
    image_aspect_ratio: ImageAspectRatio | None = None,
    seed: int = 0,
    cached: bool = False,
    output: Path | None = None,
    console: Console | None = None,
) -> Path:
    """Measure how alike the layers of an encoder are, and write a report and figures.

    Args:
        encoder: name or folder of the encoder.
        images: what `find_pictures` takes.
        other: a second encoder to compare with by CKA.
        by: the matrix that the groups come from, one of `MEASURES`.
        groups: number of groups; 0: as many as have the widest mean silhouette.
        split: split of a dataset.
        limit: use only the first pictures.
        batch_size: pictures encoded at once.
        dtype: number type of the encoders, a name in `DTYPES`.
        image_aspect_ratio: what becomes of pictures that are no squares, as in a recipe; None: what
            the encoder's own files say.
        seed: draws the tokens.
        cached: read the features of all layers from the cache of the studies, and keep there what
            it lacks.
        output: folder of everything written; `look_folder(encoder)` by default.
        console: where tables are printed.

    Returns:
        The path of `similarity.json`.

    Raises:
        LayerfuseError: an option, picture or file cannot be used.
    """
    # Loading takes minutes, so what can be refused is refused first
    _require_options(by, batch_size, limit)
    console = console or Console()
    folder = output or look_folder(encoder)
    pictures = find_pictures(images, split, limit)
    # The first encoder is looked at; the second is only compared with it
    names = [name for name in (encoder, other) if name]
    # One bar is enough: that of the pictures.
    transformers_logging.disable_progress_bar()
    encoders = [load_encoder(name, DTYPES[dtype]) for name in names]
    layers = list(encoders[0].layers)
    _require_groups(groups, layers[-1])
    processors = [load_image_processor(name, image_aspect_ratio) for name in names]

    make_folder(folder)
    unfinished = folder / "similarity.unfinished"
    with shown_progress(console) as progress:
        stores = None
        if cached:
            stores = []
            for one, processor in zip(encoders, processors, strict=True):
                stores.append(_store_of(one, processor, pictures, batch_size, progress))
        statistics = measure(
            encoders,
            processors,
            pictures,
            batch_size=batch_size,
            seed=seed,
            unfinished=unfinished,
            stores=stores,
            progress=progress,
        )
    settings = SimilaritySettings(
        encoder=encoder,
        other=other,
        depth=layers[-1],
        layers=layers,
        left_out=f"{encoders[0].prefix} prefix tokens (CLS, registers) of every picture",
        source=images,
        split=split,
        limit=limit,
        dtype=dtype,
        image_aspect_ratio=image_aspect_ratio,
        seed=seed,
        by=by,
    )
    report = SimilarityReport(settings, describe(statistics, by, groups))
    return _publish(report, folder, unfinished, console)


def _store_of(
    encoder: Encoder,
    processor: Any,
    pictures: Sequence[Picture],
    batch_size: int,
    progress: Progress,
) -> FeatureStore:
    """The features of all pictures in the cache; raise LayerfuseError if one cannot be decoded."""

    def load() -> Encoder:
        # A copy: the store wants one on the CPU, and the encoder itself stays where it is.
        return deepcopy(encoder).cpu()

    store = cached_features(load, processor, pictures, batch_size=batch_size, progress=progress)
    for reason in store.bad.values():
        raise LayerfuseError(reason)
    return store


def _publish(report: SimilarityReport, folder: Path, unfinished: Path, console: Console) -> Path:
    """Write figures and `similarity.json`, whose path it returns, and print the table."""
    draw_similarity(report, folder)
    file = folder / FILE
    write_text(file, json.dumps(report.to_json()) + "\n")
    # Only a written report makes the saved sums superfluous
    unfinished.unlink(missing_ok=True)
    similarity_table(report, console)
    conditioning_table(report, console)
    console.print(f"similarity: {file}", soft_wrap=True)
    return file


def make_folder(folder: Path) -> None:
    """Make a folder before a pass, so that hours of measuring do not end without a place.

    Args:
        folder: may exist.

    Raises:
        LayerfuseError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LayerfuseError(f"the folder {folder} cannot be made: {error}") from error


def _require_options(by: str, batch_size: int, limit: int | None) -> None:
    """Raise as `similarity` does, before anything is loaded."""
    for module in ("cka", "sklearn"):
        require_look(module)
    if by not in MEASURES:
        raise LayerfuseError(f"no similarity {by!r}; valid: {', '.join(MEASURES)}")
    if batch_size < 1 or (limit is not None and limit < 1):
        raise LayerfuseError("the batch size and the limit must be at least 1")


def _require_groups(groups: int, depth: int) -> None:
    """Raise LayerfuseError for more groups than layers."""
    if not 0 <= groups <= depth:
        raise LayerfuseError(f"{groups} groups cannot be made; valid: 0..{depth}")


def look_folder(encoder: str) -> Path:
    """Give the folder where the verbs that look at an encoder write by default.

    Args:
        encoder: name or folder of the encoder.

    Returns:
        A path relative to the working directory.
    """
    name = Path(encoder).name
    return Path("runs") / f"look-{name}"


def describe(
    statistics: LayerStatistics,
    by: str = "cosine",
    groups: int = 3,
) -> LayerMeasurements:
    """Give the measured numbers as they stand in `similarity.json`.

    Args:
        statistics: of all pictures.
        by: the matrix that the groups come from, one of `MEASURES`.
        groups: number of groups; 0: as many as have the widest mean silhouette.

    Returns:
        The rounded results and scores, with the groups of layers 1..L for each count.

    Raises:
        LayerfuseError: the matrix `by` has undefined entries.
    """
    similarity = statistics.result()
    whole = similarity.matrix(by)
    # Layer 0, the embedding of patches, belongs to no group
    matrix = whole[1:, 1:]
    if not np.isfinite(matrix).all():
        undefined = []
        for layer in range(1, len(whole)):
            if not np.isfinite(whole[layer]).any():
                undefined.append(layer)
        raise LayerfuseError(
            f"{by} is undefined (layers {undefined or 'all'}): layers must vary over the pictures, "
            f"and CKA needs 4 of them; more or other pictures help, or another measure"
        )
    groups_by_count = all_groups(matrix, list(range(1, len(matrix) + 1)))
    # 0 is a wish for the best count, not a count
    chosen = groups
    if groups == 0:
        chosen = best_count(groups_by_count)
    conditioning = {}
    for name, numbers in statistics.conditioning().items():
        conditioning[name] = rounded(numbers)
    return LayerMeasurements(
        similarity=rounded(similarity),
        scores=rounded(statistics.scores()),
        groups=groups_by_count,
        chosen=chosen,
        conditioning=conditioning,
    )
