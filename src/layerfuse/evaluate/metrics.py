"""How an answer is scored."""

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
    rows = list(predictions)

    def means(kind: str) -> dict[Any, float]:
        hits: dict[Any, list[bool]] = defaultdict(list)
        for row in rows:
            hits[row[kind]].append(row["correct"])
        return {name: sum(found) / len(found) for name, found in hits.items()}

    families, novelty = means("family"), means("novel")
    found = {"mean": sum(families.values()) / len(families), "families": families}
    found |= {"categories": means("category")}
    return {**found, **{"novel" if novel else "seen": share for novel, share in novelty.items()}}
