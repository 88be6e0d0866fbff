"""Training one arm, and testing a trained model on any data."""

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForImageTextToText, GenerationConfig, LogitsProcessor
from typer.testing import CliRunner

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.evaluation import data_of, evaluate
from layerfuse.evaluate.load_answerer import load_answerer
from layerfuse.evaluate.records import PREDICTIONS, AnswerRecord, read_records
from layerfuse.recipe.evaluate_settings import Evaluation
from layerfuse.study.coordinate import study, train
from layerfuse_cli.app import app
from tests import tiny
from tests.studies import ask_several_questions, write_recipe, write_samples

Controls = tuple[Literal["shuffled", "mean"], ...]


@pytest.fixture
def file(recipe: dict[str, Any], tmp_path: Path) -> Path:
    """A recipe of two arms of tiny models."""
    recipe["keep_models"] = "all"
    return write_recipe(tmp_path, recipe)


def read_scores(folder: Path) -> dict[str, Any]:
    """What an evaluation says: `mean`, `families`, and `controls` of guided models."""
    return json.loads((folder / "scores.json").read_text())


def test_one_arm_is_what_the_study_makes_of_it(file: Path, tmp_path: Path) -> None:
    """The order of the arms does not matter: each run draws from its own seed."""
    trained = train(file, arm="two", output=tmp_path / "alone")
    study(file, output=tmp_path / "study")

    model_in_study = next((tmp_path / "study").glob("arms/two*/model"))
    weights = (trained.model / "model.safetensors").read_bytes()
    assert weights == (model_in_study / "model.safetensors").read_bytes()
    answers = (trained.model.parent / PREDICTIONS).read_bytes()
    assert answers == (model_in_study.parent / PREDICTIONS).read_bytes()
    # A report compares arms; here is one.
    assert not (tmp_path / "alone" / "report.html").exists()


def test_claims_are_about_the_study_not_about_one_arm(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe["claims"] = [
        {"claim": "x", "source": "y", "better": ["two"], "than": ["one"], "limits": "z"}
    ]
    file = write_recipe(tmp_path, recipe)

    # Its recipe has no arm that the claim compares it with; the second call reads that recipe.
    for _ in range(2):
        train(file, arm="two", output=tmp_path / "alone")
    study(file, output=tmp_path / "study")

    summary = json.loads((tmp_path / "study" / "summary.json").read_text())
    (claim,) = summary["claims"]
    assert claim["better"] == ["two"]
    assert isinstance(claim["difference"], float)
    assert "Claims" in (tmp_path / "study" / "report.html").read_text()


def test_a_trained_arm_is_not_trained_again_but_another_seed_is(file: Path, tmp_path: Path) -> None:
    trained = train(file, arm="one", output=tmp_path / "alone")
    # A run that is done again writes its result again.
    result_file = trained.model.parent / "result.json"
    written = result_file.stat().st_mtime_ns

    again = train(file, arm="one", output=tmp_path / "alone")

    assert again == trained
    assert result_file.stat().st_mtime_ns == written
    other_seed = train(file, arm="one", seed=3, output=tmp_path / "other")
    assert other_seed.record.seed == 3


def test_a_folder_with_other_runs_is_refused(file: Path, tmp_path: Path) -> None:
    """Their results.jsonl would be replaced by one line."""
    study(file, output=tmp_path / "study")
    results = tmp_path / "study/results.jsonl"
    before = results.read_text()

    with pytest.raises(LayerfuseError, match="holds other runs"):
        train(file, arm="one", output=tmp_path / "study")

    assert results.read_text() == before


def test_the_model_is_kept_whatever_the_recipe_says_and_its_loss_is_named(
    recipe: dict[str, Any],
    tmp_path: Path,
) -> None:
    """The model is what `train` is for; a study may keep none."""
    recipe["keep_models"] = "none"
    path = write_recipe(tmp_path, recipe)

    trained = train(path, arm="one", output=tmp_path / "alone")

    assert (trained.model / "model.safetensors").is_file()
    # The result alone is no use to someone who asked for a model.
    shutil.rmtree(trained.model)
    with pytest.raises(LayerfuseError, match="its model is gone: delete"):
        train(path, arm="one", output=tmp_path / "alone")


def test_the_arm_must_be_named_where_there_are_several(file: Path, tmp_path: Path) -> None:
    with pytest.raises(LayerfuseError, match="2 arms; choose one by --arm: 'one', 'two'"):
        train(file, output=tmp_path / "alone")
    with pytest.raises(LayerfuseError, match="no arm 'three'; valid: 'one', 'two'"):
        train(file, arm="three", output=tmp_path / "alone")

    assert not (tmp_path / "alone").exists()


def test_the_only_arm_needs_no_name(
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a user runs it: both verbs, with their default folders."""
    # Default folders are relative to the current one.
    monkeypatch.chdir(tmp_path)
    only_arm = "arms=[{name: only, layers: [3], fusion: {name: single}}]"

    trained = CliRunner().invoke(app, ["train", str(file), only_arm])

    assert trained.exit_code == 0, trained.output
    model = next(Path("runs/tiny.only.seed0/arms").glob("only*/model"))
    assert f"model: {model}" in trained.output

    tested = CliRunner().invoke(app, ["eval", str(model), "--data", "data.json"])
    assert tested.exit_code == 0, tested.output
    assert f"answers and scores: {model / 'evaluation' / 'data'}" in tested.output
    # The recipe's test has the same samples.
    score = read_scores(model / "evaluation" / "data")["mean"]["score"]
    assert f"accuracy: {score:.3f}" in trained.output


def test_the_test_of_training_can_be_repeated(file: Path, tmp_path: Path) -> None:
    trained = train(file, arm="two", output=tmp_path / "alone")
    data = data_of(str(tmp_path / "data.json"), "test")
    # As the recipe has it: longer answers would be other answers.
    evaluation = Evaluation(data=data, max_new_tokens=2)

    folder = evaluate(
        trained.model,
        evaluation,
        output=tmp_path / "tested",
        console=Console(quiet=True),
    )

    repeated = read_records(folder / PREDICTIONS, AnswerRecord)
    expected = read_records(trained.model.parent / PREDICTIONS, AnswerRecord)
    assert repeated == expected
    mean = read_scores(folder)["mean"]
    assert mean["score"] == trained.record.scores.mean
    assert mean["questions"] == 8
    assert mean["pictures"] == 8
    # Half of the answers are 0, half are 1.
    assert mean["chance"] == 0.5
    low, high = mean["interval"]
    assert low <= mean["score"] <= high


def test_one_picture_has_no_interval(file: Path, tmp_path: Path) -> None:
    """Pictures are what is drawn again; of one there is one draw."""
    trained = train(file, arm="one", output=tmp_path / "alone")
    data = data_of(str(tmp_path / "data.json"), "test", limit=1)

    folder = evaluate(trained.model, Evaluation(data=data), console=Console(quiet=True))

    mean = read_scores(folder)["mean"]
    assert mean["interval"] is None
    assert mean["pictures"] == 1


def test_guided_models_are_also_asked_without_their_guidance(file: Path, tmp_path: Path) -> None:
    """Each choice in the same folder: no control of an earlier one is left in it."""
    guided_arm = "arms=[{name: routed, layers: [1, 2, 3], fusion: {name: text_routed}}]"
    ask_several_questions(tmp_path)
    trained = train(file, (guided_arm,), output=tmp_path / "alone")
    data = data_of(str(tmp_path / "data.json"), "test")
    choices: list[Controls] = [(), ("mean",), ("shuffled", "mean")]

    for controls in choices:
        evaluation = Evaluation(data=data, controls=controls)
        folder = evaluate(trained.model, evaluation, console=Console(quiet=True))

        scores = read_scores(folder)
        answers = read_records(folder / PREDICTIONS, AnswerRecord)
        # None that was not asked for: each costs as much time as the test itself.
        assert tuple(scores["controls"]) == controls
        for control in controls:
            points = [answer.controls[control].score for answer in answers]
            expected = sum(points) / len(points)
            assert scores["controls"][control]["score"] == expected


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
    content: str | None,
    message: str,
    tmp_path: Path,
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
        # As a copy that broke off leaves them.
        beginning = weights.read_bytes()[:1000]
        weights.write_bytes(beginning)

    with pytest.raises(LayerfuseError, match="cannot read the model in"):
        load_answerer(trained.model)


def test_data_that_cannot_be_used_is_named_before_the_model_loads(tmp_path: Path) -> None:
    """A large model takes minutes to load; here there is none, and nobody notices."""
    with pytest.raises(LayerfuseError, match=r"no such file or folder of samples: .*none\.json"):
        data_of(str(tmp_path / "none.json"), "test")

    talk = [
        {"from": "human", "value": "<image> n?"},
        {"from": "gpt", "value": "1"},
    ]
    sample = {"id": "a", "image": "lost.png", "conversations": talk}
    write_samples(tmp_path, [sample])
    evaluation = Evaluation(data=data_of(str(tmp_path / "data.json"), "test"))
    with pytest.raises(LayerfuseError, match=r"lost\.png.*1 of 1 samples cannot be used"):
        evaluate(tmp_path / "no-model", evaluation)
    assert not (tmp_path / "no-model").exists()


def test_a_saved_model_stops_where_its_template_ends_a_turn(
    recipe: dict[str, Any],
    tmp_path: Path,
) -> None:
    """Also for those who load it with transformers alone, where no processor says so."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (tmp_path / "newline.jinja").write_text(template)
    recipe["chat_template"] = "newline.jinja"
    recipe["keep_models"] = "all"

    trained = train(
        write_recipe(tmp_path, recipe),
        arm="one",
        output=tmp_path / "alone",
    )

    (newline,) = tiny.tokenizer()("\n")["input_ids"]
    # Beside the LLM's own end token, which is 2.
    end_tokens = [2, newline]
    saved = GenerationConfig.from_pretrained(trained.model)
    assert saved.eos_token_id == end_tokens
    loaded = load_answerer(trained.model).model.generation_config
    assert loaded.eos_token_id == end_tokens


class Dictation(LogitsProcessor):
    """Lets a model say given tokens, whatever it was trained on."""

    def __init__(self, prompt_length: int, tokens: list[int]) -> None:
        self.prompt_length = prompt_length
        self.tokens = tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -torch.inf)
        said = input_ids.shape[1] - self.prompt_length
        forced[:, self.tokens[said]] = 0
        return forced


def test_a_saved_model_stops_at_an_end_of_several_tokens(
    recipe: dict[str, Any],
    tmp_path: Path,
) -> None:
    """Also where nobody gives `generate` the tokenizer that compares texts, as in a pipeline."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}###{% endfor %}"
    (tmp_path / "hashes.jinja").write_text(template)
    recipe["chat_template"] = "hashes.jinja"
    recipe["keep_models"] = "all"
    trained = train(
        write_recipe(tmp_path, recipe),
        arm="one",
        output=tmp_path / "alone",
    )
    auto_model: Any = AutoModelForImageTextToText

    model = auto_model.from_pretrained(trained.model)

    # One hash is a part of the answer.
    tokenizer = tiny.tokenizer()
    prompt = tokenizer("user: ?###assistant:", return_tensors="pt")
    said = tokenizer(" C# is it### user: what?")["input_ids"]
    prompt_length = prompt["input_ids"].shape[1]
    generated = model.generate(
        **prompt,
        logits_processor=[Dictation(prompt_length, said)],
        max_new_tokens=len(said),
        do_sample=False,
    )
    assert tokenizer.decode(generated[0, prompt_length:]) == " C# is it###"


def test_a_model_without_a_folder_says_that_its_ends_need_a_tokenizer() -> None:
    model: Any = tiny.model("single")
    model.generation_config.stop_strings = ["###"]
    prompt = tiny.tokenizer()("?", return_tensors="pt")

    with pytest.raises(LayerfuseError, match=r"'###'.*pass `tokenizer=processor.tokenizer`"):
        model.generate(**prompt, max_new_tokens=1)
