"""Training one arm, and testing a trained model on any data."""

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from rich.console import Console
from transformers import GenerationConfig
from typer.testing import CliRunner

from layerfuse.cli import app
from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.answer import load_answerer
from layerfuse.evaluate.evaluation import data_of, evaluate
from layerfuse.evaluate.records import PREDICTIONS, AnswerRecord, read_records
from layerfuse.recipe.schema import Evaluation
from layerfuse.study.coordinate import study, train
from tests import tiny


@pytest.fixture
def file(recipe: dict[str, Any], tmp_path: Path) -> Path:
    """A recipe of two arms of tiny models."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**recipe, "keep_models": "all"}))
    return path


def test_one_arm_is_what_the_study_makes_of_it(file: Path, tmp_path: Path) -> None:
    trained = train(file, arm="two", output=tmp_path / "alone")
    study(file, output=tmp_path / "study")
    in_study = next((tmp_path / "study").glob("arms/two*/model"))
    weights = "model.safetensors"
    assert (trained.model / weights).read_bytes() == (in_study / weights).read_bytes()
    answers = (trained.model.parent / PREDICTIONS, in_study.parent / PREDICTIONS)
    assert answers[0].read_bytes() == answers[1].read_bytes()
    assert not (tmp_path / "alone" / "report.html").exists()


def test_a_trained_arm_is_not_trained_again_but_another_seed_is(file: Path, tmp_path: Path) -> None:
    trained = train(file, arm="one", output=tmp_path / "alone")
    written = (trained.model.parent / "result.json").stat().st_mtime_ns
    again = train(file, arm="one", output=tmp_path / "alone")
    assert again == trained
    assert (again.model.parent / "result.json").stat().st_mtime_ns == written
    other = train(file, arm="one", seed=3, output=tmp_path / "other")
    assert other.record.seed == 3


def test_a_folder_with_other_runs_is_refused(file: Path, tmp_path: Path) -> None:
    """Their results.jsonl would be replaced by one line."""
    study(file, output=tmp_path / "study")
    before = (tmp_path / "study/results.jsonl").read_text()
    with pytest.raises(LayerfuseError, match="holds other runs"):
        train(file, arm="one", output=tmp_path / "study")
    assert (tmp_path / "study/results.jsonl").read_text() == before


def test_the_model_is_kept_whatever_the_recipe_says_and_its_loss_is_named(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({**recipe, "keep_models": "none"}))
    trained = train(file, arm="one", output=tmp_path / "alone")
    assert (trained.model / "model.safetensors").is_file()
    shutil.rmtree(trained.model)
    with pytest.raises(LayerfuseError, match="its model is gone: delete"):
        train(file, arm="one", output=tmp_path / "alone")


def test_the_arm_must_be_named_where_there_are_several(file: Path, tmp_path: Path) -> None:
    with pytest.raises(LayerfuseError, match="2 arms; choose one by --arm: 'one', 'two'"):
        train(file, output=tmp_path / "alone")
    with pytest.raises(LayerfuseError, match="no arm 'three'; valid: 'one', 'two'"):
        train(file, arm="three", output=tmp_path / "alone")
    assert not (tmp_path / "alone").exists()


def test_the_only_arm_needs_no_name(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a user runs it: both verbs, with their default folders."""
    monkeypatch.chdir(tmp_path)
    arms = "arms=[{name: only, layers: [3], fusion: {name: single}}]"
    trained = CliRunner().invoke(app, ["train", str(file), arms])
    assert trained.exit_code == 0, trained.output
    model = next(Path("runs/tiny.only.seed0/arms").glob("only*/model"))
    assert f"model: {model}" in trained.output
    tested = CliRunner().invoke(app, ["eval", str(model), "data.json"])
    assert tested.exit_code == 0, tested.output
    assert f"answers and scores: {model / 'evaluation'}" in tested.output
    score = json.loads((model / "evaluation/scores.json").read_text())["mean"]["score"]
    assert f"accuracy: {score:.3f}" in trained.output


def test_the_test_of_training_can_be_repeated(file: Path, tmp_path: Path) -> None:
    trained = train(file, arm="two", output=tmp_path / "alone")
    how = Evaluation(data=data_of(str(tmp_path / "data.json"), "test"), max_new_tokens=2)
    folder = evaluate(trained.model, how, output=tmp_path / "tested", console=Console(quiet=True))
    repeated = read_records(folder / PREDICTIONS, AnswerRecord)
    assert repeated == read_records(trained.model.parent / PREDICTIONS, AnswerRecord)
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["mean"]["score"] == trained.record.scores.mean
    assert (scores["mean"]["questions"], scores["mean"]["pictures"]) == (8, 8)
    assert scores["mean"]["chance"] == 0.5
    low, high = scores["mean"]["interval"]
    assert low <= scores["mean"]["score"] <= high


def test_one_picture_has_no_interval(file: Path, tmp_path: Path) -> None:
    trained = train(file, arm="one", output=tmp_path / "alone")
    how = Evaluation(data=data_of(str(tmp_path / "data.json"), "test", limit=1))
    folder = evaluate(trained.model, how, console=Console(quiet=True))
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["mean"]["interval"] is None
    assert scores["mean"]["pictures"] == 1


def test_guided_models_are_also_asked_without_their_guidance(file: Path, tmp_path: Path) -> None:
    arms = "arms=[{name: routed, layers: [1, 2, 3], fusion: {name: text_routed}}]"
    conversations = json.loads((tmp_path / "data.json").read_text())
    for k, record in enumerate(conversations):
        record["conversations"][0]["value"] = f"<image> n{k % 3}?"
    (tmp_path / "data.json").write_text(json.dumps(conversations))
    trained = train(file, (arms,), output=tmp_path / "alone")
    choices: list[tuple[Literal["shuffled", "mean"], ...]] = [(), ("mean",), ("shuffled", "mean")]
    for controls in choices:
        how = Evaluation(data=data_of(str(tmp_path / "data.json"), "test"), controls=controls)
        folder = evaluate(trained.model, how, console=Console(quiet=True))
        scores = json.loads((folder / "scores.json").read_text())
        answers = read_records(folder / PREDICTIONS, AnswerRecord)
        assert tuple(scores["controls"]) == controls
        for control in controls:
            right = [answer.controls[control].score for answer in answers]
            assert scores["controls"][control]["score"] == sum(right) / len(right)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no model in"),
        ('{"model_type": "dinov2"}', "a model of type 'dinov2', none of layerfuse's"),
        ("{}", "a model of type None"),
        ("[1]", "cannot read"),
        ("{", "cannot read"),
    ],
)
def test_only_models_of_layerfuse_are_loaded(
    content: str | None, message: str, tmp_path: Path
) -> None:
    """transformers would make a random model of the size of its defaults."""
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(LayerfuseError, match=message):
        load_answerer(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "torn"])
def test_weights_that_cannot_be_read_are_named(damage: str, file: Path, tmp_path: Path) -> None:
    trained = train(file, arm="one", output=tmp_path / "alone")
    weights = trained.model / "model.safetensors"
    if damage == "missing":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(LayerfuseError, match="cannot read the model in"):
        load_answerer(trained.model)


def test_data_that_cannot_be_used_is_named_before_the_model_loads(tmp_path: Path) -> None:
    with pytest.raises(LayerfuseError, match=r"no such file or folder of samples: .*none\.json"):
        data_of(str(tmp_path / "none.json"), "test")
    talk = [{"from": "human", "value": "<image> n?"}, {"from": "gpt", "value": "1"}]
    records = [{"id": "a", "image": "lost.png", "conversations": talk}]
    (tmp_path / "data.json").write_text(json.dumps(records))
    how = Evaluation(data=data_of(str(tmp_path / "data.json"), "test"))
    with pytest.raises(LayerfuseError, match=r"lost\.png.*1 of 1 samples cannot be used"):
        evaluate(tmp_path / "no-model", how)
    assert not (tmp_path / "no-model").exists()


def test_a_saved_model_stops_where_its_template_ends_a_turn(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    """Also for those who load it with transformers alone, where no processor says so."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (tmp_path / "newline.jinja").write_text(template)
    own = {"chat_template": "newline.jinja", "keep_models": "all"}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**recipe, **own}))
    trained = train(path, arm="one", output=tmp_path / "alone")
    newline = tiny.tokenizer()("\n")["input_ids"]
    assert GenerationConfig.from_pretrained(trained.model).eos_token_id == [2, *newline]
    assert load_answerer(trained.model).model.generation_config.eos_token_id == [2, *newline]
