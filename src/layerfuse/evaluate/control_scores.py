"""The scores of a guided model beside its own without what guides it, on the same resamples."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from layerfuse.evaluate.records import AnswerRecord
from layerfuse.evaluate.score_table import Bootstrap, GroupKey, ScoreTable, TestedModel


def answers_under(control: str, answers: Sequence[AnswerRecord]) -> list[AnswerRecord]:
    """Give answers as if what the model said under a control were its answers.

    Args:
        control: the name of one that all answers hold.
        answers: of a guided model.

    Returns:
        The answers in the same order, with the scores of the control.
    """
    return [replace(answer, score=answer.controls[control].score) for answer in answers]


def table_with_controls(
    models: Sequence[TestedModel], bootstrap: Bootstrap, key: GroupKey
) -> ScoreTable:
    """Resample the answers of a guided model, or of one arm's models, beside its controls.

    Args:
        models: of one arm, one a seed.
        bootstrap: how pictures are redrawn.
        key: the group of an answer.

    Returns:
        The table; its arm 0 is the guided one, the controls follow in the order of the answers'.
    """
    all_models = list(models)
    for control in models[0].answers[0].controls:
        for model in models:
            answers = answers_under(control, model.answers)
            all_models.append(TestedModel(f"{model.arm} ({control})", model.seed, answers))
    return ScoreTable.from_models(all_models, bootstrap, key)


def mean_weights(answers: Sequence[AnswerRecord], key: GroupKey) -> dict[str, list[float]]:
    """Give the mean weights over layers or groups for each group of questions.

    Args:
        answers: of a guided strategy; those to questions without a picture have no weights and do
            not count.
        key: the group of an answer.

    Returns:
        By group, sorted; numbers with five decimals.
    """
    weights: dict[str, list[list[float]]] = {}
    for answer in answers:
        if answer.weights is not None:
            weights.setdefault(str(key(answer)), []).append(answer.weights)
    means: dict[str, list[float]] = {}
    for group in sorted(weights):
        means[group] = np.mean(weights[group], axis=0).round(5).tolist()
    return means
