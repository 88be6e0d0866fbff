"""Published rows: what papers report of their models, to stand beside measured ones."""

from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, ValidationError

from layerfuse.errors import LayerfuseError
from layerfuse.recipe.reader import problems_of
from layerfuse.recipe.strict import Strict

PUBLISHED = Path(__file__).parent / "published_files"

Evidence = Literal["code", "figure", "abstract", "secondary", "calculated", "inferred"]
"""How a number is known: from the released code or its README, read off a figure or a table's
picture there, from the paper's abstract page, from others' notes about the paper (a hint, no ground
truth), calculated from such numbers, or inferred."""


class PublishedRow(Strict):
    """One model of a published table."""

    model: str
    """As the table calls it."""
    llm: str = ""
    """The LLM, and its size."""
    encoder: str = ""
    """The vision encoder."""
    evidence: Evidence | None = None
    """How its numbers are known, where that differs from the table's."""
    note: str = ""
    """What to know of this row."""
    scores: dict[str, float] = Field(min_length=1)
    """By `benchmark` (its headline) or `benchmark/column`, on the benchmark's own scale."""


class PublishedTable(Strict):
    """One table of one paper."""

    paper: str
    """Its arXiv number."""
    title: str
    """Of the paper, shortened."""
    table: str
    """Where in the paper."""
    evidence: Evidence
    """How its numbers are known."""
    note: str = ""
    """What to know of the table."""
    rows: list[PublishedRow] = Field(min_length=1)
    """The models."""


def published_tables() -> list[PublishedTable]:
    """Read all published tables.

    Returns:
        The tables, in the order of their files' names.

    Raises:
        LayerfuseError: a file is not one.
    """
    tables: list[PublishedTable] = []
    for file in sorted(PUBLISHED.glob("*.yaml")):
        try:
            tables.append(PublishedTable.model_validate(yaml.safe_load(file.read_text("utf-8"))))
        except ValidationError as error:
            raise LayerfuseError(f"published table {file}:\n{problems_of(error)}") from error
    return tables
