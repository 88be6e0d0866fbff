"""Ask a model a whole suite, and print the table that its paper prints."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from transformers.utils import logging as transformers_logging

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.answer import load_answerer
from layerfuse.evaluate.asking import ask_benchmark
from layerfuse.evaluate.benchmarks import BENCHMARKS, Column, Item
from layerfuse.evaluate.benchmarks.base import JudgedItem
from layerfuse.evaluate.suites import Prompt, Suite, SuiteColumn, load_prompts
from layerfuse.files import write_text
from layerfuse.progress import shown_progress
from layerfuse.tables import Heading, print_fitted

SUITE = "suite.json"


@dataclass(frozen=True)
class FilledColumn:
    """A column of a suite's table with the number of a model.

    Attributes:
        name: of the column.
        category: that it belongs to.
        benchmark: that it is of.
        value: on the benchmark's own scale; None where it could not be measured.
        best: the highest value that it can have; None where it could not be measured.
        averaged: what enters the average: the value, divided as the suite says; None likewise.
        questions: how many it is over.
        missing: why there is no value; empty where there is one.
    """

    name: str
    category: str
    benchmark: str
    value: float | None
    best: float | None
    averaged: float | None
    questions: int
    missing: str = ""


@dataclass(frozen=True)
class SuiteScores:
    """What a model scores on a suite: the content of suite.json.

    Attributes:
        suite: its name.
        model: its folder.
        columns: in the order of the suite.
        average: over the columns that `averaged` names; None where none was asked for, or where
            columns are missing.
        averaged: names of the columns that the average is over.
        notes: what a reader must know of the questions.
    """

    suite: str
    model: str
    columns: list[FilledColumn]
    average: float | None
    averaged: list[str]
    notes: list[str]


@dataclass(frozen=True)
class AvailableBenchmark:
    """A benchmark of a suite whose questions are at hand."""

    name: str
    items: list[Item]
    prompt: Prompt


@dataclass(frozen=True)
class Availability:
    """Which benchmarks of a suite can be asked.

    Attributes:
        available: in the order of the suite.
        missing: by the names of the others, why not.
        notes: of those that are available.
    """

    available: list[AvailableBenchmark]
    missing: dict[str, str]
    notes: list[str]


def evaluate_suite(
    model: Path,
    suite: Suite,
    *,
    benchmarks: Path,
    output: Path | None = None,
    batch_size: int = 32,
    partial_average: bool = False,
    console: Console | None = None,
) -> Path:
    """Ask a trained model the benchmarks of a suite that are at hand, and write what it scores.

    Args:
        model: its folder.
        suite: what is asked.
        benchmarks: the folder of the benchmarks, one folder for each, by its name.
        output: where answers and scores go. Default: `suites/NAME` in the model's folder.
        batch_size: questions answered at once.
        partial_average: average what there is, where columns are missing.
        console: where to print; the terminal by default.

    Returns:
        The folder that was written.

    Raises:
        LayerfuseError: no benchmark is at hand, the files of one are damaged, there is no model,
            or the folder holds answers to something else.
    """
    if console is None:
        console = Console()
    # Before the model: files are checked in a moment, while a large model loads for minutes.
    found = look_for(suite, benchmarks)
    for name, reason in found.missing.items():
        console.print(f"not available: {name}: {reason}", markup=False, highlight=False)
    if not found.available:
        raise LayerfuseError(
            f"no benchmark of suite {suite.name!r} is at hand: give their folder by --benchmarks"
        )
    transformers_logging.disable_progress_bar()
    answerer = load_answerer(model)
    folder = output or model / "suites" / suite.name
    answered: dict[str, list[JudgedItem]] = {}
    with shown_progress(console) as progress:
        for available in found.available:
            answered[available.name] = ask_benchmark(
                answerer,
                BENCHMARKS[available.name],
                available.items,
                available.prompt,
                folder / available.name,
                model=str(model),
                batch_size=batch_size,
                progress=progress,
            )
    scores = fill(suite, str(model), answered, found, partial_average=partial_average)
    write_text(folder / SUITE, json.dumps(asdict(scores), indent=1) + "\n")
    print_scores(suite, scores, console)
    return folder


def look_for(suite: Suite, benchmarks: Path) -> Availability:
    """Load the questions of a suite's benchmarks.

    Args:
        suite: names them.
        benchmarks: their folder.

    Returns:
        What can be asked, and why the rest cannot.

    Raises:
        LayerfuseError: the files of a benchmark are there and damaged, or it has no prompt.
    """
    prompts = load_prompts(suite.prompts)
    available: list[AvailableBenchmark] = []
    missing: dict[str, str] = {}
    notes: list[str] = []
    for name in dict.fromkeys(column.benchmark for column in suite.columns):
        if name not in BENCHMARKS:
            missing[name] = "layerfuse does not score it"
            continue
        known = BENCHMARKS[name]
        folder = benchmarks / name
        if known.needs_files and not folder.is_dir():
            missing[name] = f"no folder {folder}; expected in it: {', '.join(known.expected)}"
            continue
        if name not in prompts:
            raise LayerfuseError(f"prompts {suite.prompts!r} have none for benchmark {name!r}")
        items = known.load(folder)
        notes += known.notes(items)
        available.append(AvailableBenchmark(name, items, prompts[name]))
    return Availability(available, missing, notes)


def fill(
    suite: Suite,
    model: str,
    answered: dict[str, list[JudgedItem]],
    found: Availability,
    *,
    partial_average: bool,
) -> SuiteScores:
    """Compute a suite's table.

    Args:
        suite: names the columns.
        model: names the model.
        answered: the judged answers, by benchmark.
        found: says why benchmarks are missing.
        partial_average: average what there is, where columns are missing.

    Returns:
        The scores; no average where columns are missing, unless it was asked for.
    """
    reported: dict[str, dict[str, Column]] = {}
    for name, of_benchmark in answered.items():
        columns = BENCHMARKS[name].columns(of_benchmark)
        reported[name] = {column.name: column for column in columns}
    filled = [_filled(column, reported, found.missing) for column in suite.columns]
    measured = [column for column in filled if column.averaged is not None]
    average = None
    averaged: list[str] = []
    is_whole = len(measured) == len(filled)
    if suite.average is not None and measured and (is_whole or partial_average):
        averaged = [column.name for column in measured]
        average = sum(column.averaged or 0.0 for column in measured) / len(measured)
    return SuiteScores(suite.name, model, filled, average, averaged, found.notes)


def _filled(
    column: SuiteColumn, reported: dict[str, dict[str, Column]], missing: dict[str, str]
) -> FilledColumn:
    """A column with its number, or with the reason why there is none."""
    if column.benchmark not in reported:
        return FilledColumn(
            column.name,
            column.category,
            column.benchmark,
            value=None,
            best=None,
            averaged=None,
            questions=0,
            missing=missing[column.benchmark],
        )
    columns = reported[column.benchmark]
    wanted = column.column or BENCHMARKS[column.benchmark].headline
    if wanted not in columns:
        raise LayerfuseError(
            f"benchmark {column.benchmark} reports no {wanted!r}; valid: {', '.join(columns)}"
        )
    found = columns[wanted]
    return FilledColumn(
        column.name,
        column.category,
        column.benchmark,
        value=found.value,
        best=found.best,
        averaged=found.value / column.divide,
        questions=found.questions,
    )


def print_scores(suite: Suite, scores: SuiteScores, console: Console) -> None:
    """Print a suite's table, what is missing, and over which columns the average is.

    Args:
        suite: of the scores.
        scores: of a model.
        console: where to print.
    """
    headings = [
        Heading("column"),
        Heading("category"),
        Heading("score", is_number=True),
        Heading("of", is_number=True),
        Heading("questions", is_number=True),
    ]
    rows: list[list[str]] = []
    for column in scores.columns:
        if column.value is None or column.best is None:
            rows.append([column.name, column.category, "not available", "", ""])
            continue
        rows.append(
            [
                column.name,
                column.category,
                f"{column.value:.2f}",
                f"{column.best:g}",
                f"{column.questions:,}",
            ]
        )
    print_fitted(console, headings, rows, title=suite.title)
    for line in average_lines(suite, scores):
        console.print(line, markup=False, highlight=False)
    for note in [*scores.notes, suite.note]:
        if note:
            console.print(note, markup=False, highlight=False)


def average_lines(suite: Suite, scores: SuiteScores) -> Sequence[str]:
    """Say what the average of a suite is, and over what.

    Args:
        suite: of the scores.
        scores: of a model.

    Returns:
        At most one line.
    """
    missing = [column.name for column in scores.columns if column.value is None]
    if suite.average is None:
        return []
    if scores.average is None:
        return [
            f"No average: {', '.join(missing)} missing. An average over fewer columns is another "
            "number; --partial-average prints it."
        ]
    if missing:
        return [
            f"Average over {len(scores.averaged)} of {len(scores.columns)} columns "
            f"({', '.join(scores.averaged)}): {scores.average:.2f}. Not comparable with the "
            "paper's."
        ]
    return [f"Average over all {len(scores.columns)} columns: {scores.average:.2f}"]
