"""Write the generated pages: the recipe reference, the strategies' pages and their table in the
README, the results tables, the page of claims.

`make docs` runs this; a test fails when a page is not what this would write.
"""

import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from docs import comparisons, house
from docs.claims_page import claims_page
from docs.data_sizes_page import data_sizes_page
from docs.evaluate_page import evaluate_page
from docs.results_pages import results_page
from docs.statistics_page import statistics_page
from layerfuse.fusion import FUSIONS, StrategyConfig
from layerfuse.recipe.arms import Arm, Grid
from layerfuse.recipe.data_source import Data, Scenes
from layerfuse.recipe.evaluate_settings import Claim, Evaluation, Statistics
from layerfuse.recipe.growing import AutoSeeds, AutoSteps
from layerfuse.recipe.model_source import LanguageSource, ModelSource
from layerfuse.recipe.schema import Recipe, Resources
from layerfuse.recipe.stage import Lora, Stage
from layerfuse.vision.selection import SYNTAX

DOCS = Path(__file__).parent
README = DOCS.parent / "README.md"
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
    # Of annotated types the type alone: what follows are parentheses, which hold others.
    shown = re.sub(r"Annotated\[(\w+), \w+\((?:[^()]|\([^()]*\))*\)\]", r"\1", shown)
    shown = re.sub(r"layerfuse\.recipe\.\w+\.", "", shown)
    return "`" + shown.replace("|", "\\|") + "`"


def _table(fields: dict[str, Any], texts: Mapping[str, str | None]) -> list[str]:
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


def pages() -> dict[Path, str]:
    """Every generated page and what it must hold."""
    text_by_path = {DOCS / "recipe-reference.md": recipe_reference()}
    text_by_path[README] = readme(README.read_text("utf-8"))
    text_by_path[DOCS / "images" / "house.svg"] = house.draw()
    text_by_path[DOCS / "strategies" / "README.md"] = strategy_index()
    for name in FUSIONS:
        text_by_path[DOCS / "strategies" / f"{name}.md"] = strategy_page(name)
    text_by_path[DOCS / "statistics.md"] = statistics_page()
    text_by_path[DOCS / "evaluate.md"] = evaluate_page()
    summaries = {}
    for file in sorted((DOCS.parent / "results").glob("*/summary.json")):
        name = file.parent.name
        text_by_path[DOCS / f"results-{name}.md"] = results_page(name)
        summaries[name] = json.loads(file.read_text("utf-8"))
    text_by_path[DOCS / "claims.md"] = claims_page(summaries)
    text_by_path[DOCS / "results-conditioning.md"] = comparisons.conditioning_page()
    text_by_path[DOCS / "results-scenes-data-sizes.md"] = data_sizes_page()
    if comparisons.measured(comparisons.DEPTHS):
        text_by_path[DOCS / "results-scenes-blocks.md"] = comparisons.blocks_page()
    return text_by_path


if __name__ == "__main__":
    for path, text in pages().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(DOCS.parent))
