"""How much runs vary: against textbook sums of squares, and in simulated studies."""

import numpy as np
import pytest

from benchmarks.statistics_simulation import Cell, count
from layerfuse.evaluate.seed_model import (
    Numbers,
    RunVariance,
    combine,
    estimate_variance,
    guard_factor,
)

MISSING = float("nan")


def variance_of(scores: Numbers) -> RunVariance:
    """The variances of a study that has some."""
    variance = estimate_variance(scores)
    assert variance is not None
    return variance


def two_way_lines(scores: Numbers) -> tuple[float, float]:
    """Mean squares of seeds and of the residual, cell by cell (arms, seeds)."""
    arms, seeds = scores.shape
    of_seeds = 0.0
    residual = 0.0
    for seed in range(seeds):
        effect = scores[:, seed].mean() - scores.mean()
        of_seeds += arms * effect**2
        for arm in range(arms):
            expected = scores[arm].mean() + effect
            residual += (scores[arm, seed] - expected) ** 2
    return of_seeds / (seeds - 1), residual / ((arms - 1) * (seeds - 1))


def test_what_seeds_do_to_all_arms_is_taken_out():
    rng = np.random.default_rng(1)
    together = np.array([-10.0, 0.0, 10.0])
    scores = together + rng.normal(0, 1, (4, 3))

    variance = variance_of(scores)

    seed_line, residual_line = two_way_lines(scores)
    assert seed_line > residual_line
    assert variance.typical == pytest.approx(residual_line)
    assert variance.shared == pytest.approx((seed_line - residual_line) / 4)
    assert variance.df == 6
    # Arms of the same seeds: the shared part is gone from a difference, and is in a mean.
    difference = combine(variance.of_difference(0, 1))
    assert difference.error < 3
    assert combine(variance.of_mean(0)).error > 5


def test_without_a_shared_part_both_lines_are_pooled():
    # Seed means are equal, so that the line of the seeds is zero.
    scores = np.array([[1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, 1.0]])

    variance = variance_of(scores)

    # Each arm: (1² + 1²) / 1.
    assert variance.typical == pytest.approx(2.0)
    assert variance.df == 4
    assert variance.shared == 0


def test_a_noisy_arm_keeps_its_own_variance():
    scores = np.array([[10.0, -10.0], [0.1, -0.1]])

    variance = variance_of(scores)

    pooled = (200 + 0.02) / 2
    guard = float(guard_factor(2, np.array(2.0))) ** 2
    assert variance.own == pytest.approx([200 * guard, pooled * guard])


def test_seeds_that_arms_do_not_share_are_unpaired():
    """A block needs two seeds that all repeated arms have."""
    scores = np.array(
        [
            [1.0, 21.0, MISSING],
            [MISSING, 20.0, 40.0],
            [2.0, MISSING, 42.0],
        ]
    )

    variance = variance_of(scores)

    assert variance.shared == 0
    assert variance.df == 3
    # (20² + 20² + 40²) / 2 over three arms.
    assert variance.typical == pytest.approx(400.0)


def test_more_seeds_of_one_arm_leave_a_part_of_what_all_share():
    """Three seeds against two of them: weights 1/3 − 1/2, 1/3 − 1/2 and 1/3."""
    scores = np.array(
        [
            [-10.0, 10.5, 30.0],
            [-10.5, 10.0, MISSING],
            [-9.5, 10.0, MISSING],
            [MISSING, 12.0, MISSING],
        ]
    )

    variance = variance_of(scores)

    left = 1 / 36 + 1 / 36 + 1 / 9
    shared_part = variance.of_difference(0, 1)[2]
    assert shared_part.variance == pytest.approx(variance.shared * left)
    assert variance.of_difference(1, 2)[2].variance == 0
    # The arm of one seed has no noise that is known.
    assert not variance.repeated(3)
    assert np.isnan(variance.own[3])


def test_studies_side_by_side_are_what_each_is_alone():
    rng = np.random.default_rng(2)
    shared = rng.normal(0, 1, (5, 1, 3)) * np.array([0, 0, 9, 9, 0])[:, None, None]
    studies = shared + rng.normal(0, 1, (5, 4, 3))

    together = variance_of(studies)

    for number, study in enumerate(studies):
        alone = variance_of(study)
        assert together.own[number] == pytest.approx(alone.own)
        assert together.shared[number] == pytest.approx(alone.shared)
        assert together.df[number] == alone.df


def test_one_seed_an_arm_says_nothing():
    assert estimate_variance(np.array([[0.5], [0.9]])) is None


@pytest.mark.parametrize(
    ("scenario", "arms", "seeds"),
    [
        ("equal", 5, 3),
        ("shared", 10, 2),
        ("unequal", 2, 2),
        ("noisy baseline", 5, 2),
        ("noisy baseline", 10, 5),
        ("long-tailed", 5, 3),
    ],
)
def test_statements_hold_in_simulated_studies(scenario: str, arms: int, seeds: int):
    """Bounds 93 % and 6 %, and two standard errors of 1,500 studies beside them."""
    cell = count(scenario, arms, seeds, studies=1500, seed=1)

    assert cell.difference_covered >= 0.93 - 0.01
    assert cell.mean_covered >= 0.93 - 0.01
    assert cell.any_verdict <= 0.06 + 0.012
    assert cell.left_out <= 0.06 + 0.012


def test_sharing_seeds_pays():
    """Found in 46 of 100 studies where the seeds were thrown away."""
    cell: Cell = count("shared", arms=5, seeds=3, studies=1500, seed=1)

    assert cell.power > 0.75
