"""Train one arm: compose, calibrate, run the stages, save."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import set_seed

from layerfuse.data.collate import Collator, SampleDataset, visual_inputs
from layerfuse.data.feature_store import FeatureStore
from layerfuse.data.sample import by_turn
from layerfuse.data.sources import Samples
from layerfuse.files import write_text
from layerfuse.fusion import parse
from layerfuse.hardware import DTYPES, device
from layerfuse.model.config import FusionConfig
from layerfuse.model.pretrained import compose_processor
from layerfuse.model.processor import Processor, question_of
from layerfuse.model.vlm import FusionVLM
from layerfuse.recipe.schema import Arm, Recipe, Stage
from layerfuse.train import stages
from layerfuse.train.trainer import checkpoints, fit
from layerfuse.vision.encoder import Encoder, load_tower, load_vision_config
from layerfuse.vision.features import Features, concatenate
from layerfuse.vision.selection import select

CALIBRATION_SAMPLES, CALIBRATION_BATCH = 256, 32
Report = Callable[[str, int, int, float | None], None]


@dataclass
class Trained:
    """A trained arm and what its training cost."""

    model: FusionVLM
    processor: Processor
    losses: dict[str, list[tuple[int, float]]]
    seconds: dict[str, float]
    parameters: dict[str, int]


def encoder_for(recipe: Recipe) -> Encoder:
    """The recipe's encoder, on the CPU, with every layer that any of its arms reads."""
    config = load_vision_config(recipe.encoder.model)
    taps: set[int] = set()
    for arm in recipe.all_arms():
        selection = select(arm.layers, config.num_hidden_layers)
        taps |= set(parse(arm.fusion).options.resolve(selection).taps(selection))
    tower = load_tower(recipe.encoder.model, config, DTYPES[recipe.dtype])
    return Encoder(tower, taps, recipe.token_grid).eval()


def compose(recipe: Recipe, arm: Arm, seed: int) -> tuple[FusionVLM, Processor]:
    """The untrained model of an arm and its processor."""
    set_seed(seed)
    model: Any = FusionVLM.compose(
        recipe.encoder.model,
        recipe.llm.model,
        arm.layers,
        arm.fusion,
        token_grid=recipe.token_grid,
        image_token=recipe.image_token,
        dtype=DTYPES[recipe.dtype],
        attn_implementation=recipe.attn_implementation,
    )
    return model.to(device()), processor_for(recipe, model.config)


def processor_for(recipe: Recipe, config: FusionConfig) -> Processor:
    """The processor of an arm with this configuration."""
    template = Path(recipe.chat_template).read_text("utf-8") if recipe.chat_template else None
    parts = (recipe.encoder.model, recipe.llm.model)
    return compose_processor(*parts, config, template, recipe.image_token)


def calibrate(
    model: FusionVLM, processor: Processor, samples: Samples, store: FeatureStore | None
) -> None:
    """Measure the fusion's stored constants on the first training pictures."""
    config = model.fusion.config
    if config.normalize != "standardize" and config.token_scale is None:
        return
    chosen = list(islice((s for s in samples if s.pictures), CALIBRATION_SAMPLES))
    found: list[Features] = []
    with torch.no_grad():
        for start in range(0, len(chosen), CALIBRATION_BATCH):
            batch = visual_inputs(processor, chosen[start : start + CALIBRATION_BATCH], store)
            features = batch.get("features")
            if features is None:
                features = model.encode_images(batch["pixel_values"].to(model.device))
            found.append(features.to(device=model.device, dtype=model.fusion_dtype))
        if found:
            model.fusion.calibrate(concatenate(found), model.embedding_std)


def embed_questions(
    recipe: Recipe, processor: Processor, samples: Mapping[str, Samples], report: Report
) -> None:
    """Embed every question of the guided stages once, if the strategy reads sentences."""
    if not processor.instruction.guided or processor.instruction.made_by_model:
        return
    guided = (samples[n] for n, stage in recipe.stages.items() if stage.guided_by == "instruction")
    turns = (turn for part in guided for sample in part for turn in by_turn(sample))
    processor.instruction.remember(
        (question_of(turn.messages) for turn in turns),
        lambda phase, done, total, note="": report(phase, done, total, None),
    )


def train_arm(
    recipe: Recipe,
    arm: Arm,
    seed: int,
    samples: Mapping[str, Samples],
    store: FeatureStore | None,
    folder: Path,
    report: Report,
) -> Trained:
    """Run every stage of an arm. `samples` holds the data of each stage by name; `store` the cached
    features, or None to encode pictures as they come. Checkpoints go to `folder`/stages."""
    model, processor = compose(recipe, arm, seed)
    store = store and store.restrict(model.vision_tower.layers)
    first = next(iter(samples))
    calibrate(model, processor, samples[first], store if recipe.reads_cache(first) else None)
    embed_questions(recipe, processor, samples, report)
    trained = Trained(model, processor, {}, {}, {})
    for name, stage in remaining_stages(recipe, folder, trained):
        started = time.perf_counter()
        set_seed(seed)  # adapters begin alike, whether or not the stage before was continued
        adapted = stages.begin_stage(trained.model, stage, DTYPES[recipe.dtype])
        if recipe.liger:
            stages.apply_liger(trained.model)
        trained.parameters = stages.count_parameters(trained.model)
        used = store if recipe.reads_cache(name) else None
        trained.losses[name], saved = fit(
            trained.model,
            recipe,
            name,
            SampleDataset(samples[name], stage.random_crop, seed),
            Collator(processor, stage.prompt, stage.max_length, used, stage.guided_by),
            folder / "stages" / name,
            partial(report, name),
        )
        if saved is None:
            stages.end_stage(trained.model, adapted, DTYPES[recipe.dtype])
        else:
            trained.model = stages.load_trained(saved, stage, DTYPES[recipe.dtype])
        trained.seconds[name] = round(time.perf_counter() - started, 2)
        if PartialState().is_main_process:
            curves = {"losses": trained.losses, "seconds": trained.seconds}
            write_text(folder / "stages" / "finished.json", json.dumps(curves))
    whole: Any = trained.model
    whole.to(device()).eval()
    return trained


def remaining_stages(recipe: Recipe, folder: Path, trained: Trained) -> list[tuple[str, Stage]]:
    """The stages from the newest checkpoint on: earlier ones are contained in its weights."""
    every = list(recipe.stages.items())
    started = [i for i, (n, _) in enumerate(every) if checkpoints(folder / "stages" / n)]
    memory = folder / "stages" / "finished.json"
    if started and started[-1] and memory.exists():
        before = json.loads(memory.read_text("utf-8"))
        curves = before["losses"].items()
        trained.losses.update({k: [(step, loss) for step, loss in v] for k, v in curves})
        trained.seconds.update(before["seconds"])
    return every[started[-1] :] if started else every
