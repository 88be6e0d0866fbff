"""Whether a cheap look at the frozen encoder predicts what trained.

Every criterion ranks the selections of layers that a study trained; Spearman's rank correlation
with their accuracy says how well it does.
"""

import math
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.records import RunRecord, read_records
from layerfuse.look.probe_report import Probes, TaskReading
from layerfuse.look.recommendation import (
    Correlation,
    Correlations,
    FamilyAccuracy,
    TrainedSelection,
    Validation,
)
from layerfuse.look.similarity_report import LayerScores
from layerfuse.model.config import strategy_of
from layerfuse.vision.selection import select

CRITERIA = (
    "probes, mean tokens",
    "probes, grid",
    "matrix entropy",
    "intrinsic dimension",
    "depth",
    "number of layers",
)
"""What may predict the accuracy after training, in the order of the report."""
MINIMUM = 4
"""Selections that a correlation needs: its interval divides by their number less 3."""

PLAIN = ("single", "concat")
"""strategies that read layers as they are, side by side"""
Trained = dict[tuple[int, ...], dict[int, dict[str, float]]]
"""Accuracy after training, 0..1, by selection of layers, by seed, and by family of questions."""


def trained_scores(study: Path) -> Trained:
    """Read the accuracy of every selection of layers that a study trained.

    Criteria know of layers alone: where several arms read the same ones by other strategies, the
    first that sets them side by side stands for the selection, as arms of `recommend` do; without
    such an arm, the first of all.

    Args:
        study: the folder of a finished study.

    Returns:
        Accuracy, 0..1, by selection (its layers ascending), seed and family of questions.

    Raises:
        LayerfuseError: results.jsonl cannot be read, or there are fewer than four selections.
    """
    records = read_records(study / "results.jsonl", RunRecord)
    arm_of: dict[tuple[int, ...], str] = {}
    # Arms are compared in the order of the study, plain ones before all others.
    for record in sorted(records, key=lambda record: record.fusion["name"] not in PLAIN):
        arm_of.setdefault(_layers_read(record), record.arm)
    scores: Trained = {}
    for record in records:
        layers = _layers_read(record)
        if record.arm == arm_of[layers]:
            by_seed = scores.setdefault(layers, {})
            by_seed[record.seed] = record.scores.families
    if len(scores) < MINIMUM:
        raise LayerfuseError(
            f"{study} holds {len(scores)} selections; a correlation needs at least {MINIMUM}"
        )
    return scores


def _layers_read(record: RunRecord) -> tuple[int, ...]:
    """The layers that a run reads, ascending: some strategies read a deep one (`base`) beside those
    that are selected."""
    selection = select(record.layers, record.depth)
    return strategy_of(record.fusion).options.taps(selection)


def validate(
    study: Path,
    scores: LayerScores,
    *,
    mean: Probes,
    grid: Probes,
    tasks: Sequence[str],
) -> Validation:
    """Correlate every criterion with the mean accuracy after training, over selections of layers.

    Only the families count that were both trained and probed. Scores of single layers (entropy,
    dimension, depth) are averaged over a selection.

    Args:
        study: the folder of a finished study.
        scores: of the layers of the same encoder.
        mean: probes on mean tokens of it; every trained selection must be probed.
        grid: the same on the grid.
        tasks: the probed families that may count.

    Returns:
        What each selection scored, and the correlations.

    Raises:
        LayerfuseError: the study cannot be used, no family is common, or a selection that trained
            was not probed.
    """
    trained = trained_scores(study)
    families = _common_families(trained, tasks)
    if not families:
        raise LayerfuseError(f"no family of {study} was probed; probed: {list(tasks)}")
    # Both kinds of features were probed for the same selections
    mean_readings = _by_layers(mean)
    grid_readings = _by_layers(grid)
    not_probed = [list(layers) for layers in trained if layers not in mean_readings]
    if not_probed:
        raise LayerfuseError(f"{study} has selections that were not probed: {not_probed}")

    selections = []
    for layers, by_seed in trained.items():
        by_mean = _accuracies(mean_readings[layers], families)
        by_grid = _accuracies(grid_readings[layers], families)
        positions = list(layers)
        # An undefined score of a layer makes that of the selection, and its correlation, undefined
        criteria = {
            "probes, mean tokens": float(np.mean(list(by_mean.values()))),
            "probes, grid": float(np.mean(list(by_grid.values()))),
            "matrix entropy": float(scores.entropy[positions].mean()),
            "intrinsic dimension": float(scores.dimension[positions].mean()),
            "depth": float(np.mean(layers)),
            "number of layers": len(layers),
        }
        by_family = _by_family(by_seed, by_mean)
        accuracies = [accuracy.trained for accuracy in by_family.values()]
        selections.append(
            TrainedSelection(
                layers=layers,
                trained=float(np.mean(accuracies)),
                by_seed=_means_over(families, by_seed),
                by_family=by_family,
                criteria=criteria,
            )
        )
    return Validation(
        study=study.name,
        selections=selections,
        families=families,
        correlations=_correlations(selections),
        within_families=_within_families(selections, families),
        between_seeds=_between_seeds(selections),
    )


def _common_families(trained: Trained, tasks: Sequence[str]) -> list[str]:
    """The families that all runs answered and probes read, in alphabetical order."""
    common = set(tasks)
    for by_seed in trained.values():
        for scores in by_seed.values():
            # A run may have been tested on other families than the first
            common &= set(scores)
    return sorted(common)


def _by_layers(probes: Probes) -> dict[tuple[int, ...], dict[str, TaskReading]]:
    """What was read of every probed selection, by task."""
    readings = {}
    for selection in probes.selections:
        readings[tuple(selection.layers)] = selection.tasks
    return readings


def _accuracies(readings: dict[str, TaskReading], families: list[str]) -> dict[str, float]:
    """What probes read of some families."""
    return {family: readings[family].accuracy for family in families}


def _by_family(
    by_seed: dict[int, dict[str, float]],
    probed: dict[str, float],
) -> dict[str, FamilyAccuracy]:
    """The accuracy of a selection on each family, after training the mean over seeds."""
    by_family = {}
    # Probes have no seeds of training; their accuracy stands beside the mean of all runs
    for family, probe_accuracy in probed.items():
        accuracies = [by_name[family] for by_name in by_seed.values()]
        by_family[family] = FamilyAccuracy(
            trained=float(np.mean(accuracies)),
            probed=probe_accuracy,
        )
    return by_family


def _means_over(families: list[str], by_seed: dict[int, dict[str, float]]) -> dict[int, float]:
    """The mean accuracy of a selection over some families, for each seed."""
    means = {}
    for seed, by_name in by_seed.items():
        accuracies = [by_name[family] for family in families]
        means[seed] = float(np.mean(accuracies))
    return means


def _correlations(selections: list[TrainedSelection]) -> dict[str, Correlations]:
    """How well each criterion ranks all selections, and the single layers among them."""
    # More layers train better whatever they are, so single layers are also looked at alone
    singles = [selection for selection in selections if len(selection.layers) == 1]
    correlations = {}
    for scope, part in (("selections", selections), ("single layers", singles)):
        trained = [selection.trained for selection in part]
        by_criterion: Correlations = {}
        for name in CRITERIA:
            values = [selection.criteria[name] for selection in part]
            by_criterion[name] = rank_correlation(values, trained)
        correlations[scope] = by_criterion
    return correlations


def _within_families(selections: list[TrainedSelection], families: list[str]) -> Correlations:
    """How well the probes of a family rank the selections by what trained on that family."""
    correlations: Correlations = {}
    for family in families:
        trained = []
        probed = []
        for selection in selections:
            accuracy = selection.by_family[family]
            trained.append(accuracy.trained)
            probed.append(accuracy.probed)
        correlations[family] = rank_correlation(trained, probed)
    return correlations


def _between_seeds(selections: list[TrainedSelection]) -> float | None:
    """How well one seed of the study ranks the selections of another, on average."""
    # An unfinished study lacks some seeds of some arms
    common = set(selections[0].by_seed)
    for selection in selections:
        common &= set(selection.by_seed)
    correlations = []
    for first, second in combinations(sorted(common), 2):
        correlation = rank_correlation(
            [selection.by_seed[first] for selection in selections],
            [selection.by_seed[second] for selection in selections],
        )
        if correlation is not None:
            correlations.append(correlation.rho)
    if not correlations:
        return None
    return float(np.mean(correlations))


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> Correlation | None:
    """Compute Spearman's rank correlation rho of n pairs.

    Its 95 % interval is that of Bonett & Wright 2000: Fisher's z = atanh(rho) has the variance
    (1 + rho²/2) / (n - 3).

    Args:
        x: n numbers.
        y: n numbers, paired with `x`.

    Returns:
        The correlation; None where one side is constant or undefined, or n is below 4.
    """
    # scipy.stats takes half a second to import
    from scipy.stats import spearmanr

    # An undefined score of one layer makes the whole order undefined
    if len(x) < MINIMUM or not np.isfinite([*x, *y]).all():
        return None
    # Without an order on one side there is nothing to agree with
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    rho = float(np.asarray(spearmanr(x, y))[0])
    # atanh is infinite at 1
    z = math.atanh(max(-0.9999, min(0.9999, rho)))
    half = 1.96 * math.sqrt((1 + rho**2 / 2) / (len(x) - 3))
    return Correlation(
        rho=rho,
        interval=[math.tanh(z - half), math.tanh(z + half)],
        n=len(x),
    )
