"""Generation: what is computed from the images once, and what later steps are given."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from layerfuse.fusion import Visual
from layerfuse.processor import Processor


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
