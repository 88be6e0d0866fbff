"""FusionVLM: encoder, fusion and LLM as one ordinary Hugging Face model."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast

from layerfuse.encoder import Encoder, Features, load_tower, load_vision_config
from layerfuse.fusion import Shapes, Visual, attach, parse
from layerfuse.local_models import resolve
from layerfuse.processor import (
    IGNORED,
    IMAGE_TOKEN,
    Processor,
    load_image_processor,
    load_tokenizer,
    register_processor,
)
from layerfuse.selection import LayerSpec, Selection, select

Source = str | PreTrainedConfig
"""hub id, local folder, local-model name, or a config (random weights)"""


class FusionConfig(PreTrainedConfig):
    """Composite configuration; every layer index in it is resolved."""

    model_type = "layerfuse"
    sub_configs_defaults: ClassVar = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    vision_config: Any = None
    """the encoder's own config, at full depth"""
    text_config: Any = None
    vision_groups: list[list[int]] | None = None
    """selected layers, as groups; a plain list of layers is one group per layer"""
    fusion: dict[str, Any] | None = None
    """the strategy and its options: {"name": "concat", ...}"""
    token_grid: list[int] | None = None
    """(rows, columns) to which every layer's patch tokens are average-pooled; none: no pooling"""
    image_token_id: int = 0
    tie_word_embeddings: bool = False

    @property
    def selection(self) -> Selection:
        groups = self.vision_groups or [[self.vision_config.num_hidden_layers]]
        return Selection(tuple(map(tuple, groups)), self.vision_config.num_hidden_layers)

    @property
    def vision_layers(self) -> list[int]:
        """The selected layers, in the order in which the strategy takes them."""
        return list(self.selection.layers)


def configure(
    vision: PreTrainedConfig,
    text: PreTrainedConfig,
    layers: LayerSpec,
    fusion: dict[str, Any],
    token_grid: tuple[int, int] | None = None,
    image_token_id: int = 0,
) -> FusionConfig:
    """Resolve layers and options against an encoder and an LLM, before any weight is loaded.

    Raises ValueError for unknown strategies and options, and layers that do not exist.
    """
    selection = select(layers, vision.num_hidden_layers)
    options, module = parse(fusion)
    options = options.resolve(selection)
    with torch.device("meta"):  # the constructor checks what only it can know
        module(options, _shapes(selection, vision, text))
    return FusionConfig(
        vision_config=vision,
        text_config=text,
        vision_groups=[list(group) for group in selection.groups],
        fusion={"name": fusion["name"], **asdict(options)},
        token_grid=list(token_grid) if token_grid else None,
        image_token_id=image_token_id,
        tie_word_embeddings=text.tie_word_embeddings,
    )


def _shapes(selection: Selection, vision: PreTrainedConfig, text: PreTrainedConfig) -> Shapes:
    return Shapes(selection, vision.hidden_size, text.hidden_size, text.num_hidden_layers)


class FusionVLM(PreTrainedModel, GenerationMixin):
    """A vision encoder, a fusion strategy and a decoder-only LLM.

    Attributes: `vision_tower` (Encoder), `fusion` (Fusion), `language_model` (a stock causal LM).
    """

    config_class = FusionConfig
    base_model_prefix = ""
    input_modalities = ["image", "text"]  # noqa: RUF012 (transformers declares it so)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(
        self,
        config: FusionConfig,
        vision_tower: Encoder | None = None,
        language_model: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config)
        options, module = parse(config.fusion or {"name": "single"})
        selection = config.selection
        grid = (config.token_grid[0], config.token_grid[1]) if config.token_grid else None
        self.vision_tower = vision_tower or Encoder.from_config(
            config.vision_config, options.taps(selection), grid
        )
        self.fusion = module(options, _shapes(selection, config.vision_config, config.text_config))
        self.language_model: Any = language_model or AutoModelForCausalLM.from_config(
            config.text_config
        )
        attach(self.fusion, self.language_model.get_decoder().layers)
        parts = (self.vision_tower.tower, self.language_model)
        self._no_split_modules = [n for part in parts for n in part._no_split_modules or []]
        self.post_init()
        self.generation_config = self.language_model.generation_config

    @classmethod
    def compose(
        cls,
        encoder: Source,
        llm: Source,
        layers: LayerSpec,
        fusion: dict[str, Any],
        *,
        token_grid: tuple[int, int] | None = None,
        image_token_id: int | None = None,
        image_token: str | None = None,
        dtype: torch.dtype = torch.float32,
        attn_implementation: str | None = None,
    ) -> "FusionVLM":
        """A new model from a pretrained encoder and LLM; the fusion is random and in float32.

        `encoder` and `llm` are hub ids, local folders, local-model names, or config objects (random
        weights). With a config as `llm`, give `image_token_id`. Raises ValueError for anything that
        does not fit, before weights load.
        """
        vision = load_vision_config(encoder)
        text = (
            llm if isinstance(llm, PreTrainedConfig) else AutoConfig.from_pretrained(resolve(llm))
        )
        text = text.get_text_config()
        token_id = _image_token_id(llm, image_token) if image_token_id is None else image_token_id
        config = configure(vision, text, layers, fusion, token_grid, token_id)
        options, _ = parse(config.fusion or {})
        taps = options.taps(config.selection)
        if isinstance(encoder, str):
            tower = Encoder(load_tower(encoder, vision, dtype), taps, token_grid)
        else:
            tower = Encoder.from_config(vision, taps, token_grid).to(dtype)
        language_model = _load_llm(llm, dtype, attn_implementation)
        _ensure_row(language_model, token_id)
        config.text_config = language_model.config
        return cls(config, tower, language_model)

    def _init_weights(self, module: nn.Module) -> None:
        if module is self.fusion:  # children come first, so this has the last word
            self.fusion.reset_parameters()
        else:
            super()._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def get_decoder(self) -> nn.Module:
        return self.language_model.get_decoder()

    @property
    def embedding_std(self) -> float:
        """Standard deviation of the LLM's text embeddings, as the first block sees them."""
        table = self.get_input_embeddings()
        ids = torch.arange(self.config.text_config.vocab_size, device=self.device)
        with torch.no_grad():
            return float(table(ids).float().std())

    def encode_images(self, pixel_values: Tensor) -> Features:
        """(B, 3, height, width) -> features of the selected layers, without gradient if frozen."""
        return self.vision_tower(pixel_values)

    def fuse(self, features: Features) -> Visual:
        """Run the fusion strategy in its own dtype."""
        dtype = next(self.fusion.parameters()).dtype
        return self.fusion(features.to(device=self.device, dtype=dtype))

    def get_image_features(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """The fused tokens (B, N', D) in `pooler_output`, where serving engines look for them."""
        return BaseModelOutputWithPooling(
            pooler_output=self.fuse(self.encode_images(pixel_values)).tokens
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        features: Features | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Next-token logits, and the loss if `labels` are given.

        input_ids (rows, T) with one image token per visual token; pixel_values (images, 3, h, w)
        or cached `features`, images in reading order; labels (rows, T), -100 where ignored.
        In training mode with labels, logits exist only at labelled positions and are not returned.
        `num_items_in_batch`: number of labelled tokens over all accumulated batches, if known.
        """
        visual = None
        if features is None and pixel_values is not None:
            features = self.encode_images(pixel_values)
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("give input_ids or inputs_embeds")
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if features is not None:
            if input_ids is None:
                raise ValueError("images need input_ids: the image tokens say where they belong")
            inputs_embeds, visual = self._insert(features, input_ids, inputs_embeds)
        sparse = labels is not None and self.training
        if labels is not None:
            targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
            if sparse:
                logits_to_keep = targets != IGNORED
        if isinstance(logits_to_keep, int) and logits_to_keep:
            # A slice is not contiguous, and on CPU a frozen head then multiplies row by row.
            length = inputs_embeds.shape[1]
            logits_to_keep = torch.arange(length - logits_to_keep, length, device=self.device)
        out = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            logits_to_keep=logits_to_keep,
            visual=visual,
            **kwargs,
        )
        loss = None
        if labels is not None:
            flat = targets[targets != IGNORED] if sparse else targets.flatten()
            total = F.cross_entropy(
                out.logits.float().flatten(0, -2),
                flat,
                ignore_index=IGNORED,
                reduction="sum",
            )
            loss = total / (num_items_in_batch or (flat != IGNORED).sum().clamp_min(1))
        return CausalLMOutputWithPast(
            loss=loss,
            logits=None if sparse else out.logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )

    def _insert(
        self, features: Features, input_ids: Tensor, inputs_embeds: Tensor
    ) -> tuple[Tensor, Visual]:
        """Write the visual tokens over the embeddings of the image tokens."""
        visual = self.fuse(features)
        mask = input_ids == self.config.image_token_id
        tokens = visual.tokens.to(inputs_embeds.dtype)
        torch._check_tensor_all(
            mask.sum() == tokens.shape[0] * tokens.shape[1],
            lambda: (
                f"{int(mask.sum())} image tokens in the text, but {tokens.shape[0]} images of "
                f"{tokens.shape[1]} tokens each"
            ),
        )
        merged = inputs_embeds.masked_scatter(mask.unsqueeze(-1), tokens)
        return merged, Visual(visual.tokens, visual.memory, mask, visual.notes)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, is_first_iteration: bool | None = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Images go in at prefill only: the KV cache carries them afterwards."""
        if not is_first_iteration and kwargs.get("use_cache", True):
            kwargs.pop("features", None)
        parent: Any = super()
        return parent.prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, **kwargs
        )

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Repeat rows for beams; the images of a row are repeated as a whole."""
        pixels, features = kwargs.pop("pixel_values", None), kwargs.pop("features", None)
        if expand_size > 1 and input_ids is not None and (pixels is not None or features):
            count = len(pixels) if pixels is not None else len(features.patches[0])
            order = self._repeat_images(input_ids, count, expand_size)
            pixels = pixels[order] if pixels is not None else None
            features = _take(features, order) if features else None
        parent: Any = super()
        ids, kwargs = parent._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **kwargs
        )
        given = {"pixel_values": pixels, "features": features}
        return ids, kwargs | {k: v for k, v in given.items() if v is not None}

    def _repeat_images(self, input_ids: Tensor, images: int, expand_size: int) -> Tensor:
        tokens = (input_ids == self.config.image_token_id).sum(dim=1)
        per_row = (tokens // (tokens.sum() // images)).tolist()
        order, start = [], 0
        for count in per_row:
            order += list(range(start, start + count)) * expand_size
            start += count
        return torch.tensor(order, device=input_ids.device)

    @torch.inference_mode()
    def ask(
        self: Any,
        processor: Processor,
        image: Any,
        question: str,
        max_new_tokens: int = 64,
        **generate: Any,
    ) -> str:
        """The model's answer to one question about an image (path or PIL), several, or None."""
        images = [] if image is None else image if isinstance(image, list) else [image]
        images = [Image.open(x).convert("RGB") if isinstance(x, str | Path) else x for x in images]
        content = processor.image_token * len(images) + ("\n" if images else "") + question
        inputs = processor.inputs([[{"role": "user", "content": content}]], images)
        options = {"do_sample": False, **generate}
        output = self.generate(**inputs.to(self.device), max_new_tokens=max_new_tokens, **options)
        new = output[0, inputs["input_ids"].shape[1] :]
        return processor.tokenizer.decode(new, skip_special_tokens=True).strip()


def _take(features: Features, order: Tensor) -> Features:
    return Features(
        features.layers,
        tuple(x[order] for x in features.patches),
        tuple(x[order] for x in features.summary),
        features.grid,
    )


def _image_token_id(llm: Source, image_token: str | None) -> int:
    if not isinstance(llm, str):
        raise ValueError("`llm` is a config, so `image_token_id` must be given")
    tokenizer = load_tokenizer(llm, image_token)
    return tokenizer.convert_tokens_to_ids(image_token or IMAGE_TOKEN)


def _load_llm(llm: Source, dtype: torch.dtype, attn_implementation: str | None) -> PreTrainedModel:
    kernel = {"attn_implementation": attn_implementation} if attn_implementation else {}
    if isinstance(llm, str):
        return AutoModelForCausalLM.from_pretrained(resolve(llm), dtype=dtype, **kernel)
    return AutoModelForCausalLM.from_config(llm.get_text_config(), **kernel).to(dtype)


def _ensure_row(language_model: Any, image_token_id: int) -> None:
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
        image_token=image_token or IMAGE_TOKEN,
        chat_template=chat_template,
    )


AutoConfig.register("layerfuse", FusionConfig, exist_ok=True)
AutoModelForImageTextToText.register(FusionConfig, FusionVLM, exist_ok=True)
register_processor(FusionConfig)
