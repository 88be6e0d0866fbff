"""Which parts train in a stage, in which precision, at which learning rate."""

import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import nn
from transformers import GenerationConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from layerfuse.cost.flops import parts_of
from layerfuse.errors import LayerfuseError
from layerfuse.fusion.blocks import Projector
from layerfuse.model.config import FusionConfig
from layerfuse.model.precision import cast
from layerfuse.model.vlm import FusionVLM
from layerfuse.recipe.schema import Recipe
from layerfuse.recipe.stage import Lora, RatedPart, Stage


def begin_stage(model: FusionVLM, stage: Stage, dtype: torch.dtype) -> Any:
    """Let exactly the stage's parts train, in float32 and in training mode.

    The others are in evaluation mode, and stay there when the trainer asks for training mode.

    Args:
        model: is changed in place.
        stage: names the parts.
        dtype: of the parts that stay frozen.

    Returns:
        The LLM's PEFT wrapper, None without adapters.
    """
    model.requires_grad_(False)
    adapted = None
    for name, part in parts_of(model).items():
        trains = name in stage.trained_parts
        if trains and name == "llm" and stage.lora is not None:
            # The adapters train in place of the weights, which stay as they are.
            cast(part, dtype)
            adapted = _add_adapters(model, stage.lora)
        elif trains:
            cast(part, torch.float32)
            part.requires_grad_(True)
        else:
            cast(part, dtype)
    # Only now: the model takes those parts into training mode that have something to train.
    model.train()
    return adapted


def _add_adapters(model: FusionVLM, lora: Lora) -> Any:
    """Add low-rank adapters to the LLM, in place. Returns their PEFT wrapper."""
    settings = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    # peft asks for a property by a name that transformers deprecates.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", category=FutureWarning)
        adapted = get_peft_model(model.language_model, settings)
    # Autocast brings what adapters read to the precision of their product. A copy in float32 before
    # that takes a tenth of a step of a few blocks on a CPU, and changes no product.
    for module in adapted.modules():
        if isinstance(module, BaseTunerLayer):
            # Any: PEFT does not declare its own switch
            adapter: Any = module
            adapter.cast_input_dtype_enabled = False
    return adapted


def end_stage(model: FusionVLM, adapted: Any, dtype: torch.dtype) -> None:
    """Merge adapters and bring the whole model to `dtype`, so that what is tested is what is saved.

    Args:
        model: is changed in place.
        adapted: what `begin_stage` returned.
        dtype: of the saved model.
    """
    if adapted is not None:
        adapted.merge_and_unload()
    # The next stage says anew whether activations are computed twice.
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.gradient_checkpointing = False
    model.requires_grad_(False)
    model.eval()
    cast(model, dtype)


def load_trained(folder: Path, stage: Stage, dtype: torch.dtype) -> FusionVLM:
    """The whole model at the end of a stage whose parts were spread over processes.

    Args:
        folder: where `Trainer.save_model` wrote it, with adapters apart.
        stage: the stage.
        dtype: of the model.

    Raises:
        ValueError: the folder holds adapters that the stage lacks.
    """
    base = {}
    adapters = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, value in load_file(file).items():
            if ".lora_" in name:
                adapters[name] = value
            else:
                # PEFT calls the layer that an adapter is added to so.
                base[name.replace(".base_layer.", ".")] = value
    config = FusionConfig.from_pretrained(folder)
    # transformers types a model without a name for its own classes only
    model: Any = FusionVLM.from_pretrained(None, config=config, state_dict=base)
    model.generation_config = GenerationConfig.from_pretrained(folder)
    adapted = begin_stage(model, stage, dtype)
    unexpected = model.load_state_dict(adapters, strict=False).unexpected_keys
    if unexpected:
        raise ValueError(f"{folder} holds adapters that the stage lacks: {unexpected[:3]}")
    end_stage(model, adapted, dtype)
    return model


def parameter_groups(model: FusionVLM, stage: Stage, decayed: set[str]) -> list[dict[str, Any]]:
    """AdamW's groups: one per part with a learning rate and per decay.

    Args:
        model: in the stage.
        stage: holds the learning rates.
        decayed: the names of the weights that decay.

    Returns:
        The groups that have parameters.

    Raises:
        LayerfuseError: the stage rates projectors, and the fusion has none.
    """
    # By identity: adapters give weights other names than the model's own.
    decayed_ids = {id(weight) for name, weight in model.named_parameters() if name in decayed}
    groups = []
    for name, rate in stage.learning_rates.items():
        with_decay = []
        without_decay = []
        for parameter in _rated_weights(model, stage, name):
            if not parameter.requires_grad:
                continue
            if id(parameter) in decayed_ids:
                with_decay.append(parameter)
            else:
                without_decay.append(parameter)
        for chosen, decay in ((with_decay, stage.weight_decay), (without_decay, 0.0)):
            if chosen:
                groups.append({"params": chosen, "lr": rate, "weight_decay": decay})
    return groups


def _rated_weights(model: FusionVLM, stage: Stage, name: RatedPart) -> list[nn.Parameter]:
    """The weights to which a learning rate of the stage applies."""
    in_projectors = []
    for module in model.fusion.modules():
        if isinstance(module, Projector):
            in_projectors.extend(module.parameters())
    if name == "projector":
        if not in_projectors:
            raise LayerfuseError(
                "learning_rates names projector, but the fusion has no Projector; name fusion alone"
            )
        return in_projectors
    weights = list(parts_of(model)[name].parameters())
    if name != "fusion" or "projector" not in stage.learning_rates:
        return weights
    # By identity: comparing tensors compares what they hold.
    elsewhere = {id(weight) for weight in in_projectors}
    return [weight for weight in weights if id(weight) not in elsewhere]


def count_parameters(model: FusionVLM) -> dict[str, int]:
    """Numbers of parameters per part, and of those that train now."""
    counts: dict[str, int] = {}
    for name, part in parts_of(model).items():
        counts[name] = sum(parameter.numel() for parameter in part.parameters())
    training = [parameter for parameter in model.parameters() if parameter.requires_grad]
    counts["trained"] = sum(parameter.numel() for parameter in training)
    return counts


def memory_advice(name: str, stage: Stage, processes: int) -> str:
    """What would make a stage need less memory.

    Args:
        name: the stage's.
        stage: did not fit.
        processes: that train together.
    """
    changes = []
    on_device, _ = stage.split(processes)
    if on_device > 1:
        # A divisor, so that forward passes still make up the batch.
        smaller = max(size for size in range(1, on_device) if on_device % size == 0)
        changes.append(
            f"`stages.{name}.device_batch_size={smaller}` (now {on_device}; accumulation keeps "
            f"the batch of {stage.batch_size})"
        )
    if not stage.activation_checkpointing:
        changes.append(f"`stages.{name}.activation_checkpointing=true` (less memory, more time)")
    if "llm" in stage.learning_rates and stage.lora is None:
        changes.append(
            f"`stages.{name}.lora={{}}` (adapters train instead of all weights of the LLM, which "
            "need optimizer states)"
        )
    if not changes:
        return (
            f"The stage {name!r} ran out of memory with the smallest batch on a device: use a "
            "shorter `max_length`, fewer image tokens, or share the model with "
            "`resources.accelerate`."
        )
    return f"The stage {name!r} ran out of memory. What helps: " + "; ".join(changes) + "."


def use_kernels(model: FusionVLM, recipe: Recipe) -> None:
    """Let the LLM compute with the recipe's attention and kernels, which a saved model does not
    know.

    Args:
        model: is changed in place, on its device.
        recipe: of the study.
    """
    model.language_model.set_attn_implementation(recipe.attn_implementation)
    if recipe.liger:
        liger = import_module("liger_kernel.transformers")
        # Norms, rotary embeddings and MLPs. The loss stays ours, at labelled positions.
        liger._apply_liger_kernel_to_instance(
            model=model.language_model,
            cross_entropy=False,
            fused_linear_cross_entropy=False,
        )
