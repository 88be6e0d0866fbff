"""`seeds: auto`: when seeds are added, what it costs, and that the 5 % hold over all looks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks.sequential_seeds_simulation import (
    POINTS,
    RULE,
    LookedAt,
    count,
    draw,
    judge,
    unspent,
)
from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.planning import planned
from layerfuse.evaluate.seed_model import Numbers
from layerfuse.evaluate.sequential import (
    error_made,
    error_spent,
    errors_of_looks,
    level_of_look,
    resolved,
    shares_of_looks,
)
from layerfuse.evaluate.significance import (
    LEVEL,
    Competitor,
    Contrast,
    Scores,
    compare_all,
    contrast,
)
from layerfuse.evaluate.significance import judge as judge_contrasts
from layerfuse.recipe.growing import AutoSeeds
from layerfuse.recipe.reader import load_recipe
from layerfuse.study import execute
from layerfuse.study.coordinate import train
from layerfuse.study.plan import runs
from layerfuse.study.report import write_report
from tests.made_up_runs import made_up_runs, read_summary, run_study, seeds_by_arm
from tests.studies import comparable_results, read_results, write_recipe

RULES = [
    AutoSeeds(),
    AutoSeeds(first=2, maximum=3),
    AutoSeeds(first=4, maximum=12),
    AutoSeeds(first=2, maximum=40),
]


# The error of the looks.


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("comparisons", [1, 4, 9])
def test_all_looks_together_err_in_five_percent(rule: AutoSeeds, comparisons: int) -> None:
    """Also Holm's later steps, in which fewer comparisons share the level of a look."""
    shares = shares_of_looks(rule)
    errors = errors_of_looks(shares, comparisons)

    assert error_made(shares, [error / comparisons for error in errors]) == pytest.approx(
        (1 - LEVEL) / comparisons, abs=1e-9
    )
    for left in range(1, comparisons):
        assert error_made(shares, [error / left for error in errors]) <= (1 - LEVEL) / left
    # A look has a larger error than those before, and none has all of it.
    assert list(errors) == sorted(errors)
    assert errors[-1] < 1 - LEVEL


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_what_the_looks_spend_sums_to_the_error(rule: AutoSeeds) -> None:
    spent = error_spent(shares_of_looks(rule), 0.05)

    steps = np.diff(spent, prepend=0.0)
    assert (steps > 0).all()
    assert steps.sum() == pytest.approx(0.05)


def test_the_error_made_is_that_of_drawn_studies() -> None:
    """Means of growing numbers of normal runs, each judged by the levels of its look."""
    rule = AutoSeeds()
    levels = errors_of_looks(shares_of_looks(rule), 1)
    rng = np.random.default_rng(0)
    sums = rng.standard_normal((200_000, rule.maximum)).cumsum(axis=1)
    had_verdict = np.zeros(len(sums), dtype=bool)
    for look, level in enumerate(levels):
        seeds = rule.first + look
        p = 2 * stats.norm.sf(np.abs(sums[:, seeds - 1]) / np.sqrt(seeds))
        had_verdict |= p < level

    # Standard error 0.0005.
    assert had_verdict.mean() == pytest.approx(0.05, abs=0.002)


def test_a_look_with_more_seeds_has_a_lower_level() -> None:
    rule = AutoSeeds(first=3, maximum=5)
    levels = [level_of_look(rule, seeds, 2) for seeds in (3, 4, 5)]

    assert levels == sorted(levels, reverse=True)
    assert levels[-1] > LEVEL
    # An unfinished first look, and seeds of an earlier recipe.
    assert level_of_look(rule, 1, 2) == levels[0]
    assert level_of_look(rule, 9, 2) == levels[2]


# What is resolved.


def contrast_with(difference: float, half: float) -> Contrast:
    """A contrast whose 95 % interval reaches so far to either side; its error is well known."""
    error = half / 1.96
    return Contrast(
        difference=difference,
        interval=[difference - half, difference + half],
        item_interval=[difference, difference],
        error=error,
        df=1e6,
        p=2 * float(stats.norm.sf(abs(difference) / error)),
        item_p=1.0,
        covers="pictures and seeds",
        measured=True,
    )


@pytest.mark.parametrize(
    ("difference", "half", "is_resolved"),
    [
        (0.20, 0.10, True),
        (-0.20, 0.10, True),
        (0.01, 0.03, True),
        # Narrow, but it says neither which arm is better nor that they differ by less than 0.05.
        (0.03, 0.04, False),
        (0.03, 0.20, False),
    ],
)
def test_a_comparison_is_resolved_by_a_verdict_or_as_a_tie(
    difference: float, half: float, is_resolved: bool
) -> None:
    (versus,) = judge_contrasts([contrast_with(difference, half)])

    assert resolved(versus, 0.05) == is_resolved


def test_a_verdict_needs_the_level_of_the_look() -> None:
    """Beyond its 95 % interval by little."""
    versus = contrast_with(0.11, half=0.10)

    assert judge_contrasts([versus])[0].verdict == "better"
    assert judge_contrasts([versus], level=0.99)[0].verdict == "tie"


# The whole procedure, simulated.


def scores_of(drawn: LookedAt, number: int, seeds: int, level: float) -> Scores:
    """One drawn study with some seeds as the package sees it, on the scale of shares."""
    values: Numbers = 0.5 + drawn.runs[number, :, :seeds] / POINTS
    arms = len(values)
    # Resamples of all arms vary independently, exactly as much as the study's pictures say.
    rng = np.random.default_rng(0)
    drawn_samples = rng.standard_normal((60, arms))
    independent, _ = np.linalg.qr(drawn_samples - drawn_samples.mean(axis=0))
    variance = drawn.picture_variance[number] * (1 + 1 / seeds) / POINTS**2
    means = values.mean(axis=1)
    samples = means + independent * np.sqrt(variance * 59)
    chance = Competitor(score=0.0, samples=np.zeros(60))
    return Scores(means, samples, values, chance, noise=None, images=200, level=level)


def test_the_simulation_judges_as_a_study_is_judged() -> None:
    drawn = draw("shared", arms=3, studies=40)
    drawn.runs[:, 1] += 12
    for seeds in (3, 8):
        level = level_of_look(RULE, seeds, 2)
        judged = judge(drawn, seeds, 1 - level)
        for number in range(40):
            compared = compare_all(scores_of(drawn, number, seeds, level), reference=0)
            for arm, versus in compared.items():
                half = (versus.interval[1] - versus.interval[0]) / 2
                assert POINTS * half == pytest.approx(judged.halves[number, arm - 1])
                assert (versus.verdict != "tie") == judged.verdicts[number, arm - 1]


@pytest.mark.parametrize("scenario", ["equal", "unequal", "noisy baseline"])
def test_adding_seeds_makes_no_more_false_verdicts(scenario: str) -> None:
    """A small version of the benchmark: 5 % of 1,000 have a standard error of 0.7."""
    honest = count(scenario, arms=2, studies=1000)
    careless = count(scenario, arms=2, studies=1000, spending=unspent)

    assert honest.any_look <= 0.06 + 0.014
    assert honest.difference_covered >= 0.93 - 0.014
    assert honest.mean_covered >= 0.93 - 0.014
    assert careless.any_look > honest.any_look + 0.03
    # What is clear is found before the most seeds, and about as often as with all of them.
    assert honest.seeds_one < RULE.maximum - 2
    assert honest.power_one > honest.power_most - 0.03


# Studies. Their runs are made up: what is tested is which runs there are.

RATES = {"one": 0.5, "two": 0.5}


def auto(recipe: dict[str, Any], folder: Path, **rule: Any) -> Path:
    """The recipe with `seeds: auto`."""
    recipe["seeds"] = "auto"
    recipe["statistics"] = {"resamples": 200}
    if rule:
        recipe["auto_seeds"] = rule
    return write_recipe(folder, recipe)


def test_a_clear_difference_ends_the_study_early(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up_runs(monkeypatch, {"one": 0.2, "two": 0.9})
    folder = tmp_path / "study"

    said = run_study(auto(recipe, tmp_path), folder)

    seeds = seeds_by_arm(folder)
    assert seeds["one"] == seeds["two"]
    assert 3 <= len(seeds["one"]) < 8
    # The looks before the last one say that it goes on.
    looks = len(seeds["one"]) - 2
    assert f"look {looks} of at most 6, with {looks + 2} seeds: every difference" in said
    assert said.count("all arms get another seed") == looks - 1
    look = read_summary(folder)["seed_look"]
    assert look["unresolved"] == []
    assert look["level"] == level_of_look(AutoSeeds(), looks + 2, 1)
    page = (folder / "report.html").read_text()
    assert f"which is so after {looks + 2} seeds" in page
    assert "allow for 6 looks" in page
    assert "95 % hold" in page


def test_what_is_not_resolved_goes_to_the_maximum(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixty pictures are too few to tell that two equal arms differ by less than five points."""
    made_up_runs(monkeypatch, RATES)
    folder = tmp_path / "study"

    said = run_study(auto(recipe, tmp_path, first=2, maximum=4), folder)

    assert seeds_by_arm(folder) == {"one": [0, 1, 2, 3], "two": [0, 1, 2, 3]}
    assert "not resolved: two; these were the most seeds (auto_seeds.maximum)" in said
    summary = read_summary(folder)
    assert summary["seed_look"]["unresolved"] == ["two"]
    assert "to 4 at most: with these it is not so for two." in summary["findings"]["seeds"]
    assert "takes more test pictures, not more seeds" in summary["findings"]["seeds"]


def test_a_wider_difference_makes_ties_of_equal_arms(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up_runs(monkeypatch, RATES)
    folder = tmp_path / "study"

    run_study(auto(recipe, tmp_path, first=2, maximum=20, difference=0.45), folder)

    look = read_summary(folder)["seed_look"]
    assert look["seeds"] < 20
    assert look["unresolved"] == []
    (_, two) = sorted(read_summary(folder)["arms"], key=lambda arm: arm["arm"])
    assert two["versus_baseline"]["verdict"] == "tie"
    assert max(map(abs, two["versus_baseline"]["interval"])) < 0.45


@pytest.mark.parametrize("stopped_after", [0, 3, 4, 7])
def test_a_stopped_study_decides_as_one_that_was_not(
    recipe: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stopped_after: int,
) -> None:
    made_up = made_up_runs(monkeypatch, {"one": 0.45, "two": 0.57})
    path = auto(recipe, tmp_path, first=2, maximum=6)
    whole = tmp_path / "whole"
    run_study(path, whole)
    in_order = made_up.done
    # It ends by what it found, after more than one look.
    assert 8 <= len(in_order) < 12

    stopped = tmp_path / "stopped"
    made_up.stop_and_continue(path, stopped, stopped_after)

    # No run was done twice, and none that the other study did without.
    assert made_up.done == in_order
    assert comparable_results(stopped) == comparable_results(whole)
    assert read_summary(stopped) == read_summary(whole)


def test_other_processes_and_readers_find_all_runs_by_the_folders_recipe(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up_runs(monkeypatch, RATES)
    path = auto(recipe, tmp_path, first=2, maximum=4)
    folder = tmp_path / "study"
    run_study(path, folder)

    written = load_recipe(folder / "recipe.yaml")
    opened = execute.open_study(folder, [])

    assert written.seed_rule == AutoSeeds(first=2, maximum=4)
    assert len(opened.runs) == 8
    for result in read_results(folder):
        assert opened.run_of(result["folder"]).seed == result["seed"]


def test_seeds_that_another_recipe_trained_do_not_decide(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs beyond the end of the study lie in the folder, and are left out."""
    made_up = made_up_runs(monkeypatch, {"one": 0.2, "two": 0.9})
    folder = tmp_path / "study"
    recipe["seeds"] = list(range(8))
    run_study(write_recipe(tmp_path, recipe), folder)
    made_up.done = []
    alone = tmp_path / "alone"

    path = auto(recipe, tmp_path)
    run_study(path, folder)

    assert made_up.done == []
    run_study(path, alone)
    assert seeds_by_arm(folder) == seeds_by_arm(alone)
    assert read_summary(folder)["arms"] == read_summary(alone)["arms"]


def test_the_report_can_be_made_again_and_before_the_end(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up = made_up_runs(monkeypatch, RATES)
    made_up.allowed = 5
    path = auto(recipe, tmp_path, first=2, maximum=4)
    folder = tmp_path / "study"
    with pytest.raises(LayerfuseError, match="stopped"):
        run_study(path, folder)

    # Three seeds of one arm and two of the other: a look after two.
    write_report(folder)
    look = read_summary(folder)["seed_look"]
    assert (look["seeds"], look["look"], look["looks"]) == (2, 1, 3)
    assert look["level"] == level_of_look(AutoSeeds(first=2, maximum=4), 2, 1)
    assert "after 2 seeds it is not so for two" in read_summary(folder)["findings"]["seeds"]

    made_up.allowed = 10**6
    run_study(path, folder)
    before = read_summary(folder)
    write_report(folder)
    assert read_summary(folder) == before


def test_the_first_look_is_announced_before_it_can_be_taken(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up = made_up_runs(monkeypatch, RATES)
    made_up.allowed = 3
    folder = tmp_path / "study"
    with pytest.raises(LayerfuseError, match="stopped"):
        run_study(auto(recipe, tmp_path), folder)

    write_report(folder)

    assert "the first look needs 3 seeds" in read_summary(folder)["findings"]["seeds"]


def test_a_study_with_a_list_says_nothing_of_looks(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up_runs(monkeypatch, RATES)
    recipe["seeds"] = [0, 1]
    folder = tmp_path / "study"

    said = run_study(write_recipe(tmp_path, recipe), folder)

    assert "look" not in said
    summary = read_summary(folder)
    assert "seed_look" not in summary
    assert "look" not in summary["findings"]["seeds"]


def test_intervals_are_those_of_the_look(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same runs from a list have narrower ones, by the ratio of the quantiles."""
    made_up_runs(monkeypatch, RATES)
    looked_at = tmp_path / "looked_at"
    run_study(auto(recipe, tmp_path, first=2, maximum=3), looked_at)
    recipe["seeds"] = [0, 1, 2]
    del recipe["auto_seeds"]
    fixed = tmp_path / "fixed"
    run_study(write_recipe(tmp_path, recipe), fixed)

    level = read_summary(looked_at)["seed_look"]["level"]
    wide = {arm["arm"]: arm["versus_baseline"] for arm in read_summary(looked_at)["arms"]}["two"]
    narrow = {arm["arm"]: arm["versus_baseline"] for arm in read_summary(fixed)["arms"]}["two"]
    assert wide["p"] == narrow["p"]
    half = stats.t.ppf(0.5 + level / 2, wide["df"]) * wide["error"]
    assert wide["interval"][1] == pytest.approx(wide["difference"] + half)
    assert wide["interval"][1] > narrow["interval"][1]


def test_real_runs_and_a_single_one(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Trained, not made up; and `train` takes the first seed of what may be many."""
    path = auto(recipe, tmp_path, first=2, maximum=3)
    folder = tmp_path / "study"

    run_study(path, folder)
    trained = train(path, arm="two", output=tmp_path / "alone")

    assert 4 <= len(read_results(folder)) <= 6
    assert trained.record.seed == 0
    assert [result["seed"] for result in read_results(tmp_path / "alone")] == [0]


# Recipes.


def test_runs_have_the_names_that_a_list_gives(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["seeds"] = [0, 1, 2, 3]
    from_list = runs(load_recipe(write_recipe(tmp_path, recipe)), "")

    from_auto = runs(load_recipe(auto(recipe, tmp_path, first=2, maximum=4)), "")

    assert [run.folder for run in from_auto] == [run.folder for run in from_list]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seeds": [0, 1], "auto_seeds": {"first": 2}}, "auto_seeds is for `seeds: auto`"),
        ({"auto_seeds": {"first": 4, "maximum": 4}}, "leaves no seed to add"),
        ({"auto_seeds": {"first": 1}}, "greater than or equal to 2"),
        ({"auto_seeds": {"maximum": 1000}}, "less than or equal to 100"),
        ({"auto_seeds": {"difference": 0}}, "greater than 0"),
        ({"auto_seeds": {"difference": 5}}, "less than 1"),
        ({"auto_seeds": {"margin": 0.1}}, "valid: first, maximum, difference"),
        ({"baseline_seeds": [0, 1]}, "baseline_seeds with `seeds: auto`"),
        ({"seeds": "many"}, "Input should be 'auto'"),
        ({"seeds": []}, "no seed is given"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(
    recipe: dict[str, Any], tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    recipe["seeds"] = "auto"
    recipe.update(changes)

    with pytest.raises(LayerfuseError, match=words):
        load_recipe(write_recipe(tmp_path, recipe))


def test_seeds_are_added_to_all_arms_alike(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["arms"][1]["seeds"] = [0, 1]
    with pytest.raises(LayerfuseError, match="arm 'two' has seeds of its own"):
        load_recipe(auto(recipe, tmp_path))

    del recipe["arms"][1]
    with pytest.raises(LayerfuseError, match="the recipe has one arm: add another"):
        load_recipe(auto(recipe, tmp_path))


def test_show_says_how_many_runs_there_may_be(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    few_pictures = planned(load_recipe(auto(recipe, tmp_path)))
    enough = planned(load_recipe(auto(recipe, tmp_path, difference=0.3)))

    assert "Runs: 6 to 16, 3 to 8 seeds for each of 2 arms" in few_pictures
    assert "Ties will take all 8 seeds: 200 test pictures alone leave ±6.7 points" in few_pictures
    assert "test pictures alone" not in enough
    assert "with 3 seeds" in enough


def test_the_level_reaches_every_statement_about_arms() -> None:
    """A score that is looked at several times has a wider interval, too."""
    rng = np.random.default_rng(0)
    values = 0.5 + 0.03 * rng.standard_normal((2, 3))
    samples = values.mean(axis=1) + 0.01 * rng.standard_normal((500, 2))
    chance = Competitor(score=0.2, samples=np.full(500, 0.2))
    once = Scores(values.mean(axis=1), samples, values, chance, noise=None, images=100)
    several = replace(once, level=0.99)

    narrow = contrast(once, 1, 0)
    wide = contrast(several, 1, 0)

    assert wide.interval[0] < narrow.interval[0]
    assert wide.item_interval[0] < narrow.item_interval[0]
    assert wide.p == narrow.p
