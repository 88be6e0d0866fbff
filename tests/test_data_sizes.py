"""Subsets of a stage's samples, and the axis of data sizes: accuracy against data size."""

import io
import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from rich.console import Console

from layerfuse import plots
from layerfuse.cost.recipe_table import show
from layerfuse.data.collate import SampleDataset
from layerfuse.data.lazy_records import Samples
from layerfuse.data.sources import load
from layerfuse.data.subset import draw_subset
from layerfuse.errors import LayerfuseError
from layerfuse.recipe.data_source import Data
from layerfuse.recipe.reader import load_recipe
from layerfuse.recipe.schema import Recipe
from layerfuse.study.coordinate import study, train
from layerfuse.study.data_sizes_report import (
    SizedArm,
    SizedStudy,
    SizesReport,
    draw_sizes,
    verdict_sentence,
    write_sizes_page,
    write_sizes_report,
)
from layerfuse.study.report import write_report
from layerfuse.train.arm import Trained, encoder_for, train_arm
from layerfuse.vision.encoder import Encoder
from tests.counting_encoder import CountingEncoder
from tests.made_up_studies import random_study
from tests.studies import (
    cut_in_half,
    one_line,
    read_results,
    read_samples,
    run_study,
    times_of_results,
    write_recipe,
    write_samples,
)

SIZES = [2, 4, 8]
"""of the eight samples that there are"""


@pytest.fixture
def sized(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe of two arms, two seeds and three sizes of the data."""
    return {**recipe, "seeds": [0, 1], "data_sizes": SIZES}


def with_subset(recipe: dict[str, Any], size: int) -> dict[str, Any]:
    """The recipe with a subset of its only stage's samples."""
    stage = recipe["stages"]["align"]
    data = {**stage["data"], "subset": size}
    return {**recipe, "stages": {"align": {**stage, "data": data}}}


def drawn(samples: Samples, size: int, seed: int) -> list[str]:
    """The ids of a subset."""
    return [sample.id for sample in draw_subset(samples, size, seed)]


@pytest.fixture
def samples(recipe: dict[str, Any], tmp_path: Path) -> Samples:
    """Eight samples."""
    return load(Data(path=str(tmp_path / "data.json")))


def test_of_one_seed_a_smaller_subset_is_a_part_of_a_larger_one(samples: Samples) -> None:
    for seed in range(5):
        for size in range(1, 8):
            smaller = drawn(samples, size, seed)
            assert len(set(smaller)) == size
            assert set(smaller) < set(drawn(samples, size + 1, seed))


def test_seeds_draw_different_samples(samples: Samples) -> None:
    subsets = {tuple(drawn(samples, 4, seed)) for seed in range(5)}
    assert len(subsets) > 1


def test_a_subset_of_all_samples_is_the_data_as_it_is(samples: Samples) -> None:
    assert drawn(samples, 8, seed=3) == [sample.id for sample in samples]


def test_a_subset_is_drawn_of_what_skip_and_limit_leave(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    cut = load(Data(path=str(tmp_path / "data.json"), skip=2, limit=4))
    for seed in range(5):
        ids = set(drawn(cut, 3, seed))
        assert len(ids) == 3
        assert ids < {"2", "3", "4", "5"}


def test_what_a_seed_draws_is_the_same_in_every_version(samples: Samples) -> None:
    """A finished run is not done again, so that its samples must not change."""
    assert drawn(samples, 3, seed=0) == ["3", "5", "7"]


def test_all_arms_of_a_seed_train_on_the_same_samples(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained_on: list[tuple[int, list[str]]] = []

    class Recorded(SampleDataset):
        def __init__(self, samples: Samples, random_crop: float | None, seed: int) -> None:
            super().__init__(samples, random_crop, seed)
            trained_on.append((seed, [sample.id for sample in samples]))

    monkeypatch.setattr("layerfuse.train.arm.SampleDataset", Recorded)
    two_seeds = {**with_subset(recipe, 3), "seeds": [0, 1]}

    study(write_recipe(tmp_path, two_seeds), output=tmp_path / "study")

    whole = load(Data(path=str(tmp_path / "data.json")))
    # Both arms with the first seed, then both with the second.
    of_seeds = [(seed, drawn(whole, 3, seed)) for seed in (0, 0, 1, 1)]
    assert trained_on == of_seeds
    assert trained_on[0] != trained_on[2]


def train_only_arm(recipe: Recipe, folder: Path) -> Trained:
    """Train the recipe's only arm with seed 0, on all that its sources hold or on a subset."""
    (arm,) = recipe.all_arms()
    samples = {name: load(stage.data) for name, stage in recipe.stages.items()}
    return train_arm(recipe, arm, 0, samples=samples, store=None, folder=folder)


def test_training_on_a_subset_is_training_on_a_file_of_just_these_samples(
    recipe: dict[str, Any], samples: Samples, tmp_path: Path
) -> None:
    """Constants that are measured on training pictures included."""
    fusion = {"name": "concat", "normalize": "standardize"}
    recipe["arms"] = [{"name": "two", "layers": [1, 3], "fusion": fusion}]
    ids = drawn(samples, 3, seed=0)
    alone = [sample for sample in read_samples(tmp_path) if sample["id"] in ids]
    write_samples(tmp_path, alone, "alone.json")
    of_file = {**recipe, "stages": {"align": dict(recipe["stages"]["align"])}}
    of_file["stages"]["align"]["data"] = {"path": "alone.json"}

    in_part = train_only_arm(
        load_recipe(write_recipe(tmp_path, with_subset(recipe, 3))), tmp_path / "part"
    )
    expected = train_only_arm(load_recipe(write_recipe(tmp_path, of_file)), tmp_path / "file")

    assert in_part.losses == expected.losses
    weights = in_part.model.state_dict()
    for name, weight in expected.model.state_dict().items():
        assert weights[name].equal(weight), name


def test_arms_of_all_sizes_choose_among_the_answers_of_all_samples(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe = {**recipe, "closed_answers": True, "arms": recipe["arms"][:1]}
    whole = train_only_arm(load_recipe(write_recipe(tmp_path, recipe)), tmp_path / "whole")
    one = train_only_arm(
        load_recipe(write_recipe(tmp_path, with_subset(recipe, 1))), tmp_path / "one"
    )
    # One sample has one of the two answers.
    assert one.model.config.answer_tokens == whole.model.config.answer_tokens


def test_validation_is_answered_when_the_shares_of_the_subset_are_done(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    """With `epochs` a run of half the data is done after half the steps."""
    stage = recipe["stages"]["align"]
    del stage["steps"]
    recipe["evaluate"]["validation"] = {"path": "data.json"}
    recipe["evaluate"]["at"] = [0.5, 1.0]
    stage["batch_size"] = 2

    study(write_recipe(tmp_path, with_subset(recipe, 4)), output=tmp_path / "study")

    for result in read_results(tmp_path / "study"):
        assert [point["samples"] for point in result["along"]] == [2, 4]


def test_a_report_says_of_how_many_samples_a_run_is_trained(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    file = write_recipe(tmp_path, with_subset(recipe, 3))
    screen_text = io.StringIO()
    page = study(file, output=tmp_path / "study", console=Console(file=screen_text, width=200))
    assert (
        "align: each run trains on 3 of the 8 samples, drawn by its seed" in screen_text.getvalue()
    )
    assert "3 a run" in words(page)


@pytest.mark.parametrize("changes", [{"subset": 9}, {"data_sizes": [2, 9]}], ids=str)
def test_more_samples_than_there_are_is_refused_and_nothing_written(
    changes: dict[str, Any], recipe: dict[str, Any], tmp_path: Path
) -> None:
    if "subset" in changes:
        recipe = with_subset(recipe, changes["subset"])
    else:
        recipe = {**recipe, **changes}
    file = write_recipe(tmp_path, recipe)
    message = "'align' has 8 samples, and no run can train on 9 of them"

    result = run_study(file, tmp_path / "study")

    assert result.exit_code == 2
    assert message in one_line(result)
    assert not (tmp_path / "study").exists()
    with pytest.raises(LayerfuseError, match=message):
        show(file, console=Console(file=io.StringIO()))


def test_bad_samples_are_none_that_a_subset_can_be_drawn_of(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    """A picture that cannot be decoded is known only when the pictures are encoded."""
    cut_in_half(tmp_path / "3.png")
    recipe["on_bad_sample"] = "skip"
    result = run_study(write_recipe(tmp_path, with_subset(recipe, 8)), tmp_path / "study")
    assert result.exit_code == 2
    assert "has 7 samples, and no run can train on 8" in one_line(result)
    assert not list(tmp_path.glob("study/arms/*/result.json"))


@pytest.mark.parametrize(
    ("sizes", "problem"),
    [
        ([4, 2], "does not grow"),
        ([2, 2], "does not grow"),
        ([0, 2], "greater than 0"),
        ([], "at least 1 item"),
    ],
)
def test_sizes_that_make_no_axis_are_refused(
    sizes: list[int], problem: str, recipe: dict[str, Any], tmp_path: Path
) -> None:
    file = write_recipe(tmp_path, {**recipe, "data_sizes": sizes})
    with pytest.raises(LayerfuseError, match=f"data_sizes.*{problem}"):
        load_recipe(file)


def test_sizes_and_a_subset_of_the_last_stage_contradict(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    file = write_recipe(tmp_path, {**with_subset(recipe, 3), "data_sizes": SIZES})
    with pytest.raises(LayerfuseError, match=r"data_sizes and stages.align.data.subset"):
        load_recipe(file)


@pytest.mark.parametrize("part", ["data", "validation"])
def test_a_test_has_no_subset(part: str, recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["evaluate"][part] = {"path": "data.json", "subset": 3}
    with pytest.raises(LayerfuseError, match=f"{part}.subset: .*use limit"):
        load_recipe(write_recipe(tmp_path, recipe))


def words(page: Path) -> str:
    """What a page says, without its drawings, in one line."""
    text = re.sub(r"<(style|script|svg).*?</\1>", " ", page.read_text(), flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", text)).split())


def test_a_study_over_sizes_sets_them_side_by_side_and_continues(
    sized: dict[str, Any], tmp_path: Path
) -> None:
    file = write_recipe(tmp_path, sized)
    folder = tmp_path / "study"

    page = study(file, output=folder)

    assert page == folder / "report.html"
    text = words(page)
    html = page.read_text()
    content = json.loads((folder / "data_sizes.json").read_text())
    assert [size["samples"] for size in content["sizes"]] == SIZES
    times = {}
    for size in content["sizes"]:
        of_size = folder / f"size-{size['samples']}"
        assert (of_size / "report.html").is_file()
        assert f'href="size-{size["samples"]}/report.html"' in html
        recipe_of_size = load_recipe(of_size / "recipe.yaml")
        assert recipe_of_size.subsets == {"align": size["samples"]}
        assert size["runs"] == 4
        times.update(times_of_results(of_size))
    assert len(times) == 12
    assert "95 % intervals over pictures and seeds" in text
    assert "the same 2 steps of 4 samples" in text
    assert (folder / "figures" / "data_sizes.png").is_file()

    study(file, output=folder)

    again = {}
    for size in SIZES:
        again.update(times_of_results(folder / f"size-{size}"))
    assert again == times
    assert page.read_text() == html


def made_up_sizes(folder: Path) -> None:
    """Save finished studies of three sizes: the more data, the better the second arm."""
    folder.mkdir()
    for size, rate in zip(SIZES, (0.5, 0.6, 0.9), strict=True):
        of_size = random_study(folder / f"size-{size}", {"one": 0.5, "two": rate})
        (of_size / "recipe.yaml").write_text("baseline: one\n")
        write_report(of_size)


def test_the_page_has_the_numbers_of_the_sizes_summaries(
    sized: dict[str, Any], tmp_path: Path
) -> None:
    made_up_sizes(tmp_path / "study")

    page = write_sizes_report(
        load_recipe(write_recipe(tmp_path, sized)), tmp_path / "study", finished=SIZES
    )

    text = words(page)
    content = json.loads((tmp_path / "study" / "data_sizes.json").read_text())
    verdicts = set()
    for size in content["sizes"]:
        file = tmp_path / "study" / size["folder"] / "summary.json"
        summary = json.loads(file.read_text())
        assert summary["findings"]["headline"] in text
        assert size["chance"] == summary["chance"]["mean"]
        # In the recipe's order, whichever is better.
        one, two = size["arms"]
        rows = {row["arm"]: row for row in summary["arms"]}
        for arm in (one, two):
            mean = rows[arm["arm"]]["mean"]
            assert arm["score"] == mean["score"]
            assert arm["interval"] == mean["interval"]
            low, high = mean["interval"]
            assert f"{100 * mean['score']:.1f} {100 * low:.1f} to {100 * high:.1f}" in text
        versus = rows["two"]["versus_baseline"]
        assert two["difference"] == versus["difference"]
        assert two["difference_interval"] == versus["interval"]
        low, high = versus["interval"]
        difference = f"{100 * versus['difference']:+.1f} {100 * low:+.1f} to {100 * high:+.1f}"
        assert f"{difference} {versus['verdict']}".replace("-", "−") in text
        verdicts.add(two["verdict"])
        assert one["verdict"] is None
    assert verdicts == {"tie", "better"}
    assert content["headline"] in text
    assert "Unfinished" not in text


def test_sizes_without_results_are_named(sized: dict[str, Any], tmp_path: Path) -> None:
    """A summary that another recipe has left there is no result."""
    made_up_sizes(tmp_path / "study")
    recipe = load_recipe(write_recipe(tmp_path, sized))
    page = write_sizes_report(recipe, tmp_path / "study", finished=[8])
    text = words(page)
    assert "Unfinished: 2, 4 samples have no result yet" in text
    assert "size-4" not in page.read_text()


def test_a_size_is_the_study_of_its_subset(sized: dict[str, Any], tmp_path: Path) -> None:
    """Its runs have the names and results of that study's."""
    study(write_recipe(tmp_path, {**sized, "data_sizes": [2, 4]}), output=tmp_path / "sizes")
    del sized["data_sizes"]
    study(write_recipe(tmp_path, with_subset(sized, 4)), output=tmp_path / "alone")

    of_size = read_results(tmp_path / "sizes" / "size-4")
    alone = read_results(tmp_path / "alone")
    assert [run["folder"] for run in of_size] == [run["folder"] for run in alone]
    assert [run["losses"] for run in of_size] == [run["losses"] for run in alone]


def test_pictures_are_encoded_once_for_all_sizes(
    sized: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def counting(recipe: Recipe) -> Encoder:
        encoder = encoder_for(recipe)
        return CountingEncoder(encoder.tower, encoder.layers, recipe.token_grid).eval()

    monkeypatch.setattr("layerfuse.study.encode.encoder_for", counting)
    monkeypatch.setattr(CountingEncoder, "seen", 0)
    monkeypatch.setattr(CountingEncoder, "batches_left", 1000)

    study(write_recipe(tmp_path, {**sized, "seeds": [0]}), output=tmp_path / "study")

    assert CountingEncoder.seen == 8


def test_with_epochs_the_page_says_that_steps_grow(sized: dict[str, Any], tmp_path: Path) -> None:
    stage = sized["stages"]["align"]
    del stage["steps"]
    stage["epochs"] = 2
    stage["batch_size"] = 2
    sized["data_sizes"] = [2, 8]
    sized["seeds"] = [0]
    sized["arms"] = sized["arms"][:1]

    page = study(write_recipe(tmp_path, sized), output=tmp_path / "study")

    content = json.loads((tmp_path / "study" / "data_sizes.json").read_text())
    assert [size["steps"] for size in content["sizes"]] == [2, 8]
    text = words(page)
    assert "2 passes over its samples (epochs is fixed)" in text
    assert "95 % intervals over pictures," in text
    assert "one seed an arm: scores only, no verdict" in text


def test_verbs_of_one_size_ask_for_one(sized: dict[str, Any], tmp_path: Path) -> None:
    file = write_recipe(tmp_path, sized)
    advice = r"data_sizes=null stages\.align\.data\.subset=8"
    with pytest.raises(LayerfuseError, match=f"layerfuse train.*{advice}"):
        train(file, arm="one", output=tmp_path / "run")
    assert not (tmp_path / "run").exists()

    overrides = ("data_sizes=null", "stages.align.data.subset=8")
    assert train(file, overrides, arm="one", output=tmp_path / "run").model.is_dir()


def test_pages_of_two_kinds_of_studies_do_not_replace_each_other(
    recipe: dict[str, Any], sized: dict[str, Any], tmp_path: Path
) -> None:
    sized["data_sizes"] = [4]
    sized["arms"] = sized["arms"][:1]
    study(write_recipe(tmp_path, sized), output=tmp_path / "sizes")
    with pytest.raises(LayerfuseError, match="holds a study over data_sizes"):
        study(write_recipe(tmp_path, recipe), output=tmp_path / "sizes")

    study(write_recipe(tmp_path, recipe), output=tmp_path / "one")
    with pytest.raises(LayerfuseError, match="holds a study without data_sizes"):
        study(write_recipe(tmp_path, sized), output=tmp_path / "one")


def test_show_prints_the_plan(sized: dict[str, Any], tmp_path: Path) -> None:
    text = io.StringIO()
    show(write_recipe(tmp_path, sized), console=Console(file=text, width=200))
    assert "2 (2 steps), 4 (2 steps), 8 (2 steps); 4 runs each, 12 in all" in text.getvalue()


@pytest.mark.parametrize(
    ("settings", "runs"),
    [
        ({"auto_seeds": {"first": 2, "maximum": 5}}, "4 to 10 runs each. The"),
        ({}, "6 to 16 runs each. The"),
    ],
)
def test_show_says_that_seeds_are_added_at_each_size(
    settings: dict[str, Any], runs: str, sized: dict[str, Any], tmp_path: Path
) -> None:
    sized["seeds"] = "auto"
    sized.update(settings)
    text = io.StringIO()

    show(write_recipe(tmp_path, sized), console=Console(file=text, width=200))

    assert runs in text.getvalue()


def test_show_counts_the_samples_of_the_subset(recipe: dict[str, Any], tmp_path: Path) -> None:
    stage = recipe["stages"]["align"]
    del stage["steps"]
    stage["batch_size"] = 2
    text = io.StringIO()
    show(write_recipe(tmp_path, with_subset(recipe, 3)), console=Console(file=text, width=70))
    said = " ".join(text.getvalue().split())
    assert "samples: 3; batch: 2; steps: 2;" in said


def made_up_size(
    samples: int, verdict: str | None, *, settled: bool = True, baseline_settled: bool = True
) -> SizedStudy:
    """A study of a baseline and one arm, with this verdict."""
    common: dict[str, Any] = {
        "seeds": [0, 1],
        "score": 0.5,
        "interval": [0.4, 0.6],
        "covers": "pictures and seeds",
        "training": "",
    }
    baseline = SizedArm(
        arm="base",
        difference=None,
        difference_interval=None,
        verdict=None,
        settled=baseline_settled,
        **common,
    )
    arm = SizedArm(
        arm="a",
        difference=0.1,
        difference_interval=[0.0, 0.2],
        verdict=verdict,
        settled=settled,
        **common,
    )
    return SizedStudy(samples, "", 1, 1.0, 4, 0.2, "", "", [baseline, arm])


def test_verdicts_that_differ_between_sizes_are_named() -> None:
    sizes = [made_up_size(100, "tie"), made_up_size(1000, "better"), made_up_size(2000, "better")]
    assert verdict_sentence(sizes, "base") == (
        "Against base, verdicts differ between sizes: a (tie at 100, better at 1,000 and 2,000)."
    )
    assert "the same verdict at all sizes" in verdict_sentence(sizes[1:], "base")


@pytest.mark.parametrize("untrained", ["settled", "baseline_settled"])
def test_an_arm_that_was_not_trained_long_enough_gets_no_verdict(untrained: str) -> None:
    sizes = [made_up_size(100, "worse", **{untrained: False}), made_up_size(1000, "better")]
    sentence = verdict_sentence(sizes, "base")
    assert "a (not trained long enough to say at 100, better at 1,000)" in sentence
    assert "worse" not in sentence


def test_the_page_gives_such_an_arm_no_verdict_either(tmp_path: Path) -> None:
    """Headline and table say the same of each size."""
    sizes = [
        made_up_size(100, "tie", settled=False),
        made_up_size(500, "worse", baseline_settled=False),
        made_up_size(1000, "better"),
        made_up_size(2000, "unjudged", settled=False),
    ]
    headline = verdict_sentence(sizes, "base")
    report = SizesReport("name", "align", "base", headline, "", "", [], sizes)
    draw_sizes(sizes, tmp_path / "figures")

    html = write_sizes_page(report, "", tmp_path).read_text()

    (table,) = re.findall(r'<h2 id="differences">.*?</table>', html, re.DOTALL)
    said = re.findall(r'<span class="(?:chip.*?|quiet)">(.*?)</span>', table)
    assert said == ["not settled", "not settled", "better", "one seed: no verdict"]
    assert "not trained long enough to say at 100 and 500" in headline


def test_one_seed_gives_no_verdict() -> None:
    sizes = [made_up_size(100, "unjudged"), made_up_size(1000, "unjudged")]
    assert "one seed an arm" in verdict_sentence(sizes, "base")


def test_the_figure_draws_scores_and_intervals_at_each_size() -> None:
    ax = Figure().subplots()
    shares = [plots.Share(0.5, [0.4, 0.6]), plots.Share(0.75, [0.7, 0.8])]
    curve = plots.SizeCurve("a", 0, samples=[100, 1000], shares=shares)

    plots.plot_data_sizes([curve], 0.25, ax)

    line, chance = ax.lines
    assert np.asarray(line.get_xydata()).tolist() == [[100, 50], [1000, 75]]
    assert set(np.asarray(chance.get_ydata())) == {25.0}
    assert ax.get_xscale() == "log"
    assert [label.get_text() for label in ax.get_xticklabels()] == ["100", "1,000"]
    (bars,) = ax.collections
    assert isinstance(bars, LineCollection)
    drawn_bars = [np.asarray(segment).tolist() for segment in bars.get_segments()]
    assert drawn_bars == [[[100, 40], [100, 60]], [[1000, 70], [1000, 80]]]
