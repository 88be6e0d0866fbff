"""Studies with `steps: auto`: budgets of steps, one after the other, until the arms are settled.

A schedule that decays to zero cannot be extended: every budget is a training of its own. What is
decided depends on finished runs alone: a study that was killed decides again as before.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from layerfuse.data.lazy_records import Samples
from layerfuse.data.subset import draw_subsets
from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.learning_status import ArmLearning, can_judge_gain, judge_learning
from layerfuse.evaluate.records import RunRecord, read_runs
from layerfuse.files import write_text
from layerfuse.recipe.growing import AutoSteps
from layerfuse.recipe.schema import Recipe
from layerfuse.study.looks import runs_by_look
from layerfuse.study.plan import PlannedRun
from layerfuse.study.training_status import BlindLosses, read_blind_losses
from layerfuse.train.along import moments_of

BUDGETS = "budgets.json"
"""What each budget gave, in the study's folder."""


@dataclass(frozen=True)
class ArmAtBudget:
    """What one arm gave with the steps of one budget.

    Attributes:
        arm: its name.
        seeds: number of its runs.
        state: what it had learned when its training stopped.
        settled: whether that is all that it is known to be able to.
        validation: accuracy on the validation questions at the end of training, the mean over
            seeds, as a share of 1; None without validation data.
        test: accuracy of the test, the mean over families and seeds.
    """

    # The order of the fields is that of budgets.json.
    arm: str
    seeds: int
    state: str
    settled: bool
    validation: float | None
    test: float


@dataclass(frozen=True)
class StepBudget:
    """What the arms that were trained with these steps gave.

    Attributes:
        steps: of the last stage.
        arms: in the order of the recipe.
    """

    steps: int
    arms: list[ArmAtBudget]

    @property
    def unsettled(self) -> list[str]:
        """Names of the arms that need more steps."""
        return [arm.arm for arm in self.arms if not arm.settled]


@dataclass(frozen=True)
class StepBudgets:
    """What more steps did: budgets.json.

    Attributes:
        stage: whose steps they are, the last one.
        first: steps of the first budget.
        maximum: most steps.
        same_for_all: whether arms that need no more steps get them all the same.
        budgets: those whose runs are done, growing.
    """

    stage: str
    first: int
    maximum: int
    same_for_all: bool
    budgets: list[StepBudget]

    @property
    def arms(self) -> list[str]:
        """Names of all arms: each is trained with the first budget."""
        return [arm.arm for arm in self.budgets[0].arms]

    def cell(self, arm: str, budget: StepBudget) -> ArmAtBudget | None:
        """Give what an arm gave with a budget.

        Args:
            arm: its name.
            budget: one of these.

        Returns:
            That; None where the arm had not been trained with so many steps.
        """
        for at_budget in budget.arms:
            if at_budget.arm == arm:
                return at_budget
        return None

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "StepBudgets":
        """Read what `asdict` gave.

        Args:
            content: plain values.

        Returns:
            The budgets.
        """
        budgets = []
        for budget in content["budgets"]:
            arms = [ArmAtBudget(**arm) for arm in budget["arms"]]
            budgets.append(StepBudget(budget["steps"], arms))
        return cls(**{**content, "budgets": budgets})


def write_budgets(folder: Path, budgets: StepBudgets) -> None:
    """Keep what each budget gave.

    Args:
        folder: the study's.
        budgets: those whose runs are done.
    """
    write_text(folder / BUDGETS, json.dumps(asdict(budgets), indent=1) + "\n")


def read_budgets(folder: Path) -> StepBudgets | None:
    """Read what `write_budgets` wrote.

    Args:
        folder: the study's.

    Returns:
        The budgets; None where the recipe gave the steps, or no budget is done.
    """
    file = folder / BUDGETS
    if not file.exists():
        return None
    return StepBudgets.from_json(json.loads(file.read_text("utf-8")))


def refuse_auto_steps(recipe: Recipe) -> None:
    """Refuse a recipe with `steps: auto` where one number of steps alone has a meaning.

    Args:
        recipe: any.

    Raises:
        LayerfuseError: the recipe has `steps: auto`.
    """
    rule = recipe.step_rule
    if rule is None:
        return
    override = f"stages.{recipe.last_stage}.steps={rule.maximum}"
    if recipe.auto_steps is not None:
        override = f"auto_steps=null {override}"
    raise LayerfuseError(
        "the recipe has `steps: auto`, which compares arms, and `layerfuse train` trains one: "
        f"give its steps as a number, such as {override}"
    )


def refuse_undecidable(
    recipe: Recipe, blind_losses: BlindLosses, samples: Mapping[str, Samples]
) -> None:
    """Refuse a study with `steps: auto` that could not tell when its arms are settled.

    Args:
        recipe: of the study.
        blind_losses: of each stage the loss of one who does not look; None for free text.
        samples: of each stage.

    Raises:
        LayerfuseError: the last stage teaches free text, and validation data are missing or are
            answered at the wrong times.
    """
    stage = recipe.last_stage
    rule = recipe.step_rule
    if rule is None or blind_losses.get(stage):
        return
    if can_judge_gain(recipe.evaluate.shares):
        _refuse_short_stage(recipe, rule.first, samples)
        return
    advice = "give validation data (evaluate.validation)"
    if recipe.evaluate.validation is not None:
        advice = (
            f"evaluate.at is {recipe.evaluate.shares}: it needs 1.0 and a share from 0.5 to 0.9, "
            "such as the default [0.25, 0.5, 0.75, 1.0]"
        )
    raise LayerfuseError(
        f"stages.{stage}.steps: auto cannot tell when the arms have learned what they can: the "
        f"answers of {stage} are free text, of which too few come often enough to judge training "
        f"losses by, and there is no accuracy along training in their place; {advice}, or give "
        "steps as a number"
    )


def _refuse_short_stage(recipe: Recipe, steps: int, samples: Mapping[str, Samples]) -> None:
    """Raise LayerfuseError if the last stage is so short, with these steps, that no share of
    training from which its gain could be told lies within it."""
    stage = recipe.last_stage
    trained = draw_subsets(samples, recipe.subsets, seed=0)
    moments = moments_of(recipe.of_steps(steps), trained, recipe.evaluate.shares)
    within = [moment.share for moment in moments if moment.stage == stage]
    if can_judge_gain(within):
        return
    raise LayerfuseError(
        f"stages.{stage}.steps: auto cannot tell when the arms have learned what they can: with "
        f"the first {steps} steps {stage} is so small a part of all training that of "
        f"evaluate.at {recipe.evaluate.shares} no share from 0.5 to 0.9 lies within it; add a "
        "later share, such as 0.9, raise auto_steps.first, or give steps as a number"
    )


def runs_by_budget(
    recipe: Recipe, planned: list[PlannedRun], folder: Path, console: Console
) -> Iterator[list[PlannedRun]]:
    """Give the runs that a study needs: budget by budget, then look by look with the last of them.

    Whoever takes these runs must have done all of them, and have written results.jsonl, before
    asking for the next: they are decided by them.

    Args:
        recipe: of the study.
        planned: all runs that it may need.
        folder: the study's.
        console: is told what a budget shows.

    Yields:
        The runs whose results are the study's so far: of each arm those with the most steps.
    """
    # What another recipe left in this folder is nothing to this one.
    (folder / BUDGETS).unlink(missing_ok=True)
    rule = recipe.step_rule
    if rule is None:
        yield from runs_by_look(recipe, planned, folder, console)
        return
    steps_of_arms = {arm.label: rule.first for arm in recipe.all_arms()}
    done: list[StepBudget] = []
    for steps in rule.budgets:
        for arm in steps_of_arms:
            if not done or rule.same_for_all or arm in done[-1].unsettled:
                steps_of_arms[arm] = steps
        yield _with_first_seeds(recipe, _with_steps(planned, steps_of_arms))
        records = []
        for run in read_runs(folder):
            # Without same_for_all there are arms that had enough before.
            if steps_of_arms[run.record.arm] == steps:
                records.append(run.record)
        done.append(judge_budget(steps, records, read_blind_losses(folder)))
        write_budgets(
            folder,
            StepBudgets(recipe.last_stage, rule.first, rule.maximum, rule.same_for_all, done),
        )
        console.print(_progress_of(done[-1], rule), soft_wrap=True)
        if not done[-1].unsettled:
            break
    yield from runs_by_look(recipe, _with_steps(planned, steps_of_arms), folder, console)


def _with_steps(planned: list[PlannedRun], steps_of_arms: Mapping[str, int]) -> list[PlannedRun]:
    """The runs that train each arm with its steps, in the order of the recipe."""
    chosen: dict[tuple[str, int], PlannedRun] = {}
    # Every arm and seed has a place from the first budget on: figures tell arms apart by their
    # order, which must not depend on the steps that each has.
    for run in planned:
        of_arm = (run.arm.label, run.seed)
        if of_arm not in chosen or run.steps == steps_of_arms[run.arm.label]:
            chosen[of_arm] = run
    return list(chosen.values())


def _with_first_seeds(recipe: Recipe, planned: list[PlannedRun]) -> list[PlannedRun]:
    """The runs that decide about steps: with `seeds: auto`, seeds are added to the last budget."""
    rule = recipe.seed_rule
    if rule is None:
        return planned
    return [run for run in planned if run.seed < rule.first]


def judge_budget(steps: int, records: Sequence[RunRecord], blind_losses: BlindLosses) -> StepBudget:
    """Say what the arms that were trained with one budget had learned.

    Args:
        steps: of the budget.
        records: of all its runs.
        blind_losses: of each stage the loss of one who does not look, as far as it is known.

    Returns:
        What each arm gave.
    """
    runs_by_arm: dict[str, list[RunRecord]] = {}
    for record in records:
        runs_by_arm.setdefault(record.arm, []).append(record)
    learning = judge_learning(records, blind_losses)
    arms = []
    for arm, runs in runs_by_arm.items():
        arms.append(_arm_at_budget(arm, runs, learning[arm]))
    return StepBudget(steps, arms)


def _arm_at_budget(arm: str, runs: Sequence[RunRecord], learning: ArmLearning) -> ArmAtBudget:
    """What the runs of one arm gave."""
    at_end = []
    for run in runs:
        if run.along and run.along[-1].share == 1.0:
            at_end.append(run.along[-1].accuracy)
    validation = None
    if len(at_end) == len(runs):
        validation = sum(at_end) / len(at_end)
    return ArmAtBudget(
        arm=arm,
        seeds=len(runs),
        state=learning.text,
        settled=learning.settled,
        validation=validation,
        test=sum(run.scores.mean for run in runs) / len(runs),
    )


def steps_by_arm(records: Sequence[RunRecord]) -> dict[str, int]:
    """Say with how many steps of the last stage each arm was trained.

    Args:
        records: of runs with the same steps for each arm.

    Returns:
        By the arm's name; an arm whose losses are not known is left out.
    """
    steps: dict[str, int] = {}
    for record in records:
        # The last stage is the one whose steps the study chooses.
        curve = list(record.losses.values())[-1] if record.losses else []
        if curve:
            steps[record.arm] = curve[-1][0]
    return steps


def _progress_of(budget: StepBudget, rule: AutoSteps) -> str:
    """What a budget says while the study runs."""
    if not budget.unsettled:
        return f"{budget.steps:,} steps: no arm is known to need more"
    text = f"{budget.steps:,} steps are not enough for {', '.join(budget.unsettled)}"
    if budget.steps == rule.maximum:
        return f"{text}; these were the most (auto_steps.maximum)"
    goes_on = "all arms are trained again with more"
    if not rule.same_for_all:
        goes_on = "trained again with more"
    return f"{text}: {goes_on}"


def steps_sentences(budgets: StepBudgets) -> str:
    """Say by what rule steps were added, and how it ended.

    Args:
        budgets: whose runs are done, at least one.

    Returns:
        The sentences.
    """
    last = budgets.budgets[-1]
    names = ", ".join(last.unsettled)
    begin = f"Steps of {budgets.stage} were doubled from {budgets.first:,}"
    if not last.unsettled:
        text = f"{begin} until no arm was known to need more, which is so at {last.steps:,}."
    elif last.steps == budgets.maximum:
        text = (
            f"{begin} to {budgets.maximum:,}, the most that were allowed; they are not enough for "
            f"{names}."
        )
    else:
        text = (
            f"Steps of {budgets.stage} are doubled from {budgets.first:,} to {budgets.maximum:,} "
            f"at most; {last.steps:,} are not enough for {names}."
        )
    if not budgets.same_for_all:
        text += " Each arm keeps the first steps that are enough for it (same_for_all: false)."
    return text


def order_sentence(budgets: StepBudgets) -> str:
    """Say whether the arms have the same order with the last two budgets.

    Args:
        budgets: whose runs are done, at least one.

    Returns:
        The sentence; empty where fewer than two arms were trained with two budgets.
    """
    if len(budgets.budgets) < 2:
        return ""
    before, last = budgets.budgets[-2:]
    shared = []
    for arm in last.arms:
        earlier = budgets.cell(arm.arm, before)
        if earlier is not None:
            shared.append((earlier, arm))
    pairs = 0
    changed = []
    for place, (first_before, first) in enumerate(shared):
        for second_before, second in shared[place + 1 :]:
            pairs += 1
            gap = first.test - second.test
            if gap * (first_before.test - second_before.test) < 0:
                changed.append(f"{first.arm} and {second.arm}")
    if pairs == 0:
        return ""
    between = f"between {before.steps:,} and {last.steps:,} steps"
    if not changed:
        return f"No two arms changed places {between}."
    return (
        f"{len(changed)} of {pairs} pairs of arms changed places {between}: {'; '.join(changed)}. "
        "Close arms do so by the noise between runs alone."
    )
