"""Adding seeds until the differences to the baseline are resolved, with an honest error.

A study with `seeds: auto` is looked at after `first` seeds and after each further one, up to
`maximum`. Each look could give a false verdict, so that the 5 % are spent over all of them:

* Spending (Lan & DeMets 1983; O'Brien & Fleming 1979): after n of N seeds at most
  2 - 2 Φ(z / √(n / N)) of the error are spent, with z = Φ⁻¹(1 - error / 2). Early looks spend next
  to nothing, when intervals of few seeds are wide anyway, and the last one has nearly all of it.
* Comparisons: with m of them each may err in 5 % / m of studies. Its level at a look times m is the
  look's level for all of them, in which Holm's correction works as in a study of one look.
* Repeated intervals (Jennison & Turnbull 1989): an interval of a look has that look's level, and
  with all looks together they hold the truth in 95 % of studies. This is so whatever ends the
  study, so that a rule for ties costs nothing.

The levels are those of normal means whose looks correlate by √(n / n'); they are taken for the p
values of t tests. The pictures of the test, which all looks share, make looks correlate more and
err less. benchmarks/sequential_seeds_simulation.py measures what remains.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import scipy.optimize  # pyright: ignore[reportMissingTypeStubs]
import scipy.stats  # pyright: ignore[reportMissingTypeStubs]

from layerfuse.evaluate.seed_model import Numbers
from layerfuse.evaluate.significance import LEVEL, JudgedContrast
from layerfuse.recipe.growing import AutoSeeds

# scipy brings no types
stats: Any = scipy.stats
optimize: Any = scipy.optimize

# Of a Gauss-Legendre rule over the values that no look so far has called a difference.
NODES = 160
# Errors below it cannot be told from those of the integration, and do not matter.
NEGLIGIBLE = 1e-12


def shares_of_looks(rule: AutoSeeds) -> tuple[float, ...]:
    """Give the share of the most seeds that each look has."""
    return tuple(seeds / rule.maximum for seeds in range(rule.first, rule.maximum + 1))


def error_spent(shares: Sequence[float], error: float) -> list[float]:
    """Give the share of studies of equal arms that may have had a verdict by each look.

    Args:
        shares: of the most seeds, one a look; the last is 1.
        error: what may be spent in all.

    Returns:
        The error spent so far, one value a look; the last is `error`.
    """
    quantile = float(stats.norm.isf(error / 2))
    spent: list[float] = []
    for share in shares:
        spent.append(2 * float(stats.norm.sf(quantile / math.sqrt(share))))
    return spent


@dataclass(frozen=True)
class OpenStudies:
    """Studies of equal arms in which no look so far has called a difference.

    Attributes:
        share: of the most seeds that these have.
        values: of the sum over their seeds, whose variance is 1 with the most seeds (NODES).
        masses: the chance of each value; what they lack to 1 has had a verdict.
    """

    share: float
    values: Numbers
    masses: Numbers

    def at_look(self, share: float, level: float) -> "OpenStudies":
        """Add seeds and look (Armitage, McPherson & Rowe 1969).

        Args:
            share: of the most seeds.
            level: p values below it are called a difference.

        Returns:
            The studies without one.
        """
        nodes, weights = _nodes_and_weights()
        half = float(stats.norm.isf(level / 2)) * math.sqrt(share)
        step = math.sqrt(share - self.share)
        reached = half * nodes
        density = stats.norm.pdf((reached[:, None] - self.values[None, :]) / step) / step
        return OpenStudies(share, reached, half * weights * (density @ self.masses))

    def had_verdict(self) -> float:
        """Give the share of all studies that had a verdict by now."""
        return 1 - float(self.masses.sum())


def _without_seeds() -> OpenStudies:
    """All studies before their first seed."""
    return OpenStudies(0.0, np.zeros(1), np.ones(1))


@lru_cache
def _nodes_and_weights() -> tuple[Numbers, Numbers]:
    """The Gauss-Legendre rule on -1 to 1."""
    return np.polynomial.legendre.leggauss(NODES)


def error_made(shares: Sequence[float], levels: Sequence[float]) -> float:
    """Give the chance that a comparison of equal arms has a p value below its level at any look.

    Args:
        shares: of the most seeds, one a look.
        levels: of the p values, one a look.

    Returns:
        The chance, for normal means.
    """
    studies = _without_seeds()
    for share, level in zip(shares, levels, strict=True):
        studies = studies.at_look(share, level)
    return studies.had_verdict()


@lru_cache
def errors_of_looks(shares: tuple[float, ...], comparisons: int) -> tuple[float, ...]:
    """Give the error that each look may make over all comparisons, as for a study of this look.

    Args:
        shares: of the most seeds, one a look; the last is 1.
        comparisons: with the baseline.

    Returns:
        One error a look: 1 minus the level of its intervals and verdicts.
    """
    studies = _without_seeds()
    errors: list[float] = []
    spent_by_look = error_spent(shares, (1 - LEVEL) / comparisons)
    for share, spent in zip(shares, spent_by_look, strict=True):
        level = _level_that_spends(studies, share, spent)
        studies = studies.at_look(share, level)
        errors.append(comparisons * level)
    return tuple(errors)


def _level_that_spends(studies: OpenStudies, share: float, spent: float) -> float:
    """The level of a look after which so much of the error is spent."""
    # No look has a level above all that is spent by it.
    if spent < NEGLIGIBLE:
        return spent

    def missing(level: float) -> float:
        return studies.at_look(share, level).had_verdict() - spent

    smallest = NEGLIGIBLE / 100
    return float(optimize.brentq(missing, smallest, spent, xtol=smallest))


def level_of_look(rule: AutoSeeds, seeds: int, comparisons: int) -> float:
    """Give the level of the intervals and verdicts of a look.

    Args:
        rule: first and last look.
        seeds: that all arms have been trained with; fewer than `first` are judged as these.
        comparisons: with the baseline.

    Returns:
        The level, such as 0.98.
    """
    look = min(max(seeds, rule.first), rule.maximum) - rule.first
    return 1 - errors_of_looks(shares_of_looks(rule), max(comparisons, 1))[look]


def resolved(versus: JudgedContrast, difference: float) -> bool:
    """Say whether a comparison needs no more seeds.

    Either way it ends with a statement: which arm is better, or that they differ by less than
    `difference`. A narrow interval from below zero to beyond `difference` would say neither.

    Args:
        versus: the comparison, judged at the level of its look.
        difference: below which arms count as equal, as a share of 1.
    """
    if versus.verdict in ("better", "worse"):
        return True
    low, high = versus.interval
    return versus.measured and -difference < low and high < difference
