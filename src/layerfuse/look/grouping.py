"""Contiguous groups of similar layers and their representatives."""

from itertools import combinations, pairwise
from typing import Any

import numpy as np


def split(similarity: np.ndarray, count: int) -> list[list[int]]:
    """The best partition of n layers into `count` contiguous groups, as positions 0..n-1.

    Exact dynamic programming over all partitions. The objective is the within-group scatter of
    kernel change-point detection (Harchaoui & Cappé 2007), to be least: a group g costs
    sum_i S_ii - (1/|g|) sum_ij S_ij, which is k-means' objective in the space where the inner
    products are S. Raises ValueError if S has undefined entries or there are too few layers.
    """
    n = len(similarity)
    if not 1 <= count <= n:
        raise ValueError(f"{n} layers cannot be split into {count} groups; valid: 1..{n}")
    if not np.isfinite(similarity).all():
        raise ValueError("a layer is constant over the pictures: its similarity is undefined")
    cost = {}
    for a, b in combinations(range(n + 1), 2):
        inside = similarity[a:b, a:b]
        cost[a, b] = float(np.trace(inside) - inside.sum() / (b - a))
    best = {0: (0.0, [0])}  # for each end of the last group: the least cost, and all ends back to 0
    for groups in range(1, count + 1):
        best = {
            b: min((total + cost[a, b], [b, *ends]) for a, (total, ends) in best.items() if a < b)
            for b in range(groups, n + 1)
        }
    ends = best[n][1][::-1]
    return [list(range(a, b)) for a, b in pairwise(ends)]


def medoid(similarity: np.ndarray, group: list[int]) -> int:
    """The layer of a group that is most similar to the group; of equals, the shallowest."""
    inside = similarity[np.ix_(group, group)].sum(axis=1)
    return group[int(np.argmax(inside > inside.max() - 1e-9))]


def silhouette(similarity: np.ndarray, groups: list[list[int]]) -> float:
    """Mean silhouette width (Rousseeuw 1987) with the dissimilarity 1 - S, in -1..1.

    `groups` are those of `split`: contiguous, in order, at least two, fewer than layers.
    """
    from sklearn.metrics import silhouette_score

    distance = 1 - similarity
    np.fill_diagonal(distance, 0)  # but for rounding it is
    labels = [place for place, group in enumerate(groups) for _ in group]
    return float(silhouette_score(distance, labels, metric="precomputed"))


def all_groups(similarity: np.ndarray, layers: list[int]) -> dict[str, Any]:
    """The best groups of `layers` (ascending) for each count: {"3": {"groups", "representatives",
    "silhouette"}, ...}. The silhouette is None for a single group."""
    found: dict[str, Any] = {}
    for count in range(1, len(layers) + 1):
        parts = split(similarity, count)
        chosen = [layers[medoid(similarity, part)] for part in parts]
        width = silhouette(similarity, parts) if 1 < count < len(layers) else None
        found[str(count)] = {"groups": [[layers[k] for k in part] for part in parts]}
        found[str(count)] |= {"representatives": chosen, "silhouette": width}
    return found


def best_count(groups: dict[str, Any]) -> int:
    """The number of groups with the widest mean silhouette (the smaller of equals)."""
    widths = {int(k): g["silhouette"] for k, g in groups.items() if g["silhouette"] is not None}
    return min(widths, key=lambda k: (-widths[k], k)) if widths else 1
