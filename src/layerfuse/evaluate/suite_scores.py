"""What a model scores on a suite: the table that its paper prints."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Console

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.benchmarks import BENCHMARKS, Benchmark, Column
from layerfuse.evaluate.benchmarks.interface import JudgedItem, notes_on_answers
from layerfuse.evaluate.suites import Suite, SuiteColumn
from layerfuse.tables import Heading, print_fitted

OPEN = "its questions are open: they have no possible answers to choose among"


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
class UnreadAnswers:
    """How many answers to a benchmark say nothing, which its score does not tell from wrong ones.

    Attributes:
        answers: to all of its questions.
        unreadable: of them, those in which the benchmark found nothing that it reads.
        empty: of them, those without a word; most benchmarks can read nothing in these either.
    """

    answers: int
    unreadable: int
    empty: int


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
        by_likelihood: the columns of closed questions as the likeliest of their possible answers
            scores; empty where that was not asked for.
        unread: by benchmark, how many answers say nothing; only where there are such answers.
    """

    suite: str
    model: str
    columns: list[FilledColumn]
    average: float | None
    averaged: list[str]
    notes: list[str]
    by_likelihood: list[FilledColumn] = field(default_factory=list[FilledColumn])
    unread: dict[str, UnreadAnswers] = field(default_factory=dict[str, UnreadAnswers])


def column_of(column: SuiteColumn, reported: Sequence[Column]) -> Column:
    """Find the number that a suite's column holds.

    Args:
        column: of the suite.
        reported: by its benchmark.

    Returns:
        The number.

    Raises:
        LayerfuseError: the benchmark does not report it.
    """
    benchmark = BENCHMARKS[column.benchmark]
    wanted = column.column or benchmark.headline
    for found in reported:
        if found.name == wanted:
            return found
    valid = ", ".join(found.name for found in reported)
    raise LayerfuseError(
        f"column {column.name!r}: {benchmark.title} reports no {wanted!r}; valid: {valid}"
    )


def fill(
    suite: Suite,
    model: str,
    answered: dict[str, list[JudgedItem]],
    *,
    missing: dict[str, str],
    notes: list[str],
    partial_average: bool = False,
) -> SuiteScores:
    """Compute a suite's table.

    Args:
        suite: names the columns.
        model: names the model.
        answered: the judged answers, by benchmark.
        missing: why benchmarks are missing, by their names.
        notes: what a reader must know of the questions.
        partial_average: average what there is, where columns are missing.

    Returns:
        The scores; no average where columns are missing, unless it was asked for.
    """
    reported: dict[str, list[Column]] = {}
    all_notes = list(notes)
    for name, of_benchmark in answered.items():
        reported[name] = BENCHMARKS[name].columns(of_benchmark)
        all_notes += notes_on_answers(BENCHMARKS[name], of_benchmark)
    filled = [_filled(column, reported, missing) for column in suite.columns]
    measured = [column for column in filled if column.averaged is not None]
    average = None
    averaged: list[str] = []
    # Over fewer columns it is another number, which nothing says later on.
    is_whole = len(measured) == len(filled)
    if suite.average is not None and measured and (is_whole or partial_average):
        averaged = [column.name for column in measured]
        average = sum(column.averaged or 0.0 for column in measured) / len(measured)
    return SuiteScores(
        suite.name, model, filled, average, averaged, all_notes, unread=unread_answers(answered)
    )


def unread_answers(answered: Mapping[str, Sequence[JudgedItem]]) -> dict[str, UnreadAnswers]:
    """Count the answers that say nothing.

    Args:
        answered: the judged answers, by benchmark.

    Returns:
        By benchmark; those of which all answers say something are left out.
    """
    unread: dict[str, UnreadAnswers] = {}
    for name, of_benchmark in answered.items():
        unreadable = sum(each.judged.parsed is None for each in of_benchmark)
        empty = sum(each.is_empty for each in of_benchmark)
        if unreadable or empty:
            unread[name] = UnreadAnswers(len(of_benchmark), unreadable, empty)
    return unread


def unread_lines(unread: Mapping[str, UnreadAnswers]) -> list[str]:
    """Say how many answers say nothing.

    Args:
        unread: by benchmark.

    Returns:
        A line for each benchmark.
    """
    lines: list[str] = []
    for name, counts in unread.items():
        parts: list[str] = []
        if counts.unreadable:
            parts.append(f"nothing could be read in {counts.unreadable:,}")
        if counts.empty:
            parts.append(f"{counts.empty:,} empty")
        title = BENCHMARKS[name].title
        lines.append(f"{title}: of {counts.answers:,} answers {', '.join(parts)}")
    return lines


def _filled(
    column: SuiteColumn, reported: dict[str, list[Column]], missing: dict[str, str]
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
            missing=missing.get(column.benchmark, OPEN),
        )
    found = column_of(column, reported[column.benchmark])
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
    """Print a suite's table, what is missing, over which columns the average is, and how many
    answers say nothing.

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
    rows = [_row(column) for column in scores.columns]
    if scores.by_likelihood:
        headings.append(Heading("by likelihood", is_number=True))
        for cells, column in zip(rows, scores.by_likelihood, strict=True):
            cells.append("" if column.value is None else f"{column.value:.2f}")
    print_fitted(console, headings, rows, title=suite.title)
    for line in [*average_lines(suite, scores), *unread_lines(scores.unread)]:
        console.print(line, markup=False, highlight=False)
    for note in [*scores.notes, suite.note]:
        if note:
            console.print(note, markup=False, highlight=False)


def print_columns(benchmark: Benchmark, answered: Sequence[JudgedItem], console: Console) -> None:
    """Print all numbers of one benchmark.

    Args:
        benchmark: whose.
        answered: every question once.
        console: where to print.
    """
    headings = [
        Heading("number"),
        Heading("score", is_number=True),
        Heading("of", is_number=True),
        Heading("questions", is_number=True),
    ]
    rows: list[list[str]] = []
    for column in benchmark.columns(answered):
        questions = f"{column.questions:,}"
        rows.append([column.name, f"{column.value:.2f}", f"{column.best:g}", questions])
    print_fitted(console, headings, rows, title=benchmark.title)


def _row(column: FilledColumn) -> list[str]:
    """The cells of one column of the suite."""
    # A zero would be a score.
    if column.value is None or column.best is None:
        return [column.name, column.category, "not available", "", ""]
    return [
        column.name,
        column.category,
        f"{column.value:.2f}",
        f"{column.best:g}",
        f"{column.questions:,}",
    ]


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
