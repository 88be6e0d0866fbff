"""Closed sets of answers: the softmax is over the tokens of answers alone, and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from typer.testing import CliRunner

from layerfuse import FusionVLM
from layerfuse.data.sources import load
from layerfuse.recipe.reader import load_recipe
from layerfuse.train.arm import compose, train_arm
from layerfuse.train.closed_answers import ClosedAnswers
from layerfuse_cli.app import app
from tests import tiny
from tests.studies import (
    one_line,
    read_left_out,
    read_samples,
    run_study,
    write_recipe,
    write_samples,
)

ANSWERS = [2, 7, 9, 50]
"""tokens that answers are made of, the end of sequence among them"""
IMAGE_TOKENS = 16


def rows() -> dict[str, Tensor]:
    """Two rows of one image each, with text behind it."""
    torch.manual_seed(0)
    input_ids = torch.randint(5, 100, (2, 40))
    input_ids[:, :IMAGE_TOKENS] = tiny.IMAGE_ID
    pixel_values = torch.randn(2, 3, tiny.SIZE, tiny.SIZE)
    return {"input_ids": input_ids, "pixel_values": pixel_values}


def labels_of_answers() -> Tensor:
    """(2, 40) labels, all of which are tokens of answers."""
    labels = torch.full((2, 40), -100)
    labels[0, 30] = 7
    labels[0, 31] = 2
    labels[1, 35] = 50
    return labels


def naive_loss(model: FusionVLM) -> Tensor:
    """The loss of the whole head, all other tokens struck out of its logits."""
    logits = model(**rows()).logits
    struck = torch.full_like(logits, -torch.inf)
    struck[..., ANSWERS] = logits[..., ANSWERS]
    # position t predicts the token at t + 1
    predicting = struck[:, :-1].flatten(0, 1)
    return F.cross_entropy(predicting, labels_of_answers()[:, 1:].flatten())


@pytest.mark.parametrize("llm", tiny.LLMS)
def test_logits_are_those_of_the_whole_head_at_the_tokens_of_answers(llm: str) -> None:
    model = tiny.model(llm=llm)
    whole = model(**rows()).logits
    model.close_answers(ANSWERS)
    closed = model(**rows()).logits
    assert closed.shape == whole.shape
    torch.testing.assert_close(closed[..., ANSWERS], whole[..., ANSWERS])
    others = [token for token in range(whole.shape[-1]) if token not in ANSWERS]
    assert (closed[..., others] == -torch.inf).all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("llm", tiny.LLMS)
def test_loss_and_gradients_are_those_of_a_head_without_the_other_tokens(
    llm: str, training: bool
) -> None:
    model = tiny.model(llm=llm)
    expected = naive_loss(model)
    expected.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients[name] = parameter.grad.clone()
    model.zero_grad()
    model.close_answers(ANSWERS)
    model.train(training)
    loss = model(**rows(), labels=labels_of_answers()).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-4)


def test_a_label_that_no_answer_is_made_of_is_not_left_out_silently() -> None:
    model = tiny.model().train()
    model.close_answers(ANSWERS)
    labels = labels_of_answers()
    labels[1, 36] = 8
    with pytest.raises(IndexError, match="out of bounds"):
        model(**rows(), labels=labels)


@pytest.mark.parametrize("llm", tiny.LLMS)
def test_generation_and_the_saved_model_know_the_tokens_of_answers_alone(
    llm: str, tmp_path: Path
) -> None:
    model = tiny.model(llm=llm)
    names = set(model.state_dict())
    model.close_answers(reversed(ANSWERS))
    # the weights are those of an ordinary LLM, under their own names
    assert set(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    loaded = FusionVLM.from_pretrained(tmp_path)
    assert loaded.config.answer_tokens == ANSWERS
    assert torch.equal(loaded(**rows()).logits, model(**rows()).logits)
    for seed in range(3):
        torch.manual_seed(seed)
        answer = loaded.generate(
            **rows(), max_new_tokens=6, do_sample=True, temperature=5.0, top_k=0
        )
        new_tokens = answer[:, 40:]
        # 0 pads a row that has ended
        assert set(new_tokens.flatten().tolist()) <= {0, *ANSWERS}


@pytest.fixture
def closed(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe of one arm with closed answers."""
    return {**recipe, "closed_answers": True, "arms": recipe["arms"][:1]}


def test_an_arm_learns_the_tokens_that_its_training_labels(
    closed: dict[str, Any], tmp_path: Path
) -> None:
    recipe = load_recipe(write_recipe(tmp_path, closed))
    samples = {name: load(stage.data) for name, stage in recipe.stages.items()}
    (arm,) = recipe.all_arms()
    trained = train_arm(recipe, arm, 0, samples=samples, store=None, folder=tmp_path / "run")
    expected = set()
    for name, stage in recipe.stages.items():
        for sample in samples[name]:
            encoded = trained.processor.encode(list(sample.messages), [4], prompt=stage.prompt)
            expected.update(encoded["labels"].tolist())
    assert trained.model.config.answer_tokens == sorted(expected - {-100})


def test_the_answers_of_a_study_are_found_once_for_all_its_runs(
    closed: dict[str, Any], tmp_path: Path
) -> None:
    recipe = load_recipe(write_recipe(tmp_path, closed))
    samples = {name: load(stage.data) for name, stage in recipe.stages.items()}
    (arm,) = recipe.all_arms()
    _, processor = compose(recipe, arm, 0)
    answers = ClosedAnswers(recipe, samples)
    found = answers.tokens(processor)
    # Nothing is left to read: who looks again finds nothing.
    for name in samples:
        samples[name] = samples[name].without(range(len(samples[name])))
    assert found
    assert answers.tokens(processor) == found
    assert not ClosedAnswers(recipe, samples).tokens(processor)


def test_a_study_with_closed_answers_runs_and_says_so_in_its_runs_names(
    closed: dict[str, Any], tmp_path: Path
) -> None:
    study = tmp_path / "runs"
    for is_closed in (True, False):
        written = write_recipe(tmp_path, {**closed, "closed_answers": is_closed})
        assert run_study(written, study).exit_code == 0
    # two runs of one arm: what answers can be made of decides a result
    runs = list((study / "arms").iterdir())
    assert len(runs) == 2


def test_a_test_answer_that_no_arm_could_give_is_refused_before_training(
    closed: dict[str, Any], tmp_path: Path
) -> None:
    samples = read_samples(tmp_path)
    samples[-1]["conversations"][-1]["value"] = "zebra"
    write_samples(tmp_path, samples, "test.json")
    closed["evaluate"]["data"] = {"path": "test.json"}
    result = run_study(write_recipe(tmp_path, closed), tmp_path / "runs")
    assert result.exit_code == 2
    message = one_line(result)
    assert "closed_answers" in message
    assert "'zebra'" in message
    assert samples[-1]["id"] in message
    assert not list(tmp_path.glob("runs/arms/*/result.json"))
    closed["on_bad_sample"] = "skip"
    assert run_study(write_recipe(tmp_path, closed), tmp_path / "runs").exit_code == 0
    left_out = read_left_out(tmp_path / "runs")["evaluate"]
    assert [bad[0] for bad in left_out.values()] == [samples[-1]["id"]]


def test_answers_that_a_model_cannot_give_are_wrong_and_counted(
    closed: dict[str, Any], tmp_path: Path
) -> None:
    """The others are scored: one foreign answer is no reason to score nothing."""
    closed["keep_models"] = "all"
    study = tmp_path / "runs"
    assert run_study(write_recipe(tmp_path, closed), study).exit_code == 0
    (model,) = study.glob("arms/*/model")
    samples = read_samples(tmp_path)
    samples[0]["conversations"][-1]["value"] = "zebra"
    write_samples(tmp_path, samples, "other.json")
    result = CliRunner().invoke(app, ["eval", str(model), "--data", str(tmp_path / "other.json")])
    assert result.exit_code == 0, result.output
    assert "1 of 8 right answers hold tokens that this model cannot give" in one_line(result)
    again = CliRunner().invoke(app, ["eval", str(model), "--data", str(tmp_path / "other.json")])
    assert again.exit_code == 0, again.output
    lines = (model / "evaluation" / "other" / "predictions.jsonl").read_text("utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    (foreign,) = [record for record in records if record["answer"] == "zebra"]
    assert foreign["score"] == 0
    assert "log_likelihood" not in foreign
