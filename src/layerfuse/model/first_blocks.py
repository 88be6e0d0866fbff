"""An LLM of the first blocks of another one, for cheap studies: its configuration."""

import copy
from typing import Any, cast

from transformers import PreTrainedConfig

from layerfuse.errors import LayerfuseError

NOT_OF_BLOCKS = ("eos_token_id", "bos_token_id", "pad_token_id", "architectures")
"""settings whose lists are of anything but blocks, and may be as long as there are blocks"""


def cut_config(name: str, config: PreTrainedConfig, blocks: int) -> PreTrainedConfig:
    """The configuration of an LLM's first blocks, with its embeddings, final norm and head.

    Args:
        name: of the LLM, for errors.
        config: of the whole LLM; stays as it is.
        blocks: how many blocks to keep.

    Returns:
        An ordinary configuration of that depth.

    Raises:
        LayerfuseError: if there are not as many blocks, or those that are left would work otherwise
            without the others.
    """
    depth: int = config.num_hidden_layers
    if not 1 <= blocks <= depth:
        raise LayerfuseError(
            f"llm.blocks {blocks} is not possible: {name} has {depth} blocks; valid: 1..{depth}"
        )
    # As a dict: what families have differs.
    settings: dict[str, Any] = config.to_dict()
    # Gemma 3n counts from its last block which ones reuse the keys and values of others.
    if settings.get("num_kv_shared_layers"):
        raise LayerfuseError(
            f"llm.blocks {blocks} is not possible: the last blocks of {name} "
            f"({config.model_type}) share keys and values with others, so that its first blocks "
            "alone are no LLM; leave llm.blocks out, or take another LLM"
        )
    shorter = copy.deepcopy(config)
    shorter.update({"num_hidden_layers": blocks})
    # What is said of every block, such as its kind of attention.
    for setting, value in settings.items():
        if _is_of_blocks(setting, value, depth):
            shorter.update({setting: value[:blocks]})
    return shorter


# Any: settings hold anything
def _is_of_blocks(setting: str, value: Any, depth: int) -> bool:
    """Whether a setting is a list with an entry for each of the LLM's blocks."""
    if setting in NOT_OF_BLOCKS or not isinstance(value, list):
        return False
    entries = cast("list[Any]", value)
    return len(entries) == depth
