"""What a study's report needs of the recipe in its folder, of this version or of an older one."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.score_table import Bootstrap
from layerfuse.recipe.evaluate_settings import Claim
from layerfuse.recipe.growing import AutoSeeds
from layerfuse.recipe.reader import problems_of
from layerfuse.study.looks import PlannedLooks
from layerfuse.study.summary import BOOTSTRAP


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
        batch_sizes: samples of a step, of each stage whose recipe says it.
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
    batch_sizes: dict[str, int]


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
        batch_sizes=read_batch_sizes(content),
    )


def read_batch_sizes(content: dict[str, Any]) -> dict[str, int]:
    """Read how many samples a step of each stage has, of the stages whose recipe says it."""
    batch_sizes = {}
    for name, stage in (content.get("stages") or {}).items():
        if stage and "batch_size" in stage:
            batch_sizes[name] = stage["batch_size"]
    return batch_sizes


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
