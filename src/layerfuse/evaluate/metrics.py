"""Scores of answers."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any


def normalize(text: str) -> str:
    """Lower case, single spaces, no full stop, comma or quotes at the ends."""
    return " ".join(text.lower().split()).strip(" .,!'\"")


def exact_match(prediction: str, answer: str) -> bool:
    """Whether the two are the same after `normalize`."""
    return normalize(prediction) == normalize(answer)


def scores(predictions: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Exact-match accuracy per family and category, of seen and novel samples, and `mean`, the
    average over families (each counts the same)."""
    by: dict[str, dict[str, list[bool]]] = {
        "families": defaultdict(list),
        "categories": defaultdict(list),
        "novelty": defaultdict(list),
    }
    for row in predictions:
        by["families"][row["family"]].append(row["correct"])
        by["categories"][row["category"]].append(row["correct"])
        by["novelty"]["novel" if row["novel"] else "seen"].append(row["correct"])
    means = {
        kind: {name: sum(hits) / len(hits) for name, hits in groups.items()}
        for kind, groups in by.items()
    }
    families = means["families"]
    return {
        "mean": sum(families.values()) / len(families),
        "families": families,
        "categories": means["categories"],
        **means["novelty"],
    }
