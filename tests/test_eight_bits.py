"""LLMs in eight bits, where torchao is installed: `pip install torchao`."""

import pytest
import torch

from tests import tiny
from tests.random_prompts import prompts

quantization = pytest.importorskip("torchao.quantization")


@pytest.mark.parametrize("strategy", ["concat", "inject_add", "inject_cross"])
@torch.no_grad()
def test_an_llm_in_eight_bits_answers_nearly_the_same(strategy: str) -> None:
    """Only the LLM is quantized: the fusion stays as it was trained."""
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
