"""Judging arms by one trained teacher."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModel
from typer.testing import CliRunner

from layerfuse.cli import app
from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.records import PREDICTIONS
from layerfuse.evaluate.score_table import Bootstrap
from layerfuse.fusion import FUSIONS, TextRouted
from layerfuse.fusion.text_routed import TextRoutedConfig
from layerfuse.study.coordinate import study, train
from layerfuse.study.screen import screen
from layerfuse.study.screen_report import (
    ArmFit,
    ScreenedArm,
    ScreenedRun,
    correlation_with_training,
    screened_arms,
)
from layerfuse.vision.features import Features
from tests import tiny
from tests.made_up import answer_record
from tests.studies import one_line, read_results, read_samples, write_recipe, write_samples


def arm(name: str, layers: Any, fusion: str, **options: Any) -> dict[str, Any]:
    """An arm of a recipe."""
    return {"name": name, "layers": layers, "fusion": {"name": fusion, **options}}


def screened(path: Path, output: Path, **options: Any) -> dict[str, Any]:
    """What a screening writes."""
    file = screen(path, output=output, console=Console(quiet=True), **options)
    return json.loads(file.read_text())


def times_of_answers(folder: Path) -> dict[Path, int]:
    """When each arm was asked, in ns. An arm that is asked again is written again."""
    times = {}
    for file in folder.glob(f"arms/**/{PREDICTIONS}"):
        times[file] = file.stat().st_mtime_ns
    return times


@pytest.fixture
def file(recipe: dict[str, Any], tmp_path: Path) -> Path:
    """A recipe of two arms of tiny models, of which `two` reads more layers."""
    return write_recipe(tmp_path, recipe)


@pytest.fixture
def quick_learners(recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """An arm with one Linear for a projector, that learns which pictures are dark."""
    samples = read_samples(tmp_path)
    for number, sample in enumerate(samples):
        # Number 0 is black, number 7 the reddest.
        sample["conversations"][1]["value"] = "dark" if number < 4 else "red"
    write_samples(tmp_path, samples)
    recipe["fusion_defaults"] = {
        "projector": "linear",
        "normalize": "standardize",
        "token_scale": 10,
    }
    recipe["arms"] = [arm("both", [1, 3], "concat")]
    recipe["llm"] = {"model": recipe["llm"], "blocks": 1}
    stage = {"learning_rates": {"fusion": 0.01, "llm": 0.01}, "batch_size": 8, "steps": 40}
    recipe["stages"]["align"].update(stage)
    recipe["evaluate"]["max_new_tokens"] = 4
    return recipe


def test_an_arm_with_the_layers_of_the_teacher_becomes_the_teacher(
    quick_learners: dict[str, Any], tmp_path: Path
) -> None:
    """Its Linear can write the same tokens, from whatever it begins."""
    path = write_recipe(tmp_path, quick_learners)
    teacher = train(path, output=tmp_path / "run", console=Console(quiet=True)).model
    # Initialised as the teacher was not: without the fit, some would call dark what is red.
    quick_learners["seeds"] = [1, 2, 3]
    quick_learners["arms"][0] = arm("the other way round", [3, 1], "concat")

    found = screened(
        write_recipe(tmp_path, quick_learners), tmp_path / "screen", teacher=str(teacher)
    )

    assert found["teacher"]["accuracy"] == 1
    (judged,) = found["arms"]
    assert judged["r2"] > 0.999
    assert judged["by_seed"] == {"1": 1, "2": 1, "3": 1}
    assert judged["interval"] == found["teacher"]["interval"]


def test_arms_that_cannot_be_judged_are_named(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["arms"] += [
        arm("added", [1], "inject_add", base=3),
        arm("attended", [1, 2], "deformable", base=3),
        arm("appended", [1], "token_concat", base=3),
        arm("routed", [1, 2], "text_routed", base=3),
    ]

    found = screened(write_recipe(tmp_path, recipe), tmp_path / "screen", teacher="two")

    uniform = {judged["arm"]: judged["uniform"] for judged in found["arms"]}
    # Nothing has trained its router: all layers weigh the same.
    assert uniform == {"one": False, "two": False, "routed": True}
    assert set(found["left_out"]) == {"added", "attended", "appended"}
    assert "inside the LLM" in found["left_out"]["added"]
    assert "do not depend on layer 1, 2" in found["left_out"]["attended"]
    assert found["left_out"]["appended"] == "it makes 18 tokens of a picture, the teacher 16"


class Unasked(TextRouted):
    """A guided strategy that must not be guided."""

    def allocate(self, features: Features, instruction: torch.Tensor) -> torch.Tensor:
        raise AssertionError("what was not trained to guide has guided")


def test_untrained_guidance_is_not_asked(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guided strategies are judged by equal weights, also when the questions are answered."""
    monkeypatch.setitem(FUSIONS, "unasked", (TextRoutedConfig, Unasked))
    recipe["arms"].append(arm("guided", [1, 2], "unasked", base=3))

    found = screened(write_recipe(tmp_path, recipe), tmp_path / "screen", teacher="two")

    uniform = {judged["arm"]: judged["uniform"] for judged in found["arms"]}
    assert uniform["guided"]


def test_arms_are_scored_over_seeds_the_best_first() -> None:
    config = tiny.model("single", layers=[3]).config
    fit = ArmFit(r2=0.5, strength=0.1, seconds=2.0)
    runs = []
    # Two questions about a picture each.
    for name, seed, right in (("low", 0, 0), ("high", 0, 2), ("low", 1, 1), ("high", 1, 1)):
        answers = []
        for number in range(2):
            sample = str(number)
            answers.append(answer_record(sample, sample=sample, right=number < right))
        runs.append(ScreenedRun(name, seed, replace(fit, r2=0.5 + seed / 4), answers))

    high, low = screened_arms(
        runs,
        {"low": config, "high": config},
        {"low": 0.3},
        Bootstrap(resamples=100, seed=0),
    )

    assert high.arm == "high"
    assert high.accuracy == 0.75
    assert high.by_seed == {0: 1.0, 1: 0.5}
    assert high.trained is None
    assert low.accuracy == 0.25
    assert low.trained == 0.3
    assert low.r2 == pytest.approx(0.625)
    assert low.seconds == 2.0
    assert low.layers == [3]


def test_what_was_screened_is_not_screened_again(file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "screen"
    found = screened(file, folder)
    before = times_of_answers(folder)
    # A kill during the questions leaves the fit alone.
    (killed,) = [answers for answers in before if "one.seed" in str(answers)]
    killed.unlink()

    again = screened(file, folder)

    after = times_of_answers(folder)
    repeated = [answers for answers in before if after[answers] != before[answers]]
    assert repeated == [killed]
    for judged in [*found["arms"], *again["arms"]]:
        del judged["seconds"]
    assert again == found


def test_validation_questions_are_asked_where_there_are_any(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    """What is chosen by a screening is then not chosen by the test."""
    folder = tmp_path / "screen"
    found = screened(write_recipe(tmp_path, recipe), folder)
    assert found["asked"] == "evaluate"
    assert found["questions"] == 8
    recipe["evaluate"]["validation"] = {"path": "data.json", "limit": 6}

    # In the same folder: earlier answers are to other questions.
    again = screened(write_recipe(tmp_path, recipe), folder)

    assert again["asked"] == "validation"
    assert again["questions"] == again["pictures"] == 6


def test_each_seed_has_a_teacher_of_its_own(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["seeds"] = [3, 5]

    found = screened(write_recipe(tmp_path, recipe), tmp_path / "screen")

    for judged in [found["teacher"], *found["arms"]]:
        assert set(judged["by_seed"]) == {"3", "5"}
        mean = sum(judged["by_seed"].values()) / 2
        assert judged["accuracy"] == pytest.approx(mean)
    assert len(list(tmp_path.glob("screen/teacher/arms/two.seed*"))) == 2


def test_where_seeds_are_added_the_first_ones_are_screened(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe["seeds"] = "auto"
    recipe["auto_seeds"] = {"first": 2, "maximum": 5}

    found = screened(write_recipe(tmp_path, recipe), tmp_path / "screen")

    assert set(found["teacher"]["by_seed"]) == {"0", "1"}


def test_a_finished_study_lends_its_teacher_and_its_scores(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe["keep_models"] = "all"
    path = write_recipe(tmp_path, recipe)
    folder = tmp_path / "study"
    study(path, output=folder, console=Console(quiet=True))

    found = screened(path, folder / "screen", study=folder)

    assert not (folder / "screen" / "teacher").exists()
    trained = {result["arm"]: result["scores"]["mean"] for result in read_results(folder)}
    assert {judged["arm"]: judged["trained"] for judged in found["arms"]} == trained
    # The scores of another selection under the same name are not compared.
    recipe["arms"][0]["layers"] = [2]
    other = screened(write_recipe(tmp_path, recipe), folder / "other", study=folder)
    compared = {judged["arm"]: judged["trained"] for judged in other["arms"]}
    assert compared == {"one": None, "two": trained["two"]}


def test_the_correlation_leaves_out_the_teachers_own_arm() -> None:
    arms = []
    accuracies = [(0.1, 0.5), (0.2, 0.6), (0.3, 0.8), (0.4, 0.7), (0.9, 0.1)]
    for layer, (accuracy, trained) in enumerate(accuracies):
        arms.append(
            ScreenedArm(
                arm=f"layer {layer}",
                layers=[layer],
                fusion={"name": "single"},
                uniform=False,
                accuracy=accuracy,
                interval=None,
                by_seed={},
                r2=None,
                strengths={},
                seconds=None,
                trained=trained,
            )
        )
    # A model that the user gave is called by its folder.
    teacher = replace(arms[4], arm="runs/other/model")

    correlation = correlation_with_training(arms, teacher)

    # Of four arms two neighbours change places: rho = 1 - 6 · 2 / (4 · 15).
    assert correlation is not None
    assert correlation.n == 4
    assert correlation.rho == pytest.approx(0.8)
    # An arm that was not trained has no pair.
    arms[0] = replace(arms[0], trained=None)
    assert correlation_with_training(arms, teacher) is None


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (
            "three",
            "neither an arm of the recipe nor the folder .* arms that can teach: 'one', 'two'",
        ),
        ("added", "'added' cannot teach: it works inside the LLM"),
        ("routed", "'routed' cannot teach: it is guided"),
    ],
)
def test_arms_that_cannot_teach(
    teacher: str, message: str, recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe["arms"].append(arm("added", [1], "inject_add", base=3))
    recipe["arms"].append(arm("routed", [1, 2], "text_routed", base=3))

    with pytest.raises(LayerfuseError, match=message):
        screened(write_recipe(tmp_path, recipe), tmp_path / "screen", teacher=teacher)

    assert not (tmp_path / "screen").exists()


def test_a_given_model_teaches_and_one_of_other_models_does_not(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    path = write_recipe(tmp_path, recipe)
    overrides = ("arms=[{name: wide, layers: [0, 2, 4], fusion: {name: concat}}]",)
    model = train(path, overrides, output=tmp_path / "run", console=Console(quiet=True)).model

    found = screened(path, tmp_path / "screen", teacher=str(model))

    # Its layers are none that an arm of the recipe reads.
    assert found["teacher"]["layers"] == [0, 2, 4]
    assert {judged["arm"] for judged in found["arms"]} == {"one", "two"}
    for changes, message in (
        (("token_grid=[2, 2]",), r"token_grid None, not \[2, 2\]"),
        (("llm.blocks=2",), "another LLM than the first 2 blocks of"),
    ):
        with pytest.raises(LayerfuseError, match=message):
            screen(path, changes, teacher=str(model), output=tmp_path / "refused")
    # Of the same shape, with weights of its own.
    torch.manual_seed(1)
    AutoModel.from_config(tiny.vision_config("dinov2")).save_pretrained(tmp_path / "encoder")
    with pytest.raises(LayerfuseError, match="other weights of the encoder"):
        screened(path, tmp_path / "refused", teacher=str(model))
    assert not (tmp_path / "refused").exists()


def test_recipes_that_cannot_be_screened(recipe: dict[str, Any], tmp_path: Path) -> None:
    path = write_recipe(tmp_path, recipe)
    for override, message in (
        ("stages.align.learning_rates.vision=0.1", "stage 'align' trains vision"),
        ("stages.align.data.limit=4", "needs at least 5 of them; there are 4"),
        ("arms=[{layers: [1], fusion: {name: inject_add, base: 3}}]", "no arm .* can teach"),
    ):
        with pytest.raises(LayerfuseError, match=message):
            screen(path, (override,), output=tmp_path / "screen", console=Console(quiet=True))

    assert not (tmp_path / "screen").exists()


def test_the_verb_prints_a_row_for_each_arm(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe["arms"].append(arm("added", [1], "inject_add", base=3))
    path = write_recipe(tmp_path, recipe)
    # The default folder is relative to the current one.
    monkeypatch.chdir(tmp_path)

    ended = CliRunner().invoke(app, ["screen", str(path), "--teacher", "two"])

    assert ended.exit_code == 0, ended.output
    said = one_line(ended)
    assert "two (teacher)" in said
    assert "added is not judged: it works inside the LLM" in said
    assert "8 questions of evaluate about 8 pictures" in said
    assert "screening: runs/tiny/screen/screen.json" in said
    assert Path("runs/tiny/screen/screen.json").is_file()
