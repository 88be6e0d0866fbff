"""FusionVLM: encoder, fusion and LLM as one ordinary Hugging Face model."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast

from layerfuse.compose import (
    Source,
    decoder_blocks,
    ensure_row,
    image_token_id_of,
    load_llm,
    text_config_of,
)
from layerfuse.config import FusionConfig, configure, shapes
from layerfuse.encoder import Encoder, Features, load_tower, load_vision_config
from layerfuse.fusion import Visual, attach, parse
from layerfuse.processor import IGNORED, Processor, register_processor
from layerfuse.selection import LayerSpec


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
        self.fusion = module(options, shapes(selection, config.vision_config, config.text_config))
        self.language_model: Any = language_model or AutoModelForCausalLM.from_config(
            config.text_config
        )
        attach(self.fusion, decoder_blocks(self.language_model))
        parts = (self.vision_tower.tower, self.language_model)
        self._no_split_modules = [n for part in parts for n in part._no_split_modules or []]
        self.post_init()
        self.generation_config = self.language_model.generation_config

    @classmethod
    def compose(
        cls,
        encoder: Source | Path,
        llm: Source | Path,
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
        encoder = str(encoder) if isinstance(encoder, Path) else encoder
        llm = str(llm) if isinstance(llm, Path) else llm
        vision, text = load_vision_config(encoder), text_config_of(llm)
        token_id = image_token_id_of(llm, image_token) if image_token_id is None else image_token_id
        config = configure(vision, text, layers, fusion, token_grid, token_id)
        options, _ = parse(config.fusion or {})
        taps = options.taps(config.selection)
        if isinstance(encoder, str):
            tower = Encoder(load_tower(encoder, vision, dtype), taps, token_grid)
        else:
            tower = Encoder.from_config(vision, taps, token_grid).to(dtype)
        language_model = load_llm(llm, dtype, attn_implementation)
        ensure_row(language_model, token_id)
        language_model.generation_config.suppress_tokens = [token_id]  # an answer holds no image
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

    @property
    def fusion_dtype(self) -> torch.dtype:
        return next(self.fusion.parameters()).dtype

    def encode_images(self, pixel_values: Tensor) -> Features:
        """(B, 3, height, width) -> features of the selected layers, without gradient if frozen."""
        return self.vision_tower(pixel_values)

    def fuse(self, features: Features) -> Visual:
        """Run the fusion strategy in its own dtype."""
        return self.fusion(features.to(device=self.device, dtype=self.fusion_dtype))

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
        if features is None and pixel_values is not None:
            features = self.encode_images(pixel_values)
        embeds, visual = self._embed(input_ids, inputs_embeds, features)
        targets = None if labels is None else F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        sparse = targets is not None and self.training
        if targets is not None and sparse:
            kwargs.setdefault("use_cache", False)
            logits_to_keep, targets = targets != IGNORED, targets[targets != IGNORED]
        elif isinstance(logits_to_keep, int) and logits_to_keep:
            # A slice is not contiguous, and on CPU a frozen head then multiplies row by row.
            length = embeds.shape[1]
            logits_to_keep = torch.arange(length - logits_to_keep, length, device=self.device)
        out = self.language_model(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            logits_to_keep=logits_to_keep,
            visual=visual,
            **kwargs,
        )
        return CausalLMOutputWithPast(
            loss=None if targets is None else _loss(out.logits, targets, num_items_in_batch),
            logits=None if sparse else out.logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )

    def _embed(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, features: Features | None
    ) -> tuple[Tensor, Visual | None]:
        """The LLM's input: text embeddings with the visual tokens written over image tokens."""
        if input_ids is None:
            if inputs_embeds is None or features is not None:
                raise ValueError("give input_ids: the image tokens say where images belong")
            return inputs_embeds, None
        embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        if features is not None:
            return self._insert(features, input_ids, embeds)
        if self.training:  # text alone: the fusion takes part, with zero gradient, on every rank
            nothing = torch.stack([p.sum() for p in self.fusion.parameters()]).sum() * 0
            embeds = embeds + nothing.to(embeds.dtype)
        return embeds, None

    def _insert(
        self, features: Features, input_ids: Tensor, inputs_embeds: Tensor
    ) -> tuple[Tensor, Visual]:
        visual = self.fuse(features)
        mask = input_ids == self.config.image_token_id
        tokens = visual.tokens.to(inputs_embeds.dtype)
        images, each = tokens.shape[:2]
        if not torch.compiler.is_compiling() and int(mask.sum()) != images * each:
            raise ValueError(
                f"{int(mask.sum())} image tokens in the text, but {images} images of {each} tokens"
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
            features = features.take(order) if features else None
        parent: Any = super()
        ids, kwargs = parent._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **kwargs
        )
        given = {"pixel_values": pixels, "features": features}
        return ids, kwargs | {k: v for k, v in given.items() if v is not None}

    def _repeat_images(self, input_ids: Tensor, images: int, expand_size: int) -> Tensor:
        tokens = (input_ids == self.config.image_token_id).sum(dim=1)
        per_row = (tokens // (tokens.sum() // images)).tolist()
        rows = torch.arange(images, device=input_ids.device).split(per_row)
        return torch.cat([row.repeat(expand_size) for row in rows])

    @torch.inference_mode()
    def ask(
        self,
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
        model: Any = self
        output = model.generate(**inputs.to(self.device), max_new_tokens=max_new_tokens, **options)
        new = output[0, inputs["input_ids"].shape[1] :]
        return processor.tokenizer.decode(new, skip_special_tokens=True).strip()


def _loss(logits: Tensor, targets: Tensor, count: Tensor | int | None) -> Tensor:
    """Cross-entropy summed over the labelled tokens, divided by `count` or by their number."""
    flat = targets.flatten()
    total = F.cross_entropy(
        logits.float().flatten(0, -2), flat, ignore_index=IGNORED, reduction="sum"
    )
    return total / (count or (flat != IGNORED).sum().clamp_min(1))


AutoConfig.register("layerfuse", FusionConfig, exist_ok=True)
AutoModelForImageTextToText.register(FusionConfig, FusionVLM, exist_ok=True)
register_processor(FusionConfig)
