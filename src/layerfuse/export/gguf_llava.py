"""Encoder and projector of a trained model as llama.cpp reads them beside an LLM.

Written is its layout of image encoders for LLaVA (`mmproj`). Of several layers in
`clip.vision.feature_layer` it takes each once, in ascending order, and sets them side by side: as a
`FlatProjector` reads them. What was written is read again and computed with numpy, with the
arithmetic of its graph; tests compare that with llama.cpp itself.

Encoders with a class token (CLIP): since its pull request 13321 (May 2025) llama.cpp puts the token
behind the patches, but gives out all rows but the first, so that the first patch is lost and the
class token is read as the last one (its issue 25814; so in its release 11549 of October 2026).
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layerfuse.errors import LayerfuseError
from layerfuse.export.equality import sample_picture
from layerfuse.export.stock_llava import INSTEAD, refuse_pooling
from layerfuse.fusion.fixed_mix import flat_projector
from layerfuse.fusion.flat_projector import FlatProjector
from layerfuse.model.pretrained import processed_size
from layerfuse.model.processor import Processor
from layerfuse.model.vlm import FusionVLM
from layerfuse.vision.towers import native_size, patch_side

FILE = "mmproj-model-f16.gguf"
LLM = "llm"
"""folder of the LLM, for llama.cpp's own converter"""
TOLERANCE = 0.02
"""of visual tokens, as a share of their largest: matrices are written in half precision, and
llama.cpp computes the GELU of a projector by its usual approximation"""
ACTIVATIONS = {"quick_gelu": False, "gelu_pytorch_tanh": True}
"""of the encoder's blocks, and whether llama.cpp calls them `use_gelu`"""
FAMILIES_OF_FILES = ("clip_vision_model", "siglip_vision_model")
EMBEDDINGS = {
    "embeddings.class_embedding": "v.class_embd",
    "embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "embeddings.patch_embedding.bias": "v.patch_embd.bias",
    "embeddings.position_embedding.weight": "v.position_embd.weight",
    "pre_layrnorm.weight": "v.pre_ln.weight",
    "pre_layrnorm.bias": "v.pre_ln.bias",
}
BLOCK = {
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    # The names of its oldest files, which newer versions of llama.cpp turn round.
    "mlp.fc1": "ffn_down",
    "mlp.fc2": "ffn_up",
}
"""of each block of the encoder"""
Array = NDArray[Any]
Tensors = dict[str, Array]


# Any: an optional package, imported where it is used
def _gguf() -> Any:
    """The package that reads and writes these files.

    Raises:
        LayerfuseError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise LayerfuseError(
            "--to gguf needs the package gguf: pip install 'layerfuse[local]'"
        ) from error
    return gguf


def write_gguf(
    model: FusionVLM, processor: Processor, folder: Path, *, class_token_first: bool = False
) -> float:
    """Write the image encoder, and the LLM as a folder that llama.cpp converts.

    Args:
        model: a trained model on the CPU.
        processor: its processor.
        folder: exists, and gets the file and the folder of the LLM.
        class_token_first: the llama.cpp that will read it puts a class token before the patches.

    Returns:
        The largest difference between visual tokens of the model and of what was written, as a
        share of the largest of them.

    Raises:
        LayerfuseError: llama.cpp has no place for a part of the model; or what was written differs.
    """
    flat = _expressible(model, processor)
    if not class_token_first and _has_class_token(model):
        raise LayerfuseError(
            "llama.cpp would read this model's pictures wrongly: since May 2025 it puts the class "
            "token of an encoder such as CLIP behind the patches and loses the first patch (issue "
            "25814 of ggml-org/llama.cpp). With --class-token-first the file is written for an "
            "older llama.cpp, or one where that is mended. SigLIP, which has no class token, is "
            f"read rightly. {INSTEAD}"
        )
    file = folder / FILE
    _write_encoder(model, processor, flat, file)
    difference = _check(model, processor, file)
    # Any: transformers does not annotate what it saves
    language_model: Any = model.language_model
    language_model.save_pretrained(folder / LLM)
    tokenizer: Any = processor.tokenizer
    tokenizer.chat_template = processor.chat.template
    tokenizer.save_pretrained(folder / LLM)
    return difference


def _expressible(model: FusionVLM, processor: Processor) -> FlatProjector:
    """The projector, if llama.cpp has a place for the whole model.

    Raises:
        LayerfuseError: naming what it has no place for.
    """
    refusal = "llama.cpp cannot read this model"
    try:
        flat = flat_projector(model.fusion)
    except LayerfuseError as error:
        raise LayerfuseError(f"{refusal}: {error}. {INSTEAD}") from error
    refuse_pooling(model, refusal)
    if flat.activation != "gelu":
        raise LayerfuseError(
            f"{refusal}: its projector is one Linear, and llama.cpp puts a GELU behind it. "
            f"{INSTEAD}"
        )
    vision = model.config.vision_config
    if vision.model_type not in FAMILIES_OF_FILES:
        raise LayerfuseError(
            f"{refusal}: its encoder is a {vision.model_type}; valid: "
            f"{', '.join(FAMILIES_OF_FILES)}. {INSTEAD}"
        )
    if vision.hidden_act not in ACTIVATIONS:
        raise LayerfuseError(
            f"{refusal}: its encoder computes {vision.hidden_act}; valid: "
            f"{', '.join(ACTIVATIONS)}. {INSTEAD}"
        )
    size = processed_size("this model", processor.image_processor)
    if size != native_size(vision) or size[0] != size[1]:
        raise LayerfuseError(
            f"{refusal}: its pictures are {size[0]} x {size[1]} pixels, and llama.cpp reads "
            f"squares of the encoder's own size alone ({native_size(vision)[0]}). {INSTEAD}"
        )
    if flat.layers == (0,):
        raise LayerfuseError(f"{refusal}: it reads the embeddings alone. {INSTEAD}")
    if model.answer_head is not None:
        raise LayerfuseError(
            f"{refusal}: its answers are a closed set of tokens, to which llama.cpp would not "
            f"keep. {INSTEAD}"
        )
    return flat


def _has_class_token(model: FusionVLM) -> bool:
    """Whether the file would hold a class token."""
    weights: dict[str, Tensor] = model.vision_tower.tower.state_dict()
    return "embeddings.class_embedding" in weights


def _write_encoder(model: FusionVLM, processor: Processor, flat: FlatProjector, file: Path) -> None:
    """Write encoder and projector."""
    vision = model.config.vision_config
    image_processor = processor.image_processor
    writer = _gguf().GGUFWriter(path=str(file), arch="clip")
    writer.add_bool("clip.has_text_encoder", False)
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_file_type(1)
    writer.add_description("image encoder for LLaVA")
    writer.add_string("clip.projector_type", "mlp")
    numbers = {
        "clip.vision.image_size": native_size(vision)[0],
        "clip.vision.patch_size": patch_side(vision),
        "clip.vision.embedding_length": vision.hidden_size,
        "clip.vision.feed_forward_length": vision.intermediate_size,
        "clip.vision.projection_dim": vision.to_dict().get("projection_dim", 0),
        "clip.vision.attention.head_count": vision.num_attention_heads,
        "clip.vision.block_count": max(flat.layers),
    }
    for name, number in numbers.items():
        writer.add_uint32(name, int(number))
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", vision.layer_norm_eps)
    writer.add_array("clip.vision.feature_layer", list(flat.layers))
    writer.add_array("clip.vision.image_mean", [float(x) for x in image_processor.image_mean])
    writer.add_array("clip.vision.image_std", [float(x) for x in image_processor.image_std])
    writer.add_bool("clip.use_gelu", ACTIVATIONS[vision.hidden_act])
    tensors = _encoder_tensors(model.vision_tower.tower.state_dict(), max(flat.layers))
    tensors["mm.0.weight"] = flat.weight_1
    tensors["mm.0.bias"] = flat.bias_1
    tensors["mm.2.weight"] = flat.weight_2
    tensors["mm.2.bias"] = flat.bias_2
    for name, tensor in tensors.items():
        writer.add_tensor(name, _stored(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _encoder_tensors(weights: dict[str, Tensor], blocks: int) -> dict[str, Tensor]:
    """The encoder's tensors by llama.cpp's names; a norm above the blocks would be applied."""
    tensors: dict[str, Tensor] = {}
    for ours, theirs in EMBEDDINGS.items():
        if ours in weights:
            tensors[theirs] = weights[ours]
    for block in range(blocks):
        for ours, theirs in BLOCK.items():
            for kind in ("weight", "bias"):
                tensors[f"v.blk.{block}.{theirs}.{kind}"] = weights[
                    f"encoder.layers.{block}.{ours}.{kind}"
                ]
    return tensors


def _stored(tensor: Tensor) -> Array:
    """Matrices and kernels in half precision, all else in single precision."""
    array: Array = tensor.detach().float().numpy()
    if array.ndim >= 2:
        return array.astype(np.float16)
    return array


@torch.no_grad()
def _check(model: FusionVLM, processor: Processor, file: Path) -> float:
    """Compare visual tokens of the model with those that the file gives.

    Raises:
        LayerfuseError: they differ by more than half precision does.
    """
    # Any: image processors of transformers share no type
    image_processor: Any = processor.image_processor
    # A square of the encoder's own size, which llama.cpp only normalises.
    picture = sample_picture().resize(native_size(model.config.vision_config))
    pixels: Tensor = image_processor([picture], return_tensors="pt").pixel_values
    normalised = _normalised(file, np.asarray(picture))
    if np.abs(normalised - pixels[0].float().numpy()).max() > 1e-4:
        raise LayerfuseError(
            "llama.cpp cannot read this model: its pictures are not (x / 255 - mean) / deviation, "
            f"which llama.cpp computes of a square of {picture.width} pixels. {INSTEAD}"
        )
    fused = model.fuse(model.vision_tower(pixels.to(model.dtype)))
    expected: Array = fused.tokens[0].float().numpy()
    tokens = tokens_of_file(file, normalised)
    difference = float(np.abs(tokens - expected).max() / np.abs(expected).max())
    if not difference <= TOLERANCE:
        raise LayerfuseError(
            f"what was written for llama.cpp gives visual tokens that differ by {difference:.2g} "
            f"of the largest (tolerance {TOLERANCE}). Nothing was written. {INSTEAD}"
        )
    return difference


def _normalised(file: Path, picture: Array) -> Array:
    """What llama.cpp makes of a square of the right size, by the file's own mean and deviation.

    Args:
        file: of an image encoder.
        picture: (side, side, 3) of 0..255.

    Returns:
        (3, side, side)
    """
    fields = _gguf().GGUFReader(str(file)).fields
    mean = np.asarray(fields["clip.vision.image_mean"].contents(), dtype=np.float32)
    deviation = np.asarray(fields["clip.vision.image_std"].contents(), dtype=np.float32)
    scaled = picture.astype(np.float32) / 255
    return ((scaled - mean) / deviation).transpose(2, 0, 1)


def tokens_of_file(file: Path, pixels: Array) -> Array:
    """What llama.cpp's graph computes from a written file, with numpy in single precision.

    Args:
        file: of an image encoder with an MLP behind it.
        pixels: (3, side, side), normalised.

    Returns:
        (patches, D) visual tokens.
    """
    reader = _gguf().GGUFReader(str(file))
    tensors: Tensors = {}
    for tensor in reader.tensors:
        tensors[tensor.name] = np.asarray(tensor.data).astype(np.float32)
    settings = {name: field.contents() for name, field in reader.fields.items()}
    eps = settings["clip.vision.attention.layer_norm_epsilon"]
    heads = settings["clip.vision.attention.head_count"]
    layers = set(settings["clip.vision.feature_layer"])
    activation = _gelu if settings["clip.use_gelu"] else _quick_gelu

    hidden = _patches(tensors, pixels, settings["clip.vision.patch_size"])
    has_class = "v.class_embd" in tensors
    if has_class:
        hidden = np.concatenate([tensors["v.class_embd"][None], hidden])
    hidden = hidden + tensors["v.position_embd.weight"]
    if "v.pre_ln.weight" in tensors:
        hidden = _norm(tensors, "v.pre_ln", hidden, eps)
    # The input of block k is layer k; the last layer is what its last block gives.
    stack: list[Array] = []
    for block in range(max(layers)):
        if block in layers:
            stack.append(hidden)
        name = f"v.blk.{block}"
        normed = _norm(tensors, f"{name}.ln1", hidden, eps)
        hidden = hidden + _attention(tensors, name, normed, heads)
        normed = _norm(tensors, f"{name}.ln2", hidden, eps)
        inner = activation(_linear(tensors, f"{name}.ffn_down", normed))
        hidden = hidden + _linear(tensors, f"{name}.ffn_up", inner)
    stack.append(hidden)
    side_by_side = np.concatenate(stack, axis=-1)
    if has_class:
        side_by_side = side_by_side[1:]
    inner = _gelu(_linear(tensors, "mm.0", side_by_side))
    return _linear(tensors, "mm.2", inner)


def _patches(tensors: Tensors, pixels: Array, side: int) -> Array:
    """(3, H, W) -> (patches, Dv), row by row."""
    channels, height, width = pixels.shape
    rows, columns = height // side, width // side
    whole = pixels[:, : rows * side, : columns * side]
    cells = whole.reshape(channels, rows, side, columns, side).transpose(1, 3, 0, 2, 4)
    kernel = tensors["v.patch_embd.weight"]
    flat = cells.reshape(rows * columns, -1) @ kernel.reshape(len(kernel), -1).T
    if "v.patch_embd.bias" in tensors:
        flat = flat + tensors["v.patch_embd.bias"]
    return flat


def _linear(tensors: Tensors, name: str, x: Array) -> Array:
    return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]


def _norm(tensors: Tensors, name: str, x: Array, eps: float) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps)
    return scaled * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def _attention(tensors: Tensors, name: str, x: Array, heads: int) -> Array:
    """(T, Dv) -> (T, Dv)"""
    length, width = x.shape
    by_head: list[Array] = []
    for part in ("attn_q", "attn_k", "attn_v"):
        projected = _linear(tensors, f"{name}.{part}", x)
        # (T, Dv) -> (heads, T, Dv / heads)
        by_head.append(projected.reshape(length, heads, -1).transpose(1, 0, 2))
    query, key, value = by_head
    scores = query @ key.transpose(0, 2, 1) / math.sqrt(width // heads)
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    mixed = (shares @ value).transpose(1, 0, 2).reshape(length, width)
    return _linear(tensors, f"{name}.attn_out", mixed)


def _gelu(x: Array) -> Array:
    """ggml's `gelu`: the approximation by a tanh."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _quick_gelu(x: Array) -> Array:
    """ggml's `gelu_quick`."""
    return x / (1 + np.exp(-1.702 * x))
