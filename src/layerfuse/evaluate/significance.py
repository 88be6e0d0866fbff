"""What a study may claim: scores with intervals, differences to the baseline, noise, verdicts.

* Score: the macro mean over question families; an arm's score is the mean over its seeds.
* Pictures: bootstrap over pictures, not questions, since the questions of a picture share it
  (cluster bootstrap: Davison & Hinkley 1997, 3.8). Arms share the resamples: paired.
* Seeds: the variances of `seed_model`, paired by seed where that helps.
* Both: the sum of their variances, with a t quantile of Satterthwaite's degrees of freedom.
* An arm of one seed has scores but no verdict: nothing is known of its noise.
* Above chance, and with or without guidance: about these trained models, by the pictures alone.
* Several arms: verdicts use Holm's correction (Holm 1979); the intervals are per comparison.
* The first: all pairs are compared (Tukey-Kramer), since the leader is chosen by the same scores.

Shapes: B resamples, I pictures, Q questions, G groups of questions, K runs, A arms, S seeds.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.stats  # pyright: ignore[reportMissingTypeStubs]

from layerfuse.evaluate.seed_model import (
    Numbers,
    RunVariance,
    VariancePart,
    combine,
    estimate_variance,
)

LEVEL = 0.95
PICTURES = "pictures"
PICTURES_AND_SEEDS = "pictures and seeds"

# scipy brings no types
stats: Any = scipy.stats


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
    """A score with its 95 % interval.

    Attributes:
        score: as a share of 1.
        interval: [low, high].
        covers: what would vary: `pictures and seeds`, or `pictures` alone for an arm of one seed.
    """

    score: float
    interval: list[float]
    covers: str = PICTURES


@dataclass(frozen=True)
class Contrast:
    """One arm minus another.

    Attributes:
        difference: of the scores, as a share of 1.
        interval: 95 % interval [low, high] over what `covers` says.
        item_interval: 95 % interval [low, high] over pictures alone.
        error: standard error of the difference, over what `covers` says.
        df: degrees of freedom of `error`.
        p: two-sided p value over what `covers` says.
        item_p: two-sided p value over pictures alone.
        covers: `pictures and seeds`, or `pictures`.
        measured: whether all is known that a verdict needs; False where an arm has one seed.
    """

    difference: float
    interval: list[float]
    item_interval: list[float]
    error: float
    df: float
    p: float
    item_p: float
    covers: str
    measured: bool


@dataclass(frozen=True)
class JudgedContrast(Contrast):
    """A contrast with its verdict among several comparisons.

    Attributes:
        p_holm: `p` after Holm's correction; 1 where nothing is judged.
        verdict: `better`, `worse`, `tie`, or `unjudged` where an arm has one seed.
        unresolved: a tie that the noise between seeds alone prevents from being a difference.
    """

    p_holm: float
    verdict: str
    unresolved: bool


@dataclass(frozen=True)
class Competitor:
    """What is compared: an arm, or blind guessing.

    Attributes:
        score: on the test set, as a share of 1.
        samples: scores in each resample (B); NaN where nothing was asked.
    """

    score: float
    samples: Numbers


@dataclass(frozen=True)
class Scores:
    """One score per arm, and that of blind guessing.

    Attributes:
        value: scores of the arms on the test set (A).
        samples: scores in each resample (B, A); NaN where nothing was asked.
        runs: scores of the runs by seed (A, S); NaN where an arm was not trained with a seed.
        chance: the commonest answer of each family, given to every question.
        noise: between seeds, or None where no arm has two.
        images: the number of pictures.
        level: of the intervals and verdicts that are made of the scores. Above 95 % where a study
            is looked at several times: over all looks 95 % are left.
    """

    value: Numbers
    samples: Numbers
    runs: Numbers
    chance: Competitor
    noise: SeedNoise | None
    images: int
    level: float = LEVEL

    def arm(self, position: int) -> Competitor:
        """Give one arm as it is compared.

        Args:
            position: of the arm, 0..A-1.

        Returns:
            Its score and resamples.
        """
        return Competitor(
            score=float(self.value[position]),
            samples=self.samples[:, position],
        )


def percentiles(samples: Numbers, level: float = LEVEL) -> list[float]:
    """Give the central part of resampled values.

    Args:
        samples: the values (B), NaN where nothing was asked.
        level: the share of them that is in it.

    Returns:
        [low, high].
    """
    defined = samples[~np.isnan(samples)]
    return np.percentile(defined, [50 - 50 * level, 50 + 50 * level]).tolist()


def interval(value: float, samples: Numbers, images: int, level: float = LEVEL) -> list[float]:
    """Interval of a score over pictures.

    Args:
        value: the score, as a share of 1.
        samples: the score in each resample (B).
        images: the number of pictures.
        level: of the interval.

    Returns:
        [low, high]: percentiles, or at 0 and 1 the exact binomial interval of as many pictures
        (Clopper & Pearson 1934).
    """
    # At 0 or 1 no resample varies, and percentiles would claim a certainty that there is not.
    if value in (0, 1):
        right = round(value * images)
        exact = stats.binomtest(right, images).proportion_ci(level, method="exact")
        return [float(exact.low), float(exact.high)]
    return percentiles(samples, level)


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
    """Adjust p values for their number, by Holm's method.

    Args:
        p_values: of all comparisons.

    Returns:
        The adjusted p values, in the same order.
    """
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
    """Give the p value of a difference.

    Args:
        difference: of two scores.
        error: its standard error.
        df: degrees of freedom of the error.

    Returns:
        The two-sided p value; without error 0 or 1.
    """
    if error == 0:
        return float(difference == 0)
    return 2 * float(stats.t.sf(abs(difference) / error, df))


def item_part(samples: Numbers, images: int) -> VariancePart:
    """Give the variance of a score, or of a difference of scores, over pictures.

    Args:
        samples: its values in each resample (B).
        images: the number of pictures.

    Returns:
        The variance; of one picture the largest that a share can have, since one says nothing of
        others.
    """
    variance = 1.0
    if images > 1:
        variance = float(np.nanvar(samples, ddof=1))
    return VariancePart(np.array(variance), np.array(float(max(images - 1, 1))))


def contrast(scores: Scores, a: int, b: int) -> Contrast:
    """Compare two arms over pictures and seeds.

    Args:
        scores: of all arms.
        a: position of the arm in question.
        b: position of the arm that is subtracted.

    Returns:
        Arm a minus arm b; over pictures alone and not measured where one of them has one seed.
    """
    variance = estimate_variance(scores.runs)
    first = scores.arm(a)
    second = scores.arm(b)
    if not _both_repeated(variance, a, b):
        return contrast_of_competitors(scores, first, second, [], measured=False)
    assert variance is not None
    return contrast_of_competitors(
        scores, first, second, variance.of_difference(a, b), measured=True
    )


def _both_repeated(variance: RunVariance | None, a: int, b: int) -> bool:
    """Whether both arms have two seeds."""
    if variance is None:
        return False
    return variance.repeated(a) and variance.repeated(b)


def contrast_of_models(scores: Scores, a: int, b: int) -> Contrast:
    """Compare the trained models of two arms as they are, over pictures alone.

    Args:
        scores: of all arms.
        a: position of the arm in question.
        b: position of the arm that is subtracted.

    Returns:
        Arm a minus arm b.
    """
    return contrast_of_competitors(scores, scores.arm(a), scores.arm(b), [], measured=True)


def contrast_of_competitors(
    scores: Scores,
    first: Competitor,
    second: Competitor,
    seed_parts: list[VariancePart],
    *,
    measured: bool,
) -> Contrast:
    """Compare two competitors over pictures, and over what seeds add to their noise.

    Args:
        scores: of the study, whose pictures were redrawn.
        first: the competitor in question.
        second: the one that is subtracted.
        seed_parts: the variance of the difference over seeds; empty: over pictures alone.
        measured: whether all is known that a verdict needs.

    Returns:
        The first minus the second.
    """
    difference = first.score - second.score
    # Both answer the same pictures in a resample: what is easy for both cancels.
    samples = first.samples - second.samples
    items = item_part(samples, scores.images)
    total = combine([items, *seed_parts])
    error = float(total.error)
    df = float(total.df)
    half = float(stats.t.ppf(0.5 + scores.level / 2, df)) * error
    covers = PICTURES
    if seed_parts:
        covers = PICTURES_AND_SEEDS
    return Contrast(
        difference=difference,
        interval=[difference - half, difference + half],
        item_interval=percentiles(samples, scores.level),
        error=error,
        df=df,
        p=two_sided_p(difference, error, df),
        item_p=two_sided_p(difference, math.sqrt(items.variance), float(items.df)),
        covers=covers,
        measured=measured,
    )


def judge(contrasts: list[Contrast], level: float = LEVEL) -> list[JudgedContrast]:
    """Give each contrast its verdict, corrected for all of them together.

    Args:
        contrasts: all that are looked at together.
        level: of the verdicts.

    Returns:
        The contrasts in the same order.
    """
    # What is not judged is no comparison that the others must be corrected for.
    measured = [test for test in contrasts if test.measured]
    corrected = iter(holm([test.p for test in measured]))
    item_corrected = iter(holm([test.item_p for test in measured]))
    judged: list[JudgedContrast] = []
    for test in contrasts:
        if not test.measured:
            judged.append(_with_verdict(test, 1.0, "unjudged", unresolved=False))
            continue
        p_holm = next(corrected)
        verdict = verdict_of(test.difference, p_holm, level)
        # What the items alone would say tells ties that more seeds could resolve from others.
        would_count = next(item_corrected) < 1 - level
        unresolved = verdict == "tie" and would_count
        judged.append(_with_verdict(test, p_holm, verdict, unresolved=unresolved))
    return judged


def verdict_of(difference: float, p: float, level: float = LEVEL) -> str:
    """Give the verdict on a difference.

    Args:
        difference: of two scores.
        p: its p value, corrected.
        level: of the verdict.

    Returns:
        `better`, `worse` or `tie`.
    """
    if p >= 1 - level:
        return "tie"
    if difference > 0:
        return "better"
    return "worse"


def _with_verdict(
    test: Contrast, p_holm: float, verdict: str, *, unresolved: bool
) -> JudgedContrast:
    """The contrast with its verdict."""
    return JudgedContrast(**vars(test), p_holm=p_holm, verdict=verdict, unresolved=unresolved)


def arm_score(scores: Scores, arm: int) -> ArmScore:
    """Give one arm's score with the interval that holds its long-run score.

    Args:
        scores: of the arms.
        arm: its position.

    Returns:
        The score as a share of 1, and its interval over pictures and seeds; over pictures alone
        for an arm of one seed.
    """
    competitor = scores.arm(arm)
    over_pictures = interval(competitor.score, competitor.samples, scores.images, scores.level)
    variance = estimate_variance(scores.runs)
    if variance is None or not variance.repeated(arm):
        return ArmScore(competitor.score, over_pictures, PICTURES)
    items = item_part(competitor.samples, scores.images)
    total = combine([items, *variance.of_mean(arm)])
    half = float(stats.t.ppf(0.5 + scores.level / 2, total.df) * total.error)
    low = max(competitor.score - half, 0.0)
    high = min(competitor.score + half, 1.0)
    # At 0 or 1 neither runs nor resamples may vary at all.
    if competitor.score in (0, 1):
        low = min(low, over_pictures[0])
        high = max(high, over_pictures[1])
    return ArmScore(competitor.score, [low, high], PICTURES_AND_SEEDS)


def compare_all(scores: Scores, reference: int) -> dict[int, JudgedContrast]:
    """Compare every arm with one of them, corrected for all comparisons.

    Args:
        scores: of the arms.
        reference: position of the arm that they are compared with.

    Returns:
        The contrast of each arm by its position, without the reference itself.
    """
    others = [arm for arm in range(len(scores.value)) if arm != reference]
    contrasts = [contrast(scores, arm, reference) for arm in others]
    return dict(zip(others, judge(contrasts, scores.level), strict=True))


def inseparable_from_first(scores: Scores) -> list[bool]:
    """Find the arms that may be as good as the one with the highest score.

    The leader is chosen by the scores that it is judged by, so that the correction is for all
    pairs (Tukey-Kramer: the studentized range), not for the comparisons with it alone.

    Args:
        scores: of the arms.

    Returns:
        For each arm whether it is the leader or not separable from it (A).
    """
    leader = int(np.argmax(scores.value))
    inseparable = [True] * len(scores.value)
    contrasts: dict[int, Contrast] = {}
    for arm in range(len(scores.value)):
        if arm != leader:
            contrasts[arm] = contrast(scores, leader, arm)
    # The leader and those that are judged beside it.
    judged = 1 + sum(test.measured for test in contrasts.values())
    for arm, test in contrasts.items():
        if test.measured:
            inseparable[arm] = range_p(test, judged) >= 1 - scores.level
    return inseparable


def range_p(test: Contrast, arms: int) -> float:
    """Give the p value of a difference among all pairs of arms (Tukey-Kramer).

    Args:
        test: the difference.
        arms: the number of arms.

    Returns:
        The two-sided p value, corrected for all pairs.
    """
    if test.error == 0:
        return float(test.difference == 0)
    ratio = abs(test.difference) / test.error
    return float(stats.studentized_range.sf(math.sqrt(2) * ratio, arms, test.df))


def compare_with_chance(scores: Scores) -> list[JudgedContrast]:
    """Compare every arm with guessing, corrected for all comparisons.

    Whether what was trained beats guessing is a question about the items alone, so the noise
    between seeds is left out.

    Args:
        scores: of the arms and of guessing.

    Returns:
        The contrast of each arm, in their order.
    """
    contrasts: list[Contrast] = []
    for position in range(len(scores.value)):
        arm = scores.arm(position)
        contrasts.append(contrast_of_competitors(scores, arm, scores.chance, [], measured=True))
    return judge(contrasts, scores.level)
