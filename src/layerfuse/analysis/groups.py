"""Contiguous groups of layers, and one representative of each, from a similarity matrix."""

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
    area = np.zeros((n + 1, n + 1))
    area[1:, 1:] = similarity.cumsum(0).cumsum(1)
    trace = np.concatenate([[0.0], np.diag(similarity).cumsum()])

    def cost(a: int, b: int) -> float:
        inside = area[b, b] - area[a, b] - area[b, a] + area[a, a]
        return trace[b] - trace[a] - inside / (b - a)

    best, cut = {0: 0.0}, []
    for _ in range(count):
        step: dict[int, tuple[float, int]] = {}
        for b in range(1, n + 1):
            options = [(best[a] + cost(a, b), a) for a in best if a < b]
            if options:
                step[b] = min(options)
        best = {b: value for b, (value, _) in step.items()}
        cut.append({b: a for b, (_, a) in step.items()})
    groups, end = [], n
    for where in reversed(cut):
        groups.append(list(range(where[end], end)))
        end = where[end]
    return groups[::-1]


def medoid(similarity: np.ndarray, group: list[int]) -> int:
    """The layer of a group that is most similar to the group; of equals, the shallowest."""
    inside = similarity[np.ix_(group, group)].sum(axis=1)
    return group[int(np.argmax(inside > inside.max() - 1e-9))]


def silhouette(similarity: np.ndarray, groups: list[list[int]]) -> float:
    """Mean silhouette width (Rousseeuw 1987) with the dissimilarity 1 - S, in -1..1.

    A layer's width is (b - a) / max(a, b): a its mean distance to its own group, b to the nearest
    other one; alone in its group it is 0.
    """
    distance = 1 - similarity
    widths = []
    for group in groups:
        for k in group:
            own = [distance[k, j] for j in group if j != k]
            others = min(distance[k, other].mean() for other in groups if other is not group)
            a = float(np.mean(own)) if own else 0.0
            widths.append((others - a) / max(a, others, 1e-12) if own else 0.0)
    return float(np.mean(widths))


def all_groups(similarity: np.ndarray, layers: list[int]) -> dict[str, Any]:
    """The best groups of `layers` (ascending) for each count: {"3": {"groups", "representatives",
    "silhouette"}, ...}. The silhouette is None for a single group."""
    found = {}
    for count in range(1, len(layers) + 1):
        parts = split(similarity, count)
        several = 1 < count < len(layers)
        found[str(count)] = {
            "groups": [[layers[k] for k in part] for part in parts],
            "representatives": [layers[medoid(similarity, part)] for part in parts],
            "silhouette": silhouette(similarity, parts) if several else None,
        }
    return found


def best_count(groups: dict[str, Any]) -> int:
    """The number of groups with the widest mean silhouette (the smaller of equals)."""
    widths = {int(k): g["silhouette"] for k, g in groups.items() if g["silhouette"] is not None}
    return min(widths, key=lambda k: (-widths[k], k)) if widths else 1
