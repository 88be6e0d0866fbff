"""What a study may claim: scores with intervals, differences to the baseline, noise, verdicts.

* Score: the macro mean over question families; an arm's score is the mean over its seeds.
* Item noise: percentile bootstrap over pictures, not questions, since the questions of a picture
  share it (cluster bootstrap: Davison & Hinkley 1997, 3.8). Arms share the resamples: paired.
* Seed noise: standard deviation over the seeds of an arm, pooled over the arms; never paired.
* Both: variance = item bootstrap variance + sd² (1/n_a + 1/n_b), with a t quantile of
  Welch-Satterthwaite degrees of freedom; the sum covers 94 to 99 % in simulation.
* Above chance: whether the trained runs beat guessing is judged by the items alone.
* Several arms: verdicts use Holm's correction (Holm 1979); the intervals are per comparison.

Shapes: B resamples, I pictures, Q questions, G groups of questions, K runs, A arms.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.stats  # pyright: ignore[reportMissingTypeStubs]

from layerfuse.evaluate.records import AnswerRecord, FinishedRun

LEVEL = 0.95

Numbers = np.ndarray[Any, np.dtype[np.float64]]
Positions = np.ndarray[Any, np.dtype[np.intp]]
# scipy brings no types
student_t: Any = scipy.stats.t  # pyright: ignore[reportUnknownMemberType]

# The group of an answer, or None where it belongs to no group.
GroupKey = Callable[[AnswerRecord], str | None]


@dataclass(frozen=True)
class Bootstrap:
    """How pictures are redrawn: the number of resamples and the seed of the draws."""

    resamples: int
    seed: int


@dataclass(frozen=True)
class SeedNoise:
    """How much training again with another seed moves a score, pooled over the arms.

    Attributes:
        sd: standard deviation between the seeds of one arm, as a share of 1.
        df: its degrees of freedom.
        spread: the widest range of scores within one arm.
        spread_arm: the arm of that range.
    """

    sd: float
    df: int
    spread: float
    spread_arm: str


@dataclass(frozen=True)
class ArmScore:
    """A score as a share of 1, and its 95 % interval [low, high] over pictures."""

    score: float
    interval: list[float]


@dataclass(frozen=True)
class Contrast:
    """One arm minus another.

    Attributes:
        difference: of the scores, as a share of 1.
        interval: 95 % interval [low, high] over pictures and seeds.
        item_interval: 95 % interval [low, high] over pictures alone.
        df: degrees of freedom of `interval`.
        p: two-sided p value over pictures and seeds.
        item_p: two-sided p value over pictures alone.
    """

    difference: float
    interval: list[float]
    item_interval: list[float]
    df: float
    p: float
    item_p: float


@dataclass(frozen=True)
class JudgedContrast(Contrast):
    """A contrast with its verdict among several comparisons.

    Attributes:
        p_holm: `p` after Holm's correction.
        verdict: `better`, `worse` or `tie`.
        unresolved: a tie that the noise between seeds alone prevents from being a difference.
    """

    p_holm: float
    verdict: str
    unresolved: bool


@dataclass(frozen=True)
class Scores:
    """One score per arm, the last being blind guessing.

    Attributes:
        value: scores on the test set (A).
        samples: scores in each resample (B, A); NaN where nothing was asked.
        runs: the number of runs of each arm (A); infinite for guessing, which has no seed noise.
        noise: between seeds, or None where no arm has two.
        images: the number of pictures.
    """

    value: Numbers
    samples: Numbers
    runs: Numbers
    noise: SeedNoise | None
    images: int


def commonest_answers(questions: list[AnswerRecord]) -> dict[str, str]:
    """Give the most frequent answer of each family, the first in sorted order among equals."""
    counts: dict[str, Counter[str]] = {}
    for question in questions:
        family_counts = counts.setdefault(question.family, Counter())
        family_counts[question.answer] += 1
    commonest: dict[str, str] = {}
    for family in sorted(counts):
        # Stable sorting keeps the alphabetical order among equally frequent answers.
        answers = sorted(counts[family])
        answers.sort(key=counts[family].__getitem__, reverse=True)
        commonest[family] = answers[0]
    return commonest


def rates(weights: Numbers, cluster: Positions, group: Positions, scores: Numbers) -> Numbers:
    """Mean score per resample, group and run.

    Args:
        weights: how often each picture is drawn in each resample (B, I).
        cluster: the picture of each question (Q), 0..I-1.
        group: the group of each question (Q), 0..G-1.
        scores: of each run's answers (Q, K), 0..1.

    Returns:
        Means (B, G, K); NaN where a resample asks no question of a group.
    """
    images = weights.shape[1]
    groups = int(group.max()) + 1
    runs = scores.shape[1]
    # One more column counts the questions, so that one product gives both parts of the mean.
    counted = np.column_stack([scores, np.ones(len(scores))])
    counts = np.zeros((images, groups, runs + 1))
    # `add.at` adds up repeated indices, which `counts[...] +=` would count once.
    np.add.at(counts, (cluster, group), counted)
    # (B, I) x (I, G, K + 1) -> (B, G, K + 1)
    drawn = np.tensordot(weights, counts, axes=1)
    score_drawn = drawn[:, :, :-1]
    asked = drawn[:, :, -1:]
    undefined = np.full_like(score_drawn, np.nan)
    return np.divide(score_drawn, asked, out=undefined, where=asked > 0)


def picture_weights(images: int, bootstrap: Bootstrap) -> Numbers:
    """Give how often each picture is drawn in each resample (B, I)."""
    # How often each of I pictures comes up in I draws with replacement is multinomial.
    share = np.full(images, 1 / images)
    generator = np.random.default_rng(bootstrap.seed)
    return generator.multinomial(images, share, size=bootstrap.resamples).astype(float)


def percentiles(samples: Numbers) -> list[float]:
    """Give the central 95 % [low, high] of resampled values (B), NaN left out."""
    defined = samples[~np.isnan(samples)]
    return np.percentile(defined, [50 - 50 * LEVEL, 50 + 50 * LEVEL]).tolist()


def interval(value: float, samples: Numbers, images: int) -> list[float]:
    """95 % interval of a score.

    Args:
        value: the score, as a share of 1.
        samples: the score in each resample (B).
        images: the number of pictures.

    Returns:
        [low, high]: percentiles, or at 0 and 1 the exact binomial bound.
    """
    # At 0 or 1 no resample varies; there Clopper and Pearson's bound has a closed form.
    bound = ((1 - LEVEL) / 2) ** (1 / images)
    if value == 0:
        return [0.0, 1 - bound]
    if value == 1:
        return [bound, 1.0]
    return percentiles(samples)


def seed_noise(values: dict[str, list[float]]) -> SeedNoise | None:
    """Pool the noise between seeds over the arms.

    Args:
        values: the score of each seed, by arm.

    Returns:
        The noise, or None where no arm has two seeds.
    """
    df = 0
    squares = 0.0
    spreads: list[tuple[float, str]] = []
    for arm, seeds in values.items():
        if len(seeds) < 2:
            continue
        # `np.var` divides by n: times n it is the sum of squares, which pools by addition.
        df += len(seeds) - 1
        squares += len(seeds) * float(np.var(seeds))
        spreads.append((float(max(seeds) - min(seeds)), arm))
    if not spreads:
        return None
    spread, spread_arm = max(spreads)
    return SeedNoise(sd=math.sqrt(squares / df), df=df, spread=spread, spread_arm=spread_arm)


def holm(p_values: list[float]) -> list[float]:
    """Give Holm's adjusted p values, in the order given."""
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    # Step down from the smallest: the k-th is compared with those that are left.
    from_smallest = sorted(range(len(p_values)), key=p_values.__getitem__)
    for rank, index in enumerate(from_smallest):
        corrected = min(1.0, (len(p_values) - rank) * p_values[index])
        # A larger p value never gets a smaller adjusted one.
        largest = max(largest, corrected)
        adjusted[index] = largest
    return adjusted


def two_sided_p(difference: float, error: float, df: float) -> float:
    """Give the p value of a difference with this standard error; without error it is 0 or 1."""
    if error == 0:
        return float(difference == 0)
    return 2 * float(student_t.sf(abs(difference) / error, df))


def contrast(scores: Scores, a: int, b: int) -> Contrast:
    """Compare two arms on the same resamples.

    Args:
        scores: of all arms.
        a: position of the arm in question.
        b: position of the arm that is subtracted.

    Returns:
        Arm a minus arm b.
    """
    difference = float(scores.value[a] - scores.value[b])
    # Both arms answer the same pictures in a resample: what is easy for both cancels.
    samples = scores.samples[:, a] - scores.samples[:, b]
    # One picture says nothing of others: the largest variance that a share can have.
    item_variance = 1.0
    if scores.images > 1:
        item_variance = float(np.nanvar(samples, ddof=1))
    item_df = max(scores.images - 1, 1)

    seed_variance = 0.0
    # Without seed noise its variance is zero, so that this number does not matter.
    seed_df = 1
    if scores.noise is not None:
        seed_variance = scores.noise.sd**2 * float(1 / scores.runs[a] + 1 / scores.runs[b])
        seed_df = scores.noise.df

    error = math.sqrt(item_variance + seed_variance)
    df = float(item_df)
    if error > 0:
        # Welch and Satterthwaite: the degrees of freedom of a sum of two variances.
        df = error**4 / (item_variance**2 / item_df + seed_variance**2 / seed_df)
    half = float(student_t.ppf(0.5 + LEVEL / 2, df)) * error
    return Contrast(
        difference=difference,
        interval=[difference - half, difference + half],
        item_interval=percentiles(samples),
        df=df,
        p=two_sided_p(difference, error, df),
        item_p=two_sided_p(difference, math.sqrt(item_variance), item_df),
    )


def judge(contrasts: list[Contrast]) -> list[JudgedContrast]:
    """Give each contrast its verdict, corrected for all of them together."""
    corrected = holm([test.p for test in contrasts])
    item_corrected = holm([test.item_p for test in contrasts])
    judged: list[JudgedContrast] = []
    # The second correction asks what the items alone would say: it tells ties that more seeds
    # could resolve from ties that they could not.
    for test, p_holm, item_p_holm in zip(contrasts, corrected, item_corrected, strict=True):
        if p_holm >= 1 - LEVEL:
            verdict = "tie"
        elif test.difference > 0:
            verdict = "better"
        else:
            verdict = "worse"
        judged.append(
            JudgedContrast(
                difference=test.difference,
                interval=test.interval,
                item_interval=test.item_interval,
                df=test.df,
                p=test.p,
                item_p=test.item_p,
                p_holm=p_holm,
                verdict=verdict,
                unresolved=verdict == "tie" and item_p_holm < 1 - LEVEL,
            )
        )
    return judged


@dataclass(frozen=True)
class ScoreTable:
    """All arms' scores by groups of questions, resampled.

    Attributes:
        groups: names of the groups (G), sorted.
        arms: names of the arms (A without guessing), in the order of their first runs.
        columns: for each arm the columns of its runs in `rates`.
        images: the number of pictures.
        rates: mean scores (1 + B, G, K + 1): first the test set itself, then the resamples; the
            last column is guessing.
        each: the scores of each group.
        mean: the scores of the mean over groups.
    """

    groups: list[str]
    arms: list[str]
    columns: list[list[int]]
    images: int
    rates: Numbers
    each: list[Scores]
    mean: Scores

    @classmethod
    def from_runs(
        cls, runs: list[FinishedRun], bootstrap: Bootstrap, key: GroupKey
    ) -> "ScoreTable":
        """Resample the answers of all runs of a study.

        Args:
            runs: finished runs that answer the same questions in the same order.
            bootstrap: how pictures are redrawn.
            key: the group of an answer; those of group None are left out.

        Returns:
            The table.
        """
        arms = [run.record.arm for run in runs]
        answers = [run.answers for run in runs]
        return cls.from_answers(arms, answers, bootstrap, key)

    @classmethod
    def from_answers(
        cls,
        arms: list[str],
        answers: list[list[AnswerRecord]],
        bootstrap: Bootstrap,
        key: GroupKey,
    ) -> "ScoreTable":
        """Resample the answers of some models to the same questions.

        Args:
            arms: the arm of each model (K).
            answers: of each model (K), in the same order of questions.
            bootstrap: how pictures are redrawn.
            key: the group of an answer; those of group None are left out.

        Returns:
            The table.
        """
        positions: list[int] = []
        labels: list[str] = []
        pictures: list[str] = []
        for position, answer in enumerate(answers[0]):
            label = key(answer)
            if label is None:
                continue
            positions.append(position)
            labels.append(label)
            # Samples may share a picture; without a stored one the sample stands for it.
            pictures.append(answer.image or answer.sample)
        picture_names, cluster = np.unique(pictures, return_inverse=True)
        group_names, group = np.unique(labels, return_inverse=True)
        images = len(picture_names)

        columns: dict[str, list[int]] = {}
        for column, arm in enumerate(arms):
            columns.setdefault(arm, []).append(column)

        drawn = picture_weights(images, bootstrap)
        # The first row draws each picture once: the test set itself.
        weights = np.vstack([np.ones(images), drawn])
        shares = rates(weights, cluster, group, answer_scores(answers, positions))

        each: list[Scores] = []
        for index in range(len(group_names)):
            group_images = len(np.unique(cluster[group == index]))
            each.append(arm_scores(shares[:, index], columns, group_images))
        return cls(
            groups=group_names.tolist(),
            arms=list(columns),
            columns=list(columns.values()),
            images=images,
            rates=shares,
            each=each,
            mean=arm_scores(np.nanmean(shares, axis=1), columns, images),
        )


def answer_scores(answers: list[list[AnswerRecord]], positions: list[int]) -> Numbers:
    """Give the score of each answer (Q, K + 1), the last column being the commonest answer.

    Args:
        answers: of each model (K).
        positions: where the questions stand among them (Q).
    """
    columns: list[list[float]] = []
    for of_model in answers:
        columns.append([of_model[position].score for position in positions])
    questions = [answers[0][position] for position in positions]
    # Guessing without a look: the best constant answer to each family.
    blind = commonest_answers(questions)
    columns.append([float(asked.answer == blind[asked.family]) for asked in questions])
    return np.array(columns, dtype=float).T


def arm_scores(shares: Numbers, columns: dict[str, list[int]], images: int) -> Scores:
    """Average the runs of each arm.

    Args:
        shares: mean scores (1 + B, K + 1), the test set first, guessing last.
        columns: the columns of each arm's runs.
        images: the number of pictures.

    Returns:
        The scores of the arms and of guessing.
    """
    means: list[Numbers] = []
    counts: list[float] = []
    seeds: dict[str, list[float]] = {}
    for arm, columns_of_arm in columns.items():
        means.append(shares[:, columns_of_arm].mean(axis=1))
        counts.append(float(len(columns_of_arm)))
        seeds[arm] = shares[0, columns_of_arm].tolist()
    means.append(shares[:, -1])
    # Infinitely many runs: a guess that never changes has no seed noise.
    counts.append(math.inf)
    stacked = np.stack(means, axis=1)
    return Scores(
        value=stacked[0],
        samples=stacked[1:],
        runs=np.array(counts),
        noise=seed_noise(seeds),
        images=images,
    )


def arm_score(scores: Scores, arm: int) -> ArmScore:
    """Give one arm's score with its interval over pictures."""
    score = float(scores.value[arm])
    return ArmScore(score, interval(score, scores.samples[:, arm], scores.images))


def compare_all(scores: Scores, arms: int, reference: int) -> dict[int, JudgedContrast]:
    """Compare every arm with a reference, corrected for all comparisons.

    Args:
        scores: of the arms and of guessing.
        arms: the number of arms.
        reference: position of what they are compared with.

    Returns:
        The contrast of each arm by its position, without the reference itself.
    """
    others = [arm for arm in range(arms) if arm != reference]
    contrasts = [contrast(scores, arm, reference) for arm in others]
    return dict(zip(others, judge(contrasts), strict=True))


def family_of(answer: AnswerRecord) -> str:
    """Give the family of an answer."""
    return answer.family


def category_of(answer: AnswerRecord) -> str:
    """Give the category of an answer."""
    return answer.category
