"""The strategies, LLMs and encoders over which the invariants of a model are tested."""

import itertools
import random

import pytest

from layerfuse.fusion import FUSIONS
from tests import tiny

ENCODERS = ["clip", "siglip", "dinov2_registers"]
"""with one, no and several tokens before the patches"""
ALL = list(itertools.product(FUSIONS, tiny.LLMS, ENCODERS))
"""every (strategy, LLM, encoder)"""


def pairs_in(combination: tuple[str, str, str]) -> set[tuple[str, str]]:
    """The three pairs of a combination, each of two of its parts."""
    strategy, llm, encoder = combination
    return {(strategy, llm), (strategy, encoder), (llm, encoder)}


def covering_subset() -> list[tuple[str, str, str]]:
    """A small subset of `ALL` that holds every pair: most defects need no more than two parts."""
    missing: set[tuple[str, str]] = set()
    for combination in ALL:
        missing |= pairs_in(combination)

    # Greedy. In the order of the product the first strategies would get the most combinations.
    candidates = list(ALL)
    random.Random(0).shuffle(candidates)
    chosen: list[tuple[str, str, str]] = []
    while missing:
        most_pairs = 0
        best = candidates[0]
        for combination in candidates:
            new_pairs = len(pairs_in(combination) & missing)
            if new_pairs > most_pairs:
                most_pairs = new_pairs
                best = combination
        candidates.remove(best)
        chosen.append(best)
        missing -= pairs_in(best)
    return chosen


def combinations_to_test() -> list[object]:
    """`ALL` as pytest's parameters; those outside the covering subset are marked as slow."""
    always_tested = covering_subset()
    parameters: list[object] = []
    for combination in ALL:
        marks = []
        if combination not in always_tested:
            marks.append(pytest.mark.slow)
        parameters.append(pytest.param(*combination, marks=marks, id="-".join(combination)))
    return parameters


everywhere = pytest.mark.parametrize(("strategy", "llm", "encoder"), combinations_to_test())
each_strategy = pytest.mark.parametrize("strategy", list(FUSIONS))
