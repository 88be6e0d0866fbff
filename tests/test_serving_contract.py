"""What servers ask of a model and its processor, without a server.

vLLM's Transformers backend takes `pooler_output` of `get_image_features` and nothing else, puts it
where the processor wrote image tokens, and plans memory by the processor's own count of them.
"""

from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from layerfuse.cost.fusions_table import ships_as
from layerfuse.fusion import FUSIONS
from tests import tiny

SERVABLE: list[str] = []
for name, (_, module) in FUSIONS.items():
    if ships_as(module) in ("folds", "hub"):
        SERVABLE.append(name)
OTHERS = sorted(set(FUSIONS) - set(SERVABLE))
SIZES = [(40, 30), (500, 20), (32, 32)]
"""(height, width) of pictures before they are processed"""


def asked(strategy: str) -> tuple[Any, dict[str, Tensor]]:
    """A model and a question about a picture."""
    model = tiny.model(strategy)
    processor = tiny.processor(model)
    picture = Image.effect_noise((40, 30), 90).convert("RGB")
    inputs = processor.inputs([[{"role": "user", "content": "<image>What?"}]], [picture])
    return model, dict(inputs)


def served(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Logits as a server computes them: of the LLM alone, with what it knows of the pictures."""
    tokens = model.get_image_features(inputs["pixel_values"]).pooler_output
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    is_image = inputs["input_ids"] == model.config.image_token_id
    embeds = embeds.masked_scatter(is_image.unsqueeze(-1), tokens.flatten(0, 1))
    return model.language_model(inputs_embeds=embeds).logits


@pytest.mark.parametrize("strategy", SERVABLE)
@torch.no_grad()
def test_pooler_output_is_all_that_pictures_add(strategy: str) -> None:
    """For the strategies that are said to be served."""
    model, inputs = asked(strategy)
    torch.testing.assert_close(served(model, inputs), model(**inputs).logits)


@pytest.mark.parametrize("strategy", ["inject_add", "inject_cross"])
@torch.no_grad()
def test_internal_strategies_would_answer_otherwise(strategy: str) -> None:
    """Without an error, which is why they are said to be for transformers only."""
    assert strategy in OTHERS
    model, inputs = asked(strategy)
    assert not torch.allclose(served(model, inputs), model(**inputs).logits, atol=1e-3)


@pytest.mark.parametrize("strategy", SERVABLE)
def test_the_processor_counts_what_it_writes(strategy: str) -> None:
    """The count before there are pictures, the tokens in the text, and the model's own."""
    model, inputs = asked(strategy)
    processor: Any = tiny.processor(model)

    planned = processor._get_num_multimodal_tokens(image_sizes=SIZES)  # noqa: SLF001 - theirs

    in_text = int((inputs["input_ids"] == model.config.image_token_id).sum())
    with torch.no_grad():
        made = model.get_image_features(inputs["pixel_values"]).pooler_output.shape[1]
    assert planned["num_image_tokens"] == [in_text] * len(SIZES)
    assert planned["num_image_patches"] == [1] * len(SIZES)
    assert made == in_text
    pixels = {"pixel_values": inputs["pixel_values"]}
    assert processor.replace_image_token(pixels, 0) == processor.image_token * in_text


@pytest.mark.parametrize("strategy", list(FUSIONS))
def test_what_a_backend_looks_up_by_name(strategy: str) -> None:
    """Before it takes a model of custom code."""
    model = tiny.model(strategy)
    assert model._supports_attention_backend  # noqa: SLF001 - theirs
    assert model.language_model is not None
    assert model.vision_tower is not None
    assert tiny.processor(model).image_token in tiny.tokenizer().get_vocab()
