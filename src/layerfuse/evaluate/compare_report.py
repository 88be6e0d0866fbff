"""A comparison of runs, printed and written."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.category_scores import (
    category_columns,
    category_scores,
    has_category_scores,
)
from layerfuse.evaluate.compare import Comparison, compare
from layerfuse.evaluate.compare_figures import draw_categories
from layerfuse.evaluate.compare_table import (
    Format,
    Table,
    category_table,
    comparison_table,
    difference_table,
    written,
)
from layerfuse.evaluate.published import published_tables
from layerfuse.evaluate.run_answers import Run
from layerfuse.evaluate.suites import load_suite
from layerfuse.files import write_text
from layerfuse.progress import shown_progress
from layerfuse.tables import Heading, print_fitted

COMPARISON = "comparison.json"
SUFFIXES: dict[Format, str] = {"markdown": ".md", "latex": ".tex", "csv": ".csv"}
"""Of the files of the forms that are text."""


def report_comparison(
    runs: Sequence[str],
    suite: str,
    *,
    benchmarks: Path,
    baseline: str | None = None,
    published: bool = True,
    form: Format = "terminal",
    resamples: int = 1000,
    seed: int = 0,
    output: Path | None = None,
    console: Console | None = None,
) -> Comparison:
    """Compare runs, print the tables, and write them where asked.

    Args:
        runs: folders, or `NAME=FOLDER`.
        suite: that they are compared on.
        benchmarks: the folder of the benchmarks.
        baseline: the run to compare with. Default: the first.
        published: whether rows of papers stand below the runs.
        form: of the printed tables.
        resamples: number of redrawn sets of pictures.
        seed: of the redrawing.
        output: folder of comparison.json, of the tables in every form, and of the figure.
        console: where to print; the terminal by default.

    Returns:
        The comparison.

    Raises:
        LayerfuseError: a run, the suite or a benchmark cannot be read, or the output is a file.
    """
    if console is None:
        console = Console()
    chosen = load_suite(suite)
    # Before minutes of redrawing, and before anything is printed.
    if output is not None and output.exists() and not output.is_dir():
        raise LayerfuseError(f"{output} is a file: give the name of a folder by --output")
    parsed = [Run.parse(text) for text in runs]
    # Lines of progress would stand in what a form other than the terminal's is piped into.
    with shown_progress(Console(stderr=True)) as progress:
        comparison = compare(
            parsed,
            chosen,
            benchmarks,
            baseline=baseline,
            resamples=resamples,
            seed=seed,
            progress=progress,
        )
    rows_of_papers = published_tables() if published else []
    tables = {"scores": comparison_table(comparison, chosen, rows_of_papers)}
    if len(comparison.runs) > 1:
        tables["differences"] = difference_table(comparison)
        if has_category_scores(comparison):
            tables["categories"] = category_table(comparison)
    if form == "csv":
        _print_csv(tables, console)
    else:
        for name, table in tables.items():
            _print(name, table, form, console)
    if output is not None:
        _write(comparison, tables, output)
    return comparison


def _print_csv(tables: dict[str, Table], console: Console) -> None:
    """Print the scores, which a program reads, and beside them what has no place in CSV."""
    console.file.write(written(tables["scores"], "csv"))
    beside = Console(stderr=True)
    for note in tables["scores"].notes:
        beside.print(note, markup=False, highlight=False, soft_wrap=True)
    others = [name for name in tables if name != "scores"]
    if others:
        beside.print(
            f"tables of their own: {', '.join(others)}; --output FOLDER writes them too",
            markup=False,
            soft_wrap=True,
        )


def _print(name: str, table: Table, form: Format, console: Console) -> None:
    """Print a table."""
    if form != "terminal":
        # As it is: rich would wrap it, and read brackets as markup.
        console.file.write(written(table, form) + "\n")
        return
    headings = [Heading(table.head[0])]
    headings += [Heading(text, is_number=True) for text in table.head[1:]]
    print_fitted(console, headings, table.marked_rows(), title=name)
    for note in table.notes:
        console.print(note, markup=False, highlight=False)
    console.print()


def _write(comparison: Comparison, tables: dict[str, Table], output: Path) -> None:
    """Write the numbers, the tables in every form, and the figure of categories."""
    content = asdict(comparison)
    scores = category_scores(comparison)
    content["category_scores"] = {
        category: {run: asdict(score) for run, score in of_runs.items()}
        for category, of_runs in scores.items()
    }
    columns = category_columns(comparison)
    content["category_columns"] = {
        category: asdict(of_category) for category, of_category in columns.items()
    }
    write_text(output / COMPARISON, json.dumps(content, indent=1) + "\n")
    for name, table in tables.items():
        for form, suffix in SUFFIXES.items():
            write_text(output / f"{name}{suffix}", written(table, form))
    draw_categories(comparison, output)
