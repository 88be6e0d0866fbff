"""Loading pretrained parts by hub id, folder or local-model name."""

from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)

from layerfuse.errors import LayerfuseError
from layerfuse.local_models.registry import resolve
from layerfuse.model.chat_template import IMAGE_TOKEN
from layerfuse.model.config import FusionConfig
from layerfuse.model.processor import Processor

NameOrConfig = str | PreTrainedConfig
"""hub id, local folder, local-model name, or a config (random weights)"""


def text_config_of(llm: NameOrConfig) -> PreTrainedConfig:
    """The configuration of an LLM.

    Args:
        llm: hub id, folder, local-model name, or the configuration itself.

    Raises:
        LayerfuseError: if it cannot be found, or is more than a language model.
    """
    if isinstance(llm, str):
        name = llm
        # Any: transformers does not annotate what its automatic classes make
        auto_config: Any = AutoConfig
        try:
            config: PreTrainedConfig = auto_config.from_pretrained(resolve(llm))
        except OSError as error:
            raise LayerfuseError(f"cannot read the LLM {llm}: {error}") from error
    else:
        name = llm.model_type
        config = llm
    # a multimodal config holds that of its language model; a language model's is itself
    # Any: transformers does not annotate the arguments of this method
    untyped: Any = config
    if untyped.get_text_config() is not config:
        raise LayerfuseError(
            f"{name} is a multimodal model ({config.model_type}); give a language model alone"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise LayerfuseError(
            f"{name} is no language model (its type is {config.model_type}): give a decoder-only "
            "LLM"
        )
    return config


# Any: causal LMs share no type that says what they hold
def decoder_blocks(language_model: Any) -> nn.ModuleList:
    """The decoder blocks, where internal fusion attaches.

    Args:
        language_model: a causal LM of transformers.

    Raises:
        LayerfuseError: if it keeps them elsewhere than usual.
    """
    decoder = language_model.get_decoder()
    if decoder is None or "layers" not in decoder._modules:
        raise LayerfuseError(
            f"{type(language_model).__name__} keeps its blocks elsewhere than in `model.layers`; "
            "valid are LLMs of the usual build: llama, qwen, mistral, gemma, phi, smollm, ..."
        )
    return decoder.layers


def load_llm(
    llm: NameOrConfig,
    dtype: torch.dtype,
    attn_implementation: str | None,
    image_token_id: int,
) -> PreTrainedModel:
    """A causal LM that knows the image token and never answers with it.

    Args:
        llm: hub id, folder or local-model name for pretrained weights, a config for random ones.
        dtype: the dtype of the weights.
        attn_implementation: the attention kernel by transformers' name; None is its own choice.
        image_token_id: the image token. If it is new, its row in the tables of embeddings is the
            mean of the others, so that it is never the likeliest next one.

    Raises:
        LayerfuseError: if the LLM cannot be found, or lacks weights.
    """
    options: dict[str, Any] = {"dtype": dtype}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    # Any: transformers does not annotate what its automatic classes make
    auto_model: Any = AutoModelForCausalLM
    if isinstance(llm, str):
        try:
            model, report = auto_model.from_pretrained(
                resolve(llm),
                output_loading_info=True,
                **options,
            )
        except (OSError, SafetensorError) as error:
            raise LayerfuseError(f"cannot read the LLM {llm}: {error}") from error
        # transformers makes up what a checkpoint lacks, and only says so
        missing = sorted(report["missing_keys"])
        if missing:
            raise LayerfuseError(
                f"{llm} holds no whole LLM: {len(missing)} weights are missing, such as "
                f"{missing[0]}"
            )
        if not model.generation_config.do_sample:
            # saving refuses what only sampling would read
            model.generation_config.update(temperature=None, top_p=None, top_k=None)
    else:
        model = auto_model.from_config(llm, **options)
    model.generation_config.suppress_tokens = [image_token_id]

    vocabulary = model.get_input_embeddings().weight.shape[0]
    if image_token_id >= vocabulary:
        # transformers would draw the new rows at random around the mean
        model.resize_token_embeddings(image_token_id + 1, mean_resizing=False)
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            rows: Tensor = table.weight.data
            # a mean over so many rows needs float32
            mean = rows[:vocabulary].float().mean(dim=0)
            rows[vocabulary:] = mean.to(rows.dtype)
    return model


def compose_processor(
    encoder: str,
    llm: str,
    config: FusionConfig,
    *,
    chat_template: str | None,
    image_token: str | None,
) -> Processor:
    """The processor that belongs to a model composed from the same encoder and LLM.

    Args:
        encoder: hub id, folder or local-model name.
        llm: the same, of the LLM.
        config: the composed model's config.
        chat_template: a Jinja template of `messages`; None takes the tokenizer's own.
        image_token: a token of the LLM that marks images; None takes `<image>`.

    Raises:
        LayerfuseError: as `Processor`, and if an image processor or tokenizer cannot be found.
    """
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


# Any: tokenizers and image processors of transformers share no type that says what they have
def load_tokenizer(name: str, image_token: str | None = None) -> Any:
    """The tokenizer of an LLM with an image token in it.

    Args:
        name: hub id, folder or local-model name.
        image_token: a token that must exist, which `Processor` checks. None takes `<image>`, which
            is added where it is missing.

    Raises:
        LayerfuseError: if the tokenizer cannot be found.
    """
    auto_tokenizer: Any = AutoTokenizer
    try:
        tokenizer = auto_tokenizer.from_pretrained(resolve(name))
    except OSError as error:
        raise LayerfuseError(f"cannot read the tokenizer of {name}: {error}") from error
    if image_token is None and IMAGE_TOKEN not in tokenizer.get_vocab():
        # special: it is never split, and left out of decoded text
        added = AddedToken(IMAGE_TOKEN, special=True)
        tokenizer.add_tokens([added], special_tokens=True)
    if tokenizer.pad_token is None:
        # padding is masked by its place, so any token will do
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_image_processor(name: str) -> Any:
    """The image processor of an encoder, in its version for PIL images.

    Args:
        name: hub id, folder or local-model name.

    Raises:
        LayerfuseError: if it cannot be found.
    """
    auto_image_processor: Any = AutoImageProcessor
    try:
        return auto_image_processor.from_pretrained(resolve(name), backend="pil")
    except OSError as error:
        raise LayerfuseError(f"cannot read the image processor of {name}: {error}") from error
