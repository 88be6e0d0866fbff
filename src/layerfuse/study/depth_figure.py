"""What single layers are good for: scores by kind of question against the layer, normalised.

As figure 3 of IGVA (2501.08443) and figure 2 of "Rethinking Visual Layer Selection" (2504.21447).
"""

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from layerfuse.evaluate.averages import scores
from layerfuse.evaluate.records import FinishedRun

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
    """

    setting: str
    groups: dict[str, SeedScores]


def layer_scores(runs: list[FinishedRun]) -> list[DepthScores]:
    """Collect what single layers score.

    Args:
        runs: all finished runs of a study.

    Returns:
        One for each setting of the strategy `single` with at least three layers; of most studies
        one or none.
    """
    # Arms that differ in more than the layer do not lie on one curve.
    by_setting: dict[str, list[FinishedRun]] = {}
    for run in runs:
        if run.record.fusion["name"] == "single":
            options = json.dumps(run.record.fusion, sort_keys=True)
            by_setting.setdefault(options, []).append(run)
    settings = [of_setting[0].record.fusion for of_setting in by_setting.values()]
    collected = []
    for of_setting in by_setting.values():
        layers = {run.record.layers[0] for run in of_setting}
        if len(layers) >= LEAST_LAYERS:
            setting = _setting_text(of_setting[0].record.fusion, settings)
            collected.append(DepthScores(setting, _groups(of_setting)))
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


def _groups(runs: list[FinishedRun]) -> dict[str, SeedScores]:
    """The scores by group of questions and layer, both in order."""
    names = {answer.category for answer in runs[0].answers}
    by_category = len(names) > 1
    if not by_category:
        names = {answer.family for answer in runs[0].answers}
    # All names, also of groups without scores: a group's place decides its look.
    groups: dict[str, SeedScores] = {name: {} for name in sorted(names)}
    for run in sorted(runs, key=lambda run: run.record.layers[0]):
        of_run = scores(run.answers)
        by_name = of_run.categories if by_category else of_run.families
        for name, score in by_name.items():
            # A score that is no number would leave none to the best layer.
            if math.isfinite(score):
                groups[name].setdefault(run.record.layers[0], []).append(score)
    return groups


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
