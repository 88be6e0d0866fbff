"""Tables of the benchmarks and suites that there are."""

from rich.console import Console

from layerfuse.evaluate.benchmarks import BENCHMARKS
from layerfuse.evaluate.suites import load_suite, suite_names
from layerfuse.tables import Heading, print_fitted


def list_benchmarks(console: Console | None = None) -> None:
    """Print every benchmark with its files.

    Args:
        console: where to print; the terminal by default.
    """
    headings = [Heading("name"), Heading("benchmark"), Heading("files"), Heading("licence")]
    rows: list[list[str]] = []
    for name in sorted(BENCHMARKS):
        known = BENCHMARKS[name]
        files = ", ".join(known.expected) if known.needs_files else "none: it makes its own"
        rows.append([name, known.title, files, known.licence])
    print_fitted(console or Console(), headings, rows)


def list_suites(console: Console | None = None) -> None:
    """Print every suite with its columns.

    Args:
        console: where to print; the terminal by default.
    """
    headings = [Heading("suite"), Heading("source"), Heading("columns")]
    rows: list[list[str]] = []
    for name in suite_names():
        suite = load_suite(name)
        columns: list[str] = []
        for column in suite.columns:
            scored = column.benchmark in BENCHMARKS
            columns.append(column.name if scored else f"{column.name} (not scored here)")
        rows.append([name, suite.source, ", ".join(columns)])
    print_fitted(console or Console(), headings, rows)
