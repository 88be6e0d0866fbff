"""The mean scores of groups of answers."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from layerfuse.evaluate.records import AnswerRecord, RunScores


def scores(answers: Sequence[AnswerRecord]) -> RunScores:
    """Average the scores of groups of answers.

    Args:
        answers: at least one.

    Returns:
        The mean over families, and the mean of each group.
    """
    log_likelihood = None
    measured = scored_by_likelihood(answers)
    if measured:
        log_likelihood = scores(measured).mean
    families: dict[str, list[float]] = defaultdict(list)
    categories: dict[str, list[float]] = defaultdict(list)
    by_novelty: dict[str, list[float]] = defaultdict(list)
    for answer in answers:
        families[answer.family].append(answer.score)
        categories[answer.category].append(answer.score)
        if answer.novel:
            by_novelty["novel"].append(answer.score)
        else:
            by_novelty["seen"].append(answer.score)
    family_means = _means(families)
    return RunScores(
        # A family counts the same however many questions it has
        mean=sum(family_means.values()) / len(family_means),
        families=family_means,
        categories=_means(categories),
        by_novelty=_means(by_novelty),
        log_likelihood=log_likelihood,
    )


def scored_by_likelihood(answers: Sequence[AnswerRecord]) -> list[AnswerRecord]:
    """Put the log-likelihood of the right answer in the place of the score, to average it likewise.

    Args:
        answers: of one run.

    Returns:
        The answers with log-likelihoods, in nats a token, as scores; none where one was not
        measured.
    """
    measured: list[AnswerRecord] = []
    for answer in answers:
        if answer.log_likelihood is None:
            return []
        # Left out where it has become the score: it would be averaged a second time.
        measured.append(replace(answer, score=answer.log_likelihood, log_likelihood=None))
    return measured


def _means(groups: dict[str, list[float]]) -> dict[str, float]:
    """The mean of each group, in the order of the groups."""
    return {name: sum(group) / len(group) for name, group in groups.items()}
