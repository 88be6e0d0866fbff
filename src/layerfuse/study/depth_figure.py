"""What single layers are good for: scores by kind of question against the layer, normalised.

As figure 3 of IGVA (2501.08443) and figure 2 of "Rethinking Visual Layer Selection" (2504.21447).
"""

import json
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from layerfuse.evaluate.averages import scores
from layerfuse.evaluate.records import FinishedRun, RunRecord

if TYPE_CHECKING:
    from layerfuse import plots

LEAST_LAYERS = 3
"""Two layers are a difference, no curve."""

NO_DIFFERENCE = 1e-9
"""Scores are shares of a number of questions: any real difference is larger."""

SeedScores = dict[int, list[float]]
"""By layer, the score of each seed, 0..1."""


@dataclass(frozen=True)
class DepthScores:
    """What the arms of single layers score that share all options of the strategy.

    Attributes:
        setting: their options that other arms of single layers have otherwise; empty if none.
        groups: scores by category of questions, or by family where there is one category.
        families: scores by family.
    """

    setting: str
    groups: dict[str, SeedScores]
    families: dict[str, SeedScores]


def scored_record(run: FinishedRun) -> RunRecord:
    """Give a run's record with the scores of the answers beside it.

    Args:
        run: a finished run.

    Returns:
        The record.
    """
    return replace(run.record, scores=scores(run.answers))


def layer_scores(records: list[RunRecord]) -> list[DepthScores]:
    """Collect what single layers score.

    Args:
        records: of all finished runs of a study.

    Returns:
        One for each setting of the strategy `single` with at least three layers; of most studies
        one or none.
    """
    # Arms that differ in more than the layer do not lie on one curve.
    by_setting: dict[str, list[RunRecord]] = {}
    for record in records:
        if record.fusion["name"] == "single":
            options = json.dumps(record.fusion, sort_keys=True)
            by_setting.setdefault(options, []).append(record)
    settings = [of_setting[0].fusion for of_setting in by_setting.values()]
    collected = []
    for of_setting in by_setting.values():
        layers = {record.layers[0] for record in of_setting}
        if len(layers) < LEAST_LAYERS:
            continue
        families = _by_layer([(each.layers[0], each.scores.families) for each in of_setting])
        groups = families
        if len(of_setting[0].scores.categories) > 1:
            groups = _by_layer([(each.layers[0], each.scores.categories) for each in of_setting])
        setting = _setting_text(of_setting[0].fusion, settings)
        collected.append(DepthScores(setting, groups, families))
    return collected


def _setting_text(options: dict[str, Any], settings: list[dict[str, Any]]) -> str:
    """Name the options that are not the same in all settings."""
    names: list[str] = []
    for setting in settings:
        names += [name for name in setting if name not in names]
    texts = []
    for name in names:
        value = options.get(name)
        if any(setting.get(name) != value for setting in settings):
            texts.append(f"{name} {value}")
    return ", ".join(texts)


def _by_layer(scores_of_runs: list[tuple[int, dict[str, float]]]) -> dict[str, SeedScores]:
    """The scores by group of questions and layer, both in order.

    Args:
        scores_of_runs: the layer of each run, and its scores by group.
    """
    # All names, also of groups without scores: a group's place decides its look.
    groups: dict[str, SeedScores] = {name: {} for name in sorted(scores_of_runs[0][1])}
    for layer, by_name in sorted(scores_of_runs, key=lambda of_run: of_run[0]):
        for name, score in by_name.items():
            # A score that is no number would leave none to the best layer.
            if math.isfinite(score):
                groups[name].setdefault(layer, []).append(score)
    return groups


def family_curves(collected: list[DepthScores], family: str) -> "plots.DepthResult":
    """Give the scores in one family as they are, not on one scale.

    As figure 1b of "Rethinking Visual Layer Selection" (2504.21447), a benchmark a panel.

    Args:
        collected: scores of single layers, by setting.
        family: of questions.

    Returns:
        The curves, one a setting.
    """
    from layerfuse.plots import DepthCurve, DepthResult

    curves = []
    for index, setting in enumerate(collected):
        of_seeds = setting.families[family]
        curves.append(
            DepthCurve(
                name=setting.setting,
                index=index,
                layers=list(of_seeds),
                values=[sum(seeds) / len(seeds) for seeds in of_seeds.values()],
                lows=[min(seeds) for seeds in of_seeds.values()],
                highs=[max(seeds) for seeds in of_seeds.values()],
            )
        )
    return DepthResult("% right", curves)


def normalised(collected: DepthScores, *, from_lowest: bool) -> "plots.DepthResult":
    """Put the scores of all groups on one scale, on which the best layer of each is 1.

    Args:
        collected: scores of single layers.
        from_lowest: whether 0 is the score of the lowest layer (min-max), not a score of nothing.

    Returns:
        The curves; without those of groups in which the best layer is no better than 0 is.
    """
    from layerfuse.plots import DepthCurve, DepthResult

    curves = []
    for index, (group, of_seeds) in enumerate(collected.groups.items()):
        if not of_seeds:
            continue
        means = [sum(seeds) / len(seeds) for seeds in of_seeds.values()]
        zero = min(means) if from_lowest else 0.0
        span = max(means) - zero
        # Equal means of several seeds can differ in their last digits.
        if span < NO_DIFFERENCE:
            continue
        # Seeds are put on the scale of the means: scaled by themselves, they would all reach 1.
        curves.append(
            DepthCurve(
                name=group,
                index=index,
                layers=list(of_seeds),
                values=[(mean - zero) / span for mean in means],
                lows=[(min(seeds) - zero) / span for seeds in of_seeds.values()],
                highs=[(max(seeds) - zero) / span for seeds in of_seeds.values()],
            )
        )
    scale = "lowest layer 0, best layer 100" if from_lowest else "score, % of the best layer’s"
    return DepthResult(scale, curves)
