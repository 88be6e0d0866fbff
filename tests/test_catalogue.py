"""`layerfuse list fusions`: every strategy, counted, not typed in."""

from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from layerfuse.cli import app
from layerfuse.cost.flops import vision_config
from layerfuse.cost.fusions_table import KNOWN, Row, Rows, list_fusions, rows, show
from layerfuse.fusion import FUSIONS
from tests import tiny


def counted(found: Rows) -> dict[str, Row]:
    return {row.name: row for row in found[0]}


def test_a_strategy_that_does_not_fit_leaves_the_others() -> None:
    """Two layers would share a block of an LLM of two blocks."""
    small = tiny.text_config(num_hidden_layers=2)
    console = Console(record=True, width=200)
    tiny_vision = tiny.vision_config()
    found = rows(tiny_vision, small)
    assert len(found[0]) + len(found[1]) == len(FUSIONS)
    assert "each needs its own" in found[1]["inject_cross"]
    assert "concat" in counted(found)
    show(*found, console)
    assert "inject_cross: not for this pair by default" in console.export_text()


def test_published_counts_for_llava() -> None:
    """CLIP-L/336 and Vicuna-7B: parameters beyond the 20.98 M of LLaVA-1.5's projector."""
    found = counted(list_fusions("clip-l-336", "vicuna-7b", Console(quiet=True)))
    assert found.keys() == set(FUSIONS)
    assert found["single"].parameters == found["single"].flops == 0
    assert found["group_mean"].parameters == 2 * 1024 * 4096  # DCI: 29.37 M in all
    assert found["instruction_weighted"].parameters == 27_047_940 + 1024 * 4096
    assert found["weighted_sum"].parameters == 24
    assert found["token_concat"].tokens == 720
    assert all(r.tokens == 576 for n, r in found.items() if n != "token_concat")
    projector = 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    assert found["inject_add"].parameters == 2 * projector
    assert found["inject_cross"].parameters == 2 * (projector + 4 * 4096**2 + 4096 + 1)


def test_flops_are_those_of_the_matrix_products() -> None:
    found = counted(rows(vision_config(KNOWN["clip-l-336"]), tiny.text_config()))
    assert found["concat"].flops == 2 * 576 * 2 * 1024 * 32
    cross = found["inject_cross"]
    project = 2 * 576 * (1024 * 32 + 32 * 32)  # V_k, once a layer
    memory = 2 * 576 * 2 * 32 * 32
    look = 640 * (2 * 2 * 32 * 32 + 4 * 576 * 32)  # query and output; scores and mixture
    assert cross.flops == 2 * (project + memory + look)


def test_every_strategy_is_counted_for_every_kind_of_encoder() -> None:
    for encoder in ("clip", "siglip", "dinov2_registers"):
        found, _ = rows(tiny.vision_config(encoder), tiny.text_config())
        assert found[0].name == "single"
        assert len(found) == len(FUSIONS)


def test_the_verb(tmp_path: Path) -> None:
    runner = CliRunner()
    names = ["--encoder", str(tmp_path), "--llm", str(tmp_path / "llm")]
    tiny.vision_config().save_pretrained(tmp_path)
    tiny.text_config().save_pretrained(tmp_path / "llm")
    shown = runner.invoke(app, ["list", "fusions", *names])
    assert shown.exit_code == 0, shown.output
    for name in FUSIONS:
        assert name in shown.output
    assert "…" not in shown.output
    unknown = runner.invoke(app, ["list", "fusions", "--encoder", "no/such-encoder"])
    assert unknown.exit_code == 2
    assert "no hub answered" in unknown.output


@pytest.mark.parametrize("depth", [2, 4, 12, 24, 26, 27, 40])
@pytest.mark.parametrize("name", list(FUSIONS))
def test_example_layers_exist_at_every_depth(name: str, depth: int) -> None:
    from layerfuse.vision.selection import select

    selection = select(FUSIONS[name][1].example(depth), depth)
    assert selection.layers
