"""The pretrained parts of a new FusionVLM: the LLM, its image token, the processor."""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from layerfuse.config import FusionConfig
from layerfuse.local_models import resolve
from layerfuse.processor import IMAGE_TOKEN, Processor, load_image_processor, load_tokenizer

Source = str | PreTrainedConfig
"""hub id, local folder, local-model name, or a config (random weights)"""


def image_token_id_of(llm: Source, image_token: str | None) -> int:
    """The id of an LLM's image token. Raises ValueError if `llm` is a config."""
    if not isinstance(llm, str):
        raise ValueError("`llm` is a config, so `image_token_id` must be given")
    tokenizer = load_tokenizer(llm, image_token)
    return tokenizer.convert_tokens_to_ids(image_token or IMAGE_TOKEN)


def text_config_of(llm: Source) -> PreTrainedConfig:
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


def load_llm(llm: Source, dtype: torch.dtype, attn_implementation: str | None) -> PreTrainedModel:
    """A causal LM with its pretrained weights, or with random ones from a config."""
    kernel = {"attn_implementation": attn_implementation} if attn_implementation else {}
    if isinstance(llm, str):
        model = AutoModelForCausalLM.from_pretrained(resolve(llm), dtype=dtype, **kernel)
        if not model.generation_config.do_sample:  # saving refuses what only sampling would read
            model.generation_config.update(temperature=None, top_p=None, top_k=None)
        return model
    return AutoModelForCausalLM.from_config(llm, dtype=dtype, **kernel)


def ensure_row(language_model: Any, image_token_id: int) -> None:
    """Grow the vocabulary if the image token is new; its row is the mean of the others, so that it
    is never the likeliest next token."""
    old = language_model.get_input_embeddings().weight.shape[0]
    if image_token_id < old:
        return
    language_model.resize_token_embeddings(image_token_id + 1, mean_resizing=False)
    tables = (language_model.get_input_embeddings(), language_model.get_output_embeddings())
    with torch.no_grad():
        for table in tables:
            table.weight[old:] = table.weight[:old].float().mean(dim=0).to(table.weight.dtype)


def compose_processor(
    encoder: str, llm: str, config: FusionConfig, chat_template: str | None, image_token: str | None
) -> Processor:
    """The processor that belongs to a model composed from the same encoder and LLM."""
    tokenizer = load_tokenizer(llm, image_token)
    return Processor(
        load_image_processor(encoder),
        tokenizer,
        patch_size=config.vision_config.patch_size,
        token_grid=config.token_grid,
        fusion=config.fusion,
        layers=len(config.vision_layers),
        image_token=image_token or IMAGE_TOKEN,
        chat_template=chat_template,
    )
