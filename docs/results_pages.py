"""The pages of finished studies, made of their committed summaries."""

import json
from pathlib import Path
from typing import Any

from layerfuse.evaluate.claims import JudgedClaim, with_unsettled
from layerfuse.evaluate.learning_status import ArmLearning

RESULTS = Path(__file__).parent.parent / "results"
PREDICTION = (
    "Spearman's rank correlation of each criterion, read off the frozen encoder, with the mean "
    "accuracy after training, over the families that were trained and probed, with the 95 % "
    "interval of Bonett and Wright. Criteria of single layers are averaged over a selection. Where "
    "several arms read the same layers, the first stands for them."
)
UNFINISHED = "Not trained long enough to say"
SPEED_ONLY = (
    "The arms had not learned what they could: this is about which of them learns faster in so "
    "many steps, not about what their layers hold."
)
# Studies whose answers were read in two ways where they were guided, and in one for the controls.
TWO_TRIES = ("scenes-strategies", "scenes-standardized")
SECOND_TRY = [
    "In this study the guided answers had two tries (right if forced, else generated) and those of",
    "the controls one. In bfloat16 the second try was worth 0.9 points to a model that was trained",
    "a little, and nothing to one that was trained to its end: differences of up to a point or two",
    "are no evidence. Later versions read all answers alike.",
    "",
]
# What a verdict is called in a table, where that differs.
VERDICTS = {"unjudged": "none: one seed"}


def results_page(name: str) -> str:
    """A finished study's table, from its committed summary."""
    summary = json.loads((RESULTS / name / "summary.json").read_text("utf-8"))
    # Summaries of older versions show families.
    shown_by = summary.get("shown_by", "families")
    groups = list(summary["chance"][shown_by])
    lines = [f"# Results: {name}", "", summary["findings"]["headline"], ""]
    sentences = ("training", "learning", "layers", "seeds")
    lines += [summary["findings"][key] + "\n" for key in sentences]
    head = ["arm", "mean (95 % interval)", "difference", "verdict", "training", *groups]
    lines += ["| " + " | ".join(head) + " |"]
    lines += ["|---" * (5 + len(groups)) + "|"]
    for arm in summary["arms"]:
        low, high = arm["mean"]["interval"]
        cells = [
            arm["arm"].replace("|", "\\|"),
            f"{arm['mean']['score']:.3f} ({low:.3f} to {high:.3f})",
        ]
        versus = arm["versus_baseline"]
        if versus:
            low, high = versus["interval"]
            verdict = VERDICTS.get(versus["verdict"], versus["verdict"])
            cells += [f"{versus['difference']:+.3f} ({low:+.3f} to {high:+.3f})", verdict]
        else:
            cells += ["", "baseline"]
        cells.append(ArmLearning.from_json(summary["learning"][arm["arm"]]).text)
        cells += [f"{arm[shown_by][group]['score']:.2f}" for group in groups]
        lines.append("| " + " | ".join(cells) + " |")
    chance = [f"{summary['chance'][shown_by][group]:.2f}" for group in groups]
    mean = f"{summary['chance']['mean']:.3f}"
    lines.append("| " + " | ".join(["chance", mean, "", "", "", *chance]) + " |")
    lines += [
        "",
        f"{summary['runs']} runs, {summary['items']} questions about {summary['images']} pictures. "
        "Differences are to the baseline. Intervals hold the noise of the pictures and of the "
        "seeds (of the pictures alone where an arm has one seed); verdicts are corrected for "
        "several comparisons, as [the statistics page](statistics.md) says. Training says whether "
        "the arm had learned what it could when it stopped: [how far training "
        "went](training-length.md).",
        *picture_noise_note(summary),
        *categories_table(summary),
        *claims_section(summary),
        *guidance_table(summary.get("guidance", []), two_tries=name in TWO_TRIES),
        *prediction_table(
            RESULTS / name / "recommend.json",
            summary["findings"]["headline"].startswith(UNFINISHED),
        ),
        "",
        f"Raw numbers: [results/{name}](../results/{name}). Recipe: "
        f"[recipes/{name}.yaml](../recipes/{name}.yaml).",
        "",
    ]
    return "\n".join(lines)


def categories_table(summary: dict[str, Any]) -> list[str]:
    """The arms over categories of questions, where a study shows these in the place of families."""
    if summary.get("shown_by") != "categories":
        return []
    lines = [
        "",
        "## Over categories",
        "",
        f"The mean above is over {len(summary['families'])} families, of which one with few "
        "questions counts as much as one with many. Over the "
        f"{len(summary['chance']['categories'])} categories, each counting the same (verdicts are "
        "corrected for all arms, but not for there being two means):",
        "",
        "| arm | mean of categories (95 % interval) | difference | verdict |",
        "|---" * 4 + "|",
    ]
    arms = sorted(summary["arms"], key=lambda arm: -arm["over_categories"]["mean"]["score"])
    for arm in arms:
        mean = arm["over_categories"]["mean"]
        low, high = mean["interval"]
        cells = [arm["arm"], f"{mean['score']:.3f} ({low:.3f} to {high:.3f})", "", "baseline"]
        versus = arm["over_categories"]["versus_baseline"]
        if versus:
            low, high = versus["interval"]
            cells[2] = f"{versus['difference']:+.3f} ({low:+.3f} to {high:+.3f})"
            cells[3] = VERDICTS.get(versus["verdict"], versus["verdict"])
        lines.append(table_row(cells))
    return lines


def picture_noise_note(summary: dict[str, Any]) -> list[str]:
    """Say where the noise of the pictures comes from, if not from the answers themselves."""
    if not summary.get("pictures_read_off_intervals"):
        return []
    return [
        "",
        "The answers of this study are no longer at hand: its statements are made of the scores of "
        "all runs and of the intervals over pictures that its first report had.",
    ]


def claims_section(summary: dict[str, Any]) -> list[str]:
    """The claims that a study's recipe states, with their verdicts, if there are any."""
    claims = claims_of(summary)
    if not claims:
        return []
    lines = [
        "",
        "## Claims",
        "",
        "What the recipe stated before anything was trained ([all claims](claims.md)).",
        "",
        "| claim | source | verdict | difference (95 % interval) | questions | limits |",
        "|---" * 6 + "|",
    ]
    for claim in claims:
        cells = [claim.claim, claim.source, claim.in_words]
        lines.append(table_row([*cells, claim_difference(claim), claim.about, claim.limits]))
    return lines


def claims_of(summary: dict[str, Any]) -> list[JudgedClaim]:
    """The claims of a summary; recipes without any and older summaries have none.

    Those about arms that had not learned what they could have no verdict, also in summaries of
    versions that left it to them.
    """
    unsettled: list[str] = []
    for arm, learning in summary.get("learning", {}).items():
        if not ArmLearning.from_json(learning).settled:
            unsettled.append(arm)
    rows = [JudgedClaim.from_json(row) for row in summary.get("claims", [])]
    return [with_unsettled(row, unsettled) for row in rows]


def verdict_in_words(*, holds: bool, opposite: bool, unsettled: int, arms: int) -> str:
    """The verdict on a claim that stands in no recipe.

    Args:
        holds: whether its interval says so.
        opposite: whether it says the opposite.
        unsettled: how many of its arms had not learned what they could.
        arms: their number.
    """
    if unsettled:
        return f"not trained long enough: {unsettled} of its {arms} arms"
    if holds:
        return "holds"
    return "the opposite" if opposite else "not resolved"


def claim_difference(claim: JudgedClaim) -> str:
    """The difference of a claim with its interval, and to which arm it is; empty without one."""
    if claim.difference is None or claim.interval is None:
        return ""
    low, high = claim.interval
    text = f"{claim.difference:+.3f} ({low:+.3f} to {high:+.3f})"
    if claim.strongest is not None:
        text += f" to {claim.strongest}"
    return text


def table_row(cells: list[str]) -> str:
    """A row of a table; cells may hold the sign that divides them."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def guidance_table(rows: list[dict[str, Any]], *, two_tries: bool = False) -> list[str]:
    """Guided arms against themselves with the guidance taken away, if the study has any.

    Args:
        rows: of the summary.
        two_tries: whether the guided answers were read in two ways and the controls' in one.
    """
    if not rows:
        return []
    lines = [
        "",
        "## Does the guidance matter?",
        "",
        "The same trained models, asked the same questions: guided by the instruction of another",
        "question (shuffled), or with the weights fixed at their mean over the test (mean). The",
        "spread is the standard deviation of a layer's weight over questions.",
        "",
        *(SECOND_TRY if two_tries else []),
        "| arm | control | guided | control's score | difference | verdict | spread |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        d = row["difference"]
        low, high = d["interval"]
        cells = [row["arm"], row["control"], f"{row['guided']['score']:.3f}"]
        cells += [f"{row['controlled']['score']:.3f}"]
        cells += [f"{d['difference']:+.3f} ({low:+.3f} to {high:+.3f})", d["verdict"]]
        lines.append(table_row([*cells, f"{row['spread']:.4f}"]))
    return lines


def prediction_table(file: Path, unfinished: bool) -> list[str]:
    """How well the cheap criteria ranked the arms, if the study was made to ask that.

    Args:
        file: the recommendation with its validation; may be missing.
        unfinished: whether the arms had not learned what they could.
    """
    if not file.exists():
        return []
    validation = json.loads(file.read_text("utf-8"))["validation"]
    names = list(validation["correlations"]["selections"])
    cells = validation["correlations"]["selections"]
    sure = [name for name, cell in cells.items() if cell and cell["interval"][0] > 0]
    wrong = [name for name, cell in cells.items() if cell and cell["interval"][1] < 0]
    rest = [name for name in cells if name not in sure + wrong]
    verdict = f"**Predict beyond chance: {', '.join(sure) or 'none'}.** "
    verdict += f"Not measurably: {', '.join(rest) or 'none'}."
    verdict += f" The wrong way round: {', '.join(wrong)}." if wrong else ""
    lines = ["", "## Do cheap criteria predict?", "", verdict, ""]
    if unfinished:
        lines += [SPEED_ONLY, ""]
    lines += [PREDICTION, ""]
    scopes = {s: cells for s, cells in validation["correlations"].items() if cells[names[0]]}
    counts = [f"{scope} ({cells[names[0]]['n']})" for scope, cells in scopes.items()]
    lines += ["| criterion | " + " | ".join(counts) + " |", "|---" * (1 + len(counts)) + "|"]
    for name in names:
        cells = [_correlation(cells[name]) for cells in scopes.values()]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    within = [f"{x} {_correlation(cell)}" for x, cell in validation["within_families"].items()]
    lines += ["", "Probes on mean tokens against training, one family at a time: "]
    lines[-1] += "; ".join(within) + "."
    lines += ["", f"One seed of the study with another: {validation['between_seeds']:+.2f}.", ""]
    lines += [
        "| layers | trained | probes | probes, grid | entropy | dimension |",
        "|---" * 6 + "|",
    ]
    for row in sorted(validation["selections"], key=lambda row: -row["trained"]):
        keys = ("trained", "probes, mean tokens", "probes, grid", "matrix entropy")
        numbers = [f"{row[key]:.3f}" for key in keys] + [f"{row['intrinsic dimension']:.1f}"]
        lines.append("| " + " | ".join(["+".join(map(str, row["layers"])), *numbers]) + " |")
    return lines


def _correlation(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "undefined"
    low, high = cell["interval"]
    return f"{cell['rho']:+.2f} ({low:+.2f} to {high:+.2f})"
