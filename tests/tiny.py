"""Tiny random models and a tiny tokenizer, built in code."""

from pathlib import Path
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
"""the image token, as `tokenizer` numbers it"""
SIZE = 32
"""height and width of an image in pixels"""
PATCH = 8
"""height and width of a patch in pixels: an image has 4 × 4 patches"""
BLOCKS_OF_ENCODER = 4

_VISION: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": BLOCKS_OF_ENCODER,
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
    "dinov3": {"model_type": "dinov3_vit", "num_register_tokens": 4},
    "aimv2": {"model_type": "aimv2_vision_model"},
    "internvl": {
        "model_type": "internvl_vision",
        "image_size": [SIZE, SIZE],
        "patch_size": [PATCH, PATCH],
    },
    "siglip2": {"model_type": "siglip2_vision_model", "num_patches": (SIZE // PATCH) ** 2},
    # not in the table of families: looked at
    "deit": {"model_type": "deit"},
    "mlcd": {"model_type": "mlcd_vision_model"},
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
    # a window shorter than the prompts of tests, or it would cut nothing off
    "gemma3": {"model_type": "gemma3_text", "sliding_window": 16},
    # one block without rotation among the six
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 1, 1, 0, 1, 1]},
}


def _config(settings: dict[str, Any]) -> PreTrainedConfig:
    """A config of transformers from its model type and its other settings."""
    others = dict(settings)
    model_type = others.pop("model_type")
    return AutoConfig.for_model(model_type, **others)


def vision_config(name: str = "clip", **changes: Any) -> PreTrainedConfig:
    """The config of an encoder of `ENCODERS`: 4 blocks of width 24 over 4 × 4 patches."""
    return _config({**_VISION, **ENCODERS[name], **changes})


def text_config(name: str = "llama", **changes: Any) -> PreTrainedConfig:
    """The config of an LLM of `LLMS`: 6 blocks of width 32."""
    return _config({**_TEXT, **LLMS[name], **changes})


def model(
    strategy: str = "concat",
    encoder: str = "clip",
    llm: str = "llama",
    *,
    seed: int = 0,
    layers: Any = None,
    token_grid: tuple[int, int] | None = None,
    open_gates: bool = True,
    llm_blocks: int = 6,
    **options: Any,
) -> FusionVLM:
    """A random model. With `open_gates`, parameters that start at zero are random too, so that
    every part of the strategy shows in the logits."""
    if layers is None:
        _, strategy_class = FUSIONS[strategy]
        layers = strategy_class.example(BLOCKS_OF_ENCODER)
    torch.manual_seed(seed)
    vlm = FusionVLM.compose(
        encoder=vision_config(encoder),
        llm=text_config(llm, num_hidden_layers=llm_blocks),
        layers=layers,
        fusion={"name": strategy, **options},
        token_grid=token_grid,
        image_token_id=IMAGE_ID,
    )

    with torch.no_grad():
        # With transformers' usual deviation of 0.02, a model of this size gives nearly uniform
        # logits, in which differences would stay below every tolerance. Norms and biases have one
        # dimension and stay as they are.
        for parameter in vlm.language_model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
        for parameter in vlm.fusion.parameters():
            starts_at_zero = not parameter.any()
            if open_gates and starts_at_zero:
                parameter.normal_(std=0.5)
    return vlm.eval()


CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% if m.role == 'assistant' %}</s>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer(chat_template: str | None = CHAT_TEMPLATE, image: bool = True) -> Any:
    """Byte-level: one token per byte after the special ones."""
    fourth = "<image>" if image else "<other>"
    special = ["<pad>", "<s>", "</s>", fourth]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(special + alphabet)}

    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=[fourth],
    )
    fast.chat_template = chat_template
    return fast


def image_processor(height: int = SIZE, width: int = SIZE) -> Any:
    """Resizes every picture to (3, height, width); it crops nothing."""
    size = {"height": height, "width": width}
    return BitImageProcessorPil(size=size, do_center_crop=False, resample=2)


def processor(model: FusionVLM, **options: Any) -> Processor:
    """The processor that fits a model."""
    return Processor(
        image_processor(),
        tokenizer(),
        patch_size=PATCH,
        token_grid=model.config.token_grid,
        fusion=model.config.fusion,
        layers=len(model.config.vision_layers),
        **options,
    )


def save_model(folder: Path, strategy: str = "concat", seed: int = 1) -> Path:
    """Save a random model and its processor; those of the usual seed give answers that differ and
    can be read."""
    vlm = model(strategy, seed=seed)
    vlm.save_pretrained(folder)
    processor(vlm).save_pretrained(folder)
    return folder
