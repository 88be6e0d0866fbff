"""`layerfuse eval` keeps every answer as it comes, and answers the same in any way that it is run:
stopped and continued, with features from the cache, in several processes, in bfloat16."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from typer.testing import CliRunner

from layerfuse.data.sources import load
from layerfuse.errors import LayerfuseError
from layerfuse.evaluate import predict as predict_module
from layerfuse.evaluate.answer import Answerer
from layerfuse.evaluate.evaluation import data_of, evaluate
from layerfuse.evaluate.likelihood import AnswerLikelihood, answer_likelihoods
from layerfuse.evaluate.load_answerer import load_answerer
from layerfuse.evaluate.questions import Question, questions
from layerfuse.evaluate.suite_run import evaluate_suite
from layerfuse.recipe.evaluate_settings import Evaluation
from layerfuse_cli.app import app
from tests import tiny
from tests.made_up_benchmarks import (
    column,
    suite_of,
    write_picture,
    write_realmix,
    write_scienceqa,
)
from tests.studies import read_lines

QUIET = Console(quiet=True)
WORDS = ("What is it?", "Which colour has the large thing in the middle?", "How many?", "Where?")
"""Of different lengths: rows of a batch are padded on the left."""
NUM_QUESTIONS = 2 * len(WORDS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random model that is guided by the question."""
    return tiny.save_model(tmp_path_factory.mktemp("models") / "model", "text_routed")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two pictures with four questions each."""
    records: list[dict[str, Any]] = []
    for number in range(2):
        write_picture(tmp_path / f"{number}.png", 60 + 90 * number)
        turns: list[dict[str, str]] = []
        for place, words in enumerate(WORDS):
            marker = "<image>\n" if place == 0 else ""
            turns.append({"from": "human", "value": f"{marker}{words}"})
            turns.append({"from": "gpt", "value": f"answer {number} {place}"})
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(records))
    return file


def evaluation_of(data: Path, **settings: Any) -> Evaluation:
    """How the data are asked: three questions at once, so that the last batch is smaller."""
    settings = {"batch_size": 3, "max_new_tokens": 6, **settings}
    return Evaluation(data=data_of(str(data), "test"), **settings)


def run(model: Path, data: Path, output: Path, **settings: Any) -> Path:
    """Evaluate the model on the data."""
    cached = settings.pop("cached", False)
    evaluation = evaluation_of(data, **settings)
    return evaluate(model, evaluation, output=output, cached=cached, console=QUIET)


def outcome(folder: Path) -> list[Any]:
    """What two runs must share: answers, scores, and the lines but for their seconds."""
    found: list[Any] = [read_lines(folder / "predictions.jsonl")]
    found.append(json.loads((folder / "scores.json").read_text()))
    for file in sorted(folder.glob("*.jsonl")):
        if file.name == "predictions.jsonl":
            continue
        lines = read_lines(file)
        for line in lines:
            assert line.pop("seconds") >= 0
        found.append({file.name: sorted(lines, key=lambda line: line["id"])})
    return found


# Lines


def test_each_answer_is_a_line_with_all_that_is_known(
    model: Path, data: Path, tmp_path: Path
) -> None:
    folder = run(model, data, tmp_path / "out")

    lines = read_lines(folder / "answers.jsonl")
    records = read_lines(folder / "predictions.jsonl")
    assert len(lines) == len(records) == NUM_QUESTIONS
    by_id = {line["id"]: line for line in lines}
    for record, words in zip(records, [*WORDS, *WORDS], strict=True):
        line = by_id[record["id"]]
        assert set(line) == {"id", "prompt", "output", "parsed", "score", "seconds"}
        assert line["prompt"] == words
        assert line["output"] == record["prediction"]
        assert line["score"] == record["score"]
    assert sorted(file.name for file in folder.glob("answers.*.jsonl")) == [
        "answers.mean.jsonl",
        "answers.shuffled.jsonl",
    ]


def test_lines_are_written_while_it_runs(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    answer = Answerer.answer

    def watch(self: Answerer, asked: list[Question], **options: Any) -> list[str]:
        file = tmp_path / "out" / "answers.jsonl"
        seen.append(len(read_lines(file)))
        return answer(self, asked, **options)

    monkeypatch.setattr(Answerer, "answer", watch)
    run(model, data, tmp_path / "out", controls=())

    assert seen == [0, 3, 6]


def test_the_folder_has_the_name_of_the_data(data: Path, tmp_path: Path) -> None:
    """Two files are tested one after the other, and both results stay."""
    folder = tiny.save_model(tmp_path / "model")
    other = data.with_name("other.json")
    other.write_bytes(data.read_bytes())

    first = evaluate(folder, evaluation_of(data), console=QUIET)
    second = evaluate(folder, evaluation_of(other), console=QUIET)

    assert first == folder / "evaluation" / "mine"
    assert second == folder / "evaluation" / "other"


# Resuming


class StoppedError(Exception):
    """In the place of a kill."""


@pytest.mark.parametrize("calls", [1, 2, 5, 9])
def test_a_run_that_was_stopped_goes_on(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """Stopped at some batch of likelihoods, of answers, and of answers under a control."""
    expected = outcome(run(model, data, tmp_path / "whole"))
    asked: list[str] = []

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def count(answerer: Answerer, batch: list[Question], **options: Any) -> Any:
            if len(asked) == calls - 1:
                raise StoppedError
            asked.append(function.__name__)
            return function(answerer, batch, **options)

        return count

    with monkeypatch.context() as patch:
        patch.setattr(predict_module, "answer_likelihoods", counted(answer_likelihoods))
        patch.setattr(Answerer, "answer", counted(Answerer.answer))
        with pytest.raises(StoppedError):
            run(model, data, tmp_path / "out")
    kept = {file.name: file.read_bytes() for file in (tmp_path / "out").glob("*.jsonl")}

    assert outcome(run(model, data, tmp_path / "out")) == expected
    # Nothing is asked twice: lines of before are still there, with their seconds.
    for name, content in kept.items():
        assert (tmp_path / "out" / name).read_bytes().startswith(content)
    assert len(asked) == calls - 1


def test_answers_that_are_known_are_lines_too(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that greedy decoding is known to give, which are not generated: once, also if the run
    is stopped behind them."""

    def half_known(_: Answerer, asked: list[Question], **__: Any) -> list[AnswerLikelihood]:
        found: list[AnswerLikelihood] = []
        for question in asked:
            is_known = int(question.id.rpartition("/")[2]) % 2 == 0
            found.append(AnswerLikelihood(total=-3.0, tokens=2, greedy=is_known))
        return found

    def stop(*_: Any, **__: Any) -> list[str]:
        raise StoppedError

    monkeypatch.setattr(predict_module, "answer_likelihoods", half_known)
    with monkeypatch.context() as patch:
        patch.setattr(Answerer, "answer", stop)
        with pytest.raises(StoppedError):
            run(model, data, tmp_path / "out", controls=())
    file = tmp_path / "out" / "answers.jsonl"
    assert len(read_lines(file)) == NUM_QUESTIONS / 2

    run(model, data, tmp_path / "out", controls=())

    lines = read_lines(file)
    assert len(lines) == NUM_QUESTIONS
    for line in lines[: NUM_QUESTIONS // 2]:
        sample, turn = line["id"].split("/")
        assert line["output"] == f"answer {sample} {turn}"
        assert (line["score"], line["seconds"]) == (1, 0)
    assert all(line["seconds"] > 0 for line in lines[NUM_QUESTIONS // 2 :])


def test_an_answer_that_another_batch_might_change_is_not_known(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is generated, as one that is wrong is."""

    def all_unsure(_: Answerer, asked: list[Question], **__: Any) -> list[AnswerLikelihood]:
        return [AnswerLikelihood(-3.0, 2, greedy=True, too_close=True) for _ in asked]

    monkeypatch.setattr(predict_module, "answer_likelihoods", all_unsure)
    evaluation = evaluation_of(data, controls=())

    evaluate(model, evaluation, output=tmp_path / "settled", console=QUIET)
    evaluate(model, evaluation, output=tmp_path / "batched", batch_invariant=False, console=QUIET)

    settled = read_lines(tmp_path / "settled" / "answers.jsonl")
    batched = read_lines(tmp_path / "batched" / "answers.jsonl")
    assert all(line["seconds"] > 0 for line in settled)
    assert all(line["seconds"] == 0 for line in batched)


def test_a_finished_run_asks_nothing(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = outcome(run(model, data, tmp_path / "out"))

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("asked again")

    monkeypatch.setattr(predict_module, "answer_likelihoods", refuse)
    monkeypatch.setattr(Answerer, "answer", refuse)
    assert outcome(run(model, data, tmp_path / "out")) == expected


def other_answer(data: Path) -> dict[str, Any]:
    data.write_text(data.read_text().replace("answer 1 2", "answer 1 3"))
    return {}


def other_question(data: Path) -> dict[str, Any]:
    data.write_text(data.read_text().replace("How many", "How few"))
    return {}


def longer_answers(data: Path) -> dict[str, Any]:
    return {"max_new_tokens": 7}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_answer, "holds answers to other questions"),
        (other_question, "holds answers to other questions"),
        (longer_answers, "holds answers to another prompt"),
    ],
)
def test_answers_to_something_else_are_not_continued(
    model: Path,
    data: Path,
    tmp_path: Path,
    change: Callable[[Path], dict[str, Any]],
    message: str,
) -> None:
    run(model, data, tmp_path / "out")
    settings = change(data)

    with pytest.raises(LayerfuseError, match=message):
        run(model, data, tmp_path / "out", **settings)


def test_answers_of_another_model_are_not_continued(
    model: Path, data: Path, tmp_path: Path
) -> None:
    run(model, data, tmp_path / "out")
    other = tiny.save_model(tmp_path / "other", "text_routed", seed=2)

    with pytest.raises(LayerfuseError, match="holds answers of another model"):
        run(other, data, tmp_path / "out")


# The same answers in any way


def test_cached_features_give_the_same_answers(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAYERFUSE_HOME", str(tmp_path / "home"))
    expected = outcome(run(model, data, tmp_path / "plain"))

    assert outcome(run(model, data, tmp_path / "filling", cached=True)) == expected

    # Nothing is encoded: what lies in the cache is read.
    monkeypatch.setattr("layerfuse.model.vlm.FusionVLM.encode_images", None)
    monkeypatch.setattr("layerfuse.vision.encoder.Encoder.forward", None)
    assert outcome(run(model, data, tmp_path / "read", cached=True)) == expected


def test_a_suite_reads_cached_features_too(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAYERFUSE_HOME", str(tmp_path / "home"))
    write_scienceqa(tmp_path / "benchmarks" / "scienceqa")
    suite = suite_of(column("SQA", "scienceqa"))

    def lines_of(name: str, cached: bool) -> list[Any]:
        folder = evaluate_suite(
            model,
            suite,
            benchmarks=tmp_path / "benchmarks",
            output=tmp_path / name,
            cached=cached,
            likelihood=True,
            console=QUIET,
        )
        lines: list[Any] = []
        for line in read_lines(folder / "scienceqa" / "answers.jsonl"):
            lines.append((line["id"], line["output"], line["score"]))
        for line in read_lines(folder / "scienceqa" / "choices.jsonl"):
            lines.append((line["id"], line["chosen"]))
        return lines

    expected = lines_of("plain", cached=False)
    assert lines_of("filling", cached=True) == expected
    monkeypatch.setattr("layerfuse.vision.encoder.Encoder.forward", None)
    assert lines_of("read", cached=True) == expected


def of_data(model: Path, data: Path, output: Path) -> list[str]:
    """A test of the data, with controls."""
    options = ["--data", str(data), "--batch-size", "3", "--max-new-tokens", "6", "--controls"]
    return ["eval", str(model), *options, "--output", str(output)]


def of_suite(model: Path, data: Path, output: Path) -> list[str]:
    """A suite of two benchmarks, of which one has closed questions."""
    benchmarks = data.parent / "benchmarks"
    write_realmix(benchmarks / "realmix")
    write_scienceqa(benchmarks / "scienceqa")
    suite = suite_of(column("SQA", "scienceqa"), column("counting", "realmix", column="counting"))
    file = data.parent / "both.yaml"
    file.write_text(yaml.safe_dump(suite.model_dump(mode="json")))
    options = ["--suite", str(file), "--benchmarks", str(benchmarks), "--likelihood"]
    return ["eval", str(model), *options, "--batch-size", "2", "--output", str(output)]


def lines_of(folder: Path) -> dict[str, list[Any]]:
    """The lines of all files below a folder, but for their seconds and their order."""
    found: dict[str, list[Any]] = {}
    for file in folder.rglob("*.jsonl"):
        lines = read_lines(file)
        for line in lines:
            line.pop("seconds", None)
            # Likelihoods of other batches differ in their last digits.
            for name in ("likelihood", "log_likelihood", "log_likelihoods", "weights"):
                line.pop(name, None)
        found[str(file.relative_to(folder))] = sorted(lines, key=lambda line: line["id"])
    return found


@pytest.mark.parametrize("arguments", [of_data, pytest.param(of_suite, marks=pytest.mark.slow)])
def test_two_processes_are_one(
    model: Path, data: Path, tmp_path: Path, arguments: Callable[[Path, Path, Path], list[str]]
) -> None:
    """Each asks every second batch; the first writes and prints."""
    alone = tmp_path / "alone"
    shared = tmp_path / "shared"
    ended = CliRunner().invoke(app, arguments(model, data, alone))
    assert ended.exit_code == 0, ended.output

    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launched = subprocess.run(
        [*command, "--standalone", "-m", "layerfuse", *arguments(model, data, shared)],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert launched.returncode == 0, launched.stderr
    assert launched.stdout.count("answers and scores:") == 1
    expected = lines_of(alone)
    assert sum(len(lines) for lines in expected.values()) > NUM_QUESTIONS
    assert lines_of(shared) == expected


def test_the_batch_changes_nothing_in_bfloat16(model: Path, data: Path) -> None:
    """Sums of other lengths are rounded otherwise; what is said of the answers stays."""
    answerer = load_answerer(model)
    answerer.model.to(torch.bfloat16)
    asked = list(questions(load(data_of(str(data), "test"))))

    one_by_one = answer_likelihoods(answerer, asked, batch_size=1)
    together = answer_likelihoods(answerer, asked, batch_size=len(asked))

    for one, other in zip(one_by_one, together, strict=True):
        assert one.tokens == other.tokens
        assert one.mean == pytest.approx(other.mean, abs=0.03)
    texts = answerer.answer(asked, max_new_tokens=6, batch_size=1)
    assert len(set(texts)) > 1
    assert answerer.answer(asked, max_new_tokens=6, batch_size=len(asked)) == texts


def test_answers_in_another_dtype_are_other_answers(
    model: Path, data: Path, tmp_path: Path
) -> None:
    """They are not continued, and the cached features are those of that dtype."""
    arguments = ["eval", str(model), "--data", str(data), "--output", str(tmp_path / "answers")]
    saved = CliRunner().invoke(app, arguments)
    other = CliRunner().invoke(app, [*arguments, "--dtype", "bfloat16"])
    again = CliRunner().invoke(app, arguments)

    assert saved.exit_code == 0, saved.output
    assert other.exit_code == 2
    assert "in another --dtype" in " ".join(other.output.split())
    assert again.exit_code == 0, again.output


def test_answers_as_batched_are_other_answers(model: Path, data: Path, tmp_path: Path) -> None:
    arguments = ["eval", str(model), "--data", str(data), "--output", str(tmp_path / "answers")]
    settled = CliRunner().invoke(app, arguments)
    other = CliRunner().invoke(app, [*arguments, "--no-batch-invariant"])

    assert settled.exit_code == 0, settled.output
    assert other.exit_code == 2
    assert "with another --batch-invariant" in " ".join(other.output.split())


def test_a_model_in_half_precision_answers_in_float32(model: Path, data: Path) -> None:
    """As the same weights, widened."""
    narrow = load_answerer(model, "bfloat16")
    wide = load_answerer(model, "float32")
    assert narrow.model.dtype == torch.bfloat16
    assert wide.model.dtype == torch.float32
    # Angles of positions are never rounded, as they are not where a checkpoint is loaded.
    for name, buffer in narrow.model.language_model.named_buffers():
        assert torch.equal(buffer, wide.model.language_model.get_buffer(name)), name
    asked = list(questions(load(data_of(str(data), "test"))))

    one_by_one = answer_likelihoods(wide, asked, batch_size=1)
    together = answer_likelihoods(wide, asked, batch_size=len(asked))

    for one, other in zip(one_by_one, together, strict=True):
        assert one.mean == pytest.approx(other.mean, abs=1e-5)
