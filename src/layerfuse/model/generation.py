"""Generation with images: they are encoded and fused once, and carried from step to step."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, GenerationMixin, StoppingCriteriaList

from layerfuse.errors import LayerfuseError
from layerfuse.fusion import Fused, Guidance, Layout, Placed
from layerfuse.model.instruction import InstructionSource
from layerfuse.vision.features import Features


def read_generation_settings(file: Path) -> GenerationConfig:
    """The settings of generation that are saved with a model.

    Args:
        file: its generation_config.json.

    Raises:
        LayerfuseError: naming the file, if it is damaged.
    """
    # Any: transformers' GenerationConfig declares no types
    settings_class: Any = GenerationConfig
    try:
        return settings_class.from_dict(json.loads(file.read_text("utf-8")))
    # files that are cut off, or hold something else
    except (OSError, AttributeError, TypeError, ValueError) as error:
        raise LayerfuseError(
            f"cannot read {file}, which says where answers end: {error}. Copy the model's folder "
            "again"
        ) from error


# transformers looks for "GenerationMixin" in the names of a model's bases to know that it generates
class VisualGenerationMixin(GenerationMixin):
    """The steps of transformers' generation that must know of images.

    A model that derives from it has what is declared here.
    """

    # Any: a FusionConfig; transformers declares its own config class on every model
    config: Any
    fusion: Any
    instruction: InstructionSource

    def encode_images(self, pixel_values: Tensor) -> Features:
        """(B, 3, height, width) -> features of the selected layers."""
        raise NotImplementedError

    def fuse(
        self,
        features: Features,
        instruction: Tensor | None = None,
        guidance: Guidance = "instruction",
    ) -> Fused:
        """features of B images, (B, E) -> what the strategy makes of them."""
        raise NotImplementedError

    def prompt_embedding(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """(rows, T) -> (rows, D), what guides strategies that read the prompt."""
        raise NotImplementedError

    # Any: tokenizers of transformers share no type that says what they have
    _stop_tokenizer: Any = None
    """the model's own tokenizer, once an end of several tokens has needed it"""

    # Any: as above; transformers types what generates as a protocol
    def _get_stopping_criteria(
        self,
        generation_config: GenerationConfig,
        stopping_criteria: StoppingCriteriaList | None,
        tokenizer: Any = None,
    ) -> StoppingCriteriaList:
        """Ends of several tokens are compared as text, which takes a tokenizer: the model's own,
        where nobody gives one, as in pipelines."""
        # Any: transformers' GenerationConfig declares no types
        settings: Any = generation_config
        if settings.stop_strings and tokenizer is None:
            if self._stop_tokenizer is None:
                self._stop_tokenizer = self._tokenizer_of_folder(settings.stop_strings)
            tokenizer = self._stop_tokenizer
        parent: Any = super()
        return parent._get_stopping_criteria(generation_config, stopping_criteria, tokenizer)

    def _tokenizer_of_folder(self, ends: Any) -> Any:
        """The tokenizer that is saved beside the model.

        Raises:
            LayerfuseError: there is none.
        """
        # Any: transformers declares it on models, not on what generates
        model: Any = self
        place: str = model.name_or_path
        auto: Any = AutoTokenizer
        advice = f"answers end at {ends}: pass `tokenizer=processor.tokenizer` to `generate`"
        if not place:
            raise LayerfuseError(advice)
        try:
            # With the config that is there: transformers would read it again, and ask on the
            # terminal whether it may where the model brings its own code.
            return auto.from_pretrained(place, config=model.config)
        except (OSError, ValueError) as error:
            raise LayerfuseError(f"{advice}, as {place} holds no tokenizer ({error})") from error

    def _prefill(
        self,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> Any:
        """The prompt in one piece: images are placed by the positions of all their tokens."""
        # Any: transformers' GenerationConfig declares no types
        settings: Any = generation_config
        if settings.prefill_chunk_size is not None and model_kwargs.get("features") is not None:
            raise LayerfuseError(
                "prefill_chunk_size cuts the tokens of a picture apart: leave it out where there "
                "are pictures"
            )
        # Any: transformers types `self` as a protocol that no model fulfils
        parent: Any = super()
        return parent._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)

    # transformers passes what it prepares by name, so arguments that are not read stay in kwargs
    def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_ids: Tensor, is_first_iteration: bool | None = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Images go in at prefill. Later steps get the prompt's `visual`: without a KV cache to
        write its tokens again, with one only if the strategy attends to its memory."""
        visual: Placed | None = kwargs.get("visual")
        cache = kwargs.get("past_key_values")
        # Also where a model writes candidates for another one: its first step is not called so.
        begins = visual is None and kwargs.get("features") is not None
        if begins and cache is not None:
            self._take_new_images(input_ids, cache.get_seq_length(), kwargs)
        if not is_first_iteration and not begins:
            for name in ("pixel_values", "features", "instruction"):
                kwargs.pop(name, None)
            if visual is not None and kwargs.get("use_cache", True):
                # the cache carries what was written over the image tokens
                kwargs["visual"] = None
                if self.fusion.attends:
                    kwargs["visual"] = visual.decoding()
        # Any: transformers types `self` as a protocol that no model fulfils
        parent: Any = super()
        return parent.prepare_inputs_for_generation(
            input_ids,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

    def _take_new_images(self, input_ids: Tensor, cached: int, kwargs: dict[str, Any]) -> None:
        """Where a chat goes on with the cache of its beginning: the images that the cache does not
        hold yet, or for strategies that attend to images, all of them.

        Args:
            input_ids: (rows, T), the whole chat.
            cached: number of its first tokens that the cache holds.
            kwargs: of the forward, in place.

        Raises:
            LayerfuseError: if a strategy that attends would need old and new images at once.
        """
        is_image = input_ids == self.config.image_token_id
        if cached == 0 or not is_image[:, :cached].any():
            return
        features: Features = kwargs.pop("features")
        layout = Layout.of(
            is_image,
            images=len(features.patches[0]),
            tokens_per_image=self.config.image_tokens.of_grid(features.grid),
        )
        new = is_image[:, cached:].any()
        if self.fusion.attends:
            if new:
                raise LayerfuseError(
                    f"a chat with new pictures cannot go on from a KV cache with "
                    f"{type(self.fusion).__name__}, whose blocks look at all pictures of a row: "
                    "leave `past_key_values` out"
                )
            instruction: Tensor | None = kwargs.pop("instruction", None)
            if instruction is not None:
                # Every image is guided by the instruction of its row: (rows, E) -> (images, E).
                instruction = instruction[layout.row]
            fused = self.fuse(features, instruction, kwargs.get("guidance", "instruction"))
            kwargs["visual"] = self.fusion.place(fused, layout).decoding()
            return
        if not new:
            # the cache carries what they changed
            return
        # (images,): how many image tokens of its row the cache holds, against its place there
        held = is_image[:, :cached].sum(dim=1) // layout.tokens_per_image
        kwargs["features"] = features.take(layout.place >= held[layout.row])

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Carry the images of the prompt to the next step, which would not see them without error.

        What a step with a cache gives is already arranged for decoding, so the first is kept.
        """
        if model_kwargs.get("visual") is None and outputs.visual is not None:
            model_kwargs["visual"] = outputs.visual
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)

    # transformers declares a narrower class of tensors
    def _expand_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Encode the images, once for all beams, and repeat rows with all their images. This is the
        last place where `input_ids` is the prompt and nothing else, which a router reads."""
        features: Features | None = kwargs.pop("features", None)
        pixel_values: Tensor | None = kwargs.pop("pixel_values", None)
        if features is None and pixel_values is not None:
            features = self.encode_images(pixel_values)
        # One for each place from now on: places of a beam are places of their own.
        image_index: Tensor | None = kwargs.pop("image_index", None)
        if features is not None and image_index is not None:
            features = features.take(image_index)
        if features is not None and input_ids is not None:
            if kwargs.get("instruction") is None and self.instruction.made_by_model:
                attention_mask = kwargs.get("attention_mask")
                kwargs["instruction"] = self.prompt_embedding(input_ids, attention_mask)
            if expand_size > 1:
                images = len(features.patches[0])
                order = self._repeated_images(input_ids, images, expand_size)
                features = features.take(order)
        # Any: transformers annotates no types there. It repeats every tensor row by row, which
        # would be wrong for images: they are taken out before and put back after.
        parent: Any = super()
        expanded_ids, kwargs = parent._expand_inputs_for_generation(
            expand_size,
            is_encoder_decoder,
            input_ids,
            **kwargs,
        )
        if features is not None:
            kwargs["features"] = features
        return expanded_ids, kwargs

    def _repeated_images(self, input_ids: Tensor, images: int, expand_size: int) -> Tensor:
        """Indices of the images of every row, once for each of its beams: (images · beams,)."""
        tokens_by_row = (input_ids == self.config.image_token_id).sum(dim=1)
        if not tokens_by_row.any():
            raise LayerfuseError(f"0 image tokens in the text, but {images} images")
        tokens_per_image = tokens_by_row.sum() // images
        images_by_row = tokens_by_row // tokens_per_image

        # Any: torch does not type lists of a tensor's values
        counts: Any = images_by_row
        order: list[int] = []
        first = 0
        for count in counts.tolist():
            # a beam is a row of its own, with all images of the row that it continues
            images_of_row = range(first, first + count)
            for _ in range(expand_size):
                order.extend(images_of_row)
            first += count
        return torch.tensor(order, dtype=torch.long, device=input_ids.device)
