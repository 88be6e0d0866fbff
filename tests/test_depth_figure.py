"""The figure of single layers draws hand-worked scores, normalised both ways, and is in the report.

The layers 2, 4 and 6 answer four questions of each category, so that scores are quarters.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from layerfuse import plots
from layerfuse.evaluate.records import AnswerRecord, FinishedRun
from layerfuse.study.depth_figure import (
    DepthScores,
    family_curves,
    layer_scores,
    normalised,
    scored_record,
)
from layerfuse.study.report import write_report
from tests.made_up import answer_record, run_record
from tests.made_up_studies import random_study, save_study

QUESTIONS = 4


def answers_of(right: dict[str, int], family: str | None = None) -> list[AnswerRecord]:
    """Answers to four questions of each category, of which so many are right.

    Args:
        right: by category.
        family: of all questions; by default that of a category has its name.
    """
    answers: list[AnswerRecord] = []
    for category, count in right.items():
        for question in range(QUESTIONS):
            answer = answer_record(
                f"{category}/{question}",
                sample=f"{category}-{question}",
                right=question < count,
                family=family or category,
            )
            answers.append(replace(answer, category=category))
    return answers


def single(layer: int, seed: int, right: dict[str, int]) -> FinishedRun:
    """A run of a single layer."""
    return FinishedRun(run_record(f"single {layer}", seed, layers=(layer,)), answers_of(right))


def three_layers() -> list[FinishedRun]:
    """Two seeds a layer; means of `far` are 1/4, 1/2 and 3/4, of `near` 1/2, 1 and 1/2."""
    return [
        single(6, 0, {"near": 2, "far": 3}),
        single(2, 0, {"near": 1, "far": 1}),
        single(4, 0, {"near": 4, "far": 2}),
        single(2, 1, {"near": 3, "far": 1}),
        single(4, 1, {"near": 4, "far": 2}),
        single(6, 1, {"near": 2, "far": 3}),
    ]


def scores_of(runs: list[FinishedRun]) -> list[DepthScores]:
    """The scores by layer of each setting, by the answers."""
    return layer_scores([scored_record(run) for run in runs])


def drawn(runs: list[FinishedRun], *, from_lowest: bool) -> Axes:
    """The axes of the figure of the only setting."""
    [collected] = scores_of(runs)
    ax = Figure().subplots()
    assert plots.plot_depth(normalised(collected, from_lowest=from_lowest), ax) is ax
    return ax


def lines_of(ax: Axes) -> dict[str, dict[float, float]]:
    """The heights of each line by layer, by label."""
    lines: dict[str, dict[float, float]] = {}
    for line in ax.lines:
        points = np.asarray(line.get_xydata())
        lines[str(line.get_label())] = {float(x): float(y) for x, y in points}
    return lines


def bands_of(ax: Axes) -> list[dict[float, tuple[float, float]]]:
    """The lowest and highest point of each band by layer."""
    bands: list[dict[float, tuple[float, float]]] = []
    for collection in ax.collections:
        assert isinstance(collection, PolyCollection)
        heights: dict[float, list[float]] = {}
        for path in collection.get_paths():
            for x, y in np.asarray(path.vertices):
                heights.setdefault(float(x), []).append(float(y))
        bands.append({x: (min(ys), max(ys)) for x, ys in heights.items()})
    return bands


def test_scores_are_drawn_as_shares_of_the_best_layer() -> None:
    lines = lines_of(drawn(three_layers(), from_lowest=False))

    assert list(lines) == ["far", "near"]
    assert lines["near"] == {2: 50, 4: 100, 6: 50}
    assert lines["far"] == pytest.approx({2: 100 / 3, 4: 200 / 3, 6: 100})


def test_scores_are_drawn_between_the_lowest_and_the_best_layer() -> None:
    lines = lines_of(drawn(three_layers(), from_lowest=True))

    assert lines == {"far": {2: 0, 4: 50, 6: 100}, "near": {2: 0, 4: 100, 6: 0}}


def test_families_are_also_drawn_as_they_are() -> None:
    runs = [single(layer, 0, {"near": layer // 2, "far": 1}) for layer in (2, 4, 6)]
    collected = scores_of(runs)

    lines = lines_of(plots.plot_depth(family_curves(collected, "near"), Figure().subplots()))

    assert list(lines.values()) == [{2: 25, 4: 50, 6: 75}]


@pytest.mark.parametrize(
    ("from_lowest", "of_layer_2"),
    # The seeds of layer 2 score 1/4 and 3/4, the means lie between 1/2 and 1.
    [(False, (25, 75)), (True, (-50, 50))],
)
def test_bands_are_the_range_of_seeds_on_the_scale_of_the_means(
    from_lowest: bool, of_layer_2: tuple[float, float]
) -> None:
    ax = drawn(three_layers(), from_lowest=from_lowest)

    # The seeds of `far` are equal: it has no band.
    [band] = bands_of(ax)
    middle = lines_of(ax)["near"]
    assert band == {2: of_layer_2, 4: (100, 100), 6: (middle[6], middle[6])}


def test_one_seed_has_no_band() -> None:
    runs = [run for run in three_layers() if run.record.seed == 0]

    ax = drawn(runs, from_lowest=False)

    assert bands_of(ax) == []
    assert lines_of(ax)["near"] == {2: 25, 4: 100, 6: 50}


def test_axes_say_what_they_show() -> None:
    left = drawn(three_layers(), from_lowest=False)
    right = drawn(three_layers(), from_lowest=True)

    assert left.get_xlabel() == right.get_xlabel() == "layer"
    assert left.get_ylabel() == "score, % of the best layer’s"
    assert right.get_ylabel() == "lowest layer 0, best layer 100"
    assert [label.get_text() for label in left.get_xticklabels()] == ["2", "4", "6"]


def test_many_layers_have_whole_numbers_as_ticks() -> None:
    layers = list(range(1, 25))
    values = [layer / 24 for layer in layers]
    curve = plots.DepthCurve("all", 0, layers, values, values, values)
    ax = Figure().subplots()

    plots.plot_depth(plots.DepthResult("score", [curve]), ax)

    ticks = ax.get_xticks()
    assert len(ticks) <= 13
    assert all(float(tick).is_integer() for tick in ticks)


def test_families_are_drawn_where_there_is_one_category() -> None:
    runs: list[FinishedRun] = []
    for run in three_layers():
        answers = [replace(answer, category="all") for answer in run.answers]
        runs.append(FinishedRun(run.record, answers))

    assert list(lines_of(drawn(runs, from_lowest=True))) == ["far", "near"]


def test_categories_are_drawn_where_families_are_others() -> None:
    """One family holds both categories: the scores are those of categories."""
    runs: list[FinishedRun] = []
    for run in three_layers():
        answers = [replace(answer, family="one") for answer in run.answers]
        runs.append(FinishedRun(run.record, answers))

    lines = lines_of(drawn(runs, from_lowest=True))

    assert lines == {"far": {2: 0, 4: 50, 6: 100}, "near": {2: 0, 4: 100, 6: 0}}


def test_two_layers_are_no_curve() -> None:
    runs = [run for run in three_layers() if run.record.layers != [4]]

    assert scores_of(runs) == []


def test_arms_of_other_strategies_are_left_out() -> None:
    """Nor do they count: the third layer of these is one of `weighted_sum`."""
    runs = three_layers()
    other = run_record("sum", 0, layers=(8,), fusion="weighted_sum")
    fused = FinishedRun(other, answers_of({"near": 4, "far": 4}))

    assert lines_of(drawn([fused, *runs], from_lowest=False)) == lines_of(
        drawn(runs, from_lowest=False)
    )
    two = [run for run in runs if run.record.layers != [4]]
    assert scores_of([fused, *two]) == []


def test_a_score_that_is_no_number_leaves_the_rest() -> None:
    """Layer 4 has no score in `near`, where its line goes on from 2 to 6."""
    runs: list[FinishedRun] = []
    for run in three_layers():
        answers: list[AnswerRecord] = []
        for answer in run.answers:
            if run.record.layers == [4] and answer.category == "near":
                answer = replace(answer, score=math.nan)
            answers.append(answer)
        runs.append(FinishedRun(run.record, answers))

    lines = lines_of(drawn(runs, from_lowest=False))

    assert lines["near"] == {2: 100, 6: 100}
    assert lines["far"] == pytest.approx({2: 100 / 3, 4: 200 / 3, 6: 100})


def test_a_layer_of_fewer_seeds_has_the_mean_of_its_own() -> None:
    """An unfinished study: layer 2 has seed 1 alone, which scores 3/4."""
    runs = [run for run in three_layers() if run.record.name != "arm 'single 2' seed 0"]

    ax = drawn(runs, from_lowest=False)

    assert lines_of(ax)["near"] == {2: 75, 4: 100, 6: 50}
    assert bands_of(ax) == []


@pytest.mark.parametrize(("right", "is_drawn"), [(0, False), (2, True)])
def test_equal_layers_have_no_place_between_lowest_and_best(right: int, is_drawn: bool) -> None:
    """Where none is right there is no share of the best either."""
    runs = [single(layer, 0, {"near": right, "far": layer // 2}) for layer in (2, 4, 6)]

    assert list(lines_of(drawn(runs, from_lowest=True))) == ["far"]
    assert ("near" in lines_of(drawn(runs, from_lowest=False))) == is_drawn


def test_rounding_is_no_difference() -> None:
    """Each layer scores 0.15, two of them but for the last digit."""
    seeds = {1: [0.1, 0.2], 2: [0.15, 0.15], 3: [0.3, 0.0]}
    assert len({sum(of_layer) / 2 for of_layer in seeds.values()}) > 1

    assert normalised(DepthScores("", {"all": seeds}, {}), from_lowest=True).curves == []


def test_a_panel_without_lines_says_why() -> None:
    runs = [single(layer, 0, {"near": 2, "far": 2}) for layer in (2, 4, 6)]

    ax = drawn(runs, from_lowest=True)

    assert [text.get_text() for text in ax.texts] == ["all layers equal"]


def with_options(runs: Sequence[FinishedRun], **options: str) -> list[FinishedRun]:
    """The runs with options of their strategy."""
    changed: list[FinishedRun] = []
    for run in runs:
        fusion = {**run.record.fusion, **options}
        changed.append(FinishedRun(replace(run.record, fusion=fusion), run.answers))
    return changed


def test_other_settings_have_curves_of_their_own() -> None:
    """Two arms of one layer that differ in an option are no seeds of one another."""
    whitened = with_options(three_layers(), normalize="whiten", projector="mlp")
    plain = with_options(three_layers()[:3], normalize="none", projector="mlp")

    first, second = scores_of([*whitened, *plain])

    assert (first.setting, second.setting) == ("normalize whiten", "normalize none")
    assert first.groups["near"] == {2: [0.25, 0.75], 4: [1, 1], 6: [0.5, 0.5]}
    assert second.groups["near"] == {2: [0.25], 4: [1], 6: [0.5]}
    # The only setting needs no name.
    assert scores_of(whitened)[0].setting == ""


def page_of(folder: Path, runs: list[FinishedRun]) -> str:
    """The report of a study whose baseline is layer 2."""
    save_study(folder, runs)
    (folder / "recipe.yaml").write_text("baseline: single 2\n")
    return write_report(folder).read_text()


def test_the_report_shows_the_figure_and_says_how_to_read_it(tmp_path: Path) -> None:
    page = page_of(tmp_path / "study", three_layers())

    assert (tmp_path / "study/figures/depth.png").is_file()
    assert page.count('aria-label="Scores against the depth of the layer, a line') == 1
    assert "one line a category of questions" in page
    assert "magnifies small differences" in page
    assert "the range from the lowest to the highest seed" in page
    (layers,) = re.findall(r"<figcaption>(The same arms,.*?)</figcaption>", page)
    assert "bands reach from the lowest to the highest seed" in layers
    assert "dashed is the commonest answer" in layers


def test_a_report_without_three_layers_has_no_such_figure(tmp_path: Path) -> None:
    runs = [run for run in three_layers() if run.record.layers != [4]]

    page = page_of(tmp_path / "study", runs)

    assert not (tmp_path / "study/figures/depth.png").exists()
    assert "depth of the layer" not in page


def test_one_category_is_captioned_as_families(tmp_path: Path) -> None:
    folder = random_study(tmp_path / "study", {"first": 0.4, "second": 0.6, "third": 0.8})
    (folder / "recipe.yaml").write_text("baseline: first\n")

    assert "one line a family of questions" in write_report(folder).read_text()
