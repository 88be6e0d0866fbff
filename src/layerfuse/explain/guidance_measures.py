"""How weights vary, and what they say about the kind of a question."""

from collections import Counter
from collections.abc import Sequence
from math import factorial
from typing import Any

import numpy as np

from layerfuse.evaluate.control_scores import mean_weights, table_with_controls
from layerfuse.evaluate.records import AnswerRecord
from layerfuse.evaluate.score_table import Bootstrap, GroupKey, TestedModel, family_of
from layerfuse.evaluate.significance import arm_score, contrast_of_models, judge
from layerfuse.explain.guidance_report import (
    ControlEffect,
    CrossedSpread,
    KindInformation,
    KindWeights,
)

MOST_BINS = 8
"""Clusters of weights at most: more would need more questions."""
PERMUTATIONS = 1000
REPEATS = 4
"""Random starts of the clusters, the best of which stays."""
DIGITS = 6
"""Decimals of measured numbers."""


def weights_by(answers: Sequence[AnswerRecord], key: GroupKey) -> dict[str, KindWeights]:
    """Describe the weights under each group of questions.

    Args:
        answers: of a guided strategy; those without weights do not count.
        key: the group of an answer.

    Returns:
        By group, sorted.
    """
    weights: dict[str, list[list[float]]] = {}
    for answer in answers:
        if answer.weights is not None:
            weights.setdefault(str(key(answer)), []).append(answer.weights)
    means = mean_weights(answers, key)
    groups = {}
    for group, mean in means.items():
        spread = np.std(weights[group], axis=0).round(DIGITS).tolist()
        groups[group] = KindWeights(len(weights[group]), mean, spread)
    return groups


def crossed_spread(weights: np.ndarray) -> CrossedSpread:
    """Split the variance of weights into what instructions and what pictures make of it.

    Two-way random effects without repetition: with MS the mean squares of an analysis of variance,
    the components are (MS_instruction − MS_rest) / P, (MS_picture − MS_rest) / I and MS_rest.

    Args:
        weights: (I instructions, P pictures, n), of at least two of both.

    Returns:
        The components, summed over the n weights.
    """
    instructions, pictures, _ = weights.shape
    mean = weights.mean(axis=(0, 1))
    # (I, n) and (P, n): how far one instruction, or one picture, lies from the mean
    of_instruction = weights.mean(axis=1) - mean
    of_picture = weights.mean(axis=0) - mean
    rest = weights - mean - of_instruction[:, None] - of_picture[None, :]
    squares_instruction = pictures * (of_instruction**2).sum() / (instructions - 1)
    squares_picture = instructions * (of_picture**2).sum() / (pictures - 1)
    squares_rest = (rest**2).sum() / ((instructions - 1) * (pictures - 1))
    return CrossedSpread(
        instructions=instructions,
        pictures=pictures,
        over_instructions=float(weights.std(axis=0, ddof=1).mean()),
        over_pictures=float(weights.std(axis=1, ddof=1).mean()),
        instruction=float((squares_instruction - squares_rest) / pictures),
        picture=float((squares_picture - squares_rest) / instructions),
        rest=float(squares_rest),
    )


def kind_information(
    weights: np.ndarray, kinds: Sequence[str], wordings: Sequence[int], seed: int = 0
) -> list[KindInformation]:
    """Estimate the mutual information of the weights and the kind of a question.

    Args:
        weights: (questions, n).
        kinds: of the questions; at least two different ones.
        wordings: of the questions, as numbers. Questions of one wording share an instruction, and
            so nearly their weights: what is shuffled is which wording has which weights. A
            question keeps its kind, so that a wording may ask for several.
        seed: of the clusters and the shufflings.

    Returns:
        One estimate for the layer or group that is weighted most, one for clusters of weights.
    """
    most_weighted = weights.argmax(axis=1)
    clusters = _clusters(weights, wordings, len(set(kinds)), seed)
    return [
        _information("most weighted", most_weighted, kinds, wordings, seed=seed),
        _information("k-means", clusters, kinds, wordings, seed=seed),
    ]


def _clusters(weights: np.ndarray, wordings: Sequence[int], kinds: int, seed: int) -> np.ndarray:
    """The cluster of each question's weights: as many as there are kinds, up to `MOST_BINS`.

    Clusters are those of the wordings' mean weights, each of which counts once: one with many
    questions would get a cluster of its own, and its kind with it.
    """
    _, wording_numbers, questions = np.unique(wordings, return_inverse=True, return_counts=True)
    sums = np.zeros((len(questions), weights.shape[1]))
    np.add.at(sums, wording_numbers, weights)
    means = sums / questions[:, None]
    # Means of equal weights can differ in the last digits
    distinct = len(np.unique(np.round(means, 2 * DIGITS), axis=0))
    count = min(kinds, MOST_BINS, distinct)
    if count < 2:
        return np.zeros(len(weights), dtype=int)
    # Imported late: it is an extra, and whoever lacks it is told so
    from sklearn.cluster import KMeans

    # Any: scikit-learn's annotations are of its defaults
    clusters: Any = KMeans(count, n_init=REPEATS, random_state=seed)  # pyright: ignore
    return clusters.fit(means).predict(weights)


def _information(
    estimator: str, bins: np.ndarray, kinds: Sequence[str], wordings: Sequence[int], *, seed: int
) -> KindInformation:
    """The information in a number of each question, with what shuffled wordings give."""
    _, bin_numbers = np.unique(bins, return_inverse=True)
    kind_names, kind_numbers = np.unique(kinds, return_inverse=True)
    _, wording_numbers = np.unique(wordings, return_inverse=True)
    bits = _mutual_bits(bin_numbers, kind_numbers)
    rng = np.random.default_rng(seed)
    estimates = []
    for _ in range(PERMUTATIONS):
        shuffled_bins = _bins_of_other_wordings(bin_numbers, wording_numbers, rng)
        estimates.append(_mutual_bits(shuffled_bins, kind_numbers))
    of_kinds = _wordings_by_kind(kind_numbers, wording_numbers)
    shuffled = np.array(estimates)
    # A hair of room: equal tables can differ in the last digit
    as_high = int((shuffled >= bits - 1e-9).sum())
    return KindInformation(
        estimator=estimator,
        bins=int(bin_numbers.max()) + 1,
        bits=round(bits, DIGITS),
        entropy=round(_entropy_bits(np.bincount(kind_numbers)), DIGITS),
        shuffled=round(float(shuffled.mean()), DIGITS),
        shuffled_high=round(float(np.quantile(shuffled, 0.95)), DIGITS),
        p=(1 + as_high) / (1 + PERMUTATIONS),
        permutations=PERMUTATIONS,
        wordings=dict(zip(kind_names.tolist(), of_kinds, strict=True)),
        partitions=_partitions(of_kinds),
    )


def _bins_of_other_wordings(
    bins: np.ndarray, wordings: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Deal the wordings anew: each question of a wording gets the bin of a question of the one that
    was dealt in its place.

    It is not the kinds that are dealt: a kind with many wordings of few questions would get most of
    all questions, and the information would shrink by that alone.

    Args:
        bins: a number from 0 for each question.
        wordings: likewise.
        rng: deals, and draws questions.
    """
    questions = np.bincount(wordings)
    # Questions of one wording stand together in `by_wording`, from its place in `starts` on.
    by_wording = np.argsort(wordings)
    starts = np.cumsum(questions) - questions
    dealt = rng.permutation(len(questions))[wordings]
    drawn = starts[dealt] + rng.integers(questions[dealt])
    return bins[by_wording[drawn]]


def _wordings_by_kind(kinds: np.ndarray, wordings: np.ndarray) -> list[int]:
    """How many wordings each kind has. One that asks for several counts for its commonest: a stray
    question does not make the wordings of two kinds alike.

    Args:
        kinds: a number from 0 for each question.
        wordings: likewise.
    """
    asked = np.zeros((wordings.max() + 1, kinds.max() + 1), dtype=int)
    np.add.at(asked, (wordings, kinds), 1)
    return np.bincount(asked.argmax(axis=1), minlength=asked.shape[1]).tolist()


def _partitions(sizes: Sequence[int]) -> int:
    """In how many ways things can be dealt to groups of these sizes, equal groups not told apart.

    Args:
        sizes: things in each group.
    """
    # Empty groups are all alike, and nothing is dealt to them
    sizes = [size for size in sizes if size > 0]
    ways = factorial(sum(sizes))
    for size in sizes:
        ways //= factorial(size)
    # Groups of one size may change their names, which changes no information.
    for alike in Counter(sizes).values():
        ways //= factorial(alike)
    return ways


def _mutual_bits(bins: np.ndarray, kinds: np.ndarray) -> float:
    """The plug-in estimate H(bin) + H(kind) - H(both), each the entropy of the shares found.

    Args:
        bins: a number from 0 for each question.
        kinds: likewise.
    """
    both = bins * (kinds.max() + 1) + kinds
    apart = _entropy_bits(np.bincount(bins)) + _entropy_bits(np.bincount(kinds))
    # Rounding can leave a tiny negative number where there is nothing
    return max(apart - _entropy_bits(np.bincount(both)), 0.0)


def _entropy_bits(counts: np.ndarray) -> float:
    """The entropy of shares in bits."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def control_effects(
    answers: Sequence[AnswerRecord], key: GroupKey, bootstrap: Bootstrap
) -> dict[str, ControlEffect]:
    """Compare a guided model with itself under each control, paired over pictures.

    Args:
        answers: of the model, with those under the controls.
        key: the kind of an answer.
        bootstrap: how pictures are redrawn.

    Returns:
        By control; verdicts are corrected for all controls together, those of kinds for all kinds
        and controls together.
    """
    model = [TestedModel("guided", 0, list(answers))]
    whole = table_with_controls(model, bootstrap, family_of)
    by_kind = table_with_controls(model, bootstrap, key)
    controls = list(answers[0].controls)
    # Column 0 is the guided model.
    columns = range(1, len(controls) + 1)
    differences = judge([contrast_of_models(whole.mean, 0, column) for column in columns])
    tests = []
    for column in columns:
        tests.extend(contrast_of_models(scores, 0, column) for scores in by_kind.each)
    judged = iter(judge(tests))
    effects = {}
    for column, control in enumerate(controls, start=1):
        effects[control] = ControlEffect(
            score=arm_score(whole.mean, column),
            difference=differences[column - 1],
            by_kind={kind: next(judged) for kind in by_kind.groups},
        )
    return effects
