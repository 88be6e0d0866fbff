"""What a recipe amounts to, computed on the meta device: no weights, no network."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, PreTrainedConfig

from layerfuse.config import FusionConfig, configure
from layerfuse.data.conversations import load
from layerfuse.encoder import Features, vision_config_of
from layerfuse.fusion import Layout, seen_images
from layerfuse.local_models import resolve
from layerfuse.model import FusionVLM
from layerfuse.recipe import Arm, Data, Recipe, Source, Stage
from layerfuse.recipe_file import load_recipe

TEXT_TOKENS = 64  # per sample in the FLOP estimate, beside the visual ones
PARTS = ("vision", "fusion", "llm")
Known = dict[tuple[str, Any, int], int]
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


def tokens_of(model: FusionVLM, size: int) -> int:
    """Number of tokens that replace an image of `size` pixels."""
    grid, fusion = model.vision_tower.grid(size, size), model.fusion
    return fusion.num_tokens(fusion.config, grid, len(model.config.vision_layers))


def count(config: FusionConfig) -> tuple[FusionVLM, dict[str, int]]:
    """A model on the meta device and the number of parameters of each of its parts."""
    with torch.device("meta"):
        model = FusionVLM(config).eval()
    parts = {"vision": model.vision_tower, "fusion": model.fusion, "llm": model.language_model}
    return model, {name: sum(p.numel() for p in x.parameters()) for name, x in parts.items()}


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


@torch.no_grad()
def flops(
    model: FusionVLM, size: int, known: Known | None = None, parts: Sequence[str] = PARTS
) -> dict[str, int]:
    """Forward FLOPs of one image of `size` pixels and TEXT_TOKENS tokens of text, per part, counted
    by torch from the operations on meta tensors; what is injected counts with the LLM.

    `known` keeps what is the same for other strategies with this encoder and LLM.
    """
    fusion, tower, known = model.fusion, model.vision_tower, {} if known is None else known
    width = model.config.text_config.hidden_size
    sentence = fusion.config.sentence_width if fusion.reads == "sentence" else width
    rows, columns = tower.grid(size, size)
    with torch.device("meta"):
        patches = torch.empty(1, rows * columns, model.config.vision_config.hidden_size)
        each = ((patches,) * len(tower.layers), (patches[:, 0],) * len(tower.layers))
        with FlopCounterMode(display=False) as counter:
            features = Features(tower.layers, *each, (rows, columns))
            visual = fusion(features, torch.empty(1, sentence))
        found = {"fusion": counter.get_total_flops()}
        tokens = visual.tokens.shape[1]
        length = tokens + TEXT_TOKENS
        layout = Layout.of(torch.zeros(1, length, dtype=torch.bool), 1, tokens)
        seen = seen_images(layout.mask, tokens, layout.most)
        visual = fusion.by_row(replace(visual, mask=layout.mask, seen=seen), layout)
        given: dict[str, Any] = {"visual": visual, "use_cache": False}
        given["attention_mask"] = torch.zeros(1, 1, length, length)  # finished: none is made
        given["inputs_embeds"] = torch.empty(1, length, width)
        look = partial(tower, torch.empty(1, 3, size, size))
        read = partial(model.language_model, **given)
        own = f"{fusion.config} {model.config.vision_groups}" if visual.memory else ""
        for part, key, action in (("vision", max(tower.layers), look), ("llm", own, read)):
            if part in parts and (part, key, length) not in known:
                with FlopCounterMode(display=False) as counter:
                    action()
                known[part, key, length] = counter.get_total_flops()
            if part in parts:
                found[part] = known[part, key, length]
    return found


def vision_config(source: Source) -> PreTrainedConfig:
    """The configuration of an encoder. Raises ValueError if it is none, OSError if not found."""
    return vision_config_of(_config(source))


def text_config(source: Source) -> PreTrainedConfig:
    """The configuration of a language model. Raises OSError if it cannot be found."""
    return _config(source).get_text_config()


def _config(source: Source) -> PreTrainedConfig:
    """The configuration that the recipe spells out, else that of the folder or hub id."""
    if settings := dict(source.config or {}):
        if "model_type" not in settings:
            raise ValueError(f"the configuration of {source.model} needs a model_type")
        return AutoConfig.for_model(settings.pop("model_type"), **settings)
    try:
        return AutoConfig.from_pretrained(resolve(source.model))
    except OSError as error:
        raise OSError(
            f"cannot read the configuration of {source.model}: no such folder, and no hub answered."
            " Pull a local model (`layerfuse models pull`), or write `config:` in the recipe"
        ) from error


def _image_size(source: Source, vision: PreTrainedConfig) -> int:
    if source.image_size is not None:
        return source.image_size
    if source.config is None and Path(resolve(source.model)).is_dir():
        from layerfuse.processor import load_image_processor

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
