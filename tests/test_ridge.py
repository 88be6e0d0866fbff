"""Ridge regression from sums, against a solver that sees all tokens at once."""

import numpy as np
import pytest
import torch
from torch import Tensor

from layerfuse.train.ridge import (
    STRENGTHS,
    RegressionSums,
    fit_ridge,
    solve_ridge,
    squared_error,
)


def tokens(count: int, seed: int = 0, noise: float = 0.3) -> tuple[Tensor, Tensor]:
    """Inputs (count, 5) far from zero, and targets (count, 3) that depend on them linearly."""
    generator = torch.Generator().manual_seed(seed)
    inputs = 4 + torch.randn(count, 5, generator=generator, dtype=torch.float64)
    # The same map whatever the seed.
    true_map = torch.arange(15, dtype=torch.float64).view(5, 3).cos()
    spread = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return inputs, inputs @ true_map - 2 + noise * spread


def sums_in_parts(inputs: Tensor, targets: Tensor, size: int) -> RegressionSums:
    """The sums of a stream of batches."""
    sums = RegressionSums.of(inputs[:size], targets[:size])
    for start in range(size, len(inputs), size):
        end = start + size
        sums = sums.joined(RegressionSums.of(inputs[start:end], targets[start:end]))
    return sums


@pytest.mark.parametrize("strength", [1e-8, 0.1, 10.0])
def test_the_fit_is_least_squares_of_the_augmented_system(strength: float) -> None:
    """Ridge is least squares with a row √penalty · e_i for each input, whose target is zero."""
    inputs, targets = tokens(40)
    x = inputs.numpy()
    y = targets.numpy()
    scatter = (x - x.mean(axis=0)).T @ (x - x.mean(axis=0))
    penalty = strength * np.trace(scatter) / 5
    # A column of ones is the intercept, which has no row of its own: it is not penalised.
    rows = np.vstack([np.column_stack([x, np.ones(40)]), np.sqrt(penalty) * np.eye(5, 6)])
    expected, *_ = np.linalg.lstsq(rows, np.vstack([y, np.zeros((5, 3))]), rcond=None)

    weight, bias = solve_ridge(sums_in_parts(inputs, targets, size=7), strength)

    assert weight.numpy() == pytest.approx(expected[:5].T, rel=1e-9)
    assert bias.numpy() == pytest.approx(expected[5], rel=1e-9)


def test_sums_of_parts_are_those_of_the_whole() -> None:
    inputs, targets = tokens(40)

    whole = RegressionSums.of(inputs, targets)
    parts = sums_in_parts(inputs.view(8, 5, 5), targets.view(8, 5, 3), size=3)

    assert parts.count == whole.count
    for name in ("input_mean", "target_mean", "input_scatter", "cross_scatter", "target_scatter"):
        torch.testing.assert_close(vars(parts)[name], vars(whole)[name])


def test_the_error_from_sums_is_that_of_the_tokens() -> None:
    inputs, targets = tokens(40)
    weight = torch.ones(3, 5, dtype=torch.float64)
    bias = torch.arange(3, dtype=torch.float64)

    error = squared_error(RegressionSums.of(inputs, targets), weight, bias)

    missed = targets - (inputs @ weight.T + bias)
    assert error == pytest.approx(float(missed.square().sum()))


def test_the_strength_is_the_best_on_tokens_that_were_held_out() -> None:
    # Six tokens of five channels: without a penalty the fit follows their noise.
    few_inputs, few_targets = tokens(6, noise=2)
    new_inputs, new_targets = tokens(200, seed=1, noise=2)
    few = RegressionSums.of(few_inputs, few_targets)
    new = RegressionSums.of(new_inputs, new_targets)
    errors = {}
    for strength in STRENGTHS:
        weight, bias = solve_ridge(few, strength)
        missed = new_targets - (new_inputs @ weight.T + bias)
        errors[strength] = float(missed.square().sum())

    fit = fit_ridge(few, new)

    best = min(errors, key=errors.__getitem__)
    assert fit.strength == best
    assert STRENGTHS[0] < best < STRENGTHS[-1]
    variance = (new_targets - new_targets.mean(dim=0)).square().sum()
    assert fit.r2 == pytest.approx(1 - errors[best] / float(variance))
    # The held-out tokens help in the end.
    weight, bias = solve_ridge(few.joined(new), best)
    torch.testing.assert_close(fit.weight, weight)
    torch.testing.assert_close(fit.bias, bias)


def test_inputs_that_never_change_give_the_mean() -> None:
    """An encoder's dead layer is no reason to stop."""
    _, targets = tokens(20)
    sums = RegressionSums.of(torch.ones(20, 5), targets)

    fit = fit_ridge(sums, sums)

    assert not fit.weight.any()
    torch.testing.assert_close(fit.bias, targets.mean(dim=0))
    assert fit.r2 == pytest.approx(0)
