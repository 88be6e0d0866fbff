"""A thin `transformers.Trainer`: learning rates per part, progress, loss curve."""

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import unset_hf_deepspeed_config

from layerfuse.data.collate import Collator, LengthGroups, SampleDataset
from layerfuse.model.vlm import FusionVLM
from layerfuse.recipe.schema import Recipe, Stage
from layerfuse.train.stages import parameter_groups

Report = Callable[[int, int, float | None], None]
COMPLETE = "complete"  # the last file of a checkpoint


class FusionTrainer(Trainer):
    """`Trainer` with one learning rate per part of the model, batches of similar lengths, and a
    frozen encoder that FSDP leaves whole."""

    def __init__(self, stage: Stage, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.stage = stage
        state: Any = self.accelerator.state
        self.fsdp = state.fsdp_plugin if self.is_fsdp_enabled else None
        if self.fsdp is None and os.environ.get("ACCELERATE_USE_FSDP") == "true":
            raise ValueError("FSDP needs GPUs: on CPU accelerate would train without sharding")
        model: Any = self.model
        if self.fsdp is not None and "vision" not in stage.learning_rates:
            self.fsdp.ignored_modules = [model.vision_tower]
        self.zero3 = self.is_deepspeed_enabled and state.deepspeed_plugin.zero_stage == 3
        # whether a batch of text alone needs a picture: other processes would wait for this one's
        # part of the encoder, and DeepSpeed adds up gradients by the order in which they come
        sharded = self.fsdp is not None and "vision" in stage.learning_rates
        self.every_process_sees = self.is_deepspeed_enabled or sharded

    def save_whole(self, folder: Path) -> Path | None:
        """Save a model whose parts are spread over the processes; None if every process has it."""
        if self.fsdp is None and not self.zero3:
            return None
        if self.fsdp is not None:
            self.fsdp.set_state_dict_type("FULL_STATE_DICT")
        self.save_model(str(folder))
        self.accelerator.wait_for_everyone()
        unset_hf_deepspeed_config()  # what is loaded next is whole
        return folder

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        grouped = dataset.lengths() if self.stage.group_by_length else [0] * len(dataset)
        return LengthGroups(torch.tensor(grouped), self.stage.batch_size, self.args.seed)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            target = self.accelerator.unwrap_model(self.model if model is None else model)
            decayed = set(self.get_decay_parameter_names(target))
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, target)
            self.optimizer = kind(parameter_groups(target, self.stage, decayed), **settings)
        return self.optimizer


class _Progress(TrainerCallback):
    def __init__(self, report: Report, dataset: SampleDataset) -> None:
        self.report = report
        self.dataset = dataset

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.dataset.set_epoch(int(state.epoch or 0))  # accelerate tells only some samplers

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        PartialState().wait_for_everyone()  # each process writes a part
        if state.is_world_process_zero:
            place = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            (place / COMPLETE).touch()
            for other in set(place.parent.glob("checkpoint-*")) - {place}:
                (other / COMPLETE).unlink(missing_ok=True)  # what is half removed is not complete
                shutil.rmtree(other, ignore_errors=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            found = {"loss": logs["loss"], "gradient": logs.get("grad_norm", 0.0)}
            for name, value in found.items():  # an update by such a gradient would be saved
                if not math.isfinite(value):
                    where = f"{value} at step {state.global_step}"
                    raise ValueError(f"the {name} became {where}: lower the learning rates")
            self.report(state.global_step, state.max_steps, float(logs["loss"]))


def fit(
    model: FusionVLM,
    recipe: Recipe,
    name: str,
    dataset: SampleDataset,
    collator: Collator,
    folder: Path,
    report: Report,
) -> tuple[list[tuple[int, float]], Path | None]:
    """Run the stage `name`, from the newest checkpoint in `folder` on, and return its loss curve,
    [(step, mean loss since the last point)], and where the model was saved if no process holds it
    whole. Raises ValueError if the batch does not suit the number of processes, or if the loss is
    not finite."""
    stage = recipe.stages[name]
    trainer = FusionTrainer(
        stage,
        model=model,
        args=_arguments(recipe, stage, folder, dataset.seed),
        train_dataset=dataset,
        data_collator=collator,
        callbacks=[_Progress(report, dataset)],
    )
    collator.blank = trainer.every_process_sees
    trainer.remove_callback(PrinterCallback)  # the report shows the same
    saved = checkpoints(folder)
    trainer.train(resume_from_checkpoint=str(saved[-1]) if saved else None)
    curve = [(int(e["step"]), e["loss"]) for e in trainer.state.log_history if "loss" in e]
    return curve, trainer.save_whole(folder / "whole")


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a stage, oldest first."""
    complete = [mark.parent for mark in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return sorted(complete, key=lambda p: int(p.name.split("-")[1]))


def _arguments(recipe: Recipe, stage: Stage, folder: Path, seed: int) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder),
        seed=seed,
        bf16=recipe.dtype == "bfloat16",
        use_cpu=not torch.accelerator.is_available(),
        lr_scheduler_type=stage.schedule,
        learning_rate=max(stage.learning_rates.values()),
        warmup_steps=stage.warmup,
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.max_grad_norm,
        num_train_epochs=stage.epochs,
        max_steps=stage.steps or -1,
        activation_checkpointing=stage.activation_checkpointing,
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
        # every part that trains gets a gradient from every batch, but the encoder none from text
        ddp_find_unused_parameters="vision" in stage.learning_rates,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # one process, one device: never DataParallel
    device, forwards = stage.split(arguments.world_size)
    arguments.per_device_train_batch_size = device
    arguments.gradient_accumulation_steps = forwards
    return arguments
