"""The LLM of a released checkpoint: from the checkpoint itself, or another one with an adapter."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from layerfuse.errors import LayerfuseError, short
from layerfuse.local_models.configuration import REFUSALS
from layerfuse.model.generation import read_generation_settings
from layerfuse.released.tensors import ADAPTER, SETTINGS, Checkpoint

FAMILIES_OF_LLMS = {
    "LlavaLlamaForCausalLM": "llama",
    "LlavaMistralForCausalLM": "mistral",
    "LlavaQwenForCausalLM": "qwen2",
    "LlavaPhiForCausalLM": "phi",
    "LlavaGemmaForCausalLM": "gemma",
}
"""the classes of LLaVA's forks, whose configs are those of their LLMs with further settings"""
OLD_SETTINGS = ("rope_theta", "rope_scaling", "partial_rotary_factor", "torch_dtype")
"""settings of LLMs that transformers has since renamed, and still reads"""
HEAD = "lm_head.weight"
LLM_NAMES = (
    "model.embed_tokens.",
    "model.layers.",
    "model.norm.",
    "model.final_layernorm.",  # of Phi
    "lm_head.",
)
"""how the tensors of these LLMs begin"""


def config_of_llm(checkpoint: Checkpoint) -> PreTrainedConfig:
    """The config of the LLM that a checkpoint holds.

    Args:
        checkpoint: a whole model.

    Raises:
        LayerfuseError: it is of a class that is not known.
    """
    written: Any = checkpoint.setting("architectures")
    architecture = written[0] if isinstance(written, list) and written else written
    if architecture not in FAMILIES_OF_LLMS:
        raise LayerfuseError(
            f"{checkpoint.folder / SETTINGS} says that its class is {short(architecture)}; valid: "
            f"{', '.join(FAMILIES_OF_LLMS)}"
        )
    # Any: transformers does not annotate what its automatic classes make
    auto_config: Any = AutoConfig
    family = FAMILIES_OF_LLMS[architecture]
    known = {*auto_config.for_model(family).to_dict(), *OLD_SETTINGS}
    settings: dict[str, Any] = {}
    for name, value in checkpoint.settings.items():
        if name in known and name not in ("architectures", "model_type", "transformers_version"):
            settings[name] = value
    try:
        return auto_config.for_model(family, **settings)
    except REFUSALS as error:
        raise LayerfuseError(
            f"{checkpoint.folder / SETTINGS} describes no {family}: {error}"
        ) from error


def build_llm(
    checkpoint: Checkpoint, config: PreTrainedConfig, names: list[str]
) -> PreTrainedModel:
    """The LLM that a checkpoint holds.

    Args:
        checkpoint: a whole model.
        config: of its LLM.
        names: of the tensors that are the LLM's.

    Returns:
        A causal LM in the dtype of the checkpoint, which shares its tensors.

    Raises:
        LayerfuseError: tensors are missing, too many, or of other shapes than the config says.
    """
    # Any: transformers does not annotate what its automatic classes make
    auto_model: Any = AutoModelForCausalLM
    # Buffers are made as ever: they are computed, and stand in no checkpoint.
    with init_empty_weights(include_buffers=False):
        model: Any = auto_model.from_config(config)
    parameters = {name: parameter.shape for name, parameter in model.named_parameters()}
    weights: dict[str, Tensor] = {}
    for name in names:
        weight = checkpoint.tensors[name]
        # A head that is that of the embeddings is saved by some versions of transformers.
        if name not in parameters and name != HEAD:
            raise LayerfuseError(
                f"{name} of {checkpoint.folder} has no place in an LLM as its {SETTINGS} describes"
            )
        if name in parameters and weight.shape != parameters[name]:
            raise LayerfuseError(
                f"{name} of {checkpoint.folder} is {list(weight.shape)}; its {SETTINGS} describes "
                f"{list(parameters[name])}"
            )
        weights[name] = weight
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise LayerfuseError(
            f"{checkpoint.folder} holds no whole LLM: {len(missing)} weights are missing, such as "
            f"{missing[0]}. Where its LLM is elsewhere, give that by --base"
        )
    settings = checkpoint.folder / GENERATION_CONFIG_NAME
    if settings.is_file():
        model.generation_config = read_generation_settings(settings)
    if not model.generation_config.do_sample:
        # saving refuses what only sampling would read
        model.generation_config.update(temperature=None, top_p=None, top_k=None)
    return model.eval()


def merge_adapter(llm: PreTrainedModel, folder: Path) -> tuple[PreTrainedModel, list[str]]:
    """Merge a LoRA adapter into an LLM.

    Args:
        llm: the LLM that the adapter was trained on.
        folder: of the adapter, with adapter_config.json.

    Returns:
        The LLM with its weights changed, and the names of the adapter's tensors.

    Raises:
        LayerfuseError: the adapter cannot be read, or does not fit the LLM as a whole.
    """
    from peft import LoraConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict

    # Any: PEFT annotates its functions in part only
    config_class: Any = LoraConfig
    try:
        config = config_class.from_pretrained(str(folder))
        weights: dict[str, Tensor] = load_peft_weights(str(folder), device="cpu")
        adapted: Any = get_peft_model(llm, config)
        report: Any = set_peft_model_state_dict(adapted, weights)
    except (OSError, UnpicklingError, SafetensorError, *REFUSALS) as error:
        raise LayerfuseError(
            f"the adapter of {folder / ADAPTER} cannot be put on the LLM: {error}"
        ) from error
    missing = [name for name in report.missing_keys if ".lora_" in name]
    strange = sorted(report.unexpected_keys)
    if missing or strange:
        raise LayerfuseError(
            f"the adapter of {folder} is not of this LLM: of what it should change "
            f"{len(missing)} weights are missing ({', '.join(missing[:2])}), and {len(strange)} of "
            f"its own have no place ({', '.join(strange[:2])})"
        )
    with torch.no_grad():
        merged: PreTrainedModel = adapted.merge_and_unload()
    return merged.eval(), sorted(weights)
