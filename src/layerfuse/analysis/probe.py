"""What each layer knows: a linear probe per layer, task and kind of features."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch.nn import functional as F

from layerfuse.analysis.output import draw_probe, probe_table, progress_bar, write_json
from layerfuse.analysis.similarity import FILE, look_folder
from layerfuse.analysis.tasks import Problem, Task, find_tasks, task_names
from layerfuse.data.pictures import batches, require_look
from layerfuse.data.samples import Picture
from layerfuse.encoder import DTYPES, Encoder, load_encoder
from layerfuse.processor import load_image_processor
from layerfuse.selection import LayerSpec, select

FEATURES = {"mean": slice(1), "grid": slice(1, None)}
"""Where `pooled` holds the mean patch token, and the patch tokens average-pooled to a grid."""
RESAMPLES = 1000


@torch.inference_mode()
def pooled(
    encoder: Encoder,
    processor: Any,
    pictures: Sequence[Picture],
    grid: int,
    batch_size: int,
    tick: Callable[[int], Any],
) -> np.ndarray:
    """The mean patch token of every layer, then its patch tokens average-pooled to a grid:
    (L, pictures, 1 + grid², D) in float16."""
    found = []
    device = next(encoder.parameters()).device
    for names, (pixels,) in batches(pictures, [processor], batch_size):
        features = encoder(pixels.to(device))
        maps = torch.stack(features.patches).transpose(2, 3).unflatten(3, features.grid)
        finite = maps.isfinite().flatten(2).all(dim=2)
        if not finite.all():
            layer, row = (int(i) for i in (~finite).nonzero()[0])
            raise ValueError(f"layer {layer} of {names[row]} holds infinite or undefined features")
        maps = maps.flatten(0, 1).float()
        sizes = [F.adaptive_avg_pool2d(maps, size).flatten(2) for size in (1, grid)]
        cells = torch.cat(sizes, dim=2).unflatten(0, (len(features.layers), -1)).transpose(2, 3)
        found.append(cells.clamp(-65504, 65504).half().cpu().numpy())
        tick(len(names))
    return np.concatenate(found, axis=1)


def probe(
    encoder: str,
    data: str | None = None,
    test: str | None = None,
    *,
    tasks: str | None = None,
    layers: Sequence[LayerSpec] | None = None,
    grid: int = 4,
    batch_size: int = 16,
    dtype: str = "float32",
    seed: int = 0,
    output: Path | None = None,
    console: Console | None = None,
) -> Path:
    """Probe every layer and some combinations on every task; returns the path of `probe.json`.

    `data` and `test` are what `find_tasks` takes. A probe is scikit-learn's ridge classifier on
    standardised features, its penalty chosen per probe by leave-one-out; the layers of a
    combination stand side by side, each standardised. Everything goes to `output` (default
    `runs/look-<encoder>`). Raises ValueError or OSError, before anything is written, for what
    cannot be used, and ImportError without scikit-learn.
    """
    require_look("sklearn")
    console = console or Console()
    folder = output or look_folder(encoder)
    problem = find_tasks(data, test, task_names(tasks), seed)
    tower = load_encoder(encoder, DTYPES[dtype])
    chosen = _selections(tower.layers[-1], folder, layers)
    processor = load_image_processor(encoder)
    folder.mkdir(parents=True, exist_ok=True)
    report = {"encoder": encoder, "depth": tower.layers[-1], "source": data, "test": test}
    report |= {"asked": tasks, "grid": grid, "dtype": dtype, "seed": seed, **problem.described()}
    with progress_bar(console) as bar:
        everything = [*problem.train, *problem.test]
        tick = partial(bar.advance, bar.add_task("encoding pictures", total=len(everything)))
        features = pooled(tower, processor, everything, grid, batch_size, tick)
        for kind, cells in FEATURES.items():
            x, what = features[:, :, cells], f"probing {kind} features"
            rows = [_row(problem, x, some, seed) for some in bar.track(chosen, description=what)]
            report[kind] = _relative(rows)
    for kind in FEATURES:
        shown = {**report, "features": kind, "rows": report[kind]}
        draw_probe(shown, folder / f"probe-{kind}")
        probe_table(shown, console)
    file = write_json(folder / "probe.json", report)
    for name, why in problem.left_out.items():
        console.print(f"not probed: {name} ({why})", soft_wrap=True)
    console.print(f"probe: {file}", soft_wrap=True)
    return file


def _selections(depth: int, folder: Path, given: Sequence[LayerSpec] | None) -> list[list[int]]:
    """Every single layer, then the combinations, each once."""
    several = default_combinations(depth, folder) if given is None else given
    found = [select(spec, depth).layers for spec in [*range(depth + 1), *several]]
    return [list(layers) for layers in dict.fromkeys(found)]


def default_combinations(depth: int, folder: Path) -> list[LayerSpec]:
    """The middle layers of three thirds, and representatives by the folder's similarity file."""
    found: list[LayerSpec] = [sorted({max(1, round(depth * k / 6)) for k in (1, 3, 5)})]
    if (folder / FILE).exists():
        found.append(f"similarity:{min(3, depth)}@{folder / FILE}")
    return found


def _row(problem: Problem, features: np.ndarray, layers: list[int], seed: int) -> dict[str, Any]:
    """All tasks on the features (L, pictures, cells, D) of some layers, side by side."""
    x = np.concatenate([features[k].reshape(features.shape[1], -1) for k in layers], axis=1)
    x, count = x.astype(np.float32), len(problem.train)
    cells = {}
    for task in problem.tasks:
        hits = _right(task, x[:count], x[count:])
        asked = hits[~np.isnan(hits)]
        said = "".join("-" if np.isnan(hit) else str(int(hit)) for hit in hits)
        cell = {"accuracy": float(asked.mean()), "interval": _wilson(asked), "hits": said}
        cells[task.name] = cell
    name = "+".join(map(str, layers))
    mean = float(np.mean([cell["accuracy"] for cell in cells.values()]))
    interval = np.percentile(bootstrap(cells, list(cells), seed), [2.5, 97.5]).tolist()
    return {"name": name, "layers": layers, "tasks": cells, "mean": mean, "interval": interval}


def bootstrap(cells: dict[str, Any], tasks: list[str], seed: int) -> np.ndarray:
    """Resampled means over tasks, (RESAMPLES,): pictures are drawn, the same for equal seeds."""
    marks = [[np.nan if c == "-" else float(c) for c in cells[task]["hits"]] for task in tasks]
    table = np.array(marks).T
    count = len(table)
    draws = np.random.default_rng(seed).multinomial(count, [1 / count] * count, size=RESAMPLES)
    asked = draws @ ~np.isnan(table)
    return (draws @ np.nan_to_num(table) / np.maximum(asked, 1)).mean(axis=1)


def _right(task: Task, train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """1 or 0 for each test picture; NaN where the task was not asked."""
    from sklearn.linear_model import RidgeClassifierCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    labels = np.array([a if a in task.classes else "" for a in task.train])
    known = labels != ""
    model = make_pipeline(StandardScaler(), RidgeClassifierCV(alphas=np.logspace(-1, 7, 17)))
    said = model.fit(train[known], labels[known]).predict(test)
    return np.array(
        [np.nan if a is None else float(a == s) for a, s in zip(task.test, said, strict=True)]
    )


def _wilson(hits: np.ndarray) -> list[float]:
    """Wilson's 95 % interval of a share."""
    from scipy.stats import binomtest

    found = binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
    return [float(found.low), float(found.high)]


def _relative(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add each score as a share of the task's best single layer (paper 3, Fig. 3)."""
    for name in rows[0]["tasks"]:
        best = max(r["tasks"][name]["accuracy"] for r in rows if len(r["layers"]) == 1)
        for row in rows:
            cell = row["tasks"][name]
            cell["relative"] = cell["accuracy"] / best if best else 0.0
    return rows
