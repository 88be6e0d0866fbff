"""Reading configurations of pretrained models, one way for training, probing and counting."""

from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.initialization import no_init_weights

from layerfuse.errors import LayerfuseError
from layerfuse.local_models.registry import resolve

Kind = Literal["encoder", "LLM", "multimodal model"]

SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "patch_size",
)
"""settings that are whole numbers of at least 1, where a configuration has them"""
REFUSALS = (
    StrictDataclassError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    KeyError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""what transformers and torch raise for settings that they cannot use"""


def read_config(
    name: str,
    kind: Kind,
    settings: dict[str, Any] | None = None,
) -> PreTrainedConfig:
    """The configuration of a pretrained model, not yet checked by `check_sizes`.

    Args:
        name: a hub id, folder or local-model name.
        kind: what errors call the model.
        settings: the configuration as a recipe spells it out, with its `model_type`. None reads
            that of the folder or of the hub.

    Raises:
        LayerfuseError: it cannot be found, or holds settings that no such model can have.
    """
    # Any: transformers does not annotate what its automatic classes make
    auto_config: Any = AutoConfig
    if settings is not None:
        others = dict(settings)
        model_type = others.pop("model_type", None)
        if not isinstance(model_type, str):
            raise LayerfuseError(
                f"the configuration of {name} needs a model_type, such as clip_vision_model or "
                f"llama (it is {model_type!r})"
            )
        try:
            return auto_config.for_model(model_type, **others)
        except REFUSALS as error:
            raise _impossible(name, kind, error) from error

    source = resolve(name)
    try:
        return auto_config.from_pretrained(source)
    except OSError as error:
        reason = str(error)
        # transformers would advise to look for the folder's name on a hub.
        if not Path(source).exists():
            reason = "no such folder, and no hub answered"
        raise LayerfuseError(
            f"cannot read the {kind} {name}: {reason}. Pull a local model (`layerfuse models "
            "pull`) or give a folder; for `layerfuse show` alone, write `config:` in the recipe"
        ) from error
    except REFUSALS as error:
        raise _impossible(name, kind, error) from error


def check_sizes(name: str, kind: Kind, config: PreTrainedConfig) -> None:
    """Check what transformers accepts and no model can have.

    Args:
        name: of the model, for errors.
        kind: what errors call it.
        config: of the encoder or the LLM alone.

    Raises:
        LayerfuseError: naming the setting, its value and what is valid.
    """
    # As a dictionary, because not every type of model has every setting.
    settings = config.to_dict()
    for setting in SIZES:
        size = settings.get(setting)
        # some LLMs have a size of its own for every block, some encoders one for either way
        if size is None or isinstance(size, list | tuple):
            continue
        # bool: True is an int for Python, but no size
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise LayerfuseError(
                f"the configuration of the {kind} {name}: {setting} is {size!r}; valid: a whole "
                "number of at least 1"
            )
    heads = settings.get("num_attention_heads")
    if not isinstance(heads, int):
        return
    # With a head_dim of its own, the heads together need not be as wide as the model.
    if settings.get("head_dim") is None and config.hidden_size % heads != 0:
        raise LayerfuseError(
            f"the configuration of the {kind} {name}: hidden_size {config.hidden_size} is no "
            f"multiple of num_attention_heads {heads}"
        )
    shared = settings.get("num_key_value_heads")
    if isinstance(shared, int) and heads % shared != 0:
        raise LayerfuseError(
            f"the configuration of the {kind} {name}: num_attention_heads {heads} is no multiple "
            f"of num_key_value_heads {shared}"
        )


# Any: the automatic classes of transformers share no type
def check_build(name: str, kind: Kind, config: PreTrainedConfig, auto_class: Any) -> None:
    """Build a model without memory for its weights, to see whether its settings fit together.

    Args:
        name: of the model, for errors.
        kind: what errors call it.
        config: of the encoder or the LLM alone.
        auto_class: the automatic class of transformers that makes such models.

    Raises:
        LayerfuseError: it cannot be built.
    """
    try:
        with torch.device("meta"), no_init_weights():
            auto_class.from_config(config)
    except REFUSALS as error:
        raise _impossible(name, kind, error) from error


def _impossible(name: str, kind: Kind, error: Exception) -> LayerfuseError:
    """The message for settings that transformers or torch refused."""
    # The list of all model types that transformers knows would hide what is wrong.
    reason = str(error).split(" Should contain one of ")[0]
    if isinstance(error, KeyError):
        reason = f"unknown value {reason}"
    # The first line of a validation error says only which field; the cause is in the second.
    reason = " ".join(reason.split())
    return LayerfuseError(
        f"no {kind} can be made of the configuration of {name}: {reason.rstrip('.')}. Compare it "
        "with the config.json of a model of this type"
    )
