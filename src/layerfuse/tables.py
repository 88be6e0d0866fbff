"""A table where the terminal is wide enough for it, else one block of text for each row."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

NO_BREAK = "\u00a0"
"""stands in a cell between a number and its unit, where no line may end; printed as a space"""
INDENT = 2
"""columns before the values of a block"""


@dataclass(frozen=True)
class Heading:
    """The head of a column, which a block repeats before every value."""

    text: str
    is_number: bool = False
    """numbers stand at the right of their column"""


def print_fitted(
    console: Console,
    headings: Sequence[Heading],
    rows: Sequence[Sequence[str]],
    title: str | None = None,
) -> None:
    """Print rows so that nothing is cut off, whatever the width of the terminal.

    Args:
        console: where to print.
        headings: the head of each column; the first column names the row.
        rows: the cells of each row, one for each heading.
        title: a line above.
    """
    table = Table(box=None, padding=(0, 1))
    for heading in headings:
        if heading.is_number:
            table.add_column(heading.text, justify="right", no_wrap=True)
        else:
            table.add_column(heading.text, no_wrap=True)
    for cells in rows:
        # Text, because a name that holds brackets is no markup.
        table.add_row(*[Text(cell.replace(NO_BREAK, " ")) for cell in cells])

    if title is not None:
        console.print(Text(title, style="italic"))
    # Rich shortens the cells of a table that is too wide, so its width is asked for without limit.
    unlimited = console.options.update(max_width=10_000)
    if console.measure(table, options=unlimited).maximum <= console.width:
        console.print(table)
        return
    for cells in rows:
        console.print(Text(cells[0], style="bold"))
        values = []
        for heading, cell in zip(headings[1:], cells[1:], strict=True):
            values.append(f"{heading.text}: {cell}")
        # Rich would break lines at no-break spaces too. What is longer than a line is left to it.
        lines = textwrap.wrap(
            "; ".join(values),
            width=max(console.width - INDENT, 1),
            break_long_words=False,
            break_on_hyphens=False,
        )
        block = "\n".join(lines).replace(NO_BREAK, " ")
        console.print(Padding(Text(block), (0, 0, 0, INDENT)))
