"""Do the runs of a study: in this process, in several that train together, or many at once by Ray.

`python -m layerfuse.study.execute STUDY RUN [MODULE ...]` is one process of a run.
"""

import ctypes
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from layerfuse.data.feature_store import FeatureStore
from layerfuse.data.sources import Samples
from layerfuse.evaluate.answer import Answerer, predict
from layerfuse.evaluate.metrics import scores
from layerfuse.files import write_text
from layerfuse.paths import home
from layerfuse.recipe.reader import load_recipe
from layerfuse.recipe.schema import Recipe
from layerfuse.study.check import digest_samples, remembered
from layerfuse.study.plan import PlannedRun, runs
from layerfuse.study.progress_table import LiveTable
from layerfuse.train.arm import Trained, train_arm

Step = Callable[[str, int, int, str, str], None]
Finish = Callable[[PlannedRun, float], None]
ENVIRONMENT, FEATURES = "environment.json", "features.pkl"
PROGRESS, LOG = "progress", "log.txt"
POLL_SECONDS = 2.0


@dataclass
class Job:
    """A study at work: what all its runs share."""

    recipe: Recipe
    study: Path
    modules: Sequence[str]
    """what processes of their own must import for user strategies"""
    samples: dict[str, Samples]
    store: FeatureStore | None


def run_arm(job: Job, run: PlannedRun, step: Step) -> None:
    """Train and test one arm; the result is the last file that its folder gets. Of several
    processes that train together, the first tests."""
    recipe, store = job.recipe, job.store
    folder = job.study / run.folder
    folder.mkdir(parents=True, exist_ok=True)

    def report(stage: str, done: int, total: int, loss: float | None = None) -> None:
        step(stage, done, total, "" if loss is None else f"loss {loss:.3f}", run.name)

    train_samples = {name: job.samples[name] for name in recipe.stages}
    trained = train_arm(recipe, run.arm, run.seed, train_samples, store, folder, report)
    if not PartialState().is_main_process:
        return
    started = time.perf_counter()
    used = store if recipe.reads_cache() else None
    answerer = Answerer(trained.model, trained.processor, used)

    def tested(phase: str, done: int, total: int, note: str = "") -> None:
        report(phase, done, total)

    rows = predict(answerer, job.samples["evaluate"], recipe.evaluate, tested)
    trained.seconds["evaluate"] = round(time.perf_counter() - started, 2)
    write_text(folder / "predictions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    if recipe.keep_models != "none":
        trained.model.save_pretrained(folder / "model")
        trained.processor.save_pretrained(folder / "model")
    write_text(folder / "result.json", json.dumps(_result(run, trained, rows)))
    shutil.rmtree(folder / "stages", ignore_errors=True)


def _result(run: PlannedRun, trained: Trained, rows: list[dict[str, Any]]) -> dict[str, Any]:
    config = trained.model.config
    return {
        "arm": run.arm.label,
        "seed": run.seed,
        "layers": config.vision_layers,
        "depth": config.vision_config.num_hidden_layers,
        "fusion": config.fusion,
        "kind": trained.model.fusion.kind,
        "folder": run.folder,
        "scores": scores(rows),
        "losses": trained.losses,
        "parameters": trained.parameters,
        "seconds": trained.seconds,
    }


def run_one(study: Path, folder: str, modules: Sequence[str]) -> None:
    """Do the run of a prepared study that has this folder. Raises RuntimeError if this process's
    recipe, data or layerfuse differ from those of the study."""
    sys.path.insert(0, str(Path.cwd()))
    for module in modules:
        import_module(module)
    recipe = load_recipe(study / "recipe.yaml")
    environment = json.loads((study / ENVIRONMENT).read_text("utf-8"))
    found = {run.folder: run for run in runs(recipe, environment["samples"])}
    store, held = pickle.loads((study / FEATURES).read_bytes())
    samples = remembered(recipe, study)
    if folder not in found or digest_samples(samples, {}) != held:
        raise RuntimeError(f"{folder}: this process has other data files or another layerfuse")
    job = Job(recipe, study, modules, samples, store)
    last = 0.0

    def step(phase: str, done: int, total: int, note: str, _: str) -> None:
        nonlocal last
        if time.monotonic() - last > 1 and PartialState().is_main_process:
            last = time.monotonic()
            write_text(study / folder / PROGRESS, f"{phase} {done}/{total} {note}")

    run_arm(job, found[folder], step)


def launch(recipe: Recipe, study: Path, folder: str, modules: Sequence[str]) -> None:
    """Do a run in several processes, as the recipe's `resources` say. Raises RuntimeError with the
    end of the log if one of them fails."""
    wanted = recipe.resources
    if wanted.accelerate is None and not torch.cuda.is_available():
        command = ["torch.distributed.run", f"--nproc-per-node={wanted.processes}"]
        command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    else:
        command = ["accelerate.commands.launch", f"--num_processes={wanted.processes}"]
        shipped = Path(__file__).parent / "accelerate" / f"{wanted.accelerate}.yaml"
        config = str(shipped) if shipped.exists() else wanted.accelerate
        command += ["--main_process_port=0", f"--config_file={config}" if config else "--multi_gpu"]
    command += ["-m", "layerfuse.study.execute", str(study), folder, *modules]
    log = study / folder / LOG
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as out:
        run = [sys.executable, "-m", *command]
        done = subprocess.run(run, stdout=out, stderr=out, preexec_fn=die_with_parent)
    if done.returncode:
        said = log.read_text("utf-8", errors="replace").splitlines()
        own = [line for line in said if line.startswith("[rank")]  # not the launcher's
        tail = "\n".join((own or said)[-12:])
        raise RuntimeError(f"the processes of {folder} failed; the end of {log}:\n{tail}")


def die_with_parent() -> None:
    """Ask the kernel (Linux) to kill this process with its parent: no orphan trains on."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def run_local(job: Job, todo: list[PlannedRun], table: LiveTable, finish: Finish) -> None:
    """One run after another, in this process, or in those that `resources.processes` asks for."""
    for run in todo:
        started = time.perf_counter()
        if job.recipe.resources.processes == 1:
            run_arm(job, run, table.step)
        else:
            launch(job.recipe, job.study.resolve(), run.folder, job.modules)
        finish(run, time.perf_counter() - started)


def run_ray(job: Job, todo: list[PlannedRun], table: LiveTable, finish: Finish) -> None:
    """As many runs at once as the resources allow, on the cluster of $RAY_ADDRESS or here; all
    machines must see the study's folder and the cache. A run whose worker died starts again from
    its last checkpoint. Raises RuntimeError with the first failure when all others are done."""
    ray: Any = import_module("ray")
    wanted = job.recipe.resources
    path = [str(Path(__file__).parents[2]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    shared = {"LAYERFUSE_HOME": str(home().resolve()), "PYTHONPATH": os.pathsep.join(path)}
    ray.init(runtime_env={"env_vars": shared}, log_to_driver=False)
    gpus = wanted.gpus
    if gpus is None:
        gpus = float(wanted.processes) if ray.cluster_resources().get("GPU") else 0.0
    task = ray.remote(num_cpus=wanted.cpus, num_gpus=gpus, max_retries=wanted.retries)(_in_worker)
    failed: list[str] = []
    try:
        given = (job.recipe, job.study.resolve())
        waiting = {task.remote(*given, run.folder, job.modules): run for run in todo}
        while waiting:
            done, _ = ray.wait(list(waiting), timeout=POLL_SECONDS)
            for run in waiting.values():
                progress = job.study / run.folder / PROGRESS
                note = progress.read_text("utf-8") if progress.exists() else "waiting"
                table.update(table.rows[run.name], note=note)
            for finished in done:
                run = waiting.pop(finished)
                try:
                    finish(run, ray.get(finished))
                except ray.exceptions.RayError as error:
                    failed.append(f"{run.name}: {error}")
    finally:
        ray.shutdown()
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(todo)} runs failed. {failed[0]}")


def _in_worker(recipe: Recipe, study: Path, folder: str, modules: Sequence[str]) -> float:
    began = time.perf_counter()
    if recipe.resources.processes == 1:
        torch.set_num_threads(recipe.resources.cpus)
        run_one(study, folder, modules)
    else:
        launch(recipe, study, folder, modules)
    return time.perf_counter() - began


if __name__ == "__main__":
    die_with_parent()
    PartialState()  # joins the other processes and takes this one's GPU
    run_one(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
    PartialState().destroy_process_group()
