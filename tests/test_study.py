"""The main job: end to end on the real local models, and everything that can go wrong before it."""

import io
import json
import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock
from PIL import Image
from rich.console import Console
from transformers import BertConfig, BertModel
from typer.testing import CliRunner

from layerfuse.cli import app
from layerfuse.data.collate import SampleDataset
from layerfuse.data.feature_store import digests_of
from layerfuse.data.records import Reading, from_columns
from layerfuse.data.sample import Sample
from layerfuse.data.sample_sets import SampleSets
from layerfuse.data.sources import Samples
from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.answer import Answerer, predict
from layerfuse.evaluate.records import AnswerRecord
from layerfuse.fusion import FUSIONS
from layerfuse.recipe.reader import load_recipe
from layerfuse.study import execute
from layerfuse.study.check import leave_out, load_checked
from layerfuse.study.coordinate import study
from layerfuse.study.encode import (
    encode_pictures,
    pictures_of,
    read_features,
    write_features,
)
from layerfuse.study.execute import run_one
from tests import tiny
from tests.processes import start

ROOT = Path(__file__).parent.parent
SHRUNK = [
    "arms=[{name: last, layers: [12], fusion: {name: single}},"
    " {name: inject, layers: [4], fusion: {name: inject_add, base: 8}}]",
    "baseline=last",
    "seeds=[0]",
    "stages.align.data.scenes.count=16",
    "stages.align.steps=1",
    "stages.align.batch_size=4",
    "stages.finetune.data.scenes.count=16",
    "stages.finetune.steps=3",
    "stages.finetune.batch_size=4",
    "evaluate.data.scenes.count=8",
]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.real
@pytest.mark.usefixtures("local_models")
def test_a_shrunken_quickstart_on_real_models(tmp_path: Path) -> None:
    started = time.perf_counter()
    folder = tmp_path / "study"
    report = study(ROOT / "recipes" / "quickstart.yaml", tuple(SHRUNK), output=folder)
    results = lines(folder / "results.jsonl")
    assert [(r["arm"], r["layers"], r["kind"]) for r in results] == [
        ("last", [12], "baseline"),
        ("inject", [4], "internal direct"),
    ]
    for result in results:
        rows = lines(folder / result["folder"] / "predictions.jsonl")
        questions = len({row["id"] for row in rows})
        assert questions == len(rows) == 8 * 5
        hits = sum(row["score"] for row in rows)
        share = [result["scores"]["categories"], result["scores"]["families"]]
        assert all(0 <= value <= 1 for part in share for value in part.values())
        assert (hits == 0) == (result["scores"]["mean"] == 0)
        losses = dict(result["losses"]["finetune"])
        assert losses[3] < losses[1]
    assert sum((folder / r["folder"] / "model").is_dir() for r in results) == 1  # the best one
    assert not list(folder.glob("arms/*/stages"))
    html = report.read_text()
    for text in ("last", "inject", "chance", "seed", "data:image/png;base64"):
        assert text in html
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert [arm["name"] for arm in recipe["arms"]] == ["last", "inject"]
    assert json.loads((folder / "environment.json").read_text())["torch"]

    before = {p: p.stat().st_mtime_ns for p in folder.glob("arms/*/result.json")}
    again = study(ROOT / "recipes" / "quickstart.yaml", tuple(SHRUNK), output=folder)
    assert {p: p.stat().st_mtime_ns for p in folder.glob("arms/*/result.json")} == before
    assert again.read_text() == html
    model = next(folder.glob("arms/*/model"))
    picture = lines(folder / results[0]["folder"] / "predictions.jsonl")[0]["image"]
    asked = CliRunner().invoke(app, ["ask", str(model), picture, "How many?"])
    assert asked.exit_code == 0, asked.output
    assert time.perf_counter() - started < 240  # 20 s on a quiet machine


def write(folder: Path, recipe: dict[str, Any]) -> Path:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def comparable(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in lines(folder)]


def study_killed_in_the_second_arm(recipe: Path, folder: Path) -> None:
    """Run in a process of its own: SIGKILL between the training and the test of an arm."""

    def predict_or_die(answerer: Answerer, *args: Any) -> list[AnswerRecord]:
        if len(answerer.model.config.vision_layers) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return predict(answerer, *args)

    execute.predict = predict_or_die
    study(recipe, output=folder)


def test_killed_and_started_again_gives_the_same_results(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    """The first arm, which was done before the kill, is not run again."""
    path = write(tmp_path, recipe)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    study(path, output=whole)
    process = start(study_killed_in_the_second_arm, path, killed)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (first,) = killed.glob("arms/*/result.json")
    assert first.parent.name.startswith("one")
    stamp = first.stat().st_mtime_ns
    study(path, output=killed)
    assert first.stat().st_mtime_ns == stamp
    assert comparable(killed / "results.jsonl") == comparable(whole / "results.jsonl")
    for name in ("one", "two"):
        pattern = f"arms/{name}*/predictions.jsonl"
        predictions = [next(folder.glob(pattern)) for folder in (killed, whole)]
        assert predictions[0].read_text() == predictions[1].read_text()


def test_adding_an_arm_runs_only_that_arm(recipe: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "study"
    study(write(tmp_path, recipe), output=folder)
    stamps = {p: p.stat().st_mtime_ns for p in folder.glob("arms/*/result.json")}
    recipe["arms"].append({"name": "three", "layers": "all", "fusion": {"name": "group_mean"}})
    study(write(tmp_path, recipe), output=folder)
    assert len(lines(folder / "results.jsonl")) == 3
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps


@pytest.mark.parametrize("cached", [True, False])
def test_changed_or_mended_pictures_make_other_runs(
    recipe: dict[str, Any], tmp_path: Path, cached: bool
) -> None:
    path = write(tmp_path, {**recipe, "on_bad_sample": "skip", "cache_features": cached})
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[: len(whole) // 2])
    folders: list[set[str]] = []
    for change in (None, whole, None, b""):
        if change is not None:
            (tmp_path / "1.png").write_bytes(change)
        study(path, output=tmp_path / "study")
        folders.append({r["folder"] for r in lines(tmp_path / "study" / "results.jsonl")})
    cut, mended, again, gone = folders
    assert again == mended
    assert not cut & mended
    assert not mended & gone
    assert not cut & gone


def test_arms_are_compared_on_the_same_samples(recipe: dict[str, Any], tmp_path: Path) -> None:
    """An arm of more tokens makes a sample too long for all; other words are other samples."""
    records = json.loads((tmp_path / "data.json").read_text())
    records[7]["conversations"][0]["value"] = "<image> n?" + " n" * 40
    (tmp_path / "data.json").write_text(json.dumps(records))
    recipe["stages"]["align"]["max_length"] = 122  # its length with 16 image tokens
    recipe["on_bad_sample"] = "skip"

    def folders() -> tuple[set[str], int]:
        study(write(tmp_path, recipe), output=tmp_path / "study")
        left_out = json.loads((tmp_path / "study" / "left_out.json").read_text())["align"]
        found = lines(tmp_path / "study" / "results.jsonl")
        return {r["folder"] for r in found}, len(left_out)

    first, none = folders()
    assert none == 0
    records[0]["conversations"][1]["value"] = "1"
    (tmp_path / "data.json").write_text(json.dumps(records))
    other, none = folders()
    assert none == 0
    assert not first & other
    recipe["arms"].append({"name": "long", "layers": [1, 3], "fusion": {"name": "token_concat"}})
    third, one = folders()
    assert one == 1
    assert len(third) == 3
    assert not third & other


def test_another_process_must_have_the_same_samples(recipe: dict[str, Any], tmp_path: Path) -> None:
    study(write(tmp_path, recipe), output=tmp_path / "study")
    folder = lines(tmp_path / "study" / "results.jsonl")[0]["folder"]
    (tmp_path / "study" / folder / "result.json").unlink()
    run_one(tmp_path / "study", folder, [])
    assert (tmp_path / "study" / folder / "result.json").exists()
    text = (tmp_path / "data.json").read_text()
    (tmp_path / "data.json").write_text(text.replace('"value": "1"', '"value": "2"'))
    with pytest.raises(LayerfuseError, match="this process has other data files"):
        run_one(tmp_path / "study", folder, [])


def test_a_stage_named_evaluate_trains_on_its_own_data(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the name of the test, whose pictures and answers it never meets."""
    records = json.loads((tmp_path / "data.json").read_text())
    (tmp_path / "train.json").write_text(json.dumps(records[:5]))
    (tmp_path / "test.json").write_text(json.dumps(records[5:]))
    (tmp_path / "0.png").unlink()
    (tmp_path / "7.png").write_text("no picture")
    stage = {**recipe["stages"]["align"], "data": {"path": "train.json"}}
    recipe["stages"] = {"evaluate": stage}
    recipe["evaluate"]["data"] = {"path": "test.json"}
    recipe["on_bad_sample"] = "skip"
    trained: set[str] = set()

    class Watched(SampleDataset):
        def __getitem__(self, index: int) -> Sample:
            sample = super().__getitem__(index)
            trained.add(sample.id)
            return sample

    monkeypatch.setattr("layerfuse.train.arm.SampleDataset", Watched)
    folder = tmp_path / "study"
    shown = io.StringIO()
    study(write(tmp_path, recipe), output=folder, console=Console(file=shown, width=200))
    assert trained == {"1", "2", "3", "4"}
    left_out = json.loads((folder / "left_out.json").read_text())
    ids = {label: [bad[0] for bad in part.values()] for label, part in left_out.items()}
    assert ids == {"evaluate": ["0"], "evaluate (test)": ["7"]}
    phases = [line.split("one · seed 0: ")[-1] for line in shown.getvalue().splitlines()]
    assert "evaluate (2)" in phases
    assert "evaluate (test) (2)" in phases
    result = lines(folder / "results.jsonl")[0]
    assert list(result["seconds"]) == ["evaluate", "evaluate (test)"]
    assert [step for step, _ in result["losses"]["evaluate"]] == [1, 2]
    predictions = folder / result["folder"] / "predictions.jsonl"
    assert [row["sample"] for row in lines(predictions)] == ["5", "6"]

    trained.clear()
    expected = predictions.read_text()
    (folder / result["folder"] / "result.json").unlink()
    run_one(folder, result["folder"], [])  # as another process does it
    assert trained == {"1", "2", "3", "4"}
    assert predictions.read_text() == expected


def test_a_sample_that_moves_into_the_test_makes_other_runs(tmp_path: Path) -> None:
    def sets(train: int) -> SampleSets:
        records = [{"question": "?", "answer": str(k)} for k in range(4)]
        convert = partial(from_columns, reading=Reading(tmp_path))
        return SampleSets(
            {"evaluate": Samples(records[:train], convert)}, Samples(records[train:], convert)
        )

    assert sets(2).digest({}) != sets(3).digest({})


def test_another_process_reads_the_same_features(recipe: dict[str, Any], tmp_path: Path) -> None:
    """From what JSON tells it, behind a picture that is left out, also where it must repair."""
    Image.effect_noise((40, 30), 60).convert("RGB").save(tmp_path / "2.png")
    whole = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(whole[: len(whole) // 2])
    loaded = load_recipe(write(tmp_path, {**recipe, "on_bad_sample": "skip"}))
    samples, _ = load_checked(loaded)
    digests = digests_of(pictures_of([samples.test]))
    store, unreadable = encode_pictures(loaded, samples, digests)
    assert store is not None
    usable = leave_out(loaded, samples, unreadable)
    write_features(tmp_path, usable, store)
    pictures = list(pictures_of([usable.test]))
    assert len(pictures) == 7
    expected = store.features(pictures)

    digest, other = read_features(tmp_path, loaded, usable)
    assert digest == usable.digest({})
    assert other is not None
    assert other.bad.keys() == store.bad.keys() == {str(tmp_path / "2.png")}
    for damaged in (False, True):
        if damaged:
            for file in (tmp_path / "home").rglob("*.safetensors"):
                file.write_bytes(file.read_bytes()[:-1] + b"?")
            _, other = read_features(tmp_path, loaded, usable)
            assert other is not None
        found = other.features(pictures)
        assert (found.layers, found.grid) == (expected.layers, expected.grid)
        for a, b in zip(
            found.patches + found.summary, expected.patches + expected.summary, strict=True
        ):
            assert torch.equal(a, b)

    direct = loaded.model_copy(update={"cache_features": False})
    write_features(tmp_path, usable, None)
    assert read_features(tmp_path, direct, usable) == (digest, None)


def test_two_commands_do_not_share_a_folder(recipe: dict[str, Any], tmp_path: Path) -> None:
    path, folder = write(tmp_path, recipe), tmp_path / "study"
    folder.mkdir()
    with FileLock(folder / ".lock"):
        found = CliRunner().invoke(app, ["study", str(path), "--output", str(folder)])
    assert found.exit_code == 2
    assert "another process is running a study" in " ".join(found.output.split())
    study(path, output=folder)


def test_every_strategy_runs_in_one_study(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Trained in two stages, tested, saved and loaded; guided arms with their controls."""
    settings: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2}
    settings["intermediate_size"] = 16
    sentences = BertModel(BertConfig(vocab_size=320, hidden_size=16, **settings))
    sentences.save_pretrained(tmp_path / "sentences")
    tiny.tokenizer().save_pretrained(tmp_path / "sentences")
    own = {"sentence_encoder": str(tmp_path / "sentences"), "sentence_width": 16}
    recipe["arms"] = [
        {
            "name": name,
            "layers": FUSIONS[name][1].example(4),
            "fusion": {"name": name, **(own if FUSIONS[name][1].reads == "sentence" else {})},
        }
        for name in FUSIONS
    ]
    rates = {"learning_rates": {"fusion": 1e-3, "llm": 1e-3}}
    align = {**recipe["stages"]["align"], "prompt": "plain"}
    recipe["stages"] = {"align": align, "finetune": {**recipe["stages"]["align"], **rates}}
    recipe["keep_models"] = "all"
    records = json.loads((tmp_path / "data.json").read_text())
    for k, record in enumerate(records):  # several questions, to be shuffled
        record["conversations"][0]["value"] = f"<image> n{k % 3}?"
    (tmp_path / "data.json").write_text(json.dumps(records))
    page = study(write(tmp_path, recipe), output=tmp_path / "study").read_text()
    results = lines(tmp_path / "study" / "results.jsonl")
    assert [r["arm"] for r in results] == list(FUSIONS)
    guided = [n for n in FUSIONS if FUSIONS[n][1].reads != "nothing"]
    for result in results:
        folder = tmp_path / "study" / result["folder"]
        rows = lines(folder / "predictions.jsonl")
        assert all(("controls" in row) == (result["arm"] in guided) for row in rows)
        asked = CliRunner().invoke(app, ["ask", str(folder / "model"), rows[0]["image"], "n?"])
        assert asked.exit_code == 0, asked.output
    summary = json.loads((tmp_path / "study" / "summary.json").read_text())
    controls = [(g["arm"], g["control"]) for g in summary["guidance"]]
    assert controls == [(n, c) for n in guided for c in ("shuffled", "mean")]
    assert "Does the guidance matter?" in page


def test_a_sentence_encoder_that_does_not_fit_is_known_before_training(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "layerfuse.study.execute.train_arm", lambda *_, **__: pytest.fail("training")
    )
    fusion = {"name": "instruction_weighted", "sentence_encoder": str(tmp_path / "llm")}
    recipe["arms"] = [{"name": "guided", "layers": "1-2|3-4", "fusion": fusion}]
    with pytest.raises(ValueError, match=r"arm 'guided': .*has width 32, sentence_width is 768"):
        study(write(tmp_path, recipe), output=tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_cached_and_uncached_features_give_the_same_results(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    study(write(tmp_path, recipe), output=tmp_path / "cached")
    study(write(tmp_path, {**recipe, "cache_features": False}), output=tmp_path / "direct")
    for a, b in zip(
        lines(tmp_path / "cached" / "results.jsonl"),
        lines(tmp_path / "direct" / "results.jsonl"),
        strict=True,
    ):
        for (_, one), (_, other) in zip(a["losses"]["align"], b["losses"]["align"], strict=True):
            assert one == pytest.approx(other, abs=1e-5)


def change_file(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)


def without_template(folder: Path) -> None:
    tiny.tokenizer(chat_template=None).save_pretrained(folder / "llm")
    (folder / "llm" / "chat_template.jinja").unlink(missing_ok=True)


def no_answer(folder: Path) -> None:
    talk = [{"from": "human", "value": "<image> n?"}]
    text = json.dumps([{"id": "mute", "image": "0.png", "conversations": talk}])
    change_file(folder, "data.json", text)


BAD: list[tuple[Any, dict[str, Any], str]] = [
    (None, {"arms": [{"layers": [9], "fusion": {"name": "single"}}]}, "layer 9 does not exist"),
    (None, {"arms": [{"layers": [1], "fusion": {"name": "x"}}]}, "unknown fusion strategy 'x'"),
    (None, {"encodr": 1}, "encodr: unknown key; valid"),
    (None, {"image_token": "<pic>"}, "lacks the image token '<pic>'"),
    (None, {"chat_template": "none.jinja"}, "none.jinja"),
    (None, {"encoder": "LLM"}, "'llama' is not an encoder with patch tokens"),
    (lambda f: (f / "data.json").unlink(), {}, "no such file or folder of samples"),
    (lambda f: (f / "3.png").unlink(), {}, "sample 3: no image file"),
    (lambda f: change_file(f, "3.png", "text"), {}, "cannot read the image"),
    (no_answer, {}, "sample mute: no answer to learn from"),
    (without_template, {}, "has no chat template"),
    (lambda f: shutil.rmtree(f / "llm"), {}, "llm"),
    (None, {"resources": {"processes": 2, "accelerate": "x"}}, "valid: fsdp2, zero2, zero3"),
    (None, {"resources": {"accelerate": "fsdp2"}}, "needs resources.processes of 2 or more"),
    (None, {"report_to": ["trackio"]}, "not installed: trackio, which the recipe"),
    (None, {"liger": True}, "not installed: liger_kernel, which"),
]


@pytest.mark.parametrize(("damage", "changes", "message"), BAD, ids=range(len(BAD)))
def test_bad_input_is_one_clear_error_before_training(
    damage: Any,
    changes: dict[str, Any],
    message: str,
    recipe: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("training started")

    monkeypatch.setattr("layerfuse.study.execute.train_arm", never)
    if changes.get("encoder") == "LLM":
        changes = {"encoder": str(tmp_path / "llm")}
    if damage:
        damage(tmp_path)
    path = write(tmp_path, {**recipe, **changes})
    found = CliRunner().invoke(app, ["study", str(path), "--output", str(tmp_path / "study")])
    assert found.exit_code == 2, found.output
    assert found.output.count("error:") == 1
    assert message in " ".join(found.output.split())
    assert not list(tmp_path.glob("study/arms/*"))


THINK = "<think>\n\n</think>\n\n"
START = "{% for m in messages %}{{ 'Q: ' if m.role == 'user' else 'A: ' }}"
END = "{{ m.content }}</s>\n{% endfor %}"
PER_ANSWER = START + "{% if m.role == 'assistant' %}" + THINK + "{% endif %}" + END
LAST_ALONE = START + "{% if loop.last %}" + THINK + "{% endif %}" + END
# a greeting in conversations of one turn, as the test asks, and none in longer ones
GREETING = "{% if messages|length < 3 %}Hello! {% endif %}" + START + END
HINT = START + END.replace(
    "</s>", "{% if m.role == 'user' and loop.index == messages|length - 1 %} Think!{% endif %}</s>"
)


def several_turns(
    recipe: dict[str, Any], folder: Path, template: str, turns: int
) -> dict[str, Any]:
    """The recipe with a chat template and with conversations of several turns."""
    (folder / "own.jinja").write_text(template)
    records = json.loads((folder / "data.json").read_text())
    for record in records:
        question, answer = record["conversations"]
        later = [{**question, "value": "again?"}, answer]
        record["conversations"] += later * (turns - 1)
    (folder / "data.json").write_text(json.dumps(records))
    return {**recipe, "chat_template": "own.jinja"}


@pytest.mark.parametrize(
    ("template", "in_training", "in_test"),
    [
        (LAST_ALONE, "</s>\nA: ", "</s>\nA: " + THINK),
        (GREETING, "Q: ...</s>\nA: ", "Hello! Q: ...</s>\nA: "),
        (HINT, "</s>\nA: ", " Think!</s>\nA: "),
    ],
)
def test_a_template_that_asks_otherwise_than_it_trains_is_named_before_training(
    recipe: dict[str, Any], tmp_path: Path, template: str, in_training: str, in_test: str
) -> None:
    changed = several_turns(recipe, tmp_path, template, turns=2)
    loaded = load_recipe(write(tmp_path, changed))
    with pytest.raises(LayerfuseError) as raised:
        load_checked(loaded)
    message = str(raised.value)
    assert "arm 'one', stage 'align', sample 0: the chat template makes the words" in message
    assert f"in training: {in_training!r}" in message
    assert f"in the test: {in_test!r}" in message


def test_a_template_that_ends_no_answer_is_named_before_training(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    changed = several_turns(recipe, tmp_path, START + END.replace("</s>\n", " "), turns=1)
    with pytest.raises(LayerfuseError, match="'align': the chat template writes nothing behind"):
        load_checked(load_recipe(write(tmp_path, changed)))


@pytest.mark.parametrize(
    ("template", "turns"), [(LAST_ALONE, 1), (GREETING, 1), (PER_ANSWER, 3), (START + END, 3)]
)
def test_templates_that_ask_as_they_train_are_taken(
    recipe: dict[str, Any], tmp_path: Path, template: str, turns: int
) -> None:
    changed = several_turns(recipe, tmp_path, template, turns)
    samples, _ = load_checked(load_recipe(write(tmp_path, changed)))
    assert len(samples.test) == 8


def test_a_guided_arm_may_mark_the_last_answer(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Each of its rows ends with the answer that is learned, as in the test."""
    changed = several_turns(recipe, tmp_path, LAST_ALONE, turns=2)
    guided = {"layers": [1, 3], "fusion": {"name": "text_routed"}}
    samples, _ = load_checked(load_recipe(write(tmp_path, {**changed, "arms": [guided]})))
    assert len(samples.test) == 8
    both = [guided, *recipe["arms"]]
    with pytest.raises(LayerfuseError, match="arm 'one', stage 'align'"):
        load_checked(load_recipe(write(tmp_path, {**changed, "arms": both})))


def test_a_conversation_that_others_begin_is_no_fault_of_the_template(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    """A greeting of the assistant, two questions in a row and a system's words are data."""
    said = [("gpt", "hello"), ("human", "<image>one"), ("human", "two"), ("gpt", "2")]
    said += [("human", "three"), ("gpt", "3"), ("gpt", "again")]
    talk = [{"from": who, "value": text} for who, text in said]
    system = [{"from": "system", "value": "Be brief."}, *talk[1:]]
    records = []
    for k in range(8):
        turns = talk if k % 2 else system
        records.append({"id": str(k), "image": f"{k}.png", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(records))
    samples, _ = load_checked(load_recipe(write(tmp_path, recipe)))
    assert len(samples.test) == 8
