"""Groups of similar layers: the best of all partitions, and the published structure of CLIP-L."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import silhouette_score
from torch.nn.functional import normalize

from layerfuse.errors import LayerfuseError
from layerfuse.look.grouping import all_groups, best_count, medoid, silhouette, split
from layerfuse.vision.layer_groups import groups_to_json
from layerfuse.vision.selection import select

SIZES = [1, 2, 5, 8]

Partition = list[list[int]]


def drifting_similarity(layers: int) -> np.ndarray:
    """Cosines (n, n) of layers that each add a random step to the one before."""
    steps = torch.randn(layers, 4, dtype=torch.double)
    unit = normalize(steps.cumsum(dim=0)).numpy()
    return (unit @ unit.T).clip(-1, 1)


def all_partitions(layers: int, count: int) -> list[Partition]:
    """Every way to cut the layers into so many contiguous groups."""
    partitions = []
    for cuts in itertools.combinations(range(1, layers), count - 1):
        borders = [0, *cuts, layers]
        groups = []
        for start, end in itertools.pairwise(borders):
            groups.append(list(range(start, end)))
        partitions.append(groups)
    return partitions


def scatter(similarity: np.ndarray, groups: Partition) -> float:
    """The objective: sum_i S_ii - (1/|g|) sum_ij S_ij over the groups."""
    total = 0.0
    for group in groups:
        for i in group:
            within = 0.0
            for j in group:
                within += similarity[i, j]
            total += similarity[i, i] - within / len(group)
    return total


@pytest.mark.parametrize("layers", SIZES)
def test_groups_are_the_best_of_all(layers: int) -> None:
    similarity = drifting_similarity(layers)

    # The search is exact, so that no partition at all may be better
    for count in range(1, layers + 1):
        best = min(
            all_partitions(layers, count),
            key=lambda groups: scatter(similarity, groups),
        )
        assert split(similarity, count) == best


@pytest.mark.parametrize("layers", SIZES)
def test_the_medoid_is_the_most_similar_and_of_equals_the_shallowest(layers: int) -> None:
    similarity = drifting_similarity(layers)

    for count in range(1, layers + 1):
        for group in split(similarity, count):
            best = group[0]
            best_total = similarity[best, group].sum()
            for layer in group[1:]:
                total = similarity[layer, group].sum()
                # Rounding does not make a deeper layer the better one
                if total > best_total + 1e-9:
                    best, best_total = layer, total
            assert medoid(similarity, group) == best


@pytest.mark.parametrize("layers", SIZES)
def test_the_silhouette_is_scikit_learns(layers: int) -> None:
    similarity = drifting_similarity(layers)

    # It is undefined for one group, and for groups of one layer each
    for count in range(2, layers):
        groups = split(similarity, count)
        # The number of its group, for each layer
        sizes = [len(group) for group in groups]
        labels = np.repeat(range(count), sizes)
        expected = silhouette_score(1 - similarity, labels, metric="precomputed")
        width = silhouette(similarity, groups)
        assert width == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("layers", SIZES)
def test_numbers_of_groups_that_cannot_be(layers: int) -> None:
    similarity = drifting_similarity(layers)

    for count in (0, layers + 1):
        with pytest.raises(LayerfuseError, match=rf"valid: 1\.\.{layers}"):
            split(similarity, count)


def published_similarity() -> np.ndarray:
    """The published structure of CLIP-L's layers 1..24, (24, 24).

    13-20 are alike (.75 and more), .35-.5 to 21-24; shallow layers decay with distance, to 0 for
    deep ones; densest around 3, 18 and 23.
    """
    # How far each layer is from the one before
    steps = [
        0,
        *[0.05] * 4,
        *[0.25] * 7,
        # Here the middle layers begin
        2.9,
        *[0.02] * 7,
        # And the deep ones
        0.65,
        *[0.03] * 3,
    ]
    places = np.cumsum(steps)
    distances = np.abs(places[:, None] - places)
    # Layers are less like all others the farther they are from 3, 18 and 23
    layers = np.arange(1, 25)
    centres = np.array([3, 18, 23])
    from_centres = np.abs(layers[:, None] - centres).min(axis=1)
    clearness = 1 - 0.03 * np.sqrt(from_centres)
    similarity = np.exp(-distances) * np.outer(clearness, clearness)
    np.fill_diagonal(similarity, 1)

    middle_to_deep = similarity[12:20, 20:]
    assert similarity[12:20, 12:20].min() > 0.75
    assert 0.5 > middle_to_deep.max() > middle_to_deep.min() > 0.35
    assert similarity[:12, 20:].max() < 0.05
    return similarity


def test_the_number_of_groups_has_the_widest_silhouette() -> None:
    groups = all_groups(published_similarity(), list(range(1, 25)))

    widths = {}
    for count, of_count in groups.items():
        widths[count] = of_count.silhouette or 0
    assert best_count(groups) == max(widths, key=lambda count: widths[count])


def test_three_groups_of_clip_l_and_their_file(tmp_path: Path) -> None:
    """The groups and representatives of the paper, read back through a recipe's selection."""
    groups = all_groups(published_similarity(), list(range(1, 25)))
    # As much of the file as a selection reads
    file = tmp_path / "similarity.json"
    content = {"depth": 24, "groups": groups_to_json(groups)}
    file.write_text(json.dumps(content))

    representatives = select(f"similarity:3@{file}", 24)
    whole_groups = select(f"similarity:3:groups@{file}", 24)

    assert representatives.groups == ((3,), (18,), (23,))
    assert whole_groups.groups == (
        tuple(range(1, 13)),
        tuple(range(13, 21)),
        tuple(range(21, 25)),
    )
