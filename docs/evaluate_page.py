"""The page of evaluation: its template, and the table of benchmarks."""

from pathlib import Path

from docs.results_pages import table_row
from layerfuse.evaluate.benchmarks import BENCHMARKS

DOCS = Path(__file__).parent


def evaluate_page() -> str:
    """How models are evaluated, and what files each benchmark needs."""
    text = (DOCS / "templates" / "evaluate.md").read_text("utf-8")
    # Not by `format`: the page holds braces of YAML and JSON.
    return text.replace("{benchmarks}", "\n".join(benchmarks_table()))


def benchmarks_table() -> list[str]:
    """One row a benchmark: its folder, its files, its licence."""
    head = ["folder", "benchmark", "expected in it", "licence", "headline"]
    lines = [table_row(head), "|---" * len(head) + "|"]
    for name in sorted(BENCHMARKS):
        known = BENCHMARKS[name]
        files = [f"`{file}`" for file in known.expected]
        expected = ", ".join(files) or "nothing: it makes its own questions"
        lines.append(table_row([f"`{name}`", known.title, expected, known.licence, known.headline]))
    return lines
