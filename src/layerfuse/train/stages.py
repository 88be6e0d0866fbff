"""Which parts train in a stage, in which precision, at which learning rate."""

import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import GenerationConfig

from layerfuse.model.config import FusionConfig
from layerfuse.model.vlm import FusionVLM
from layerfuse.recipe.schema import Part, Stage


def parts(model: FusionVLM) -> dict[Part, nn.Module]:
    """The three parts of a model, by their names in a recipe."""
    return {"vision": model.vision_tower, "fusion": model.fusion, "llm": model.language_model}


def begin_stage(model: Any, stage: Stage, dtype: torch.dtype) -> Any:
    """Let exactly the stage's parts train, in float32. Returns the LLM's PEFT wrapper, if any."""
    model.requires_grad_(False)
    adapted = None
    for name, part in parts(model).items():
        lora = stage.lora if name == "llm" and name in stage.learning_rates else None
        trains = name in stage.learning_rates and lora is None
        cast(part, torch.float32 if trains else dtype)
        part.requires_grad_(trains)
        if lora is not None:
            settings = LoraConfig(
                r=lora.r,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                target_modules=lora.target_modules,
                task_type="CAUSAL_LM",
            )
            # peft asks for a property by a name that transformers deprecates.
            with warnings.catch_warnings():
                warnings.filterwarnings(
                    "ignore", ".*is_gradient_checkpointing.*", category=FutureWarning
                )
                adapted = get_peft_model(model.language_model, settings)
    return adapted


def end_stage(model: Any, adapted: Any, dtype: torch.dtype) -> None:
    """Merge adapters and bring the whole model to `dtype`, so that what is tested is what is
    saved."""
    if adapted is not None:
        adapted.merge_and_unload()
    model.requires_grad_(False)
    cast(model, dtype)


def load_trained(folder: Path, stage: Stage, dtype: torch.dtype) -> FusionVLM:
    """The whole model at the end of a stage whose parts were spread over processes, which
    `Trainer.save_model` wrote to `folder` with adapters apart."""
    files = sorted(folder.glob("*.safetensors"))
    saved = {name: value for file in files for name, value in load_file(file).items()}
    apart = {name: value for name, value in saved.items() if ".lora_" in name}
    base = {k.replace(".base_layer.", "."): v for k, v in saved.items() if k not in apart}
    config = FusionConfig.from_pretrained(folder)
    model: Any = FusionVLM.from_pretrained(None, config=config, state_dict=base)
    model.generation_config = GenerationConfig.from_pretrained(folder)
    adapted = begin_stage(model, stage, dtype)
    unexpected = model.load_state_dict(apart, strict=False).unexpected_keys
    if unexpected:
        raise ValueError(f"{folder} holds adapters that the stage lacks: {unexpected[:3]}")
    end_stage(model, adapted, dtype)
    return model


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


def apply_liger(model: FusionVLM) -> None:
    """Replace norms, rotary embeddings and MLPs of the LLM by liger's kernels; the loss stays ours,
    at labelled positions."""
    liger = import_module("liger_kernel.transformers")
    own = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    liger._apply_liger_kernel_to_instance(model=model.language_model, **own)
