"""`layerfuse redraw`: figures and pages that were deleted come back as they were, from the JSON."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from typer.testing import CliRunner

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.compare_figures import draw_categories
from layerfuse.evaluate.records import FinishedRun, RunRecord
from layerfuse.explain.redraw import redraw
from layerfuse.look.figures import (
    LastLayerSimilarity,
    draw_probe,
    draw_similarity,
    plot_last_layer,
)
from layerfuse.look.probe_report import ProbeReport
from layerfuse.look.report_file import read_report
from layerfuse.look.similarity_report import SimilarityReport
from layerfuse.study.depth_figure import scored_record
from layerfuse.study.report import write_report
from layerfuse.study.report_figures import draw_growth
from layerfuse_cli.app import app
from tests.made_up import run_record
from tests.made_up_studies import finished_run, random_answers, save_study
from tests.test_category_figure import SCORES, comparison_of

RESULTS = Path(__file__).parents[1] / "results"


def drawings(folder: Path) -> dict[str, bytes]:
    """The content of every figure and page below a folder, by its path in it."""
    found = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix in (".png", ".svg", ".html"):
            found[str(file.relative_to(folder))] = file.read_bytes()
    return found


def deleted(folder: Path) -> dict[str, bytes]:
    """The figures and pages of a folder, which are deleted."""
    before = drawings(folder)
    for name in before:
        (folder / name).unlink()
    return before


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """The folder of a reported study of three single layers with losses, two seeds each."""
    runs: list[FinishedRun] = []
    for layer in (2, 4, 6):
        for seed in (0, 1):
            answers = random_answers(layer / 8, seed=10 * layer + seed, pictures=30)
            run = finished_run(f"single {layer}", seed, answers, layers=(layer,))
            losses = {"align": [(step, 3 / step) for step in range(1, 30)]}
            runs.append(replace(run, record=replace(scored_record(run), losses=losses)))
    folder = save_study(tmp_path / "study", runs)
    (folder / "recipe.yaml").write_text("name: made up\nbaseline: single 2\n")
    write_report(folder)
    return folder


def test_a_study_gets_its_figures_and_its_page_back(study: Path) -> None:
    before = deleted(study)
    assert {"report.html", "figures/depth.png", "figures/layers.svg"} <= set(before)

    written = redraw(study)

    assert drawings(study) == before
    assert study / "report.html" in written


def test_figures_need_no_answers(study: Path) -> None:
    """Committed results hold the numbers of a study alone."""
    before = deleted(study)
    del before["report.html"]
    shutil.rmtree(study / "arms")

    redraw(study)

    assert drawings(study) == before


def test_figures_alone_go_elsewhere(study: Path, tmp_path: Path) -> None:
    before = drawings(study)

    written = redraw(study, tmp_path / "elsewhere")

    assert drawings(study) == before
    elsewhere = drawings(tmp_path / "elsewhere")
    assert elsewhere == {
        name.removeprefix("figures/"): content
        for name, content in before.items()
        if name != "report.html"
    }
    assert all(file.is_file() for file in written)


def test_a_look_gets_its_figures_back(tmp_path: Path) -> None:
    """With another encoder too: its layers against all of this one's, and against the last."""
    content = json.loads((RESULTS / "scenes-selection" / "similarity.json").read_text())
    content["other"] = "another"
    for name in ("tokens", "images"):
        content[f"cross_{name}"] = content[f"cka_{name}"]
        content[f"cross_{name}_biased"] = content[f"cka_{name}_biased"]
    (tmp_path / "similarity.json").write_text(json.dumps(content))
    shutil.copy(RESULTS / "scenes-selection" / "probe.json", tmp_path)
    similarity = read_report(tmp_path / "similarity.json", SimilarityReport.from_json)
    names = draw_similarity(similarity, tmp_path)
    probes = read_report(tmp_path / "probe.json", ProbeReport.from_json)
    for each in (probes.mean, probes.grid):
        draw_probe(each, tmp_path / f"probe-{each.kind}")
    assert names == ["similarity", "cross", "cross-last"]
    before = deleted(tmp_path)

    redraw(tmp_path)

    assert drawings(tmp_path) == before
    assert len(before) == 2 * (len(names) + 2)


def test_a_comparison_gets_its_figure_back(tmp_path: Path) -> None:
    comparison = comparison_of(SCORES)
    # What is computed from the cells lies beside them in the file
    content = {**asdict(comparison), "category_scores": {}, "category_columns": {}}
    (tmp_path / "comparison.json").write_text(json.dumps(content))
    draw_categories(comparison, tmp_path)
    before = deleted(tmp_path)

    redraw(tmp_path)

    assert drawings(tmp_path) == before
    assert set(before) == {"categories.png", "categories.svg"}


def test_a_study_over_data_sizes_gets_its_figure_and_page_back(tmp_path: Path) -> None:
    shutil.copy(RESULTS / "scenes-data-sizes" / "data_sizes.json", tmp_path)
    size = tmp_path / "size-125"
    size.mkdir()
    (size / "recipe.yaml").write_text("baseline: single 12\ndescription: What it is for.\n")
    redraw(tmp_path)
    before = deleted(tmp_path)
    assert set(before) == {"report.html", "figures/data_sizes.png", "figures/data_sizes.svg"}
    assert b"What it is for." in before["report.html"]

    redraw(tmp_path)

    assert drawings(tmp_path) == before


def test_a_folder_without_numbers_is_refused(tmp_path: Path) -> None:
    run = CliRunner().invoke(app, ["redraw", str(tmp_path)])

    assert run.exit_code == 2
    assert "nothing to draw from" in run.stderr
    assert "similarity.json" in run.stderr


@pytest.mark.parametrize("name", ["comparison.json", "data_sizes.json", "guidance.json"])
def test_damaged_numbers_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text('{"runs": 3, "sizes": 3, "guided": 3}')

    with pytest.raises(LayerfuseError, match=name):
        redraw(tmp_path)
    assert drawings(tmp_path) == {}


def growing(fusion: str, *sets: tuple[int, ...]) -> list[RunRecord]:
    """Runs of a strategy on these sets of layers."""
    losses = {"align": [(step, 3 / step) for step in range(1, 9)]}
    return [
        run_record(f"{fusion} {layers}", 0, layers=layers, fusion=fusion, losses=losses)
        for layers in sets
    ]


def test_losses_are_drawn_as_the_set_of_layers_grows(tmp_path: Path) -> None:
    records = growing("concat", (1,), (1, 2), (1, 2, 3), (2, 3, 4))

    assert draw_growth(records, "concat (1,)", ["align"], tmp_path) == ["growth"]
    assert (tmp_path / "growth.png").is_file()


def test_sets_of_two_sizes_are_no_growth(tmp_path: Path) -> None:
    records = [*growing("concat", (1,), (1, 2), (2, 3)), *growing("group_mean", (1, 2, 3))]

    assert draw_growth(records, "concat (1,)", ["align"], tmp_path) == []
    assert drawings(tmp_path) == {}


def test_another_encoder_is_drawn_against_the_last_layer() -> None:
    data = LastLayerSimilarity("this", "other", {"CKA": np.array([0.1, 0.5, 0.9])})

    ax = plot_last_layer(data, Figure().subplots())

    (line,) = ax.lines
    assert list(np.asarray(line.get_ydata())) == [0.1, 0.5, 0.9]
    assert ax.get_xlabel() == "layer of other"
    assert "last layer of this" in ax.get_ylabel()
