"""`inject_add` with `placement: first` is the text model of transformers' Qwen3-VL."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3VLTextConfig, Qwen3VLTextModel

from layerfuse import FusionVLM
from tests import tiny

TOKENS = 16


def qwen3_vl(model: FusionVLM) -> Qwen3VLTextModel:
    """Qwen3-VL's text model with the weights of the model's Qwen3.

    Positions that are the same in time, height and width make its three-part rotation the plain
    one, so that only the base of the rotation must agree.
    """
    plain = model.config.text_config
    rope = {**plain.rope_parameters, "mrope_section": [2, 1, 1]}
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "head_dim", "vocab_size", "rms_norm_eps", "attention_bias")
    names += ("max_position_embeddings", "hidden_act", "pad_token_id")
    config = Qwen3VLTextConfig(**{n: getattr(plain, n) for n in names}, rope_parameters=rope)
    other = Qwen3VLTextModel(config).eval()
    other.load_state_dict(model.get_decoder().state_dict())
    return other


def given(model: FusionVLM, rows: list[list[int]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Rows of 50 tokens with images that start at the given places, and pixels; the same for
    Qwen3-VL: its embeddings, image positions and one tensor per tap, the shallowest first."""
    ids = torch.randint(4, 300, (len(rows), 50))
    for row, starts in enumerate(rows):
        for start in starts:
            ids[row, start : start + TOKENS] = tiny.IMAGE_ID
    pixels = torch.randn(sum(map(len, rows)), 3, tiny.SIZE, tiny.SIZE)
    mask, features = ids == tiny.IMAGE_ID, model.encode_images(pixels)
    embeds = model.get_input_embeddings()(ids)
    fusion: Any = model.fusion
    (base,) = features.select([fusion.config.base])
    embeds[mask] = fusion.projector(base).flatten(0, 1)
    taps = features.select(model.config.vision_layers)
    deep = [p(x).flatten(0, 1) for p, x in zip(fusion.projectors, taps, strict=True)]
    theirs = {"inputs_embeds": embeds, "visual_pos_masks": mask, "deepstack_visual_embeds": deep}
    return {"input_ids": ids, "pixel_values": pixels}, theirs


@pytest.mark.parametrize("layers", [[1, 2, 4], [0, 3], [2]])
@torch.no_grad()
def test_deepstack_is_inject_add_placed_first(layers: list[int]) -> None:
    model = tiny.model("inject_add", llm="qwen3", layers=layers, placement="first")
    other = qwen3_vl(model)
    own, theirs = given(model, [[3], [1, 25], []])
    found = model(**own, output_hidden_states=True)
    expected = other(**theirs, output_hidden_states=True)
    last = expected.last_hidden_state
    torch.testing.assert_close(found.hidden_states[-1], last, atol=1e-5, rtol=1e-5)
    logits = model.language_model.lm_head(last)
    torch.testing.assert_close(found.logits, logits, atol=1e-5, rtol=1e-5)
    other_order = {**theirs, "deepstack_visual_embeds": theirs["deepstack_visual_embeds"][::-1]}
    same = torch.allclose(other(**other_order).last_hidden_state, last, atol=1e-3)
    assert same == (len(layers) == 1)
    without = {"inputs_embeds": theirs["inputs_embeds"]}
    assert not torch.allclose(other(**without).last_hidden_state, last, atol=1e-3)


@torch.no_grad()
def test_deepstack_decodes_the_same() -> None:
    """Left-padded prompt, then single steps from the KV cache, which carries what was added."""
    model = tiny.model("inject_add", llm="qwen3", layers=[1, 2, 4], placement="first")
    other = qwen3_vl(model)
    own, theirs = given(model, [[10], [7, 30]])
    attention = torch.ones_like(own["input_ids"])
    attention[0, :6] = 0
    answer = {"attention_mask": attention, "max_new_tokens": 5, "min_new_tokens": 5}
    out = model.generate(
        **own, **answer, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    cache, step = None, theirs
    for k in range(5):
        positions = (attention.cumsum(dim=1) - 1).clamp_min(0)
        positions = positions[:, -step["inputs_embeds"].shape[1] :]
        state = other(
            **step,
            attention_mask=attention,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        cache = state.past_key_values
        logits = model.language_model.lm_head(state.last_hidden_state[:, -1])
        torch.testing.assert_close(out.logits[k], logits, atol=2e-5, rtol=1e-4)
        step = {"inputs_embeds": model.get_input_embeddings()(out.sequences[:, 50 + k, None])}
        attention = torch.nn.functional.pad(attention, (0, 1), value=1)
