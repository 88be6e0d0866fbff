"""Generated answers: the logits of every step are those of one forward over everything."""

from typing import Any

import pytest
import torch
from torch import Tensor

from layerfuse import FusionVLM
from tests import tiny
from tests.combinations import each_strategy, everywhere
from tests.random_prompts import prompts, visual_inputs_of_row

GREEDY_WITH_LOGITS: dict[str, Any] = {
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_logits": True,
}


def logits_of_one_forward(model: FusionVLM, batch: dict[str, Tensor], sequences: Tensor) -> Tensor:
    """(rows, T, vocabulary): one forward over prompts and answers together.

    Args:
        model: which has generated the answers.
        batch: the prompts.
        sequences: (rows, T), each prompt followed by its answer.
    """
    # A router reads the prompt, which in training ends where the labels begin.
    prompt_length = batch["input_ids"].shape[1]
    in_prompt = torch.arange(sequences.shape[1]) < prompt_length
    labels = sequences.masked_fill(in_prompt, -100)

    visual_inputs: dict[str, Tensor] = {}
    for name in ("pixel_values", "instruction"):
        if name in batch:
            visual_inputs[name] = batch[name]
    return model(input_ids=sequences, labels=labels, **visual_inputs).logits


@everywhere
@torch.no_grad()
def test_decoding_with_cache_gives_the_same_logits(strategy: str, llm: str, encoder: str) -> None:
    """Prefill and single steps equal one forward over everything."""
    model = tiny.model(strategy, encoder, llm)
    batch = prompts(model, [1, 2])

    # A random model may end its answer at once: then no step with a cache would be tested.
    generated = model.generate(**batch, **GREEDY_WITH_LOGITS, max_new_tokens=6, min_new_tokens=6)

    whole = logits_of_one_forward(model, batch, generated.sequences)
    stepwise = torch.stack(generated.logits, dim=1)
    # The logits of a token stand at the position before it.
    torch.testing.assert_close(stepwise, whole[:, -7:-1], atol=2e-5, rtol=1e-4)


@each_strategy
@torch.no_grad()
def test_generation_without_cache_gives_the_same_logits(strategy: str) -> None:
    """Guided strategies too are guided by the prompt alone, not by what was generated."""
    model = tiny.model(strategy)
    batch = prompts(model, [1, 0])
    options = {**GREEDY_WITH_LOGITS, "max_new_tokens": 4, "min_new_tokens": 4}

    cached = model.generate(**batch, **options)
    uncached = model.generate(**batch, **options, use_cache=False)

    torch.testing.assert_close(
        torch.stack(uncached.logits),
        torch.stack(cached.logits),
        atol=2e-5,
        rtol=1e-4,
    )


@each_strategy
@torch.no_grad()
def test_static_cache_decodes_the_same(strategy: str) -> None:
    """A static cache has its full length from the start, in which nothing of it may be read."""
    model = tiny.model(strategy)
    batch = prompts(model, [1, 1])
    # transformers would compile every step with a static cache, which takes seconds.
    options = {**GREEDY_WITH_LOGITS, "max_new_tokens": 6, "disable_compile": True}

    dynamic = model.generate(**batch, **options)
    static = model.generate(**batch, **options, cache_implementation="static")

    assert torch.equal(static.sequences, dynamic.sequences)
    torch.testing.assert_close(
        torch.stack(static.logits),
        torch.stack(dynamic.logits),
        atol=2e-5,
        rtol=1e-4,
    )


@each_strategy
@torch.no_grad()
def test_beams_keep_each_rows_images(strategy: str) -> None:
    """Several rows with several images in beam search equal each row alone."""
    model = tiny.model(strategy)
    batch = prompts(model, [2, 0, 1])
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False}

    together = model.generate(**batch, **options)

    pixels_of_rows = [batch["pixel_values"][:2], None, batch["pixel_values"][2:]]
    for row in range(3):
        input_ids = batch["input_ids"][row : row + 1]
        answer_of_row = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            **options,
            **visual_inputs_of_row(batch, row, pixels_of_rows[row]),
        )
        # In the batch a row that ends early is padded up to the longest answer.
        length = answer_of_row.shape[1]
        assert together[row, :length].tolist() == answer_of_row[0].tolist()

    # Features of the store must follow the beams as pixels do.
    pixels = batch.pop("pixel_values")
    features = model.encode_images(pixels)
    from_features = model.generate(**batch, features=features, **options)
    assert torch.equal(from_features, together)


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True, "top_k": 1}]
)
def test_a_picture_that_is_given_once_follows_all_rows_that_show_it(
    options: dict[str, Any],
) -> None:
    model = tiny.model("concat")
    batch = prompts(model, [2, 1])
    first, second, _ = batch.pop("pixel_values")
    options = {"do_sample": False, "max_new_tokens": 5, **options}
    each = torch.stack([first, second, first])

    once = model.generate(
        **batch,
        pixel_values=torch.stack([first, second]),
        image_index=torch.tensor([0, 1, 0]),
        **options,
    )

    assert torch.equal(once, model.generate(**batch, pixel_values=each, **options))
