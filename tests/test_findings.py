"""What is said about a study, sentence by sentence, for each way in which it can end."""

from dataclasses import dataclass
from typing import Any

import pytest

from layerfuse.study.findings import findings


@dataclass(frozen=True)
class Outcome:
    """How an arm compares with the baseline."""

    difference: float
    """as a share of 1; its interval reaches 0.02 to both sides"""
    verdict: str
    first: bool = False
    """whether no arm is measurably better"""
    unresolved: bool = False


BETTER = Outcome(0.05, "better", first=True)
# Beats the baseline, but is itself beaten by another arm.
LESS_BETTER = Outcome(0.02, "better")
TIE = Outcome(0.01, "tie")
# A difference on these pictures, which other seeds might not show.
UNRESOLVED = Outcome(0.03, "tie", unresolved=True)
WORSE = Outcome(-0.05, "worse")
# The baseline is not compared with itself.
BASELINE = None

Outcomes = dict[str, Outcome | None]


def row_of_arm(arm: str, outcome: Outcome | None, above_chance: bool) -> dict[str, Any]:
    """What a summary says of an arm, as far as sentences are made of it."""
    difference = 0.0
    first = False
    versus_baseline = None
    if outcome is not None:
        difference = outcome.difference
        first = outcome.first
        versus_baseline = {
            "difference": difference,
            "interval": [difference - 0.02, difference + 0.02],
            "verdict": outcome.verdict,
            "unresolved": outcome.unresolved,
        }
    versus_chance = "tie"
    if above_chance:
        versus_chance = "better"
    return {
        "arm": arm,
        "mean": {"score": 0.6 + difference, "interval": [0.5, 0.7]},
        "first": first,
        "layers": [1],
        "versus_chance": {"verdict": versus_chance},
        "versus_baseline": versus_baseline,
    }


def summary_of(
    outcomes: Outcomes,
    *,
    above_chance: bool = True,
    seed_noise: bool = True,
    single_layer: tuple[str, ...] = (),
    leaders: tuple[dict[str, Any], ...] = (),
) -> dict[str, Any]:
    """A summary of arms with these outcomes, in the order of their scores.

    Args:
        outcomes: by arm; the baseline is called `base`.
        above_chance: whether the arms have learned anything.
        seed_noise: whether arms have two seeds.
        single_layer: names of the arms that use one layer.
        leaders: the best single-layer arm of each family.
    """
    arms = []
    for arm, outcome in outcomes.items():
        arms.append(row_of_arm(arm, outcome, above_chance))
    noise = None
    if seed_noise:
        noise = {"sd": 0.02, "df": 3, "spread": 0.03, "spread_arm": "base"}
    return {
        "arms": arms,
        "baseline": "base",
        "noise": noise,
        "leaders": list(leaders),
        "single_layer": list(single_layer),
        "chance": {"mean": 0.4},
    }


@pytest.mark.parametrize(
    ("outcomes", "sentence"),
    [
        # Of one arm that wins, the number is told; what ties with the baseline is not.
        (
            {"a": BETTER, "b": TIE, "base": BASELINE},
            "a beats the baseline base by 5.0 points (95 % interval 3.0 to 7.0).",
        ),
        (
            {"a": BETTER, "b": BETTER, "base": BASELINE, "c": WORSE},
            "a and b beat the baseline base; a and b are tied for first; c is worse.",
        ),
        (
            {"a": BETTER, "b": LESS_BETTER, "base": BASELINE},
            "a and b beat the baseline base; a leads, "
            "with +5.0 points (95 % interval +3.0 to +7.0).",
        ),
        # A tie may lie to both sides: its numbers have signs.
        (
            {"a": TIE, "base": BASELINE},
            "a and the baseline base tie: +1.0 points (95 % interval −1.0 to +3.0).",
        ),
        (
            {"a": UNRESOLVED, "base": BASELINE},
            "Not resolved: a differs from the baseline base by +3.0 points "
            "(95 % interval +1.0 to +5.0), too little for the noise between seeds.",
        ),
        (
            {"base": BASELINE, "a": WORSE, "b": WORSE},
            "The baseline base is best: a and b are all worse.",
        ),
        # "Worse" is the sign, also of the interval.
        (
            {"base": BASELINE, "a": WORSE},
            "The baseline base is best: a is worse by 5.0 points (95 % interval 3.0 to 7.0).",
        ),
        (
            {"b": TIE, "base": BASELINE, "a": WORSE},
            "No arm beats the baseline base: a is worse, b ties with it.",
        ),
        (
            {"base": BASELINE},
            "Only the baseline base has finished: there is nothing to compare yet.",
        ),
    ],
)
def test_headlines(outcomes: Outcomes, sentence: str):
    assert findings(summary_of(outcomes))["headline"] == sentence


def test_nothing_is_claimed_for_arms_at_chance():
    """An arm that has learned nothing may still differ from another one."""
    summary = summary_of({"a": BETTER, "base": BASELINE}, above_chance=False)

    sentences = findings(summary)

    assert sentences["headline"].startswith("No arm is measurably above chance")
    assert "Not measurably above that: a and base." in sentences["learning"]


COLOUR_LEADER = {"family": "colour", "leader": "a", "beyond_noise": True}
COUNT_LEADER = {"family": "count", "leader": "b", "beyond_noise": False}


def test_a_layer_that_leads_in_a_family_is_named_with_the_share_of_noise():
    summary = summary_of(
        {"a": TIE, "base": BASELINE},
        single_layer=("a", "base"),
        leaders=(COLOUR_LEADER, COUNT_LEADER),
    )

    assert findings(summary)["layers"] == (
        "Of the 2 single-layer arms, a leads on colour beyond noise; elsewhere "
        "(1 of 2 families) the order is noise."
    )


def test_no_layer_is_named_where_the_order_is_noise():
    """With one seed an arm, the sentence says what was not measured."""
    summary = summary_of(
        {"a": TIE, "base": BASELINE},
        seed_noise=False,
        single_layer=("a", "base"),
        leaders=(COUNT_LEADER,),
    )

    assert findings(summary)["layers"] == (
        "Among 2 single-layer arms none leads in a family beyond noise "
        "(items only; seed noise not measured)."
    )
