"""A trained model as transformers' own LLaVA, which knows layers side by side and a projector."""

from copy import deepcopy
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoModel,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)

from layerfuse.errors import LayerfuseError
from layerfuse.export.stock_template import stock_template
from layerfuse.fusion.fixed_mix import flat_projector
from layerfuse.fusion.flat_projector import FlatProjector
from layerfuse.model.pretrained import processed_size
from layerfuse.model.processor import Processor
from layerfuse.model.vlm import FusionVLM
from layerfuse.vision.towers import family_of, native_size

INSTEAD = "`--to hub` writes a folder for transformers that holds the strategy's own code"


def to_stock_llava(model: FusionVLM) -> LlavaForConditionalGeneration:
    """The same model as transformers' LLaVA, which shares the weights of encoder and LLM with it.

    Args:
        model: a trained model on the CPU; it must not be used for training afterwards.

    Returns:
        A model with the same logits; of several layers, `vision_feature_layer` is a list.

    Raises:
        LayerfuseError: naming what LLaVA cannot express, and what to do instead.
    """
    try:
        flat = flat_projector(model.fusion)
    except LayerfuseError as error:
        raise LayerfuseError(f"cannot fold this model into stock LLaVA: {error}. {INSTEAD}") from (
            error
        )
    refuse_pooling(model, "cannot fold this model into stock LLaVA")
    head = _plain_head(model)

    vision_config = _stock_vision_config(model, flat)
    text_config = deepcopy(model.language_model.config)
    # by which other programs know the class of the LLM inside
    text_config.architectures = [type(model.language_model).__name__]
    layers: int | list[int] = list(flat.layers)
    if len(flat.layers) == 1 and flat.layers != (0,):
        # a list of one is the same, but not to all programs; a 0 is no layer to transformers
        layers = flat.layers[0]
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=model.config.image_token_id,
        image_seq_length=_tokens_of_native_image(model),
        projector_hidden_act=flat.activation,
        vision_feature_select_strategy=_select_strategy(model),
        vision_feature_layer=layers,
        dtype=model.dtype,
    )
    # On the meta device, because all weights are taken from elsewhere.
    with torch.device("meta"):
        llava = LlavaForConditionalGeneration(config)
    # Any: transformers types parts of models by no class that says what they hold
    inner: Any = llava.model
    inner.vision_tower = _whole_tower(model, vision_config)
    inner.multi_modal_projector.load_state_dict(_weights(flat, model.dtype), assign=True)
    inner.language_model = model.language_model.get_decoder()
    llava.lm_head = head
    llava.generation_config = stock_generation_config(model)
    return llava.eval()


def refuse_pooling(model: FusionVLM, refusal: str) -> None:
    """Raise LayerfuseError for tokens that are means of several patches.

    Args:
        model: the trained model.
        refusal: how the error begins.
    """
    if model.config.token_grid is not None:
        raise LayerfuseError(
            f"{refusal}: token_grid {model.config.token_grid} pools the patches of its encoder, "
            f"and LLaVA does not pool. {INSTEAD}"
        )


def _plain_head(model: FusionVLM) -> nn.Linear:
    """The LLM's head, as LLaVA's own must be: one Linear without bias.

    Raises:
        LayerfuseError: it has a bias.
    """
    closed = model.answer_head
    # its weights are those of the whole head, of which it uses some rows
    head = closed or model.get_output_embeddings()
    if head.bias is not None:
        raise LayerfuseError(
            f"cannot fold this model into stock LLaVA: the head of its LLM "
            f"({model.config.text_config.model_type}) has a bias, for which LLaVA has no place. "
            f"{INSTEAD}"
        )
    rows, width = head.weight.shape
    with torch.device("meta"):
        plain = nn.Linear(width, rows, bias=False)
    plain.weight = head.weight
    return plain


def _tokens_of_native_image(model: FusionVLM) -> int:
    """Tokens of a picture of the encoder's own size."""
    return model.config.num_image_tokens(*native_size(model.config.vision_config))


def _select_strategy(model: FusionVLM) -> Literal["default", "full"]:
    """LLaVA's name for what becomes of the tokens in front of the patches.

    Raises:
        LayerfuseError: there are several; LLaVA drops one.
    """
    prefix = model.vision_tower.prefix
    if prefix == 0:
        return "full"
    if prefix == 1:
        return "default"
    raise LayerfuseError(
        f"cannot fold this model into stock LLaVA: its encoder has {prefix} tokens in front of the "
        f"patches (CLS and registers), and LLaVA drops the first alone. {INSTEAD}"
    )


def _stock_vision_config(model: FusionVLM, flat: FlatProjector) -> PreTrainedConfig:
    """The encoder's config, cut above the deepest layer that is read."""
    vision_config = deepcopy(model.config.vision_config)
    # At least one block: transformers gives the hidden states that its blocks return.
    vision_config.num_hidden_layers = max(1, *flat.layers)
    if vision_config.model_type == "siglip_vision_model":
        # a head above the last block, which nobody runs
        vision_config.vision_use_head = False
    return vision_config


def _whole_tower(model: FusionVLM, config: PreTrainedConfig) -> PreTrainedModel:
    """The encoder with the submodules above its last block, which LLaVA has but never reads.

    Layerfuse does not keep their weights; they are as transformers makes them, from a fixed seed.
    """
    # Any: transformers does not annotate what its automatic classes make
    auto_model: Any = AutoModel
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stock: PreTrainedModel = auto_model.from_config(config)
    tower = model.vision_tower.tower
    weights = {**stock.state_dict(), **tower.state_dict()}
    stock.load_state_dict(weights, assign=True)
    # Any: transformers types `to` for its own classes only
    untyped: Any = stock
    return untyped.to(model.dtype)


def _weights(flat: FlatProjector, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The projector's weights under LLaVA's names."""
    weights = {
        "linear_1.weight": flat.weight_1,
        "linear_1.bias": flat.bias_1,
        "linear_2.weight": flat.weight_2,
        "linear_2.bias": flat.bias_2,
    }
    return {name: weight.to(dtype) for name, weight in weights.items()}


def stock_generation_config(model: FusionVLM) -> GenerationConfig:
    """The settings of generation; a closed set of answers becomes a list of suppressed tokens.

    Args:
        model: the trained model.
    """
    settings = deepcopy(model.generation_config)
    closed = model.answer_head
    if closed is not None:
        allowed = set(closed.tokens)
        vocabulary = range(closed.out_features)
        # Any: transformers' GenerationConfig declares no types
        untyped: Any = settings
        untyped.suppress_tokens = [token for token in vocabulary if token not in allowed]
    return settings


def to_stock_processor(model: FusionVLM, processor: Processor) -> LlavaProcessor:
    """The processor of the same model as transformers' LLaVA.

    Args:
        model: the trained model.
        processor: its processor.

    Raises:
        LayerfuseError: if pictures would be of a size that LLaVA's encoder refuses.
    """
    vision = model.config.vision_config
    size = processed_size("this model", processor.image_processor)
    native = native_size(vision)
    if family_of(vision).resizes and size != native:
        raise LayerfuseError(
            f"cannot fold this model into stock LLaVA: its pictures are {size[0]} x {size[1]} "
            f"pixels, its encoder's own {native[0]} x {native[1]}, and LLaVA does not interpolate "
            f"positions. {INSTEAD}"
        )
    # Any: transformers does not annotate its constructors
    processor_class: Any = LlavaProcessor
    return processor_class(
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
        patch_size=processor.patch_size,
        vision_feature_select_strategy=_select_strategy(model),
        num_additional_image_tokens=model.vision_tower.prefix,
        image_token=processor.image_token,
        chat_template=stock_template(processor.chat.template, processor.image_token),
    )
