"""The weights that an instruction decides, and the terms of the loss that spread them."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from layerfuse.fusion import Fused, Fusion
from layerfuse.fusion.guided import entropy
from tests import naive
from tests.fusion_cases import (
    SENTENCE_WIDTH,
    VISION_WIDTH,
    build,
    random_features,
    random_instruction,
    randomize,
)

FOUR_GROUPS = "1-2|3-4|5-6|7-8"


@torch.no_grad()
def test_instruction_weights_sum_to_one_and_follow_the_instruction() -> None:
    fusion = build("instruction_weighted", FOUR_GROUPS)
    randomize(fusion)
    features = random_features(fusion, images=5)

    weights = fusion(features, random_instruction(fusion, 5)).notes["weights"]
    # the same images, other questions
    under_another = fusion(features, random_instruction(fusion, 5)).notes["weights"]

    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(5).double())
    assert bool((weights > 0).all())
    assert not torch.allclose(weights, under_another)


@pytest.mark.parametrize("identity", [False, True])
@torch.no_grad()
def test_allocator_does_not_know_the_order_of_groups(identity: bool) -> None:
    """As published, only the last Linear tells groups apart: permuting the groups changes nothing
    of the weights, and permuting its rows permutes them; `group_identity` tells them apart."""
    fusion = build("instruction_weighted", [1, 4, 6, 8], group_identity=identity)
    randomize(fusion)
    allocator = fusion.allocator
    summaries = torch.randn(3, 4, VISION_WIDTH).double()
    question = torch.randn(3, SENTENCE_WIDTH).double()
    order = torch.tensor([2, 0, 3, 1])

    before = allocator(question, summaries)
    permuted_inputs = allocator(question, summaries[:, order])
    to_permute: list[Tensor] = [allocator.output.weight, allocator.output.bias]
    if identity:
        to_permute.append(allocator.identity)
    for parameter in to_permute:
        # a copy: the rows are read from what is being written
        parameter.copy_(parameter[order].clone())
    permuted_throughout = allocator(question, summaries[:, order])

    same_weights = torch.allclose(permuted_inputs, before)
    assert same_weights != identity
    torch.testing.assert_close(permuted_throughout, before[:, order])


LAMBDA = 0.02
UNIFORM = [0.25, 0.25, 0.25, 0.25]
ONE_GROUP = [1.0, 0.0, 0.0, 0.0]
BETWEEN = [0.1, 0.2, 0.3, 0.4]
WEIGHTS = [UNIFORM, ONE_GROUP, BETWEEN]


def naive_entropy(weights: list[float]) -> float:
    """-Σ w log w in nats, with 0 log 0 = 0."""
    total = 0.0
    for weight in weights:
        if weight > 0:
            total -= weight * math.log(weight)
    return total


def mean_entropy(rows: list[list[float]]) -> float:
    """The mean over a batch of H(w)."""
    return sum(naive_entropy(row) for row in rows) / len(rows)


def entropy_of_mean(rows: list[list[float]]) -> float:
    """H of the mean of w over a batch."""
    mean = np.array(rows).mean(axis=0)
    return naive_entropy(mean.tolist())


def penalty(fusion: Fusion, weights: list[list[float]]) -> float | None:
    """The term of the loss for a batch of weights (B, n)."""
    # a penalty reads the weights and no tokens
    fused = Fused(torch.zeros(1), notes={"weights": torch.tensor(weights)})
    term = fusion.penalty(fused)
    if term is None:
        return None
    return float(term)


def regularized(regularizer: str) -> Fusion:
    return build(
        "instruction_weighted",
        FOUR_GROUPS,
        regularizer=regularizer,
        regularizer_weight=LAMBDA,
    )


def test_no_regularizer() -> None:
    assert penalty(regularized("off"), WEIGHTS) is None


def test_entropy_is_the_mean_of_entropies() -> None:
    """−λ · mean_b H(w_b), as the paper means it."""
    expected = -LAMBDA * mean_entropy(WEIGHTS)
    assert penalty(regularized("entropy"), WEIGHTS) == pytest.approx(expected)


def test_released_takes_a_second_softmax() -> None:
    """−λ · mean_b H(softmax(w_b)), as the public code has it."""
    softened: list[list[float]] = []
    for row in WEIGHTS:
        softened.append(naive.softmax(np.array(row)).tolist())
    expected = -LAMBDA * mean_entropy(softened)
    assert penalty(regularized("released"), WEIGHTS) == pytest.approx(expected)


def test_balance_is_the_entropy_of_the_mean() -> None:
    """−λ · H(mean_b w_b)"""
    expected = -LAMBDA * entropy_of_mean(WEIGHTS)
    assert penalty(regularized("balance"), WEIGHTS) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("regularizer", "highest"),
    [
        ("released", -1.2682),
        ("entropy", 0.0),
    ],
)
def test_released_regularizer_is_nearly_constant(regularizer: str, highest: float) -> None:
    """It stays in [−1.3863, −1.2682]·λ; the meant one in [−1.3863, 0]·λ."""
    fusion = regularized(regularizer)

    at_uniform = penalty(fusion, [UNIFORM])
    at_one_group = penalty(fusion, [ONE_GROUP])

    # log 4 = 1.3863
    assert at_uniform == pytest.approx(-1.3863 * LAMBDA, rel=1e-4)
    assert at_one_group == pytest.approx(highest * LAMBDA, rel=1e-4, abs=1e-9)
    # any weights lie between these two
    # a concentration below one: most draws are near a corner, where the released term is highest
    peaked = torch.distributions.Dirichlet(torch.full((4,), 0.3))
    for weights in peaked.sample((200,)).tolist():
        value = penalty(fusion, [weights])
        assert value is not None
        assert -1.38635 * LAMBDA <= value <= highest * LAMBDA * 0.9999


def test_balance_lets_each_image_choose() -> None:
    """Images that each want one group, all groups alike, are at the optimum of `balance` only."""
    each_another_group = torch.eye(4).tolist()

    # the mean over the batch is uniform, while every row is certain
    optimum = -LAMBDA * math.log(4)
    assert penalty(regularized("balance"), each_another_group) == pytest.approx(optimum)
    assert penalty(regularized("entropy"), each_another_group) == pytest.approx(0)


def test_router_spreads_the_batch_only_if_asked() -> None:
    as_published = build("text_routed", [1, 2, 3, 4])
    spreading = build("text_routed", [1, 2, 3, 4], entropy_weight=0.5)

    assert penalty(as_published, WEIGHTS) is None
    expected = -0.5 * entropy_of_mean(WEIGHTS)
    assert penalty(spreading, WEIGHTS) == pytest.approx(expected)


def test_a_collapsed_router_has_a_finite_penalty() -> None:
    """w log w has no finite gradient at zero, where softmax ends up for logits this far apart."""
    logits = torch.tensor([[0.0, 200.0]], requires_grad=True)

    total = entropy(logits.softmax(dim=-1)).sum()
    total.backward()

    assert total.item() == 0
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
