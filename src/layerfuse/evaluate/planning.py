"""How small a difference a study can show: before it is trained, and in its report."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats  # pyright: ignore[reportMissingTypeStubs]

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.seed_model import VariancePart, combine, estimate_variance
from layerfuse.evaluate.sequential import level_of_look
from layerfuse.evaluate.significance import LEVEL, Scores, item_part
from layerfuse.recipe.growing import AutoSeeds
from layerfuse.recipe.schema import Recipe

POWER = 0.8
# Enough that the result moves by a few per cent from one seed of the draws to the next.
STUDIES = 2000

# scipy brings no types
stats: Any = scipy.stats


@dataclass(frozen=True)
class ExpectedNoise:
    """How much scores vary, as shares of 1.

    Attributes:
        run: standard deviation between runs of one arm, beside what a seed does to all arms alike.
        shared: standard deviation of what a seed does to all arms alike.
        item: standard deviation over pictures of the difference of two arms on one picture.
    """

    run: float
    shared: float
    item: float


DEFAULT_NOISE = ExpectedNoise(run=0.03, shared=0.0, item=0.45)
"""Of a study about which nothing is known: runs of an arm differ by 3 points, which lies between
well-conditioned small studies (0.6 to 2) and those that stop early (6 to 12)."""


DEFAULT_PICTURES = 200
"""where the recipe does not say how many pictures its test has"""


@dataclass(frozen=True)
class StudyDesign:
    """The size of a study.

    Attributes:
        seeds: of each arm; the first is the baseline.
        pictures: of the test set.
    """

    seeds: list[list[int]]
    pictures: int

    def runs(self) -> list[list[int]]:
        """Give the seeds of the arms that are judged: those with two."""
        return [seeds for seeds in self.seeds if len(seeds) > 1]


def resolvable_difference(
    design: StudyDesign, noise: ExpectedNoise, level: float = LEVEL
) -> float | None:
    """Give the difference to the baseline that a study shows with a probability of 80 %.

    Simulates studies and judges them as `significance` does, with Bonferroni's correction for all
    arms, which is Holm's first step.

    Args:
        design: arms, seeds and pictures.
        noise: what is expected.
        level: of the verdicts.

    Returns:
        The difference as a share of 1, of the compared arm with the fewest seeds; None where the
        baseline or all other arms have one seed, so that nothing is judged.
    """
    arms = design.runs()
    if len(design.seeds[0]) < 2 or len(arms) < 2:
        return None
    rng = np.random.default_rng(0)
    names = sorted({seed for seeds in arms for seed in seeds})
    shape = (STUDIES, len(arms), len(names))
    item_sd = noise.item / np.sqrt(design.pictures)
    together = noise.shared * rng.standard_normal((STUDIES, 1, len(names)))
    scores = together + noise.run * rng.standard_normal(shape)
    for arm, seeds in enumerate(arms):
        missing = [position for position, seed in enumerate(names) if seed not in seeds]
        scores[:, arm, missing] = np.nan
    variance = estimate_variance(scores)
    # Every arm here has two runs.
    assert variance is not None

    fewest = min(range(1, len(arms)), key=lambda arm: len(arms[arm]))
    means = np.nanmean(scores, axis=-1)
    difference = means[:, fewest] - means[:, 0] + item_sd * rng.standard_normal(STUDIES)
    items = VariancePart(
        np.full(STUDIES, item_sd**2), np.full(STUDIES, float(max(design.pictures - 1, 1)))
    )
    total = combine([items, *variance.of_difference(fewest, 0)])
    tail = (1 - level) / 2 / (len(arms) - 1)
    # Each study shows what lifts its difference over its own threshold.
    needed = stats.t.isf(tail, total.df) * total.error - difference
    return float(np.quantile(needed, POWER))


def noise_of_scores(scores: Scores, reference: int) -> ExpectedNoise | None:
    """Measure how much the scores of a finished study vary.

    Args:
        scores: of its arms.
        reference: position of the baseline.

    Returns:
        The noise; None where no arm has two seeds.
    """
    variance = estimate_variance(scores.runs)
    if variance is None:
        return None
    item_sds: list[float] = []
    baseline = scores.arm(reference)
    for arm in range(len(scores.value)):
        if arm != reference:
            difference = scores.arm(arm).samples - baseline.samples
            part = item_part(difference, scores.images)
            item_sds.append(float(np.sqrt(part.variance * scores.images)))
    if not item_sds:
        return None
    return ExpectedNoise(
        run=float(np.sqrt(variance.typical)),
        shared=float(np.sqrt(variance.shared)),
        item=float(np.median(item_sds)),
    )


def resolved_by(scores: Scores, reference: int) -> float | None:
    """Give the difference to the baseline that a study like this one shows with 80 %.

    Args:
        scores: of its arms.
        reference: position of the baseline.

    Returns:
        The difference as a share of 1; None where nothing is judged.
    """
    noise = noise_of_scores(scores, reference)
    if noise is None:
        return None
    seeds: list[list[int]] = []
    for trained in ~np.isnan(scores.runs):
        seeds.append(np.flatnonzero(trained).tolist())
    seeds.insert(0, seeds.pop(reference))
    return resolvable_difference(StudyDesign(seeds, scores.images), noise, scores.level)


def planned(recipe: Recipe) -> str:
    """Say how small a difference a recipe's study would show.

    The noise between runs is that of the recipe's last report, `runs/<name>/summary.json`, where
    there is one; else `DEFAULT_NOISE`.

    Args:
        recipe: checked.

    Returns:
        One sentence; with `seeds: auto` another before it, which says how many runs there may be.
    """
    baseline = recipe.baseline_name
    seeds: list[list[int]] = []
    for arm in recipe.all_arms():
        arm_seeds = list(arm.seeds or recipe.all_seeds)
        if arm.label == baseline:
            seeds.insert(0, arm_seeds)
        else:
            seeds.append(arm_seeds)
    noise = DEFAULT_NOISE
    source = "a default"
    summary = Path("runs") / recipe.name / "summary.json"
    measured = _run_noise_in(summary)
    if measured is not None:
        noise = ExpectedNoise(run=measured, shared=0.0, item=DEFAULT_NOISE.item)
        source = str(summary)
    pictures = _test_pictures(recipe)
    known = f"{pictures} test pictures"
    if pictures is None:
        pictures = DEFAULT_PICTURES
        known = f"{pictures} test pictures assumed"
    assumed = f"(runs of an arm differ by {100 * noise.run:.1f} points: {source}; {known})."
    rule = recipe.seed_rule
    if rule is not None:
        return _planned_looks(rule, len(seeds), pictures, noise) + assumed
    difference = resolvable_difference(StudyDesign(seeds, pictures), noise)
    if difference is None:
        return "Verdicts: none, since an arm with one seed has scores only; give two seeds or more."
    return (
        f"Resolves a difference of {100 * difference:.1f} points to the baseline in 80 % of studies"
        f" {assumed}"
    )


def _planned_looks(rule: AutoSeeds, arms: int, pictures: int, noise: ExpectedNoise) -> str:
    """How many runs a study with `seeds: auto` does, and what its first and last look show.

    Args:
        rule: first and last look.
        arms: their number; at least two.
        pictures: of the test.
        noise: what is expected.
    """
    shown: list[str] = []
    for seeds in (rule.first, rule.maximum):
        design = StudyDesign([list(range(seeds))] * arms, pictures)
        level = level_of_look(rule, seeds, arms - 1)
        difference = resolvable_difference(design, noise, level)
        # There are two arms and two seeds or more.
        assert difference is not None
        shown.append(f"{100 * difference:.1f} points with {seeds} seeds")
    margin = 100 * rule.difference
    text = (
        f"Runs: {arms * rule.first} to {arms * rule.maximum}, {rule.first} to {rule.maximum} seeds "
        f"for each of {arms} arms: seeds are added until every difference to the baseline has a "
        f"verdict or an interval within ±{margin:g} points.\n"
    )
    # The narrowest interval that any number of seeds leaves.
    tail = (1 - level_of_look(rule, rule.maximum, arms - 1)) / 2
    half = 100 * float(stats.t.isf(tail, max(pictures - 1, 1))) * noise.item / np.sqrt(pictures)
    if half >= margin:
        needed = pictures * (half / margin) ** 2
        text += (
            f"Ties will take all {rule.maximum} seeds: {pictures} test pictures alone leave "
            f"±{half:.1f} points. To tell that arms differ by less than {margin:g} points, test "
            f"with more than {needed:.0f} pictures or raise auto_seeds.difference.\n"
        )
    return f"{text}Resolves a difference of {shown[0]}, {shown[1]}, in 80 % of studies "


def _test_pictures(recipe: Recipe) -> int | None:
    """The number of test pictures that the recipe itself says; None where only the data know."""
    data = recipe.evaluate.data
    if data.scenes is not None:
        return data.scenes.count
    return data.limit


def _run_noise_in(summary: Path) -> float | None:
    """The noise between runs in a report's numbers; None where there is none."""
    if not summary.is_file():
        return None
    try:
        noise = json.loads(summary.read_text(encoding="utf-8"))["noise"]
    except (ValueError, KeyError) as error:
        raise LayerfuseError(
            f"{summary} is not what a report writes ({error!r}); `layerfuse study` of the recipe "
            f"in {summary.parent} writes it anew"
        ) from error
    if noise is None:
        return None
    return float(noise["sd"])
