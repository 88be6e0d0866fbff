"""Gated cross-attention inside a real LLM: what its hooks do in training, copies and threads."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from layerfuse import FusionVLM
from layerfuse.fusion.injector import Injector
from tests import tiny
from tests.checkpointing import compute_blocks_anew
from tests.cross_models import cross_model, each_variant
from tests.random_prompts import prompts_with_images_at

Gradients = dict[str, Tensor]
"""by name of the parameter"""


def gradients(model: FusionVLM, batches: list[dict[str, Tensor]]) -> Gradients:
    """Gradients of the summed losses: every forward first, then one backward."""
    model.zero_grad()
    losses: list[Tensor] = []
    for batch in batches:
        losses.append(model(**batch, labels=batch["input_ids"]).loss)
    torch.stack(losses).sum().backward()

    by_name: Gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            by_name[name] = parameter.grad.clone()
    return by_name


def assert_same(actual: Gradients, expected: Gradients) -> None:
    """The same parameters have the same gradients."""
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-5, rtol=1e-4)


@each_variant
def test_gradients_of_several_forwards_and_of_recomputed_blocks(variant: str) -> None:
    """Two forwards before one backward give the sum of the gradients of each alone, with
    activation checkpointing too."""
    model = cross_model(variant).train()
    first = prompts_with_images_at([[1, 20], [5]])
    second = prompts_with_images_at([[33]])
    of_first = gradients(model, [first])
    of_second = gradients(model, [second])
    of_both: Gradients = {}
    for name, gradient in of_first.items():
        of_both[name] = gradient + of_second[name]

    parts_of_fusion: set[str] = set()
    for name, gradient in of_both.items():
        if name.startswith("fusion."):
            parts_of_fusion.add(name.split(".")[1])
            assert bool(gradient.any()), name
    assert parts_of_fusion >= {"projector", "projectors", "attention"}

    assert_same(gradients(model, [first, second]), of_both)

    # A block is computed anew when the second forward has long replaced what hooks knew of the
    # first one.
    compute_blocks_anew(model)
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert_same(gradients(model, [first]), of_first)
    assert_same(gradients(model, [second, first]), of_both)


@each_variant
def test_nothing_of_a_backward_stays_behind(variant: str) -> None:
    """Text alone after a training step: no image of the last batch may be added to it."""
    model = cross_model(variant).train()
    first = prompts_with_images_at([[1, 20], [5]])
    second = prompts_with_images_at([[33]])
    compute_blocks_anew(model)
    gradients(model, [second, first])
    model.zero_grad()
    model.eval()
    untouched = cross_model(variant).eval()
    untouched.load_state_dict(model.state_dict())

    with torch.no_grad():
        ids = second["input_ids"]
        ids = ids.masked_fill(ids == tiny.IMAGE_ID, 5)
        text = {"input_ids": ids, "attention_mask": second["attention_mask"]}
        torch.testing.assert_close(model(**text).logits, untouched(**text).logits)


def injectors_of(model: FusionVLM) -> list[Injector]:
    """The owners of the hooks of a model, once for each hook."""
    injectors: list[Injector] = []
    for module in model.modules():
        hooks = module._forward_pre_hooks  # noqa: SLF001 - torch lists them nowhere else
        for hook in hooks.values():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, Injector):
                injectors.append(owner)
    return injectors


@pytest.mark.parametrize("checkpointing", [False, True])
@each_variant
def test_hooks_keep_nothing_after_a_backward(variant: str, checkpointing: bool) -> None:
    """What they hold between the parts of a block would hold a batch and its graph in memory."""
    model = cross_model(variant).train()
    if checkpointing:
        compute_blocks_anew(model)

    gradients(model, [prompts_with_images_at([[1, 20], []])])

    injectors = injectors_of(model)
    # every block has hooks, since each must take the keyword with the images
    assert len(injectors) >= model.config.text_config.num_hidden_layers
    for injector in injectors:
        assert not injector.pending
        assert not injector.visual


@pytest.mark.parametrize("checkpointing", [False, True])
@each_variant
def test_deepcopy_after_a_backward(variant: str, checkpointing: bool) -> None:
    """The copy works, has hooks of its own, and leaves the first model alone."""
    model = cross_model(variant).train()
    if checkpointing:
        compute_blocks_anew(model)
    batch = prompts_with_images_at([[1, 20], []])
    gradients(model, [batch])

    twin = copy.deepcopy(model).eval()
    model.eval()

    with torch.no_grad():
        expected = model(**batch).logits
        assert torch.equal(twin(**batch).logits, expected)
        # read by the hooks alone: those of the copy must read the weights of the copy
        for name, parameter in twin.fusion.named_parameters():
            if name.endswith("output.weight"):
                parameter.zero_()
        assert not torch.allclose(twin(**batch).logits, expected, atol=1e-2)
        assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("variant", ["post-mlp", "parallel", "released"])
@torch.no_grad()
def test_compiles_without_graph_breaks(variant: str) -> None:
    """`pre` is compiled with the other strategies."""
    # graphs of other tests would count against the limit of recompilations
    torch.compiler.reset()
    # each block of the LLM is traced anew: two are enough
    model = cross_model(variant, llm_blocks=2, placement=[0, 1])
    batch = prompts_with_images_at([[1], [5]])
    expected = model(**batch, use_cache=False).logits

    compiled = torch.compile(model, fullgraph=True, backend="eager")

    torch.testing.assert_close(compiled(**batch, use_cache=False).logits, expected)


@pytest.mark.parametrize("variant", ["pre", "post", "parallel", "released"])
@torch.no_grad()
def test_two_threads_do_not_mix_their_images(variant: str) -> None:
    """One model answers several questions at once, as on a web page."""
    model = cross_model(variant)
    batches = [prompts_with_images_at([[5], [20]]) for _ in range(2)]
    expected = [model(**batch).logits for batch in batches]

    def gives_the_same(question: int) -> bool:
        batch = batches[question % 2]
        return torch.allclose(model(**batch).logits, expected[question % 2], atol=1e-5)

    # in turn, so that what runs side by side has other images
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(gives_the_same, range(60)))

    assert all(results)
