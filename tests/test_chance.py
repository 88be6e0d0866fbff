"""Blind guessing as what arms are compared with."""

import math

import numpy as np
import pytest

from layerfuse.evaluate.significance import (
    Competitor,
    Scores,
    SeedNoise,
    compare_all,
    compare_with_chance,
)


def two_arms(noise: SeedNoise | None) -> Scores:
    """Arms at 0.6 and 0.5, guessing at 0.4, with an item standard error of about 0.02."""
    spread = np.random.default_rng(0).normal(0, 0.02, 500)
    samples = np.stack([0.6 + spread, np.full(500, 0.5)], axis=1)
    guess = Competitor(score=0.4, samples=np.full(500, 0.4), runs=math.inf)
    return Scores(
        value=np.array([0.6, 0.5]),
        samples=samples,
        runs=np.array([2.0, 2.0]),
        chance=guess,
        noise=noise,
        images=101,
    )


def test_every_arm_is_compared_with_guessing() -> None:
    first, second = compare_with_chance(two_arms(noise=None))

    assert (first.difference, second.difference) == pytest.approx((0.2, 0.1))
    assert (first.verdict, second.verdict) == ("better", "better")


def test_noise_between_seeds_does_not_count_against_chance() -> None:
    """Between two arms the same noise makes a tie of a clear difference."""
    noise = SeedNoise(sd=0.3, df=2, spread=0.4, spread_arm="a")

    noisy = compare_with_chance(two_arms(noise))

    assert noisy == compare_with_chance(two_arms(noise=None))
    assert compare_all(two_arms(noise), reference=1)[0].verdict == "tie"
    assert compare_all(two_arms(noise=None), reference=1)[0].verdict == "better"
