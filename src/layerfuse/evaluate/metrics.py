"""How an answer is scored."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from layerfuse.evaluate.records import AnswerRecord


def normalize(text: str) -> str:
    """Lower case, single spaces, no full stop, comma or quotes at the ends."""
    return " ".join(text.lower().split()).strip(" .,!'\"")


def exact_match(prediction: str, answer: str) -> float:
    """1.0 if the two are the same after `normalize`, else 0.0."""
    return float(normalize(prediction) == normalize(answer))


def scores(answers: Iterable[AnswerRecord]) -> dict[str, Any]:
    """The mean score of groups of answers.

    Args:
        answers: at least one.

    Returns:
        `mean`, the average over families (each counts the same); `families` and `categories` by
        name; `seen` and `novel` where there are such answers. Shares of 1.
    """
    families: dict[str, list[float]] = defaultdict(list)
    categories: dict[str, list[float]] = defaultdict(list)
    by_novelty: dict[str, list[float]] = defaultdict(list)
    for answer in answers:
        families[answer.family].append(answer.score)
        categories[answer.category].append(answer.score)
        by_novelty["novel" if answer.novel else "seen"].append(answer.score)
    family_means = _means(families)
    return {
        "mean": sum(family_means.values()) / len(family_means),
        "families": family_means,
        "categories": _means(categories),
        **_means(by_novelty),
    }


def _means(groups: dict[str, list[float]]) -> dict[str, float]:
    return {name: sum(group) / len(group) for name, group in groups.items()}
