"""Blocks that are computed anew in the backward pass, in any version of transformers."""

from typing import Any


# Any: a model of transformers, or what wraps it
def compute_blocks_anew(model: Any) -> None:
    """Switch it on, by the name that this version of transformers has for it."""
    if "activation_checkpointing_enable" in dir(model):
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable()
