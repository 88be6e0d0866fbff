"""The page of claims: what the papers say, and what the committed studies say of it."""

from pathlib import Path
from typing import Any

from docs.data_sizes_page import data_size_claims
from docs.layer_sets import spread_table, stability_claims
from docs.results_pages import TWO_TRIES, UNFINISHED, claim_difference, claims_of, table_row
from layerfuse.evaluate.learning_status import ArmLearning
from layerfuse.evaluate.significance import seed_noise
from layerfuse.recipe.reader import load_recipe

RECIPES = Path(__file__).parent.parent / "recipes"
# What a guided arm's difference to itself with its mean weights says of the claim on guidance.
GUIDANCE_VERDICTS = {"better": "holds", "worse": "the opposite", "tie": "not resolved"}
SECOND_TRY = 0.02
"""what the second try of guided answers in `TWO_TRIES` may have been worth, as a share of them"""
GUIDANCE_SOURCE = "2501.08443, abstract; its weights against their own mean"
GUIDANCE_LIMITS = "About these trained models, over pictures alone; the mean is of their weights."
CLAIMS_INTRO = """# What the papers claim, and what these studies say

Comparisons that the papers make, written into recipes (`claims` of the [recipe
reference](recipe-reference.md)) before their arms were trained, and judged by [the statistics of
every study](statistics.md): intervals are of one difference by itself, verdicts are corrected for
all claims of a study, so that an interval may leave out 0 where nothing is resolved. Not all were
written in ignorance: those of real-long, scenes-long and the standardised studies when shorter or
whitened studies of the same pictures were known, and real was run a second time, after `group_mean`
and guided training had been mended. Claims on guidance, on stability over sets of layers and on the
amount of data stand in no recipe. Made by `make docs` from results/.

The studies behind this page are small on purpose: the vision encoder is DINOv2-S (12 layers, 22
million parameters, trained without text), the LLM is SmolLM2-135M, mostly cut to its first two
blocks (each recipe says how many), the pictures are drawn scenes and real ones of a few kinds, and
training takes minutes on a CPU. A verdict here says whether an effect shows up in such models. It
does not say whether it does in models of 7B parameters with CLIP, whose layers hold other things,
whose LLM can make more of them, and which train on a thousand times the data: where a claim does
not hold here, the paper may still be right about its models.
"""


def claims_page(summaries: dict[str, dict[str, Any]]) -> str:
    """All claims with their verdicts, and those that are not measured yet.

    Args:
        summaries: of the committed studies, by name.
    """
    lines = [CLAIMS_INTRO, "## Verdicts", ""]
    rows = []
    spreads = []
    for name, summary in summaries.items():
        study = f"[{name}](results-{name}.md)"
        for claim in claims_of(summary):
            cells = [claim.claim, claim.source, study, claim.in_words, claim_difference(claim)]
            rows.append(table_row([*cells, claim.limits]))
        rows += guidance_claims(summary, study, two_tries=name in TWO_TRIES)
        rows += stability_claims(summary, study)
        if claims_of(summary):
            spreads += spread_rows(summary, study)
    if summaries:
        rows += data_size_claims()
    if rows:
        head = ["claim", "source", "study", "verdict", "difference (95 % interval)", "limits"]
        lines += ["| " + " | ".join(head) + " |", "|---" * 6 + "|", *rows, ""]
    else:
        lines += ["No study with claims has been measured yet.", ""]
    if spreads:
        lines += [
            "## Spread between seeds",
            "",
            "Standard deviation between the seeds of an arm, in points, pooled over the arms of a",
            "kind.",
            "",
            "| study | kind | arms | standard deviation | degrees of freedom |",
            "|---" * 5 + "|",
            *spreads,
            "",
        ]
    studies = {f"[{name}](results-{name}.md)": summary for name, summary in summaries.items()}
    lines += spread_table(studies)
    return "\n".join(lines + unmeasured_claims(summaries))


def guidance_claims(summary: dict[str, Any], study: str, *, two_tries: bool) -> list[str]:
    """The rows of arms guided by the instruction, beside themselves with their mean weights.

    Args:
        summary: of a study.
        study: a link to its page.
        two_tries: whether guided answers were read in two ways there and the controls' in one.
    """
    strategies = {arm["arm"]: arm["fusion"]["name"] for arm in summary["arms"]}
    rows = []
    for row in summary.get("guidance", []):
        if row["control"] != "mean" or strategies[row["arm"]] != "instruction_weighted":
            continue
        verdict = GUIDANCE_VERDICTS[row["difference"]["verdict"]]
        learning = ArmLearning.from_json(summary["learning"][row["arm"]])
        unfinished = summary["findings"]["headline"].startswith(UNFINISHED)
        if unfinished and not learning.settled and verdict != "not resolved":
            verdict = f"not trained long enough: {learning.text}"
        low, high = row["difference"]["interval"]
        is_small = abs(row["difference"]["difference"]) < SECOND_TRY
        if two_tries and is_small and verdict in ("holds", "the opposite"):
            verdict = "no verdict: within what a second try is worth"
        difference = f"{row['difference']['difference']:+.3f} ({low:+.3f} to {high:+.3f})"
        claim = f"Guided by its instruction, {row['arm']} beats its own mean weights."
        cells = [claim, GUIDANCE_SOURCE, study, verdict, difference, GUIDANCE_LIMITS]
        rows.append(table_row(cells))
    return rows


def spread_rows(summary: dict[str, Any], study: str) -> list[str]:
    """The noise between seeds, pooled over the arms of each kind of strategy."""
    by_kind: dict[str, dict[str, list[float]]] = {}
    for arm in summary["arms"]:
        by_kind.setdefault(arm["kind"], {})[arm["arm"]] = arm["seed_means"]
    rows = []
    for kind in sorted(by_kind):
        noise = seed_noise(by_kind[kind])
        if noise is not None:
            cells = [study, kind, str(len(by_kind[kind])), f"{100 * noise.sd:.1f}", str(noise.df)]
            rows.append(table_row(cells))
    return rows


def unmeasured_claims(summaries: dict[str, dict[str, Any]]) -> list[str]:
    """The claims of recipes of which no results with claims are committed."""
    rows = []
    for file in sorted(RECIPES.glob("*.yaml")):
        recipe = load_recipe(file)
        if recipe.name in summaries and claims_of(summaries[recipe.name]):
            continue
        link = f"[{file.name}](../recipes/{file.name})"
        for claim in recipe.claims:
            about = ", ".join(claim.families or claim.categories or ["all"])
            rows.append(table_row([claim.claim, claim.source, link, about, claim.limits]))
    if not rows:
        return []
    return [
        "## Stated, not measured yet",
        "",
        "| claim | source | recipe | questions | limits |",
        "|---" * 5 + "|",
        *rows,
        "",
    ]
