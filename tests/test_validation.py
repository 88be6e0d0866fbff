"""Whether cheap criteria rank the layers as training did."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.records import RunRecord, RunScores, read_records, write_records
from layerfuse.look.probe_report import Probes
from layerfuse.look.recommendation import Validation
from layerfuse.look.similarity_report import LayerScores
from layerfuse.look.validation import rank_correlation, trained_scores, validate
from tests.made_up import run_record
from tests.small_look import probed

RISING = [0.1, 0.2, 0.4, 0.5, 0.8, 0.9]
"""Accuracy after training, by layer."""
SIX_LAYERS = [0, 1, 2, 3, 4, 5]


def validated(study: Path) -> Validation:
    """How well criteria that rise and fall with depth rank what a study of six layers trained."""
    depth = np.arange(6)
    # Entropy rises with depth, dimension falls
    scores = LayerScores(
        kept_tokens=1,
        entropy=depth / 9,
        dimension=9.0 - depth,
    )
    # Layer k reads task `t` on k of 6 pictures
    selections = []
    for layer in range(6):
        hits = "1" * layer + "0" * (6 - layer)
        selections.append(probed([layer], t=hits))
    return validate(
        study,
        scores,
        mean=Probes("mean", selections),
        grid=Probes("grid", selections),
        tasks=["t", "u"],
    )


def trained_study(
    folder: Path,
    *seeds: list[float],
    family: str = "t",
    layers: list[int] = SIX_LAYERS,
) -> Path:
    """A study's folder: the accuracy of an arm per layer, for each seed."""
    records = []
    for seed, accuracies in enumerate(seeds):
        for arm, layer in enumerate(layers):
            accuracy = accuracies[arm]
            scores = RunScores(
                mean=accuracy,
                families={family: accuracy},
                categories={},
            )
            record = run_record(
                str(arm),
                seed,
                layers=(layer,),
                scores=scores,
            )
            records.append(record)
    write_records(folder / "results.jsonl", records)
    return folder


def ranks(values: list[float]) -> list[float]:
    """The place of each value in ascending order; equal values share the mean of theirs."""
    ordered = sorted(values)
    ranks_of_values = []
    for value in values:
        places = [place for place, other in enumerate(ordered) if other == value]
        ranks_of_values.append(float(np.mean(places)))
    return ranks_of_values


def test_rank_correlation_with_its_interval() -> None:
    correlation = rank_correlation([0, 1, 2, 3, 4], [1, 0, 3, 2, 4])

    # rho = 1 - 6 · 4 / (5 · 24); the ends are tanh(atanh 0.8 ± 1.96 √((1 + 0.32) / 2))
    assert correlation is not None
    assert correlation.rho == pytest.approx(0.8)
    assert correlation.interval == pytest.approx([-0.45716, 0.99084], abs=1e-4)
    assert correlation.n == 5


def test_rank_correlation_with_ties() -> None:
    x: list[float] = [1, 1, 2, 3, 3, 3, 5]
    y: list[float] = [4, 2, 2, 6, 7, 6, 1]

    correlation = rank_correlation(x, y)

    assert correlation is not None
    expected = np.corrcoef(ranks(x), ranks(y))[0, 1]
    assert correlation.rho == pytest.approx(expected)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_perfect_rank_correlation_has_a_finite_interval(sign: int) -> None:
    """atanh is infinite at 1."""
    x = [1, 2, 3, 4]
    y = [sign * value for value in (2, 3, 5, 9)]

    correlation = rank_correlation(x, y)

    assert correlation is not None
    assert correlation.rho == pytest.approx(sign)
    for end in correlation.interval:
        assert 0 < abs(end) < 1


def test_three_pairs_or_a_constant_have_no_rank_correlation() -> None:
    assert rank_correlation([1, 2, 3], [1, 2, 3]) is None
    assert rank_correlation([1, 2, 3, 4], [5, 5, 5, 5]) is None


@pytest.mark.parametrize("sign", [1, -1])
def test_criteria_that_order_the_arms_as_training_does(sign: int, tmp_path: Path) -> None:
    # With layers that fall in accuracy, a criterion that rises with depth is wrong
    accuracies = RISING[::sign]
    study = trained_study(tmp_path, accuracies)

    report = validated(study)

    for correlations in report.correlations.values():
        # All arms have one layer
        assert correlations["number of layers"] is None
        rho = {}
        for name, correlation in correlations.items():
            if correlation is not None:
                rho[name] = round(correlation.rho, 9)
        assert rho == {
            "probes, mean tokens": sign,
            "probes, grid": sign,
            "matrix entropy": sign,
            "intrinsic dimension": -sign,
            "depth": sign,
        }
    assert report.families == ["t"]
    within_family = report.within_families["t"]
    assert within_family is not None
    assert within_family.rho == pytest.approx(sign)
    # One seed cannot be compared with another
    assert report.between_seeds is None


@pytest.mark.parametrize("sign", [1, -1])
def test_seeds_are_correlated_with_each_other(sign: int, tmp_path: Path) -> None:
    study = trained_study(tmp_path, RISING, RISING[::sign])

    report = validated(study)

    assert report.between_seeds == pytest.approx(sign)


def test_of_arms_on_the_same_layers_the_first_stands_for_them(tmp_path: Path) -> None:
    """Other strategies score otherwise, of which criteria of layers know nothing."""
    study = trained_study(tmp_path, RISING, layers=[0, 1, 2, 3, 0, 1])

    report = validated(study)

    rows = [(selection.layers, selection.trained) for selection in report.selections]
    assert [layers for layers, _ in rows] == [(0,), (1,), (2,), (3,)]
    alone = validated(trained_study(tmp_path / "alone", RISING[:4], layers=[0, 1, 2, 3]))
    assert rows == [(selection.layers, selection.trained) for selection in alone.selections]


def test_layers_side_by_side_stand_for_a_selection_before_other_strategies(tmp_path: Path) -> None:
    """What is recommended are arms that set layers side by side."""
    study = trained_study(tmp_path, RISING, layers=[0, 1, 2, 3, 0])
    records = read_records(study / "results.jsonl", RunRecord)
    # Reads the same layer alone
    other = {"name": "weighted_sum", "beside": "none"}
    records[0] = replace(records[0], fusion=other)
    write_records(study / "results.jsonl", records)

    assert trained_scores(study)[0,] == {records[4].seed: records[4].scores.families}


@pytest.mark.parametrize(
    ("fusion", "layers"),
    [
        ({"name": "group_mean", "base": 5}, (3, 5)),
        ({"name": "weighted_sum", "base": 5, "beside": "concat"}, (3, 5)),
        # Its base is not read
        ({"name": "weighted_sum", "base": 5, "beside": "none"}, (3,)),
    ],
)
def test_a_selection_is_what_the_strategy_reads(
    fusion: dict[str, Any], layers: tuple[int, ...], tmp_path: Path
) -> None:
    study = trained_study(tmp_path, RISING)
    records = read_records(study / "results.jsonl", RunRecord)
    records[3] = replace(records[3], fusion=fusion)
    write_records(study / "results.jsonl", records)

    assert list(trained_scores(study))[3] == layers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        # A correlation of three says nothing
        ({"layers": [0, 1, 2]}, "holds 3 selections"),
        ({"family": "v"}, r"no family of .* was probed; probed: \['t', 'u'\]"),
        # A deeper encoder's
        ({"layers": [0, 1, 2, 3, 4, 9]}, "9"),
    ],
)
def test_studies_that_do_not_fit(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    study = trained_study(tmp_path, RISING, **options)

    with pytest.raises(LayerfuseError, match=message):
        validated(study)
