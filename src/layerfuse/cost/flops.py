"""Parameters and FLOPs, counted on the meta device."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, PreTrainedConfig

from layerfuse.fusion import Layout
from layerfuse.local_models.registry import resolve
from layerfuse.model.config import FusionConfig
from layerfuse.model.vlm import FusionVLM
from layerfuse.recipe.schema import ModelSource
from layerfuse.vision.encoder import vision_config_of
from layerfuse.vision.features import Features

TEXT_TOKENS = 64  # per sample in the FLOP estimate, beside the visual ones


PARTS = ("vision", "fusion", "llm")


Known = dict[tuple[str, Any, int], int]


def tokens_of(model: FusionVLM, size: int) -> int:
    """Number of tokens that replace an image of `size` pixels."""
    return model.config.num_image_tokens(size, size)


def count(config: FusionConfig) -> tuple[FusionVLM, dict[str, int]]:
    """A model on the meta device and the number of parameters of each of its parts."""
    with torch.device("meta"):
        model = FusionVLM(config).eval()
    parts = {"vision": model.vision_tower, "fusion": model.fusion, "llm": model.language_model}
    return model, {name: sum(p.numel() for p in x.parameters()) for name, x in parts.items()}


@torch.no_grad()
def flops(
    model: FusionVLM, size: int, known: Known | None = None, parts: Sequence[str] = PARTS
) -> dict[str, int]:
    """Forward FLOPs of one image of `size` pixels and TEXT_TOKENS tokens of text, per part, counted
    by torch from the operations on meta tensors; what is injected counts with the LLM.

    `known` keeps what is the same for other strategies with this encoder and LLM.
    """
    fusion, tower, known = model.fusion, model.vision_tower, {} if known is None else known
    width = model.config.text_config.hidden_size
    instruction_width = model.instruction.width(width)
    rows, columns = tower.grid(size, size)
    with torch.device("meta"):
        patches = torch.empty(1, rows * columns, model.config.vision_config.hidden_size)
        each = ((patches,) * len(tower.layers), (patches[:, 0],) * len(tower.layers))
        with FlopCounterMode(display=False) as counter:
            features = Features(tower.layers, *each, (rows, columns))
            fused = fusion(features, torch.empty(1, instruction_width))
        found = {"fusion": counter.get_total_flops()}
        tokens = fused.tokens.shape[1]
        length = tokens + TEXT_TOKENS
        layout = Layout.of(torch.zeros(1, length, dtype=torch.bool), 1, tokens)
        visual = fusion.place(fused, layout)
        given: dict[str, Any] = {"visual": visual, "use_cache": False}
        given["attention_mask"] = torch.zeros(1, 1, length, length)  # finished: none is made
        given["inputs_embeds"] = torch.empty(1, length, width)
        look = partial(tower, torch.empty(1, 3, size, size))
        read = partial(model.language_model, **given)
        own = f"{fusion.config} {model.config.vision_groups}" if visual.memory else ""
        for part, key, action in (("vision", max(tower.layers), look), ("llm", own, read)):
            if part in parts and (part, key, length) not in known:
                with FlopCounterMode(display=False) as counter:
                    action()
                known[part, key, length] = counter.get_total_flops()
            if part in parts:
                found[part] = known[part, key, length]
    return found


def vision_config(source: ModelSource) -> PreTrainedConfig:
    """The configuration of an encoder. Raises ValueError if it is none, OSError if not found."""
    return vision_config_of(_config(source))


def text_config(source: ModelSource) -> PreTrainedConfig:
    """The configuration of a language model. Raises OSError if it cannot be found."""
    return _config(source).get_text_config()


def _config(source: ModelSource) -> PreTrainedConfig:
    """The configuration that the recipe spells out, else that of the folder or hub id."""
    if settings := dict(source.config or {}):
        if "model_type" not in settings:
            raise ValueError(f"the configuration of {source.model} needs a model_type")
        return AutoConfig.for_model(settings.pop("model_type"), **settings)
    try:
        return AutoConfig.from_pretrained(resolve(source.model))
    except OSError as error:
        raise OSError(
            f"cannot read the configuration of {source.model}: no such folder, and no hub answered."
            " Pull a local model (`layerfuse models pull`), or write `config:` in the recipe"
        ) from error
