"""The claim that a kind of strategy is stable over sets of layers, from scores that are known."""

from typing import Any

import numpy as np
import pytest

from docs.layer_sets import set_spreads, spread_table, stability_claims

FLAT = {"state": "flat", "agreeing": 2, "runs": [], "reason": ""}
STUDY = "[study](study.md)"


def study_of(**by_strategy: tuple[str, list[list[float]]]) -> dict[str, Any]:
    """A summary of arms: each strategy has a kind, and the scores of its seeds for each set."""
    arms = []
    for strategy, (kind, sets) in by_strategy.items():
        for number, scores in enumerate(sets):
            arms.append(
                {
                    "arm": f"{strategy} {number}",
                    "fusion": {"name": strategy},
                    "kind": kind,
                    "layers": [number, number + 1],
                    "seeds": list(range(len(scores))),
                    "seed_means": scores,
                }
            )
    return {"arms": arms, "learning": {arm["arm"]: FLAT for arm in arms}}


def around(means: list[float], noise: float) -> list[list[float]]:
    """Two seeds on both sides of each mean."""
    return [[mean - noise, mean + noise] for mean in means]


def test_the_spread_is_that_of_the_means_and_the_noise_that_of_seeds():
    study = study_of(concat=("external direct", around([0.4, 0.5, 0.6], 0.01)))

    (spread,) = set_spreads(study)

    assert spread.variance == pytest.approx(0.01)
    # Of a mean of two seeds: half the variance of one.
    assert spread.by_seeds == pytest.approx(np.var([-0.01, 0.01], ddof=1) / 2)
    assert spread.p < 0.01
    assert "| 3 | 10.0 | 1.0 | < 0.01 |" in spread_table({STUDY: study})[-2]


def test_two_sets_are_none_to_speak_of():
    study = study_of(concat=("external direct", around([0.4, 0.5], 0.01)))
    assert set_spreads(study) == []
    assert spread_table({STUDY: study}) == []


@pytest.mark.parametrize(
    ("stable", "other", "verdict"),
    [
        ([0.500, 0.501, 0.502, 0.503, 0.504], [0.3, 0.4, 0.5, 0.6, 0.7], "holds"),
        ([0.3, 0.4, 0.5, 0.6, 0.7], [0.500, 0.501, 0.502, 0.503, 0.504], "the opposite"),
        ([0.48, 0.49, 0.50, 0.51, 0.53], [0.48, 0.49, 0.50, 0.52, 0.53], "not resolved"),
    ],
)
def test_stability_is_a_ratio_of_spreads(stable: list[float], other: list[float], verdict: str):
    study = study_of(
        concat=("external direct", around(stable, 0.001)),
        deformable=("external modular", around(other, 0.001)),
    )

    (row,) = stability_claims(study, STUDY)

    assert f"| {STUDY} | {verdict} |" in row
    ratio = float(np.std(stable) / np.std(other))
    assert f"| ratio {ratio:.1f} (" in row
    # F of 4 and 4 degrees of freedom at 97.5 %, from a table: 9.6045.
    bound = 9.6045**0.5
    assert f"({ratio / bound:.1f} to {ratio * bound:.1f}) to external modular" in row


def test_arms_that_were_still_improving_leave_no_verdict():
    study = study_of(
        concat=("external direct", around([0.5, 0.5, 0.51], 0.001)),
        deformable=("external modular", around([0.3, 0.5, 0.7], 0.001)),
    )
    study["learning"]["deformable 1"] = {**FLAT, "state": "still improving"}

    (row,) = stability_claims(study, STUDY)

    assert "not trained long enough: 1 of its 6 arms" in row
