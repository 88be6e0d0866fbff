"""Models of transformers that layerfuse must equal: the LLM itself, and LLaVA."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration

from tests import tiny
from tests.random_prompts import prompts
from tests.stock import embeddings_with_images, stock_llm


@pytest.mark.parametrize("llm", tiny.LLMS)
@torch.no_grad()
def test_zero_projectors_leave_the_stock_llm(llm: str, tmp_path: Path) -> None:
    """Internal fusion that adds zeros is the LLM itself, and the LLM's own weights stay stock."""
    model = tiny.model("inject_add", llm=llm)
    for parameter in model.fusion.get_submodule("projectors").parameters():
        parameter.zero_()
    batch = prompts(model, [1, 1])

    stock = stock_llm(model, tmp_path)
    expected = stock(
        inputs_embeds=embeddings_with_images(model, batch),
        attention_mask=batch["attention_mask"],
    ).logits

    assert torch.equal(model(**batch).logits, expected)


@torch.no_grad()
def test_injection_happens_at_image_positions_before_its_block() -> None:
    """What a block gets, less what the block below it gave, is what was added between them."""
    model = tiny.model("inject_add", placement=[2, 4])
    batch = prompts(model, [1, 2])
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}

    def record_input(index: int, module: Any, args: tuple[Tensor, ...]) -> None:
        inputs[index] = args[0]

    def record_output(index: int, module: Any, args: Any, output: Tensor) -> None:
        outputs[index] = output

    # torch calls hooks in the order of their registration: these see what the model's own did.
    for index, block in enumerate(model.language_model.get_decoder().layers):
        block.register_forward_pre_hook(partial(record_input, index))
        block.register_forward_hook(partial(record_output, index))
    model(**batch)

    fused = model.fuse(model.encode_images(batch["pixel_values"]))
    assert list(fused.memory) == [2, 4]
    is_image = batch["input_ids"] == tiny.IMAGE_ID
    for index in range(1, 6):
        added = inputs[index] - outputs[index - 1]
        at_text = added[~is_image]
        at_images = added[is_image]
        assert torch.equal(at_text, torch.zeros_like(at_text))
        if index in fused.memory:
            expected = fused.memory[index].flatten(0, 1)
        else:
            expected = torch.zeros_like(at_images)
        torch.testing.assert_close(at_images, expected, atol=1e-5, rtol=1e-5)


def stock_llava(layers: list[int]) -> LlavaForConditionalGeneration:
    """transformers' LLaVA of the tiny CLIP and the tiny llama, with large random weights."""
    config = LlavaConfig(
        vision_config=tiny.vision_config("clip"),
        text_config=tiny.text_config("llama"),
        image_token_index=tiny.IMAGE_ID,
        vision_feature_layer=layers,
        # without the CLS token
        vision_feature_select_strategy="default",
    )
    llava = LlavaForConditionalGeneration(config).eval()
    # Enlarged as in `tiny.model`: a wrong layer must show in the logits.
    for parameter in llava.parameters():
        if parameter.ndim > 1:
            parameter.mul_(3)
    return llava


def name_in_llava(name: str) -> str:
    """The name in LLaVA of a weight of FusionVLM."""
    name = name.replace("vision_tower.tower.", "model.vision_tower.")
    name = name.replace("fusion.projector.", "model.multi_modal_projector.")
    name = name.replace("language_model.lm_head", "lm_head")
    return name.replace("language_model.model.", "model.language_model.")


@pytest.mark.parametrize("layers", [[3], [1, 4], [4, 2, 1]])
@torch.no_grad()
def test_concat_is_stock_llava(layers: list[int]) -> None:
    """Same weights, difference 0.0 in logits and in the loss."""
    llava = stock_llava(layers)
    llava_weights = llava.state_dict()
    model = tiny.model("concat", layers=layers)
    weights: dict[str, Tensor] = {}
    for name in model.state_dict():
        # LLaVA does not scale its tokens: where it lacks a weight, that is the scale, which is 1.
        weights[name] = llava_weights.get(name_in_llava(name), torch.ones(()))
    model.load_state_dict(weights)
    batch = prompts(model, [1, 2])

    expected = llava(**batch, labels=batch["input_ids"])
    output = model(**batch, labels=batch["input_ids"])

    # no tolerance: the same operations in the same order
    assert float((output.logits - expected.logits).abs().max()) == 0.0
    assert float(output.loss - expected.loss) == 0.0
