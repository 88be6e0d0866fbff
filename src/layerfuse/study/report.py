"""The report of a study: summary.json, figures and one page that needs nothing else."""

import base64
import io
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from pydantic import ValidationError

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.records import AnswerRecord, FinishedRun, read_runs
from layerfuse.evaluate.score_table import Bootstrap
from layerfuse.files import write_text
from layerfuse.recipe.evaluate_settings import Claim
from layerfuse.recipe.growing import AutoSeeds
from layerfuse.recipe.reader import problems_of
from layerfuse.study.budgets import order_sentence, read_budgets, steps_by_arm, steps_sentences
from layerfuse.study.data_summary import read_data_summary
from layerfuse.study.findings import (
    ONE_SEED,
    Findings,
    percent,
    signed,
    span,
    state_findings,
    with_screening,
)
from layerfuse.study.looks import PlannedLooks
from layerfuse.study.summary import BOOTSTRAP, Summary, summarize
from layerfuse.study.training_status import read_blind_losses, read_probes

# A study imports this module before it trains; matplotlib is loaded when figures are drawn.
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from layerfuse import plots

# Cards of examples on the page, and the longer side of their pictures in pixels.
PICTURES = 8
PIXELS = 224

# Figures: inches, and labels of arms in a row of the legend.
WIDTH = 9.2
LEGEND_ROW = 0.26
LEGEND_COLUMNS = 4


@dataclass(frozen=True)
class ReportedRecipe:
    """What a report says of the recipe in the study's folder, and what it reads there.

    Attributes:
        text: of the whole file.
        title: the study's name.
        description: what the study is for; may be empty.
        baseline: the arm that all others are compared with.
        arms: names of all arms, finished or not.
        bootstrap: how pictures are redrawn.
        llm_blocks: number of the LLM's first blocks that were kept; None: all.
        claims: that it states; may be empty.
        looks: when the study is looked at, with `seeds: auto`; None where seeds are a list.
    """

    text: str
    title: str
    description: str
    baseline: str
    arms: list[str]
    bootstrap: Bootstrap
    llm_blocks: int | None
    claims: list[Claim]
    looks: PlannedLooks | None


@dataclass(frozen=True)
class ArmAnswer:
    """One arm's answer to a question."""

    arm: str
    answer: AnswerRecord


@dataclass(frozen=True)
class Example:
    """A question with the answers of all arms, and the rule by which it was chosen."""

    why: str
    question: AnswerRecord
    """the first arm's answer, which holds the question and its picture"""
    answers: list[ArmAnswer]


@dataclass(frozen=True)
class ExampleCard:
    """An example as the page shows it; picture is a data address, None where no file is."""

    example: Example
    picture: str | None


@dataclass(frozen=True)
class ExampleRule:
    """Choose the first question of this family (None: any) that is answered in this way."""

    why: str
    family: str | None
    scores: set[float]


def draw(summary: Summary, runs: list[FinishedRun], folder: Path) -> list[str]:
    """Write the figures as PNG and SVG.

    Args:
        summary: the numbers of the study.
        runs: all finished runs.
        folder: where the figures go.

    Returns:
        The names of the figures.
    """
    from layerfuse import plots

    # An arm's look follows its place in results.jsonl, not its rank, which new runs may change.
    order: dict[str, int] = {}
    stages: list[str] = []
    for run in runs:
        order.setdefault(run.record.arm, len(order))
        for stage in run.record.losses:
            if stage not in stages:
                stages.append(stage)
    # `plots` lies on a lower floor and knows nothing of studies.
    arms = []
    for arm in summary.arms:
        families = {}
        for family, score in arm.families.items():
            families[family] = plots.Share(score.score, score.interval)
        arms.append(
            plots.ArmResult(
                arm=arm.arm,
                index=order[arm.arm],
                mean=plots.Share(arm.mean.score, arm.mean.interval),
                seed_means=arm.seed_means,
                families=families,
            )
        )
    data = plots.StudyResult(
        arms=arms,
        baseline=summary.baseline,
        chance=summary.chance.mean,
        family_chance=summary.chance.families,
    )
    legend = LEGEND_ROW * math.ceil(len(arms) / LEGEND_COLUMNS)

    # Higher with every arm: one row each.
    with plots.figure(folder / "scores", WIDTH, 1.1 + 0.42 * len(arms)) as figure:
        plots.plot_scores(data, figure.subplots())
    with plots.figure(folder / "families", WIDTH, 4 + legend) as figure:
        axes = plots.plot_families(data, figure.subplots())
        add_legend(figure, [axes])
    names = ["scores", "families"]
    curves = validation_curves(runs, order)
    if curves:
        with plots.figure(folder / "along", WIDTH, 3.4 + legend) as figure:
            accuracy_axes, loss_axes = figure.subplots(1, 2)
            plots.plot_validation(curves, accuracy_axes, loss_axes)
            add_legend(figure, [accuracy_axes])
        names.append("along")
    if not stages:
        return names

    with plots.figure(folder / "losses", WIDTH, 3.4 + legend) as figure:
        stage_axes = figure.subplots(1, len(stages), squeeze=False)[0]
        for stage, axes in zip(stages, stage_axes, strict=True):
            curves = loss_curves(runs, stage, order)
            plots.plot_losses(plots.StageLosses(stage, curves), axes)
        add_legend(figure, stage_axes)
    return [*names, "losses"]


def validation_curves(
    runs: list[FinishedRun], order: dict[str, int]
) -> "list[plots.ValidationCurve]":
    """Give what the runs answered along training; none of studies without validation data."""
    from layerfuse.plots import ValidationCurve

    curves = []
    for run in runs:
        points = run.record.along
        if not points:
            continue
        curves.append(
            ValidationCurve(
                arm=run.record.arm,
                index=order[run.record.arm],
                samples=[point.samples for point in points],
                accuracy=[point.accuracy for point in points],
                loss=[point.loss for point in points],
            )
        )
    return curves


def loss_curves(
    runs: list[FinishedRun], stage: str, order: dict[str, int]
) -> "list[plots.LossCurve]":
    """Give the losses of one stage, one curve a run."""
    from layerfuse.plots import LossCurve

    curves = []
    for run in runs:
        arm = run.record.arm
        curves.append(
            LossCurve(
                arm=arm,
                index=order[arm],
                points=run.record.losses.get(stage, []),
            )
        )
    return curves


def add_legend(figure: "Figure", all_axes: "Iterable[Axes]") -> None:
    """Write every label of the axes once, below them."""
    handles = {}
    # By label: the arms are the same on all axes.
    for axes in all_axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles[label] = handle
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=LEGEND_COLUMNS,
    )


def inline(file: Path) -> str:
    """Make an SVG file part of a page.

    Args:
        file: the figure.

    Returns:
        Its element alone, with ids of its own, grey as the page's text, scaling to its box.
    """
    from layerfuse.plots import INK

    name = file.stem
    text = file.read_text("utf-8")
    text = text[text.index("<svg") :]
    # The page decides the colour of text, so that it is legible in light and dark mode.
    text = text.replace(INK, "currentColor")
    # Figures on one page must not share ids.
    for before in ('id="', 'href="#', "url(#"):
        text = text.replace(before, f"{before}{name}-")
    head, body = text.split(">", 1)
    box = head.split('viewBox="')[1].split('"')[0]
    return (
        f'<svg viewBox="{box}" role="img" aria-label="{name}" xmlns="http://www.w3.org/2000/svg" '
        f'xmlns:xlink="http://www.w3.org/1999/xlink">{body}'
    )


def thumbnail(study_dir: Path, image: str | None) -> str | None:
    """Make a small copy of a picture that a page can hold.

    Args:
        study_dir: the study's folder.
        image: the picture's path in it.

    Returns:
        A PNG as a data address, at most 224 pixels; None where there is no file.
    """
    # Pillow and numpy are slow to import, and most pages show no picture.
    from layerfuse.vision.picture import Picture

    # A moved study may have left its pictures behind; the page then says so.
    path = study_dir / (image or "")
    if not path.is_file():
        return None
    # As the model saw it: upright, and transparency over white.
    small = Picture(str(path)).open()
    small.thumbnail((PIXELS, PIXELS))
    stream = io.BytesIO()
    small.save(stream, format="PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def choose(runs: list[FinishedRun]) -> list[Example]:
    """Choose examples by a rule: the first ids, a new picture each.

    Each arm's first run; per family the first question on which arms disagree, then the first
    that all answer rightly and the first that all answer wrongly.

    Args:
        runs: all finished runs.

    Returns:
        At most eight examples; rules that no question fits are left out.
    """
    first_runs: dict[str, FinishedRun] = {}
    for run in reversed(runs):
        # Going backwards, the last run that stands for an arm is its first one.
        first_runs[run.record.arm] = run
    shown_runs = list(first_runs.values())
    shown_runs.reverse()

    # Two cards are left for what all arms get right or wrong.
    families = sorted({answer.family for answer in runs[0].answers})
    rules = []
    for family in families[: PICTURES - 2]:
        rules.append(ExampleRule(f"{family}: arms disagree", family, {0.0, 1.0}))
    rules.append(ExampleRule("all right", None, {1.0}))
    rules.append(ExampleRule("all wrong", None, {0.0}))

    chosen = []
    shown_samples: set[str] = set()
    for rule in rules:
        example = first_example(rule, shown_runs, shown_samples)
        if example is not None:
            chosen.append(example)
            shown_samples.add(example.question.sample)
    return chosen


def first_example(
    rule: ExampleRule, runs: list[FinishedRun], shown_samples: set[str]
) -> Example | None:
    """Find the first question that fits a rule and whose sample is not shown yet."""
    for position, question in enumerate(runs[0].answers):
        if question.sample in shown_samples:
            continue
        if rule.family is not None and question.family != rule.family:
            continue
        answers = [ArmAnswer(run.record.arm, run.answers[position]) for run in runs]
        scores = {each.answer.score for each in answers}
        if scores == rule.scores:
            return Example(rule.why, question, answers)
    return None


def read_recipe(study_dir: Path) -> ReportedRecipe:
    """Read what a report needs of the recipe that lies in a study's folder.

    Args:
        study_dir: the study's folder.

    Returns:
        The part of the recipe that a report uses.

    Raises:
        LayerfuseError: the recipe names no baseline, or a claim in it is not one.
    """
    file = study_dir / "recipe.yaml"
    text = file.read_text(encoding="utf-8")
    # Not checked as a recipe to be run: a report is also made of what older versions wrote.
    content = yaml.safe_load(text)
    if not isinstance(content, dict) or not content.get("baseline"):
        raise LayerfuseError(f"{file} names no baseline; add 'baseline: ARM'")
    arms = []
    # An arm may be written as its bare name.
    for arm in content.get("arms") or []:
        if isinstance(arm, str):
            arms.append(arm)
        elif arm.get("name"):
            arms.append(arm["name"])
    statistics = content.get("statistics") or {}
    # The LLM may be written as its bare name.
    llm_blocks = None
    if isinstance(content.get("llm"), dict):
        llm_blocks = content["llm"].get("blocks")
    looks = None
    if content.get("seeds") == "auto":
        rule = AutoSeeds.model_validate(content.get("auto_seeds") or {})
        looks = PlannedLooks(rule, len(arms))
    return ReportedRecipe(
        text=text,
        title=content.get("name") or study_dir.resolve().name,
        description=content.get("description") or "",
        baseline=content["baseline"],
        arms=arms,
        bootstrap=replace(BOOTSTRAP, **statistics),
        llm_blocks=llm_blocks,
        claims=read_claims(content, file),
        looks=looks,
    )


def read_claims(content: dict[str, Any], file: Path) -> list[Claim]:
    """Read the claims of a recipe.

    Args:
        content: of the recipe's file.
        file: its path, for errors.

    Returns:
        The claims; recipes of older versions have none.

    Raises:
        LayerfuseError: a claim is not one.
    """
    claims = []
    for place, stated in enumerate(content.get("claims") or []):
        try:
            claims.append(Claim.model_validate(stated))
        except ValidationError as error:
            raise LayerfuseError(f"{file}: claims.{place}:\n{problems_of(error)}") from error
    return claims


def waiting_arms(recipe: ReportedRecipe, summary: Summary) -> list[str]:
    """Name the arms of the recipe that have no finished run.

    Args:
        recipe: of the study.
        summary: the numbers of the study.

    Returns:
        Their names; none where an arm has finished that the recipe does not name.
    """
    finished = {arm.arm for arm in summary.arms}
    # Another recipe was written over this one: what it lacks says nothing of what was planned.
    if not finished <= set(recipe.arms):
        return []
    return [name for name in recipe.arms if name not in finished]


def summary_content(summary: Summary, findings: Findings) -> dict[str, Any]:
    """Give what summary.json holds.

    Args:
        summary: the numbers.
        findings: the sentences.

    Returns:
        Plain values: the numbers first, the sentences last.
    """
    content = summary.to_json()
    content["findings"] = asdict(findings)
    return content


def page_template(name: str) -> Template:
    """Load a page's template; all that it is given is escaped.

    Args:
        name: of a file beside this module.

    Returns:
        The template.
    """
    # Strict: a name that the template misspells is an error, not an empty place on the page.
    environment = Environment(
        loader=PackageLoader("layerfuse.study", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    environment.filters["signed"] = signed
    environment.filters["span"] = span
    return environment.get_template(name)


def write_report(study_dir: Path) -> Path:
    """Write summary.json, figures/ and report.html into the study's folder.

    Args:
        study_dir: the study's folder.

    Returns:
        The path of the page.

    Raises:
        LayerfuseError: the recipe names no baseline, or the runs cannot be read or compared.
    """
    study_dir = Path(study_dir)
    recipe = read_recipe(study_dir)
    runs = read_runs(study_dir)
    summary = summarize(
        runs,
        recipe.baseline,
        recipe.bootstrap,
        blind_losses=read_blind_losses(study_dir),
        probes=read_probes(study_dir),
        claims=recipe.claims,
        auto=recipe.looks,
        budgets=read_budgets(study_dir),
    )
    findings = state_findings(summary)
    steps: dict[str, int] = {}
    if summary.budgets is not None:
        said = f"{steps_sentences(summary.budgets)} {order_sentence(summary.budgets)}"
        findings = replace(findings, training=f"{findings.training} {said.rstrip()}")
        if not summary.budgets.same_for_all:
            steps = steps_by_arm([run.record for run in runs])
    if recipe.llm_blocks is not None:
        findings = with_screening(findings, recipe.llm_blocks)

    figures = {}
    for name in draw(summary, runs, study_dir / "figures"):
        figures[name] = inline(study_dir / "figures" / f"{name}.svg")
    cards = []
    for example in choose(runs):
        cards.append(ExampleCard(example, thumbnail(study_dir, example.question.image)))
    # What a folder has lost takes nothing else from its page.
    environment = {}
    environment_file = study_dir / "environment.json"
    if environment_file.is_file():
        environment = json.loads(environment_file.read_text())

    html = page_template("report.html.j2").render(
        s=summary,
        findings=findings,
        data=read_data_summary(study_dir),
        recipe=recipe,
        waiting=waiting_arms(recipe, summary),
        steps=steps,
        one_seed=ONE_SEED,
        environment=environment,
        figures=figures,
        cards=cards,
    )
    # Written last, so that a failure above leaves the earlier numbers and page as they were.
    content = summary_content(summary, findings)
    write_text(study_dir / "summary.json", json.dumps(content, indent=1) + "\n")
    write_text(study_dir / "report.html", html)
    return study_dir / "report.html"
