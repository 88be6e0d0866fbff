"""Whether a cheap look at the frozen encoder predicts what trained.

Every criterion ranks the selections of layers that a study trained; Spearman's rank correlation
with their accuracy says how well it does.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.records import RunRecord, read_records

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

Trained = dict[tuple[int, ...], dict[int, dict[str, float]]]
"""Accuracy after training, 0..1, by selection of layers, by seed, and by family of questions."""


@dataclass(frozen=True)
class _Selection:
    """One selection of layers: how it trained, and what the criteria say of it."""

    layers: tuple[int, ...]
    trained: float
    """Mean accuracy over families and seeds."""
    by_seed: dict[int, float]
    """Mean accuracy over families."""
    by_family: dict[str, tuple[float, float]]
    """Accuracy after training (mean over seeds) and of the probes on mean tokens."""
    criteria: dict[str, float]

    def record(self) -> dict[str, Any]:
        """The selection as it stands in `recommend.json`, whose keys are text."""
        by_seed = {}
        for seed, accuracy in self.by_seed.items():
            by_seed[str(seed)] = accuracy
        by_family = {}
        for family, accuracies in self.by_family.items():
            by_family[family] = list(accuracies)
        return {
            "layers": list(self.layers),
            "trained": self.trained,
            "seeds": by_seed,
            "families": by_family,
            **self.criteria,
        }


def trained_scores(study: Path) -> Trained:
    """Read the accuracy of every selection of layers that a study trained.

    Args:
        study: the folder of a finished study.

    Returns:
        Accuracy, 0..1, by selection (its layers ascending), seed and family of questions.

    Raises:
        LayerfuseError: results.jsonl cannot be read, two arms share their layers, so that layers
            do not decide the score, or there are fewer than four selections.
    """
    arm_of: dict[tuple[int, ...], str] = {}
    scores: Trained = {}
    for record in read_records(study / "results.jsonl", RunRecord):
        chosen = set(record.layers)
        # Some strategies read a deep layer (`base`) beside the selected ones
        base = record.fusion.get("base")
        if base is not None:
            chosen.add(base)
        layers = tuple(sorted(chosen))

        # An arm appears once per seed; another arm of the same layers is another strategy
        first_arm = arm_of.setdefault(layers, record.arm)
        if first_arm != record.arm:
            raise LayerfuseError(f"arms {first_arm!r} and {record.arm!r} of {study} share {layers}")
        by_seed = scores.setdefault(layers, {})
        by_seed[record.seed] = record.scores.families
    if len(scores) < MINIMUM:
        raise LayerfuseError(
            f"{study} holds {len(scores)} selections; a correlation needs at least {MINIMUM}"
        )
    return scores


def validate(study: Path, look: dict[str, Any], probes: dict[str, Any]) -> dict[str, Any]:
    """Correlate every criterion with the mean accuracy after training, over selections of layers.

    Only the families count that were both trained and probed. Scores of single layers (entropy,
    dimension, depth) are averaged over a selection.

    Args:
        study: the folder of a finished study.
        look: what `similarity.json` holds of the same encoder.
        probes: what `probe.json` holds of it; every trained selection must be probed.

    Returns:
        The report, as plain values for JSON:

        * `study`: its name; `families`: those that count.
        * `selections`: a row for each, with its accuracy and its criteria.
        * `correlations`: by scope (`selections`, `single layers`) and criterion, what
          `rank_correlation` gives.
        * `within_families`: the same for probes on mean tokens, family by family.
        * `between_seeds`: the mean correlation of two seeds of the study with each other, which no
          criterion can be expected to exceed by much; None with one seed.

    Raises:
        LayerfuseError: the study cannot be used, no family is common, or a selection that trained
            was not probed.
    """
    trained = trained_scores(study)
    families = _common_families(trained, probes)
    if not families:
        raise LayerfuseError(f"no family of {study} was probed; probed: {list(probes['tasks'])}")
    mean_rows = _rows_by_layers(probes["mean"])
    grid_rows = _rows_by_layers(probes["grid"])
    not_probed = [list(layers) for layers in trained if layers not in mean_rows]
    if not_probed:
        raise LayerfuseError(f"{study} has selections that were not probed: {not_probed}")

    # An undefined score is None in JSON; as NaN it makes its correlation undefined
    entropy = np.array(look["entropy"], float)
    dimension = np.array(look["dimension"], float)
    selections = []
    for layers, by_seed in trained.items():
        by_mean = _accuracies(mean_rows[layers], families)
        by_grid = _accuracies(grid_rows[layers], families)
        positions = list(layers)
        criteria = {
            "probes, mean tokens": float(np.mean(by_mean)),
            "probes, grid": float(np.mean(by_grid)),
            "matrix entropy": float(entropy[positions].mean()),
            "intrinsic dimension": float(dimension[positions].mean()),
            "depth": float(np.mean(layers)),
            "number of layers": len(layers),
        }
        selections.append(_selection(layers, by_seed, families, by_mean, criteria))
    return {
        "study": study.name,
        "selections": [selection.record() for selection in selections],
        "families": families,
        "correlations": _correlations(selections),
        "within_families": _within_families(selections, families),
        "between_seeds": _between_seeds(selections),
    }


def _common_families(trained: Trained, probes: dict[str, Any]) -> list[str]:
    """The families that all runs answered and probes read, in alphabetical order."""
    common = set(probes["tasks"])
    for by_seed in trained.values():
        for scores in by_seed.values():
            common &= set(scores)
    return sorted(common)


def _rows_by_layers(rows: list[dict[str, Any]]) -> dict[tuple[int, ...], dict[str, Any]]:
    """The results per task of every probed selection."""
    return {tuple(row["layers"]): row["tasks"] for row in rows}


def _accuracies(tasks: dict[str, Any], families: list[str]) -> list[float]:
    """What probes read of some families."""
    return [tasks[family]["accuracy"] for family in families]


def _selection(
    layers: tuple[int, ...],
    scores: dict[int, dict[str, float]],
    families: list[str],
    probed: list[float],
    criteria: dict[str, float],
) -> _Selection:
    """Average the accuracies of a selection over seeds and over families."""
    by_seed = {}
    for seed, by_name in scores.items():
        accuracies = [by_name[family] for family in families]
        by_seed[seed] = float(np.mean(accuracies))

    by_family = {}
    trained = []
    for family, probe_accuracy in zip(families, probed, strict=True):
        accuracies = [by_name[family] for by_name in scores.values()]
        accuracy = float(np.mean(accuracies))
        by_family[family] = (accuracy, probe_accuracy)
        trained.append(accuracy)
    return _Selection(
        layers=layers,
        trained=float(np.mean(trained)),
        by_seed=by_seed,
        by_family=by_family,
        criteria=criteria,
    )


def _correlations(selections: list[_Selection]) -> dict[str, dict[str, Any]]:
    """How well each criterion ranks all selections, and the single layers among them."""
    # More layers train better whatever they are, so single layers are also looked at alone
    singles = [selection for selection in selections if len(selection.layers) == 1]
    correlations = {}
    for scope, part in (("selections", selections), ("single layers", singles)):
        trained = [selection.trained for selection in part]
        by_criterion = {}
        for name in CRITERIA:
            values = [selection.criteria[name] for selection in part]
            by_criterion[name] = rank_correlation(values, trained)
        correlations[scope] = by_criterion
    return correlations


def _within_families(selections: list[_Selection], families: list[str]) -> dict[str, Any]:
    """How well the probes of a family rank the selections by what trained on that family."""
    correlations = {}
    for family in families:
        trained = []
        probed = []
        for selection in selections:
            trained_accuracy, probe_accuracy = selection.by_family[family]
            trained.append(trained_accuracy)
            probed.append(probe_accuracy)
        correlations[family] = rank_correlation(trained, probed)
    return correlations


def _between_seeds(selections: list[_Selection]) -> float | None:
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
            correlations.append(correlation["rho"])
    if not correlations:
        return None
    return float(np.mean(correlations))


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> dict[str, Any] | None:
    """Compute Spearman's rank correlation rho of n pairs.

    Its 95 % interval is that of Bonett & Wright 2000: Fisher's z = atanh(rho) has the variance
    (1 + rho²/2) / (n - 3).

    Args:
        x: n numbers.
        y: n numbers, paired with `x`.

    Returns:
        `rho` in -1..1, its `interval` (low, high), and `n`; None where one side is constant or
        undefined, or n is below 4.
    """
    # scipy.stats takes half a second to import
    from scipy.stats import spearmanr

    if len(x) < MINIMUM or not np.isfinite([*x, *y]).all():
        return None
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    rho = float(np.asarray(spearmanr(x, y))[0])
    # atanh is infinite at 1
    z = math.atanh(max(-0.9999, min(0.9999, rho)))
    half = 1.96 * math.sqrt((1 + rho**2 / 2) / (len(x) - 3))
    return {
        "rho": rho,
        "interval": [math.tanh(z - half), math.tanh(z + half)],
        "n": len(x),
    }
