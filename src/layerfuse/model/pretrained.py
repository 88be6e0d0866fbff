"""Loading pretrained parts by hub id, folder or local-model name."""

from collections.abc import Generator
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any, get_args

import torch
from PIL import Image
from safetensors import SafetensorError
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaImageProcessorPil,
    PreTrainedConfig,
    PreTrainedModel,
    Siglip2ImageProcessorPil,
    SiglipImageProcessorPil,
)
from transformers.image_processing_backends import PilBackend

# From its module: as a name of transformers itself it wants torchvision in 5.16.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import logging

from layerfuse.errors import LayerfuseError
from layerfuse.local_models.configuration import check_build, check_sizes, read_config
from layerfuse.local_models.registry import resolve
from layerfuse.model.chat_template import IMAGE_TOKEN
from layerfuse.model.config import FusionConfig
from layerfuse.model.first_blocks import cut_config
from layerfuse.model.processor import Processor
from layerfuse.vision.aspect_ratio import ImageAspectRatio
from layerfuse.vision.encoder import refuse_other_shapes
from layerfuse.vision.towers import patch_side

NameOrConfig = str | PreTrainedConfig
"""hub id, local folder, local-model name, or a config (random weights)"""

WIDE = (96, 48)
TALL = (48, 160)
"""(width, height) of the blank pictures that an image processor is tried with; their sides are in
different ratios, so that nothing but one output size makes them alike"""


def text_config_of(
    llm: NameOrConfig,
    settings: dict[str, Any] | None = None,
    blocks: int | None = None,
) -> PreTrainedConfig:
    """The configuration of an LLM.

    Args:
        llm: hub id, folder, local-model name, or the configuration itself.
        settings: the configuration that a recipe spells out; None reads that of `llm`.
        blocks: keep so many of its first blocks; None keeps all.

    Raises:
        LayerfuseError: if it cannot be found, is more than a language model, describes none that
            can be built, or cannot be cut to so many blocks.
    """
    config = _whole_text_config(llm, settings)
    if blocks is None:
        return config
    name = llm if isinstance(llm, str) else llm.model_type
    return cut_config(name, config, blocks)


def _whole_text_config(
    llm: NameOrConfig,
    settings: dict[str, Any] | None = None,
) -> PreTrainedConfig:
    """As `text_config_of`, with all blocks."""
    if isinstance(llm, str):
        name = llm
        config = read_config(llm, "LLM", settings)
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
    if not isinstance(llm, str):
        return config
    check_sizes(name, "LLM", config)
    # state-space models such as mamba pass nothing on to their blocks, where fusion attaches
    if config.to_dict().get("num_attention_heads") is None:
        raise LayerfuseError(
            f"{name} has no attention heads (its type is {config.model_type}): give an LLM of "
            "attention blocks, such as llama, qwen, mistral, gemma, phi or smollm"
        )
    if settings is not None:
        # A checkpoint was built once; what stands in a recipe may never have been.
        check_build(name, "LLM", config, AutoModelForCausalLM)
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
    blocks: int | None = None,
) -> PreTrainedModel:
    """A causal LM that knows the image token and never answers with it.

    Args:
        llm: hub id, folder or local-model name for pretrained weights, a config for random ones.
        dtype: the dtype of the weights.
        attn_implementation: the attention kernel by transformers' name; None is its own choice.
        image_token_id: the image token. If it is new, its row in the tables of embeddings is the
            mean of the others, so that it is never the likeliest next one.
        blocks: load so many of its first blocks, with its final norm and head; None loads all.

    Raises:
        LayerfuseError: if the LLM cannot be found, lacks weights, has some of other shapes than
            its configuration describes, or cannot be cut.
    """
    options: dict[str, Any] = {"dtype": dtype}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    # the weights of other blocks are never read
    shorter = None
    if blocks is not None:
        shorter = text_config_of(llm, blocks=blocks)
    # Any: transformers does not annotate what its automatic classes make
    auto_model: Any = AutoModelForCausalLM
    if isinstance(llm, str):
        if shorter is not None:
            options["config"] = shorter
        try:
            with _unused_weights_unsaid(shorter is not None):
                model, report = auto_model.from_pretrained(
                    resolve(llm),
                    output_loading_info=True,
                    # they are refused below, where they can be named
                    ignore_mismatched_sizes=True,
                    **options,
                )
        except (OSError, RuntimeError, SafetensorError, UnpicklingError) as error:
            raise LayerfuseError(f"cannot read the LLM {llm}: {error}") from error
        refuse_other_shapes(llm, model.config.model_type, report)
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
        model = auto_model.from_config(shorter or llm, **options)
    add_image_token(model, image_token_id)
    return model


# Any: causal LMs share no type that says what they hold
def add_image_token(model: Any, image_token_id: int) -> None:
    """Let a causal LM know the image token, and never answer with it.

    Args:
        model: a causal LM of transformers.
        image_token_id: the image token. If it is new, its row in the tables of embeddings is the
            mean of the others, so that it is never the likeliest next one.
    """
    model.generation_config.suppress_tokens = [image_token_id]
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if image_token_id < vocabulary:
        return
    # transformers would draw the new rows at random around the mean
    model.resize_token_embeddings(image_token_id + 1, mean_resizing=False)
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        rows: Tensor = table.weight.data
        # a mean over so many rows needs float32
        mean = rows[:vocabulary].float().mean(dim=0)
        rows[vocabulary:] = mean.to(rows.dtype)


@contextmanager
def _unused_weights_unsaid(unsaid: bool) -> Generator[None]:
    """Keep transformers from listing what it does not load of a checkpoint.

    Args:
        unsaid: whether that is known and wanted.
    """
    before = logging.get_verbosity()
    if unsaid:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def compose_processor(
    encoder: str,
    llm: str,
    config: FusionConfig,
    *,
    chat_template: str | None,
    image_token: str | None,
    image_aspect_ratio: ImageAspectRatio | None = None,
) -> Processor:
    """The processor that belongs to a model composed from the same encoder and LLM.

    Args:
        encoder: hub id, folder or local-model name.
        llm: the same, of the LLM.
        config: the composed model's config.
        chat_template: a Jinja template of `messages`; None takes the tokenizer's own.
        image_token: a token of the LLM that marks images; None takes `<image>`.
        image_aspect_ratio: as for `load_image_processor`.

    Raises:
        LayerfuseError: as `Processor` and `load_image_processor`, and if a tokenizer cannot be
            found.
    """
    return Processor(
        load_image_processor(encoder, image_aspect_ratio),
        load_tokenizer(llm, image_token),
        patch_size=patch_side(config.vision_config),
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
    except (OSError, ValueError, ImportError) as error:
        raise LayerfuseError(
            f"cannot read the tokenizer of {name}: {error}. One that is saved as tokenizer.model "
            "alone needs `pip install 'layerfuse[released]'`"
        ) from error
    if image_token is None and IMAGE_TOKEN not in tokenizer.get_vocab():
        # special: it is never split, and left out of decoded text
        added = AddedToken(IMAGE_TOKEN, special=True)
        tokenizer.add_tokens([added], special_tokens=True)
    if tokenizer.pad_token is None:
        # padding is masked by its place, so any token will do
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_image_processor(name: str, image_aspect_ratio: ImageAspectRatio | None = None) -> Any:
    """The image processor of an encoder, in its version for PIL images.

    Args:
        name: hub id, folder or local-model name.
        image_aspect_ratio: what becomes of a picture that is no square; None leaves that to the
            image processor.

    Returns:
        An image processor that makes `pixel_values` (pictures, 3, height, width) of one size.

    Raises:
        LayerfuseError: if it cannot be found, makes pictures of several sizes or anything else
            than `pixel_values`, or cannot be changed to this aspect ratio.
    """
    auto_image_processor: Any = AutoImageProcessor
    try:
        image_processor = auto_image_processor.from_pretrained(resolve(name), backend="pil")
    except (OSError, ValueError) as error:
        raise LayerfuseError(f"cannot read the image processor of {name}: {error}") from error
    if isinstance(image_processor, Siglip2ImageProcessorPil):
        image_processor = _of_one_size(image_processor)
    if image_aspect_ratio is not None:
        image_processor = _with_aspect_ratio(name, image_processor, image_aspect_ratio)
    processed_size(name, image_processor)
    return image_processor


def _of_one_size(image_processor: Any) -> Any:
    """The image processor of SigLIP 2 of any shape (NaFlex), for squares of as many patches.

    Args:
        image_processor: which cuts pictures into patches, a varying number of them.
    """
    settings = image_processor.to_dict()
    side = int(settings["max_num_patches"] ** 0.5) * settings["patch_size"]
    # Any: transformers does not annotate its constructors
    image_processor_class: Any = SiglipImageProcessorPil
    return image_processor_class(
        size={"height": side, "width": side},
        resample=settings["resample"],
        rescale_factor=settings["rescale_factor"],
        image_mean=settings["image_mean"],
        image_std=settings["image_std"],
    )


def processed_size(name: str, image_processor: Any) -> tuple[int, int]:
    """The size that an image processor gives to every picture.

    Args:
        name: of the encoder, for errors.
        image_processor: of transformers.

    Returns:
        Height and width in pixels.

    Raises:
        LayerfuseError: if it makes several sizes, or anything else than `pixel_values`.
    """
    # Tried, because settings alone do not tell what a class of image processors makes of them.
    wide = _try_blank(name, image_processor, WIDE)
    tall = _try_blank(name, image_processor, TALL)
    if wide == tall:
        return wide
    settings = image_processor.to_dict()
    raise LayerfuseError(
        f"the image processor of {name} makes pictures of several sizes: {_sides(wide)} pixels "
        f"(height x width) of a wide one, {_sides(tall)} of a tall one. Its settings are "
        f"do_resize: {settings.get('do_resize')}, size: {settings.get('size')}, do_center_crop: "
        f"{settings.get('do_center_crop')}. Set `image_aspect_ratio` to pad, square or crop in the "
        "recipe, or, in the encoder's preprocessor_config.json, do_center_crop and crop_size, or a "
        "size of height and width"
    )


def _try_blank(name: str, image_processor: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of what an image processor makes of a blank picture.

    Args:
        name: of the encoder, for errors.
        image_processor: of transformers.
        size: width and height of the blank picture.
    """
    blank = Image.new("RGB", size)
    made = dict(image_processor([blank], return_tensors="pt"))
    pixel_values = made.get("pixel_values")
    if len(made) == 1 and isinstance(pixel_values, Tensor):
        shape = tuple(pixel_values.shape)
        # Tiles of a picture would be a further dimension.
        if len(shape) == 4 and shape[:2] == (1, 3):
            return shape[2], shape[3]
    described: list[str] = []
    for key, value in made.items():
        if isinstance(value, Tensor):
            described.append(f"{key} ({_sides(tuple(value.shape))})")
        else:
            described.append(key)
    raise LayerfuseError(
        f"the image processor of {name}, {type(image_processor).__name__}, makes "
        f"{', '.join(described)} of one picture; valid are image processors that make only "
        "pixel_values (1 x 3 x height x width), such as those of CLIP, SigLIP and DINOv2"
    )


def _sides(lengths: tuple[int, ...]) -> str:
    """Lengths as one writes the size of a picture."""
    return " x ".join(map(str, lengths))


def _with_aspect_ratio(
    name: str,
    image_processor: Any,
    image_aspect_ratio: ImageAspectRatio,
) -> Any:
    """An image processor like this one, but for pictures that are no squares.

    Args:
        name: of the encoder, for errors.
        image_processor: the encoder's own, of transformers.
        image_aspect_ratio: what becomes of such pictures.

    Raises:
        LayerfuseError: if this image processor cannot do that.
    """
    valid = get_args(ImageAspectRatio)
    if image_aspect_ratio not in valid:
        raise LayerfuseError(
            f"image_aspect_ratio {image_aspect_ratio!r} is unknown; valid: {', '.join(valid)}"
        )
    # Any: transformers does not annotate what its classes of image processors share
    image_processor_class: Any = image_processor.__class__
    common_class: Any = PilBackend
    padding_class: Any = LlavaImageProcessorPil
    refusal = f"image_aspect_ratio: {image_aspect_ratio} cannot be set for the encoder {name}"
    # The steps of CLIP, SigLIP, DINOv2, ViT and others, which their settings describe in full.
    # Where a class has steps of its own, settings can mean something else or nothing.
    has_common_steps = image_processor_class._preprocess is common_class._preprocess
    if not has_common_steps and image_processor_class is not padding_class:
        raise LayerfuseError(
            f"{refusal}: its image processor, {image_processor_class.__name__}, has steps of its "
            "own. Leave image_aspect_ratio unset"
        )
    settings = image_processor.to_dict()
    side = _output_side(settings)
    if side is None:
        raise LayerfuseError(
            f"{refusal}: its image processor's settings name no square size (do_resize: "
            f"{settings.get('do_resize')}, size: {settings.get('size')}, do_center_crop: "
            f"{settings.get('do_center_crop')}, crop_size: {settings.get('crop_size')}). Name one "
            "in its preprocessor_config.json, or leave image_aspect_ratio unset"
        )

    settings["do_resize"] = True
    # Only what is on is switched off: settings that stay as they are share cached features with the
    # encoder's own.
    if settings.get("do_pad"):
        settings["do_pad"] = False
    if image_aspect_ratio == "square":
        settings["size"] = {"height": side, "width": side}
        if settings.get("do_center_crop"):
            settings["do_center_crop"] = False
        return image_processor_class.from_dict(settings)
    # The shorter side becomes that of the crop: DINOv2's own settings would first make it larger,
    # and cut off a border, which would be part of the picture after padding.
    settings["size"] = {"shortest_edge": side}
    settings["do_center_crop"] = True
    settings["crop_size"] = {"height": side, "width": side}
    if image_aspect_ratio == "crop":
        return image_processor_class.from_dict(settings)
    if not settings.get("image_mean"):
        raise LayerfuseError(
            f"{refusal}: its image processor has no image_mean, the colour of the borders"
        )
    # That of LLaVA pads to a square first. Other programs that read the saved folder know it.
    settings["do_pad"] = True
    return padding_class.from_dict(settings)


def _output_side(settings: dict[str, Any]) -> int | None:
    """The side in pixels of the squares that an image processor makes, or would make of squares.

    Args:
        settings: the image processor's.

    Returns:
        The side; None where the settings name none, or a rectangle.
    """
    if settings.get("do_center_crop"):
        size = settings["crop_size"]
    elif settings.get("do_resize"):
        size = settings["size"]
    else:
        return None
    if "shortest_edge" in size:
        return int(size["shortest_edge"])
    if "height" in size and size["height"] == size.get("width"):
        return int(size["height"])
    return None
