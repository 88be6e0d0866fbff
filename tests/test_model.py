"""Invariants of FusionVLM, over strategies, LLM families and encoders."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForImageTextToText

from layerfuse import FusionVLM
from layerfuse.errors import LayerfuseError
from layerfuse.fusion import FUSIONS
from tests import tiny
from tests.checkpointing import compute_blocks_anew
from tests.combinations import each_strategy, everywhere
from tests.random_prompts import positions_of, prompts, visual_inputs_of_row

NOT_LABELLED = -100
"""the label at which transformers computes no loss"""


@everywhere
@torch.no_grad()
def test_saved_and_loaded_model_is_the_same(
    strategy: str, llm: str, encoder: str, tmp_path: Path
) -> None:
    # Statistics of `whiten` and the token scale are buffers, no parameters: they must be saved too.
    model = tiny.model(strategy, encoder, llm, normalize="whiten", token_scale=2.0)
    batch = prompts(model, [1, 2])
    features = model.encode_images(batch["pixel_values"])
    model.fusion.calibrate(features, model.embedding_std)
    expected = model(**batch).logits

    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()

    assert isinstance(loaded, FusionVLM)
    assert torch.equal(loaded(**batch).logits, expected)
    weights = model.state_dict()
    loaded_weights = loaded.state_dict()
    assert weights.keys() == loaded_weights.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, loaded_weights[name]), name


@everywhere
@torch.no_grad()
def test_left_padding_and_neighbours_do_not_matter(strategy: str, llm: str, encoder: str) -> None:
    """Each row alone, without padding, gives the logits that it gives in a padded batch."""
    model = tiny.model(strategy, encoder, llm)
    batch = prompts(model, [2, 0, 1])
    longest = batch["input_ids"].shape[1]
    lengths = [longest, 25, 41]
    rows: list[Tensor] = []
    for row, length in enumerate(lengths):
        content = batch["input_ids"][row, :length].clone()
        padding = torch.zeros(longest - length).long()
        batch["input_ids"][row] = torch.cat([padding, content])
        batch["attention_mask"][row, : len(padding)] = 0
        rows.append(content[None])
    pixels_of_rows = [batch["pixel_values"][:2], None, batch["pixel_values"][2:]]

    # without padding a row starts at position 0, as its content does here
    position_ids = positions_of(batch["attention_mask"])
    together = model(**batch, position_ids=position_ids).logits

    for row, length in enumerate(lengths):
        visual_inputs = visual_inputs_of_row(batch, row, pixels_of_rows[row])
        logits_of_row = model(input_ids=rows[row], **visual_inputs).logits
        torch.testing.assert_close(together[row, -length:], logits_of_row[0], atol=3e-5, rtol=1e-4)


def parameters_without_gradient(model: FusionVLM) -> list[str]:
    """Names of the parameters of the fusion and the LLM that a backward pass left out."""
    names: list[str] = []
    for part in (model.fusion, model.language_model):
        for name, parameter in part.named_parameters():
            if parameter.grad is None or not bool(parameter.grad.any()):
                names.append(name)
    return names


@everywhere
def test_every_layer_and_parameter_gets_gradient(strategy: str, llm: str, encoder: str) -> None:
    """As built, with closed gates: those open in the first optimizer step. Behind the second gate
    of `deformable` (its self-attention) gradient needs one step more."""
    model = tiny.model(strategy, encoder, llm, open_gates=False).train()
    batch = prompts(model, [1, 2])
    pixels = batch.pop("pixel_values")
    encoded = model.encode_images(pixels)
    # The patches of each layer as leaves, so that gradient can be told apart by layer.
    patches = [layer.detach().requires_grad_() for layer in encoded.patches]
    summary = [layer.detach() for layer in encoded.summary]
    features = replace(encoded, patches=tuple(patches), summary=tuple(summary))
    labels = batch["input_ids"].clone()
    # What stands before an answer is the prompt, which a router reads.
    labels[:, :50] = NOT_LABELLED
    steps = 3 if strategy == "deformable" else 2

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    without_gradient: list[str] = []
    for _ in range(steps):
        optimizer.zero_grad()
        for layer in patches:
            layer.grad = None
        model(**batch, features=features, labels=labels).loss.backward()
        without_gradient = parameters_without_gradient(model)
        optimizer.step()

    assert not without_gradient
    for layer in patches:
        assert layer.grad is not None
        assert bool(layer.grad.any())


def gradients_of(model: FusionVLM) -> dict[str, Tensor]:
    """The gradients that the last backward passes left, by name of the parameter."""
    gradients: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients[name] = parameter.grad
    return gradients


@each_strategy
def test_activation_checkpointing_gives_the_same_gradients(strategy: str) -> None:
    """A block that is computed anew must get the same images once more."""
    gradients: list[dict[str, Tensor]] = []
    for checkpointing in (False, True):
        model = tiny.model(strategy).train()
        if checkpointing:
            compute_blocks_anew(model)
        torch.manual_seed(5)
        batch = prompts(model, [1, 2])
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        gradients.append(gradients_of(model))

    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(gradient, checkpointed[name], atol=1e-6, rtol=1e-5)


@each_strategy
@torch.no_grad()
def test_deepcopy_is_independent(strategy: str) -> None:
    """Hooks on the LLM of the copy must read the fusion of the copy."""
    model = tiny.model(strategy)
    batch = prompts(model, [1])
    expected = model(**batch).logits

    twin = copy.deepcopy(model)
    for parameter in model.fusion.parameters():
        parameter.zero_()

    assert torch.equal(twin(**batch).logits, expected)
    assert not torch.equal(model(**batch).logits, expected)


@each_strategy
@torch.no_grad()
def test_compiles_without_graph_breaks(strategy: str) -> None:
    # Graphs of other strategies would count against the limit of recompilations.
    torch.compiler.reset()
    # Every block of the LLM is traced anew: it has no more of them than the strategy needs.
    kind = FUSIONS[strategy][1].kind
    llm_blocks = 3 if kind.startswith("internal") else 1
    model = tiny.model(strategy, llm_blocks=llm_blocks)
    batch = prompts(model, [1, 1])
    expected = model(**batch, use_cache=False).logits

    compiled = torch.compile(model, fullgraph=True, backend="eager")

    torch.testing.assert_close(compiled(**batch, use_cache=False).logits, expected)


@each_strategy
def test_lora_on_the_llm_leaves_the_fusion_trainable(strategy: str) -> None:
    """peft freezes and renames what it wraps; here that is the LLM alone."""
    model = tiny.model(strategy)
    batch = prompts(model, [1])
    with torch.no_grad():
        expected = model(**batch).logits

    adapted = get_peft_model(model.language_model, LoraConfig(target_modules=["q_proj"]))
    # The second matrix of a fresh adapter is zero: nothing may have changed.
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, expected)

    model.train()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    for name, parameter in model.fusion.named_parameters():
        assert parameter.grad is not None, name
    trained_in_llm: list[str] = []
    for name, parameter in model.language_model.named_parameters():
        if parameter.grad is not None:
            trained_in_llm.append(name)
    assert trained_in_llm
    assert all("lora_" in name for name in trained_in_llm)

    adapted.merge_and_unload()
    assert not any("lora_" in name for name, _ in model.named_parameters())


@torch.no_grad()
def test_loss_at_labelled_positions_is_the_whole_loss() -> None:
    """Training computes logits only where a label is; the loss and its scale stay the same."""
    model = tiny.model("concat")
    batch = prompts(model, [1, 2])
    # Four labels, so that another number of items in the batch shows in the scale.
    labels = torch.full_like(batch["input_ids"], NOT_LABELLED)
    labels[0, 30:33] = batch["input_ids"][0, 30:33]
    labels[1, 50] = batch["input_ids"][1, 50]
    expected = model(**batch, labels=labels)

    model.train()
    in_training = model(**batch, labels=labels)
    of_twice_as_many = model(**batch, labels=labels, num_items_in_batch=8)

    assert in_training.logits is None
    torch.testing.assert_close(in_training.loss, expected.loss)
    torch.testing.assert_close(of_twice_as_many.loss, expected.loss / 2)


@each_strategy
@torch.no_grad()
def test_cached_features_are_the_same_as_pixels(strategy: str) -> None:
    model = tiny.model(strategy)
    batch = prompts(model, [1, 2])
    expected = model(**batch).logits

    # without pixels, which would be encoded beside the features
    pixels = batch.pop("pixel_values")
    features = model.encode_images(pixels)

    assert torch.equal(model(**batch, features=features).logits, expected)


def test_wrong_number_of_image_tokens() -> None:
    """An image must never be spread over two rows without a word."""
    model = tiny.model("concat")
    batch = prompts(model, [1, 1])
    pixels = batch.pop("pixel_values")

    with pytest.raises(LayerfuseError, match=r"32 image tokens in the text, but 1 images of 16"):
        model(**batch, pixel_values=pixels[:1])

    # One token moves from the first row to the second: the sum alone would not tell.
    batch["input_ids"][0, 3] = 9
    batch["input_ids"][1, 40] = tiny.IMAGE_ID
    with pytest.raises(LayerfuseError, match=r"by row: \[15, 17\]"):
        model(**batch, pixel_values=pixels)
