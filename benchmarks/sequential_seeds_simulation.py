"""Do the statements of studies with `seeds: auto` hold? Simulated studies whose truth is known.

    python -m benchmarks.sequential_seeds_simulation [--studies 10000]

Draws the studies of statistics_simulation.py, looks at each as the package does, adds seeds until
its rule ends the study, and counts: false verdicts over the whole of it, intervals of the last look
that hold the truth, the seeds it took, and how often arms that are raised by 20 points are found;
beside it what a fixed number of seeds finds, and what other ways to spend the error do. Writes
results/sequential-seeds-simulation.json, of which docs/statistics.md is made.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.optimize  # pyright: ignore[reportMissingTypeStubs]
import scipy.stats  # pyright: ignore[reportMissingTypeStubs]

from benchmarks.statistics_simulation import (
    ARMS,
    ERROR,
    GAIN,
    ITEM_SD,
    PICTURES,
    SCENARIOS,
    holm_rows,
)
from layerfuse.evaluate.seed_model import Flags, Numbers, VariancePart, combine, estimate_variance
from layerfuse.evaluate.sequential import error_made, level_of_look, shares_of_looks
from layerfuse.recipe.growing import AutoSeeds

# scipy brings no types
stats: Any = scipy.stats
optimize: Any = scipy.optimize

RESULTS = Path(__file__).parents[1] / "results" / "sequential-seeds-simulation.json"
POINTS = 100
RULE = AutoSeeds(first=3, maximum=8, difference=10 / POINTS)
"""ties are told within ten points: the noise of most scenarios allows no less"""


def calm(rng: np.random.Generator, shape: tuple[int, int, int]) -> Numbers:
    """All runs vary by 2 points, as in well-conditioned studies."""
    return 2 * rng.standard_normal(shape)


DRAWS = {"calm": calm, **SCENARIOS}

# The error of each look, by the number of comparisons.
Spending = Callable[[int], Sequence[float]]


@dataclass(frozen=True)
class LookedAt:
    """Simulated studies with all seeds that they may need, in points around the truth 0.

    Attributes:
        runs: score of each run (N, A, S).
        picture_variance: estimated over pictures, of one run's share and of one arm's (N).
    """

    runs: Numbers
    picture_variance: Numbers


@dataclass(frozen=True)
class Ended:
    """How studies ended.

    Attributes:
        seeds: that each took (N).
        resolved: whether every comparison was resolved (N).
        false_at_end: whether an equal arm had a verdict at the end (N).
        false_at_any: whether one had at any look, had none ended the study (N).
        found: whether the first arm but the baseline was found better (N).
        differences_covered: intervals that hold the truth at the end (N, A - 1).
        means_covered: the same of arms' means (N, A).
    """

    seeds: Numbers
    resolved: Flags
    false_at_end: Flags
    false_at_any: Flags
    found: Flags
    differences_covered: Flags
    means_covered: Flags


@dataclass(frozen=True)
class Cell:
    """What was counted for one scenario, as shares of 1, and mean numbers of seeds.

    Attributes:
        scenario: its name.
        arms: number of arms; the first is the baseline.
        any_verdict: studies of equal arms that end with a false verdict.
        any_look: studies of equal arms with one at any look.
        difference_covered: intervals of differences that hold the truth at the end, the least of
            the three truths.
        mean_covered: the same of arms' means.
        seeds_equal: taken where all arms are equal.
        resolved_equal: studies of equal arms in which every comparison was resolved.
        seeds_one: taken where one arm is raised.
        power_one: studies in which that arm is found better.
        power_first: the same with the first seeds alone, planned from the start.
        power_most: the same with the most seeds, planned from the start.
        seeds_all: taken where all arms but the baseline are raised.
        power_all: studies in which the first of them is found better.
    """

    scenario: str
    arms: int
    any_verdict: float
    any_look: float
    difference_covered: float
    mean_covered: float
    seeds_equal: float
    resolved_equal: float
    seeds_one: float
    power_one: float
    power_first: float
    power_most: float
    seeds_all: float
    power_all: float


@dataclass(frozen=True)
class Candidate:
    """One way to spend the error, over all scenarios but the last and all numbers of arms.

    Attributes:
        method: its name.
        most_verdicts: studies of equal arms that end with a false verdict, the worst cell.
        most_at_any_look: with one at any look, the worst cell.
        least_covered: intervals of differences that hold the truth, the worst cell.
        power: studies in which one raised arm is found, on average.
        seeds: taken with all arms but the baseline raised, on average.
    """

    method: str
    most_verdicts: float
    most_at_any_look: float
    least_covered: float
    power: float
    seeds: float


def draw(scenario: str, arms: int, studies: int) -> LookedAt:
    """Draw studies.

    Args:
        scenario: its name.
        arms: number of arms.
        studies: number of studies N.

    Returns:
        The studies, with the most seeds.
    """
    rng = np.random.default_rng([1, list(DRAWS).index(scenario), arms])
    shape = (studies, arms, RULE.maximum)
    runs = DRAWS[scenario](rng, shape)
    # All seeds answer the same pictures: what these favour stays from look to look.
    item_sd = ITEM_SD / np.sqrt(PICTURES)
    runs = runs + item_sd * rng.standard_normal((studies, arms, 1))
    runs = runs + item_sd * rng.standard_normal(shape)
    seen = item_sd**2 * rng.chisquare(PICTURES - 1, studies) / (PICTURES - 1)
    return LookedAt(runs, seen)


@dataclass(frozen=True)
class Judged:
    """Studies with some number of seeds, judged at one level.

    Attributes:
        differences: to the baseline (N, A - 1).
        halves: half the width of their intervals (N, A - 1).
        verdicts: whether each is called better or worse (N, A - 1).
        means: of the arms (N, A).
        mean_halves: half the width of their intervals (N, A).
    """

    differences: Numbers
    halves: Numbers
    verdicts: Flags
    means: Numbers
    mean_halves: Numbers


def judge(drawn: LookedAt, seeds: int, error: float) -> Judged:
    """Judge studies as the package judges real ones.

    Args:
        drawn: the studies.
        seeds: that are used.
        error: of the look.

    Returns:
        Differences and verdicts.
    """
    runs = drawn.runs[:, :, :seeds]
    studies, arms, _ = runs.shape
    variance = estimate_variance(runs)
    assert variance is not None
    # The bootstrap sees what pictures do to an arm, and to each of its runs.
    pictures = drawn.picture_variance * (1 + 1 / seeds)
    df = np.full(studies, PICTURES - 1.0)
    means = runs.mean(axis=-1)
    mean_halves = np.empty_like(means)
    differences = means[:, 1:] - means[:, :1]
    halves = np.empty_like(differences)
    p = np.empty_like(differences)
    for arm in range(arms):
        total = combine([VariancePart(pictures, df), *variance.of_mean(arm)])
        mean_halves[:, arm] = stats.t.isf(error / 2, total.df) * total.error
        if arm == 0:
            continue
        total = combine([VariancePart(2 * pictures, df), *variance.of_difference(arm, 0)])
        halves[:, arm - 1] = stats.t.isf(error / 2, total.df) * total.error
        ratio = np.abs(differences[:, arm - 1]) / total.error
        p[:, arm - 1] = 2 * stats.t.sf(ratio, total.df)
    return Judged(differences, halves, holm_rows(p) < error, means, mean_halves)


def add_seeds(drawn: LookedAt, gains: Numbers, errors: Sequence[float]) -> Ended:
    """Look at studies, and add seeds until they end.

    Args:
        drawn: the studies.
        gains: by which each arm is raised (A).
        errors: of each look.

    Returns:
        How they ended.
    """
    raised = LookedAt(drawn.runs + gains[None, :, None], drawn.picture_variance)
    studies, arms, _ = drawn.runs.shape
    truth = gains[1:] - gains[0]
    going_on: Flags = np.ones(studies, dtype=bool)
    ended = Ended(
        seeds=np.zeros(studies),
        resolved=np.zeros(studies, dtype=bool),
        false_at_end=np.zeros(studies, dtype=bool),
        false_at_any=np.zeros(studies, dtype=bool),
        found=np.zeros(studies, dtype=bool),
        differences_covered=np.zeros((studies, arms - 1), dtype=bool),
        means_covered=np.zeros((studies, arms), dtype=bool),
    )
    margin = POINTS * RULE.difference
    for look, error in enumerate(errors):
        seeds = RULE.first + look
        judged = judge(raised, seeds, error)
        within = np.abs(judged.differences) + judged.halves < margin
        resolved: Flags = np.all(judged.verdicts | within, axis=1)
        wrong = (judged.verdicts & (truth == 0)).any(axis=1)
        better = judged.verdicts[:, 0] & (judged.differences[:, 0] > 0)
        of_differences = np.abs(judged.differences - truth) <= judged.halves
        of_means = np.abs(judged.means - gains) <= judged.mean_halves
        last: Flags = going_on & resolved
        if seeds == RULE.maximum:
            last = going_on
        ended.seeds[last] = seeds
        ended.resolved[last] = resolved[last]
        ended.false_at_end[last] = wrong[last]
        ended.false_at_any[:] |= wrong
        ended.found[last] = better[last]
        ended.differences_covered[last] = of_differences[last]
        ended.means_covered[last] = of_means[last]
        going_on = going_on & ~last
    return ended


def power_of_fixed(drawn: LookedAt, gains: Numbers, seeds: int) -> float:
    """Give how often the first raised arm is found with seeds planned from the start."""
    raised = LookedAt(drawn.runs + gains[None, :, None], drawn.picture_variance)
    judged = judge(raised, seeds, ERROR)
    return float((judged.verdicts[:, 0] & (judged.differences[:, 0] > 0)).mean())


def used(comparisons: int) -> list[float]:
    """The errors of the looks as the package has them."""
    errors: list[float] = []
    for seeds in range(RULE.first, RULE.maximum + 1):
        errors.append(1 - level_of_look(RULE, seeds, comparisons))
    return errors


def split_evenly(comparisons: int) -> list[float]:
    """The error divided by the number of looks (Bonferroni), whatever the comparisons are."""
    looks = len(shares_of_looks(RULE))
    return [ERROR / looks] * looks


def constant(comparisons: int) -> list[float]:
    """One level for all looks (Pocock 1977), for normal means."""
    shares = shares_of_looks(RULE)
    target = ERROR / comparisons

    def missing(level: float) -> float:
        return error_made(shares, [level] * len(shares)) - target

    level = float(optimize.brentq(missing, target / len(shares), target))
    return [comparisons * level] * len(shares)


def unspent(comparisons: int) -> list[float]:
    """Each look judged as if it were the only one."""
    return [ERROR] * len(shares_of_looks(RULE))


METHODS: dict[str, Spending] = {
    "each look as if alone": unspent,
    "split evenly (Bonferroni)": split_evenly,
    "one level (Pocock)": constant,
    "O'Brien-Fleming-like (used)": used,
}


def gains_of(arms: int, raised: int) -> Numbers:
    """By how much each arm is raised: so many, from the second on."""
    gains = np.zeros(arms)
    gains[1 : 1 + raised] = GAIN
    return gains


def count(scenario: str, arms: int, studies: int, spending: Spending = used) -> Cell:
    """Let simulated studies run to their end.

    Args:
        scenario: its name.
        arms: number of arms.
        studies: their number.
        spending: how the error is spent.

    Returns:
        What was counted.
    """
    drawn = draw(scenario, arms, studies)
    errors = spending(arms - 1)
    one = gains_of(arms, raised=1)
    of_equal = add_seeds(drawn, gains_of(arms, raised=0), errors)
    of_one = add_seeds(drawn, one, errors)
    of_all = add_seeds(drawn, gains_of(arms, raised=arms - 1), errors)
    differences = [float(each.differences_covered.mean()) for each in (of_equal, of_one, of_all)]
    means = [float(each.means_covered.mean()) for each in (of_equal, of_one, of_all)]
    return Cell(
        scenario=scenario,
        arms=arms,
        any_verdict=float(of_equal.false_at_end.mean()),
        any_look=float(of_equal.false_at_any.mean()),
        difference_covered=min(differences),
        mean_covered=min(means),
        seeds_equal=float(of_equal.seeds.mean()),
        resolved_equal=float(of_equal.resolved.mean()),
        seeds_one=float(of_one.seeds.mean()),
        power_one=float(of_one.found.mean()),
        power_first=power_of_fixed(drawn, one, RULE.first),
        power_most=power_of_fixed(drawn, one, RULE.maximum),
        seeds_all=float(of_all.seeds.mean()),
        power_all=float(of_all.found.mean()),
    )


def candidate(method: str, studies: int) -> Candidate:
    """Let the same studies run to their end by one way to spend the error."""
    cells: list[Cell] = []
    # The last scenario is one that no interval holds in.
    for scenario in list(DRAWS)[:-1]:
        for arms in ARMS:
            cells.append(count(scenario, arms, studies, METHODS[method]))
    return Candidate(
        method=method,
        most_verdicts=max(cell.any_verdict for cell in cells),
        most_at_any_look=max(cell.any_look for cell in cells),
        least_covered=min(cell.difference_covered for cell in cells),
        power=float(np.mean([cell.power_one for cell in cells])),
        seeds=float(np.mean([cell.seeds_all for cell in cells])),
    )


def main() -> None:
    """Count every cell, print it and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=10000)
    studies = parser.parse_args().studies
    cells: list[dict[str, Any]] = []
    for scenario in DRAWS:
        for arms in ARMS:
            cell = asdict(count(scenario, arms, studies))
            print(*cell.values())
            cells.append(cell)
    content: dict[str, Any] = {
        "studies": studies,
        "pictures": PICTURES,
        "gain": GAIN,
        "first": RULE.first,
        "maximum": RULE.maximum,
        "difference": RULE.difference,
        "errors": {str(arms): used(arms - 1) for arms in ARMS},
        "cells": cells,
        "methods": [asdict(candidate(method, studies)) for method in METHODS],
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
