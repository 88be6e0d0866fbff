"""Loading pretrained parts by hub id, folder or local-model name."""

from typing import Any

import torch
from tokenizers import AddedToken
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)

from layerfuse.local_models.registry import resolve
from layerfuse.model.config import FusionConfig
from layerfuse.model.processor import IMAGE_TOKEN, Processor

NameOrConfig = str | PreTrainedConfig
"""hub id, local folder, local-model name, or a config (random weights)"""


def text_config_of(llm: NameOrConfig) -> PreTrainedConfig:
    """The configuration of an LLM. Raises ValueError if it is more than a language model."""
    config = llm if isinstance(llm, PreTrainedConfig) else AutoConfig.from_pretrained(resolve(llm))
    if config.get_text_config() is not config:
        raise ValueError(
            f"{llm if isinstance(llm, str) else config.model_type} is a multimodal model "
            f"({config.model_type}); give a language model alone"
        )
    return config


def decoder_blocks(language_model: Any) -> nn.ModuleList:
    """The decoder blocks, where internal fusion attaches. Raises ValueError if there are none."""
    decoder = language_model.get_decoder()
    if decoder is None or "layers" not in decoder._modules:
        raise ValueError(
            f"{type(language_model).__name__} keeps its blocks elsewhere than in `model.layers`; "
            "valid are LLMs of the usual build: llama, qwen, mistral, gemma, phi, smollm, ..."
        )
    return decoder.layers


def load_llm(
    llm: NameOrConfig, dtype: torch.dtype, attn_implementation: str | None, image_token_id: int
) -> PreTrainedModel:
    """A causal LM with its pretrained weights, or with random ones from a config, that knows the
    image token and never answers with it. If the token is new, its row is the mean of the others,
    so that it is never the likeliest next one."""
    kernel = {"attn_implementation": attn_implementation} if attn_implementation else {}
    if isinstance(llm, str):
        model: Any = AutoModelForCausalLM.from_pretrained(resolve(llm), dtype=dtype, **kernel)
        if not model.generation_config.do_sample:  # saving refuses what only sampling would read
            model.generation_config.update(temperature=None, top_p=None, top_k=None)
    else:
        model = AutoModelForCausalLM.from_config(llm, dtype=dtype, **kernel)
    model.generation_config.suppress_tokens = [image_token_id]
    old = model.get_input_embeddings().weight.shape[0]
    if image_token_id >= old:
        model.resize_token_embeddings(image_token_id + 1, mean_resizing=False)
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            rows = table.weight.data
            rows[old:] = rows[:old].float().mean(dim=0).to(rows.dtype)
    return model


def compose_processor(
    encoder: str, llm: str, config: FusionConfig, chat_template: str | None, image_token: str | None
) -> Processor:
    """The processor that belongs to a model composed from the same encoder and LLM."""
    return Processor(
        load_image_processor(encoder),
        load_tokenizer(llm, image_token),
        patch_size=config.vision_config.patch_size,
        token_grid=config.token_grid,
        fusion=config.fusion,
        layers=len(config.vision_layers),
        image_token=image_token or IMAGE_TOKEN,
        chat_template=chat_template,
    )


def load_tokenizer(name: str, image_token: str | None = None) -> Any:
    """The tokenizer of an LLM with an image token in it.

    Without `image_token`, `<image>` is used, and added where it is missing. A token that is named
    must exist: `Processor` checks it.
    """
    tokenizer = AutoTokenizer.from_pretrained(resolve(name))
    if image_token is None and IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True)], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_image_processor(name: str) -> Any:
    """The PIL image processor of an encoder (hub id, folder or local-model name)."""
    return AutoImageProcessor.from_pretrained(resolve(name), backend="pil")
