"""Gated cross-attention inside a real LLM: decoded tokens and beams see the images of their row."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from tests.cross_models import cross_model, each_variant, in_two_families, visual_of
from tests.random_prompts import positions_of, prompts_with_images_at

STEPS = 5
GREEDY: dict[str, Any] = {
    "do_sample": False,
    # a random model may end its answer at once
    "max_new_tokens": STEPS,
    "min_new_tokens": STEPS,
    "return_dict_in_generate": True,
    "output_logits": True,
}
BEAMS: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 3,
    "num_return_sequences": 2,
    "max_new_tokens": STEPS,
    "min_new_tokens": STEPS,
    "return_dict_in_generate": True,
    "output_scores": True,
}


def left_padded_prompts() -> dict[str, Tensor]:
    """Rows of 60 tokens with two images, none and one; the first two begin with padding."""
    batch = prompts_with_images_at([[6, 28], [], [33]])
    batch["attention_mask"][0, :4] = 0
    batch["attention_mask"][1, :30] = 0
    is_padding = batch["attention_mask"] == 0
    batch["input_ids"] = batch["input_ids"].masked_fill(is_padding, 0)
    return batch


def assert_logits_of_steps(generated: Any, expected: Tensor) -> None:
    """The logits of every step are the expected ones (rows, steps, vocabulary)."""
    stepwise = torch.stack(generated.logits, dim=1)
    torch.testing.assert_close(stepwise, expected, atol=3e-5, rtol=1e-4)


@in_two_families
@torch.no_grad()
def test_decoding_is_one_forward_over_everything(variant: str, llm: str) -> None:
    """With a growing cache, with none, and with a static one."""
    model = cross_model(variant, llm)
    batch = left_padded_prompts()

    cached = model.generate(**batch, **GREEDY)
    uncached = model.generate(**batch, **GREEDY, use_cache=False)
    # transformers would compile every step with a static cache, which takes seconds
    static = model.generate(
        **batch,
        **GREEDY,
        cache_implementation="static",
        disable_compile=True,
    )

    attention_mask = nn.functional.pad(batch["attention_mask"], (0, STEPS), value=1)
    logits = model(
        input_ids=cached.sequences,
        attention_mask=attention_mask,
        position_ids=positions_of(attention_mask),
        pixel_values=batch["pixel_values"],
    ).logits
    # the logits of a token stand at the position before it
    expected = logits[:, -STEPS - 1 : -1]
    assert_logits_of_steps(cached, expected)
    assert_logits_of_steps(uncached, expected)
    assert_logits_of_steps(static, expected)

    # with the tokens of the images but without cross-attention the first step must be another
    visual = visual_of(model, batch).without_memory()
    without_memory = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        visual=visual,
    ).logits
    assert not torch.allclose(without_memory[0, -1], cached.logits[0][0], atol=1e-3)


@torch.no_grad()
def test_decoded_tokens_look_at_the_memory() -> None:
    """The step after the prompt is that of one forward over both, and not what the KV cache alone
    gives."""
    model = cross_model("post")
    batch = prompts_with_images_at([[6]])
    prompt = model(**batch, use_cache=True)
    assert prompt.visual is not None
    next_token = torch.tensor([[50]])

    # a forward appends to the cache it is given
    cache = copy.deepcopy(prompt.past_key_values)
    with_memory = model(input_ids=next_token, past_key_values=cache, visual=prompt.visual).logits
    without_memory = model(input_ids=next_token, past_key_values=prompt.past_key_values).logits

    assert float((with_memory - without_memory).abs().max()) > 1e-2
    sequence = torch.cat([batch["input_ids"], next_token], dim=1)
    whole = model(input_ids=sequence, pixel_values=batch["pixel_values"]).logits
    torch.testing.assert_close(with_memory, whole[:, -1:], atol=3e-5, rtol=1e-4)


@each_variant
@torch.no_grad()
def test_beams_are_those_of_each_row_alone(variant: str) -> None:
    """Beams are reordered at every step: their memory must move along."""
    model = cross_model(variant)
    batch = prompts_with_images_at([[2, 21], [], [30]])
    pixels = batch["pixel_values"]
    visual_inputs_of_rows: list[dict[str, Tensor]] = [
        {"pixel_values": pixels[:2]},
        {},
        {"pixel_values": pixels[2:]},
    ]

    together = model.generate(**batch, **BEAMS)

    for row, visual_inputs in enumerate(visual_inputs_of_rows):
        answer_of_row = model.generate(
            input_ids=batch["input_ids"][row : row + 1],
            attention_mask=batch["attention_mask"][row : row + 1],
            **visual_inputs,
            **BEAMS,
        )
        # two sequences are returned for each row
        of_row = slice(2 * row, 2 * row + 2)
        torch.testing.assert_close(
            together.sequences_scores[of_row],
            answer_of_row.sequences_scores,
            atol=2e-5,
            rtol=1e-4,
        )
        assert torch.equal(together.sequences[of_row], answer_of_row.sequences)


@each_variant
@torch.no_grad()
def test_scores_of_beams_are_those_of_one_forward(variant: str) -> None:
    """Each beam of a row has all images of that row, in their order."""
    model = cross_model(variant)
    batch = prompts_with_images_at([[2, 21], [30]])

    generated = model.generate(**batch, **BEAMS)

    of_first_row = batch["pixel_values"][:2]
    of_second_row = batch["pixel_values"][2:]
    # two sequences are returned for each row
    pixels = torch.cat([of_first_row, of_first_row, of_second_row, of_second_row])
    logits = model(input_ids=generated.sequences, pixel_values=pixels).logits
    answers = generated.sequences[:, -STEPS:, None]
    log_probabilities = logits[:, -STEPS - 1 : -1].log_softmax(dim=-1)
    # transformers scores a beam by the mean over its tokens
    expected = log_probabilities.gather(2, answers).mean(dim=(1, 2))
    torch.testing.assert_close(generated.sequences_scores, expected, atol=2e-5, rtol=1e-4)
