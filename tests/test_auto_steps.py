"""`steps: auto`: which budgets a study trains, when it ends, and what it says of them."""

import io
import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from layerfuse.cost.recipe_table import show
from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.learning_status import can_judge_gain
from layerfuse.recipe.growing import AutoSteps
from layerfuse.recipe.reader import load_recipe
from layerfuse.study import execute
from layerfuse.study.budgets import (
    ArmAtBudget,
    StepBudget,
    StepBudgets,
    order_sentence,
    refuse_undecidable,
)
from layerfuse.study.check import load_checked
from layerfuse.study.coordinate import study, train
from layerfuse.study.plan import runs
from layerfuse.study.report import write_report
from tests.made_up_runs import made_up_runs, read_summary, run_study, seeds_by_arm
from tests.studies import (
    comparable_results,
    read_results,
    read_samples,
    times_of_results,
    write_recipe,
    write_samples,
)

RATES = {"one": 0.5, "two": 0.7}
RULE = {"first": 4, "maximum": 16}


def auto(recipe: dict[str, Any], folder: Path, **rule: Any) -> Path:
    """The recipe with `steps: auto`, budgets of 4, 8 and 16 steps and validation data."""
    recipe["stages"]["align"]["steps"] = "auto"
    recipe["auto_steps"] = {**RULE, **rule}
    recipe["evaluate"]["validation"] = {"path": "data.json"}
    recipe["statistics"] = {"resamples": 200}
    return write_recipe(folder, recipe)


def read_budgets(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "budgets.json").read_text())


def budgets_by_arm(folder: Path) -> dict[str, list[int]]:
    """The steps with which a study trained each arm."""
    steps: dict[str, list[int]] = {}
    for budget in read_budgets(folder)["budgets"]:
        for arm in budget["arms"]:
            steps.setdefault(arm["arm"], []).append(budget["steps"])
    return steps


def steps_of_results(folder: Path) -> dict[str, int]:
    """The steps of the runs whose results are the study's."""
    return {result["arm"]: len(result["losses"]["align"]) for result in read_results(folder)}


def words(page: Path) -> str:
    """What a page says, without its drawings, in one line."""
    text = re.sub(r"<(style|script|svg).*?</\1>", " ", page.read_text(), flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", text)).split())


# When a study ends.


def test_a_study_ends_at_the_first_budget_that_is_enough_for_all(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up = made_up_runs(monkeypatch, RATES, {"one": 4, "two": 8})
    recipe["seeds"] = [0, 1]
    folder = tmp_path / "study"

    said = run_study(auto(recipe, tmp_path), folder)

    assert made_up.done == [
        f"{arm} · seed {seed} · {steps} steps"
        for steps in (4, 8)
        for seed in (0, 1)
        for arm in ("one", "two")
    ]
    assert budgets_by_arm(folder) == {"one": [4, 8], "two": [4, 8]}
    assert steps_of_results(folder) == {"one": 8, "two": 8}
    assert read_summary(folder)["runs"] == 4
    assert "4 steps are not enough for two: all arms are trained again with more" in said
    assert "8 steps: no arm is known to need more" in said
    training = read_summary(folder)["findings"]["training"]
    assert "doubled from 4 until no arm was known to need more, which is so at 8." in training


def test_one_budget_can_be_enough(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up = made_up_runs(monkeypatch, RATES, {"one": 4, "two": 4})
    folder = tmp_path / "study"

    run_study(auto(recipe, tmp_path), folder)

    assert len(made_up.done) == 2
    assert budgets_by_arm(folder) == {"one": [4], "two": [4]}
    assert "changed places" not in read_summary(folder)["findings"]["training"]


@pytest.mark.parametrize("maximum", [16, 12])
def test_what_is_never_enough_goes_to_the_maximum(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, maximum: int
) -> None:
    """The maximum is the last budget, twice the one before or not."""
    made_up_runs(monkeypatch, RATES, {"one": 4, "two": 1000})
    folder = tmp_path / "study"

    said = run_study(auto(recipe, tmp_path, maximum=maximum), folder)

    assert budgets_by_arm(folder) == {"one": [4, 8, maximum], "two": [4, 8, maximum]}
    assert steps_of_results(folder) == {"one": maximum, "two": maximum}
    assert f"{maximum} steps are not enough for two; these were the most" in said
    training = read_summary(folder)["findings"]["training"]
    assert f"to {maximum}, the most that were allowed; they are not enough for two." in training


def test_without_validation_data_the_training_losses_decide(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answers repeat often enough to know the loss of guessing."""
    write_samples(tmp_path, 3 * read_samples(tmp_path))
    made_up_runs(monkeypatch, RATES, {"one": 8, "two": 4})
    auto(recipe, tmp_path)
    del recipe["evaluate"]["validation"]
    folder = tmp_path / "study"

    run_study(write_recipe(tmp_path, recipe), folder)

    assert budgets_by_arm(folder) == {"one": [4, 8], "two": [4, 8]}
    states = [arm["state"] for arm in read_budgets(folder)["budgets"][0]["arms"]]
    assert states == ["still improving", "flat"]
    assert read_budgets(folder)["budgets"][0]["arms"][0]["validation"] is None


def test_arms_that_have_enough_keep_their_steps_where_asked(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe["arms"].append({"name": "three", "layers": [2], "fusion": {"name": "single"}})
    rates = {**RATES, "three": 0.4}
    made_up = made_up_runs(monkeypatch, rates, {"one": 16, "two": 4, "three": 8})
    folder = tmp_path / "study"

    said = run_study(auto(recipe, tmp_path, same_for_all=False), folder)

    assert budgets_by_arm(folder) == {"one": [4, 8, 16], "two": [4], "three": [4, 8]}
    assert len(made_up.done) == 6
    assert steps_of_results(folder) == {"one": 16, "two": 4, "three": 8}
    # In the recipe's order, by which figures tell arms apart.
    assert list(steps_of_results(folder)) == ["one", "two", "three"]
    assert "4 steps are not enough for one, three: trained again with more" in said
    page = words(folder / "report.html")
    for arm, steps in steps_of_results(folder).items():
        assert f"{arm} layer 3; 1 seed; {steps} steps" in page
    assert "Each arm keeps the first steps that are enough for it" in page


# What a study that was stopped does.


@pytest.mark.parametrize("stopped_after", [0, 2, 4, 5, 9])
@pytest.mark.parametrize("same_for_all", [True, False])
def test_a_stopped_study_decides_as_one_that_was_not(
    recipe: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stopped_after: int,
    same_for_all: bool,
) -> None:
    recipe["seeds"] = [0, 1]
    made_up = made_up_runs(monkeypatch, RATES, {"one": 8, "two": 16})
    path = auto(recipe, tmp_path, same_for_all=same_for_all)
    whole = tmp_path / "whole"
    run_study(path, whole)
    in_order = made_up.done
    assert len(in_order) == (12 if same_for_all else 10)

    stopped = tmp_path / "stopped"
    made_up.stop_and_continue(path, stopped, stopped_after)

    # No run was done twice, and none that the other study did without.
    assert made_up.done == in_order
    assert comparable_results(stopped) == comparable_results(whole)
    assert read_budgets(stopped) == read_budgets(whole)
    assert read_summary(stopped) == read_summary(whole)


def test_a_finished_study_goes_on_with_a_higher_maximum(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up = made_up_runs(monkeypatch, RATES, {"one": 4, "two": 16})
    folder = tmp_path / "study"
    run_study(auto(recipe, tmp_path, maximum=8), folder)
    assert len(made_up.done) == 4

    run_study(auto(recipe, tmp_path, maximum=32), folder)

    assert [name.split(" · ")[2] for name in made_up.done[4:]] == ["16 steps", "16 steps"]
    assert budgets_by_arm(folder)["one"] == [4, 8, 16]


def test_a_report_in_the_middle_of_a_budget_says_that_it_goes_on(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up = made_up_runs(monkeypatch, RATES, {"one": 8, "two": 8})
    made_up.allowed = 3
    folder = tmp_path / "study"
    with pytest.raises(LayerfuseError, match="stopped"):
        run_study(auto(recipe, tmp_path), folder)

    write_report(folder)

    assert "Unfinished: two has no result yet" in words(folder / "report.html")
    training = read_summary(folder)["findings"]["training"]
    assert "are doubled from 4 to 16 at most; 4 are not enough for one, two." in training


def test_a_recipe_with_a_number_takes_over_the_runs_and_not_the_table(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up = made_up_runs(monkeypatch, RATES, {"one": 8, "two": 8})
    folder = tmp_path / "study"
    run_study(auto(recipe, tmp_path), folder)
    del recipe["auto_steps"]
    recipe["stages"]["align"]["steps"] = 4
    made_up.done = []

    run_study(write_recipe(tmp_path, recipe), folder)

    assert made_up.done == []
    assert steps_of_results(folder) == {"one": 4, "two": 4}
    assert "budgets" not in read_summary(folder)
    assert "What more steps did" not in words(folder / "report.html")


# What is kept and shown.


def test_the_reports_table_is_budgets_json(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe["seeds"] = [0, 1]
    made_up_runs(monkeypatch, RATES, {"one": 4, "two": 8})
    folder = tmp_path / "study"

    run_study(auto(recipe, tmp_path), folder)

    content = read_budgets(folder)
    assert read_summary(folder)["budgets"] == content
    html = (folder / "report.html").read_text()
    (table,) = re.findall(r'<table class="budgets">.*?</table>', html, flags=re.DOTALL)
    rows = re.findall(r"<tr>(.*?)</tr>", table, flags=re.DOTALL)
    assert re.findall("<th .*?>(.*?)</th>", rows[0]) == ["Arm", "4 steps", "8 steps"]
    for place, row in enumerate(rows[1:]):
        expected = []
        for budget in content["budgets"]:
            arm = budget["arms"][place]
            assert f">{arm['arm']}</th>" in row
            expected.append(
                f"{100 * arm['test']:.1f} validation {100 * arm['validation']:.1f} {arm['state']}"
            )
        cells = re.findall("<td>(.*?)</td>", row)
        assert [" ".join(re.sub("<[^>]+>", " ", cell).split()) for cell in cells] == expected
    assert len(rows) == 3
    # The last budget's are the study's own numbers.
    scores = {arm["arm"]: arm["mean"]["score"] for arm in read_summary(folder)["arms"]}
    for arm in content["budgets"][-1]["arms"]:
        assert arm["test"] == pytest.approx(scores[arm["arm"]])
        assert arm["validation"] == pytest.approx(0.4 + 0.005 + 0.008)
        assert arm["seeds"] == 2


def made_up_budgets(*scores: dict[str, float]) -> StepBudgets:
    """Budgets of 4, 8, ... steps with these test scores."""
    budgets = []
    for place, of_budget in enumerate(scores):
        arms = []
        for arm, score in of_budget.items():
            arms.append(ArmAtBudget(arm, 1, "flat", settled=True, validation=None, test=score))
        budgets.append(StepBudget(4 * 2**place, arms))
    return StepBudgets("align", 4, 16, same_for_all=True, budgets=budgets)


def test_arms_that_change_places_are_named() -> None:
    first = {"a": 0.1, "b": 0.2, "c": 0.3}
    assert order_sentence(made_up_budgets(first)) == ""
    assert order_sentence(made_up_budgets({"a": 0.1}, {"a": 0.5})) == ""
    same = made_up_budgets(first, {"a": 0.4, "b": 0.5, "c": 0.6})
    assert order_sentence(same) == "No two arms changed places between 4 and 8 steps."
    other = made_up_budgets(first, first, {"a": 0.5, "b": 0.4, "c": 0.6})
    assert order_sentence(other).startswith(
        "1 of 3 pairs of arms changed places between 8 and 16 steps: a and b."
    )


@pytest.mark.parametrize(("keep", "left"), [("best", 1), ("none", 0), ("all", 4)])
def test_models_of_earlier_budgets_stay_only_where_all_do(
    recipe: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    keep: str,
    left: int,
) -> None:
    made_up_runs(monkeypatch, RATES, {"one": 4, "two": 8})
    recipe["keep_models"] = keep
    folder = tmp_path / "study"

    run_study(auto(recipe, tmp_path), folder)

    models = list(folder.glob("arms/*/model"))
    assert len(models) == left
    if keep == "best":
        best = max(read_results(folder), key=lambda result: result["scores"]["mean"])
        assert models == [folder / best["folder"] / "model"]


# With what else a recipe chooses.


def test_seeds_are_added_to_the_last_budget_alone(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up = made_up_runs(monkeypatch, {"one": 0.5, "two": 0.5}, {"one": 4, "two": 8})
    recipe["seeds"] = "auto"
    recipe["auto_seeds"] = {"first": 2, "maximum": 4}
    folder = tmp_path / "study"

    run_study(auto(recipe, tmp_path), folder)

    assert seeds_by_arm(folder) == {"one": [0, 1, 2, 3], "two": [0, 1, 2, 3]}
    at_first = [name for name in made_up.done if name.endswith("· 4 steps")]
    assert len(at_first) == 4
    assert len(made_up.done) == 12
    for budget in read_budgets(folder)["budgets"]:
        assert [arm["seeds"] for arm in budget["arms"]] == [2, 2]
    assert read_summary(folder)["seed_look"]["seeds"] == 4
    assert "the mean over the first seeds" in words(folder / "report.html")


def test_each_data_size_finds_its_own_steps(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up_runs(monkeypatch, RATES, {"one": 4, "two": 8})
    recipe["data_sizes"] = [4, 8]
    folder = tmp_path / "study"

    run_study(auto(recipe, tmp_path), folder)

    for size in (4, 8):
        assert budgets_by_arm(folder / f"size-{size}") == {"one": [4, 8], "two": [4, 8]}
    content = json.loads((folder / "data_sizes.json").read_text())
    assert [size["steps"] for size in content["sizes"]] == [8, 8]
    assert [size["passes"] for size in content["sizes"]] == [8, 4]
    assert "known to need no more steps, from 4 to 16 steps of 4 samples" in content["length"]


def test_other_processes_and_readers_find_all_runs_by_the_folders_recipe(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up_runs(monkeypatch, RATES, {"one": 4, "two": 8})
    folder = tmp_path / "study"
    run_study(auto(recipe, tmp_path), folder)

    written = load_recipe(folder / "recipe.yaml")
    opened = execute.open_study(folder, [])

    assert written.step_rule == AutoSteps(first=4, maximum=16)
    assert len(opened.runs) == 6
    for file in times_of_results(folder):
        of_file = opened.run_of(str(file.parent.relative_to(folder)))
        trained = json.loads(file.read_text())["losses"]["align"]
        assert of_file.steps == len(trained)
        assert of_file.recipe(written).stages["align"].steps == len(trained)


def test_real_runs_are_those_of_a_number(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Trained, not made up: each budget anew, by its whole schedule, with its points along."""
    # The loss of guessing is then known, and two steps do not reach it: the study goes on.
    write_samples(tmp_path, 3 * read_samples(tmp_path))
    folder = tmp_path / "study"
    path = auto(recipe, tmp_path, first=1, maximum=2)
    study(path, output=folder)
    times = times_of_results(folder)
    assert len(times) == 4
    study(path, output=folder)
    assert times_of_results(folder) == times

    del recipe["auto_steps"]
    recipe["stages"]["align"]["steps"] = 2
    study(write_recipe(tmp_path, recipe), output=tmp_path / "number")

    # Equal to the last bit, names of folders among it.
    assert comparable_results(folder) == comparable_results(tmp_path / "number")
    assert [point["step"] for point in read_results(folder)[0]["along"]] == [1, 1, 2, 2]


# Recipes.


def test_runs_have_the_names_that_a_number_gives(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["seeds"] = [0, 1]
    from_auto = runs(load_recipe(auto(recipe, tmp_path)), "")
    del recipe["auto_steps"]
    from_numbers = []
    for steps in (4, 8, 16):
        recipe["stages"]["align"]["steps"] = steps
        from_numbers.extend(runs(load_recipe(write_recipe(tmp_path, recipe)), ""))

    assert [run.folder for run in from_auto] == [run.folder for run in from_numbers]
    assert [run.steps for run in from_auto] == [4] * 4 + [8] * 4 + [16] * 4
    assert from_numbers[0].steps is None


@pytest.mark.parametrize(
    ("changes", "words_of_error"),
    [
        ({"steps": 4}, "auto_steps is for `steps: auto`"),
        ({"auto_steps": {"first": 8, "maximum": 4}}, "leaves no steps to add to the first 8"),
        ({"auto_steps": {"first": 4, "maximum": 4}}, "or give the stage's steps as a number"),
        ({"auto_steps": {"first": 0}}, "greater than 0"),
        ({"auto_steps": {"most": 9}}, "valid: first, maximum, same_for_all"),
        ({"steps": "automatic"}, "steps"),
        ({"steps": 0}, "greater than 0"),
        ({"earlier": True}, "for the last stage, 'finetune', alone"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(
    recipe: dict[str, Any], tmp_path: Path, changes: dict[str, Any], words_of_error: str
) -> None:
    auto(recipe, tmp_path)
    if "earlier" in changes:
        recipe["stages"]["finetune"] = {**recipe["stages"]["align"], "steps": 4}
        del recipe["auto_steps"]
    if "steps" in changes:
        recipe["stages"]["align"]["steps"] = changes["steps"]
    if "auto_steps" in changes:
        recipe["auto_steps"] = changes["auto_steps"]

    with pytest.raises(LayerfuseError) as error:
        load_recipe(write_recipe(tmp_path, recipe))

    assert words_of_error in str(error.value)


def test_the_rule_has_defaults(recipe: dict[str, Any], tmp_path: Path) -> None:
    auto(recipe, tmp_path)
    del recipe["auto_steps"]

    rule = load_recipe(write_recipe(tmp_path, recipe)).step_rule

    assert rule is not None
    assert rule.budgets == [200, 400, 800, 1600]
    assert rule.same_for_all


@pytest.mark.parametrize(
    ("evaluate", "advice"),
    [
        ({}, "give validation data"),
        ({"validation": {"path": "data.json"}, "at": [0.75]}, r"needs 1\.0 and a share from 0\.5"),
        ({"validation": {"path": "data.json"}, "at": [0.25, 1.0]}, r"needs 1\.0 and a share"),
    ],
    ids=["no validation", "no end", "no third quarter"],
)
def test_what_could_not_be_decided_is_refused_before_training(
    recipe: dict[str, Any], tmp_path: Path, evaluate: dict[str, Any], advice: str
) -> None:
    """Eight samples are too few to know how often each answer comes, as free text is."""
    auto(recipe, tmp_path)
    del recipe["evaluate"]["validation"]
    recipe["evaluate"].update(evaluate)
    path = write_recipe(tmp_path, recipe)

    with pytest.raises(LayerfuseError, match=f"stages.align.steps: auto cannot tell.*{advice}"):
        study(path, output=tmp_path / "study")

    assert not (tmp_path / "study").exists()
    # With as many samples that losses can be judged, the times do not matter.
    assert can_judge_gain([0.5, 1.0])


@pytest.mark.parametrize(("shares", "fits"), [([0.5, 1.0], False), ([0.5, 0.9, 1.0], True)])
def test_a_last_stage_without_a_moment_of_its_own_is_refused(
    recipe: dict[str, Any], tmp_path: Path, shares: list[float], fits: bool
) -> None:
    """Five steps before, and four at first: what accuracy gained since the middle of all training,
    it may have gained in the stage before."""
    auto(recipe, tmp_path)
    earlier = {**recipe["stages"]["align"], "steps": 5}
    # a name that comes first in the file
    recipe["stages"] = {"adapt": earlier, **recipe["stages"]}
    recipe["evaluate"]["at"] = shares
    path = write_recipe(tmp_path, recipe)
    checked = load_checked(load_recipe(path))
    free_text = {"adapt": 1.0, "align": None}

    def refuse() -> None:
        refuse_undecidable(load_recipe(path), free_text, checked.usable.train)

    if fits:
        refuse()
        return
    with pytest.raises(LayerfuseError, match=r"no share from 0\.5 to 0\.9 lies within it"):
        refuse()


def test_verbs_of_one_arm_ask_for_a_number(recipe: dict[str, Any], tmp_path: Path) -> None:
    path = auto(recipe, tmp_path)
    advice = r"auto_steps=null stages\.align\.steps=16"
    with pytest.raises(LayerfuseError, match=f"layerfuse train.*{advice}"):
        train(path, arm="one", output=tmp_path / "run")
    assert not (tmp_path / "run").exists()

    overrides = ("auto_steps=null", "stages.align.steps=1")
    assert train(path, overrides, arm="one", output=tmp_path / "run").model.is_dir()


def test_show_prints_the_range(recipe: dict[str, Any], tmp_path: Path) -> None:
    text = io.StringIO()
    show(auto(recipe, tmp_path), console=Console(file=text, width=200))
    said = " ".join(text.getvalue().split())
    assert "4 to 16" in said
    assert "align is trained anew with 4, 8, 16 steps" in said
    assert "all budgets together are 28" in said

    at_most = io.StringIO()
    show(
        tmp_path / "recipe.yaml",
        ("auto_steps=null", "stages.align.steps=16"),
        console=Console(file=at_most, width=200),
    )
    cost = re.findall(r"\d+\.\d+$", at_most.getvalue(), flags=re.MULTILINE)
    assert cost == re.findall(r"\d+\.\d+$", text.getvalue(), flags=re.MULTILINE)
