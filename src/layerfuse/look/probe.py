"""What each layer knows: a linear probe per layer, task and kind of features."""

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from layerfuse.data.feature_store import FeatureStore, cached_features, digests_of
from layerfuse.errors import LayerfuseError
from layerfuse.files import write_text
from layerfuse.hardware import DTYPES
from layerfuse.look.figures import draw_probe
from layerfuse.look.output import probe_table
from layerfuse.look.pictures import require_look
from layerfuse.look.probe_report import (
    ProbedSelection,
    ProbedTask,
    ProbeReport,
    Probes,
    TaskReading,
)
from layerfuse.look.similarity import FILE, look_folder, make_folder
from layerfuse.look.tasks import Problem, Task, find_tasks, task_names
from layerfuse.model.pretrained import load_image_processor
from layerfuse.progress import Progress, shown_progress, silent
from layerfuse.vision.aspect_ratio import ImageAspectRatio
from layerfuse.vision.encoder import Encoder, load_encoder
from layerfuse.vision.picture import Picture
from layerfuse.vision.selection import LayerSpec, select

GRID_SIDE = 4
"""Cells along each side of the grid, by default."""
FEATURES = {"mean": slice(1), "grid": slice(1, None)}
"""Where `pooled` holds the mean patch token, and the patch tokens average-pooled to a grid."""
PROBE_FILE = "probe.json"
RESAMPLES = 1000
"""Draws of a bootstrap."""
NOT_ASKED = "-"
"""Stands in `hits` for a picture that the task does not ask about."""
LARGEST_HALF = 65504
"""The largest number of float16."""


def pooled(
    encoder: Encoder,
    processor: Any,
    pictures: Sequence[Picture],
    *,
    grid: int,
    batch_size: int,
    progress: Progress = silent,
) -> np.ndarray:
    """Encode pictures and pool the patch tokens of each layer.

    Through the cache that studies share: what a study with this `token_grid` and dtype or an
    earlier look has encoded is not encoded again, nor what was encoded before a stop.

    Args:
        encoder: whose layers are pooled; with all its patch tokens.
        processor: its image processor (`Any`: transformers gives them no common type).
        pictures: what to encode; at least one.
        grid: side of the grid of pooled tokens.
        batch_size: pictures encoded at once.
        progress: told of every batch.

    Returns:
        (L, pictures, 1 + grid², D) in float16: the mean patch token, then the patch tokens
        average-pooled to the grid, row by row.

    Raises:
        LayerfuseError: a picture cannot be used or gives infinite or undefined features; it is
            named. Or the grid is finer than the patches, or the cache is full.
    """
    rows, columns = _patch_grid(encoder, processor, pictures[0])
    # A finer grid would only repeat patches.
    if grid > min(rows, columns):
        raise LayerfuseError(
            f"a grid of {grid} x {grid} cells: the encoder has {rows} x {columns} patches"
        )
    digests = digests_of(pictures, progress)

    def cells_of(side: int) -> np.ndarray:
        store = cached_features(
            partial(_pooling_encoder, encoder, side),
            processor,
            pictures,
            digests=digests,
            batch_size=batch_size,
            progress=progress,
        )
        return _read(store, pictures, batch_size)

    cells = cells_of(grid)
    if rows % grid == 0 and columns % grid == 0:
        # Cells of equally many patches: their mean is that of the patches.
        mean = cells.mean(axis=2, keepdims=True, dtype=np.float32)
    else:
        # Cells overlap, and weigh some patches twice: one cell has them all once.
        mean = cells_of(1)
    return np.concatenate([mean.astype(np.float16), cells], axis=2)


def _patch_grid(encoder: Encoder, processor: Any, picture: Picture) -> tuple[int, int]:
    """Rows and columns of the patches that the encoder makes of a picture."""
    pixels = processor([picture.open()], return_tensors="pt")["pixel_values"]
    height, width = pixels.shape[-2:]
    return encoder.grid(height, width)


def _pooling_encoder(encoder: Encoder, side: int) -> Encoder:
    """The same encoder on the CPU, with the patch tokens of every layer pooled to a grid."""
    tower = deepcopy(encoder.tower).cpu()
    return Encoder(tower, encoder.layers, (side, side)).eval()


def _read(store: FeatureStore, pictures: Sequence[Picture], batch_size: int) -> np.ndarray:
    """The cached patch tokens of pictures, (L, pictures, cells, D) in float16.

    Raises:
        LayerfuseError: a picture cannot be decoded, or its features are infinite or undefined.
    """
    for reason in store.bad.values():
        raise LayerfuseError(reason)
    parts = []
    for start in range(0, len(pictures), batch_size):
        batch = pictures[start : start + batch_size]
        features = store.features(batch)
        # (L, B, cells, D)
        cells = torch.stack(features.patches).float()
        finite = cells.isfinite().flatten(2).all(dim=2)
        if not finite.all():
            layer, row = (~finite).nonzero()[0].tolist()
            raise LayerfuseError(
                f"layer {features.layers[layer]} of {batch[row].name} holds infinite or undefined "
                "features"
            )
        # Half the memory; a few layers of some encoders exceed its range with single numbers
        in_range = cells.clamp(-LARGEST_HALF, LARGEST_HALF)
        parts.append(in_range.half().numpy())
    return np.concatenate(parts, axis=1)


def probe(
    encoder: str,
    data: str | None = None,
    test: str | None = None,
    *,
    tasks: str | None = None,
    layers: Sequence[LayerSpec] | None = None,
    grid: int = GRID_SIDE,
    batch_size: int = 16,
    dtype: str = "float32",
    image_aspect_ratio: ImageAspectRatio | None = None,
    seed: int = 0,
    output: Path | None = None,
    console: Console | None = None,
) -> Path:
    """Probe every layer and some combinations on every task, and write a report and figures.

    Args:
        encoder: name or folder of the encoder.
        data: training samples, as for `find_tasks`.
        test: test samples, as for `find_tasks`.
        tasks: names of tasks with commas between them; all by default.
        layers: combinations of layers to probe too; `default_combinations` by default.
        grid: side of the grid of pooled tokens.
        batch_size: pictures encoded at once.
        dtype: number type of the encoder, a name in `DTYPES`.
        image_aspect_ratio: what becomes of pictures that are no squares, as in a recipe; None: what
            the encoder's own files say.
        seed: of the division into training and test pictures, and of the resamples.
        output: folder of everything written; `look_folder(encoder)` by default.
        console: where tables are printed.

    Returns:
        The path of `probe.json`.

    Raises:
        LayerfuseError: an option, picture or file cannot be used, or scikit-learn is missing;
            nothing has been written then, unless a picture is broken.
    """
    require_look("sklearn")
    console = console or Console()
    folder = output or look_folder(encoder)
    # Samples are read before the encoder: they are refused in seconds, it loads for minutes
    problem = find_tasks(data, test, task_names(tasks), seed)
    # One bar is enough: that of the pictures.
    transformers_logging.disable_progress_bar()
    tower = load_encoder(encoder, DTYPES[dtype])
    selections = _selections(layers, tower.layers[-1], folder)
    processor = load_image_processor(encoder, image_aspect_ratio)
    make_folder(folder)

    with shown_progress(console) as progress:
        pictures = [*problem.train, *problem.test]
        features = pooled(
            tower,
            processor,
            pictures,
            grid=grid,
            batch_size=batch_size,
            progress=progress,
        )
        probes = _probe_kinds(problem, features, selections, seed=seed, progress=progress)
    report = ProbeReport(
        encoder=encoder,
        depth=tower.layers[-1],
        source=data,
        test=test,
        asked=tasks,
        grid_side=grid,
        dtype=dtype,
        image_aspect_ratio=image_aspect_ratio,
        seed=seed,
        train_pictures=len(problem.train),
        test_pictures=len(problem.test),
        tasks=_described(problem.tasks),
        left_out=problem.left_out,
        mean=probes["mean"],
        grid=probes["grid"],
    )
    return _publish(report, folder, console)


def _probe_kinds(
    problem: Problem,
    features: np.ndarray,
    selections: Sequence[list[int]],
    *,
    seed: int,
    progress: Progress,
) -> dict[str, Probes]:
    """Probe all selections on each kind of features."""
    probes = {}
    for kind in FEATURES:
        probes[kind] = probe_selections(
            problem,
            features,
            kind,
            selections,
            seed=seed,
            progress=progress,
        )
    return probes


def _described(tasks: Sequence[Task]) -> dict[str, ProbedTask]:
    """What a report says of the tasks themselves."""
    described = {}
    for task in tasks:
        described[task.name] = ProbedTask(chance=task.chance, classes=task.classes)
    return described


def _selections(
    combinations: Sequence[LayerSpec] | None,
    depth: int,
    folder: Path,
) -> list[list[int]]:
    """Every single layer, then the combinations, each selection once."""
    # An empty list means that single layers are enough
    if combinations is None:
        combinations = default_combinations(depth, folder)
    selections: list[list[int]] = []
    # Single layers come first: shares are relative to the best of them
    for spec in [*range(depth + 1), *combinations]:
        layers = list(select(spec, depth).layers)
        if layers not in selections:
            selections.append(layers)
    return selections


def _publish(report: ProbeReport, folder: Path, console: Console) -> Path:
    """Write figures and `probe.json`, whose path it returns, and print the tables."""
    for probes in (report.mean, report.grid):
        draw_probe(probes, folder / f"probe-{probes.kind}")
        probe_table(report, probes, console)
    file = folder / PROBE_FILE
    write_text(file, json.dumps(report.to_json()) + "\n")
    for name, reason in report.left_out.items():
        console.print(f"not probed: {name} ({reason})", soft_wrap=True)
    console.print(f"probe: {file}", soft_wrap=True)
    return file


def default_combinations(depth: int, folder: Path) -> list[LayerSpec]:
    """Give the combinations of layers that are probed if none are asked for.

    Args:
        depth: number of blocks of the encoder.
        folder: where a similarity file may be.

    Returns:
        The middle layers of three thirds, and the representatives of three groups of similar
        layers if there is a similarity file.
    """
    # In a shallow encoder two thirds can have one middle
    middles = set()
    for sixths in (1, 3, 5):
        middles.add(max(1, round(depth * sixths / 6)))
    combinations: list[LayerSpec] = [sorted(middles)]
    similarity_file = folder / FILE
    if similarity_file.exists():
        count = min(3, depth)
        # A shallow encoder has fewer than three groups
        combinations.append(f"similarity:{count}@{similarity_file}")
    return combinations


def probe_selections(
    problem: Problem,
    features: np.ndarray,
    kind: str,
    selections: Sequence[list[int]],
    *,
    seed: int,
    progress: Progress = silent,
) -> Probes:
    """Probe selections of layers on all tasks.

    Args:
        problem: the tasks.
        features: what `pooled` gives of the training and then the test pictures.
        kind: which of the features are read, a name in `FEATURES`.
        selections: the layers of each.
        seed: of the resamples.
        progress: told of every selection.

    Returns:
        What `probe_layers` gives for each.
    """
    cells = features[:, :, FEATURES[kind]]
    probed = []
    for done, layers in enumerate(selections, start=1):
        probed.append(probe_layers(problem, cells, layers, seed))
        progress(f"probing {kind} features", done, len(selections))
    return Probes(kind=kind, selections=probed)


def probe_layers(
    problem: Problem,
    features: np.ndarray,
    layers: list[int],
    seed: int,
) -> ProbedSelection:
    """Probe all tasks on the features of some layers, side by side.

    Args:
        problem: the tasks.
        features: (L, pictures, cells, D), the training pictures first.
        layers: positions in the first dimension.
        seed: of the resamples.

    Returns:
        What is read of each task, and their mean.
    """
    # Every cell of every layer is a feature of its own: (pictures, layers * cells * D)
    flat = [features[layer].reshape(features.shape[1], -1) for layer in layers]
    x = np.concatenate(flat, axis=1).astype(np.float32)
    train_count = len(problem.train)
    readings = {}
    for task in problem.tasks:
        hits = classify(task, x[:train_count], x[train_count:])
        # Pictures without a question about this task neither help nor harm
        asked = hits[~np.isnan(hits)]
        readings[task.name] = TaskReading(
            accuracy=float(asked.mean()),
            interval=wilson_interval(asked),
            hits=_as_text(hits),
        )

    # Tasks count the same, however many pictures they are asked about
    accuracies = [reading.accuracy for reading in readings.values()]
    draws = bootstrap(readings, list(readings), seed)
    return ProbedSelection(
        layers=layers,
        tasks=readings,
        mean=float(np.mean(accuracies)),
        interval=np.percentile(draws, [2.5, 97.5]).tolist(),
    )


def _as_text(hits: np.ndarray) -> str:
    """Hits as a character each: 1, 0, or `NOT_ASKED`."""
    characters = []
    for hit in hits:
        if np.isnan(hit):
            characters.append(NOT_ASKED)
        else:
            characters.append(str(int(hit)))
    return "".join(characters)


def _as_numbers(hits: str) -> list[float]:
    """The inverse of `_as_text`: 1, 0, or NaN."""
    numbers = []
    for character in hits:
        if character == NOT_ASKED:
            numbers.append(np.nan)
        else:
            numbers.append(float(character))
    return numbers


def bootstrap(
    readings: Mapping[str, TaskReading],
    tasks: Sequence[str],
    seed: int,
) -> np.ndarray:
    """Resample the mean accuracy over tasks by drawing test pictures.

    Args:
        readings: what probes read, by task.
        tasks: those that count.
        seed: equal seeds draw equal pictures, whatever the layers and tasks.

    Returns:
        (RESAMPLES,), each in 0..1.
    """
    # (tasks, pictures) -> (pictures, tasks)
    table = np.array([_as_numbers(readings[task].hits) for task in tasks]).T
    count = len(table)
    # How often each picture is drawn: (RESAMPLES, pictures)
    random = np.random.default_rng(seed)
    draws = random.multinomial(count, [1 / count] * count, size=RESAMPLES)
    asked = draws @ ~np.isnan(table)
    right = draws @ np.nan_to_num(table)
    # A draw without any picture that a task asks about counts as 0 right
    return (right / np.maximum(asked, 1)).mean(axis=1)


def classify(task: Task, train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Learn a task on training features and answer it on test features.

    The classifier is ridge regression on features that are each standardised, its penalty chosen
    by leave-one-out.

    Args:
        task: n training and m test answers.
        train: (n, D).
        test: (m, D).

    Returns:
        (m,): 1 where the answer is right, 0 where it is wrong, NaN where none was asked for.
    """
    # scikit-learn is optional, and takes a second to import
    from sklearn.linear_model import RidgeClassifierCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    # Rare answers are no classes: the classifier can never say them, so they are wrong
    labels = np.array([answer if answer in task.classes else "" for answer in task.train])
    known = labels != ""
    model = make_pipeline(StandardScaler(), RidgeClassifierCV(alphas=np.logspace(-1, 7, 17)))
    model.fit(train[known], labels[known])
    predictions = model.predict(test)

    hits = np.full(len(task.test), np.nan)
    for place, answer in enumerate(task.test):
        if answer is not None:
            hits[place] = answer == predictions[place]
    return hits


def wilson_interval(hits: np.ndarray) -> list[float]:
    """Compute Wilson's 95 % interval of a share.

    Args:
        hits: (n,), each 0 or 1.

    Returns:
        Its ends, each in 0..1.
    """
    # scipy.stats takes half a second to import
    from scipy.stats import binomtest

    test = binomtest(int(hits.sum()), len(hits))
    interval = test.proportion_ci(method="wilson")
    return [float(interval.low), float(interval.high)]
