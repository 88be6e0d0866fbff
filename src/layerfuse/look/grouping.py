"""Contiguous groups of similar layers and their representatives."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from layerfuse.errors import LayerfuseError
from layerfuse.vision.layer_groups import LayerGroups


@dataclass(frozen=True)
class _Partition:
    """The best partition of the first layers; `ends` are the borders, 0 first."""

    scatter: float
    ends: tuple[int, ...]


def split(similarity: np.ndarray, count: int) -> list[list[int]]:
    """Find the best partition of n layers into contiguous groups.

    Exact dynamic programming over all partitions. The objective is the within-group scatter of
    kernel change-point detection (Harchaoui & Cappé 2007), to be least: a group g costs
    sum_i S_ii - (1/|g|) sum_ij S_ij, which is k-means' objective in the space where the inner
    products are S.

    Args:
        similarity: S, (n, n), symmetric.
        count: number of groups, 1..n.

    Returns:
        The groups in order, each with its positions 0..n-1.

    Raises:
        LayerfuseError: S has undefined entries, or there are too few layers.
    """
    depth = len(similarity)
    if not 1 <= count <= depth:
        raise LayerfuseError(
            f"{depth} layers cannot be split into {count} groups; valid: 1..{depth}"
        )
    if not np.isfinite(similarity).all():
        raise LayerfuseError("a layer is constant over the pictures: its similarity is undefined")

    # Many partitions share a group, so each group's scatter is computed once
    scatter = _scatter_of_ranges(similarity)
    # The best partition of the first `end` layers into the groups counted so far, by `end`
    best = {0: _Partition(scatter=0.0, ends=(0,))}
    for groups in range(1, count + 1):
        longer = {}
        for end in range(groups, depth + 1):
            longer[end] = _best_extension(best, scatter, end)
        best = longer

    groups_of_layers = []
    for start, end in pairwise(best[depth].ends):
        groups_of_layers.append(list(range(start, end)))
    return groups_of_layers


def _scatter_of_ranges(similarity: np.ndarray) -> dict[tuple[int, int], float]:
    """The scatter of every range of layers (start, end), the end excluded."""
    depth = len(similarity)
    scatter = {}
    for start in range(depth):
        for end in range(start + 1, depth + 1):
            inside = similarity[start:end, start:end]
            between = inside.sum() / (end - start)
            scatter[start, end] = float(np.trace(inside) - between)
    return scatter


def _best_extension(
    best: dict[int, _Partition],
    scatter: dict[tuple[int, int], float],
    end: int,
) -> _Partition:
    """Add the group that ends at `end` to the partition with which it costs least."""
    extended = None
    for start, partition in best.items():
        if start >= end:
            continue
        total = partition.scatter + scatter[start, end]
        # Starts ascend, so that of equal partitions the one whose last group is longest stays
        if extended is None or total < extended.scatter:
            extended = _Partition(scatter=total, ends=(*partition.ends, end))
    assert extended is not None, "fewer layers than groups"
    return extended


def medoid(similarity: np.ndarray, group: list[int]) -> int:
    """Find the layer of a group that is most similar to the group.

    Args:
        similarity: (n, n).
        group: positions 0..n-1, ascending.

    Returns:
        Its position; of equals, the shallowest.
    """
    inside = similarity[np.ix_(group, group)].sum(axis=1)
    # Sums that differ by rounding only are equal
    nearest = inside > inside.max() - 1e-9
    return group[int(np.argmax(nearest))]


def silhouette(similarity: np.ndarray, groups: list[list[int]]) -> float:
    """Compute the mean silhouette width (Rousseeuw 1987) with the dissimilarity 1 - S.

    Args:
        similarity: S, (n, n).
        groups: those of `split`: contiguous, in order, at least two, fewer than n.

    Returns:
        The width, in -1..1.
    """
    from sklearn.metrics import silhouette_score

    distance = 1 - similarity
    # Rounding leaves a diagonal near 0, which scikit-learn refuses
    np.fill_diagonal(distance, 0)
    # scikit-learn wants a label for each layer
    labels = []
    for label, group in enumerate(groups):
        labels.extend([label] * len(group))
    return float(silhouette_score(distance, labels, metric="precomputed"))


def all_groups(similarity: np.ndarray, layers: list[int]) -> dict[int, LayerGroups]:
    """Find the best groups for each count of groups.

    Args:
        similarity: (n, n).
        layers: the n layers, ascending.

    Returns:
        The groups by their count, 1 first. The silhouette is None where it is undefined: for a
        single group, and for groups of one layer each.

    Raises:
        LayerfuseError: the similarity has undefined entries.
    """
    groups_by_count = {}
    for count in range(1, len(layers) + 1):
        parts = split(similarity, count)
        width = None
        if 1 < count < len(layers):
            width = silhouette(similarity, parts)
        groups_by_count[count] = LayerGroups(
            groups=[layers[part[0] : part[-1] + 1] for part in parts],
            representatives=[layers[medoid(similarity, part)] for part in parts],
            silhouette=width,
        )
    return groups_by_count


def best_count(groups_by_count: dict[int, LayerGroups]) -> int:
    """Find the number of groups with the widest mean silhouette.

    Args:
        groups_by_count: those of `all_groups`.

    Returns:
        The number, the smaller of equals; 1 if no silhouette is defined.
    """
    widest_count = 1
    widest = -np.inf
    for count in sorted(groups_by_count):
        width = groups_by_count[count].silhouette
        if width is not None and width > widest:
            widest_count = count
            widest = width
    return widest_count
