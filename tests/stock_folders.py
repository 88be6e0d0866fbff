"""Folders of transformers' own LLaVA and LLaVA-NeXT, tiny and random, with their processors."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
)

from tests import tiny

# As those of released checkpoints: parts in, the line behind a picture is the template's own, and
# nothing ends an answer but the end of sequence.
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ eos_token if message['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def stock(
    layer: int | list[int] = 3,
    *,
    encoder: str = "clip",
    llm: str = "llama",
    next_generation: bool = False,
    **changes: Any,
) -> Any:
    """transformers' LLaVA or LLaVA-NeXT with large random weights."""
    config_class = LlavaNextConfig if next_generation else LlavaConfig
    model_class: Any = LlavaForConditionalGeneration
    if next_generation:
        model_class = LlavaNextForConditionalGeneration
    settings: dict[str, Any] = {
        "vision_config": tiny.vision_config(encoder),
        "text_config": tiny.text_config(llm),
        "image_token_index": tiny.IMAGE_ID,
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": "full" if encoder == "siglip" else "default",
    }
    torch.manual_seed(0)
    llava = model_class(config_class(**{**settings, **changes})).eval()
    for parameter in llava.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(3)
    return llava


def stock_processor(
    template: str | None = TEMPLATE, *, next_generation: bool = False, tokenizer: Any = None
) -> Any:
    """The processor of such a model."""
    processor_class: Any = LlavaNextProcessor if next_generation else LlavaProcessor
    image_processor: Any = CLIPImageProcessorPil(
        size={"shortest_edge": tiny.SIZE},
        crop_size={"height": tiny.SIZE, "width": tiny.SIZE},
    )
    if next_generation:
        image_processor = LlavaNextImageProcessorPil(
            size={"shortest_edge": tiny.SIZE},
            crop_size={"height": tiny.SIZE, "width": tiny.SIZE},
            image_grid_pinpoints=[[tiny.SIZE, 2 * tiny.SIZE]],
        )
    return processor_class(
        image_processor=image_processor,
        tokenizer=tokenizer or tiny.tokenizer(),
        patch_size=tiny.PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def save_stock(folder: Path, *, next_generation: bool = False) -> Any:
    """Save a tiny model and its processor; the model is returned."""
    llava = stock(next_generation=next_generation)
    llava.save_pretrained(folder)
    stock_processor(next_generation=next_generation).save_pretrained(folder)
    return llava
