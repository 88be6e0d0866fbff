"""Comparisons as tables: for the terminal, in Markdown, in LaTeX and as CSV."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from layerfuse.evaluate.benchmarks import BENCHMARKS
from layerfuse.evaluate.category_scores import (
    CategoryColumns,
    category_columns,
    category_scores,
)
from layerfuse.evaluate.compare import AVERAGE, SIGNIFICANT, ComparedRun, Comparison
from layerfuse.evaluate.published import PublishedRow, PublishedTable
from layerfuse.evaluate.suite_scores import column_of, unread_lines
from layerfuse.evaluate.suites import Suite, SuiteColumn

Format = Literal["terminal", "markdown", "latex", "csv"]


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        head: of each column; the first names the row.
        rows: the cells, one for each head.
        notes: sentences below.
        marks: of the cells, behind which they stand, or in columns of their own where numbers are
            read by programs; empty where there are none.
    """

    head: list[str]
    rows: list[list[str]]
    notes: list[str]
    marks: list[list[str]] = field(default_factory=list[list[str]])

    def marked_rows(self) -> list[list[str]]:
        """The cells with their marks behind them."""
        if not self.marks:
            return self.rows
        marked: list[list[str]] = []
        for cells, marks in zip(self.rows, self.marks, strict=True):
            marked.append([cell + mark for cell, mark in zip(cells, marks, strict=True)])
        return marked


def comparison_table(
    comparison: Comparison, suite: Suite, published: Sequence[PublishedTable] = ()
) -> Table:
    """Write the models of a comparison, with published ones below them, and notes on both.

    Args:
        comparison: of runs.
        suite: that they are compared on.
        published: tables of papers; rows without a number of the suite are left out.

    Returns:
        One row a model.
    """
    # All that one benchmark reports beside its headline, which alone is tested.
    further = _further_columns(comparison, suite)
    head = ["model", *(column.name for column in [*suite.columns, *further])]
    if suite.average is not None:
        head.append(AVERAGE)
    rows: list[list[str]] = []
    marks: list[list[str]] = []
    for run in comparison.runs:
        cells = _row(run, suite)
        for column in further:
            found = column_of(column, comparison.reported[run.name])
            cells.append(_number(found.value, found.best, column))
        rows.append(cells)
        marks.append([*_marks(run, suite), *([""] * len(further))])
    notes = _notes(comparison)
    if suite.note:
        notes.append(f"suite {suite.name}: {suite.note}")
    for table in published:
        shown = 0
        for row in table.rows:
            cells = _published_cells(row, suite, further)
            if not any(cells):
                continue
            shown += 1
            evidence = row.evidence or table.evidence
            rows.append([f"{row.model} [{table.paper}, {evidence}]", *cells])
            marks.append([""] * len(head))
            if row.note:
                notes.append(f"{row.model} [{table.paper}]: {row.note}")
        # A note on numbers that do not stand here would be one on others.
        if table.note and shown:
            notes.append(f"{table.paper}, {table.table}: {table.note}")
    return Table(head, rows, notes, marks)


def _further_columns(comparison: Comparison, suite: Suite) -> list[SuiteColumn]:
    """What a benchmark reports beside its headline, where the suite is that alone."""
    further: list[SuiteColumn] = []
    if comparison.reported:
        (headline,) = suite.columns
        # All runs answer the same questions.
        for found in next(iter(comparison.reported.values())):
            if found.name != headline.name:
                further.append(
                    SuiteColumn(name=found.name, benchmark=headline.benchmark, column=found.name)
                )
    return further


def _marks(run: ComparedRun, suite: Suite) -> list[str]:
    """The marks of a run's cells."""
    marks = [""]
    for column in suite.columns:
        cell = run.cells.get(column.name)
        difference = None if cell is None else cell.difference
        marks.append("" if difference is None else difference.mark)
    if suite.average is not None:
        difference = run.average_difference
        marks.append("" if difference is None else difference.mark)
    return marks


def _row(run: ComparedRun, suite: Suite) -> list[str]:
    """The cells of a run."""
    cells = [run.name]
    for column in suite.columns:
        cell = run.cells.get(column.name)
        cells.append("" if cell is None else _number(cell.value, cell.best, column))
    if suite.average is not None:
        cells.append("" if run.average is None else f"{run.average:.2f}")
    return cells


def _number(value: float, best: float, column: SuiteColumn) -> str:
    """A number with the digits that papers print: counts of right answers whole, sums of hundreds
    of points and CIDEr with one decimal, percentages with two, as the most precise papers."""
    decimals = 2 if best <= 100 else 1
    if column.benchmark in BENCHMARKS and BENCHMARKS[column.benchmark].counts_answers:
        decimals = 0
    return f"{value:.{decimals}f}"


def _published_cells(row: PublishedRow, suite: Suite, further: Sequence[SuiteColumn]) -> list[str]:
    """The numbers of a published model in the columns of a suite and in further ones of its
    benchmark; empty where it has none."""
    cells: list[str] = []
    values: list[float] = []
    for column in suite.columns:
        value = _published_score(row, column)
        cells.append("" if value is None else f"{value:g}")
        if value is not None:
            values.append(value / column.divide)
    for column in further:
        value = _published_score(row, column)
        cells.append("" if value is None else f"{value:g}")
    if suite.average is not None:
        # Over fewer columns it would be another number.
        is_whole = len(values) == len(suite.columns)
        cells.append(f"{sum(values) / len(values):.2f}" if is_whole else "")
    return cells


def _published_score(row: PublishedRow, column: SuiteColumn) -> float | None:
    """The number of a published model in a column; None where it has none."""
    keys = [f"{column.benchmark}/{column.column}"]
    # The headline is written without its name, with it, or both.
    known = BENCHMARKS.get(column.benchmark)
    headline = None if known is None else known.headline
    if column.column in (None, headline):
        keys = [column.benchmark, f"{column.benchmark}/{headline}"]
    for key in keys:
        if key in row.scores:
            return row.scores[key]
    return None


def _notes(comparison: Comparison) -> list[str]:
    """What the marks mean, what is missing, and what to know of the questions."""
    notes: list[str] = []
    if len(comparison.runs) > 1:
        compared = 0
        for run in comparison.runs:
            tested = [cell for cell in run.cells.values() if cell.difference is not None]
            compared = max(compared, len(tested))
        notes.append(
            f"+ and -: better or worse than {comparison.baseline} beyond noise: paired bootstrap "
            f"over pictures ({comparison.resamples:,} resamples), p < 0.05 after Holm's correction "
            "for the number of columns. One training each: the noise between seeds is not in it."
        )
        if any(run.average_difference is not None for run in comparison.runs):
            notes.append("The mark of the average is of one test of its own, uncorrected.")
        # The smallest p that so many resamples can give, after the correction.
        if 2 * compared / (comparison.resamples + 1) >= SIGNIFICANT:
            needed = round(2 * compared / SIGNIFICANT)
            notes.append(
                f"{comparison.resamples:,} resamples are too few for marks in {compared} columns: "
                f"give --resamples {needed} or more."
            )
    for column, reason in comparison.missing.items():
        notes.append(f"{column}: {reason}")
    for run in comparison.runs:
        notes += [f"{run.name}, {line}" for line in unread_lines(run.unread)]
    return [*notes, *comparison.notes]


def difference_table(comparison: Comparison) -> Table:
    """Write every difference to the baseline with its interval and tests.

    Args:
        comparison: of at least two runs.

    Returns:
        One row a model and column.
    """
    head = ["model", "column", "difference", "95 % interval", "p", "p, Holm", "McNemar"]
    rows: list[list[str]] = []
    for run in comparison.runs:
        named = [(column, cell.difference) for column, cell in run.cells.items()]
        for column, difference in [*named, (AVERAGE, run.average_difference)]:
            if difference is None:
                continue
            low, high = difference.interval
            test = ""
            if difference.mcnemar is not None:
                test = f"+{difference.better} -{difference.worse}: {difference.mcnemar:.3g}"
            rows.append(
                [
                    run.name,
                    column,
                    f"{difference.difference:+.2f}",
                    f"{low:+.2f} to {high:+.2f}",
                    f"{difference.p:.3g}",
                    f"{difference.p_holm:.3g}",
                    test,
                ]
            )
    return Table(head, rows, [])


def category_table(comparison: Comparison) -> Table:
    """Write the normalised scores of each category.

    Args:
        comparison: of runs.

    Returns:
        One row a model: score / best, and the place between lowest and highest in brackets. A
        head names the columns where they are not all of the category's, the notes always.
    """
    scores = category_scores(comparison)
    columns = category_columns(comparison)
    rows: list[list[str]] = []
    for run in comparison.runs:
        cells = [run.name]
        for of_runs in scores.values():
            score = of_runs[run.name]
            between = "" if score.min_max is None else f" ({score.min_max:.2f})"
            cells.append(f"{score.relative:.3f}{between}")
        rows.append(cells)
    notes = [
        "Each score over the best of these models, averaged within the category; in brackets its "
        "place between the lowest (0) and the highest (1). Left out are columns that a model has "
        "no answers to and those in which all have 0; of the place also those in which all are "
        "equal."
    ]
    for category, of_category in columns.items():
        notes.append(_category_note(category, of_category))
    heads = [_category_head(category, columns[category]) for category in scores]
    return Table(["model", *heads], rows, notes)


def _category_head(category: str, columns: CategoryColumns) -> str:
    """The category, with what it is over where that is not all: CSV has no place for notes."""
    parts: list[str] = []
    if columns.relative != columns.all:
        parts.append(columns.of_all(columns.relative))
    if columns.min_max != columns.relative:
        parts.append(f"place {columns.of_all(columns.min_max)}")
    return f"{category} ({'; '.join(parts)})" if parts else category


def _category_note(category: str, columns: CategoryColumns) -> str:
    """Over which columns both scores of a category are."""
    note = f"{category}: over {columns.of_all(columns.relative)}"
    if columns.min_max != columns.relative:
        note += f"; the place over {columns.of_all(columns.min_max)}"
    return note


def written(table: Table, form: Format) -> str:
    """Write a table as text.

    Args:
        table: what to write.
        form: `markdown`, `latex` or `csv`.

    Returns:
        The text, with the notes but in CSV, which has no place for them, and marks in columns of
        their own.

    Raises:
        ValueError: the form is `terminal`, which has a width that only a console knows.
    """
    if form == "markdown":
        return _markdown(table)
    if form == "latex":
        return _latex(table)
    if form == "csv":
        # The module quotes what holds commas and line ends.
        stream = io.StringIO()
        csv.writer(stream, lineterminator="\n").writerows(_csv_rows(table))
        return stream.getvalue()
    raise ValueError(f"no text form {form!r}")


def _csv_rows(table: Table) -> list[list[str]]:
    """The head and the rows; behind each column with marks, a column of these."""
    marks = table.marks or [[""] * len(table.head) for _ in table.rows]
    is_marked = [any(of_row[place] for of_row in marks) for place in range(len(table.head))]
    heads_of_marks = [f"{name} differs" for name in table.head]
    rows: list[list[str]] = []
    for cells, of_row in zip([table.head, *table.rows], [heads_of_marks, *marks], strict=True):
        row: list[str] = []
        for cell, mark, marked in zip(cells, of_row, is_marked, strict=True):
            row += [cell, mark] if marked else [cell]
        rows.append(row)
    return rows


def _markdown(table: Table) -> str:
    lines: list[str] = []
    for cells in [table.head, ["---"] * len(table.head), *table.marked_rows()]:
        escaped = [cell.replace("|", "\\|") for cell in cells]
        lines.append("| " + " | ".join(escaped) + " |")
    for note in table.notes:
        lines += ["", note]
    return "\n".join(lines) + "\n"


LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "|": r"\textbar{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}
"""What means something else in LaTeX, by the character."""


def _latex(table: Table) -> str:
    """With booktabs, as papers have it."""
    lines = [r"\begin{tabular}{l" + "r" * (len(table.head) - 1) + "}", r"\toprule"]
    lines += [_latex_row(table.head), r"\midrule"]
    lines += [_latex_row(row) for row in table.marked_rows()]
    lines += [r"\bottomrule", r"\end{tabular}"]
    for note in table.notes:
        # A second line would be no comment.
        lines.append("% " + " ".join(note.split()))
    return "\n".join(lines) + "\n"


def _latex_row(cells: Sequence[str]) -> str:
    escaped: list[str] = []
    for cell in cells:
        # Character by character: what stands for one must not be escaped again.
        escaped.append("".join(LATEX.get(character, character) for character in cell))
    # Behind the end of a row a bracket would be an option of it, and a star another end.
    if escaped[0].startswith(("[", "*")):
        escaped[0] = "{}" + escaped[0]
    return " & ".join(escaped) + r" \\"
