"""The page of a study over data sizes: accuracy against the number of training samples, per arm.

All numbers are those of the `summary.json` of each size's study.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from layerfuse.cost.recipe_table import steps_of
from layerfuse.evaluate.learning_status import ArmLearning
from layerfuse.files import write_text
from layerfuse.pages.inlined_svg import inline
from layerfuse.pages.template import page_template
from layerfuse.recipe.schema import Recipe
from layerfuse.study.findings import ONE_SEED, listed
from layerfuse.study.report_figures import LEGEND_COLUMNS, LEGEND_ROW, WIDTH, add_legend

DATA_SIZES = "data_sizes.json"
NOT_TRAINED = "not trained long enough to say"


@dataclass(frozen=True)
class SizedArm:
    """What one arm scores at one size, as the size's study says.

    Attributes:
        arm: its name.
        seeds: of its runs.
        score: its mean over families and seeds, as a share of 1.
        interval: 95 % interval [low, high] of the score.
        covers: what the interval is over: `pictures and seeds`, or `pictures`.
        difference: to the baseline of the same size; None for the baseline.
        difference_interval: 95 % interval [low, high] of the difference; None for the baseline.
        verdict: `better`, `worse`, `tie` or `unjudged`; None for the baseline.
        training: what the arm had learned when it stopped; None where nothing is known.
        settled: whether nothing is known against comparing the arm.
    """

    # The order of the fields is that of data_sizes.json.
    arm: str
    seeds: list[int]
    score: float
    interval: list[float]
    covers: str
    difference: float | None
    difference_interval: list[float] | None
    verdict: str | None
    training: str | None
    settled: bool

    @classmethod
    def from_summary(cls, row: dict[str, Any], learning: dict[str, Any]) -> "SizedArm":
        """Read an arm.

        Args:
            row: of the arm, in `arms` of summary.json.
            learning: of all arms, in summary.json.

        Returns:
            The arm at this size.
        """
        training = None
        settled = True
        if row["arm"] in learning:
            learned = ArmLearning.from_json(learning[row["arm"]])
            training = learned.text
            settled = learned.settled
        difference = None
        difference_interval = None
        verdict = None
        versus = row["versus_baseline"]
        if versus is not None:
            difference = versus["difference"]
            difference_interval = versus["interval"]
            verdict = versus["verdict"]
        return cls(
            arm=row["arm"],
            seeds=row["seeds"],
            score=row["mean"]["score"],
            interval=row["mean"]["interval"],
            covers=row["mean"]["covers"],
            difference=difference,
            difference_interval=difference_interval,
            verdict=verdict,
            training=training,
            settled=settled,
        )


@dataclass(frozen=True)
class SizedStudy:
    """The study of one size.

    Attributes:
        samples: number of samples of the last stage.
        folder: of the study, relative to that of all sizes.
        steps: optimizer steps of the last stage.
        passes: how often the last stage sees a sample, on average.
        runs: number of finished runs.
        chance: what guessing scores, as a share of 1.
        headline: the first sentence of its report.
        training: what its report says of how far training went.
        arms: in the recipe's order.
    """

    # The order of the fields is that of data_sizes.json.
    samples: int
    folder: str
    steps: int
    passes: float
    runs: int
    chance: float
    headline: str
    training: str
    arms: list[SizedArm]

    def arm(self, name: str) -> SizedArm:
        """Give an arm.

        Args:
            name: of one of the recipe's arms.

        Returns:
            The arm at this size.
        """
        return next(arm for arm in self.arms if arm.arm == name)


@dataclass(frozen=True)
class SizesReport:
    """What a study over data sizes found: data_sizes.json.

    Attributes:
        name: of the study.
        stage: the last one, whose data has these sizes.
        baseline: the arm that the others are compared with at each size.
        headline: whether verdicts differ between sizes.
        length: how long each size was trained, and why.
        intervals: what the intervals cover.
        waiting: sizes of the recipe that have no results yet.
        sizes: those that have, growing.
    """

    # The order of the fields is that of data_sizes.json.
    name: str
    stage: str
    baseline: str
    headline: str
    length: str
    intervals: str
    waiting: list[int]
    sizes: list[SizedStudy]


def folder_of_size(size: int) -> str:
    """Name the folder of a size's study in that of all sizes.

    Args:
        size: number of samples.

    Returns:
        The name.
    """
    return f"size-{size}"


def read_sized_study(recipe: Recipe, folder: Path, size: int) -> SizedStudy:
    """Read what the study of one size found.

    Args:
        recipe: with all sizes.
        folder: of the study of all sizes.
        size: is finished.

    Returns:
        The numbers and sentences that the page shows.
    """
    summary = json.loads((folder / folder_of_size(size) / "summary.json").read_text("utf-8"))
    rows = {row["arm"]: row for row in summary["arms"]}
    arms = []
    for arm in recipe.all_arms():
        arms.append(SizedArm.from_summary(rows[arm.label], summary["learning"]))
    stage = recipe.stages[recipe.last_stage]
    if recipe.step_rule is not None:
        # Each size's study has found its own.
        steps = summary["budgets"]["budgets"][-1]["steps"]
    else:
        steps = steps_of(stage, size)
    passes = stage.epochs
    if stage.steps is not None:
        passes = steps * stage.batch_size / size
    return SizedStudy(
        samples=size,
        folder=folder_of_size(size),
        steps=steps,
        passes=passes,
        runs=summary["runs"],
        chance=summary["chance"]["mean"],
        headline=summary["findings"]["headline"],
        training=summary["findings"]["training"],
        arms=arms,
    )


def verdict_sentence(sizes: list[SizedStudy], baseline: str) -> str:
    """Say whether the verdicts against the baseline differ between sizes.

    Args:
        sizes: finished, growing.
        baseline: the name of an arm.

    Returns:
        A sentence; a size at which an arm or the baseline was not trained long enough gives no
        verdict.
    """
    differing = []
    judged = False
    for arm in sizes[0].arms:
        if arm.arm == baseline:
            continue
        # By verdict, so that each is named once.
        sizes_of_verdict: dict[str, list[str]] = {}
        for size in sizes:
            verdict = said_verdict(size, arm.arm, baseline)
            judged = judged or verdict != "unjudged"
            sizes_of_verdict.setdefault(verdict, []).append(f"{size.samples:,}")
        if len(sizes_of_verdict) > 1:
            parts = [f"{said} at {listed(at)}" for said, at in sizes_of_verdict.items()]
            differing.append(f"{arm.arm} ({', '.join(parts)})")
    if not judged:
        return f"Accuracy against the number of training samples; {ONE_SEED}."
    if differing:
        return f"Against {baseline}, verdicts differ between sizes: {'; '.join(differing)}."
    return f"Against {baseline}, each arm has the same verdict at all sizes."


def said_verdict(size: SizedStudy, arm: str, baseline: str) -> str:
    """The verdict on an arm, if training went far enough for one.

    Args:
        size: the study of a size.
        arm: its name.
        baseline: to which it is compared.
    """
    at_size = size.arm(arm)
    if at_size.verdict != "unjudged" and not (at_size.settled and size.arm(baseline).settled):
        return NOT_TRAINED
    return at_size.verdict or "unjudged"


def length_sentence(recipe: Recipe) -> str:
    """Say how training differs between sizes.

    Args:
        recipe: with all sizes.

    Returns:
        The sentence.
    """
    stage = recipe.stages[recipe.last_stage]
    if recipe.step_rule is not None:
        return (
            f"Each size trains {recipe.last_stage} until its arms are known to need no more steps, "
            f"from {recipe.step_rule.first:,} to {recipe.step_rule.maximum:,} steps of "
            f"{stage.batch_size} samples (steps: auto)."
        )
    if stage.fixed_steps is not None:
        return (
            f"All sizes train {recipe.last_stage} for the same {stage.fixed_steps:,} steps of "
            f"{stage.batch_size} samples (steps is fixed): the fewer samples there are, the more "
            "often each is seen."
        )
    return (
        f"All sizes train {recipe.last_stage} for {stage.epochs:g} passes over its samples (epochs "
        "is fixed), so that steps grow with the data: an arm of less data is also trained less."
    )


def intervals_sentence(sizes: list[SizedStudy]) -> str:
    """Say what the intervals of the scores are over, in the words of the sizes' studies.

    Args:
        sizes: finished.

    Returns:
        The sentence.
    """
    arms_of_covers: dict[str, list[str]] = {}
    for size in sizes:
        for arm in size.arms:
            names = arms_of_covers.setdefault(arm.covers, [])
            if arm.arm not in names:
                names.append(arm.arm)
    parts = []
    for covers, names in arms_of_covers.items():
        part = f"over {covers}"
        if len(arms_of_covers) > 1:
            part += f" ({listed(names)})"
        parts.append(part)
    return (
        f"95 % intervals {', '.join(parts)}, each of one size by itself. A run's seed also draws "
        "its samples: an interval over seeds covers which samples were drawn."
    )


def draw_sizes(sizes: list[SizedStudy], folder: Path) -> None:
    """Write the figure as PNG and SVG.

    Args:
        sizes: finished, growing.
        folder: where it goes, under the name `data_sizes`.
    """
    # matplotlib is loaded when figures are drawn.
    from layerfuse import plots

    curves = []
    for index, arm in enumerate(sizes[0].arms):
        shares = []
        for size in sizes:
            at_size = size.arm(arm.arm)
            shares.append(plots.Share(at_size.score, at_size.interval))
        samples = [size.samples for size in sizes]
        curves.append(plots.SizeCurve(arm.arm, index, samples, shares))
    # Chance is a label of the legend too.
    legend_rows = -(-(len(curves) + 1) // LEGEND_COLUMNS)
    with plots.figure(folder / "data_sizes", WIDTH, 4 + LEGEND_ROW * legend_rows) as figure:
        axes = plots.plot_data_sizes(curves, sizes[0].chance, figure.subplots())
        add_legend(figure, [axes])


def write_sizes_report(recipe: Recipe, folder: Path, finished: list[int]) -> Path:
    """Write data_sizes.json, figures/ and report.html into the folder of all sizes.

    Args:
        recipe: with all sizes.
        folder: in which each size has its study.
        finished: the sizes whose studies are done, growing; at least one.

    Returns:
        The path of the page.

    Raises:
        LayerfuseError: a file cannot be written.
    """
    sizes = [read_sized_study(recipe, folder, size) for size in finished]
    baseline = recipe.baseline_name
    report = SizesReport(
        name=recipe.name,
        stage=recipe.last_stage,
        baseline=baseline,
        headline=verdict_sentence(sizes, baseline),
        length=length_sentence(recipe),
        intervals=intervals_sentence(sizes),
        waiting=[size for size in recipe.data_sizes or [] if size not in finished],
        sizes=sizes,
    )
    draw_sizes(sizes, folder / "figures")
    page = write_sizes_page(report, recipe.description, folder)
    write_text(folder / DATA_SIZES, json.dumps(asdict(report), indent=1) + "\n")
    return page


def write_sizes_page(report: SizesReport, description: str, folder: Path) -> Path:
    """Write report.html into the folder of all sizes.

    Args:
        report: what was found.
        description: what the study is for; may be empty.
        folder: holds the figure.

    Returns:
        The path of the page.

    Raises:
        LayerfuseError: the page cannot be written.
    """
    arms = listed([arm.arm for arm in report.sizes[0].arms])
    alt = f"Accuracy of {arms} against the number of training samples; the table below has it."
    html = page_template("layerfuse.study", "data_sizes.html.j2").render(
        r=report,
        description=description,
        said_verdict=said_verdict,
        drawing=inline(folder / "figures" / "data_sizes.svg", alt),
    )
    write_text(folder / "report.html", html)
    return folder / "report.html"
