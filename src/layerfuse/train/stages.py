"""Which parts train in a stage, in which precision, at which learning rate."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from layerfuse.model import FusionVLM
from layerfuse.recipe import Lora, Part, Stage


def parts(model: FusionVLM) -> dict[Part, nn.Module]:
    """The three parts of a model, by their names in a recipe."""
    return {"vision": model.vision_tower, "fusion": model.fusion, "llm": model.language_model}


@contextmanager
def stage_parameters(model: Any, stage: Stage, dtype: torch.dtype) -> Iterator[None]:
    """Inside, exactly the stage's parts train, in float32; afterwards adapters are merged and the
    whole model is in `dtype`, so that what is tested is what is saved."""
    model.requires_grad_(False)
    adapted: Any = None
    for name, part in parts(model).items():
        if name not in stage.learning_rates:
            cast(part, dtype)
        elif name == "llm" and stage.lora is not None:
            cast(part, dtype)
            adapted = get_peft_model(model.language_model, _lora(stage.lora))
        else:
            cast(part, torch.float32)
            part.requires_grad_(True)
    try:
        yield
    finally:
        if adapted is not None:
            adapted.merge_and_unload()
        model.requires_grad_(False)
        cast(model, dtype)


def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast what a checkpoint holds: parameters and persistent buffers, in place.

    `Module.to` would also round the rotary frequencies, which loading a checkpoint never does.
    """
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.is_floating_point() and name not in part._non_persistent_buffers_set:
                part.register_buffer(name, buffer.to(dtype))


def _lora(settings: Lora) -> LoraConfig:
    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
        task_type="CAUSAL_LM",
    )


def parameter_groups(model: FusionVLM, stage: Stage, decayed: set[str]) -> list[dict[str, Any]]:
    """AdamW groups: one per part and per decay; `decayed` names the weights that decay."""
    weights = {id(p) for name, p in model.named_parameters() if name in decayed}
    groups = []
    for name, rate in stage.learning_rates.items():
        own = [p for p in parts(model)[name].parameters() if p.requires_grad]
        for decays, decay in ((True, stage.weight_decay), (False, 0.0)):
            chosen = [p for p in own if (id(p) in weights) is decays]
            groups.append({"params": chosen, "lr": rate, "weight_decay": decay})
    return [group for group in groups if group["params"]]


def count_parameters(model: FusionVLM) -> dict[str, int]:
    """Numbers of parameters per part, and of those that train now."""
    counts: dict[str, int] = {
        name: sum(p.numel() for p in part.parameters()) for name, part in parts(model).items()
    }
    counts["trained"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return counts
