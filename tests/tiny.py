"""Tiny random models and a tiny tokenizer, built in code."""

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    BitImageProcessorPil,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from layerfuse import FusionVLM, Processor
from layerfuse.fusion import FUSIONS

IMAGE_ID = 3
SIZE = 32
PATCH = 8

_VISION: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "image_size": SIZE,
    "patch_size": PATCH,
}
ENCODERS: dict[str, dict[str, Any]] = {
    "clip": {"model_type": "clip_vision_model"},
    "siglip": {"model_type": "siglip_vision_model"},
    "dinov2": {"model_type": "dinov2"},
    "dinov2_registers": {"model_type": "dinov2_with_registers", "num_register_tokens": 4},
    "vit": {"model_type": "vit"},
}
_TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLMS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "qwen3": {"model_type": "qwen3"},
    "gemma3": {"model_type": "gemma3_text", "sliding_window": 16},
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 1, 1, 0, 1, 1]},
}


def _config(**settings: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def vision_config(name: str = "clip", **changes: Any) -> PreTrainedConfig:
    return _config(**{**_VISION, **ENCODERS[name], **changes})


def text_config(name: str = "llama", **changes: Any) -> PreTrainedConfig:
    return _config(**{**_TEXT, **LLMS[name], **changes})


def model(
    strategy: str = "concat",
    encoder: str = "clip",
    llm: str = "llama",
    seed: int = 0,
    layers: Any = None,
    token_grid: tuple[int, int] | None = None,
    open_gates: bool = True,
    llm_blocks: int = 6,
    **options: Any,
) -> FusionVLM:
    """A random model. With `open_gates`, parameters that start at zero are random too, so that
    every part of the strategy shows in the logits."""
    torch.manual_seed(seed)
    built = FusionVLM.compose(
        encoder=vision_config(encoder),
        llm=text_config(llm, num_hidden_layers=llm_blocks),
        layers=FUSIONS[strategy][1].example(4) if layers is None else layers,
        fusion={"name": strategy, **options},
        token_grid=token_grid,
        image_token_id=IMAGE_ID,
    )
    with torch.no_grad():  # larger than the usual 0.02, so that differences are visible
        for parameter in built.language_model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)
        for parameter in built.fusion.parameters():
            if open_gates and not parameter.any():
                parameter.normal_(std=0.5)
    return built.eval()


CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% if m.role == 'assistant' %}</s>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer(chat_template: str | None = CHAT_TEMPLATE, image: bool = True) -> Any:
    """Byte-level: one token per byte after the special ones."""
    special = ["<pad>", "<s>", "</s>", "<image>" if image else "<other>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(special + alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=special[3:],
    )
    fast.chat_template = chat_template
    return fast


def image_processor(height: int = SIZE, width: int = SIZE) -> Any:
    size = {"height": height, "width": width}
    return BitImageProcessorPil(size=size, do_center_crop=False, resample=2)


def processor(model: FusionVLM, **options: Any) -> Processor:
    return Processor(
        image_processor(),
        tokenizer(),
        patch_size=PATCH,
        token_grid=model.config.token_grid,
        fusion=model.config.fusion,
        layers=len(model.config.vision_layers),
        **options,
    )
