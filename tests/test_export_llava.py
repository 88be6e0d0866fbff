"""`layerfuse export --to llava`: transformers' own LLaVA, with the same logits."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from layerfuse import FusionVLM
from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.load_answerer import load_answerer
from layerfuse.export.equality import check_equal, sample_picture
from layerfuse.export.formats import export
from layerfuse.export.stock_llava import to_stock_llava, to_stock_processor
from layerfuse_cli.app import app
from tests import tiny
from tests.random_prompts import prompts

FOLDING: list[dict[str, Any]] = [
    {"strategy": "single"},
    # out of order
    {"strategy": "concat", "layers": [4, 1, 2]},
    # the embeddings alone need no block
    {"strategy": "single", "layers": [0]},
    {"strategy": "concat", "projector": "linear"},
    # the base layer is in a group too
    {"strategy": "group_mean", "layers": [[1, 2], [3]], "base": 2},
    {"strategy": "group_mean", "projector": "linear"},
    {"strategy": "weighted_sum"},
    {"strategy": "weighted_sum", "layers": [[1, 2], [3, 4]]},
    {"strategy": "weighted_sum", "beside": "concat", "base": 2},
]
NORMS = ["none", "standardize", "whiten"]


@torch.no_grad()
def disturb_constants(model: FusionVLM) -> None:
    """Give all stored constants values other than those of a model that was never calibrated."""
    for buffer in model.fusion.buffers():
        buffer.add_(torch.rand_like(buffer) / 2)


@pytest.mark.parametrize("normalize", NORMS)
@pytest.mark.parametrize("case", FOLDING, ids=str)
@torch.no_grad()
def test_stock_llava_has_the_same_logits(case: dict[str, Any], normalize: str) -> None:
    """Folding is algebra: only the order of sums differs."""
    model = tiny.model(**case, normalize=normalize)
    disturb_constants(model)
    batch = prompts(model, [1, 2, 0])

    expected = model(**batch).logits
    logits = to_stock_llava(model)(**batch).logits

    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("llm", tiny.LLMS)
@pytest.mark.parametrize("encoder", ["clip", "siglip", "dinov2", "vit"])
@torch.no_grad()
def test_processor_and_model_are_stock_for_every_family(encoder: str, llm: str) -> None:
    """The same picture and question become the same inputs, and give the same logits."""
    model = tiny.model("concat", encoder, llm)
    processor = tiny.processor(model)

    difference = check_equal(
        model,
        processor,
        to_stock_llava(model),
        to_stock_processor(model, processor),
    )

    assert difference < 1e-5


def test_layers_are_listed_once_in_ascending_order() -> None:
    """As llama.cpp reads them, whatever the order in which they were selected."""
    several = to_stock_llava(tiny.model("concat", layers=[4, 1, 2]))
    # Any: transformers types configurations of towers as dictionaries
    one: Any = to_stock_llava(tiny.model("single", layers=[2]))

    assert several.config.vision_feature_layer == [1, 2, 4]
    assert one.config.vision_feature_layer == 2
    # blocks that no layer needs are not written
    assert one.config.vision_config.num_hidden_layers == 2


READ_WITHOUT_LAYERFUSE = """
import json, sys
sys.modules["layerfuse"] = None
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder, picture = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)
message = {"role": "user", "content": [
    {"type": "image", "image": Image.open(picture)},
    {"type": "text", "text": "What?"},
]}
inputs = processor.apply_chat_template(
    [message], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
with torch.no_grad():
    logits = model(**inputs).logits
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)
print(json.dumps({
    "class": type(model).__name__,
    "ids": inputs["input_ids"].tolist(),
    "logits": logits[0, -1].tolist(),
    "tokens": tokens.tolist(),
}))
"""


def read_elsewhere(folder: Path, picture: Path) -> dict[str, Any]:
    """What a process makes of an exported folder in which layerfuse cannot be imported."""
    finished = subprocess.run(
        [sys.executable, "-c", READ_WITHOUT_LAYERFUSE, str(folder), str(picture)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


def save_trained(folder: Path, *, closed: bool = False, **options: Any) -> FusionVLM:
    """Save a tiny model of three layers, with its processor."""
    model = tiny.model("concat", seed=11, normalize="whiten", **options)
    disturb_constants(model)
    processor = tiny.processor(model)
    processor.turn_ends.set_stop_tokens(model.generation_config)
    if closed:
        model.close_answers([2, *range(70, 90)])
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


@pytest.mark.parametrize("closed", [False, True])
def test_a_process_without_layerfuse_answers_the_same(tmp_path: Path, closed: bool) -> None:
    """Prompt, logits and greedy answer, from the folder alone."""
    save_trained(tmp_path / "model", closed=closed)
    picture = tmp_path / "picture.png"
    sample_picture().save(picture)
    exported = export(tmp_path / "model", "llava")

    answerer = load_answerer(tmp_path / "model")
    inputs = answerer.processor.inputs(
        [[{"role": "user", "content": "<image>What?"}]],
        [sample_picture()],
    )
    with torch.no_grad():
        logits: Tensor = answerer.model(**inputs).logits[0, -1]
        tokens = answerer.model.generate(**inputs, max_new_tokens=12, do_sample=False)
    elsewhere = read_elsewhere(exported.folder, picture)

    assert elsewhere["class"] == "LlavaForConditionalGeneration"
    assert elsewhere["ids"] == inputs["input_ids"].tolist()
    assert elsewhere["tokens"] == tokens.tolist()
    # answers differ from token to token, or equal ones would say nothing
    assert len(set(tokens[0, inputs["input_ids"].shape[1] :].tolist())) > 2
    expected = logits.tolist()
    for token, value in enumerate(elsewhere["logits"]):
        if not closed or token in answerer.model.answer_head.tokens:
            assert value == pytest.approx(expected[token], abs=1e-4)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"strategy": "deformable"}, "external modular"),
    ({"strategy": "token_concat", "stride": 4}, "TokenConcat"),
    ({"strategy": "instruction_weighted"}, "external guided"),
    ({"strategy": "text_routed"}, "external guided"),
    ({"strategy": "inject_add"}, "internal direct"),
    ({"strategy": "inject_cross"}, "internal modular"),
    ({"strategy": "weighted_sum", "beside": "add"}, "LayerNorm"),
    ({"strategy": "concat", "normalize": "layernorm"}, "layernorm"),
    ({"strategy": "concat", "token_grid": (2, 2)}, "token_grid"),
    ({"strategy": "concat", "encoder": "dinov2_registers"}, "registers"),
]


@pytest.mark.parametrize(("case", "reason"), REFUSED, ids=str)
def test_what_llava_cannot_express_is_refused(
    tmp_path: Path, case: dict[str, Any], reason: str
) -> None:
    """With the reason, and nothing written."""
    model = tiny.model(**case)
    model.save_pretrained(tmp_path / "model")
    tiny.processor(model).save_pretrained(tmp_path / "model")

    with pytest.raises(LayerfuseError, match=reason):
        export(tmp_path / "model", "llava")

    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_head_with_bias_is_refused() -> None:
    """LLaVA has no place for it."""
    model = tiny.model("concat")
    head = model.language_model.lm_head
    model.language_model.lm_head = torch.nn.Linear(head.in_features, head.out_features)

    with pytest.raises(LayerfuseError, match="has a bias"):
        to_stock_llava(model)


def test_an_llm_that_does_more_to_its_logits_is_refused() -> None:
    """Cohere scales them, which the head alone does not say: the logits are compared."""
    model = tiny.model("concat")
    scaled = model.language_model.forward

    def scaling(**inputs: Any) -> Any:
        outputs = scaled(**inputs)
        outputs.logits = outputs.logits * 0.5
        return outputs

    model.language_model.forward = scaling
    processor = tiny.processor(model)
    with pytest.raises(LayerfuseError, match="logits differ by"):
        check_equal(model, processor, to_stock_llava(model), to_stock_processor(model, processor))


def test_a_tokenizer_that_adds_tokens_of_its_own_is_refused() -> None:
    """Stock processors let it add them; layerfuse's own does not, in training and after."""
    from tokenizers.processors import TemplateProcessing

    model = tiny.model("concat")
    processor = tiny.processor(model)
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    with pytest.raises(LayerfuseError, match="other input_ids"):
        check_equal(model, processor, to_stock_llava(model), to_stock_processor(model, processor))


@pytest.mark.parametrize("content", ["text", "parts"])
@pytest.mark.parametrize("prompt", [True, False])
def test_the_exported_template_writes_what_training_wrote(content: str, prompt: bool) -> None:
    """For contents of both kinds, with and without an answer to come."""
    model = tiny.model("concat")
    processor = tiny.processor(model)
    stock: Any = to_stock_processor(model, processor)
    said: Any = "<image>What\nis it? "
    if content == "parts":
        said = [{"type": "image"}, {"type": "text", "text": "What\nis it? "}]
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": said},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "Why?"},
    ]

    written = stock.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)

    expected: Any = processor.apply_chat_template(messages, add_generation_prompt=prompt)
    assert written == expected


def test_the_verb_says_where_and_how_well(tmp_path: Path) -> None:
    """And refuses a folder that holds something, before it loads the model."""
    save_trained(tmp_path / "model")
    output = tmp_path / "out"

    first = CliRunner().invoke(
        app, ["export", str(tmp_path / "model"), "--to", "llava", "--output", str(output)]
    )
    second = CliRunner().invoke(
        app, ["export", str(tmp_path / "model"), "--to", "llava", "--output", str(output)]
    )

    assert first.exit_code == 0, first.output
    assert f"{output}: the largest difference of two logits is" in first.output
    assert "vision_feature_layer: [1, 3, 4]" in first.output
    assert second.exit_code == 2
    assert "is there already" in second.output
    assert not list(tmp_path.glob("*.tmp"))


def test_half_precision_is_checked_against_its_own_rounding(tmp_path: Path) -> None:
    """A model in bfloat16 is exported in bfloat16."""
    model = tiny.model("concat", normalize="standardize")
    disturb_constants(model)
    model.bfloat16()
    model.save_pretrained(tmp_path / "model")
    tiny.processor(model).save_pretrained(tmp_path / "model")

    exported = export(tmp_path / "model", "llava")

    config = json.loads((exported.folder / "config.json").read_text("utf-8"))
    assert config["dtype"] == "bfloat16"
    assert 0 < exported.difference < 0.5
