"""Where the runs of a study happen: one after another here, or many at once with Ray."""

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from layerfuse.data.cache import FeatureStore
from layerfuse.data.conversations import Samples
from layerfuse.local_models import home
from layerfuse.recipe import Recipe
from layerfuse.study import worker
from layerfuse.study.arms import Run
from layerfuse.study.live import LiveTable

POLL_SECONDS = 2.0
Finish = Callable[[Run, float], None]
"""(run, seconds that it took)"""


def run_local(
    recipe: Recipe,
    todo: list[Run],
    samples: dict[str, Samples],
    store: FeatureStore | None,
    folder: Path,
    modules: list[str],
    table: LiveTable,
    finish: Finish,
) -> None:
    """One run after another, in this process, or in those that `resources.processes` asks for."""
    for run in todo:
        started = time.perf_counter()
        table.start(run)
        if recipe.resources.processes == 1:
            worker.run_arm(recipe, run, samples, store, folder, partial(_step, table, run))
        else:
            worker.launch(recipe, str(folder.resolve()), run.folder, modules)
        finish(run, time.perf_counter() - started)


def _step(table: LiveTable, run: Run, phase: str, done: int, total: int, note: str) -> None:
    table.step(f"{run.name}: {phase}", done, total, note)


def run_ray(
    recipe: Recipe,
    todo: list[Run],
    folder: Path,
    modules: list[str],
    table: LiveTable,
    finish: Finish,
) -> None:
    """As many runs at once as the resources allow, on the cluster of $RAY_ADDRESS or here.

    All machines must see the study's folder and the cache. A run whose worker died starts again
    from its last checkpoint; one that fails does not stop the others. Raises RuntimeError with the
    first failure when all are done.
    """
    import ray

    wanted = recipe.resources
    local: dict[str, Any] = {} if os.environ.get("RAY_ADDRESS") else {"include_dashboard": False}
    shared = {"LAYERFUSE_HOME": str(home().resolve()), "PYTHONPATH": os.pathsep.join(_path())}
    ray.init(runtime_env={"env_vars": shared}, log_to_driver=False, **local)
    gpus = wanted.gpus
    if gpus is None:
        gpus = float(wanted.processes) if ray.cluster_resources().get("GPU") else 0.0
    task = ray.remote(num_cpus=wanted.cpus, num_gpus=gpus, max_retries=wanted.retries)(_in_worker)
    study = str(folder.resolve())
    try:
        started = {task.remote(recipe, study, run.folder, modules): run for run in todo}
        _collect(ray, started, folder, table, finish)
    finally:
        ray.shutdown()


def _path() -> list[str]:
    """Where Python finds this layerfuse and the user's modules."""
    own = str(Path(__file__).parents[2])
    return [own, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]


def _in_worker(recipe: Recipe, study: str, folder: str, modules: list[str]) -> float:
    began = time.perf_counter()
    if recipe.resources.processes == 1:
        worker.run_one(study, folder, modules, recipe.resources.cpus)
    else:
        worker.launch(recipe, study, folder, modules)
    return time.perf_counter() - began


def _collect(
    ray: Any, started: dict[Any, Run], folder: Path, table: LiveTable, finish: Finish
) -> None:
    failed: list[str] = []
    waiting = dict(started)
    while waiting:
        done, _ = ray.wait(list(waiting), timeout=POLL_SECONDS)
        for run in waiting.values():
            progress = folder / run.folder / worker.PROGRESS
            if progress.exists():
                table.note(run, progress.read_text("utf-8"))
        for task in done:
            run = waiting.pop(task)
            try:
                finish(run, ray.get(task))
            except ray.exceptions.RayError as error:
                failed.append(f"{run.name}: {error}")
                table.note(run, "failed")
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(started)} runs failed. {failed[0]}")
