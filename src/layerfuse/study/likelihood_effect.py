"""How likely each arm finds the right answers, beside how often it gives them."""

from collections.abc import Sequence
from dataclasses import dataclass

from layerfuse.evaluate.averages import scored_by_likelihood
from layerfuse.evaluate.records import FinishedRun
from layerfuse.evaluate.score_table import Bootstrap, ScoreTable, family_of
from layerfuse.evaluate.significance import contrast


@dataclass(frozen=True)
class ArmLikelihood:
    """The log-likelihood of the right answers under one arm.

    Attributes:
        mean: in nats a token, the mean over families and seeds.
        difference: to the baseline; None for the baseline itself.
        interval: 95 % interval [low, high] of the difference, made as those of accuracies are; None
            for the baseline.
    """

    mean: float
    difference: float | None = None
    interval: list[float] | None = None


def compare_likelihoods(
    runs: Sequence[FinishedRun], baseline: str, bootstrap: Bootstrap
) -> dict[str, ArmLikelihood]:
    """Compare all arms with the baseline by the log-likelihood of the right answers.

    Args:
        runs: all finished runs; they answer the same questions.
        baseline: the arm that all others are compared with.
        bootstrap: how pictures are redrawn.

    Returns:
        By the arm's name; nothing where a run has not measured it, as those of older versions.
    """
    measured: list[FinishedRun] = []
    for run in runs:
        answers = scored_by_likelihood(run.answers)
        if not answers:
            return {}
        measured.append(FinishedRun(run.record, answers))
    # The same table as for accuracy, but for what guessing would score.
    scores = ScoreTable.from_runs(measured, bootstrap, family_of)
    reference = scores.arms.index(baseline)
    likelihoods: dict[str, ArmLikelihood] = {}
    for position, arm in enumerate(scores.arms):
        mean = float(scores.mean.value[position])
        if position == reference:
            likelihoods[arm] = ArmLikelihood(mean)
            continue
        versus = contrast(scores.mean, position, reference)
        likelihoods[arm] = ArmLikelihood(mean, versus.difference, versus.interval)
    return likelihoods
