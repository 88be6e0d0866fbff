"""What a recipe amounts to, computed on the meta device: no weights, no network."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, PreTrainedConfig

from layerfuse.config import FusionConfig, configure
from layerfuse.data.conversations import load
from layerfuse.encoder import Features, load_vision_config, vision_config_of
from layerfuse.fusion import Layout, seen_images
from layerfuse.local_models import is_pulled, resolve
from layerfuse.model import FusionVLM
from layerfuse.recipe import Arm, Data, Recipe, Source, Stage
from layerfuse.recipe_file import load_recipe

TEXT_TOKENS = 64
"""text tokens per sample in the FLOP estimate, beside the visual ones"""


@dataclass(frozen=True)
class Shown:
    """One arm of a recipe in numbers."""

    arm: Arm
    layers: list[int]
    fusion: dict[str, Any]
    visual_tokens: int
    parameters: dict[str, int]
    trained: dict[str, int]
    """parameters that train, per stage"""
    flops: dict[str, float]
    """forward FLOPs of one sample with one image, per part"""


def show(
    recipe_path: str | Path, overrides: tuple[str, ...] = (), console: Console | None = None
) -> tuple[Recipe, list[Shown]]:
    """Print the resolved recipe, its arms, and its stages. Returns the recipe and the arms."""
    recipe = load_recipe(recipe_path, overrides)
    console = console or Console()
    vision, text = vision_config(recipe.encoder), text_config(recipe.llm)
    arms = [measure(recipe, arm, vision, text) for arm in recipe.all_arms()]
    console.print(f"[bold]{recipe.name}[/bold]  {recipe.description}")
    console.print(
        f"encoder {recipe.encoder.model}: {vision.num_hidden_layers} blocks of width "
        f"{vision.hidden_size}, {_image_size(recipe, vision)} px"
    )
    console.print(
        f"LLM {recipe.llm.model}: {text.num_hidden_layers} blocks of width {text.hidden_size}\n"
    )
    console.print(_arm_table(recipe, arms))
    console.print(_stage_table(recipe, arms))
    console.print(
        f"GFLOPs: forward of one image and {TEXT_TOKENS} text tokens. PFLOPs: all samples of a "
        "stage, one forward of the encoder and three times the forward of fusion and LLM; cached "
        "features and frozen parts cost less."
    )
    return recipe, arms


def measure(recipe: Recipe, arm: Arm, vision: PreTrainedConfig, text: PreTrainedConfig) -> Shown:
    """Build one arm on the meta device and count. Raises ValueError naming the arm."""
    try:
        config = configure(vision, text, arm.layers, arm.fusion, recipe.token_grid)
    except ValueError as error:
        raise ValueError(f"arm {arm.label!r}: {error}") from error
    model, counts = count(config)
    size = _image_size(recipe, vision)
    grid = model.vision_tower.grid(size, size)
    trained = {name: _trained(model, stage, counts) for name, stage in recipe.stages.items()}
    return Shown(
        arm,
        config.vision_layers,
        config.fusion or {},
        model.fusion.num_tokens(model.fusion.config, grid, len(config.vision_layers)),
        counts,
        trained,
        flops(model, size),
    )


def count(config: FusionConfig) -> tuple[FusionVLM, dict[str, int]]:
    """A model on the meta device and the number of parameters of each of its parts."""
    with torch.device("meta"):
        model = FusionVLM(config).eval()
    parts = {"vision": model.vision_tower, "fusion": model.fusion, "llm": model.language_model}
    return model, {name: sum(p.numel() for p in x.parameters()) for name, x in parts.items()}


def _trained(model: FusionVLM, stage: Stage, counts: dict[str, int]) -> int:
    total = sum(counts[part] for part in stage.learning_rates if part != "llm" or not stage.lora)
    if stage.lora is None:
        return total
    named = stage.lora.target_modules
    for name, module in model.language_model.get_decoder().named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        if named == "all-linear" or name.rsplit(".", 1)[-1] in set(named):
            total += stage.lora.r * (module.in_features + module.out_features)
    return total


@torch.no_grad()
def flops(model: FusionVLM, size: int) -> dict[str, float]:
    """Forward FLOPs of one image of `size` pixels and TEXT_TOKENS tokens of text, per part, counted
    by torch from the operations on meta tensors; what is injected counts with the LLM."""
    fusion = model.fusion
    width = model.config.text_config.hidden_size
    sentence = fusion.config.sentence_width if fusion.reads == "sentence" else width
    with torch.device("meta"):
        with FlopCounterMode(display=False) as vision:
            features: Features = model.vision_tower(torch.empty(1, 3, size, size))
        with FlopCounterMode(display=False) as fused:
            visual = fusion(features, torch.empty(1, sentence))
        each = visual.tokens.shape[1]
        length = each + TEXT_TOKENS
        layout = Layout.of(torch.zeros(1, length, dtype=torch.bool), 1, each)
        seen = seen_images(layout.mask, each, layout.most)
        visual = fusion.by_row(replace(visual, mask=layout.mask, seen=seen), layout)
        given = {"inputs_embeds": torch.empty(1, length, width), "visual": visual}
        # a finished mask: none is made from values
        given |= {"attention_mask": torch.zeros(1, 1, length, length), "use_cache": False}
        with FlopCounterMode(display=False) as llm:
            model.language_model(**given)
    counters = {"vision": vision, "fusion": fused, "llm": llm}
    return {name: counter.get_total_flops() for name, counter in counters.items()}


def vision_config(source: Source) -> PreTrainedConfig:
    return vision_config_of(_from_recipe(source)) if source.config else _hub(source, True)


def text_config(source: Source) -> PreTrainedConfig:
    return _from_recipe(source).get_text_config() if source.config else _hub(source, False)


def _from_recipe(source: Source) -> PreTrainedConfig:
    settings = dict(source.config or {})
    if "model_type" not in settings:
        raise ValueError(f"the configuration of {source.model} needs a model_type")
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def _hub(source: Source, vision: bool) -> PreTrainedConfig:
    try:
        if vision:
            return load_vision_config(source.model)
        return AutoConfig.from_pretrained(resolve(source.model)).get_text_config()
    except OSError as error:
        raise OSError(
            f"cannot read the configuration of {source.model}: no such folder, and no hub answered."
            " Pull a local model (`layerfuse models pull`), or write `config:` in the recipe"
        ) from error


def _image_size(recipe: Recipe, vision: PreTrainedConfig) -> int:
    if recipe.encoder.image_size is not None:
        return recipe.encoder.image_size
    known = recipe.encoder.model
    if recipe.encoder.config is None and (Path(known).is_dir() or _local(known)):
        from layerfuse.processor import load_image_processor

        settings = load_image_processor(known).to_dict()
        size = settings.get("crop_size") or settings["size"]
        return int(size.get("height") or size["shortest_edge"])
    return int(vision.image_size)


def _local(name: str) -> bool:
    from layerfuse.local_models import MODELS

    return name in MODELS and is_pulled(name)


def samples_in(data: Data) -> int | None:
    """Number of samples, counted if the data is at hand."""
    if data.scenes is not None:
        return data.scenes.count
    if data.path is not None and Path(data.path).exists():
        return len(load(data))
    return min(filter(None, (data.expected_samples, data.limit)), default=None)


def _arm_table(recipe: Recipe, arms: list[Shown]) -> Table:
    table = Table(title="arms", title_justify="left", box=None, padding=(0, 2))
    for column in ("arm", "layers", "visual tokens", "vision", "fusion", "llm"):
        table.add_column(column, justify="left" if column in ("arm", "layers") else "right")
    table.add_column("GFLOPs vision / fusion / llm", justify="right")
    for shown in arms:
        name = shown.arm.label + (" (baseline)" if shown.arm.label == recipe.baseline_name else "")
        flops = " / ".join(f"{shown.flops[p] / 1e9:,.1f}" for p in ("vision", "fusion", "llm"))
        counts = [f"{shown.parameters[p] / 1e6:,.2f} M" for p in ("vision", "fusion", "llm")]
        layers = ",".join(map(str, shown.layers))
        table.add_row(name, layers, str(shown.visual_tokens), *counts, flops)
    return table


def _stage_table(recipe: Recipe, arms: list[Shown]) -> Table:
    table = Table(title="stages", title_justify="left", box=None, padding=(0, 2))
    columns = ("stage", "samples", "batch", "steps", "learning rates", "trains", "trained")
    for column in (*columns, "PFLOPs, at most"):
        table.add_column(column, justify="left")
    for name, stage in recipe.stages.items():
        samples = samples_in(stage.data)
        steps = steps_of(stage, samples) if samples else stage.steps
        rates = ", ".join(f"{part} {rate:g}" for part, rate in stage.learning_rates.items())
        how = ", ".join(
            f"{part} ({'LoRA' if part == 'llm' and stage.lora else 'full'})"
            for part in stage.learning_rates
        )
        trained = sorted({shown.trained[name] for shown in arms})
        span = " to ".join(f"{n / 1e6:,.2f} M" for n in (trained[0], trained[-1]))
        span = span if trained[0] != trained[-1] else f"{trained[0] / 1e6:,.2f} M"
        count = "unknown" if samples is None else f"{samples:,}"
        passes = 3 if "vision" in stage.learning_rates else 1
        cost = max(
            passes * s.flops["vision"] + 3 * (s.flops["fusion"] + s.flops["llm"]) for s in arms
        )
        total = f"{steps * stage.batch_size * cost / 1e15:,.2f}" if steps else "unknown"
        cells = (count, str(stage.batch_size), str(steps or "unknown"), rates, how, span, total)
        table.add_row(name, *cells)
    return table


def steps_of(stage: Stage, samples: int) -> int:
    """Optimizer steps of a stage on one device, as the trainer counts them: a last incomplete
    forward batch is dropped where there is at least one complete global batch."""
    if stage.steps is not None:
        return stage.steps
    device = stage.device_batch_size or stage.batch_size
    whole = samples >= stage.batch_size
    forwards = samples // device if whole else math.ceil(samples / device)
    return math.ceil(stage.epochs * math.ceil(forwards * device / stage.batch_size))
