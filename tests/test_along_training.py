"""Accuracy and loss along training: measured where asked, kept, and without a trace in training."""

import io
import json
import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch.nn import functional as F

from layerfuse.data.sources import load
from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.answer import Answerer
from layerfuse.evaluate.learning_curve import answer_loss, read_curve
from layerfuse.evaluate.likelihood import answer_likelihoods
from layerfuse.evaluate.questions import questions
from layerfuse.evaluate.records import RunRecord
from layerfuse.model.processor import Processor
from layerfuse.model.vlm import FusionVLM
from layerfuse.recipe.reader import load_recipe
from layerfuse.recipe.schema import Recipe
from layerfuse.study.coordinate import study
from layerfuse.train.along import AlongTraining, Moment, moments_of, undisturbed
from layerfuse.train.arm import Trained, compose, train_arm
from layerfuse.train.trainer import FusionTrainer
from tests.studies import read_results, read_samples, write_recipe, write_samples


def write_validation(folder: Path) -> None:
    """Three conversations of two questions of different lengths on the pictures of the data."""
    samples = []
    for number in range(3):
        talk = [
            {"from": "human", "value": "<image> n?" + " n" * number},
            {"from": "gpt", "value": str(number)},
            {"from": "human", "value": "What is it?"},
            {"from": "gpt", "value": "1 0"},
        ]
        sample = {"id": f"v{number}", "image": f"{number}.png", "conversations": talk}
        samples.append({**sample, "families": ["a", "b"], "categories": ["all", "all"]})
    write_samples(folder, samples, "validation.json")


@pytest.fixture
def watched(recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """One arm in two stages of 3 x 4 and 5 x 4 samples; adapters with dropout draw random numbers
    at every step."""
    write_validation(tmp_path)
    align = {
        "data": {"path": "data.json"},
        "prompt": "plain",
        "learning_rates": {"fusion": 1e-2},
        "batch_size": 4,
        "steps": 3,
    }
    finetune = {
        "data": {"path": "data.json"},
        "learning_rates": {"fusion": 1e-2, "llm": 1e-2},
        "lora": {"r": 4, "dropout": 0.3},
        "batch_size": 4,
        "steps": 5,
        "checkpoint_steps": 2,
    }
    recipe["arms"] = [recipe["arms"][1]]
    recipe["stages"] = {"align": align, "finetune": finetune}
    recipe["keep_models"] = "all"
    recipe["evaluate"]["validation"] = {"path": "validation.json"}
    return recipe


def without_validation(recipe: dict[str, Any]) -> dict[str, Any]:
    evaluate = {**recipe["evaluate"]}
    del evaluate["validation"]
    return {**recipe, "evaluate": evaluate}


def do_study(recipe: dict[str, Any], folder: Path, name: str) -> RunRecord:
    """The record of a study's only run."""
    study(write_recipe(folder, recipe), output=folder / name)
    (result,) = read_results(folder / name)
    return RunRecord.from_json(result)


def assert_same_weights(study_a: Path, study_b: Path) -> None:
    """The trained models are equal to the last bit."""
    (file_a,) = study_a.glob("arms/*/model/model.safetensors")
    (file_b,) = study_b.glob("arms/*/model/model.safetensors")
    weights_b = load_file(file_b)
    for name, weight in load_file(file_a).items():
        assert torch.equal(weight, weights_b[name]), name


@pytest.mark.parametrize("cached", [True, False])
def test_measuring_changes_nothing_of_training(
    watched: dict[str, Any],
    tmp_path: Path,
    cached: bool,
) -> None:
    watched["cache_features"] = cached
    unwatched = do_study(without_validation(watched), tmp_path, "without")

    record = do_study(watched, tmp_path, "with")

    assert record.losses == unwatched.losses
    assert record.scores == unwatched.scores
    assert_same_weights(tmp_path / "with", tmp_path / "without")
    assert unwatched.along == []
    # 32 samples in all: the first 12 in the first stage.
    steps = [(point.share, point.stage, point.step, point.samples) for point in record.along]
    assert steps == [
        (0.25, "align", 2, 8),
        (0.5, "finetune", 1, 16),
        (0.75, "finetune", 3, 24),
        (1.0, "finetune", 5, 32),
    ]
    assert set(record.along[0].families) == {"a", "b"}
    assert len({point.loss for point in record.along}) == 4


def test_pictures_that_are_not_new_are_named(watched: dict[str, Any], tmp_path: Path) -> None:
    """The three validation pictures are among the eight of training and test."""
    watched["stages"]["finetune"]["data"] = {"path": "other.json"}
    write_samples(tmp_path, read_samples(tmp_path)[3:], "other.json")
    screen = io.StringIO()

    study(
        write_recipe(tmp_path, watched),
        output=tmp_path / "study",
        console=Console(file=screen, width=300),
    )

    said = screen.getvalue()
    assert "validation: 3 of its 3 pictures are in align too; what is chosen by them" in said
    assert "validation: 3 of its 3 pictures are in evaluate too" in said
    assert "validation: 3 of its 3 pictures are in finetune too" not in said
    # The test is asked what was taught, which the report says as well.
    warning = "evaluate: 8 of its 8 pictures are in align too"
    assert f"{warning}; scores on pictures that a run trained on say little of new ones" in said
    assert warning in (tmp_path / "study" / "report.html").read_text()


def train(recipe: Recipe, folder: Path, along: AlongTraining | None = None) -> Trained:
    """Train the recipe's only arm with seed 0."""
    (arm,) = recipe.all_arms()
    samples = {name: load(stage.data) for name, stage in recipe.stages.items()}
    return train_arm(recipe, arm, 0, samples=samples, store=None, folder=folder, along=along)


def test_what_is_measured_may_draw_random_numbers_and_change_modes(
    watched: dict[str, Any],
    tmp_path: Path,
) -> None:
    recipe = load_recipe(write_recipe(tmp_path, watched))
    samples = {name: load(stage.data) for name, stage in recipe.stages.items()}
    modes = []

    def disturb(model: FusionVLM, processor: Processor, moment: Moment) -> None:
        modes.append(any(module.training for module in model.modules()))
        torch.rand(7)
        np.random.rand(7)
        random.random()
        # Of single modules too, as a library may.
        model.language_model.train()

    along = AlongTraining(moments_of(recipe, samples, [0.5, 0.75]), disturb)
    random.seed(5)
    np.random.seed(5)
    expected = train(recipe, tmp_path / "undisturbed")
    drawn = (random.random(), np.random.rand())
    random.seed(5)
    np.random.seed(5)

    trained = train(recipe, tmp_path / "disturbed", along)

    assert modes == [False, False]
    assert trained.losses == expected.losses
    weights = trained.model.state_dict()
    for name, expected_weight in expected.model.state_dict().items():
        assert torch.equal(weights[name], expected_weight), name
    assert (random.random(), np.random.rand()) == drawn


def test_every_module_gets_its_own_mode_back(watched: dict[str, Any], tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, watched))
    (arm,) = recipe.all_arms()
    model, _ = compose(recipe, arm, 0)
    model.requires_grad_(True)
    model.train()
    # As adapters that are frozen for a while.
    model.language_model.get_decoder().eval()
    modes = [module.training for module in model.modules()]

    with undisturbed(model):
        assert not any(module.training for module in model.modules())

    assert [module.training for module in model.modules()] == modes
    assert len(set(modes)) == 2


def test_moments_are_shares_of_the_samples_of_all_stages(
    watched: dict[str, Any],
    tmp_path: Path,
) -> None:
    """Batches of the stages differ; epochs have whole batches, as the trainer counts them."""
    watched["stages"]["align"].update(batch_size=2, steps=10)
    watched["stages"]["finetune"].update(batch_size=3, epochs=2.0, steps=None)
    watched["stages"]["last"] = {**watched["stages"]["align"], "batch_size": 1, "steps": 2}
    recipe = load_recipe(write_recipe(tmp_path, watched))
    samples = {name: load(stage.data) for name, stage in recipe.stages.items()}

    moments = moments_of(recipe, samples, [0.1, 0.5, 0.55, 0.96, 1.0])

    # 20 samples, two epochs of three batches of three, and two samples: 40.
    assert moments == [
        Moment(0.1, "align", 2, 4),
        Moment(0.5, "align", 10, 20),
        # The first step that reaches 22 samples.
        Moment(0.55, "finetune", 1, 23),
        Moment(0.96, "last", 1, 39),
        Moment(1.0, "last", 2, 40),
    ]


def test_points_before_a_stop_are_kept(
    watched: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped after the checkpoint of step 4: what was measured at step 3 is not measured again."""
    expected = do_study(watched, tmp_path, "whole")
    training_step = FusionTrainer.training_step

    def step_or_stop(self: FusionTrainer, *args: Any, **kwargs: Any) -> Any:
        if Path(str(self.args.output_dir)).name == "finetune" and self.state.global_step == 4:
            raise KeyboardInterrupt
        return training_step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(FusionTrainer, "training_step", step_or_stop)
        with pytest.raises(KeyboardInterrupt):
            do_study(watched, tmp_path, "stopped")
    (file,) = tmp_path.glob("stopped/arms/*/stages/along.json")
    kept = read_curve(file)
    assert kept == expected.along[:3]
    # Marked, to tell them from points that are measured again.
    marked = [replace(point, accuracy=0.125) for point in kept]
    file.write_text(json.dumps([asdict(point) for point in marked]))

    record = do_study(watched, tmp_path, "stopped")

    assert record.along == [*marked, expected.along[3]]


@torch.no_grad()
def test_the_loss_is_that_of_each_question_alone(
    watched: dict[str, Any],
    tmp_path: Path,
) -> None:
    """Against one row at a time, without padding: padded batches weigh every label alike."""
    recipe = load_recipe(write_recipe(tmp_path, watched))
    (arm,) = recipe.all_arms()
    model, processor = compose(recipe, arm, 0)
    data = recipe.evaluate.validation
    assert data is not None
    samples = load(data)
    total = 0.0
    labels = 0
    for sample in samples:
        pixels = processor.image_processor([sample.pictures[0].open()], return_tensors="pt")
        question, answer, second, last = sample.messages
        second = {"role": "user", "content": "<image>\n" + second["content"]}
        for talk in ([question, answer], [second, last]):
            row = processor.encode(talk, [processor.num_image_tokens(32, 32)], prompt="chat")
            logits = model(
                input_ids=row["input_ids"][None],
                attention_mask=torch.ones_like(row["input_ids"])[None],
                pixel_values=pixels["pixel_values"],
            ).logits[0]
            total += float(
                F.cross_entropy(logits[:-1], row["labels"][1:], reduction="sum", ignore_index=-100)
            )
            labels += int((row["labels"] != -100).sum())

    likelihoods = answer_likelihoods(
        Answerer(model, processor),
        list(questions(samples)),
        batch_size=4,
    )
    loss = answer_loss(likelihoods)

    assert loss == pytest.approx(total / labels, rel=1e-5)


def test_parts_of_two_precisions_are_measured(watched: dict[str, Any], tmp_path: Path) -> None:
    """What trains is in float32, what is frozen in bfloat16."""
    watched["dtype"] = "bfloat16"

    record = do_study(watched, tmp_path, "study")

    assert len(record.along) == 4


def test_guided_arms_are_measured_without_controls(
    watched: dict[str, Any],
    tmp_path: Path,
) -> None:
    watched["arms"] = [{"layers": [1, 2, 3], "fusion": {"name": "text_routed", "base": 4}}]

    record = do_study(watched, tmp_path, "study")

    assert len(record.along) == 4


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"at": [0.5], "validation": None}, "give `validation`"),
        ({"at": [0.5, 0.25]}, "does not grow"),
        ({"at": [0.5, 0.5]}, "does not grow"),
        ({"at": [0.0, 0.5]}, "greater than 0"),
        ({"at": [1.5]}, "less than or equal to 1"),
    ],
)
def test_wrong_moments_are_refused(
    watched: dict[str, Any],
    tmp_path: Path,
    settings: dict[str, Any],
    words: str,
) -> None:
    watched["evaluate"].update(settings)

    with pytest.raises(LayerfuseError, match=words):
        load_recipe(write_recipe(tmp_path, watched))


def test_without_moments_nothing_is_read(watched: dict[str, Any], tmp_path: Path) -> None:
    watched["evaluate"].update(at=[], validation={"path": "missing.json"})

    assert do_study(watched, tmp_path, "study").along == []


def test_processes_that_share_the_model_are_refused(
    watched: dict[str, Any],
    tmp_path: Path,
) -> None:
    watched["resources"] = {"processes": 2, "accelerate": "fsdp2"}

    with pytest.raises(LayerfuseError, match=r"evaluate\.validation needs processes that hold"):
        study(write_recipe(tmp_path, watched), output=tmp_path / "study")

    assert not (tmp_path / "study").exists()
