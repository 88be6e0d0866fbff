"""How much the runs of a study vary: the model behind every statement about differences.

The score of arm a trained with seed s is y_as = mean_a + shared_s + own_as. What a seed does to all
arms alike (the order of the data, the first weights) cancels in a difference of arms that share
their seeds; what it does to one arm alone does not.

* The sums of squares of a layout with arms and seeds give both variances. Where the line of the
  seeds is not larger than the residual, or the seeds are not shared, both lines are pooled.
* Arms differ in how noisy they are: the variance of an arm is never less than its own.
* An own variance from two runs is easily too small by chance, which no data show: each arm's
  standard error is multiplied by `guard_factor`, chosen by benchmarks/statistics_simulation.py.

Shapes: ... any number of studies of one layout, A arms, S seeds.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

Numbers = np.ndarray[Any, np.dtype[np.float64]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]

# Two arms leave too few degrees of freedom to tell a line of seeds from the residual.
ARMS_OF_BLOCKS = 3


@dataclass(frozen=True)
class VariancePart:
    """An estimated variance and the degrees of freedom of its estimate, each of shape (...)."""

    variance: Numbers
    df: Numbers


@dataclass(frozen=True)
class StandardError:
    """The standard error of a sum of independent parts, and its degrees of freedom (...)."""

    error: Numbers
    df: Numbers


@dataclass(frozen=True)
class RunVariance:
    """How much the runs of a study vary.

    Attributes:
        own: variance of a run of each arm, beside what its seed does to all arms, already guarded
            (..., A); NaN for arms with one run.
        df: degrees of freedom of `own` (...).
        typical: variance of a run, pooled over the arms and not guarded (...).
        shared: variance of what a seed does to all arms alike (...).
        shared_df: degrees of freedom of `shared`.
        trained: which arm was trained with which seed (A, S).
        deviations: of each run from its arm's mean, and with blocks from what its seed does to all
            arms (..., A, S); NaN for runs that `own` does not rest on.
        blocks: whether that was taken out (...).
    """

    own: Numbers
    df: Numbers
    typical: Numbers
    shared: Numbers
    shared_df: int
    trained: Flags
    deviations: Numbers
    blocks: Flags

    def repeated(self, arm: int) -> bool:
        """Say whether an arm has two runs, so that anything is known of its noise."""
        return int(self.trained[arm].sum()) > 1

    def of_mean(self, arm: int) -> list[VariancePart]:
        """Give what the mean over an arm's runs varies by.

        Args:
            arm: its position.

        Returns:
            The parts of the variance.
        """
        runs = self.trained[arm].sum()
        return [
            VariancePart(self.own[..., arm] / runs, self.df),
            VariancePart(self.shared / runs, np.full_like(self.df, self.shared_df)),
        ]

    def of_group(self, arms: list[int], seeds: Flags) -> Numbers:
        """Give the variance of the mean over several arms of their runs of one seed.

        Beside what the seed does to all arms, these vary each by itself, so that a mean of k arms
        has a k-th of their variance. It is never less than the group's own, since some arms may
        move together: all that inject their layers, say.

        Args:
            arms: positions of the group's arms.
            seeds: at least two that all of them were trained with (S).

        Returns:
            The variance (...); of one arm it is `own`.
        """
        size = len(arms)
        independent = self.own[..., arms].sum(axis=-1) / size**2
        repeated = int((self.trained.sum(axis=1) > 1).sum())
        # Of all arms at once nothing is left beside what a seed does to all.
        if size == repeated:
            return independent
        together = self.deviations[..., arms, :][..., seeds].mean(axis=-2)
        # The block may hold fewer seeds than the group.
        known = (~np.isnan(together)).sum(axis=-1)
        centred = together - np.nanmean(together, axis=-1, keepdims=True)
        # With blocks the mean over the study's arms takes a share of k / A of the group's away.
        factor = np.where(self.blocks, repeated / (repeated - size), 1.0)
        factor *= guard_factor(repeated, known.astype(float)) ** 2
        observed = factor * np.nansum(centred**2, axis=-1) / (known - 1)
        return np.maximum(independent, observed)

    def of_difference(self, first: int, second: int) -> list[VariancePart]:
        """Give what the difference of two arms' means varies by.

        Args:
            first: position of one arm.
            second: position of the other.

        Returns:
            The parts of the variance.
        """
        runs_of_first = self.trained[first].sum()
        runs_of_second = self.trained[second].sum()
        # A seed that both have cancels, fully where they have equally many.
        weights = self.trained[first] / runs_of_first - self.trained[second] / runs_of_second
        left = float((weights**2).sum())
        return [
            VariancePart(self.own[..., first] / runs_of_first, self.df),
            VariancePart(self.own[..., second] / runs_of_second, self.df),
            VariancePart(self.shared * left, np.full_like(self.df, self.shared_df)),
        ]


def guard_factor(arms: int, runs: Numbers) -> Numbers:
    """Give the factor on the standard error that makes up for own variances of few runs.

    1 + (0.35 + 0.9 / arms) / (runs - 1)^1.5: about the smallest of its form with which differences
    between arms of unequal noise are covered, in the committed simulation.

    Args:
        arms: number of arms with two runs.
        runs: number of runs of each arm.

    Returns:
        The factors, of the shape of `runs`.
    """
    return 1 + (0.35 + 0.9 / arms) / (runs - 1) ** 1.5


def combine(parts: list[VariancePart]) -> StandardError:
    """Add independent variances (Satterthwaite 1946).

    Args:
        parts: the variances with their degrees of freedom.

    Returns:
        The standard error of the sum; without any variance it has one degree of freedom.
    """
    total = np.zeros_like(parts[0].variance)
    squares = np.zeros_like(total)
    for part in parts:
        total = total + part.variance
        squares = squares + part.variance**2 / part.df
    df = np.divide(total**2, squares, out=np.ones_like(total), where=squares > 0)
    return StandardError(np.sqrt(total), df)


def estimate_variance(scores: Numbers) -> RunVariance | None:
    """Estimate how much runs vary.

    Args:
        scores: of each run (..., A, S); NaN where an arm was not trained with a seed, alike in all
            studies.

    Returns:
        The variances; None where no arm has two runs.
    """
    arms, seeds = scores.shape[-2:]
    trained = ~np.isnan(scores.reshape(-1, arms, seeds)[0])
    runs = trained.sum(axis=1)
    repeated = runs > 1
    if not repeated.any():
        return None

    # Unpaired: what a seed does to all arms is part of each arm's noise.
    centred = scores - np.nanmean(scores, axis=-1, keepdims=True)
    squares = np.nansum(centred**2, axis=-1)
    unpaired_df = int((runs[repeated] - 1).sum())
    unpaired = squares[..., repeated].sum(axis=-1) / unpaired_df
    own = np.full_like(squares, np.nan)
    own[..., repeated] = squares[..., repeated] / (runs[repeated] - 1)
    count = int(repeated.sum())
    guarded = np.maximum(own, unpaired[..., None])
    guarded[..., repeated] *= guard_factor(count, runs[repeated].astype(float)) ** 2
    result = RunVariance(
        own=guarded,
        df=np.full_like(unpaired, unpaired_df),
        typical=unpaired,
        shared=np.zeros_like(unpaired),
        shared_df=1,
        trained=trained,
        deviations=np.where(repeated[:, None], centred, np.nan),
        blocks=np.zeros_like(unpaired, dtype=bool),
    )

    common = trained[repeated].all(axis=0)
    if count < ARMS_OF_BLOCKS or common.sum() < 2:
        return result
    return _with_blocks(result, scores, repeated, common)


def _with_blocks(
    unpaired: RunVariance, scores: Numbers, repeated: Flags, common: Flags
) -> RunVariance:
    """Take out what seeds do to all arms, in those studies where that is larger than the rest.

    Args:
        unpaired: the variances without blocks.
        scores: of each run (..., A, S).
        repeated: which arms have two runs (A).
        common: which seeds all of these share (S).
    """
    arms = int(repeated.sum())
    seeds = int(common.sum())
    block = scores[..., repeated, :][..., common]
    centred = block - block.mean(axis=-1, keepdims=True)
    effect = centred.mean(axis=-2, keepdims=True)
    residual = centred - effect
    residual_df = (arms - 1) * (seeds - 1)
    seed_line = arms * (effect**2).sum(axis=(-1, -2)) / (seeds - 1)
    residual_line = (residual**2).sum(axis=(-1, -2)) / residual_df
    helps = seed_line > residual_line

    # The mean over the arms takes a share of 1 / A of an arm's residual away.
    own = (residual**2).sum(axis=-1) / (seeds - 1) * arms / (arms - 1)
    guarded = np.maximum(own, residual_line[..., None])
    guarded *= guard_factor(arms, np.array(float(seeds))) ** 2
    chosen = unpaired.own.copy()
    chosen[..., repeated] = np.where(helps[..., None], guarded, unpaired.own[..., repeated])
    rows, columns = np.ix_(repeated, common)
    in_block = np.full_like(scores, np.nan)
    in_block[..., rows, columns] = residual
    return RunVariance(
        own=chosen,
        df=np.where(helps, residual_df, unpaired.df),
        typical=np.where(helps, residual_line, unpaired.typical),
        shared=np.where(helps, (seed_line - residual_line) / arms, 0.0),
        shared_df=seeds - 1,
        trained=unpaired.trained,
        deviations=np.where(helps[..., None, None], in_block, unpaired.deviations),
        blocks=helps,
    )
