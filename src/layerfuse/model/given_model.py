"""A multimodal LLM that somebody trained, taken apart: its encoder, its LLM and its projector."""

import struct
import zipfile
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)

from layerfuse.errors import LayerfuseError
from layerfuse.fusion import detach
from layerfuse.fusion.fixed_mix import flat_projector
from layerfuse.fusion.flat_projector import FlatProjector
from layerfuse.local_models.configuration import REFUSALS, read_config
from layerfuse.model.config import FusionConfig, configure
from layerfuse.model.vlm import FusionVLM
from layerfuse.vision.encoder import Encoder, refuse_other_shapes, vision_config_of
from layerfuse.vision.selection import LayerSpec, resolve_layer
from layerfuse.vision.towers import family_of

StockLlava = LlavaForConditionalGeneration | LlavaNextForConditionalGeneration
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
"""files of a whole model, in the order in which they are looked for"""
UNREADABLE = (
    OSError,
    EOFError,
    LookupError,
    MemoryError,
    SafetensorError,
    UnpicklingError,
    struct.error,
    *REFUSALS,
)
"""what safetensors, torch and transformers raise for files of weights that are damaged"""


@dataclass(frozen=True)
class GivenModel:
    """The parts of a multimodal LLM."""

    vision_config: PreTrainedConfig
    """of the encoder at the depth that the model has"""
    tower: PreTrainedModel
    """the encoder; a copy"""
    language_model: PreTrainedModel
    """a causal LM of its own, which shares the given model's weights"""
    projector: FlatProjector
    image_token_id: int
    token_grid: tuple[int, int] | None = None
    """(rows, columns) to which it pools patches"""
    answer_tokens: list[int] | None = None
    """the tokens that its answers are made of, where they are a closed set"""


def take_apart(model: PreTrainedModel) -> GivenModel:
    """The parts of a trained multimodal LLM.

    Args:
        model: transformers' LLaVA or LLaVA-NeXT, or a `FusionVLM` whose strategy folds.

    Raises:
        LayerfuseError: for other models, and parts that layerfuse does not know; with the reason.
    """
    parts = _parts_of(model)
    # Any: LLMs share no type that says what their embeddings are
    embeddings: Any = parts.language_model.get_input_embeddings()
    rows = len(embeddings.weight)
    if not 0 <= parts.image_token_id < rows:
        raise LayerfuseError(
            f"the image token of the given model (image_token_index) is {parts.image_token_id}, "
            f"and its LLM has {rows:,} rows of embeddings: valid are 0 to {rows - 1}. Set the one "
            "that it was trained with"
        )
    return parts


def _parts_of(model: PreTrainedModel) -> GivenModel:
    """The parts of a model, whose image token need not be in its vocabulary.

    Raises:
        LayerfuseError: for other models, and parts that layerfuse does not know.
    """
    if isinstance(model, FusionVLM):
        language_model = _twin(model.language_model)
        # what is loaded from a folder is the whole model's, and not the LLM's
        language_model.generation_config = deepcopy(model.generation_config)
        return GivenModel(
            _depth_of_tower(model),
            deepcopy(model.vision_tower.tower),
            language_model,
            flat_projector(model.fusion),
            model.config.image_token_id,
            model.vision_tower.token_grid,
            model.config.answer_tokens,
        )
    if isinstance(model, StockLlava):
        return _stock_parts(model)
    raise LayerfuseError(
        f"cannot add layers to a {type(model).__name__}; valid are LlavaForConditionalGeneration, "
        "LlavaNextForConditionalGeneration and layerfuse's own models"
    )


def _depth_of_tower(model: FusionVLM) -> PreTrainedConfig:
    """The config of a saved encoder, of which the blocks above the deepest layer are gone."""
    trimmed = deepcopy(model.config.vision_config)
    trimmed.num_hidden_layers = model.vision_tower.layers[-1]
    return trimmed


def _twin(language_model: PreTrainedModel) -> PreTrainedModel:
    """An LLM that shares the weights of another, and nothing that a strategy attached to it."""
    # what is in the memo is not copied
    shared: dict[int, Any] = {}
    for tensor in (*language_model.parameters(), *language_model.buffers()):
        shared[id(tensor)] = tensor
    twin = deepcopy(language_model, shared)
    detach(twin)
    return twin


# Any: transformers declares what is inside of its models by no class that says it
def _stock_parts(model: Any) -> GivenModel:
    """The parts of transformers' LLaVA or LLaVA-NeXT.

    Raises:
        LayerfuseError: for an encoder that layerfuse does not know, or patch tokens other than all
            of them and nothing else.
    """
    config = model.config
    vision_config = vision_config_of(config.vision_config)
    _check_select_strategy(config, vision_config)
    return GivenModel(
        deepcopy(vision_config),
        deepcopy(model.model.vision_tower),
        _twin(_causal_lm(model)),
        _stock_projector(model, vision_config.num_hidden_layers),
        config.image_token_index,
    )


def _check_select_strategy(config: Any, vision_config: PreTrainedConfig) -> None:
    """Raise LayerfuseError if the model looks at more or less than all patch tokens."""
    prefix = family_of(vision_config).prefix(vision_config)
    dropped = 1 if config.vision_feature_select_strategy == "default" else 0
    if dropped != prefix:
        raise LayerfuseError(
            f"vision_feature_select_strategy {config.vision_feature_select_strategy!r} of the "
            f"given model drops {dropped} tokens, and its encoder ({vision_config.model_type}) has "
            f"{prefix} in front of the patches: layerfuse gives the patches, and nothing else"
        )


def _causal_lm(model: Any) -> PreTrainedModel:
    """The LLM of transformers' LLaVA with its head, as the class that it has alone.

    Raises:
        LayerfuseError: if that class has weights that LLaVA lacks.
    """
    # Any: transformers does not annotate what its automatic classes make
    auto_model: Any = AutoModelForCausalLM
    text_config = deepcopy(model.config.text_config)
    # only LLaVA's own config says whether its head is that of the embeddings
    text_config.tie_word_embeddings = model.config.tie_word_embeddings
    with torch.device("meta"):
        language_model: Any = auto_model.from_config(text_config)
    # transformers' own name for the part of a causal LM below its head
    setattr(language_model, language_model.base_model_prefix, model.model.language_model)
    language_model.set_output_embeddings(model.lm_head)
    missing = [name for name, value in language_model.named_parameters() if value.is_meta]
    if missing:
        raise LayerfuseError(
            f"the LLM of the given model lacks {', '.join(missing)}, which a "
            f"{type(language_model).__name__} has"
        )
    settings = deepcopy(model.generation_config)
    # as `load_llm` does: the image token is never an answer
    suppressed: set[int] = {*(settings.suppress_tokens or []), model.config.image_token_index}
    settings.suppress_tokens = sorted(suppressed)
    language_model.generation_config = settings
    return language_model


def _stock_projector(model: Any, depth: int) -> FlatProjector:
    """The projector of transformers' LLaVA, with every layer once and ascending.

    Raises:
        LayerfuseError: for an activation that layerfuse's projector has not.
    """
    config = model.config
    activation = config.projector_hidden_act
    if activation not in ("gelu", "linear"):
        raise LayerfuseError(
            f"projector_hidden_act {activation!r} of the given model is none of layerfuse's "
            "projector; valid: gelu, linear"
        )
    written: Any = config.vision_feature_layer
    if isinstance(written, int):
        written = [written]
    layers = [resolve_layer(layer, depth) for layer in written]

    projector = model.model.multi_modal_projector
    first: Tensor = projector.linear_1.weight.detach()
    width = first.shape[1] // len(layers)
    columns: dict[int, Tensor] = {}
    for place, layer in enumerate(layers):
        reading = first[:, place * width : (place + 1) * width]
        # a layer that is listed twice is read by the sum of both
        columns[layer] = columns[layer] + reading if layer in columns else reading
    ascending = tuple(sorted(columns))
    zeros = first.new_zeros(len(first))
    bias_1 = zeros if projector.linear_1.bias is None else projector.linear_1.bias.detach()
    bias_2 = zeros if projector.linear_2.bias is None else projector.linear_2.bias.detach()
    return FlatProjector(
        ascending,
        torch.cat([columns[layer] for layer in ascending], dim=1),
        bias_1,
        activation,
        projector.linear_2.weight.detach(),
        bias_2,
    )


GIVEN_CLASSES: dict[str, type[PreTrainedModel]] = {
    "llava": LlavaForConditionalGeneration,
    "llava_next": LlavaNextForConditionalGeneration,
    FusionConfig.model_type: FusionVLM,
}
"""classes of the models that layers can be added to, by `model_type`"""


def load_given(name: str, dtype: torch.dtype | Literal["auto"]) -> PreTrainedModel:
    """Load the model to which layers are to be added.

    Args:
        name: hub id or folder.
        dtype: the dtype of its weights; `auto` is that in which they are stored.

    Raises:
        LayerfuseError: if it cannot be found, is of another type, lacks weights, has some of other
            shapes than its configuration describes, or one in two files.
    """
    config = read_config(name, "multimodal model")
    # Any: transformers types what it loads for its own classes only
    model_class: Any = GIVEN_CLASSES.get(config.model_type)
    if model_class is None:
        raise LayerfuseError(
            f"cannot add layers to {name}: its type is {config.model_type!r}; valid: "
            f"{', '.join(GIVEN_CLASSES)}"
        )
    refuse_overlaps(Path(name))
    try:
        model, report = model_class.from_pretrained(
            name,
            dtype=dtype,
            output_loading_info=True,
            # they are refused below, where they can be named
            ignore_mismatched_sizes=True,
        )
    except UNREADABLE as error:
        raise LayerfuseError(f"cannot read the model {name}: {error}") from error
    refuse_other_shapes(name, config.model_type, report)
    # Older versions saved what is computed.
    computed = ("rotary_emb.inv_freq", "position_ids")
    strange = [name for name in sorted(report["unexpected_keys"]) if not name.endswith(computed)]
    if strange:
        raise LayerfuseError(
            f"{name} holds {len(strange)} weights that a {config.model_type} has not, such as "
            f"{strange[0]}"
        )
    # transformers makes up what a checkpoint lacks, and only says so
    missing = sorted(report["missing_keys"])
    if missing:
        raise LayerfuseError(
            f"{name} holds no whole model: {len(missing)} weights are missing, such as {missing[0]}"
        )
    return model.eval()


def refuse_overlaps(folder: Path) -> None:
    """Refuse files of weights of which two hold the same tensor: transformers would take one.

    Args:
        folder: of a model of transformers. One that is not there holds none.

    Raises:
        LayerfuseError: two do, or one of several cannot be read; naming them.
    """
    for pattern in WEIGHTS:
        files = sorted(folder.glob(pattern))
        if not files:
            continue
        holds: dict[str, Path] = {}
        # one file alone is left to the loader
        for file in files if len(files) > 1 else []:
            for name in _names_in(file):
                if name in holds:
                    raise overlap(holds[name], file, name)
                holds[name] = file
        # those of the other format are not read beside these
        return


def overlap(first: Path, second: Path, name: str) -> LayerfuseError:
    """The error for a tensor that two files hold.

    Args:
        first: one of them.
        second: the other.
        name: of the tensor.
    """
    return LayerfuseError(
        f"{first.name} and {second.name} both hold {name!r}: the shards overlap, perhaps those of "
        f"two models in one folder. Leave those of one model in {second.parent}"
    )


def _names_in(file: Path) -> list[str]:
    """The names of the tensors of a file; never is code of it run.

    Raises:
        LayerfuseError: it cannot be read.
    """
    # Any: safetensors does not annotate what it opens
    open_tensors: Any = safe_open
    try:
        if file.suffix == ".safetensors":
            with open_tensors(file, framework="pt") as opened:
                return [*opened.keys()]
        return [*map(str, load_pytorch(file))]
    except UNREADABLE as error:
        raise LayerfuseError(
            f"cannot read the model in {file.parent}: is {file.name} cut off? {error}"
        ) from error


# Any: whatever was saved
def load_pytorch(file: Path) -> Any:
    """The content of a file of PyTorch; never is code of it run.

    Args:
        file: an archive, or a file of an old version, which is none.

    Raises:
        Exception: one of `UNREADABLE`; it is damaged, or holds more than tensors.
    """
    # Files of old versions of PyTorch cannot be mapped into memory.
    mapped = zipfile.is_zipfile(file)
    return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)


def add_layers(model: PreTrainedModel, layers: LayerSpec, fusion: dict[str, Any]) -> FusionVLM:
    """A model that is exactly the given one, and reads more layers of its encoder.

    Args:
        model: transformers' LLaVA or LLaVA-NeXT, or a `FusionVLM` whose strategy folds. The
            weights of its LLM are shared, not copied.
        layers: the layers to take, in any form that `select` knows.
        fusion: the strategy in recipe form. What it adds is zero, or behind a closed gate.

    Returns:
        A model with the logits of the given one, until it is trained. The fusion is in float32.

    Raises:
        LayerfuseError: if the strategy cannot begin so, or does not fit the given model.
    """
    given = take_apart(model)
    config = configure(
        given.vision_config,
        # a copy: a new composite config resets the attention kernels of those inside
        deepcopy(given.language_model.config),
        layers,
        fusion,
        token_grid=given.token_grid,
        image_token_id=given.image_token_id,
    )
    config.text_config = given.language_model.config
    config.answer_tokens = given.answer_tokens
    encoder = Encoder(given.tower, config.taps, given.token_grid)
    composed = FusionVLM(config, encoder, given.language_model)
    composed.fusion.to(given.language_model.device)
    composed.fusion.begin_as(given.projector)
    return composed.eval()
