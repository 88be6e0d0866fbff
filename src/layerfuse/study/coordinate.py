"""The main job: train and compare every arm of a recipe, then write the report."""

import json
import os
import pickle
import platform
import shutil
import subprocess
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from rich.console import Console
from transformers.utils import logging as transformers_logging

import layerfuse
from layerfuse.data.feature_store import digests_of
from layerfuse.files import locked, write_text
from layerfuse.hardware import device
from layerfuse.recipe.reader import load_recipe
from layerfuse.recipe.schema import Recipe
from layerfuse.study.check import LEFT_OUT, Faults, digest_samples, leave_out, load_checked
from layerfuse.study.encode import encode_pictures, pictures_of
from layerfuse.study.execute import ENVIRONMENT, FEATURES, PROGRESS, Job, run_local, run_ray
from layerfuse.study.plan import PlannedRun, runs
from layerfuse.study.progress_table import LiveTable
from layerfuse.study.report import write_report


def study(
    recipe_path: str | Path,
    overrides: tuple[str, ...] = (),
    *,
    output: Path | None = None,
    engine: Literal["local", "ray"] = "local",
    modules: Sequence[str] = (),
    console: Console | None = None,
) -> Path:
    """PlannedRun what is not yet done of a recipe and write `report.html`; returns its path.

    Everything goes to `output` (default `runs/<name>`). A run that is finished there is not run
    again; a killed study continues. `modules` are what processes of their own must import for user
    strategies. Raises ValueError or FileNotFoundError, before any training, for anything in the
    recipe, the data or the models that does not fit.
    """
    _check_surroundings(engine)
    recipe = load_recipe(recipe_path, overrides)
    console = console or Console()
    folder = output or Path("runs") / recipe.name
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with LiveTable(runs(recipe, samples=""), console) as table:  # only their names are used
        samples, bad = load_checked(recipe, table.step)
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / ".lock", _refuse):
            _do(Job(recipe, folder, modules, samples, None), bad, engine, table)
    return write_report(folder)


def _refuse() -> None:
    raise ValueError("another process is running a study in this folder")


def _do(job: Job, bad: Faults, engine: str, table: LiveTable) -> None:
    """The runs that are not yet done."""
    recipe, folder = job.recipe, job.study
    tick = partial(table.step, "reading pictures")
    digests = digests_of(pictures_of(job.samples.values()), tick)
    held = digest_samples(job.samples, digests)
    write_text(folder / "recipe.yaml", yaml.safe_dump(_resolved(recipe), sort_keys=False))
    write_text(folder / ENVIRONMENT, json.dumps(environment(recipe, held), indent=1))
    all_runs = runs(recipe, held)
    todo = [run for run in all_runs if run.result(folder) is None]
    for run in all_runs:
        if run not in todo:
            table.finish(run, _mean(folder, run), None)

    def finish(run: PlannedRun, seconds: float) -> None:
        (folder / run.folder / PROGRESS).unlink(missing_ok=True)
        table.finish(run, _mean(folder, run), seconds)
        _collect(folder, all_runs)

    if todo:
        job.store, unreadable = encode_pictures(recipe, job.samples, digests, table.step)
        job.samples = leave_out(recipe, job.samples, unreadable)
        _remember(job, {name: {**bad[name], **unreadable[name]} for name in bad}, table.console)
        (run_ray if engine == "ray" else run_local)(job, todo, table, finish)
    _collect(folder, all_runs)
    _keep_models(recipe, folder, all_runs)


def _check_surroundings(engine: str) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("use no launcher: a study starts processes with `resources.processes=N`")
    if engine == "ray" and find_spec("ray") is None:
        raise ImportError("--engine ray needs Ray: run pip install 'layerfuse[ray]'")


def _mean(folder: Path, run: PlannedRun) -> float:
    result = run.result(folder)
    if result is None:
        raise RuntimeError(f"{run.name} left no result in {folder / run.folder}")
    return result["scores"]["mean"]


def _remember(job: Job, left_out: Faults, console: Console) -> None:
    """Keep for other processes which samples are left out and where features are; say which, and
    who does not read the cache."""
    recipe, folder = job.recipe, job.study
    write_text(folder / LEFT_OUT, json.dumps(left_out, indent=1))
    (folder / FEATURES).write_bytes(pickle.dumps((job.store, digest_samples(job.samples, {}))))
    for name, found in left_out.items():
        ids = ", ".join([sample for sample, _ in found.values()][:5])
        count = f"{name}: {len(found)} bad samples are left out: {ids}"
        if found:
            more = ", ..." if len(found) > 5 else ""
            console.print(f"{count}{more} (reasons in {folder / LEFT_OUT})", soft_wrap=True)
        if recipe.cache_features and not recipe.reads_cache(name):
            crops = name in recipe.stages and recipe.stages[name].random_crop is not None
            why = "crops pictures at random" if crops else "has a trained encoder"
            note = "its pictures are encoded as they come, not from the cache"
            console.print(f"{name} {why}: {note}", soft_wrap=True)


def _collect(folder: Path, todo: list[PlannedRun]) -> None:
    found = [json.dumps(row) + "\n" for run in todo if (row := run.result(folder)) is not None]
    write_text(folder / "results.jsonl", "".join(found))


def _keep_models(recipe: Recipe, folder: Path, todo: list[PlannedRun]) -> None:
    """With `keep_models: best`, only the run with the highest mean accuracy keeps its model."""
    if recipe.keep_models != "best":
        return
    best = max(todo, key=lambda run: _mean(folder, run))
    for run in todo:
        if run is not best:
            shutil.rmtree(folder / run.folder / "model", ignore_errors=True)


def _resolved(recipe: Recipe) -> dict[str, Any]:
    """The recipe as data, arms spelled out with their defaults."""
    plain = recipe.model_dump(mode="json", exclude_none=True)
    plain["arms"] = [arm.model_dump(mode="json", exclude_none=True) for arm in recipe.all_arms()]
    plain["baseline"] = recipe.baseline_name
    for key in ("grid", "fusion_defaults"):
        plain.pop(key, None)
    return plain


def environment(recipe: Recipe, samples: str) -> dict[str, str]:
    """Versions, commit and device: what a reader needs to repeat the study."""
    names = ("torch", "transformers", "accelerate", "peft", "datasets", "tokenizers", "numpy")
    root = Path(__file__).parents[3]
    commit = ""
    if (root / ".git").exists() and shutil.which("git"):
        command = ["git", "rev-parse", "HEAD"]
        commit = subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.strip()
    return {
        "layerfuse": layerfuse.__version__,
        "commit": commit or "not a git checkout",
        "samples": samples,
        "python": platform.python_version(),
        **{name: version(name) for name in names},
        "device": str(device()),
        "dtype": recipe.dtype,
        "cpu threads": str(torch.get_num_threads()),
        "cpus": str(os.cpu_count()),
    }
