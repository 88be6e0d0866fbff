"""Which questions are about the same pictures: they are redrawn together."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse  # pyright: ignore[reportMissingTypeStubs]
from scipy.sparse import csgraph  # pyright: ignore[reportMissingTypeStubs]

from layerfuse.evaluate.records import AnswerRecord

# scipy brings no types
sparse: Any = scipy.sparse
graphs: Any = csgraph


def clusters_of(answers: Sequence[AnswerRecord]) -> list[str]:
    """The cluster of each answer's question.

    Pictures are told apart by the digests of their bytes: rows of a dataset that hold the same
    picture, or files with the same content, are one picture.

    Args:
        answers: in any order.

    Returns:
        A name for each answer; the same for those that share a picture, directly or over others.
    """
    shown: list[list[str]] = []
    for answer in answers:
        # Records of older versions hold no digests; without a picture the sample stands for it.
        shown.append(answer.pictures or [answer.image or answer.sample])
    return connected_names(shown)


def connected_names(shown: Sequence[Sequence[str]]) -> list[str]:
    """The cluster of each item that shows some things.

    Args:
        shown: the names of the things that each item shows, at least one.

    Returns:
        For each item the first, in the order of the alphabet, of all names in its cluster.
    """
    all_names: set[str] = set()
    for names in shown:
        all_names.update(names)
    distinct = sorted(all_names)
    place = {name: index for index, name in enumerate(distinct)}
    # Each item ties all that it shows to the first of them.
    firsts: list[int] = []
    others: list[int] = []
    for names in shown:
        for name in names:
            firsts.append(place[names[0]])
            others.append(place[name])
    ties = sparse.csr_matrix(
        (np.ones(len(firsts)), (firsts, others)),
        shape=(len(distinct), len(distinct)),
    )
    _, labels = graphs.connected_components(ties, directed=False)
    component: list[int] = labels.tolist()
    name_of_component: dict[int, str] = {}
    for name, label in zip(distinct, component, strict=True):
        # The names are sorted: the first that comes stays.
        name_of_component.setdefault(label, name)
    return [name_of_component[component[place[names[0]]]] for names in shown]
