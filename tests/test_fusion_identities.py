"""Strategies that must agree with each other, whatever their weights."""

from typing import Any

import pytest
import torch
from torch import nn

from layerfuse.fusion import parse
from layerfuse.vision.selection import select
from tests.fusion_cases import (
    LLM_WIDTH,
    VISION_WIDTH,
    build,
    random_features,
    randomize,
)

IGVA_GROUPS = "1-6|7-12|13-18|19-24"


@torch.no_grad()
def test_inject_add_closed_gates_are_the_single_layer() -> None:
    """As built, the gates are closed; then the tokens are `single`'s and nothing is added."""
    fusion = build("inject_add", [2, 6], gate=True, base=7)
    single_layer = build("single", [7])
    single_layer.projector.load_state_dict(fusion.projector.state_dict())
    features = random_features(fusion)

    closed = fusion(features)
    # any number but zero opens them
    fusion.gates.fill_(0.5)
    opened = fusion(features)

    assert torch.equal(closed.tokens, single_layer(features).tokens)
    for memory in closed.memory.values():
        assert not memory.any()
    for memory in opened.memory.values():
        assert memory.any()


def test_linear_concat_is_the_sum_of_linears() -> None:
    """Linear(⊕_k h_k) = Σ_k W_k h_k + b, with W_k the columns of layer k."""
    layers = [1, 4, 7]
    fusion = build("concat", layers, projector="linear")
    features = random_features(fusion)
    linear = fusion.projector.linear_1

    # (H, n · Dv) -> n times (H, Dv)
    summed = linear.bias
    weights_of_layers = linear.weight.split(VISION_WIDTH, dim=1)
    for weight, h in zip(weights_of_layers, features.select(layers), strict=True):
        summed = summed + h @ weight.T

    torch.testing.assert_close(fusion(features).tokens, summed)


@torch.no_grad()
def test_mlp_concat_is_a_sum_of_linears_up_to_its_gelu() -> None:
    """The linear fusion of three layers is the MLP one without what follows its first Linear."""
    layers = [3, 18, 23]
    mlp = build("concat", layers, depth=24)
    linear = build("concat", layers, depth=24, projector="linear")
    linear.projector.linear_1.load_state_dict(mlp.projector.linear_1.state_dict())
    features = random_features(mlp)

    activated = nn.functional.gelu(linear(features).tokens)
    expected = mlp.projector.linear_2(activated)

    torch.testing.assert_close(mlp(features).tokens, expected)


def test_group_mean_of_single_layers_is_concat() -> None:
    grouped = build("group_mean", [1, 4], base=7)
    plain = build("concat", [1, 4, 7])
    # both project h_1 ⊕ h_4 ⊕ h_7, so their weights have the same shapes
    grouped.load_state_dict(plain.state_dict())
    features = random_features(plain)

    assert torch.equal(grouped(features).tokens, plain(features).tokens)


def test_external_direct_double_is_triple() -> None:
    """E_D with h_3 and h_18 beside the base h_23 is E_D with h_3, h_18 and h_23."""
    double = build("group_mean", [3, 18], depth=24)
    triple = build("concat", [3, 18, 23], depth=24)
    double.load_state_dict(triple.state_dict())
    features = random_features(triple)

    assert double.config.base == 23
    assert torch.equal(double(features).tokens, triple(features).tokens)


def span(first: int, last: int) -> tuple[int, ...]:
    """The layers from `first` to `last`, both included."""
    return tuple(range(first, last + 1))


@pytest.mark.parametrize(
    ("spec", "groups", "layers_read"),
    [
        # DCI of DenseConnector begins at the embeddings; E_D `all` ends at the last block
        ("0-11|12-23", (span(0, 11), span(12, 23)), span(0, 23)),
        ("all", (span(1, 12), span(13, 24)), span(1, 24)),
        ("former", (span(1, 12),), (*span(1, 12), 23)),
    ],
)
def test_index_sets_of_group_means(
    spec: str, groups: tuple[tuple[int, ...], ...], layers_read: tuple[int, ...]
) -> None:
    """The base layer is h_23, which is read once although it may be in a group too."""
    selection = select(spec, 24)
    # Any: options of the strategy's own class
    config: Any = parse({"name": "group_mean"}).options.resolve(selection)

    assert selection.groups == groups
    assert config.base == 23
    assert config.taps(selection) == layers_read


@pytest.mark.parametrize(("side", "count"), [(24, 720), (27, 911)])
def test_token_concat_counts(side: int, count: int) -> None:
    """STI: 576 + 72 + 72 tokens for CLIP, 729 + 91 + 91 for SigLIP."""
    fusion = build("token_concat", [7, 15], depth=24)
    grid = (side, side)

    # 729 = 91 · 8 + 1: the last token of SigLIP's early layers is dropped
    tokens = fusion(random_features(fusion, images=1, grid=grid)).tokens

    assert fusion.num_tokens(fusion.config, grid, 2) == count
    assert tokens.shape == (1, count, LLM_WIDTH)


@torch.no_grad()
def test_uniform_instruction_weighting_is_the_mean_of_all_layers() -> None:
    """IGVA's first stage: h_23 beside the mean of h_1..h_24, and its static twin as built."""
    fusion = build("instruction_weighted", IGVA_GROUPS, depth=24)
    twin = build("weighted_sum", IGVA_GROUPS, depth=24, beside="concat")
    twin.projector.load_state_dict(fusion.projector.state_dict())
    features = random_features(fusion)

    # groups of equal size: the mean of their means is the mean of all layers
    all_layers = torch.stack(features.select(range(1, 25)))
    base = features.select([23])[0]
    fused = torch.cat([base, all_layers.mean(dim=0)], dim=-1)
    expected = fusion.projector(fused)

    torch.testing.assert_close(fusion(features, guidance="uniform").tokens, expected)
    assert not twin.logits.any()
    torch.testing.assert_close(twin(features).tokens, expected)


@torch.no_grad()
def test_uniform_routing_is_the_static_sum() -> None:
    """What an instruction adds to TGIF is what it gains over this twin."""
    fusion = build("text_routed", "every:1")
    randomize(fusion)
    twin = build("weighted_sum", "every:1", beside="add")
    twin.norm.load_state_dict(fusion.norm.state_dict())
    twin.projector.load_state_dict(fusion.projector.state_dict())
    features = random_features(fusion)

    # as built, the twin's learned weights are uniform too
    uniform = fusion(features, guidance="uniform")

    torch.testing.assert_close(uniform.tokens, twin(features).tokens)
