"""How an answer is scored."""

import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from layerfuse.evaluate.records import AnswerRecord, RunScores

QUOTES = "'\"“”„‘’‚«»‹›「」『』"
STOPS = ".,!…。．、，！।॥۔،።፣"
"""Full stops, commas and exclamation marks of Latin, Chinese, Japanese, Indian, Arabic and
Ethiopian writing."""
DECIMAL_POINTS = ".,．，。、،።۔।"
"""Full stops and commas, which before a digit make a number smaller: `.5` and `,5` are not `5`."""
UNSEEN = dict.fromkeys(map(ord, "\u00ad\u200b\u200e\u200f\u2060\ufeff"))
"""Characters that nobody sees and that change no word: the byte order mark, spaces without width,
marks of direction, soft hyphens."""


def normalize(text: str) -> str:
    """Write an answer so that equal ones are equal texts.

    Args:
        text: an answer.

    Returns:
        It in lower case, with composed accents and single spaces, without characters that nobody
        sees, and without full stops, commas, exclamation marks and quotes at its ends. A full stop
        or a comma before a number stays, because it belongs to it, and so do signs and units
        (`-`, `+`, `%`). An answer of nothing but such marks stays as it is.
    """
    composed = unicodedata.normalize("NFC", text.translate(UNSEEN))
    single_spaced = " ".join(composed.lower().split())
    bare = single_spaced.rstrip(" " + QUOTES + STOPS)
    without_stops = bare.lstrip(" " + QUOTES + STOPS)
    before = bare[: len(bare) - len(without_stops)]
    # Digits of any writing, and fractions such as one half.
    is_number = without_stops[:1].isnumeric()
    if is_number and before.endswith(tuple(DECIMAL_POINTS)):
        return before[-1] + without_stops
    return without_stops or single_spaced


def exact_match(prediction: str, answer: str) -> float:
    """Score a prediction.

    Args:
        prediction: what the model said.
        answer: what was expected.

    Returns:
        1.0 if the two are the same after `normalize`, else 0.0; an empty prediction is never
        right.
    """
    said = normalize(prediction)
    return float(bool(said) and said == normalize(answer))


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
