"""The README's table of strategies is made from the strategies themselves."""

from pathlib import Path

import pytest

from docs.generate import TABLE_BEGINS, TABLE_ENDS, readme, readme_table
from layerfuse.fusion import FUSIONS
from layerfuse.fusion.weighted_sum import WeightedSum, WeightedSumConfig

README = Path(__file__).parent.parent / "README.md"


class MeanOfLayers(WeightedSum):
    """A strategy that the README does not list yet."""

    kind = "external direct"
    paper = "nobody's paper"
    summary = "plain mean"


def test_a_new_strategy_gets_its_row_beside_those_of_its_kind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(FUSIONS, "mean_of_layers", (WeightedSumConfig, MeanOfLayers))

    rows = readme(README.read_text("utf-8")).splitlines()

    place = rows.index("| `mean_of_layers` | external direct | plain mean | nobody's paper |")
    # The name of a neighbour would fail with the next strategy.
    assert "| external direct |" in rows[place - 1]
    assert "| external direct |" in rows[place + 1]


def test_a_strategy_of_a_new_kind_is_not_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MeanOfLayers, "kind", "a new kind")
    monkeypatch.setitem(FUSIONS, "mean_of_layers", (WeightedSumConfig, MeanOfLayers))

    table = readme_table()

    assert table[-1] == "| `mean_of_layers` | a new kind | plain mean | nobody's paper |"


def test_what_is_around_the_table_stays() -> None:
    stale = f"above\n{TABLE_BEGINS}\n| `gone` |\n{TABLE_ENDS}\nbelow\n"

    fresh = readme(stale)

    table = "\n".join(readme_table())
    assert fresh == f"above\n{TABLE_BEGINS}\n{table}\n{TABLE_ENDS}\nbelow\n"
    # Written twice, it is the same.
    assert readme(fresh) == fresh


def test_a_readme_without_the_markers_is_not_written() -> None:
    with pytest.raises(ValueError, match="not found"):
        readme("no table")
