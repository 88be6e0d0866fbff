"""Train one arm: compose, calibrate, run the stages."""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import set_seed

from layerfuse.data.collate import Collator, SampleDataset
from layerfuse.data.feature_store import FeatureStore
from layerfuse.data.lazy_records import Samples
from layerfuse.data.sample import by_turn
from layerfuse.data.subset import draw_subsets
from layerfuse.data.text_files import read_text
from layerfuse.files import write_text
from layerfuse.hardware import DTYPES, device
from layerfuse.model.chat_template import question_of
from layerfuse.model.config import FusionConfig, resolve_strategy
from layerfuse.model.given_parts import read_given_projector
from layerfuse.model.pretrained import compose_processor
from layerfuse.model.processor import Processor
from layerfuse.model.vlm import FusionVLM
from layerfuse.progress import Progress, silent
from layerfuse.recipe.arms import Arm
from layerfuse.recipe.schema import Recipe
from layerfuse.recipe.stage import Stage
from layerfuse.train import stages
from layerfuse.train.along import AlongTraining, MomentCallback
from layerfuse.train.calibration import calibrate
from layerfuse.train.closed_answers import ClosedAnswers
from layerfuse.train.trainer import Fitted, LossCurve, MakeCollator, checkpoints, fit
from layerfuse.vision.encoder import Encoder, load_tower, load_vision_config
from layerfuse.vision.selection import select

FINISHED = "finished.json"
"""Curves and times of the stages that an interrupted run has finished."""


@dataclass(frozen=True)
class Trained:
    """A trained arm and what its training cost."""

    model: FusionVLM
    processor: Processor
    losses: dict[str, LossCurve]
    """by stage"""
    seconds: dict[str, float]
    """by stage"""
    parameters: dict[str, int]
    """of each part, and those that the last stage trained"""


@dataclass(frozen=True)
class Remaining:
    """What an interrupted run still has to do, and what is known of the stages before."""

    names: list[str]
    """the stages to run, in their order; at least one"""
    losses: dict[str, LossCurve]
    seconds: dict[str, float]


def encoder_for(recipe: Recipe) -> Encoder:
    """The recipe's encoder, on the CPU, with every layer that any of its arms reads."""
    config = load_vision_config(recipe.encoder.model)
    taps: set[int] = set()
    for arm in recipe.all_arms():
        selection = select(arm.layers, config.num_hidden_layers)
        strategy = resolve_strategy(arm.fusion, selection)
        taps.update(strategy.options.taps(selection))
    tower = load_tower(recipe.encoder.model, config, DTYPES[recipe.dtype])
    return Encoder(tower, taps, recipe.token_grid).eval()


def compose(recipe: Recipe, arm: Arm, seed: int) -> tuple[FusionVLM, Processor]:
    """The untrained model of an arm, on this process's device, and its processor.

    Arms of one seed begin alike in all that they share: what is random in the LLM, and parts of the
    fusion with the same name and shape.
    """
    set_seed(seed)
    # transformers types `to` for its own classes only
    model: Any = FusionVLM.compose(
        recipe.encoder.model,
        recipe.llm.model,
        arm.layers,
        arm.fusion,
        token_grid=recipe.token_grid,
        image_token=recipe.image_token,
        dtype=DTYPES[recipe.dtype],
        attn_implementation=recipe.attn_implementation,
        llm_blocks=recipe.llm.blocks,
    )
    # By the seed itself: how much was drawn so far differs between arms and between processes.
    model.fusion.reset_parameters(seed)
    if recipe.start_from is not None:
        model.fusion.begin_as(read_given_projector(recipe.encoder.model))
    processor = processor_for(recipe, model.config)
    # Saved with the model: only the processor knows the chat template.
    processor.turn_ends.set_stop_tokens(model.generation_config)
    # Constants are measured in this mode, as the features in the cache are.
    model.to(device()).eval()
    stages.use_kernels(model, recipe)
    return model, processor


def processor_for(recipe: Recipe, config: FusionConfig) -> Processor:
    """The processor of an arm with this configuration.

    Raises:
        LayerfuseError: the recipe's chat template cannot be read.
    """
    template = None
    if recipe.chat_template:
        template = read_text(Path(recipe.chat_template))
    return compose_processor(
        recipe.encoder.model,
        recipe.llm.model,
        config,
        chat_template=template,
        image_token=recipe.image_token,
        image_aspect_ratio=recipe.image_aspect_ratio,
    )


def embed_questions(
    recipe: Recipe,
    processor: Processor,
    samples: Mapping[str, Samples],
    progress: Progress = silent,
) -> None:
    """Embed every question of the guided stages once, if the strategy reads sentences.

    Args:
        recipe: says which stages an instruction guides.
        processor: keeps the embeddings.
        samples: by stage.
        progress: is told of the texts that are embedded.
    """
    source = processor.instruction
    if not source.guided or source.made_by_model:
        return
    source.remember(_guiding_questions(recipe, samples), progress)


def _guiding_questions(recipe: Recipe, samples: Mapping[str, Samples]) -> Iterator[str]:
    """The question of every answer that the guided stages train on."""
    for name, stage in recipe.stages.items():
        if stage.guided_by != "instruction":
            continue
        for sample in samples[name]:
            for turn in by_turn(sample):
                yield question_of(turn.messages)


def train_arm(
    recipe: Recipe,
    arm: Arm,
    seed: int,
    *,
    samples: Mapping[str, Samples],
    store: FeatureStore | None,
    folder: Path,
    progress: Progress = silent,
    along: AlongTraining | None = None,
    closed_answers: ClosedAnswers | None = None,
) -> Trained:
    """Run every stage of an arm, from its newest checkpoint on.

    Args:
        recipe: of the study.
        arm: one of its arms.
        seed: of the fusion's initialisation, the order of the data, and the subsets of stages.
        samples: all usable samples of each stage, by the stage's name; where a stage asks for a
            subset, the seed draws it here.
        store: cached features, or None to encode pictures as they come.
        folder: of the run; checkpoints go to its `stages`.
        progress: is told of every step, under the stage's name.
        along: what is measured meanwhile, without a trace in what is trained; None for nothing.
        closed_answers: those of these samples, which the arms of a study share; None finds them
            where the recipe closes its answers.

    Raises:
        LayerfuseError: the loss is not finite, or processes cannot share a batch.
        torch.OutOfMemoryError: with a note on what would need less memory.
    """
    model, processor = compose(recipe, arm, seed)
    if recipe.closed_answers:
        if closed_answers is None:
            closed_answers = ClosedAnswers(recipe, samples)
        model.close_answers(closed_answers.tokens(processor))
    samples = draw_subsets(samples, recipe.subsets, seed)
    # The store holds the layers of all arms; this arm reads its own.
    if store is not None:
        store = store.restrict(model.vision_tower.layers)
    # Before any step: the constants belong to the untrained encoder's features.
    calibrate(model, processor, recipe, samples, store)
    embed_questions(recipe, processor, samples, progress)
    remaining = remaining_stages(recipe, folder)
    losses = dict(remaining.losses)
    seconds = dict(remaining.seconds)
    parameters: dict[str, int] = {}
    for name in remaining.names:
        started = time.perf_counter()
        stage = recipe.stages[name]
        stage_store = None
        if recipe.stage_reads_cache(name):
            stage_store = store
        make_collator = partial(_collator, processor, stage, stage_store)
        dataset = SampleDataset(samples[name], stage.random_crop, seed)
        callback = None
        if along is not None:
            callback = along.of_stage(name, processor)
        try:
            model, parameters, fitted = _train_stage(
                model,
                recipe,
                name,
                dataset=dataset,
                make_collator=make_collator,
                folder=folder / "stages" / name,
                progress=progress,
                along=callback,
            )
        except torch.OutOfMemoryError as error:
            error.add_note(stages.memory_advice(name, stage, PartialState().num_processes))
            raise
        losses[name] = fitted.losses
        seconds[name] = round(fitted.earlier_seconds + time.perf_counter() - started, 2)
        if PartialState().is_main_process:
            # Checkpoints of later stages hold the weights, but not these.
            curves = {"losses": losses, "seconds": seconds}
            write_text(folder / "stages" / FINISHED, json.dumps(curves))
    # transformers types `to` for its own classes only
    whole: Any = model
    whole.to(device()).eval()
    return Trained(model, processor, losses, seconds, parameters)


def _collator(
    processor: Processor,
    stage: Stage,
    store: FeatureStore | None,
    needs_blank: bool,
) -> Collator:
    """What makes the batches of a stage.

    Args:
        processor: of the model.
        stage: says how conversations are written and what guides them.
        store: cached features; None to encode pictures as they come.
        needs_blank: whether a batch of text alone gets a blank picture.
    """
    return Collator(
        processor,
        stage.prompt,
        stage.max_length,
        store,
        stage.guided_by,
        blank=needs_blank,
    )


def _train_stage(
    model: FusionVLM,
    recipe: Recipe,
    name: str,
    *,
    dataset: SampleDataset,
    make_collator: MakeCollator,
    folder: Path,
    progress: Progress,
    along: MomentCallback | None,
) -> tuple[FusionVLM, dict[str, int], Fitted]:
    """Run one stage.

    Returns:
        The model as the stage leaves it, the numbers of parameters while it trained, and what
        there is to know of its steps.
    """
    stage = recipe.stages[name]
    dtype = DTYPES[recipe.dtype]
    # Adapters begin alike, whether or not the stage before was continued.
    set_seed(dataset.seed)
    adapted = stages.begin_stage(model, stage, dtype)
    parameters = stages.count_parameters(model)
    fitted = fit(
        model,
        recipe,
        name,
        dataset=dataset,
        make_collator=make_collator,
        folder=folder,
        progress=progress,
        along=along,
    )
    if fitted.saved is None:
        stages.end_stage(model, adapted, dtype)
    else:
        # No process holds the whole model: each reads what all have written.
        model = stages.load_trained(fitted.saved, stage, dtype)
        stages.use_kernels(model, recipe)
    return model, parameters, fitted


def remaining_stages(recipe: Recipe, folder: Path) -> Remaining:
    """The stages from the newest checkpoint on: its weights contain those before.

    Args:
        recipe: of the study.
        folder: of the run.
    """
    names = list(recipe.stages)
    # Models of finished stages are not kept: without a checkpoint a stage starts again.
    begun = 0
    for place, name in enumerate(names):
        if checkpoints(folder / "stages" / name):
            begun = place
    memory = folder / "stages" / FINISHED
    if begun == 0 or not memory.exists():
        return Remaining(names[begun:], {}, {})
    before = json.loads(memory.read_text("utf-8"))
    losses = {}
    for name, curve in before["losses"].items():
        losses[name] = [(step, loss) for step, loss in curve]
    return Remaining(names[begun:], losses, before["seconds"])
