"""The report of a study: summary.json, figures and one page that needs nothing else."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from layerfuse.evaluate.records import read_runs
from layerfuse.files import write_text
from layerfuse.pages.inlined_svg import inline
from layerfuse.pages.template import page_template
from layerfuse.study.budgets import order_sentence, read_budgets, steps_by_arm, steps_sentences
from layerfuse.study.certainty import covered_by_intervals, how_sure
from layerfuse.study.data_summary import read_data_summary
from layerfuse.study.depth_figure import scored_record
from layerfuse.study.findings import ONE_SEED, Findings, state_findings, with_screening
from layerfuse.study.report_examples import GROUPS, ExampleCard, choose, thumbnail
from layerfuse.study.report_figures import alt_text, arms_with_negative_losses, draw
from layerfuse.study.reported_recipe import ReportedRecipe, read_recipe
from layerfuse.study.summary import Summary, summarize
from layerfuse.study.training_status import read_blind_losses, read_probes


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
    records = [scored_record(run) for run in runs]
    content = summary_content(summary, findings)
    for name in draw(content, records, study_dir / "figures", recipe.batch_sizes):
        file = study_dir / "figures" / f"{name}.svg"
        figures[name] = inline(file, alt_text(name, summary))
    cards = []
    # Heads of columns lead to the example of their group.
    example_of: dict[str, str] = {}
    for number, example in enumerate(choose(runs, summary.shown_by), start=1):
        picture = thumbnail(study_dir, example.question.image)
        card = ExampleCard(f"example-{number}", example, picture)
        cards.append(card)
        if example.group is not None:
            example_of[example.group] = card.id
    # What a folder has lost takes nothing else from its page.
    environment = {}
    environment_file = study_dir / "environment.json"
    if environment_file.is_file():
        environment = json.loads(environment_file.read_text())

    html = page_template("layerfuse.study", "report.html.j2").render(
        s=summary,
        findings=findings,
        certainty=how_sure(summary),
        covered=covered_by_intervals(summary),
        data=read_data_summary(study_dir),
        recipe=recipe,
        waiting=waiting_arms(recipe, summary),
        steps=steps,
        one_seed=ONE_SEED,
        environment=environment,
        figures=figures,
        cards=cards,
        example_of=example_of,
        negative_losses=arms_with_negative_losses(runs),
        most_groups=GROUPS,
    )
    # Written last, so that a failure above leaves the earlier numbers and page as they were.
    write_text(study_dir / "summary.json", json.dumps(content, indent=1) + "\n")
    write_text(study_dir / "report.html", html)
    return study_dir / "report.html"
