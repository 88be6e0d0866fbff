"""Looks at a study with `seeds: auto`: which runs each needs, and whether more seeds are needed.

What is decided depends on the results alone: a study that was killed takes its looks again and
decides as before.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from layerfuse.evaluate.records import FinishedRun, read_runs
from layerfuse.evaluate.score_table import Bootstrap, ScoreTable, family_of
from layerfuse.evaluate.sequential import level_of_look, resolved
from layerfuse.evaluate.significance import compare_all
from layerfuse.recipe.growing import AutoSeeds
from layerfuse.recipe.schema import Recipe
from layerfuse.study.plan import PlannedRun


@dataclass(frozen=True)
class PlannedLooks:
    """When a study is looked at.

    Attributes:
        rule: of the recipe.
        arms: their number, whether they have finished runs or not.
    """

    rule: AutoSeeds
    arms: int


@dataclass(frozen=True)
class SeedLook:
    """One look at a study with `seeds: auto`.

    Attributes:
        first: seeds of the first look.
        maximum: most seeds.
        difference: below which arms count as equal, as a share of 1.
        seeds: that all arms have been trained with by now.
        look: which look this is, from 1 on; 0 before the first.
        looks: how many there may be.
        level: of the intervals and verdicts, such as 0.98.
        unresolved: names of the arms whose difference to the baseline needs more seeds.
        pictures_alone: how far the interval of such a difference reaches to either side by the
            pictures alone, the least of them; None where none is left.
    """

    first: int
    maximum: int
    difference: float
    seeds: int
    look: int
    looks: int
    level: float
    unresolved: list[str]
    pictures_alone: float | None

    @property
    def is_last(self) -> bool:
        """Whether no seeds are added after it."""
        return self.look > 0 and (not self.unresolved or self.seeds == self.maximum)


def seeds_of_all(runs: Sequence[FinishedRun], arms: int) -> int:
    """Count the seeds that all arms have been trained with.

    Args:
        runs: finished ones.
        arms: number of arms that are planned.

    Returns:
        Their number; 0 where an arm has no run.
    """
    by_arm: dict[str, set[int]] = {}
    for run in runs:
        by_arm.setdefault(run.record.arm, set()).add(run.record.seed)
    if len(by_arm) < arms:
        return 0
    return len(set.intersection(*by_arm.values()))


def bootstrap_of_look(
    runs: Sequence[FinishedRun], plan: PlannedLooks, bootstrap: Bootstrap
) -> Bootstrap:
    """Give the bootstrap the level of the look that the finished runs allow.

    Args:
        runs: finished ones.
        plan: when looks are taken.
        bootstrap: how pictures are redrawn.
    """
    level = level_of_look(plan.rule, seeds_of_all(runs, plan.arms), plan.arms - 1)
    return replace(bootstrap, level=level)


def look_at(
    runs: Sequence[FinishedRun], baseline: str, plan: PlannedLooks, table: ScoreTable
) -> SeedLook:
    """Say which differences to the baseline are resolved.

    Args:
        runs: finished ones.
        baseline: the arm that all others are compared with.
        plan: when looks are taken.
        table: scores of the runs by family, with the level of the look.

    Returns:
        The look.
    """
    rule = plan.rule
    seeds = seeds_of_all(runs, plan.arms)
    unresolved: list[str] = []
    halves: list[float] = []
    for arm, versus in compare_all(table.mean, table.arms.index(baseline)).items():
        if not resolved(versus, rule.difference):
            unresolved.append(table.arms[arm])
            low, high = versus.item_interval
            halves.append((high - low) / 2)
    return SeedLook(
        first=rule.first,
        maximum=rule.maximum,
        difference=rule.difference,
        seeds=seeds,
        look=max(0, min(seeds, rule.maximum) - rule.first + 1),
        looks=rule.maximum - rule.first + 1,
        level=table.mean.level,
        unresolved=unresolved,
        pictures_alone=min(halves, default=None),
    )


def runs_by_look(
    recipe: Recipe, planned: list[PlannedRun], folder: Path, console: Console
) -> Iterator[list[PlannedRun]]:
    """Give the runs that a study needs, look by look.

    Whoever takes a look's runs must have done all of them, and have written results.jsonl, before
    asking for the next look: it is decided by them.

    Args:
        recipe: of the study.
        planned: all runs that it may need.
        folder: the study's.
        console: is told what a look shows.

    Yields:
        The runs of this look and of those before it; where seeds are a list, once all runs.
    """
    rule = recipe.seed_rule
    if rule is None:
        yield planned
        return
    plan = PlannedLooks(rule, arms=len(recipe.all_arms()))
    bootstrap = Bootstrap(recipe.statistics.resamples, recipe.statistics.seed)
    for seeds in range(rule.first, rule.maximum + 1):
        yield [run for run in planned if run.seed < seeds]
        runs = read_runs(folder)
        at_level = bootstrap_of_look(runs, plan, bootstrap)
        table = ScoreTable.from_runs(runs, at_level, family_of)
        look = look_at(runs, recipe.baseline_name, plan, table)
        console.print(_progress_of(look), soft_wrap=True)
        if look.is_last:
            return


def _progress_of(look: SeedLook) -> str:
    """What a look says while the study runs."""
    begin = f"look {look.look} of at most {look.looks}, with {look.seeds} seeds: "
    if not look.unresolved:
        return f"{begin}every difference to the baseline is resolved"
    text = f"{begin}not resolved: {', '.join(look.unresolved)}"
    if look.is_last:
        return f"{text}; these were the most seeds (auto_seeds.maximum)"
    return f"{text}; all arms get another seed"


def look_sentences(look: SeedLook) -> str:
    """Say by what rule seeds were added, how it ended, and what the intervals allow for.

    Args:
        look: the last one of a study.

    Returns:
        The sentences.
    """
    rule = (
        "every difference to the baseline has a verdict or an interval within "
        f"±{100 * look.difference:g} points"
    )
    names = ", ".join(look.unresolved)
    seeds = f"{look.seeds} seeds"
    if look.look == 0:
        text = (
            f"Seeds are added until {rule}; the first look needs {look.first} seeds of every arm, "
            "which there are not yet."
        )
    elif not look.unresolved:
        text = f"Seeds were added until {rule}, which is so after {seeds}."
    elif look.is_last:
        text = (
            f"Seeds were to be added until {rule}, but to {look.maximum} at most: with these it is "
            f"not so for {names}."
        )
    else:
        text = (
            f"Seeds are added until {rule}, {look.maximum} at most; after {seeds} it is not so "
            f"for {names}."
        )
    if look.pictures_alone is not None and look.pictures_alone >= look.difference:
        text += (
            f" The pictures alone leave ±{100 * look.pictures_alone:.1f} points: to show that arms "
            f"differ by less than {100 * look.difference:g} takes more test pictures, not more "
            "seeds."
        )
    return text + (
        f" Intervals and verdicts allow for {look.looks} looks, after {look.first} to "
        f"{look.maximum} seeds: those of look {max(look.look, 1)} are made at a level of "
        f"{100 * look.level:.4g} %, so that over all looks together 95 % hold."
    )
