"""FusionVLM: encoder, fusion and LLM as one ordinary Hugging Face model."""

from dataclasses import dataclass, replace
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
    AutoProcessor,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast

from layerfuse.fusion import Layout, Visual, attach, parse, seen_images
from layerfuse.hardware import device
from layerfuse.model.config import FusionConfig, configure, shapes
from layerfuse.model.pretrained import (
    NameOrConfig,
    decoder_blocks,
    load_llm,
    load_tokenizer,
    text_config_of,
)
from layerfuse.model.processor import IGNORED, IMAGE_TOKEN, Processor
from layerfuse.vision.encoder import Encoder, load_tower, load_vision_config
from layerfuse.vision.features import Features
from layerfuse.vision.selection import LayerSpec


@dataclass
class FusionOutput(CausalLMOutputWithPast):
    """The LLM's output, and `visual`: what the fusion gave, `notes` with weights among it."""

    visual: Visual | None = None


class ImageGeneration(GenerationMixin):
    """`generate` with images: encoded and fused once, from the prompt alone."""

    def prepare_inputs_for_generation(
        self: Any, input_ids: Tensor, is_first_iteration: bool | None = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Images go in at prefill. Later steps get the prompt's `visual`: without a KV cache to
        write its tokens again, with one only if the strategy attends to its memory."""
        visual: Visual | None = kwargs.get("visual")
        if visual is not None and not is_first_iteration:
            for name in ("pixel_values", "features", "instruction"):
                kwargs.pop(name, None)
            if kwargs.get("use_cache", True):
                kwargs["visual"] = visual.decoding() if self.fusion.attends else None
        parent: Any = super()
        return parent.prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, **kwargs
        )

    def _update_model_kwargs_for_generation(
        self: Any, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        if model_kwargs.get("visual") is None and outputs.visual is not None:
            model_kwargs["visual"] = outputs.visual
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)

    def _expand_inputs_for_generation(
        self: Any,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Encode the images, once for all beams, and repeat rows with all their images. This is the
        last place where `input_ids` is the prompt and nothing else, which a router reads."""
        features: Any = kwargs.pop("features", None)
        pixels: Any = kwargs.pop("pixel_values", None)
        if features is None and pixels is not None:
            features = self.encode_images(pixels)
        if features is not None and input_ids is not None:
            if kwargs.get("instruction") is None and self.fusion.reads == "prompt":
                mask = kwargs.get("attention_mask")
                kwargs["instruction"] = self.prompt_embedding(input_ids, mask)
            if expand_size > 1:
                order = self._repeat_images(input_ids, len(features.patches[0]), expand_size)
                features = features.take(order)
        parent: Any = super()
        ids, kwargs = parent._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **kwargs
        )
        return ids, kwargs if features is None else {**kwargs, "features": features}

    def _repeat_images(self: Any, input_ids: Tensor, images: int, expand_size: int) -> Tensor:
        tokens = (input_ids == self.config.image_token_id).sum(dim=1)
        if not tokens.any():
            raise ValueError(f"0 image tokens in the text, but {images} images")
        per_row = (tokens // (tokens.sum() // images)).tolist()
        rows = torch.arange(images, device=input_ids.device).split(per_row)
        return torch.cat([row.repeat(expand_size) for row in rows])

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


class FusionVLM(ImageGeneration, PreTrainedModel, GenerationMixin):
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
        self.fusion.reset_parameters()  # transformers skips what has no parameters of its own
        self.generation_config = self.language_model.generation_config

    @classmethod
    def compose(
        cls,
        encoder: NameOrConfig | Path,
        llm: NameOrConfig | Path,
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
        encoder, llm = (str(x) if isinstance(x, Path) else x for x in (encoder, llm))
        vision, text = load_vision_config(encoder), text_config_of(llm)
        if image_token_id is None:
            if not isinstance(llm, str):
                raise ValueError("`llm` is a config, so `image_token_id` must be given")
            tokens = load_tokenizer(llm, image_token)
            image_token_id = int(tokens.convert_tokens_to_ids(image_token or IMAGE_TOKEN))
        config = configure(vision, text, layers, fusion, token_grid, image_token_id)
        taps = parse(config.fusion or {})[0].taps(config.selection)
        if isinstance(encoder, str):
            tower = Encoder(load_tower(encoder, vision, dtype), taps, token_grid)
        else:
            tower = Encoder.from_config(vision, taps, token_grid).to(dtype)
        language_model = load_llm(llm, dtype, attn_implementation, image_token_id)
        config.text_config = language_model.config
        return cls(config, tower, language_model)

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

    def fuse(self, features: Features, instruction: Tensor | None = None) -> Visual:
        """Run the fusion strategy in its own dtype; `instruction` (B, E) for guided ones."""
        to = {"device": self.device, "dtype": self.fusion_dtype}
        given = None if instruction is None else instruction.to(**to)
        return self.fusion(features.to(**to), given)

    def get_image_features(
        self, pixel_values: Tensor, instruction: Tensor | None = None, **_: Any
    ) -> BaseModelOutputWithPooling:
        """The fused tokens (B, N', D) in `pooler_output`, where serving engines look for them."""
        return BaseModelOutputWithPooling(
            pooler_output=self.fuse(self.encode_images(pixel_values), instruction).tokens
        )

    def prompt_embedding(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """(rows, D): mean of the LLM's embeddings of the text before the first labelled token of
        each row, without image tokens and padding; zero where there is none."""
        prompt = input_ids != self.config.image_token_id
        if attention_mask is not None:
            if attention_mask.ndim != 2:
                raise ValueError("with a prepared attention mask, give `instruction` as well")
            prompt = prompt & attention_mask.bool()
        if labels is not None:
            prompt = prompt & ((labels != IGNORED).cumsum(dim=1) == 0)
        embeds = self.get_input_embeddings()(input_ids)
        total = (embeds * prompt[..., None]).sum(dim=1, dtype=torch.float32)
        return total / prompt.sum(dim=1, keepdim=True).clamp_min(1)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        features: Features | None = None,
        instruction: Tensor | None = None,
        visual: Visual | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> FusionOutput:
        """Next-token logits, and the loss if `labels` are given.

        input_ids (rows, T) with one image token per visual token; pixel_values (images, 3, h, w)
        or cached `features`, images in reading order; labels (rows, T), -100 where ignored.
        `instruction` (rows, E) guides the strategies that read one; by default those that read the
        prompt take `prompt_embedding`. `visual` is that of an earlier forward with the same images.
        In training mode with labels, logits exist only at labelled positions and are not returned.
        `num_items_in_batch`: number of labelled tokens over all accumulated batches, if known.
        """
        if features is None and pixel_values is not None and visual is None:
            features = self.encode_images(pixel_values)
        if features is not None:
            visual = self._visual(features, input_ids, instruction, attention_mask, labels)
        embeds, visual = self._embed(input_ids, inputs_embeds, visual, features is not None)
        targets = None if labels is None else F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        sparse = targets is not None and self.training
        if targets is not None and sparse:
            kwargs.setdefault("use_cache", False)
            logits_to_keep, targets = targets != IGNORED, targets[targets != IGNORED]
        elif isinstance(logits_to_keep, int) and logits_to_keep:
            # as indices: a slice is not contiguous, and on CPU a frozen head multiplies row by row
            length = embeds.shape[1]
            logits_to_keep = torch.arange(length, device=embeds.device)[-logits_to_keep:]
        kwargs |= {"attention_mask": attention_mask, "visual": visual}
        out = self.language_model(inputs_embeds=embeds, logits_to_keep=logits_to_keep, **kwargs)
        loss = None if targets is None else self._loss(out, targets, num_items_in_batch, visual)
        if sparse and visual is not None:
            visual = replace(visual, memory={}, seen=None)  # nothing is decoded after a loss
        return FusionOutput(
            loss=loss,
            logits=None if sparse else out.logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            visual=visual,
        )

    def _embed(
        self, input_ids: Tensor | None, given: Tensor | None, visual: Visual | None, fresh: bool
    ) -> tuple[Tensor, Visual | None]:
        """The LLM's input: text embeddings with the visual tokens written over image tokens.
        `fresh`: the batch has images of its own."""
        if given is None and input_ids is None:
            raise ValueError("give input_ids or inputs_embeds")
        embeds: Tensor = self.get_input_embeddings()(input_ids) if given is None else given
        unguided = self.fusion.reads != "nothing" and self.fusion.guidance == "uniform"
        if self.training and (unguided or not fresh):
            # what the batch does not use takes part with zero gradient, the same on every rank
            unused = [self.fusion] if fresh else [self.fusion, self.vision_tower]
            nothing = [p.sum() for part in unused for p in part.parameters() if p.requires_grad]
            if nothing:
                embeds = embeds + (torch.stack(nothing).sum() * 0).to(embeds.dtype)
        if visual is None or visual.mask is None or input_ids is None:
            return embeds, visual
        mask = input_ids == self.config.image_token_id  # longer than before without a cache
        most = 1 if visual.seen is None else visual.seen.shape[-1]
        visual = replace(visual, mask=mask, seen=seen_images(mask, visual.tokens.shape[1], most))
        tokens = visual.tokens.to(embeds.dtype)
        return embeds.masked_scatter(mask.unsqueeze(-1), tokens), visual

    def _visual(
        self, features: Features, input_ids: Tensor | None, instruction: Tensor | None, *text: Any
    ) -> Visual:
        """What the fusion makes of the images; `text`: attention mask and labels of the rows."""
        if input_ids is None:
            raise ValueError("give input_ids: the image tokens say where images belong")
        if instruction is None and self.fusion.reads == "prompt":
            instruction = self.prompt_embedding(input_ids, *text)
        mask = input_ids == self.config.image_token_id
        layers = len(self.config.vision_layers)
        each = self.fusion.num_tokens(self.fusion.config, features.grid, layers)
        layout = Layout.of(mask, len(features.patches[0]), each)
        if instruction is not None and len(instruction) != len(input_ids):
            raise ValueError(
                f"{len(instruction)} instructions for {len(input_ids)} rows: give one per row"
            )
        visual = self.fuse(features, None if instruction is None else instruction[layout.row])
        seen = seen_images(mask, each, layout.most)
        return self.fusion.by_row(replace(visual, mask=mask, seen=seen), layout)

    def _loss(
        self, out: Any, targets: Tensor, count: Tensor | int | None, visual: Visual | None
    ) -> Tensor:
        """Cross-entropy summed over the labelled tokens, divided by `count` or by their number,
        and in training the strategy's penalty, by the batch's share of the labelled tokens."""
        flat = targets.flatten()
        total = F.cross_entropy(
            out.logits.float().flatten(0, -2), flat, ignore_index=IGNORED, reduction="sum"
        )
        own = (flat != IGNORED).sum().clamp_min(1)
        loss = total / (count or own)
        penalty = self.fusion.penalty(visual) if self.training and visual is not None else None
        return loss if penalty is None else loss + penalty * own / (count or own)


def ask(model: Path, image: Path, question: str, max_new_tokens: int = 64) -> str:
    """The answer of the model in a folder to one question about one picture.

    Raises FileNotFoundError if the folder holds no model.
    """
    if not (model / "config.json").is_file():
        raise FileNotFoundError(f"no model in {model}")
    vlm: Any = FusionVLM.from_pretrained(model).eval()
    vlm.to(device())
    return vlm.ask(Processor.from_pretrained(model), image, question, max_new_tokens)


AutoConfig.register("layerfuse", FusionConfig, exist_ok=True)
AutoModelForImageTextToText.register(FusionConfig, FusionVLM, exist_ok=True)
AutoProcessor.register(FusionConfig, Processor, exist_ok=True)
