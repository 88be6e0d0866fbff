"""What a recipe amounts to, computed on the meta device: no weights, no network."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table
from transformers import PreTrainedConfig

from layerfuse.cost.flops import (
    PARTS,
    TEXT_TOKENS,
    Known,
    count,
    flops,
    text_config,
    tokens_of,
    vision_config,
)
from layerfuse.data.sources import load
from layerfuse.local_models.registry import resolve
from layerfuse.model.config import FusionConfig, configure
from layerfuse.model.vlm import FusionVLM
from layerfuse.recipe.reader import load_recipe
from layerfuse.recipe.schema import Arm, Data, ModelSource, Recipe, Stage

LAYOUT: dict[str, Any] = {"title_justify": "left", "box": None, "padding": (0, 2)}


@dataclass(frozen=True)
class Shown:
    """One arm of a recipe in numbers."""

    arm: Arm
    layers: list[int]
    visual_tokens: int
    parameters: dict[str, int]
    trained: dict[str, int]
    """parameters that train, per stage"""
    flops: dict[str, int]
    """forward FLOPs of one sample with one image, per part"""


def show(
    recipe_path: str | Path, overrides: tuple[str, ...] = (), console: Console | None = None
) -> tuple[Recipe, list[Shown]]:
    """Print the resolved recipe, its arms, and its stages. Returns the recipe and the arms. Raises
    ValueError naming an arm that cannot be built."""
    recipe = load_recipe(recipe_path, overrides)
    console = console or Console()
    vision, text = vision_config(recipe.encoder), text_config(recipe.llm)
    size, arms, known = _image_size(recipe.encoder, vision), [], {}
    for arm in recipe.all_arms():
        try:
            config = configure(vision, text, arm.layers, arm.fusion, recipe.token_grid)
        except ValueError as error:
            raise ValueError(f"arm {arm.label!r}: {error}") from error
        arms.append(measure(arm, config, size, recipe.stages, known))
    console.print(f"[bold]{recipe.name}[/bold]  {recipe.description}")
    console.print(
        f"encoder {recipe.encoder.model}: {vision.num_hidden_layers} blocks of width "
        f"{vision.hidden_size}, {size} px\n"
        f"LLM {recipe.llm.model}: {text.num_hidden_layers} blocks of width {text.hidden_size}\n"
    )
    console.print(_arm_table(recipe, arms), _stage_table(recipe, arms))
    console.print(
        f"GFLOPs: forward of one image and {TEXT_TOKENS} text tokens. PFLOPs: all samples of a "
        "stage, one forward of the encoder and three times the forward of fusion and LLM; cached "
        "features and frozen parts cost less."
    )
    return recipe, arms


def measure(
    arm: Arm, config: FusionConfig, size: int, stages: dict[str, Stage], known: Known
) -> Shown:
    """Build an arm on the meta device and count, with pictures of `size` pixels."""
    model, counts = count(config)
    trained = {stage: _trained(model, how, counts) for stage, how in stages.items()}
    cost = flops(model, size, known)
    return Shown(arm, config.vision_layers, tokens_of(model, size), counts, trained, cost)


def _trained(model: FusionVLM, stage: Stage, counts: dict[str, int]) -> int:
    lora = stage.lora
    total = sum(counts[part] for part in stage.learning_rates if part != "llm" or not lora)
    if lora is None:
        return total
    for name, module in model.language_model.get_decoder().named_modules():
        named = lora.target_modules == "all-linear" or name.split(".")[-1] in lora.target_modules
        if named and isinstance(module, torch.nn.Linear):
            total += lora.r * (module.in_features + module.out_features)
    return total


def _image_size(source: ModelSource, vision: PreTrainedConfig) -> int:
    if source.image_size is not None:
        return source.image_size
    if source.config is None and Path(resolve(source.model)).is_dir():
        from layerfuse.model.pretrained import load_image_processor

        settings = load_image_processor(source.model).to_dict()
        size = settings.get("crop_size") or settings["size"]
        return int(size.get("height") or size["shortest_edge"])
    return int(vision.image_size)


def samples_in(data: Data) -> int | None:
    """Number of samples, counted if the data is at hand."""
    if data.scenes is not None:
        return data.scenes.count
    if data.path is not None and Path(data.path).exists():
        return len(load(data))
    return min(filter(None, (data.expected_samples, data.limit)), default=None)


def _arm_table(recipe: Recipe, arms: list[Shown]) -> Table:
    numbers = ("visual tokens", *PARTS, "GFLOPs vision / fusion / llm")
    right = [Column(name, justify="right") for name in numbers]
    table = Table("arm", "layers", *right, title="arms", **LAYOUT)
    for shown in arms:
        name = shown.arm.label + (" (baseline)" if shown.arm.label == recipe.baseline_name else "")
        flops = " / ".join(f"{shown.flops[part] / 1e9:,.1f}" for part in PARTS)
        counts = [_millions(shown.parameters[part]) for part in PARTS]
        layers = ",".join(map(str, shown.layers))
        table.add_row(name, layers, str(shown.visual_tokens), *counts, flops)
    return table


def _stage_table(recipe: Recipe, arms: list[Shown]) -> Table:
    columns = ("stage", "samples", "batch", "steps", "learning rates", "trains", "trained")
    table = Table(*columns, "PFLOPs, at most", title="stages", **LAYOUT)
    for name, stage in recipe.stages.items():
        samples = samples_in(stage.data)
        steps = steps_of(stage, samples) if samples else stage.steps
        rates = ", ".join(f"{part} {rate:g}" for part, rate in stage.learning_rates.items())
        ways = {part: "LoRA" if part == "llm" and stage.lora else "full" for part in PARTS}
        how = ", ".join(f"{part} ({ways[part]})" for part in stage.learning_rates)
        trained = [shown.trained[name] for shown in arms]
        span = " to ".join(_millions(n) for n in sorted({min(trained), max(trained)}))
        count = "unknown" if samples is None else f"{samples:,}"
        passes = {"vision": 3 if "vision" in stage.learning_rates else 1, "fusion": 3, "llm": 3}
        cost = max(sum(passes[part] * shown.flops[part] for part in PARTS) for shown in arms)
        total = f"{steps * stage.batch_size * cost / 1e15:,.2f}" if steps else "unknown"
        cells = (count, str(stage.batch_size), str(steps or "unknown"), rates, how, span, total)
        table.add_row(name, *cells)
    return table


def _millions(count: int) -> str:
    return f"{count / 1e6:,.2f} M"


def steps_of(stage: Stage, samples: int) -> int:
    """Optimizer steps of a stage, as the trainer counts them: an epoch has whole batches."""
    return stage.steps or math.ceil(stage.epochs * math.ceil(samples / stage.batch_size))
