"""The main job: train and compare every arm of a recipe, then write the report."""

import json
import os
import platform
import shutil
import subprocess
import time
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from transformers.utils import logging as transformers_logging

import layerfuse
from layerfuse.data.cache import FeatureStore, cached_features
from layerfuse.data.conversations import Samples, check, load
from layerfuse.encoder import device
from layerfuse.evaluate.metrics import scores
from layerfuse.evaluate.run import predict, questions
from layerfuse.processor import IMAGE_TOKEN, Processor, load_image_processor, load_tokenizer
from layerfuse.recipe import Recipe, Stage
from layerfuse.recipe_file import load_recipe
from layerfuse.study.arms import Run, check_arms, runs
from layerfuse.study.live import LiveTable
from layerfuse.study.report import write_report
from layerfuse.train.run import Trained, dtype_of, encoder_for, train_arm

CHECKED_PROMPTS = 50


def study(
    recipe_path: str | Path,
    overrides: tuple[str, ...] = (),
    *,
    output: Path | None = None,
    console: Console | None = None,
) -> Path:
    """Run what is not yet done of a recipe and write `report.html`; returns its path.

    Everything goes to `output` (default `runs/<name>`). A run that is finished there is not run
    again; a killed study continues. Raises ValueError or FileNotFoundError, before any training,
    for anything in the recipe, the data or the models that does not fit.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("a study runs its arms in one process: start it without torchrun")
    recipe = load_recipe(recipe_path, overrides)
    console = console or Console()
    folder = output or Path("runs") / recipe.name
    samples = check_everything(recipe)
    todo = runs(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "recipe.yaml", yaml.safe_dump(_resolved(recipe), sort_keys=False))
    _write(folder / "environment.json", json.dumps(environment(recipe), indent=1))
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with LiveTable(todo, console) as table:
        store: FeatureStore | None = None
        for run in todo:
            if (result := run.result(folder)) is not None:
                table.finish(run, result["scores"]["mean"], None)
                continue
            if store is None and recipe.cache_features:
                store = _cache(recipe, samples, table)
            started = time.perf_counter()
            result = run_arm(recipe, run, samples, store, folder, table)
            table.finish(run, result["scores"]["mean"], time.perf_counter() - started)
            _collect(folder, todo)
        _collect(folder, todo)
    report = write_report(folder)
    _keep_models(recipe, folder, todo)
    return report


def check_everything(recipe: Recipe) -> dict[str, Samples]:
    """Load the data of every stage and check models, arms and templates without loading weights."""
    check_arms(recipe)
    template = None
    if recipe.chat_template is not None:
        template = Path(recipe.chat_template).read_text("utf-8")
    processor = Processor(
        load_image_processor(recipe.encoder.model),
        load_tokenizer(recipe.llm.model, recipe.image_token),
        image_token=recipe.image_token or IMAGE_TOKEN,
        chat_template=template,
    )
    samples = {}
    for name, data in recipe.datasets():
        samples[name] = load(data)
        check(samples[name])
        if name in recipe.stages:
            _check_prompts(processor, samples[name], recipe.stages[name])
    if next(questions(samples["evaluate"]), None) is None:
        raise ValueError("the evaluation data holds no question with an answer")
    return samples


def _check_prompts(processor: Processor, samples: Samples, stage: Stage) -> None:
    """Encode some samples of a stage as training will. Raises ValueError naming the sample."""
    for sample in samples[:CHECKED_PROMPTS]:
        try:
            tokens = [1] * len(sample.pictures)
            processor.encode(list(sample.messages), tokens, stage.prompt, stage.max_length)
        except ValueError as error:
            raise ValueError(f"sample {sample.id}: {error}") from error


def run_arm(
    recipe: Recipe,
    run: Run,
    samples: dict[str, Samples],
    store: FeatureStore | None,
    study_folder: Path,
    table: LiveTable,
) -> dict[str, Any]:
    """Train and test one arm; the result is the last file that its folder gets."""
    folder = study_folder / run.folder
    folder.mkdir(parents=True, exist_ok=True)
    table.start(run)

    def step(stage: str, done: int, total: int, loss: float | None) -> None:
        note = f"loss {loss:.3f}" if loss is not None else ""
        table.step(f"{run.name}: {stage}", done, total, note)

    train_samples = {name: samples[name] for name in recipe.stages}
    trained = train_arm(recipe, run.arm, run.seed, train_samples, store, folder, step)
    started = time.perf_counter()
    rows = predict(
        trained.model,
        trained.processor,
        samples["evaluate"],
        store if recipe.encoder_is_stock() else None,
        batch_size=recipe.evaluate.batch_size,
        max_new_tokens=recipe.evaluate.max_new_tokens,
        controls=recipe.evaluate.controls,
        progress=lambda done, total: table.step(f"{run.name}: evaluate", done, total),
    )
    trained.seconds["evaluate"] = round(time.perf_counter() - started, 2)
    _write(folder / "predictions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    if recipe.keep_models != "none":
        trained.model.save_pretrained(folder / "model")
        trained.processor.save_pretrained(folder / "model")
    result = _result(run, trained, rows)
    _write(folder / "result.json", json.dumps(result))
    shutil.rmtree(folder / "stages", ignore_errors=True)
    return result


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


def _cache(recipe: Recipe, samples: dict[str, Samples], table: LiveTable) -> FeatureStore:
    pictures = chain.from_iterable(s.pictures for part in samples.values() for s in part)
    encoder = encoder_for(recipe)
    return cached_features(
        encoder,
        load_image_processor(recipe.encoder.model),
        pictures,
        progress=lambda done, total: table.step("encoding pictures", done, total),
    )


def _collect(folder: Path, todo: list[Run]) -> None:
    found = [result for run in todo if (result := run.result(folder)) is not None]
    _write(folder / "results.jsonl", "".join(json.dumps(row) + "\n" for row in found))


def _keep_models(recipe: Recipe, folder: Path, todo: list[Run]) -> None:
    """With `keep_models: best`, only the run with the highest mean accuracy keeps its model."""
    if recipe.keep_models != "best":
        return
    found = {run.folder: run.result(folder) for run in todo}
    finished = {name: result["scores"]["mean"] for name, result in found.items() if result}
    best = max(finished, key=lambda name: finished[name])
    for name in finished:
        if name != best:
            shutil.rmtree(folder / name / "model", ignore_errors=True)


def _resolved(recipe: Recipe) -> dict[str, Any]:
    """The recipe as data, arms spelled out with their defaults."""
    plain = recipe.model_dump(mode="json", exclude_none=True)
    plain["arms"] = [arm.model_dump(mode="json", exclude_none=True) for arm in recipe.all_arms()]
    plain["baseline"] = recipe.baseline_name
    for key in ("grid", "fusion_defaults"):
        plain.pop(key, None)
    return plain


def environment(recipe: Recipe) -> dict[str, str]:
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
        "python": platform.python_version(),
        **{name: version(name) for name in names},
        "device": str(device()),
        "dtype": str(dtype_of(recipe)).removeprefix("torch."),
        "cpu threads": str(torch.get_num_threads()),
        "cpus": str(os.cpu_count()),
    }


def _write(file: Path, text: str) -> None:
    unfinished = file.with_name(file.name + ".tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(file)
