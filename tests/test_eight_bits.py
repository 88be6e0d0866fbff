"""LLMs in few bits, where the packages are installed: `pip install torchao bitsandbytes`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig

from layerfuse import FusionVLM
from layerfuse.fusion import FUSIONS
from tests import tiny
from tests.random_prompts import prompts


@pytest.mark.parametrize("strategy", ["concat", "inject_add", "inject_cross"])
@torch.no_grad()
def test_an_llm_in_eight_bits_answers_nearly_the_same(strategy: str) -> None:
    """Only the LLM is quantized: the fusion stays as it was trained."""
    quantization = pytest.importorskip("torchao.quantization")
    model = tiny.model(strategy)
    batch = prompts(model, [1, 2])
    expected = model(**batch).logits

    quantization.quantize_(model.language_model, quantization.Int8WeightOnlyConfig())

    logits = model(**batch).logits
    assert not torch.equal(logits, expected)
    # Eight bits round weights by some thousandths of the largest of their row.
    assert float((logits - expected).abs().max()) < 0.05 * float(expected.abs().max())
    generated = model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert generated.shape[0] == batch["input_ids"].shape[0]


def linear_kinds(module: nn.Module) -> set[str]:
    """Names of the classes of the Linears inside."""
    return {type(part).__name__ for part in module.modules() if isinstance(part, nn.Linear)}


@pytest.mark.parametrize("strategy", sorted(FUSIONS))
@torch.no_grad()
def test_a_model_loaded_in_eight_bits_answers_nearly_the_same(
    strategy: str, tmp_path: Path
) -> None:
    """As a user loads it, without naming the parts that are to stay as they are."""
    pytest.importorskip("bitsandbytes")
    model = tiny.model(strategy)
    model.save_pretrained(tmp_path)
    batch = prompts(model, [1, 2])
    # Any: transformers does not annotate it
    settings: Any = BitsAndBytesConfig(load_in_8bit=True)

    loaded = FusionVLM.from_pretrained(tmp_path, quantization_config=settings)

    assert "Linear8bitLt" in linear_kinds(loaded.language_model.model)
    assert linear_kinds(loaded.fusion) <= {"Linear", "NonDynamicallyQuantizableLinear"}
    expected = model(**batch).logits
    logits = loaded(**batch).logits
    assert float((logits - expected).abs().max()) < 0.05 * float(expected.abs().max())


@torch.no_grad()
def test_the_fusion_stays_in_single_precision_beside_an_llm_in_half(tmp_path: Path) -> None:
    model = tiny.model("deformable")
    model.save_pretrained(tmp_path)

    loaded = FusionVLM.from_pretrained(tmp_path, dtype=torch.float16)

    assert loaded.language_model.dtype == torch.float16
    for name, parameter in loaded.fusion.named_parameters():
        assert torch.equal(parameter, model.fusion.get_parameter(name))
    batch = prompts(model, [1])
    expected = model(**batch).logits
    logits = loaded(**batch).logits.float()
    assert float((logits - expected).abs().max()) < 0.01 * float(expected.abs().max())
