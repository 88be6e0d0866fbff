"""Suites: which benchmarks a paper reports, how they are asked, and how they are averaged."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

import yaml
from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.answer_parsing import LETTERS
from layerfuse.evaluate.benchmarks import BENCHMARKS, Benchmark, Item
from layerfuse.evaluate.boxes import BoxForm
from layerfuse.files import read_yaml
from layerfuse.recipe.reader import problems_of
from layerfuse.recipe.strict import Strict

SUITES = Path(__file__).parent / "suite_files"
PROMPTS = SUITES / "prompts"
YAML = (".yaml", ".yml")
"""What tells a file of one's own from a name."""
FIELDS = ("question", "options", "context")
"""What a prompt may hold in braces."""
_FIELD = re.compile(r"\{(question|options|context)\}")


class Prompt(Strict):
    """How the questions of one benchmark are put to a model."""

    text: str
    """The words of the question, in which `{question}`, `{options}` (a line `A. ...` each) and
    `{context}` (a hint, or words that were read in the picture) stand for those of an item. A line
    whose fields are all empty is left out."""
    max_new_tokens: PositiveInt = 16
    """Longest answer, in tokens."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that end an answer, beside the model's own end."""
    boxes: BoxForm | None = None
    """How the model writes boxes and is told them, such as `{scale: thousand, padded: false}`, for
    benchmarks with boxes. Default: LLaVA-1.5's 0..1 of the padded picture."""

    @model_validator(mode="after")
    def _asks(self) -> Self:
        if "{question}" not in self.text:
            raise ValueError("the prompt's text must hold {question}")
        # What is left is either words or a brace that nothing fills.
        rest = _FIELD.sub("", self.text)
        if "{" in rest or "}" in rest:
            raise ValueError(
                f"a brace that nothing fills in {self.text!r}; valid: "
                + ", ".join("{" + field + "}" for field in FIELDS)
            )
        return self

    def ask(self, item: Item) -> str:
        """Write the words of one question.

        Args:
            item: the question.

        Returns:
            What the model is asked, without markers of pictures.
        """
        options: list[str] = []
        for letter, option in zip(LETTERS, item.options, strict=False):
            options.append(f"{letter}. {option}")
        values = {
            "question": item.question,
            "options": "\n".join(options),
            "context": item.context,
        }
        lines: list[str] = []
        for line in self.text.split("\n"):
            filled = _filled(line, values)
            # A line of an empty context would say that there is one.
            if filled is not None:
                lines.append(filled)
        return "\n".join(lines)


def _filled(line: str, values: Mapping[str, str]) -> str | None:
    """A line with its fields filled in; None where all that it stands for is empty."""
    held = _FIELD.findall(line)
    if held and not any(values[field] for field in held):
        return None
    # In one pass: the words of a question may hold braces themselves.
    return _FIELD.sub(lambda field: values[field[1]], line)


class SuiteColumn(Strict):
    """One column of a suite's table."""

    name: str
    """As the paper prints it."""
    benchmark: str
    """Name of the benchmark."""
    column: str | None = None
    """Which of the benchmark's numbers. Default: its headline."""
    category: str = "all"
    """The group of columns that the paper averages or draws together."""
    divide: PositiveFloat = 1.0
    """What the number is divided by before it enters the average."""


class Suite(Strict):
    """The table that a paper prints."""

    name: str = Field(pattern=r"^\w[\w.+-]*$")
    """By which it is chosen; a folder of answers is called so too."""
    title: str
    """What it is the table of."""
    source: str
    """The paper, and where in it."""
    note: str = ""
    """What differs from the paper, or is not known."""
    prompts: str = "llava-1.5"
    """Which set of prompts asks the questions: its name, or a YAML file beside the suite's."""
    columns: list[SuiteColumn] = Field(min_length=1)
    """In the order of the table."""
    average: Literal["mean"] | None = "mean"
    """What stands beside the columns: their mean, each divided as it says; null for none."""

    @model_validator(mode="after")
    def _columns_differ(self) -> Self:
        names = [column.name for column in self.columns]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two columns are called {name!r}")
        return self


def suite_names() -> list[str]:
    """Name the suites that layerfuse has.

    Returns:
        Their names, sorted.
    """
    return sorted(file.stem for file in SUITES.glob("*.yaml"))


def load_suite(name: str) -> Suite:
    """Read a suite.

    Args:
        name: of one that layerfuse has, of a benchmark, or a YAML file.

    Returns:
        The suite; that of a benchmark has its headline alone.

    Raises:
        LayerfuseError: there is no such suite, or its file is not one.
    """
    file = SUITES / f"{name}.yaml"
    if name.endswith(YAML):
        file = Path(name)
    if not file.is_file():
        if name in BENCHMARKS:
            return suite_of(BENCHMARKS[name])
        raise LayerfuseError(
            f"no suite {name!r}; valid: {', '.join(suite_names())}, a benchmark "
            f"({', '.join(sorted(BENCHMARKS))}), or a YAML file of your own"
        )
    try:
        suite = Suite.model_validate(_mapping(file))
    except ValidationError as error:
        raise LayerfuseError(f"suite {file}:\n{problems_of(error)}") from error
    if not suite.prompts.endswith(YAML):
        return suite
    # A path in a file is relative to the file, as in recipes.
    return suite.model_copy(update={"prompts": str(file.parent / suite.prompts)})


def suite_of(benchmark: Benchmark) -> Suite:
    """Give the suite of one benchmark.

    Args:
        benchmark: that is asked.

    Returns:
        Its headline, without an average.
    """
    column = SuiteColumn(name=benchmark.headline, benchmark=benchmark.name)
    return Suite(
        name=benchmark.name,
        title=benchmark.title,
        source="one benchmark",
        columns=[column],
        average=None,
    )


def load_prompts(name: str) -> dict[str, Prompt]:
    """Read a set of prompts.

    Args:
        name: of one that layerfuse has, or a YAML file.

    Returns:
        The prompt of each benchmark, by the benchmark's name.

    Raises:
        LayerfuseError: there are no such prompts, or a file is not what it should be.
    """
    file = PROMPTS / f"{name}.yaml"
    if name.endswith(YAML):
        file = Path(name)
    if not file.is_file():
        valid = sorted(found.stem for found in PROMPTS.glob("*.yaml"))
        raise LayerfuseError(
            f"no prompts {name!r}; valid: {', '.join(valid)}, or a YAML file of your own"
        )
    prompts: dict[str, Prompt] = {}
    for benchmark, content in _mapping(file).items():
        try:
            prompts[benchmark] = Prompt.model_validate(content)
        except ValidationError as error:
            raise LayerfuseError(f"prompts {file}, {benchmark}:\n{problems_of(error)}") from error
    return prompts


def _mapping(file: Path) -> dict[str, Any]:
    """The content of a YAML file that must be a mapping."""
    try:
        content: Any = read_yaml(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise LayerfuseError(f"cannot read {file}: {error}") from error
    if not isinstance(content, dict):
        raise LayerfuseError(f"{file} holds no mapping of keys to values")
    return cast("dict[str, Any]", content)
