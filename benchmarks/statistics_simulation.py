"""Do the statements of a study hold? Simulated studies whose truth is known.

    python benchmarks/statistics_simulation.py [--studies 4000]

Draws studies of equal arms, lets the package judge them, and counts: how often the 95 % interval of
a difference to the baseline, and of an arm's mean, holds the truth; how often any verdict is given;
how often an equal arm is called separable from the first; and, with one arm raised by 20 points,
how often that is found. Writes results/statistics-simulation.json, of which docs/statistics.md is
made.
"""

import argparse
import json
import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import scipy.optimize  # pyright: ignore[reportMissingTypeStubs]
import scipy.stats  # pyright: ignore[reportMissingTypeStubs]

from layerfuse.evaluate.seed_model import (
    Numbers,
    StandardError,
    VariancePart,
    combine,
    estimate_variance,
)

# scipy brings no types
stats: Any = scipy.stats
brentq: Any = scipy.optimize.brentq

RESULTS = Path(__file__).parents[1] / "results" / "statistics-simulation.json"
ARMS = (2, 5, 10)
SEEDS = (2, 3, 5)
PICTURES = 200
GAIN = 20.0
"""points by which one arm is raised to count how often that is found"""
ITEM_SD = 24.0
"""points by which one picture moves an arm beside what it does to all arms, and a single run"""
ERROR = 0.05


@dataclass(frozen=True)
class Cell:
    """What was counted for one scenario, as shares of 1.

    Attributes:
        scenario: its name.
        arms: number of arms; the first is the baseline.
        seeds: number of seeds, shared by all arms.
        difference_covered: intervals of differences to the baseline that hold the truth.
        mean_covered: intervals of arms' means that hold the truth.
        any_verdict: studies of equal arms with a verdict that is not a tie.
        left_out: studies of equal arms in which one is called separable from the first.
        power: studies in which the arm that is raised by 20 points is found better.
    """

    scenario: str
    arms: int
    seeds: int
    difference_covered: float
    mean_covered: float
    any_verdict: float
    left_out: float
    power: float


def equal(rng: np.random.Generator, shape: tuple[int, int, int]) -> Numbers:
    """All runs vary by 6 points."""
    return 6 * rng.standard_normal(shape)


def shared(rng: np.random.Generator, shape: tuple[int, int, int]) -> Numbers:
    """A seed moves all arms by 8 points, and each run by 4 of its own."""
    studies, _, seeds = shape
    together = 8 * rng.standard_normal((studies, 1, seeds))
    return together + 4 * rng.standard_normal(shape)


def unequal(rng: np.random.Generator, shape: tuple[int, int, int]) -> Numbers:
    """The arms vary by 2 to 12 points, in any order."""
    studies, arms, _ = shape
    sds = np.tile(np.geomspace(2, 12, arms), (studies, 1))
    return rng.permuted(sds, axis=1)[:, :, None] * rng.standard_normal(shape)


def noisy_baseline(rng: np.random.Generator, shape: tuple[int, int, int]) -> Numbers:
    """The baseline varies by 10 points, the others by 3."""
    runs = 3 * rng.standard_normal(shape)
    runs[:, 0] *= 10 / 3
    return runs


def long_tailed(rng: np.random.Generator, shape: tuple[int, int, int]) -> Numbers:
    """Runs vary by 6 points, as t with three degrees of freedom."""
    return 6 / np.sqrt(3) * rng.standard_t(3, shape)


def bimodal(rng: np.random.Generator, shape: tuple[int, int, int]) -> Numbers:
    """Half of the baseline's runs never leave their plateau, 40 points below the others."""
    runs = 3 * rng.standard_normal(shape)
    runs[:, 0] += rng.choice([-20.0, 20.0], (shape[0], shape[2]))
    return runs


SCENARIOS = {
    "equal": equal,
    "shared": shared,
    "unequal": unequal,
    "noisy baseline": noisy_baseline,
    "long-tailed": long_tailed,
    "bimodal baseline": bimodal,
}


@dataclass(frozen=True)
class DrawnStudies:
    """Simulated studies of equal arms, in points around the truth 0.

    Attributes:
        runs: score of each run (N, A, S).
        item_variance: over pictures, estimated for an arm's mean (N); twice for a difference.
    """

    runs: Numbers
    item_variance: Numbers


def draw(scenario: str, arms: int, seeds: int, studies: int, seed: int) -> DrawnStudies:
    """Draw studies.

    Args:
        scenario: its name.
        arms: number of arms.
        seeds: number of seeds.
        studies: number of studies N.
        seed: of the draws.

    Returns:
        The studies.
    """
    rng = np.random.default_rng([seed, list(SCENARIOS).index(scenario), arms, seeds])
    shape = (studies, arms, seeds)
    runs = SCENARIOS[scenario](rng, shape)
    # The pictures of the test favour some arms in all their runs, and some runs besides.
    item_sd = ITEM_SD / np.sqrt(PICTURES)
    runs = runs + item_sd * rng.standard_normal((studies, arms, 1))
    runs = runs + item_sd * rng.standard_normal(shape)
    # The bootstrap sees both, as exactly as a variance of 200 pictures can be known.
    seen = item_sd**2 * (1 + 1 / seeds)
    return DrawnStudies(runs, seen * rng.chisquare(PICTURES - 1, studies) / (PICTURES - 1))


def count(scenario: str, arms: int, seeds: int, studies: int, seed: int = 0) -> Cell:
    """Judge simulated studies as the package judges real ones.

    Args:
        scenario: its name.
        arms: number of arms.
        seeds: number of seeds.
        studies: their number.
        seed: of the draws.

    Returns:
        What was counted.
    """
    drawn = draw(scenario, arms, seeds, studies, seed)
    variance = estimate_variance(drawn.runs)
    assert variance is not None
    means = drawn.runs.mean(axis=-1)
    item_df = np.full(studies, PICTURES - 1.0)
    of_mean = VariancePart(drawn.item_variance, item_df)
    of_difference = VariancePart(2 * drawn.item_variance, item_df)

    covered: list[Numbers] = []
    for arm in range(arms):
        total = combine([of_mean, *variance.of_mean(arm)])
        covered.append(np.abs(means[:, arm]) <= quantile(total.df) * total.error)

    differences = np.empty((studies, arms - 1))
    errors = np.empty_like(differences)
    dfs = np.empty_like(differences)
    for arm in range(1, arms):
        total = combine([of_difference, *variance.of_difference(arm, 0)])
        differences[:, arm - 1] = means[:, arm] - means[:, 0]
        errors[:, arm - 1] = total.error
        dfs[:, arm - 1] = total.df
    p = 2 * stats.t.sf(np.abs(differences) / errors, dfs)
    raised = differences.copy()
    raised[:, 0] += GAIN
    p_raised = 2 * stats.t.sf(np.abs(raised) / errors, dfs)
    found = (holm_rows(p_raised)[:, 0] < ERROR) & (raised[:, 0] > 0)

    # The leader against the last is the pair that any statement about the first depends on.
    separable = np.zeros(studies, dtype=bool)
    leader = means.argmax(axis=1)
    every = np.arange(studies)
    for first in range(arms):
        for second in range(arms):
            if first == second:
                continue
            total = combine([of_difference, *variance.of_difference(first, second)])
            ratio = (means[:, first] - means[:, second]) / total.error
            beyond = ratio > range_quantile(arms, total.df)
            separable |= beyond & (leader[every] == first)
    # A baseline that the leader beats is not called inseparable either.
    beaten = (holm_rows(p) < ERROR)[every, np.maximum(leader - 1, 0)]
    separable |= beaten & (leader > 0)
    return Cell(
        scenario=scenario,
        arms=arms,
        seeds=seeds,
        difference_covered=float((p >= ERROR).mean()),
        mean_covered=float(np.mean(covered)),
        any_verdict=float((p.min(axis=1) * (arms - 1) < ERROR).mean()),
        left_out=float(separable.mean()),
        power=float(found.mean()),
    )


@dataclass(frozen=True)
class Candidate:
    """What another method did in one scenario, as shares of 1; the worst and mean of its cells.

    Attributes:
        method: its name.
        scenario: of the runs.
        least_covered: differences covered, the worst of all numbers of arms and seeds.
        most_verdicts: studies with a false verdict, the worst.
        power: studies in which the arm that is raised by 20 points is found better, on average.
    """

    method: str
    scenario: str
    least_covered: float
    most_verdicts: float
    power: float


def pooled_error(drawn: DrawnStudies) -> StandardError:
    """One variance within arms for all of them, whatever seeds they share."""
    _, arms, seeds = drawn.runs.shape
    within = drawn.runs.var(axis=-1, ddof=1).mean(axis=-1)
    df = np.full_like(within, arms * (seeds - 1))
    parts = [VariancePart(2 * within / seeds, df), difference_items(drawn)]
    total = combine(parts)
    return StandardError(total.error[:, None], total.df[:, None])


def welch_error(drawn: DrawnStudies) -> StandardError:
    """Each arm's own variance."""
    seeds = drawn.runs.shape[-1]
    own = drawn.runs.var(axis=-1, ddof=1) / seeds
    df = np.full_like(own[:, 1:], seeds - 1)
    baseline = np.broadcast_to(own[:, :1], df.shape)
    items = difference_items(drawn)
    as_rows = VariancePart(items.variance[:, None], items.df[:, None])
    return combine([VariancePart(own[:, 1:], df), VariancePart(baseline, df), as_rows])


def blocks_error(drawn: DrawnStudies) -> StandardError:
    """Blocks of seeds where they help, without a guard for unequal arms."""
    seeds = drawn.runs.shape[-1]
    variance = estimate_variance(drawn.runs)
    assert variance is not None
    parts = [VariancePart(2 * variance.typical / seeds, variance.df), difference_items(drawn)]
    total = combine(parts)
    return StandardError(total.error[:, None], total.df[:, None])


def guarded_error(drawn: DrawnStudies) -> StandardError:
    """What the package does."""
    variance = estimate_variance(drawn.runs)
    assert variance is not None
    totals: list[StandardError] = []
    for arm in range(1, drawn.runs.shape[1]):
        totals.append(combine([difference_items(drawn), *variance.of_difference(arm, 0)]))
    errors = np.stack([total.error for total in totals], axis=1)
    return StandardError(errors, np.stack([total.df for total in totals], axis=1))


def difference_items(drawn: DrawnStudies) -> VariancePart:
    """What pictures add to the variance of a difference."""
    df = np.full_like(drawn.item_variance, PICTURES - 1.0)
    return VariancePart(2 * drawn.item_variance, df)


METHODS = {
    "one pooled variance": pooled_error,
    "Welch": welch_error,
    "blocks, no guard": blocks_error,
    "blocks and guard (used)": guarded_error,
}


def compare_methods(scenario: str, studies: int) -> list[Candidate]:
    """Judge the same studies by each method.

    Args:
        scenario: its name.
        studies: of each number of arms and seeds.

    Returns:
        One row a method.
    """
    candidates: list[Candidate] = []
    for method, error_of in METHODS.items():
        covered: list[float] = []
        verdicts: list[float] = []
        power: list[float] = []
        for arms in ARMS:
            for seeds in SEEDS:
                drawn = draw(scenario, arms, seeds, studies, seed=0)
                total = error_of(drawn)
                means = drawn.runs.mean(axis=-1)
                differences = means[:, 1:] - means[:, :1]
                p = 2 * stats.t.sf(np.abs(differences) / total.error, total.df)
                covered.append(float((p >= ERROR).mean()))
                verdicts.append(float((p.min(axis=1) * (arms - 1) < ERROR).mean()))
                differences[:, 0] += GAIN
                raised = 2 * stats.t.sf(np.abs(differences) / total.error, total.df)
                found = (holm_rows(raised)[:, 0] < ERROR) & (differences[:, 0] > 0)
                power.append(float(found.mean()))
        row = Candidate(method, scenario, min(covered), max(verdicts), float(np.mean(power)))
        candidates.append(row)
    return candidates


def quantile(df: Numbers) -> Numbers:
    """The t quantile of a two-sided 95 % interval."""
    return stats.t.ppf(1 - ERROR / 2, df)


@lru_cache
def range_quantiles(arms: int) -> tuple[Numbers, Numbers]:
    """Degrees of freedom, and the 95 % quantiles of the largest of all differences with them."""
    known = np.array([1.0, 1.5, 2, 3, 4, 6, 9, 15, 30, 100, 400])
    quantiles: list[float] = []
    for df in known:
        # scipy's own quantile takes minutes where there are many arms.
        root = brentq(
            lambda ratio, df=df: stats.studentized_range.sf(ratio, arms, df) - ERROR,
            1,
            300,
            rtol=1e-3,
        )
        quantiles.append(float(root) / math.sqrt(2))
    return known, np.array(quantiles)


def range_quantile(arms: int, df: Numbers) -> Numbers:
    """The quantile of the largest of all differences in standard errors, interpolated over df."""
    known, quantiles = range_quantiles(arms)
    # In 1 / df it is smooth.
    return np.interp(-1 / df, -1 / known, quantiles)


def holm_rows(p: Numbers) -> Numbers:
    """Holm's correction in each row (N, comparisons)."""
    comparisons = p.shape[1]
    order = np.argsort(p, axis=1)
    stepped = np.take_along_axis(p, order, axis=1) * (comparisons - np.arange(comparisons))
    corrected = np.empty_like(p)
    np.put_along_axis(corrected, order, np.maximum.accumulate(stepped, axis=1), axis=1)
    return corrected


def main() -> None:
    """Count every cell, print it and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=4000)
    studies = parser.parse_args().studies
    cells: list[dict[str, Any]] = []
    for scenario in SCENARIOS:
        for arms in ARMS:
            for seeds in SEEDS:
                cell = asdict(count(scenario, arms, seeds, studies))
                print(*cell.values())
                cells.append(cell)
    candidates: list[dict[str, Any]] = []
    for scenario in SCENARIOS:
        candidates += [asdict(row) for row in compare_methods(scenario, studies)]
    content: dict[str, Any] = {
        "studies": studies,
        "pictures": PICTURES,
        "gain": GAIN,
        "cells": cells,
    }
    content["methods"] = candidates
    RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
