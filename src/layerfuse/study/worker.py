"""One run of a study: train, test, write the result; here, or in a process of its own."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from layerfuse.data.cache import FeatureStore
from layerfuse.data.conversations import Samples
from layerfuse.evaluate.run import predict, scores
from layerfuse.recipe import Recipe
from layerfuse.recipe_file import load_recipe
from layerfuse.study.arms import Run, runs
from layerfuse.study.prepare import remembered
from layerfuse.train.run import Trained, train_arm

Step = Callable[[str, int, int, str], None]
"""(phase, done, in all, note)"""
FEATURES, PROGRESS, LOG = "features.pkl", "progress", "log.txt"


def run_arm(
    recipe: Recipe,
    run: Run,
    samples: dict[str, Samples],
    store: FeatureStore | None,
    study_folder: Path,
    step: Step,
) -> None:
    """Train and test one arm; the result is the last file that its folder gets. Of several
    processes that train together, the first tests."""
    folder = study_folder / run.folder
    folder.mkdir(parents=True, exist_ok=True)

    def report(stage: str, done: int, total: int, loss: float | None) -> None:
        step(stage, done, total, f"loss {loss:.3f}" if loss is not None else "")

    train_samples = {name: samples[name] for name in recipe.stages}
    trained = train_arm(recipe, run.arm, run.seed, train_samples, store, folder, report)
    if not PartialState().is_main_process:
        return
    started = time.perf_counter()
    rows = predict(
        trained.model,
        trained.processor,
        samples["evaluate"],
        store if recipe.reads_cache() else None,
        batch_size=recipe.evaluate.batch_size,
        max_new_tokens=recipe.evaluate.max_new_tokens,
        controls=recipe.evaluate.controls,
        progress=lambda done, total: step("evaluate", done, total, ""),
    )
    trained.seconds["evaluate"] = round(time.perf_counter() - started, 2)
    write_text(folder / "predictions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    if recipe.keep_models != "none":
        trained.model.save_pretrained(folder / "model")
        trained.processor.save_pretrained(folder / "model")
    write_text(folder / "result.json", json.dumps(_result(run, trained, rows)))
    shutil.rmtree(folder / "stages", ignore_errors=True)


def _result(run: Run, trained: Trained, rows: list[dict[str, Any]]) -> dict[str, Any]:
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


def write_text(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    unfinished = file.with_name(file.name + ".tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(file)


def run_one(study: str, folder: str, modules: list[str], threads: int | None = None) -> None:
    """Do the run of a prepared study that has this folder. Raises RuntimeError if this process's
    recipe, data or layerfuse differ from those of the study."""
    sys.path.insert(0, str(Path.cwd()))
    for module in modules:
        import_module(module)
    if threads:
        torch.set_num_threads(threads)
    recipe = load_recipe(Path(study) / "recipe.yaml")
    found = {run.folder: run for run in runs(recipe)}
    if folder not in found:
        raise RuntimeError(
            f"{study} has no run {folder}: this process has other data files or another layerfuse"
        )
    features = Path(study) / FEATURES
    store = pickle.loads(features.read_bytes()) if features.exists() else None
    progress = Path(study) / folder / PROGRESS
    last = 0.0

    def step(phase: str, done: int, total: int, note: str) -> None:
        nonlocal last
        if time.monotonic() - last > 1 and PartialState().is_main_process:
            last = time.monotonic()
            write_text(progress, f"{phase} {done}/{total} {note}")

    run_arm(recipe, found[folder], remembered(recipe, Path(study)), store, Path(study), step)
    progress.unlink(missing_ok=True)


def launch(recipe: Recipe, study: str, folder: str, modules: list[str]) -> None:
    """Do a run in several processes, as the recipe's `resources` say.

    Raises RuntimeError with the end of the log if one of them fails.
    """
    wanted = recipe.resources
    command = [sys.executable, "-m"]
    if wanted.accelerate is None and not torch.cuda.is_available():
        command += ["torch.distributed.run", f"--nproc-per-node={wanted.processes}"]
        command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    else:
        command += ["accelerate.commands.launch", f"--num_processes={wanted.processes}"]
        command += ["--main_process_port=0"]
        shipped = Path(__file__).parent / "accelerate" / f"{wanted.accelerate}.yaml"
        config = str(shipped) if shipped.exists() else wanted.accelerate
        command += [f"--config_file={config}"] if config else ["--multi_gpu"]
    command += ["-m", "layerfuse.study.worker", study, folder, *modules]
    log = Path(study) / folder / LOG
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as out:
        done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ})
    if done.returncode:
        tail = "\n".join(log.read_text("utf-8", errors="replace").splitlines()[-15:])
        raise RuntimeError(f"the processes of {folder} failed; the end of {log}:\n{tail}")


if __name__ == "__main__":
    PartialState()  # joins the other processes and takes this one's GPU
    run_one(sys.argv[1], sys.argv[2], sys.argv[3:])
    PartialState().destroy_process_group()
