"""`inject_add` with `placement: first` is the text model of transformers' Qwen3-VL."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3VLTextConfig, Qwen3VLTextModel

from layerfuse import FusionVLM
from tests import tiny
from tests.random_prompts import positions_of, prompts_with_images_at

LENGTH = 50
"""tokens in each row of a prompt"""
STEPS = 5
SHARED_SETTINGS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "rms_norm_eps",
    "attention_bias",
    "max_position_embeddings",
    "hidden_act",
    "pad_token_id",
)
"""of the configs of Qwen3 and of Qwen3-VL's text model"""


def qwen3_vl_of(model: FusionVLM) -> Qwen3VLTextModel:
    """Qwen3-VL's text model with the weights of the model's Qwen3.

    Positions that are the same in time, height and width make its three-part rotation the plain
    one, so that only the base of the rotation must agree.
    """
    qwen3_config = model.config.text_config
    settings: dict[str, Any] = {}
    for name in SHARED_SETTINGS:
        settings[name] = getattr(qwen3_config, name)
    # The three parts share the four frequencies of a head of width 8.
    settings["rope_parameters"] = {**qwen3_config.rope_parameters, "mrope_section": [2, 1, 1]}

    qwen3_vl = Qwen3VLTextModel(Qwen3VLTextConfig(**settings)).eval()
    qwen3_vl.load_state_dict(model.get_decoder().state_dict())
    return qwen3_vl


def inputs_of_qwen3_vl(model: FusionVLM, batch: dict[str, Tensor]) -> dict[str, Any]:
    """The same prompts for Qwen3-VL, which gets images that are encoded and projected already.

    Returns:
        inputs_embeds (rows, T, D), visual_pos_masks (rows, T), and for every selected layer, in
        their order, deepstack_visual_embeds (image tokens of all rows, D).
    """
    is_image = batch["input_ids"] == tiny.IMAGE_ID
    features = model.encode_images(batch["pixel_values"])
    # Any: strategies share no type that says which projectors they have
    fusion: Any = model.fusion

    (base,) = features.select([fusion.config.base])
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    embeddings[is_image] = fusion.projector(base).flatten(0, 1)

    projected: list[Tensor] = []
    layers = features.select(model.config.vision_layers)
    for project, layer in zip(fusion.projectors, layers, strict=True):
        projected.append(project(layer).flatten(0, 1))
    return {
        "inputs_embeds": embeddings,
        "visual_pos_masks": is_image,
        "deepstack_visual_embeds": projected,
    }


@pytest.mark.parametrize("layers", [[1, 2, 4], [0, 3], [2]])
@torch.no_grad()
def test_deepstack_is_inject_add_placed_first(layers: list[int]) -> None:
    model = tiny.model("inject_add", llm="qwen3", layers=layers, placement="first")
    qwen3_vl = qwen3_vl_of(model)
    batch = prompts_with_images_at([[3], [1, 25], []], LENGTH)
    inputs = inputs_of_qwen3_vl(model, batch)

    output = model(
        input_ids=batch["input_ids"], pixel_values=batch["pixel_values"], output_hidden_states=True
    )
    expected = qwen3_vl(**inputs, output_hidden_states=True).last_hidden_state
    expected_logits = model.language_model.lm_head(expected)

    torch.testing.assert_close(output.hidden_states[-1], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.logits, expected_logits, atol=1e-5, rtol=1e-5)

    # If the order of the layers, or the layers at all, did not show, nothing would be proven.
    reversed_layers = inputs["deepstack_visual_embeds"][::-1]
    of_reversed = qwen3_vl(**{**inputs, "deepstack_visual_embeds": reversed_layers})
    same = torch.allclose(of_reversed.last_hidden_state, expected, atol=1e-3)
    assert same == (len(layers) == 1)
    of_base_alone = qwen3_vl(inputs_embeds=inputs["inputs_embeds"])
    assert not torch.allclose(of_base_alone.last_hidden_state, expected, atol=1e-3)


@torch.no_grad()
def test_deepstack_decodes_the_same() -> None:
    """Left-padded prompt, then single steps from the KV cache, which carries what was added."""
    model = tiny.model("inject_add", llm="qwen3", layers=[1, 2, 4], placement="first")
    qwen3_vl = qwen3_vl_of(model)
    batch = prompts_with_images_at([[10], [7, 30]], LENGTH)
    batch["attention_mask"][0, :6] = 0

    generated = model.generate(
        **batch,
        do_sample=False,
        max_new_tokens=STEPS,
        min_new_tokens=STEPS,
        return_dict_in_generate=True,
        output_logits=True,
    )

    # The prompt with its images, then one token after the other, which need no images.
    inputs = inputs_of_qwen3_vl(model, batch)
    attention_mask = batch["attention_mask"]
    cache = None
    for step in range(STEPS):
        new_tokens = inputs["inputs_embeds"].shape[1]
        state = qwen3_vl(
            **inputs,
            attention_mask=attention_mask,
            position_ids=positions_of(attention_mask)[:, -new_tokens:],
            past_key_values=cache,
            use_cache=True,
        )
        expected = model.language_model.lm_head(state.last_hidden_state[:, -1])
        torch.testing.assert_close(generated.logits[step], expected, atol=2e-5, rtol=1e-4)

        cache = state.past_key_values
        # the token that was generated, whatever Qwen3-VL itself would have chosen
        next_token = generated.sequences[:, LENGTH + step, None]
        inputs = {"inputs_embeds": model.get_input_embeddings()(next_token)}
        attention_mask = torch.nn.functional.pad(attention_mask, (0, 1), value=1)
