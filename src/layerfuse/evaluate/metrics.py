"""How an answer is scored."""

import unicodedata
from collections import defaultdict
from collections.abc import Iterable

from layerfuse.evaluate.records import AnswerRecord, RunScores

QUOTES = "'\"“”„‘’‚«»‹›「」『』"
STOPS = ".,!…。．、，！।॥۔،።፣"
"""Full stops, commas and exclamation marks of Latin, Chinese, Japanese, Indian, Arabic and
Ethiopian writing."""


def normalize(text: str) -> str:
    """Write an answer so that equal ones are equal texts.

    Args:
        text: an answer.

    Returns:
        It in lower case, with composed accents and single spaces, without full stops, commas,
        exclamation marks and quotes at its ends; a full stop before a digit stays, because it
        belongs to a number. An answer of nothing but such marks stays as it is.
    """
    composed = unicodedata.normalize("NFC", text)
    single_spaced = " ".join(composed.lower().split())
    bare = single_spaced.rstrip(" " + QUOTES + STOPS).lstrip(" " + QUOTES)
    without_stops = bare.lstrip(" " + QUOTES + STOPS)
    is_decimal = without_stops[:1].isdigit() and bare.endswith("." + without_stops)
    if is_decimal:
        return "." + without_stops
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


def scores(answers: Iterable[AnswerRecord]) -> RunScores:
    """Average the scores of groups of answers.

    Args:
        answers: at least one.

    Returns:
        The mean over families, and the mean of each group.
    """
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
    )


def _means(groups: dict[str, list[float]]) -> dict[str, float]:
    """The mean of each group, in the order of the groups."""
    return {name: sum(group) / len(group) for name, group in groups.items()}
