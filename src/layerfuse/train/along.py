"""Measure a model at chosen moments of its training, without a trace in what it becomes."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from transformers import TrainerCallback

from layerfuse.cost.recipe_table import steps_of
from layerfuse.data.lazy_records import Samples
from layerfuse.model.processor import Processor
from layerfuse.model.vlm import FusionVLM
from layerfuse.recipe.schema import Recipe


@dataclass(frozen=True)
class Moment:
    """The end of a training step.

    Attributes:
        share: of all training, in samples seen; 0..1.
        stage: the stage's name.
        step: of the stage, from 1.
        samples: seen so far over all stages, repeated ones counted again.
    """

    share: float
    stage: str
    step: int
    samples: int


Measure = Callable[[FusionVLM, Processor, Moment], None]
"""is given the model in evaluation mode, and keeps what it finds"""


@dataclass(frozen=True)
class AlongTraining:
    """What is measured while an arm trains.

    Attributes:
        moments: when, in their order.
        measure: what, in the first of several processes.
    """

    moments: list[Moment]
    measure: Measure

    def of_stage(self, stage: str, processor: Processor) -> "MomentCallback":
        """What the trainer of a stage calls.

        Args:
            stage: the stage's name.
            processor: of the model.
        """
        moments = [moment for moment in self.moments if moment.stage == stage]
        return MomentCallback(moments, processor, self.measure)


def moments_of(
    recipe: Recipe, samples: Mapping[str, Samples], shares: Sequence[float]
) -> list[Moment]:
    """The steps at which these shares of a recipe's training are done.

    Args:
        recipe: names the stages.
        samples: of each stage.
        shares: of all training in samples seen, 0..1, growing.

    Returns:
        For each share the end of the first step that reaches it.
    """
    steps = {}
    total = 0
    for name, stage in recipe.stages.items():
        steps[name] = steps_of(stage, len(samples[name]))
        total += steps[name] * stage.batch_size
    moments = []
    for share in shares:
        seen_before = 0
        for name, stage in recipe.stages.items():
            # Rounded: a share such as 0.1 is no exact binary number, and must not cost a step more.
            wanted = round(share * total - seen_before, 6)
            step = int(-(-wanted // stage.batch_size))
            if step <= steps[name]:
                seen = seen_before + step * stage.batch_size
                moments.append(Moment(share, name, step, seen))
                break
            seen_before += steps[name] * stage.batch_size
    return moments


class MomentCallback(TrainerCallback):
    """Measures at the ends of some steps of one stage.

    Args:
        moments: of the stage.
        processor: of the model.
        measure: what is called in the first of several processes.
    """

    # transformers calls with its own types of arguments, state and control

    def __init__(self, moments: Sequence[Moment], processor: Processor, measure: Measure) -> None:
        self.moments = moments
        self.processor = processor
        self.measure = measure

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        due = [moment for moment in self.moments if moment.step == state.global_step]
        if not due:
            return
        process = PartialState()
        # As the test does: a few short answers, given before others could share them.
        if process.is_main_process:
            # The arithmetic of the training steps: what trains is kept in float32, which is slow.
            arithmetic = torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16)
            with undisturbed(model), arithmetic:
                for moment in due:
                    self.measure(model, self.processor, moment)
        # The others must not run ahead into a step whose gradients they share.
        process.wait_for_everyone()


@contextmanager
def undisturbed(model: FusionVLM) -> Iterator[None]:
    """Give a model in evaluation mode, then put back all that training depends on.

    Args:
        model: some of its modules may be in training mode.

    Yields:
        Nothing. Random generators of Python, NumPy and torch, and the mode of every module, are
        afterwards what they were before.
    """
    modes = [(module, module.training) for module in model.modules()]
    of_python = random.getstate()
    of_numpy = np.random.get_state()
    devices = []
    if model.device.type != "cpu":
        devices.append(model.device.index)
    try:
        with torch.random.fork_rng(devices, device_type=model.device.type):
            model.eval()
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        # One by one: `train()` would ask every module of a part for the same mode.
        for module, training in modes:
            module.training = training
