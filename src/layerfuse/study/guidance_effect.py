"""Does the guidance matter? Guided arms against themselves without what guides them."""

from dataclasses import dataclass

import numpy as np

from layerfuse.evaluate.control_scores import mean_weights, table_with_controls
from layerfuse.evaluate.records import AnswerRecord, FinishedRun
from layerfuse.evaluate.score_table import Bootstrap, TestedModel, family_of
from layerfuse.evaluate.significance import (
    ArmScore,
    JudgedContrast,
    Scores,
    arm_score,
    contrast_of_models,
    judge,
)


@dataclass(frozen=True)
class ControlComparison:
    """The scores of a guided arm (the first) and of its controls; `column` is one control's."""

    arm: str
    control: str
    runs: list[FinishedRun]
    scores: Scores
    column: int


@dataclass(frozen=True)
class GuidanceRow:
    """A guided arm against itself without its guidance.

    Attributes:
        arm: the guided arm.
        control: what replaces its guidance.
        guided: its score.
        controlled: its score under the control.
        weights: mean weights over layers or groups, by family of questions.
        spread: standard deviation of a weight over questions.
        difference: guided minus controlled.
    """

    arm: str
    control: str
    guided: ArmScore
    controlled: ArmScore
    weights: dict[str, list[float]]
    spread: float
    difference: JudgedContrast


def guidance_rows(runs: list[FinishedRun], bootstrap: Bootstrap) -> list[GuidanceRow]:
    """Compare each guided arm with itself under each control.

    The same trained models answer the same questions, so that the difference holds no noise of
    seeds beyond what the intervals over pictures show.

    Args:
        runs: all finished runs.
        bootstrap: how pictures are redrawn.

    Returns:
        One row per guided arm and control; verdicts are corrected for all rows together.
    """
    runs_by_arm: dict[str, list[FinishedRun]] = {}
    guided_arms = []
    for run in runs:
        arm = run.record.arm
        runs_by_arm.setdefault(arm, []).append(run)
        if run.answers[0].controls and arm not in guided_arms:
            guided_arms.append(arm)

    comparisons = []
    for arm in guided_arms:
        comparisons.extend(control_comparisons(arm, runs_by_arm[arm], bootstrap))
    # One model gives both answers: training it again would move them together.
    contrasts = [contrast_of_models(each.scores, 0, each.column) for each in comparisons]

    rows = []
    for comparison, difference in zip(comparisons, judge(contrasts, bootstrap.level), strict=True):
        rows.append(
            GuidanceRow(
                arm=comparison.arm,
                control=comparison.control,
                guided=arm_score(comparison.scores, 0),
                controlled=arm_score(comparison.scores, comparison.column),
                weights=mean_weights(answers_of(comparison.runs), family_of),
                spread=weight_spread(comparison.runs),
                difference=difference,
            )
        )
    return rows


def control_comparisons(
    arm: str, runs: list[FinishedRun], bootstrap: Bootstrap
) -> list[ControlComparison]:
    """Score one guided arm beside its controls, on the same resamples.

    Args:
        arm: the guided arm.
        runs: its runs.
        bootstrap: how pictures are redrawn.

    Returns:
        One comparison a control.
    """
    models = [TestedModel(arm, run.record.seed, run.answers) for run in runs]
    table = table_with_controls(models, bootstrap, family_of)
    comparisons = []
    for column, control in enumerate(runs[0].answers[0].controls, start=1):
        comparisons.append(ControlComparison(arm, control, runs, table.mean, column))
    return comparisons


def answers_of(runs: list[FinishedRun]) -> list[AnswerRecord]:
    """Give the answers of all seeds, one after the other."""
    answers = []
    for run in runs:
        answers.extend(run.answers)
    return answers


def weight_spread(runs: list[FinishedRun]) -> float:
    """Measure how far the weights of one question lie from the run's mean weights.

    Args:
        runs: the runs of one arm.

    Returns:
        The standard deviation over questions, averaged over layers and runs. Zero: the
        instruction changes nothing.
    """
    spreads = []
    # Each run learns weights of its own: pooled, seeds would pass for instructions.
    for run in runs:
        weights = [answer.weights for answer in run.answers if answer.weights is not None]
        if weights:
            spreads.append(float(np.std(weights, axis=0).mean()))
    if not spreads:
        return 0.0
    return float(np.mean(spreads))
