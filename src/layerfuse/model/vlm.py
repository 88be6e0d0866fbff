"""FusionVLM: encoder, fusion and LLM as one ordinary Hugging Face model."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    Cache,
    PreTrainedModel,
    modeling_utils,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.utils import GENERATION_CONFIG_NAME

from layerfuse.errors import LayerfuseError
from layerfuse.fusion import Fused, Guidance, Layout, Placed, attach
from layerfuse.model.answer_head import AnswerHead
from layerfuse.model.chat_template import IMAGE_TOKEN
from layerfuse.model.config import FusionConfig, configure, shapes
from layerfuse.model.generation import VisualGenerationMixin, read_generation_settings
from layerfuse.model.instruction import instruction_source
from layerfuse.model.loss import next_tokens, token_loss
from layerfuse.model.pretrained import (
    NameOrConfig,
    decoder_blocks,
    load_llm,
    load_tokenizer,
    text_config_of,
)
from layerfuse.model.processor import IGNORED, Processor
from layerfuse.vision.encoder import Encoder, load_tower, load_vision_config
from layerfuse.vision.features import Features
from layerfuse.vision.selection import LayerSpec

MASKS_POSITIONS = "slice_logits_to_keep" in vars(modeling_utils)
"""whether LLMs take a mask of the positions that get logits; older versions of transformers take
positions that are the same for all rows, and give more logits than are needed"""


@dataclass
class FusionOutput(CausalLMOutputWithPast):
    """The LLM's output, and `visual`: what the fusion gave, `notes` with weights among it."""

    visual: Placed | None = None


class FusionVLM(PreTrainedModel, VisualGenerationMixin):
    """A vision encoder, a fusion strategy and a decoder-only LLM.

    Attributes: `vision_tower` (Encoder), `fusion` (Fusion), `language_model` (a stock causal LM).

    Args:
        config: layers and options, resolved.
        vision_tower: the encoder; None makes one with random weights.
        language_model: the causal LM; None makes one with random weights.
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
    # What is loaded in few bits, or in float16, leaves the fusion as it was trained: it is small.
    _keep_in_fp32_modules = ["fusion"]  # noqa: RUF012 (transformers declares it so)

    def __init__(
        self,
        config: FusionConfig,
        vision_tower: Encoder | None = None,
        language_model: PreTrainedModel | None = None,
    ) -> None:
        # Any: transformers does not annotate its constructors
        parent: Any = super()
        parent.__init__(config)
        if vision_tower is None:
            grid = None
            if config.token_grid:
                grid = (config.token_grid[0], config.token_grid[1])
            vision_tower = Encoder.from_config(config.vision_config, config.taps, grid)
        if language_model is None:
            auto_model: Any = AutoModelForCausalLM
            language_model = auto_model.from_config(config.text_config)

        self.vision_tower = vision_tower
        strategy = config.strategy
        self.fusion = strategy.build(
            shapes(config.selection, config.vision_config, config.text_config)
        )
        self.instruction = instruction_source(strategy)
        self.image_tokens = config.image_tokens
        # Any: causal LMs share no type that says what they hold
        self.language_model: Any = language_model
        attach(self.fusion, decoder_blocks(self.language_model))
        if config.answer_tokens is not None:
            self.close_answers(config.answer_tokens)

        # the blocks that FSDP and device maps must keep whole
        unsplit: list[str] = []
        for part in (self.vision_tower.tower, self.language_model):
            unsplit.extend(part._no_split_modules or ())
        self._no_split_modules = unsplit
        self.post_init()
        # transformers skips what has no parameters of its own
        self.fusion.reset_parameters()
        # the LLM's own: its stop tokens, and the image token that is never an answer
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
        llm_blocks: int | None = None,
    ) -> "FusionVLM":
        """A new model from a pretrained encoder and LLM; the fusion is random and in float32.

        Args:
            encoder: hub id, folder or local-model name, or a config for random weights.
            llm: the same; with a config, give `image_token_id`.
            layers: the layers to take, in any form that `select` knows.
            fusion: the strategy in recipe form.
            token_grid: (rows, columns) to which patches are pooled; None: no pooling.
            image_token_id: id of the token that visual tokens replace; None looks it up.
            image_token: its text; None takes `<image>`, and adds it to the LLM where it is missing.
            dtype: the dtype of the encoder and the LLM.
            attn_implementation: the LLM's attention kernel; None is transformers' choice.
            llm_blocks: keep so many of the LLM's first blocks, with its final norm and head: a
                screening device for cheap studies. None keeps all.

        Raises:
            LayerfuseError: for anything that does not fit, before weights load.
        """
        if isinstance(encoder, Path):
            encoder = str(encoder)
        if isinstance(llm, Path):
            llm = str(llm)
        vision = load_vision_config(encoder)
        text = text_config_of(llm, blocks=llm_blocks)
        if image_token_id is None:
            if not isinstance(llm, str):
                raise LayerfuseError("`llm` is a config, so `image_token_id` must be given")
            tokenizer = load_tokenizer(llm, image_token)
            image_token_id = int(tokenizer.convert_tokens_to_ids(image_token or IMAGE_TOKEN))
        config = configure(
            vision,
            text,
            layers,
            fusion,
            token_grid=token_grid,
            image_token_id=image_token_id,
        )

        if isinstance(encoder, str):
            tower = Encoder(load_tower(encoder, vision, dtype), config.taps, token_grid)
        else:
            tower = Encoder.from_config(vision, config.taps, token_grid).to(dtype)
        language_model = load_llm(llm, dtype, attn_implementation, image_token_id, llm_blocks)
        # the LLM may have grown by the image token
        config.text_config = language_model.config
        return cls(config, tower, language_model)

    @classmethod
    def from_vlm(
        cls,
        model: PreTrainedModel | str | Path,
        layers: LayerSpec,
        fusion: dict[str, Any],
        *,
        dtype: torch.dtype = torch.float32,
    ) -> "FusionVLM":
        """A model that is exactly the given one, and reads more layers of its encoder.

        Args:
            model: transformers' LLaVA or LLaVA-NeXT (of which pictures are read once, at the
                encoder's own size), or a `FusionVLM` whose strategy folds; or the folder or hub id
                of one. The weights of its LLM are shared, not copied.
            layers: the layers to take, in any form that `select` knows.
            fusion: the strategy in recipe form. What it adds is zero at first.
            dtype: the dtype of the encoder and the LLM that are loaded.

        Returns:
            A model with the logits of the given one, until it is trained.

        Raises:
            LayerfuseError: if the strategy cannot begin so, or does not fit the given model.
        """
        # Here, because it takes apart models of this class too.
        from layerfuse.model.given_model import add_layers, load_given

        if isinstance(model, str | Path):
            model = load_given(str(model), dtype)
        return add_layers(model, layers, fusion)

    # Any: all that transformers takes and gives
    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **options: Any) -> Any:
        """As in transformers, with the settings of generation that were saved.

        Args:
            pretrained_model_name_or_path: the folder of a saved model, or a hub id.
            args: more of transformers' own arguments.
            options: more of transformers' own arguments.

        Raises:
            LayerfuseError: naming settings of generation that are damaged.
        """
        file = Path(str(pretrained_model_name_or_path)) / GENERATION_CONFIG_NAME
        # transformers would take others in their place: answers would not end where they end
        if file.is_file():
            read_generation_settings(file)
        # Any: transformers types what it loads for its own classes only
        parent: Any = super()
        return parent.from_pretrained(pretrained_model_name_or_path, *args, **options)

    def train(self, mode: bool = True) -> "FusionVLM":
        """Training mode for the parts that train; a part that is frozen stays in evaluation mode.

        The dropout or drop path of a frozen encoder would else give other features in training than
        in the test, and than those that are cached. An LLM with adapters trains.

        Args:
            mode: False is evaluation mode for all.
        """
        super().train(mode)
        for part in (self.vision_tower, self.fusion, self.language_model):
            if any(parameter.requires_grad for parameter in part.parameters()):
                continue
            part.eval()
            # Gradients pass through a frozen LLM too, and transformers recomputes activations only
            # in blocks that are in training mode themselves; dropout is in the modules inside.
            for module in part.modules():
                if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
                    module.training = mode
        return self

    def close_answers(self, tokens: Iterable[int]) -> None:
        """Let answers be made of these tokens alone: in training, in likelihoods, in generation.

        Args:
            tokens: ids, the ends of answers among them; saved with the model. The weights stay
                those of an ordinary LLM, and nothing else of it changes.
        """
        self.config.answer_tokens = sorted(tokens)
        head = AnswerHead(self.get_output_embeddings(), self.config.answer_tokens)
        self.language_model.set_output_embeddings(head)

    @property
    def answer_head(self) -> AnswerHead | None:
        """The LLM's head where answers are a closed set, else None."""
        head = self.get_output_embeddings()
        return head if isinstance(head, AnswerHead) else None

    if TYPE_CHECKING:
        # transformers types it for a class that no model is
        def generate(self, *args: Any, **options: Any) -> Any: ...

    def get_input_embeddings(self) -> Any:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.language_model.get_output_embeddings()

    # Any: all that transformers takes and gives
    def resize_token_embeddings(self, *args: Any, **options: Any) -> Any:
        """As in transformers, for the LLM's tables of inputs and outputs and all that knows their
        size.

        Args:
            args: transformers' own arguments.
            options: transformers' own arguments.
        """
        closed = self.answer_head
        if closed is not None:
            head: Any = nn.Linear(closed.in_features, closed.out_features, closed.bias is not None)
            head.weight = closed.weight
            head.bias = closed.bias
            self.language_model.set_output_embeddings(head)
        table = self.language_model.resize_token_embeddings(*args, **options)
        self.config.text_config = self.language_model.config
        if closed is not None:
            self.close_answers(closed.tokens)
        return table

    def get_decoder(self) -> nn.Module:
        return self.language_model.get_decoder()

    @property
    def embedding_std(self) -> float:
        """Standard deviation of the LLM's text embeddings, as the first block sees them."""
        # asked for by id and not read as weights: some families scale their embeddings
        table = self.get_input_embeddings()
        ids = torch.arange(self.config.text_config.vocab_size, device=self.device)
        with torch.no_grad():
            return float(table(ids).float().std())

    @property
    def fusion_dtype(self) -> torch.dtype:
        """The dtype of the fusion's weights, which may be wider than the LLM's."""
        return next(self.fusion.parameters()).dtype

    def encode_images(self, pixel_values: Tensor) -> Features:
        """The features of the selected layers, without gradient if the encoder is frozen.

        Args:
            pixel_values: (B, 3, height, width) preprocessed pixels.

        Raises:
            LayerfuseError: if there is no image, or there are tiles of images.
        """
        if len(pixel_values) == 0:
            raise LayerfuseError("pixel_values holds no image: leave it out where there is none")
        if pixel_values.ndim != 4:
            raise LayerfuseError(
                f"pixel_values is {list(pixel_values.shape)}; valid: (images, 3, height, width). "
                "Tiles, as the processor of LLaVA-NeXT makes them, are not read: use the model's "
                "own processor, which gives each image once"
            )
        return self.vision_tower(pixel_values)

    def fuse(
        self,
        features: Features,
        instruction: Tensor | None = None,
        guidance: Guidance = "instruction",
    ) -> Fused:
        """Run the fusion strategy on B images, in its own dtype.

        Args:
            features: the selected layers of the images.
            instruction: (B, E), for guided strategies.
            guidance: what weighs the layers of guided strategies.

        Raises:
            LayerfuseError: if the instruction is to guide and there is none.
        """
        # cached features wait on the CPU, often in half precision
        features = features.to(device=self.device, dtype=self.fusion_dtype)
        if instruction is not None:
            instruction = instruction.to(device=self.device, dtype=self.fusion_dtype)
        return self.fusion(features, instruction, guidance)

    def get_image_features(
        self, pixel_values: Tensor, instruction: Tensor | None = None, **_: Any
    ) -> BaseModelOutputWithPooling:
        """The fused tokens, where serving engines look for them.

        Args:
            pixel_values: (B, 3, height, width) preprocessed pixels.
            instruction: (B, E), for guided strategies.

        Returns:
            An output with (B, N', D) as `pooler_output`.
        """
        fused = self.fuse(self.encode_images(pixel_values), instruction)
        # Any: transformers declares a narrower class of tensors
        tokens: Any = fused.tokens
        return BaseModelOutputWithPooling(pooler_output=tokens)

    def prompt_embedding(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """What guides strategies that read the prompt.

        Args:
            input_ids: (rows, T)
            attention_mask: (rows, T), zero at padding.
            labels: (rows, T), -100 where ignored; None where all text is the prompt.

        Returns:
            (rows, D): mean of the LLM's embeddings of the text before the first labelled token of
            each row, without image tokens and padding; zero where there is none.

        Raises:
            LayerfuseError: if the attention mask is not (rows, T).
        """
        # (rows, T) booleans
        prompt = input_ids != self.config.image_token_id
        if attention_mask is not None:
            if attention_mask.ndim != 2:
                raise LayerfuseError("with a prepared attention mask, give `instruction` as well")
            prompt = prompt & attention_mask.bool()
        if labels is not None:
            # an answer never reaches the router, nor does what follows it
            labelled_so_far = (labels != IGNORED).cumsum(dim=1)
            prompt = prompt & (labelled_so_far == 0)
        # (rows, T, D) -> (rows, D); a sum over many tokens needs float32
        embeds = self.get_input_embeddings()(input_ids)
        total = (embeds * prompt[..., None]).sum(dim=1, dtype=torch.float32)
        tokens = prompt.sum(dim=1, keepdim=True).clamp_min(1)
        return total / tokens

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        features: Features | None = None,
        image_index: Tensor | None = None,
        instruction: Tensor | None = None,
        guidance: Guidance = "instruction",
        visual: Placed | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> FusionOutput:
        """Next-token logits, and the loss if `labels` are given.

        Args:
            input_ids: (rows, T), with one image token per visual token.
            attention_mask: (rows, T), zero at padding.
            pixel_values: (images, 3, height, width), images in reading order.
            features: the same images encoded before, instead of `pixel_values`.
            image_index: (images in the text), which of the images that are given each of them is;
                an image that several rows show is then encoded once. By default each is one.
            instruction: (rows, E), what guides a guided strategy. By default strategies that read
                the prompt take `prompt_embedding`.
            guidance: what weighs the layers of guided strategies: the instruction, nothing
                (`uniform`), or fixed weights.
            visual: that of an earlier forward with the same images. With a filled KV cache the
                tokens follow the prompt, and see all images of their row.
            labels: (rows, T), -100 where ignored.
            inputs_embeds: (rows, T, D) instead of `input_ids`, without images.
            past_key_values: the KV cache of the tokens before these.
            logits_to_keep: number of last positions, the positions, or a mask (rows, T) of those,
                that get logits; with a mask these are (positions, vocabulary).
            num_items_in_batch: number of labelled tokens over all accumulated batches, if known.
            kwargs: what the LLM's own forward takes.

        Returns:
            In training mode with labels, logits exist only at labelled positions and are not
            returned.

        Raises:
            LayerfuseError: if images do not fit the image tokens, or an instruction is missing.
        """
        if features is None and pixel_values is not None and visual is None:
            features = self.encode_images(pixel_values)
        if features is not None and image_index is not None:
            features = features.take(image_index)
        has_images = features is not None
        if features is not None:
            visual = self._fuse_and_place(
                features,
                input_ids,
                instruction=instruction,
                guidance=guidance,
                attention_mask=attention_mask,
                labels=labels,
            )
        elif visual is not None:
            visual = self._place_again(visual, input_ids, past_key_values)
        elif input_ids is not None:
            self._refuse_unseen_images(input_ids)
        embeds = self._embed(input_ids, inputs_embeds, visual)
        if self.training:
            embeds = self._with_unused_parts(embeds, has_images, guidance)

        return self._run_llm(
            embeds,
            visual,
            labels,
            guidance=guidance,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            logits_to_keep=logits_to_keep,
            num_items_in_batch=num_items_in_batch,
            **kwargs,
        )

    def _refuse_unseen_images(self, input_ids: Tensor) -> None:
        """Raise LayerfuseError for image tokens whose images nobody gave."""
        # One token is decoded, and never an image; a traced graph has no values to look at.
        if input_ids.shape[1] == 1 or torch.compiler.is_compiling() or input_ids.is_meta:
            return
        if bool((input_ids == self.config.image_token_id).any()):
            raise LayerfuseError(
                "the text holds image tokens, but neither pixel_values nor features nor visual "
                "were given: give the images, or leave their tokens out"
            )

    def _run_llm(
        self,
        embeds: Tensor,
        visual: Placed | None,
        labels: Tensor | None,
        *,
        guidance: Guidance,
        attention_mask: Tensor | None,
        logits_to_keep: int | Tensor,
        num_items_in_batch: Tensor | int | None,
        **kwargs: Any,
    ) -> FusionOutput:
        """The LLM on its input (rows, T, D), whose blocks get `visual`, and the loss."""
        targets = None
        if labels is not None:
            targets = next_tokens(labels)
        labelled_only = targets is not None and self.training
        if targets is not None and labelled_only:
            kwargs.setdefault("use_cache", False)
            # logits cost as much as some blocks: only where they are compared with a label
            logits_to_keep = targets != IGNORED
            targets = targets[logits_to_keep]
        elif isinstance(logits_to_keep, int) and logits_to_keep:
            logits_to_keep = _last_positions(logits_to_keep, embeds)
        positions = logits_to_keep
        own = None
        if isinstance(logits_to_keep, Tensor) and logits_to_keep.ndim == 2 and not MASKS_POSITIONS:
            # the positions that any row needs, of whose logits each row then keeps its own
            of_any_row = logits_to_keep.any(dim=0)
            positions = of_any_row.nonzero()[:, 0]
            own = logits_to_keep[:, of_any_row]
        outputs = self.language_model(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            logits_to_keep=positions,
            visual=visual,
            **kwargs,
        )
        if visual is not None and visual.memory and not visual.reached:
            raise LayerfuseError(
                f"the model of {self.config.text_config.model_type} does not pass on to its blocks "
                f"what it is called with, so that {self.config.fusion['name']} cannot reach them: "
                "take an external strategy; `layerfuse list fusions` says which are"
            )

        closed = self.answer_head
        logits = outputs.logits
        if own is not None:
            logits = logits[own]
        loss = None
        if targets is not None:
            if closed is not None:
                targets = closed.places(targets)
            penalty = self._penalty(visual, guidance)
            loss = token_loss(logits, targets, num_items_in_batch, penalty)
        if closed is not None and not labelled_only:
            logits = closed.widen(logits)
        if labelled_only:
            # those of chosen positions alone would be taken for those of all
            logits = None
            if visual is not None:
                visual = visual.without_memory()
        return FusionOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            visual=visual,
        )

    def _fuse_and_place(
        self,
        features: Features,
        input_ids: Tensor | None,
        *,
        instruction: Tensor | None,
        guidance: Guidance,
        attention_mask: Tensor | None,
        labels: Tensor | None,
    ) -> Placed:
        """Fuse the images and arrange them by rows of `input_ids`."""
        if input_ids is None:
            raise LayerfuseError("give input_ids: the image tokens say where images belong")
        if instruction is None and self.instruction.made_by_model:
            instruction = self.prompt_embedding(input_ids, attention_mask, labels)
        layout = Layout.of(
            input_ids == self.config.image_token_id,
            images=len(features.patches[0]),
            tokens_per_image=self.image_tokens.of_grid(features.grid),
        )
        if instruction is not None:
            if len(instruction) != len(input_ids):
                raise LayerfuseError(
                    f"{len(instruction)} instructions for {len(input_ids)} rows: give one per row"
                )
            # Every image is guided by the instruction of its row: (rows, E) -> (B, E).
            instruction = instruction[layout.row]
        fused = self.fuse(features, instruction, guidance)
        return self.fusion.place(fused, layout)

    def _place_again(
        self, visual: Placed, input_ids: Tensor | None, past_key_values: Any
    ) -> Placed:
        """The images of an earlier forward for these tokens: the tokens that follow the prompt, or,
        without a KV cache, the prompt with what was decoded so far."""
        if visual.mask is None:
            # it is arranged for the tokens that follow the prompt already
            return visual
        # Any of `past_key_values`: transformers' caches and those of others
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            return visual.decoding()
        if input_ids is None:
            return visual
        tokens = visual.fused.tokens
        layout = Layout.of(
            input_ids == self.config.image_token_id,
            images=len(tokens),
            tokens_per_image=tokens.shape[1],
        )
        return self.fusion.place(visual.fused, layout)

    def _embed(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, visual: Placed | None
    ) -> Tensor:
        """(rows, T, D), the LLM's input: visual tokens are written over image tokens."""
        if inputs_embeds is not None:
            embeds = inputs_embeds
        elif input_ids is not None:
            embeds = self.get_input_embeddings()(input_ids)
        else:
            raise LayerfuseError("give input_ids or inputs_embeds")
        if visual is None or visual.mask is None or input_ids is None:
            return embeds
        # images are in reading order, as are the places that the mask names
        tokens = visual.tokens.to(embeds.dtype)
        return embeds.masked_scatter(visual.mask.unsqueeze(-1), tokens)

    def _with_unused_parts(self, embeds: Tensor, has_images: bool, guidance: Guidance) -> Tensor:
        """The same values, with zero gradient to what trains but this batch does not use.

        Processes that train together wait for each other's gradients: all must have the same.
        """
        unused: list[nn.Module] = []
        if not has_images:
            unused = [self.fusion, self.vision_tower]
        elif self.instruction.guided and guidance == "uniform":
            # what allocates weights got no instruction
            unused = [self.fusion]
        sums: list[Tensor] = []
        for part in unused:
            for parameter in part.parameters():
                if parameter.requires_grad:
                    sums.append(parameter.sum())
        if not sums:
            return embeds
        zero = torch.stack(sums).sum() * 0
        return embeds + zero.to(embeds.dtype)

    def _penalty(self, visual: Placed | None, guidance: Guidance) -> Tensor | None:
        """The strategy's term of the loss, in training and where an instruction guides."""
        if not self.training or visual is None or guidance != "instruction":
            return None
        return self.fusion.penalty(visual.fused)


def _last_positions(count: int, embeds: Tensor) -> Tensor:
    """(count,) indices of the last positions of (rows, T, D) embeddings.

    As indices: a slice is not contiguous, and on CPU a frozen head multiplies row by row.
    """
    positions = torch.arange(embeds.shape[1], device=embeds.device)
    return positions[-count:]


# Any: transformers does not annotate its automatic classes
_auto_config: Any = AutoConfig
_auto_model: Any = AutoModelForImageTextToText
_auto_processor: Any = AutoProcessor
_auto_config.register("layerfuse", FusionConfig, exist_ok=True)
_auto_model.register(FusionConfig, FusionVLM, exist_ok=True)
_auto_processor.register(FusionConfig, Processor, exist_ok=True)
