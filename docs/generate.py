"""Write the generated pages: the recipe reference, the strategies' pages and their table in the
README, the results tables, the page of claims.

`make docs` runs this; a test fails when a page is not what this would write.
"""

import inspect
import json
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from docs import comparisons, house
from layerfuse.evaluate.claims import JudgedClaim
from layerfuse.evaluate.learning_status import ArmLearning
from layerfuse.evaluate.significance import seed_noise
from layerfuse.fusion import FUSIONS, StrategyConfig
from layerfuse.recipe.arms import Arm, Grid
from layerfuse.recipe.data_source import Data, Scenes
from layerfuse.recipe.evaluate_settings import Claim, Evaluation, Statistics
from layerfuse.recipe.growing import AutoSeeds, AutoSteps
from layerfuse.recipe.model_source import LanguageSource, ModelSource
from layerfuse.recipe.reader import load_recipe
from layerfuse.recipe.schema import Recipe, Resources
from layerfuse.recipe.stage import Lora, Stage
from layerfuse.vision.selection import SYNTAX

DOCS = Path(__file__).parent
README = DOCS.parent / "README.md"
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
SIMULATION = "statistics-simulation.json"
SEEDS_SIMULATION = "sequential-seeds-simulation.json"
# What a verdict is called in a table, where that differs.
VERDICTS = {"unjudged": "none: one seed"}
# What a guided arm's difference to itself with its mean weights says of the claim on guidance.
GUIDANCE_VERDICTS = {"better": "holds", "worse": "the opposite", "tie": "not resolved"}
GUIDANCE_SOURCE = "2501.08443, abstract; its weights against their own mean"
GUIDANCE_LIMITS = "About these trained models, over pictures alone; the mean is of their weights."
CLAIMS_INTRO = """# What the papers claim, and what these studies say

Comparisons that the papers make, written into recipes before any arm was trained (`claims` of the
[recipe reference](recipe-reference.md)) and judged by [the statistics of every
study](statistics.md). Made by `make docs` from results/.

The studies behind this page are small on purpose: the vision encoder is DINOv2-S (12 layers, 22
million parameters, trained without text), the LLM is SmolLM2-135M, mostly cut to its first two
blocks (each recipe says how many), the pictures are drawn scenes and real ones of a few kinds, and
training takes minutes on a CPU. A verdict here says whether an effect shows up in such models. It
does not say whether it does in models of 7B parameters with CLIP, whose layers hold other things,
whose LLM can make more of them, and which train on a thousand times the data: where a claim does
not hold here, the paper may still be right about its models.
"""
TABLE_BEGINS = "<!-- the table of strategies, made by `make docs` -->"
TABLE_ENDS = "<!-- the end of the table -->"
# From what every LLM does to what reaches into it.
KINDS = ("baseline", "external direct", "external modular", "external guided")
KINDS += ("internal direct", "internal modular")
MODELS: tuple[type[BaseModel], ...] = (
    Recipe,
    ModelSource,
    LanguageSource,
    Data,
    Scenes,
    Arm,
    Grid,
    Claim,
    Stage,
    Lora,
    Evaluation,
    AutoSeeds,
    AutoSteps,
    Statistics,
    Resources,
)


def _text(text: str | None) -> str:
    return " ".join((text or "").split())


def _default(field: Any) -> str:
    if field.default is PydanticUndefined and field.default_factory is None:
        return "required"
    value = field.default_factory() if field.default_factory else field.default
    if isinstance(value, BaseModel):
        return "see below"
    return "none" if value is None else f"`{json.dumps(value)}`"


def _type(field: Any) -> str:
    shown = inspect.formatannotation(field.annotation).replace("typing.", "")
    shown = re.sub(r"Annotated\[([^,]+), [^()]*\([^()]*\)\]", r"\1", shown)
    shown = re.sub(r"layerfuse\.recipe\.\w+\.", "", shown)
    return "`" + shown.replace("|", "\\|") + "`"


def _table(fields: dict[str, Any], texts: dict[str, str]) -> list[str]:
    rows = ["| key | type | default | |", "|---|---|---|---|"]
    for name, field in fields.items():
        cells = (f"`{name}`", _type(field), _default(field), _text(texts[name]))
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def descriptions(config: type[StrategyConfig]) -> dict[str, str]:
    """{option: its description}, own and inherited, as written where each is declared."""
    return {
        name: field.description or ""
        for base in reversed(config.__mro__)
        for name, field in vars(base).get("__pydantic_fields__", {}).items()
        if field.description
    }


def recipe_reference() -> str:
    """Every key of a recipe, from the models that validate it."""
    lines = [
        "# Recipe reference",
        "",
        "A recipe is a YAML file. `extends: base.yaml` takes what is not set from another recipe;",
        "on the command line, `key.sub=value` changes a key (lists by position:",
        "`arms.0.layers=[3]`). Unknown keys are errors. Made from the code by `make docs`.",
    ]
    for model in MODELS:
        fields = model.model_fields
        texts = {key: field.description for key, field in fields.items()}
        lines += ["", f"## {model.__name__}", "", _text(model.__doc__), "", *_table(fields, texts)]
    return "\n".join([*lines, "", "## Layer selections", "", "```", SYNTAX, "```", ""])


def strategy_page(name: str) -> str:
    """One strategy: its module's docstring and its options."""
    config, module = FUSIONS[name]
    text = inspect.getdoc(inspect.getmodule(module)) or ""
    fields: dict[str, Any] = config.__pydantic_fields__  # type: ignore[attr-defined]
    head, _, body = text.partition("\n\n")
    lines = [f"# {name}", "", f"*{module.kind}* · {module.paper}", "", head, "", body, ""]
    lines += ["## Options", "", *_table(fields, descriptions(config)), ""]
    return "\n".join(lines)


def strategy_index() -> str:
    """The catalogue."""
    lines = ["# Fusion strategies", "", "| name | kind | published as |", "|---|---|---|"]
    for name in FUSIONS:
        module = FUSIONS[name][1]
        lines.append(f"| [`{name}`]({name}.md) | {module.kind} | {module.paper} |")
    return "\n".join([*lines, ""])


def readme(text: str) -> str:
    """The README with a fresh table of strategies between its markers.

    Args:
        text: the README as it is.

    Raises:
        ValueError: if a marker is missing.
    """
    before = text.index(TABLE_BEGINS) + len(TABLE_BEGINS)
    after = text.index(TABLE_ENDS)
    return text[:before] + "\n" + "\n".join(readme_table()) + "\n" + text[after:]


def readme_table() -> list[str]:
    """The README's table of strategies: by kind, then by name."""
    rows_of_kinds: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for name in sorted(FUSIONS):
        _, module = FUSIONS[name]
        cells = [f"`{name}`", module.kind, module.summary, module.paper]
        # A kind that is new here comes last.
        rows = rows_of_kinds.setdefault(module.kind, [])
        rows.append("| " + " | ".join(cells) + " |")
    table = ["| name | kind | what | published as |", "|---|---|---|---|"]
    for rows in rows_of_kinds.values():
        table.extend(rows)
    return table


def results_page(name: str) -> str:
    """A finished study's table, from its committed summary."""
    summary = json.loads((DOCS.parent / "results" / name / "summary.json").read_text("utf-8"))
    families = summary["families"]
    lines = [f"# Results: {name}", "", summary["findings"]["headline"], ""]
    sentences = ("training", "learning", "layers", "seeds")
    lines += [summary["findings"][key] + "\n" for key in sentences]
    head = ["arm", "mean (95 % interval)", "difference", "verdict", "training", *families]
    lines += ["| " + " | ".join(head) + " |"]
    lines += ["|---" * (5 + len(families)) + "|"]
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
        cells += [f"{arm['families'][family]['score']:.2f}" for family in families]
        lines.append("| " + " | ".join(cells) + " |")
    chance = [f"{summary['chance']['families'][family]:.2f}" for family in families]
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
        *claims_section(summary),
        *guidance_table(summary.get("guidance", [])),
        *prediction_table(
            DOCS.parent / "results" / name / "recommend.json",
            summary["findings"]["headline"].startswith(UNFINISHED),
        ),
        "",
        f"Raw numbers: [results/{name}](../results/{name}). Recipe: "
        f"[recipes/{name}.yaml](../recipes/{name}.yaml).",
        "",
    ]
    return "\n".join(lines)


def picture_noise_note(summary: dict[str, Any]) -> list[str]:
    """Say where the noise of the pictures comes from, if not from the answers themselves."""
    if not summary.get("pictures_read_off_intervals"):
        return []
    return [
        "",
        "The answers of this study are no longer at hand: its statements are made of the scores of "
        "all runs and of the intervals over pictures that its first report had.",
    ]


def statistics_page() -> str:
    """The method of all statements, and how it did in simulated studies."""
    results = json.loads((DOCS.parent / "results" / SIMULATION).read_text("utf-8"))
    text = (DOCS / "templates" / "statistics.md").read_text("utf-8")
    lines = [
        f"Each row: {results['studies']:,} studies of equal arms on {results['pictures']}",
        "pictures, of which the first arm is the baseline. Covered: the share of 95 % intervals",
        "that hold the truth. Any verdict: studies with a false one. Left out: studies in which an",
        "equal arm is called separable from the first. Found: an arm raised by",
        f"{results['gain']:.0f} points is judged better. All in per cent.",
        "",
        "| scenario | arms | seeds | differences covered | means covered | any verdict | left out "
        "| found |",
        "|---" * 8 + "|",
    ]
    shares = ("difference_covered", "mean_covered", "any_verdict", "left_out", "power")
    for cell in results["cells"]:
        cells = [cell["scenario"], str(cell["arms"]), str(cell["seeds"])]
        cells += [f"{100 * cell[share]:.1f}" for share in shares]
        lines.append("| " + " | ".join(cells) + " |")
    return text.rstrip() + "\n\n" + "\n".join(lines) + "\n\n" + added_seeds_section()


def added_seeds_section() -> str:
    """How studies with `seeds: auto` did where the truth is known."""
    results = json.loads((DOCS.parent / "results" / SEEDS_SIMULATION).read_text("utf-8"))
    cells = results["cells"]
    # The last scenario is named apart: no width of intervals helps there.
    last = cells[-1]["scenario"]
    held = [cell for cell in cells if cell["scenario"] != last]
    failed = [cell for cell in cells if cell["scenario"] == last]
    covered = [min(cell["difference_covered"], cell["mean_covered"]) for cell in held]
    lost = max(cell["power_most"] - cell["power_one"] for cell in held)
    text = (DOCS / "templates" / "added-seeds.md").read_text("utf-8")
    return text.format(
        studies=f"{results['studies']:,}",
        first=results["first"],
        maximum=results["maximum"],
        margin=f"{100 * results['difference']:.0f}",
        gain=f"{results['gain']:.0f}",
        most_verdicts=f"{100 * max(cell['any_verdict'] for cell in held):.1f}",
        most_at_any_look=f"{100 * max(cell['any_look'] for cell in held):.1f}",
        least_covered=f"{100 * min(covered):.1f}",
        worst=f"{100 * max(cell['any_verdict'] for cell in failed):.0f}",
        lost=f"{100 * lost:.1f}",
        cells="\n".join(added_seeds_table(results)),
        methods="\n".join(spending_table(results["methods"])),
    )


def added_seeds_table(results: dict[str, Any]) -> list[str]:
    """One row a scenario and number of arms."""
    lines = [
        "| scenario | arms | any verdict | differences covered | means covered | equal: seeds "
        "| equal: resolved | one raised: seeds | found "
        f"| found, {results['first']} seeds | found, {results['maximum']} seeds "
        "| all raised: seeds | found |",
        "|---" * 13 + "|",
    ]
    columns = ("any_verdict", "difference_covered", "mean_covered", "seeds_equal")
    columns += ("resolved_equal", "seeds_one", "power_one", "power_first", "power_most")
    columns += ("seeds_all", "power_all")
    for cell in results["cells"]:
        cells = [cell["scenario"], str(cell["arms"])]
        for column in columns:
            if column.startswith("seeds"):
                cells.append(f"{cell[column]:.1f}")
            else:
                cells.append(f"{100 * cell[column]:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def spending_table(methods: list[dict[str, Any]]) -> list[str]:
    """One row a way to spend the error over the looks."""
    lines = [
        "| error | any verdict, % | at any look, % | differences covered, % | found, % | seeds |",
        "|---" * 6 + "|",
    ]
    for method in methods:
        cells = [method["method"]]
        for share in ("most_verdicts", "most_at_any_look", "least_covered", "power"):
            cells.append(f"{100 * method[share]:.1f}")
        cells.append(f"{method['seeds']:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


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
    """The claims of a summary; recipes without any and older summaries have none."""
    return [JudgedClaim.from_json(row) for row in summary.get("claims", [])]


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
        rows += guidance_claims(summary, study)
        if claims_of(summary):
            spreads += spread_rows(summary, study)
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
            "kind. Which kind is the most stable is not tested.",
            "",
            "| study | kind | arms | standard deviation | degrees of freedom |",
            "|---" * 5 + "|",
            *spreads,
            "",
        ]
    return "\n".join(lines + unmeasured_claims(summaries))


def guidance_claims(summary: dict[str, Any], study: str) -> list[str]:
    """The rows of arms guided by the instruction, beside themselves with their mean weights."""
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
    for file in sorted((DOCS.parent / "recipes").glob("*.yaml")):
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


def guidance_table(rows: list[dict[str, Any]]) -> list[str]:
    """Guided arms against themselves with the guidance taken away, if the study has any."""
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
        "| arm | control | guided | control's score | difference | verdict | spread |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        d = row["difference"]
        low, high = d["interval"]
        cells = [row["arm"], row["control"], f"{row['guided']['score']:.3f}"]
        cells += [f"{row['controlled']['score']:.3f}"]
        cells += [f"{d['difference']:+.3f} ({low:+.3f} to {high:+.3f})", d["verdict"]]
        lines.append("| " + " | ".join([*cells, f"{row['spread']:.4f}"]) + " |")
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


def pages() -> dict[Path, str]:
    """Every generated page and what it must hold."""
    text_by_path = {DOCS / "recipe-reference.md": recipe_reference()}
    text_by_path[README] = readme(README.read_text("utf-8"))
    text_by_path[DOCS / "images" / "house.svg"] = house.draw()
    text_by_path[DOCS / "strategies" / "README.md"] = strategy_index()
    for name in FUSIONS:
        text_by_path[DOCS / "strategies" / f"{name}.md"] = strategy_page(name)
    text_by_path[DOCS / "statistics.md"] = statistics_page()
    summaries = {}
    for file in sorted((DOCS.parent / "results").glob("*/summary.json")):
        name = file.parent.name
        text_by_path[DOCS / f"results-{name}.md"] = results_page(name)
        summaries[name] = json.loads(file.read_text("utf-8"))
    text_by_path[DOCS / "claims.md"] = claims_page(summaries)
    text_by_path[DOCS / "results-conditioning.md"] = comparisons.conditioning_page()
    if comparisons.measured(comparisons.DEPTHS):
        text_by_path[DOCS / "results-scenes-blocks.md"] = comparisons.blocks_page()
    return text_by_path


if __name__ == "__main__":
    for path, text in pages().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(DOCS.parent))
