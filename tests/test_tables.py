"""Tables and blocks of any width."""

import io

import pytest
from rich.console import Console

from layerfuse.tables import NO_BREAK, Heading, print_fitted

HEADINGS = [
    Heading("arm"),
    Heading("vision"),
    Heading("fusion"),
    Heading("llm"),
]
NUMBER = f"162.83{NO_BREAK}M"
ROWS = [["last layer", NUMBER, NUMBER, NUMBER]]


def printed(width: int, rows: list[list[str]]) -> str:
    """What a terminal of this width shows."""
    console = Console(record=True, width=width, file=io.StringIO())
    print_fitted(console, HEADINGS, rows)
    return console.export_text()


@pytest.mark.parametrize("width", range(14, 62))
def test_no_line_ends_between_a_number_and_its_unit(width: int) -> None:
    text = printed(width, ROWS)

    # An ordinary space: what is copied from a terminal is searched for
    assert text.count("162.83 M") == 3
    for line in text.splitlines():
        assert len(line.rstrip()) <= width


def test_a_table_that_fits_has_ordinary_spaces() -> None:
    text = printed(80, ROWS)

    assert text.count("162.83 M") == 3
    assert "last layer" in text.splitlines()[1]


def test_a_word_longer_than_a_line_is_not_lost() -> None:
    text = printed(20, [["arm", "x" * 50, "1", "2"]])

    assert text.count("x") == 50
