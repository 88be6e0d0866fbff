"""What each layer knows: a linear probe per layer, task and kind of features.

The tasks classify pictures; they come from samples with short answers.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from torch.nn import functional as F

from layerfuse.data.picture import Picture
from layerfuse.data.sample import by_turn
from layerfuse.data.sources import Samples, load
from layerfuse.evaluate.metrics import normalize
from layerfuse.files import write_text
from layerfuse.hardware import DTYPES
from layerfuse.look.output import draw_probe, probe_table, progress_bar
from layerfuse.look.pictures import batches, require_look
from layerfuse.look.similarity import FILE, look_folder
from layerfuse.model.pretrained import load_image_processor
from layerfuse.model.processor import question_of
from layerfuse.recipe.schema import Data, Scenes
from layerfuse.vision.encoder import Encoder, load_encoder
from layerfuse.vision.selection import LayerSpec, select

FEATURES = {"mean": slice(1), "grid": slice(1, None)}
"""Where `pooled` holds the mean patch token, and the patch tokens average-pooled to a grid."""
RESAMPLES = 1000
WORDINGS = 8
"""A family with more different questions asks about what the question names."""
COMMON = 5
"""An answer needs so many training pictures to be a class."""
Answers = dict[str, tuple[Picture, dict[str, str]]]
SCENES: dict[Literal["train", "test"], int] = {"train": 800, "test": 400}


@dataclass(frozen=True)
class Task:
    """One family of questions: the answer about each picture, by its place; None: not asked."""

    name: str
    train: list[str | None]
    test: list[str | None]
    classes: list[str]

    @property
    def chance(self) -> float:
        """Accuracy on the test pictures of always giving the commonest training answer."""
        asked = [a for a in self.test if a is not None]
        commonest = Counter(a for a in self.train if a is not None).most_common(1)[0][0]
        return asked.count(commonest) / len(asked)


@dataclass(frozen=True)
class Problem:
    """Tasks over training and test pictures, and the families that are none, with the reason."""

    train: list[Picture]
    test: list[Picture]
    tasks: list[Task]
    left_out: dict[str, str]


def task_names(tasks: str | None) -> list[str] | None:
    """The names in `count,shape`, each once; None for none."""
    return list(dict.fromkeys(n.strip() for n in tasks.split(",") if n.strip())) if tasks else None


def find_tasks(
    data: str | None, test: str | None, wanted: list[str] | None = None, seed: int = 0
) -> Problem:
    """The tasks of two LLaVA JSON files (or folders with captions). Without `test`, three tenths of
    the pictures are drawn for it; without `data`, scenes are generated.

    A task is a family (or, where samples name none, a question). Raises ValueError if there is no
    task, or none of the name `wanted`.
    """
    if data is None and test is not None:
        raise ValueError("test pictures need training pictures: give the data too")
    if data is None:
        parts = [Scenes(count=n, split=split, questions=8) for split, n in SCENES.items()]
        samples: list[Samples] = [load(Data(scenes=part)) for part in parts]
    else:
        samples = [load(Data(path=path)) for path in (data, test) if path]
    train, wordings = _answers(samples[0])
    if len(samples) > 1:
        tested, _ = _answers(samples[1])
    else:
        shuffled = np.random.default_rng(seed).permutation(sorted(train)).tolist()
        held_out = set(shuffled[: round(0.3 * len(shuffled))])
        # Both parts keep the order of the data.
        tested = {name: train[name] for name in train if name in held_out}
        train = {name: train[name] for name in train if name not in held_out}
    possible: list[Task] = []
    left_out: dict[str, str] = {}
    for name in sorted(wordings):
        task = _task(name, train, tested)
        # What cannot be learned or measured is no task; the report says why.
        if task is None:
            continue
        if len(wordings[name]) > WORDINGS:
            left_out[name] = f"{len(wordings[name])} different questions"
        elif len(task.classes) < 2:
            left_out[name] = f"{len(task.classes)} answers with {COMMON} training pictures"
        elif not any(task.test):
            left_out[name] = "not asked about a test picture"
        else:
            possible.append(task)
    names = [task.name for task in possible]
    missing = sorted(set(wanted or ()) - set(names))
    if missing or not names:
        raise ValueError(f"no task {missing or ''}; tasks: {names}, left out: {left_out}")
    return Problem(
        train=[picture for picture, _ in train.values()],
        test=[picture for picture, _ in tested.values()],
        tasks=[task for task in possible if wanted is None or task.name in wanted],
        left_out=left_out,
    )


def _task(name: str, train: Answers, test: Answers) -> Task | None:
    """The task of this name; None if no training picture is asked for it."""
    train_answers = [answers.get(name) for _, answers in train.values()]
    test_answers = [answers.get(name) for _, answers in test.values()]
    counts = Counter(answer for answer in train_answers if answer is not None)
    if not counts:
        return None
    classes = sorted(answer for answer, count in counts.items() if count >= COMMON)
    return Task(name=name, train=train_answers, test=test_answers, classes=classes)


def _answers(samples: Samples) -> tuple[Answers, dict[str, set[str]]]:
    """Per picture its first answer of each task, and the questions of each task."""
    answers: Answers = {}
    wordings: dict[str, set[str]] = {}
    for sample in (sample for sample in samples if len(sample.pictures) == 1):
        picture = sample.pictures[0]
        found = answers.setdefault(picture.name, (picture, {}))[1]
        for turn in by_turn(sample):
            question = normalize(question_of(turn.messages))
            task = turn.families[0] if turn.families else question
            wordings.setdefault(task, set()).add(question)
            found.setdefault(task, normalize(turn.messages[-1]["content"]))
    return answers, wordings


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
    found, device = [], next(encoder.parameters()).device
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

    `data` and `test` are what `find_tasks` takes; all goes to `output` (default
    `runs/look-<encoder>`). Raises ValueError or OSError, before anything is written, for what
    cannot be used, and ImportError without scikit-learn.
    """
    require_look("sklearn")
    console = console or Console()
    folder = output or look_folder(encoder)
    problem = find_tasks(data, test, task_names(tasks), seed)
    tower = load_encoder(encoder, DTYPES[dtype])
    depth = tower.layers[-1]
    several = default_combinations(depth, folder) if layers is None else layers
    each = [select(spec, depth).layers for spec in [*range(depth + 1), *several]]
    chosen = [list(layers) for layers in dict.fromkeys(each)]  # each once
    processor = load_image_processor(encoder)
    folder.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "encoder": encoder,
        "depth": depth,
        "source": data,
        "test": test,
        "asked": tasks,
        "grid": grid,
        "dtype": dtype,
        "seed": seed,
        "train_pictures": len(problem.train),
        "test_pictures": len(problem.test),
        "tasks": {t.name: {"chance": t.chance, "classes": t.classes} for t in problem.tasks},
        "left_out": problem.left_out,
    }
    everything = [*problem.train, *problem.test]
    with progress_bar(console) as bar:
        tick = partial(bar.advance, bar.add_task("encoding pictures", total=len(everything)))
        features = pooled(tower, processor, everything, grid, batch_size, tick)
        for kind, cells in FEATURES.items():
            x, what = features[:, :, cells], f"probing {kind} features"
            rows = [_row(problem, x, some, seed) for some in bar.track(chosen, description=what)]
            report[kind] = _relative(rows)
    return _publish(report, folder, console)


def _publish(report: dict[str, Any], folder: Path, console: Console) -> Path:
    """Figures, tables and `probe.json`, whose path it returns."""
    for kind in FEATURES:
        shown = {**report, "features": kind, "rows": report[kind]}
        draw_probe(shown, folder / f"probe-{kind}")
        probe_table(shown, console)
    write_text(file := folder / "probe.json", json.dumps(report) + "\n")
    for name, why in report["left_out"].items():
        console.print(f"not probed: {name} ({why})", soft_wrap=True)
    console.print(f"probe: {file}", soft_wrap=True)
    return file


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
    """1 or 0 for each test picture, NaN where the task was not asked: by a ridge classifier on
    features that are each standardised, its penalty chosen by leave-one-out."""
    from sklearn.linear_model import RidgeClassifierCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    labels = np.array([a if a in task.classes else "" for a in task.train])
    known = labels != ""
    model = make_pipeline(StandardScaler(), RidgeClassifierCV(alphas=np.logspace(-1, 7, 17)))
    said = model.fit(train[known], labels[known]).predict(test)
    pairs = zip(task.test, said, strict=True)
    return np.array([np.nan if a is None else float(a == s) for a, s in pairs])


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
