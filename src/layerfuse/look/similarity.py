"""How alike the layers of an encoder are: one pass over pictures, groups of layers with their
representatives, a file and a figure."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from layerfuse.data.picture import Picture
from layerfuse.files import write_text
from layerfuse.hardware import DTYPES
from layerfuse.look import output as reports
from layerfuse.look.accumulate import LayerStatistics
from layerfuse.look.grouping import all_groups, best_count
from layerfuse.look.pictures import batches, find_pictures, require_look
from layerfuse.model.pretrained import load_image_processor
from layerfuse.vision.encoder import Encoder, load_encoder

MEASURES = tuple(reports.TITLES)
SAVE_SECONDS = 60
FILE = "similarity.json"


@torch.inference_mode()
def measure(
    encoders: Sequence[Encoder],
    processors: Sequence[Any],
    pictures: Sequence[Picture],
    *,
    batch_size: int = 16,
    seed: int = 0,
    unfinished: Path | None = None,
    progress: Callable[[int], Any] = lambda done: None,
) -> LayerStatistics:
    """One pass over the pictures through every encoder, each with its own image processor.

    With `unfinished`, sums are saved there each minute, and a killed pass continues from them if
    encoders, pictures and seed are the same. Raises ValueError naming a picture that cannot be
    used.
    """
    found = LayerStatistics(len(pictures), seed)
    device = next(encoders[0].parameters()).device
    key = _key(encoders, processors, pictures, seed) if unfinished else ""
    if unfinished and unfinished.exists():
        try:
            state = load_file(unfinished)
        except SafetensorError as error:
            raise ValueError(f"{unfinished} is damaged ({error}): delete it to restart") from error
        if bytes(state.pop("key").tolist()).decode() == key:
            found.restore(state, device)
    saved = time.monotonic()
    for names, pixels in batches(pictures, processors, batch_size, found.done):
        seen = zip(encoders, pixels, strict=True)
        found.add([encoder(x.to(device)) for encoder, x in seen], names)
        progress(found.done)
        if unfinished and time.monotonic() - saved > SAVE_SECONDS:
            state = {name: tensor.contiguous() for name, tensor in found.state().items()}
            whole = unfinished.with_suffix(f".{os.getpid()}")
            save_file({**state, "key": torch.tensor(list(key.encode()))}, whole)
            whole.replace(unfinished)
            saved = time.monotonic()
    return found


def _key(encoders: Any, processors: Any, pictures: Any, seed: int) -> str:
    towers = [encoder.digests()[encoder.layers[-1]] for encoder in encoders]
    known = pictures if isinstance(pictures, list) else [len(pictures), pictures[0]]
    names = [p.name if isinstance(p, Picture) else p for p in known]
    settings = [towers, [p.to_dict() for p in processors], names, seed]
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


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
    seed: int = 0,
    output: Path | None = None,
    console: Console | None = None,
) -> Path:
    """Measure how alike the layers of an encoder are; returns the path of `similarity.json`.

    `images` is what `find_pictures` takes. `other` is a second encoder to compare with by CKA. The
    `groups` groups come from the matrix `by`, one of `MEASURES`; 0: as many as have the widest mean
    silhouette. Everything goes to `output` (default `runs/look-<encoder>`). Raises ValueError or
    OSError for what cannot be used, ImportError without the packages of the extra `look`.
    """
    _check(by, batch_size, limit)
    console = console or Console()
    folder = output or look_folder(encoder)
    pictures = find_pictures(images, split, limit)
    towers = [load_encoder(name, DTYPES[dtype]) for name in (encoder, other) if name]
    layers, prefix = list(towers[0].layers), towers[0].prefix
    if not 0 <= groups <= layers[-1]:
        raise ValueError(f"{groups} groups cannot be made; valid: 0..{layers[-1]}")
    processors = [load_image_processor(name) for name in (encoder, other) if name]
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / "similarity.unfinished"
    how: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "unfinished": unfinished}
    with reports.progress_bar(console) as bar:
        task = bar.add_task("looking at pictures", total=len(pictures))
        how["progress"] = lambda done: bar.update(task, completed=done)
        found = measure(towers, processors, pictures, **how)
    report: dict = {"encoder": encoder, "other": other, "depth": layers[-1], "layers": layers}
    report["left_out"] = f"{prefix} prefix tokens (CLS, registers) of every picture"
    report |= {"source": images, "split": split, "limit": limit, "dtype": dtype, "seed": seed}
    report |= {"by": by, **describe(found, by, groups)}
    reports.draw_similarity(report, folder)
    write_text(file := folder / FILE, json.dumps(report) + "\n")
    unfinished.unlink(missing_ok=True)
    reports.similarity_table(report, console)
    console.print(f"similarity: {file}", soft_wrap=True)
    return file


def _check(by: str, batch_size: int, limit: int | None) -> None:
    """Raises as `similarity` does, before anything is loaded."""
    for module in ("cka", "sklearn"):
        require_look(module)
    if by not in MEASURES:
        raise ValueError(f"no similarity {by!r}; valid: {', '.join(MEASURES)}")
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ValueError("the batch size and the limit must be at least 1")


def look_folder(encoder: str) -> Path:
    """Where the verbs that look at an encoder write by default."""
    return Path("runs") / f"look-{Path(encoder).name}"


def describe(found: LayerStatistics, by: str = "cosine", groups: int = 3) -> dict:
    """The measured numbers as plain lists (undefined: None) with the groups of layers 1..L."""
    result = found.result()
    matrix = result[by][1:, 1:]
    if not np.isfinite(matrix).all():
        undefined = [k for k, row in enumerate(result[by]) if k and not np.isfinite(row).any()]
        raise ValueError(
            f"{by} is undefined (layers {undefined or 'all'}): layers must vary over the pictures, "
            f"and CKA needs 4 of them; more or other pictures help, or another measure"
        )
    parts = all_groups(matrix, list(range(1, len(matrix) + 1)))
    del result["mean"]
    plain = {name: _plain(value) for name, value in {**result, **found.scores()}.items()}
    return {**plain, "groups": parts, "chosen": groups or best_count(parts)}


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | list):
        return [_plain(item) for item in value]
    if isinstance(value, float | np.floating):
        return round(float(value), 6) if np.isfinite(value) else None
    return value
