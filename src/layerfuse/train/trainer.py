"""A thin `transformers.Trainer`: learning rates per part, progress, loss curve."""

import math
import os
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import unset_hf_deepspeed_config

from layerfuse.data.collate import Collator, LengthGroups, SampleDataset
from layerfuse.errors import LayerfuseError
from layerfuse.model.vlm import FusionVLM
from layerfuse.progress import Progress, silent
from layerfuse.recipe.schema import Recipe
from layerfuse.recipe.stage import Stage
from layerfuse.train.along import MomentCallback
from layerfuse.train.passes import Batch, split_rows, with_waiting
from layerfuse.train.stages import parameter_groups

LossCurve = list[tuple[int, float]]
"""(step, mean loss since the last point)"""

MakeCollator = Callable[[bool], Collator]
"""from whether a batch of text alone gets a blank picture to what makes the batches"""

SECONDS = "seconds"
"""What the log of a stage calls the time that its steps so far have taken."""
COMPLETE = "complete"
"""The last file of a checkpoint."""
LARGEST_SHARE = 0.02
"""Of the time of training: what saving checkpoints may take, if the recipe does not say when."""
LEAST_SECONDS = 60.0
"""Between two such checkpoints."""
BYTES_PER_SECOND = 500e6
"""What a disk is taken to write until a checkpoint has shown it."""
ADAM_BYTES = 8
"""AdamW's two moments of a weight that trains, in float32."""


@dataclass(frozen=True)
class Fitted:
    """A finished stage.

    Attributes:
        losses: its curve.
        saved: where the model is, if no process holds it whole.
        earlier_seconds: that steps took before an interruption.
    """

    losses: LossCurve
    saved: Path | None
    earlier_seconds: float


class FusionTrainer(Trainer):
    """`Trainer` with one learning rate per part of the model, batches of similar lengths, and a
    frozen encoder that FSDP leaves whole.

    Args:
        stage: what to train, and how.
        make_collator: makes what makes the batches, told whether a batch of text alone gets a
            blank picture.
        kwargs: of `Trainer`, which is transformers' and takes many.

    Raises:
        LayerfuseError: FSDP is asked for where it would not shard.
    """

    def __init__(
        self,
        stage: Stage,
        *,
        make_collator: MakeCollator,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.stage = stage
        # accelerate's plugins are set at run time, and its types do not know them
        state: Any = self.accelerator.state
        self.fsdp: Any = None
        if self.is_fsdp_enabled:
            self.fsdp = state.fsdp_plugin
        elif os.environ.get("ACCELERATE_USE_FSDP") == "true":
            raise LayerfuseError("FSDP needs GPUs: on CPU accelerate would train without sharding")
        self.zero3 = False
        if self.is_deepspeed_enabled:
            self.zero3 = state.deepspeed_plugin.zero_stage == 3
        trains_encoder = "vision" in stage.learning_rates
        if self.fsdp is not None and not trains_encoder:
            model: Any = self.model
            self.fsdp.ignored_modules = [model.vision_tower]
        # Whether a batch of text alone needs a picture. Under FSDP other processes would wait for
        # this one's part of the encoder; DeepSpeed adds up gradients by the order in which they
        # come.
        encoder_is_sharded = self.fsdp is not None and trains_encoder
        needs_blank = self.is_deepspeed_enabled or encoder_is_sharded
        # Only now: that the model is shared is known when accelerate has been set up.
        self.collator = make_collator(needs_blank)
        self.data_collator = self.collator

    def save_whole(self, folder: Path) -> Path | None:
        """Save a model whose parts are spread over the processes.

        Returns:
            The folder, or None if every process holds the model whole; then nothing is saved.
        """
        if self.fsdp is None and not self.zero3:
            return None
        if self.fsdp is not None:
            self.fsdp.set_state_dict_type("FULL_STATE_DICT")
        self.save_model(str(folder))
        self.accelerator.wait_for_everyone()
        # What is loaded next is whole: transformers must not spread it again.
        unset_hf_deepspeed_config()
        return folder

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.fsdp is not None or self.zero3:
            super()._save(output_dir, state_dict)
            return
        if self.args.should_save:
            # In the model's own names. transformers loads a checkpoint without the conversion by
            # which `from_pretrained` reads the names of an encoder's release, and what it does not
            # find there would stay as it was before training.
            model: Any = self.model
            model.save_pretrained(output_dir, state_dict=state_dict, save_original_format=False)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        model: Any = self.model
        # Tied weights are saved once, under another name.
        missing = set(load_result.missing_keys) - set(model.all_tied_weights_keys)
        different = sorted(missing | set(load_result.unexpected_keys))
        if different:
            raise LayerfuseError(
                f"the checkpoints in {self.args.output_dir} are of another model or version: "
                f"{len(different)} weights have other names, such as {different[0]}. Remove them, "
                "and the run starts again"
            )

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """As transformers', in as many passes as keep to `device_batch_size`.

        Args:
            model: as it is wrapped for several processes.
            inputs: a batch of samples.
            num_items_in_batch: labelled tokens of the whole step, by which each pass divides.

        Returns:
            The batch's part of the step's loss.
        """
        passes = self._passes(inputs)
        ends_step = self.accelerator.sync_gradients
        loss = torch.zeros((), device=self.args.device)
        for number, part in enumerate(passes, start=1):
            # Processes add up their gradients once, after the last pass of a step.
            synchronizes = ends_step and number == len(passes)
            self.accelerator.gradient_state._set_sync_gradients(synchronizes)
            context: Any = nullcontext()
            if ends_step and not synchronizes and not self.is_deepspeed_enabled:
                context = self.accelerator.no_sync(model)
            with context:
                loss += super().training_step(model, part, num_items_in_batch)
        return loss

    def _passes(self, batch: Batch) -> list[Batch]:
        """The batch in passes of at most `device_batch_size` rows, as many in all processes: where
        they share a model, each waits for the others in every pass."""
        limit = self.stage.device_batch_size
        # Otherwise a sample is a row, and its process got as many samples as it may compute.
        if limit is None or not self.collator.rows_by_turn:
            return [batch]
        number = torch.tensor([math.ceil(len(batch["input_ids"]) / limit)], device=self.args.device)
        # Any: accelerate types what it gathers as anything that holds tensors
        numbers: Any = self.accelerator.gather(number)
        most = int(numbers.max())
        if most == 1:
            return [batch]
        model: Any = self.accelerator.unwrap_model(self.model)
        if "pixel_values" in batch and "vision" not in self.stage.learning_rates:
            # Before it is split: rows of several passes may show one picture.
            with torch.no_grad(), self.accelerator.autocast():
                features = model.encode_images(batch["pixel_values"].to(self.args.device))
            batch = {**batch, "features": features}
            del batch["pixel_values"]
        passes = split_rows(
            batch, limit, model.config.image_token_id, needs_picture=self.collator.blank
        )
        return with_waiting(passes, most)

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroups:
        dataset: Any = self.train_dataset
        if train_dataset is not None:
            dataset = train_dataset
        if self.stage.group_by == "none":
            # All alike: the sampler's order is then random.
            lengths = torch.zeros(len(dataset), dtype=torch.int64)
        else:
            lengths = torch.tensor(dataset.lengths())
        with_pictures = None
        if self.stage.group_by == "modality_length":
            with_pictures = torch.tensor(dataset.with_pictures())
        sampler = LengthGroups(
            lengths,
            self.stage.batch_size,
            self.args.seed,
            with_pictures=with_pictures,
        )
        self.add_callback(_EpochOfSampler(sampler))
        return sampler

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        epochs_trained, batches_trained = super()._init_training_state(max_steps, *args, **kwargs)
        # The checkpoint of a finished stage may lie within an epoch, of which transformers would
        # train one step more before it sees that there are enough. No epoch has that number.
        if self.state.global_step >= max_steps:
            epochs_trained = max_steps
        return epochs_trained, batches_trained

    def floating_point_ops(self, inputs: Any) -> int:
        # transformers would go through all modules at every step for a number that nothing shows.
        return 0

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            wrapped = self.model if model is None else model
            bare = self.accelerator.unwrap_model(wrapped)
            decayed = set(self.get_decay_parameter_names(bare))
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, bare)
            groups = parameter_groups(bare, self.stage, decayed)
            self.optimizer = optimizer_class(groups, **settings)
        return self.optimizer


class _EpochOfSampler(TrainerCallback):
    """Numbers the epochs of the sampler, which accelerate does not find in a run that is resumed on
    several processes: it would repeat the order of the first epoch."""

    def __init__(self, sampler: LengthGroups) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.sampler.set_epoch(int(state.epoch or 0))


class _Report(TrainerCallback):
    """Tells of every step, numbers the epochs, keeps the time, and marks complete checkpoints."""

    # transformers calls with its own types of arguments, state and control

    def __init__(self, name: str, dataset: SampleDataset, progress: Progress) -> None:
        self.name = name
        self.dataset = dataset
        self.progress = progress
        self.began = 0.0
        self.earlier_seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began = time.perf_counter()
        for entry in state.log_history:
            # Of the newest checkpoint, where there is one.
            self.earlier_seconds = entry.get(SECONDS, 0.0)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # accelerate tells the epoch to some samplers only
        self.dataset.set_epoch(int(state.epoch or 0))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # Each process writes a part of the checkpoint.
        PartialState().wait_for_everyone()
        if not state.is_world_process_zero:
            return
        newest = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        (newest / COMPLETE).touch()
        for older in newest.parent.glob("checkpoint-*"):
            if older != newest:
                # First the mark: what is half removed is not complete.
                (older / COMPLETE).unlink(missing_ok=True)
                shutil.rmtree(older, ignore_errors=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        # It is saved with each checkpoint.
        seconds = self.earlier_seconds + time.perf_counter() - self.began
        state.log_history[-1][SECONDS] = seconds
        if not logs or "loss" not in logs:
            return
        values = {"loss": logs["loss"], "gradient": logs.get("grad_norm", 0.0)}
        for name, value in values.items():
            # Stopped at once: an update by such a gradient would be saved.
            if not math.isfinite(value):
                raise LayerfuseError(
                    f"the {name} became {value} at step {state.global_step}: lower the learning "
                    "rates"
                )
        note = f"loss {logs['loss']:.3f}"
        self.progress(self.name, state.global_step, state.max_steps, note)


class _TimedCheckpoints(TrainerCallback):
    """Saves a checkpoint whenever its cost is small beside the time since the last one.

    Args:
        is_last: whether no stage follows: what the last one has trained is kept by itself.
    """

    # transformers calls with its own types of arguments, state and control

    def __init__(self, is_last: bool) -> None:
        self.is_last = is_last
        self.cost = 0.0
        self.since = 0.0

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        size = 0
        for parameter in model.parameters():
            size += parameter.nbytes
            if parameter.requires_grad:
                size += ADAM_BYTES * parameter.numel()
        self.cost = size / BYTES_PER_SECOND
        self.since = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.is_last and state.global_step >= state.max_steps:
            return
        needed = max(LEAST_SECONDS, self.cost / LARGEST_SHARE)
        if _as_first_process(time.monotonic() - self.since >= needed):
            self.since = time.monotonic()
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # `since` is when saving began: from now on the disk is known.
        self.cost = time.monotonic() - self.since


def _as_first_process(decision: bool) -> bool:
    """What the first of several processes decides: clocks differ, and all must save together."""
    process = PartialState()
    if process.num_processes == 1:
        return decision
    shared: Any = broadcast(torch.tensor([int(decision)], device=process.device))
    return bool(shared.item())


def fit(
    model: FusionVLM,
    recipe: Recipe,
    name: str,
    *,
    dataset: SampleDataset,
    make_collator: MakeCollator,
    folder: Path,
    progress: Progress = silent,
    along: MomentCallback | None = None,
) -> Fitted:
    """Run a stage, from its newest checkpoint on.

    Args:
        model: whose parts `begin_stage` has prepared.
        recipe: of the study.
        name: the stage's.
        dataset: what it trains on; holds the seed of the order.
        make_collator: makes what makes its batches.
        folder: where its checkpoints are.
        progress: is told of every step, under the stage's name.
        along: measures the model at some steps; None measures nothing.

    Returns:
        What the stage was, with what an interrupted run had done of it.

    Raises:
        LayerfuseError: the batch does not suit the number of processes, the loss is not finite, or
            a model is to be measured that no process holds whole.
    """
    stage = recipe.stages[name]
    report = _Report(name, dataset, progress)
    callbacks: list[TrainerCallback] = [report]
    if stage.checkpoint_steps is None:
        is_last = name == list(recipe.stages)[-1]
        callbacks.append(_TimedCheckpoints(is_last))
    trainer = FusionTrainer(
        stage,
        make_collator=make_collator,
        model=model,
        args=_arguments(recipe, stage, folder, dataset.seed),
        train_dataset=dataset,
        callbacks=callbacks,
    )
    # What it prints is in the progress.
    trainer.remove_callback(PrinterCallback)
    if along is not None:
        if trainer.fsdp is not None or trainer.zero3:
            raise LayerfuseError(
                "evaluate.validation needs processes that hold the model whole: leave it out, or "
                "resources.accelerate"
            )
        trainer.add_callback(along)
    complete = checkpoints(folder)
    newest = None
    if complete:
        newest = str(complete[-1])
    trainer.train(resume_from_checkpoint=newest)
    curve = []
    for entry in trainer.state.log_history:
        if "loss" in entry:
            curve.append((int(entry["step"]), entry["loss"]))
    return Fitted(curve, trainer.save_whole(folder / "whole"), report.earlier_seconds)


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a stage, oldest first."""
    complete = [mark.parent for mark in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return sorted(complete, key=_step_of)


def _step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was saved, as its folder's name says."""
    return int(checkpoint.name.split("-")[1])


def _arguments(recipe: Recipe, stage: Stage, folder: Path, seed: int) -> TrainingArguments:
    """The stage's settings as transformers takes them."""
    # Older versions of transformers call it by another name.
    known = {field.name for field in fields(TrainingArguments)}
    name = "activation_checkpointing"
    checkpointing = name if name in known else "gradient_checkpointing"
    # Any: of names that are looked up the types of values cannot be
    by_version: dict[str, Any] = {checkpointing: stage.activation_checkpointing}
    arguments = TrainingArguments(
        output_dir=str(folder),
        seed=seed,
        bf16=recipe.dtype == "bfloat16",
        use_cpu=not torch.accelerator.is_available(),
        lr_scheduler_type=stage.schedule,
        learning_rate=max(stage.learning_rates.values()),
        warmup_steps=stage.warmup,
        adam_beta1=stage.betas[0],
        adam_beta2=stage.betas[1],
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.max_grad_norm,
        num_train_epochs=stage.epochs,
        max_steps=stage.fixed_steps or -1,
        **by_version,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        save_strategy="steps" if stage.checkpoint_steps else "no",
        save_steps=stage.checkpoint_steps or 1,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=list(recipe.report_to) or "none",
        run_name=f"{folder.parent.parent.name} {folder.name}",
        dataloader_num_workers=recipe.resources.loaders,
        # Every part that trains gets a gradient from every batch, but for weights of the encoder
        # that no picture uses, such as DINOv2's mask token.
        ddp_find_unused_parameters="vision" in stage.learning_rates,
    )
    # One process, one device: never DataParallel.
    arguments._n_gpu = min(1, arguments.n_gpu)
    # Only now the number of processes is known.
    samples_on_device, forwards = stage.split(arguments.world_size)
    arguments.per_device_train_batch_size = samples_on_device
    arguments.gradient_accumulation_steps = forwards
    return arguments
