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
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.stats  # pyright: ignore[reportMissingTypeStubs]

LEVEL = 0.95

Numbers = np.ndarray[Any, np.dtype[np.float64]]
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
class Competitor:
    """What is compared: an arm, or blind guessing.

    Attributes:
        score: on the test set, as a share of 1.
        samples: scores in each resample (B); NaN where nothing was asked.
        runs: the number of trained models whose mean this is; infinite without seed noise.
    """

    score: float
    samples: Numbers
    runs: float


@dataclass(frozen=True)
class Scores:
    """One score per arm, and that of blind guessing.

    Attributes:
        value: scores of the arms on the test set (A).
        samples: scores in each resample (B, A); NaN where nothing was asked.
        runs: the number of runs of each arm (A).
        chance: the commonest answer of each family, given to every question.
        noise: between seeds, or None where no arm has two.
        images: the number of pictures.
    """

    value: Numbers
    samples: Numbers
    runs: Numbers
    chance: Competitor
    noise: SeedNoise | None
    images: int

    def arm(self, position: int) -> Competitor:
        """Give one arm as it is compared.

        Args:
            position: of the arm, 0..A-1.

        Returns:
            Its score, resamples and number of runs.
        """
        return Competitor(
            score=float(self.value[position]),
            samples=self.samples[:, position],
            runs=float(self.runs[position]),
        )


def percentiles(samples: Numbers) -> list[float]:
    """Give the central 95 % of resampled values.

    Args:
        samples: the values (B), NaN where nothing was asked.

    Returns:
        [low, high].
    """
    defined = samples[~np.isnan(samples)]
    return np.percentile(defined, [50 - 50 * LEVEL, 50 + 50 * LEVEL]).tolist()


def interval(value: float, samples: Numbers, images: int) -> list[float]:
    """95 % interval of a score.

    Args:
        value: the score, as a share of 1.
        samples: the score in each resample (B).
        images: the number of pictures.

    Returns:
        [low, high]: percentiles, or at 0 and 1 the exact binomial interval of as many pictures
        (Clopper & Pearson 1934).
    """
    # At 0 or 1 no resample varies, and percentiles would claim a certainty that there is not.
    if value in (0, 1):
        right = round(value * images)
        exact = stats.binomtest(right, images).proportion_ci(LEVEL, method="exact")
        return [float(exact.low), float(exact.high)]
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


def contrast(scores: Scores, a: int, b: int) -> Contrast:
    """Compare two arms on the same resamples.

    Args:
        scores: of all arms.
        a: position of the arm in question.
        b: position of the arm that is subtracted.

    Returns:
        Arm a minus arm b.
    """
    return _difference(scores, scores.arm(a), scores.arm(b))


def _difference(scores: Scores, first: Competitor, second: Competitor) -> Contrast:
    """The first competitor minus the second, with the noise of these scores."""
    difference = first.score - second.score
    # Both answer the same pictures in a resample: what is easy for both cancels.
    samples = first.samples - second.samples
    # One picture says nothing of others: the largest variance that a share can have.
    item_variance = 1.0
    if scores.images > 1:
        item_variance = float(np.nanvar(samples, ddof=1))
    item_df = max(scores.images - 1, 1)

    seed_variance = 0.0
    # Without seed noise its variance is zero, so that this number does not matter.
    seed_df = 1
    if scores.noise is not None:
        # The mean of n runs varies by a share of 1/n, guessing not at all.
        seed_variance = scores.noise.sd**2 * (1 / first.runs + 1 / second.runs)
        seed_df = scores.noise.df

    error = math.sqrt(item_variance + seed_variance)
    df = float(item_df)
    if error > 0:
        # Welch and Satterthwaite: the degrees of freedom of a sum of two variances.
        df = error**4 / (item_variance**2 / item_df + seed_variance**2 / seed_df)
    half = float(stats.t.ppf(0.5 + LEVEL / 2, df)) * error
    return Contrast(
        difference=difference,
        interval=[difference - half, difference + half],
        item_interval=percentiles(samples),
        df=df,
        p=two_sided_p(difference, error, df),
        item_p=two_sided_p(difference, math.sqrt(item_variance), item_df),
    )


def judge(contrasts: list[Contrast]) -> list[JudgedContrast]:
    """Give each contrast its verdict, corrected for all of them together.

    Args:
        contrasts: all that are looked at together.

    Returns:
        The contrasts in the same order.
    """
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


def arm_score(scores: Scores, arm: int) -> ArmScore:
    """Give one arm's score with its interval over pictures.

    Args:
        scores: of the arms.
        arm: its position.

    Returns:
        The score as a share of 1, and its interval.
    """
    competitor = scores.arm(arm)
    limits = interval(competitor.score, competitor.samples, scores.images)
    return ArmScore(competitor.score, limits)


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
    return dict(zip(others, judge(contrasts), strict=True))


def compare_with_chance(scores: Scores) -> list[JudgedContrast]:
    """Compare every arm with guessing, corrected for all comparisons.

    Whether what was trained beats guessing is a question about the items alone, so the noise
    between seeds is left out.

    Args:
        scores: of the arms and of guessing.

    Returns:
        The contrast of each arm, in their order.
    """
    items_alone = replace(scores, noise=None)
    contrasts: list[Contrast] = []
    for position in range(len(scores.value)):
        arm = items_alone.arm(position)
        contrasts.append(_difference(items_alone, arm, items_alone.chance))
    return judge(contrasts)
