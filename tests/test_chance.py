"""Blind guessing as what arms are compared with."""

import numpy as np
import pytest

from layerfuse.evaluate.significance import (
    Competitor,
    Numbers,
    Scores,
    compare_all,
    compare_with_chance,
)


def two_arms(run_spread: float) -> Scores:
    """Arms at 0.6 and 0.5, guessing at 0.4, with an item standard error of about 0.02.

    Args:
        run_spread: how far each of the two runs of an arm lies from its mean.
    """
    spread = np.random.default_rng(0).normal(0, 0.02, 500)
    samples = np.stack([0.6 + spread, np.full(500, 0.5)], axis=1)
    value: Numbers = np.array([0.6, 0.5])
    return Scores(
        value=value,
        samples=samples,
        runs=value[:, None] + np.array([[run_spread, -run_spread], [-run_spread, run_spread]]),
        chance=Competitor(score=0.4, samples=np.full(500, 0.4)),
        noise=None,
        images=101,
    )


def test_every_arm_is_compared_with_guessing() -> None:
    first, second = compare_with_chance(two_arms(run_spread=0.0))

    assert (first.difference, second.difference) == pytest.approx((0.2, 0.1))
    assert (first.verdict, second.verdict) == ("better", "better")


def test_noise_between_seeds_does_not_count_against_chance() -> None:
    """Between two arms the same noise makes a tie of a clear difference."""
    noisy = two_arms(run_spread=0.2)
    calm = two_arms(run_spread=0.0)

    assert compare_with_chance(noisy) == compare_with_chance(calm)
    assert compare_all(noisy, reference=1)[0].verdict == "tie"
    assert compare_all(calm, reference=1)[0].verdict == "better"
