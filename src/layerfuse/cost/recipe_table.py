"""What a recipe amounts to, computed on the meta device: no weights, no network."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedConfig

from layerfuse.cost.flops import (
    PARTS,
    TEXT_TOKENS,
    Known,
    count,
    flops,
    parts_of,
    text_config,
    tokens_of,
    vision_config,
)
from layerfuse.data.scene_files import asked_families
from layerfuse.data.sources import load
from layerfuse.data.subset import refuse_large_subset
from layerfuse.data.text_files import read_text
from layerfuse.errors import LayerfuseError
from layerfuse.local_models.registry import resolve
from layerfuse.model.chat_template import IMAGE_TOKEN
from layerfuse.model.config import FusionConfig, configure
from layerfuse.model.given_parts import given_parts
from layerfuse.model.vlm import FusionVLM
from layerfuse.recipe.arms import Arm
from layerfuse.recipe.data_source import Data
from layerfuse.recipe.growing import AutoSteps
from layerfuse.recipe.reader import load_recipe
from layerfuse.recipe.schema import Recipe
from layerfuse.recipe.stage import Stage
from layerfuse.tables import NO_BREAK, Heading, print_fitted
from layerfuse.vision.towers import native_size, patch_side


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
    recipe_path: str | Path,
    overrides: tuple[str, ...] = (),
    console: Console | None = None,
) -> tuple[Recipe, list[Shown]]:
    """Print the resolved recipe, its arms, and its stages.

    Args:
        recipe_path: the recipe's file.
        overrides: changes to it, as `key.sub=value`.
        console: where to print; the terminal by default.

    Returns:
        The recipe and its arms in numbers.

    Raises:
        LayerfuseError: the recipe is not valid, an arm cannot be built, or a configuration cannot
            be read.
    """
    recipe = load_recipe(recipe_path, overrides)
    if console is None:
        console = Console()
    if recipe.start_from is not None:
        parts = given_parts(recipe.start_from, console.print)
        recipe = recipe.starting_from(**asdict(parts))
    _check_sources(recipe)
    vision = vision_config(recipe.encoder)
    text = text_config(recipe.llm, recipe.llm.blocks)
    size = _image_size(recipe, vision)
    _check_size(recipe, vision, size)
    arms: list[Shown] = []
    known: Known = {}
    image_token_id = _image_token_id(recipe)
    for arm in recipe.all_arms():
        try:
            config = configure(
                vision,
                text,
                arm.layers,
                arm.fusion,
                token_grid=recipe.token_grid,
                image_token_id=image_token_id,
            )
        except LayerfuseError as error:
            raise LayerfuseError(f"arm {arm.label!r}: {error}") from error
        arms.append(measure(arm, config, size=size, stages=recipe.stages, known=known))
    blocks = f"{text.num_hidden_layers} blocks"
    if text.num_hidden_layers < text_config(recipe.llm).num_hidden_layers:
        blocks = f"the first {blocks} (llm.blocks, a screening device)"
    console.print(f"[bold]{recipe.name}[/bold]  {recipe.description}")
    console.print(
        f"encoder {recipe.encoder.model}: {vision.num_hidden_layers} blocks of width "
        f"{vision.hidden_size}, {size} px\n"
        f"LLM {recipe.llm.model}: {blocks} of width {text.hidden_size}\n"
    )
    _print_arms(recipe, arms, console)
    console.print()
    largest = recipe
    if recipe.data_sizes is not None:
        largest = recipe.of_size(recipe.data_sizes[-1])
    if recipe.step_rule is not None:
        largest = largest.of_steps(recipe.step_rule.maximum)
    _print_stages(largest, arms, console, recipe.step_rule)
    if recipe.step_rule is not None:
        plan = plan_of_budgets(recipe.last_stage, recipe.step_rule)
        console.print(f"\n{plan}", soft_wrap=True, highlight=False)
    if recipe.data_sizes is not None:
        console.print(f"\n{plan_of_sizes(recipe)}", soft_wrap=True, highlight=False)
    console.print(
        f"\nGFLOPs: forward of one image and {TEXT_TOKENS} text tokens. PFLOPs: all samples of a "
        "stage, one forward of the encoder and three times the forward of fusion and LLM; cached "
        "features and frozen parts cost less."
    )
    return recipe, arms


def measure(
    arm: Arm,
    config: FusionConfig,
    *,
    size: int,
    stages: dict[str, Stage],
    known: Known,
) -> Shown:
    """Build an arm on the meta device and count.

    Args:
        arm: the arm.
        config: its configuration.
        size: height and width of the pictures in pixels.
        stages: the stages of the recipe by name.
        known: FLOPs that arms share; what is counted is added.

    Returns:
        The arm in numbers.
    """
    model, parameters = count(config)
    trained = {}
    for name, stage in stages.items():
        trained[name] = _trained(model, stage)
    return Shown(
        arm=arm,
        layers=config.vision_layers,
        visual_tokens=tokens_of(model, size),
        parameters=parameters,
        trained=trained,
        flops=flops(model, size, known),
    )


def _trained(model: FusionVLM, stage: Stage) -> int:
    """Number of parameters that train in a stage."""
    lora = stage.lora
    parts = parts_of(model)
    total = 0
    for name in stage.trained_parts:
        # With LoRA the LLM itself is frozen; only its adapters train.
        if name != "llm" or lora is None:
            total += sum(weight.numel() for weight in parts[name].parameters())
    if lora is None:
        return total
    for name, module in model.language_model.get_decoder().named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        if lora.target_modules == "all-linear" or name.split(".")[-1] in lora.target_modules:
            # The two factors of a low-rank update: (r, in) and (out, r).
            total += lora.r * (module.in_features + module.out_features)
    return total


def _image_token_id(recipe: Recipe) -> int:
    """The id of the token that marks images, which may need a new row of embeddings; 0, which needs
    none, where the tokenizer is not at hand."""
    source = recipe.llm
    if source.config is not None or not Path(resolve(source.model)).is_dir():
        return 0
    from layerfuse.model.pretrained import load_tokenizer

    tokenizer = load_tokenizer(source.model, recipe.image_token)
    return int(tokenizer.convert_tokens_to_ids(recipe.image_token or IMAGE_TOKEN))


def _image_size(recipe: Recipe, vision: PreTrainedConfig) -> int:
    """Height and width in pixels of what the encoder's image processor makes."""
    source = recipe.encoder
    # The processor may crop to another size than the encoder was configured for.
    if source.config is None and Path(resolve(source.model)).is_dir():
        from layerfuse.model.pretrained import load_image_processor, processed_size

        image_processor = load_image_processor(source.model, recipe.image_aspect_ratio)
        height, width = processed_size(source.model, image_processor)
        if height != width:
            raise LayerfuseError(
                f"the image processor of {source.model} makes pictures of {height} x {width} "
                "pixels, and `show` counts squares alone"
            )
        return height
    size = source.image_size
    if size is not None:
        return size
    size = native_size(vision)
    if size[0] != size[1]:
        raise LayerfuseError(
            f"image_size of {source.model} is {list(size)}, and `show` counts squares alone"
        )
    return size[0]


def _check_sources(recipe: Recipe) -> None:
    """Raise LayerfuseError for files and questions that the recipe names and that do not exist.

    Data need not be at hand: their absence shows as unknown numbers of samples.
    """
    if recipe.chat_template is not None:
        read_text(Path(recipe.chat_template))
    sources = {f"stage {name!r}": stage.data for name, stage in recipe.stages.items()}
    sources["evaluate"] = recipe.evaluate.data
    if recipe.evaluate.validation is not None:
        sources["evaluate.validation"] = recipe.evaluate.validation
    for name, data in sources.items():
        if data.scenes is None:
            continue
        try:
            asked_families(data.scenes.families, data.scenes.questions)
        except LayerfuseError as error:
            raise LayerfuseError(f"{name}: {error}") from error


def _check_size(recipe: Recipe, vision: PreTrainedConfig, size: int) -> None:
    """Raise LayerfuseError if the pictures hold no patch."""
    patches = size // patch_side(vision)
    if patches == 0:
        raise LayerfuseError(
            f"encoder {recipe.encoder.model}: pictures of {size} pixels are smaller than a patch "
            f"of {patch_side(vision)}; give an image_size of at least that"
        )


def samples_in(data: Data) -> int | None:
    """Number of samples of a data set.

    Args:
        data: the data set.

    Returns:
        The number, counted if the data is at hand; None if nothing tells it.
    """
    if data.path is not None and Path(data.path).exists():
        return len(load(data))
    total = data.expected_samples
    if data.scenes is not None:
        total = data.scenes.count
    if total is None:
        # At most: of a data set that is not at hand no more is known.
        return data.limit
    remaining = max(0, total - data.skip)
    if data.limit is None:
        return remaining
    return min(remaining, data.limit)


def _print_arms(recipe: Recipe, arms: list[Shown], console: Console) -> None:
    headings = [
        Heading("arm"),
        Heading("layers"),
        Heading("visual tokens", is_number=True),
        Heading("vision", is_number=True),
        Heading("fusion", is_number=True),
        Heading("llm", is_number=True),
        Heading("GFLOPs vision / fusion / llm", is_number=True),
    ]
    rows = []
    for shown in arms:
        label = shown.arm.label
        if label == recipe.baseline_name:
            label = f"{label} (baseline)"
        gflops = [f"{shown.flops[part] / 1e9:,.1f}" for part in PARTS]
        cells = [
            label,
            ",".join(map(str, shown.layers)),
            str(shown.visual_tokens),
            _millions(shown.parameters["vision"]),
            _millions(shown.parameters["fusion"]),
            _millions(shown.parameters["llm"]),
            " / ".join(gflops),
        ]
        rows.append(cells)
    print_fitted(console, headings, rows, "arms")


def _print_stages(
    recipe: Recipe, arms: list[Shown], console: Console, step_rule: AutoSteps | None
) -> None:
    """Print the stages; with `steps: auto` the recipe is that of the most steps."""
    headings = [
        Heading("stage"),
        Heading("samples"),
        Heading("batch"),
        Heading("steps"),
        Heading("learning rates"),
        Heading("trains"),
        Heading("trained"),
        Heading("PFLOPs, at most"),
    ]
    rows = [_stage_cells(name, stage, arms) for name, stage in recipe.stages.items()]
    if step_rule is not None:
        place = headings.index(Heading("steps"))
        rows[-1][place] = _span_of_steps(step_rule)
    print_fitted(console, headings, rows, "stages")


def _stage_cells(name: str, stage: Stage, arms: list[Shown]) -> list[str]:
    """The row of one stage, over all arms."""
    samples = _trained_samples(name, stage)
    steps = stage.fixed_steps
    if samples:
        steps = steps_of(stage, samples)

    rates = []
    trains = []
    for part, rate in stage.learning_rates.items():
        rates.append(f"{part} {rate:g}")
        by_lora = part == "llm" and stage.lora is not None
        trains.append(f"{part} (LoRA)" if by_lora else f"{part} (full)")

    # A backward pass costs twice a forward pass; a frozen encoder has none.
    passes = {"vision": 1, "fusion": 3, "llm": 3}
    if "vision" in stage.learning_rates:
        passes["vision"] = 3
    largest = 0
    for shown in arms:
        cost = sum(passes[part] * shown.flops[part] for part in PARTS)
        largest = max(largest, cost)
    total = "unknown"
    if steps:
        total = f"{steps * stage.batch_size * largest / 1e15:,.2f}"

    trained = [shown.trained[name] for shown in arms]
    span = sorted({min(trained), max(trained)})
    return [
        name,
        "unknown" if samples is None else f"{samples:,}",
        str(stage.batch_size),
        str(steps or "unknown"),
        ", ".join(rates),
        ", ".join(trains),
        " to ".join(map(_millions, span)),
        total,
    ]


def _trained_samples(name: str, stage: Stage) -> int | None:
    """Number of different samples that a run trains on in a stage; None if nothing tells it.

    Raises:
        LayerfuseError: the stage asks for a subset of more samples than there are.
    """
    total = samples_in(stage.data)
    if stage.data.subset is None:
        return total
    if total is not None:
        refuse_large_subset(name, stage.data.subset, total)
    return stage.data.subset


def plan_of_sizes(recipe: Recipe) -> str:
    """Say what a study over data sizes will do.

    Args:
        recipe: has `data_sizes`.

    Returns:
        The sizes, with the steps of each, and the number of runs.
    """
    stage = recipe.stages[recipe.last_stage]
    lengths = []
    for size in recipe.data_sizes or []:
        if recipe.step_rule is None:
            steps = f"{steps_of(stage, size):,}"
        else:
            steps = _span_of_steps(recipe.step_rule)
        lengths.append(f"{size:,} ({steps} steps)")
    arms = recipe.all_arms()
    runs_of_size = sum(len(arm.seeds or recipe.all_seeds) for arm in arms)
    count = f"{runs_of_size} runs each"
    if recipe.seed_rule is not None:
        count = f"{len(arms) * recipe.seed_rule.first} to {count}"
    if recipe.step_rule is not None:
        count += " for every budget of steps"
    elif recipe.seed_rule is None:
        count += f", {runs_of_size * len(lengths)} in all"
    return (
        f"data_sizes: one study for each number of samples of {recipe.last_stage}: "
        f"{', '.join(lengths)}; {count}. The table of stages shows the largest."
    )


def _span_of_steps(rule: AutoSteps) -> str:
    """From the least to the most steps that a stage may get."""
    return f"{rule.first:,} to {rule.maximum:,}"


def plan_of_budgets(stage: str, rule: AutoSteps) -> str:
    """Say what a study with `steps: auto` will do.

    Args:
        stage: name of the last one.
        rule: when the study ends.

    Returns:
        The budgets, and what all of them take together.
    """
    budgets = ", ".join(f"{steps:,}" for steps in rule.budgets)
    goes_on = "all arms go on until each has"
    if not rule.same_for_all:
        goes_on = "each arm goes on until it has"
    return (
        f"steps: auto: {stage} is trained anew with {budgets} steps; {goes_on} learned what it "
        f"can. The table of stages shows the most steps; all budgets together are "
        f"{sum(rule.budgets):,}."
    )


def _millions(count: int) -> str:
    return f"{count / 1e6:,.2f}{NO_BREAK}M"


def steps_of(stage: Stage, samples: int) -> int:
    """Optimizer steps of a stage, as the trainer counts them: an epoch has whole batches.

    Args:
        stage: the stage.
        samples: the number of its samples.

    Returns:
        Steps of all epochs.

    Raises:
        RuntimeError: its steps are `auto`.
    """
    if stage.fixed_steps is not None:
        return stage.fixed_steps
    batches_per_epoch = math.ceil(samples / stage.batch_size)
    return math.ceil(stage.epochs * batches_per_epoch)
