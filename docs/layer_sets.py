"""How much a strategy's score depends on which layers it is given, in studies that varied them."""

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.stats  # pyright: ignore[reportMissingTypeStubs]

from docs.results_pages import table_row, verdict_in_words
from layerfuse.evaluate.learning_status import ArmLearning

# scipy brings no types
stats: Any = scipy.stats

FEWEST_SETS = 3
MOST_STABLE = "external direct"
CLAIM = "External direct fusion is the most stable over sets of layers."
SOURCE = "2503.06063, as notes on the paper report it"
LIMITS = (
    "Standard deviation of scores over so few sets, whose share of noise is not taken off; as a "
    "ratio to that of the most stable other kind."
)
INTRO = [
    "## Spread over sets of layers",
    "",
    "Standard deviation of a strategy's mean score over the sets of layers that it was given, in",
    "points, and what seeds alone would make of it. p: F test of one way, sets against seeds;",
    "where it is large, nothing shows that the choice of layers mattered to the strategy.",
    "",
]


@dataclass(frozen=True)
class SetSpread:
    """Scores of one strategy over several sets of layers.

    Attributes:
        strategy: its name.
        kind: of the strategy.
        arms: one a set.
        variance: of the mean scores over sets.
        by_seeds: the part of it that seeds alone would make.
        p: of the F test that sets differ by more than seeds.
    """

    strategy: str
    kind: str
    arms: list[str]
    variance: float
    by_seeds: float
    p: float

    @property
    def df(self) -> int:
        """Degrees of freedom of the variance."""
        return len(self.arms) - 1


@dataclass(frozen=True)
class Ratio:
    """A ratio with its 95 % interval."""

    value: float
    low: float
    high: float


def set_spreads(summary: dict[str, Any]) -> list[SetSpread]:
    """The spread of every strategy, with all its options alike, that a study gave at least three
    sets of several layers."""
    by_options: dict[str, list[dict[str, Any]]] = {}
    for arm in summary["arms"]:
        if len(arm["layers"]) > 1 and len(arm["seeds"]) > 1:
            by_options.setdefault(json.dumps(arm["fusion"]), []).append(arm)
    spreads = []
    for options in sorted(by_options):
        arms = by_options[options]
        if len(arms) < FEWEST_SETS:
            continue
        means = [np.mean(arm["seed_means"]) for arm in arms]
        within = [np.var(arm["seed_means"], ddof=1) / len(arm["seeds"]) for arm in arms]
        test = stats.f_oneway(*(arm["seed_means"] for arm in arms))
        spreads.append(
            SetSpread(
                arms[0]["fusion"]["name"],
                arms[0]["kind"],
                [arm["arm"] for arm in arms],
                variance=float(np.var(means, ddof=1)),
                by_seeds=float(np.mean(within)),
                p=float(test.pvalue),
            )
        )
    return spreads


def spread_table(studies: dict[str, dict[str, Any]]) -> list[str]:
    """The section with the spreads of all studies that have any.

    Args:
        studies: summaries, by a link to the page of each.
    """
    rows = []
    for study, summary in studies.items():
        for spread in set_spreads(summary):
            points = f"{100 * math.sqrt(spread.variance):.1f}"
            by_seeds = f"{100 * math.sqrt(spread.by_seeds):.1f}"
            cells = [study, spread.strategy, spread.kind, str(len(spread.arms)), points, by_seeds]
            p = "< 0.01" if spread.p < 0.01 else f"{spread.p:.2f}"
            rows.append(table_row([*cells, p]))
    if not rows:
        return []
    head = ["study", "strategy", "kind", "sets", "standard deviation", "of seeds alone", "p"]
    return [*INTRO, table_row(head), "|---" * len(head) + "|", *rows, ""]


def stability_claims(summary: dict[str, Any], study: str) -> list[str]:
    """The row of the claim about stability, where a study has other kinds beside external direct.

    Args:
        summary: of the study.
        study: a link to its page.
    """
    by_kind: dict[str, list[SetSpread]] = {}
    for spread in set_spreads(summary):
        by_kind.setdefault(spread.kind, []).append(spread)
    claimed = by_kind.pop(MOST_STABLE, None)
    if claimed is None or not by_kind:
        return []
    ratios = {kind: deviation_ratio(claimed, others) for kind, others in by_kind.items()}
    kind, ratio = max(ratios.items(), key=lambda item: item[1].value)
    compared = list(claimed)
    for others in by_kind.values():
        compared += others
    arms = [arm for spread in compared for arm in spread.arms]
    unsettled = 0
    for arm in arms:
        unsettled += not ArmLearning.from_json(summary["learning"][arm]).settled
    verdict = verdict_in_words(
        holds=all(other.high < 1 for other in ratios.values()),
        opposite=any(other.low > 1 for other in ratios.values()),
        unsettled=unsettled,
        arms=len(arms),
    )
    in_words = f"ratio {ratio.value:.1f} ({ratio.low:.1f} to {ratio.high:.1f}) to {kind}"
    return [table_row([CLAIM, SOURCE, study, verdict, in_words, LIMITS])]


def deviation_ratio(first: list[SetSpread], second: list[SetSpread]) -> Ratio:
    """The ratio of two pooled standard deviations, with its 95 % interval by Fisher's F."""
    ratio = pooled_variance(first) / pooled_variance(second)
    quotient = stats.f(degrees_of_freedom(first), degrees_of_freedom(second))
    return Ratio(
        math.sqrt(ratio),
        math.sqrt(ratio / quotient.ppf(0.975)),
        math.sqrt(ratio / quotient.ppf(0.025)),
    )


def pooled_variance(spreads: list[SetSpread]) -> float:
    """The variance over sets of all strategies of a kind."""
    squares = sum(spread.df * spread.variance for spread in spreads)
    return squares / degrees_of_freedom(spreads)


def degrees_of_freedom(spreads: list[SetSpread]) -> int:
    """Those of the pooled variance."""
    return sum(spread.df for spread in spreads)
