"""How many runs of a study this machine does at once, and on what each of them runs."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from layerfuse.cost.flops import count
from layerfuse.fusion import FUSIONS
from layerfuse.hardware import DTYPES, device, free_memory
from layerfuse.model.config import FusionConfig
from layerfuse.recipe.schema import Recipe
from layerfuse.recipe.stage import Stage

VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"
FOR_SMALL_STEPS = {
    # glibc returns the memory of every step to the system, and asks for it again.
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    # oneDNN makes code for every shape of a product. A run with texts of many lengths needs some
    # 1,700 of them, and would make them twice with room for the 1,024 that it keeps by itself.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "4096",
}
"""Environment variables that make short training steps on a CPU faster, where the user has set
none: the first two by a tenth of a step, the last by a twentieth of all runs but the first."""
INTERPRETER_BYTES = 700_000_000
"""Python with torch, transformers and peft, measured."""
TRAINING_BYTES = 12
"""Of a weight that trains beside itself: its gradient and AdamW's two moments in float32."""
MARGIN = 1.2
"""What the estimate is multiplied by, for what it leaves out: logits and copies."""


@dataclass(frozen=True)
class MachineShare:
    """What one of several processes gets of the machine."""

    threads: int
    gpu: str | None = None
    """as $CUDA_VISIBLE_DEVICES names it; None without GPUs"""

    def environment(self) -> dict[str, str]:
        """The environment variables of a process with this share."""
        # Read by every library that computes when it is imported; torch alone could be told later.
        threads = {"OMP_NUM_THREADS": str(self.threads)}
        variables = {**FOR_SMALL_STEPS, **os.environ, **threads}
        if self.gpu is not None:
            variables[VISIBLE_GPUS] = self.gpu
        return variables


def shares(
    recipe: Recipe,
    configs: Sequence[FusionConfig],
    tokens: Mapping[str, Sequence[int]],
    *,
    num_runs: int,
    modules: Sequence[str] = (),
) -> list[MachineShare]:
    """Divide the machine among runs that are done at once.

    Args:
        recipe: of the study; its `resources.arms_at_once` decides if it is a number.
        configs: of the arms.
        tokens: lengths of the samples, by the stage's name.
        num_runs: that are to be done.
        modules: what processes of their own import for user strategies.

    Returns:
        One share per process; a single one means that runs are done one after another.
    """
    gpus = _visible_gpus()
    # What torch takes for a single run: physical cores, or $OMP_NUM_THREADS.
    cores = torch.get_num_threads()
    asked = recipe.resources.arms_at_once
    if asked != "auto":
        at_once = asked
    elif recipe.resources.processes > 1 or not _are_importable(configs, modules):
        at_once = 1
    elif gpus:
        at_once = len(gpus)
    elif device().type == "cpu":
        at_once = min(cores, _fitting(recipe, configs, tokens))
    else:
        at_once = 1
    at_once = max(1, min(at_once, num_runs))
    threads = max(1, cores // at_once)
    divided = []
    for number in range(at_once):
        gpu = None
        if gpus:
            gpu = gpus[number % len(gpus)]
        divided.append(MachineShare(threads, gpu))
    return divided


def _visible_gpus() -> list[str]:
    """CUDA's GPUs by the names that $CUDA_VISIBLE_DEVICES takes."""
    if device().type != "cuda":
        return []
    visible = os.environ.get(VISIBLE_GPUS)
    if visible:
        return visible.split(",")
    return [str(number) for number in range(torch.cuda.device_count())]


def _are_importable(configs: Sequence[FusionConfig], modules: Sequence[str]) -> bool:
    """Whether another process knows the strategies of all arms."""
    if modules:
        return True
    for config in configs:
        _, strategy = FUSIONS[config.strategy.name]
        # A strategy of the user that only this process has registered.
        if not strategy.__module__.startswith("layerfuse."):
            return False
    return True


def _fitting(
    recipe: Recipe, configs: Sequence[FusionConfig], tokens: Mapping[str, Sequence[int]]
) -> int:
    """How many runs fit into the memory that is free, as far as can be estimated."""
    return free_memory() // run_bytes(recipe, configs, tokens)


def run_bytes(
    recipe: Recipe, configs: Sequence[FusionConfig], tokens: Mapping[str, Sequence[int]]
) -> int:
    """Estimate the main memory that the largest run takes on a CPU.

    The interpreter, the weights, gradient and moments of those that train, and the inputs and
    outputs of all linear layers of the LLM for the longest batch.

    Args:
        recipe: of the study.
        configs: of the arms.
        tokens: lengths of the samples, by the stage's name.

    Returns:
        Bytes.
    """
    largest = 0
    weight_bytes = DTYPES[recipe.dtype].itemsize
    for config in configs:
        model, parameters = count(config)
        widths = _linear_widths(model.language_model.get_decoder())
        for name, stage in recipe.stages.items():
            in_training = 0
            for part in stage.trained_parts:
                if part == "llm" and stage.lora is not None:
                    in_training += stage.lora.r * widths
                else:
                    in_training += parameters[part]
            weights = sum(parameters.values()) * weight_bytes
            activations = _tokens_at_once(stage, tokens[name]) * widths * weight_bytes
            needed = weights + in_training * TRAINING_BYTES + activations
            largest = max(largest, needed)
    return INTERPRETER_BYTES + round(largest * MARGIN)


def _linear_widths(decoder: nn.Module) -> int:
    """The sum of what all linear layers read and write of one token."""
    widths = 0
    for module in decoder.modules():
        if isinstance(module, nn.Linear):
            widths += module.in_features + module.out_features
    return widths


def _tokens_at_once(stage: Stage, lengths: Sequence[int]) -> int:
    """Tokens of the longest batch that a stage may have on a device."""
    on_device, _ = stage.split(processes=1)
    longest = sorted(lengths)[-on_device:]
    if not longest:
        return 0
    # Shorter rows of a batch are padded.
    return on_device * min(longest[-1], stage.max_length)
