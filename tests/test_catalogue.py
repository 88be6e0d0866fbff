"""`layerfuse list fusions`: every strategy, counted, not typed in."""

from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from layerfuse.cost.flops import vision_config
from layerfuse.cost.fusions_table import KNOWN, Row, list_fusions, rows, ships_as, show
from layerfuse.fusion import FUSIONS
from layerfuse.vision.selection import select
from layerfuse_cli.app import app
from tests import tiny


def by_name(table: list[Row]) -> dict[str, Row]:
    """The rows of the table by the names of their strategies."""
    return {row.name: row for row in table}


def test_a_strategy_that_does_not_fit_leaves_the_others() -> None:
    """Two layers would share a block of an LLM of two blocks."""
    small_llm = tiny.text_config(num_hidden_layers=2)
    console = Console(record=True, width=200)

    table, misfits = rows(tiny.vision_config(), small_llm)
    show(table, misfits, console)

    assert len(table) + len(misfits) == len(FUSIONS)
    assert "each needs its own" in misfits["inject_cross"]
    assert "concat" in by_name(table)
    assert "inject_cross: not for this pair by default" in console.export_text()


def test_published_counts_for_llava() -> None:
    """CLIP-L/336 and Vicuna-7B: parameters beyond the 20.98 M of LLaVA-1.5's projector."""
    table, _ = list_fusions("clip-l-336", "vicuna-7b", Console(quiet=True))

    row = by_name(table)
    assert row.keys() == set(FUSIONS)
    assert row["single"].parameters == 0
    assert row["single"].flops == 0
    # DCI: 29.37 M in all
    assert row["group_mean"].parameters == 2 * 1024 * 4096
    assert row["instruction_weighted"].parameters == 27_047_940 + 1024 * 4096
    assert row["weighted_sum"].parameters == 24
    projector = 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    assert row["inject_add"].parameters == 2 * projector
    # Query, key, value and output; a norm's weights; a gate
    attention = 4 * 4096**2 + 4096 + 1
    assert row["inject_cross"].parameters == 2 * (projector + attention)


def test_published_tokens_for_llava() -> None:
    """24 x 24 patches; STI appends two layers of 72 pooled tokens each."""
    table, _ = list_fusions("clip-l-336", "vicuna-7b", Console(quiet=True))

    for row in table:
        if row.name == "token_concat":
            assert row.tokens == 720
        else:
            assert row.tokens == 576, row.name


def test_flops_are_those_of_the_matrix_products() -> None:
    """CLIP-L's 576 patches of width 1024, and an LLM of width 32."""
    table, _ = rows(vision_config(KNOWN["clip-l-336"]), tiny.text_config())

    row = by_name(table)
    # Two FLOPs per weight and token, for the two layers beside the one of `single`
    assert row["concat"].flops == 2 * 576 * 2 * 1024 * 32
    # V_k, once a layer
    project = 2 * 576 * (1024 * 32 + 32 * 32)
    # Keys and values
    memory = 2 * 576 * 2 * 32 * 32
    # Query and output; scores and mixture, for 576 image and 64 text tokens
    look = 640 * (2 * 2 * 32 * 32 + 4 * 576 * 32)
    assert row["inject_cross"].flops == 2 * (project + memory + look)


@pytest.mark.parametrize("encoder", ["clip", "siglip", "dinov2_registers"])
def test_every_strategy_is_counted_for_every_kind_of_encoder(encoder: str) -> None:
    table, _ = rows(tiny.vision_config(encoder), tiny.text_config())

    assert table[0].name == "single"
    assert len(table) == len(FUSIONS)


def test_the_verb_lists_all_strategies_for_models_in_folders(tmp_path: Path) -> None:
    tiny.vision_config().save_pretrained(tmp_path / "encoder")
    tiny.text_config().save_pretrained(tmp_path / "llm")

    ended = CliRunner().invoke(
        app,
        [
            "list",
            "fusions",
            "--encoder",
            str(tmp_path / "encoder"),
            "--llm",
            str(tmp_path / "llm"),
        ],
    )

    assert ended.exit_code == 0, ended.output
    for name in FUSIONS:
        assert name in ended.output
    assert "…" not in ended.output


def test_the_verb_names_a_model_that_is_nowhere() -> None:
    ended = CliRunner().invoke(app, ["list", "fusions", "--encoder", "no/such-encoder"])

    assert ended.exit_code == 2
    assert "no hub answered" in ended.output


@pytest.mark.parametrize("depth", [2, 4, 12, 24, 26, 27, 40])
@pytest.mark.parametrize("name", list(FUSIONS))
def test_example_layers_exist_at_every_depth(name: str, depth: int) -> None:
    _, strategy = FUSIONS[name]

    selection = select(strategy.example(depth), depth)

    assert selection.layers


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("single", "folds"),
        ("weighted_sum", "folds"),
        ("token_concat", "hub"),
        ("deformable", "hub"),
        ("text_routed", "transformers only"),
        ("inject_add", "transformers only"),
    ],
)
def test_the_table_says_how_a_strategy_ships(strategy: str, expected: str) -> None:
    """Servers read what `get_image_features` gives of pictures alone."""
    assert ships_as(FUSIONS[strategy][1]) == expected
