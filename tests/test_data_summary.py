"""What the sources of a study hold is counted, printed, and stands in the report."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from layerfuse.data.lazy_records import Samples
from layerfuse.data.sample import Sample
from layerfuse.data.sample_sets import SampleSets
from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.evaluation import data_of, evaluate
from layerfuse.recipe.evaluate_settings import Evaluation
from layerfuse.study.coordinate import study, train
from layerfuse.study.data_summary import (
    print_data_summary,
    read_data_summary,
    summarize_data,
    write_data_summary,
)
from layerfuse.vision.picture import Picture
from tests.studies import one_line, read_samples, run_study, write_recipe, write_samples


def sample(id: str, pictures: list[str], *answers: str) -> Sample:
    """A conversation with these answers about pictures of these names."""
    messages = []
    for answer in answers:
        messages.append({"role": "user", "content": "?"})
        messages.append({"role": "assistant", "content": answer})
    return Sample(id, tuple(Picture(name) for name in pictures), tuple(messages))


def as_it_is(index: int, record: Any) -> Sample:
    """A record that is a sample already."""
    return record


def samples_of(*samples: Sample) -> Samples:
    """Some samples as a source."""
    return Samples(list(samples), as_it_is)


def test_a_source_is_counted() -> None:
    """`a` and `b` hold the same bytes."""
    source = samples_of(
        sample("0", ["a"], "red", "two"),
        sample("1", ["b"], "red"),
        sample("2", ["c"], "blue"),
        sample("3", [], "yes"),
    )
    digests = {"a": "same", "b": "same", "c": "other"}
    tokens = {"align": [10, 4, 6, 9], "evaluate": [5]}

    sets = SampleSets({"align": source}, samples_of(sample("4", [], "no")))
    align, test = summarize_data(sets, digests, tokens)

    assert (align.source, align.samples, align.pictures, align.without_picture) == (
        "align",
        4,
        2,
        1,
    )
    # Four answers about two pictures; the fifth has none.
    assert align.questions == 5
    assert align.questions_per_picture == 2
    assert [(common.answer, common.share) for common in align.commonest] == [
        ("red", 0.4),
        ("two", 0.2),
        ("blue", 0.2),
        ("yes", 0.2),
    ]
    assert align.tokens == [4, 7.5, 10]
    assert test.questions_per_picture is None


def test_a_greeting_answers_no_question() -> None:
    greeting = {"role": "assistant", "content": "Hello!"}
    asked = sample("0", ["a"], "red")
    source = samples_of(replace(asked, messages=(greeting, *asked.messages)))

    align, _ = summarize_data(
        SampleSets({"align": source}, source),
        {"a": "a"},
        {"align": [3], "evaluate": [3]},
    )

    assert align.questions == 1
    assert [common.answer for common in align.commonest] == ["red"]


def test_ten_answers_are_named_and_no_terminal_cuts_them(tmp_path: Path) -> None:
    answers = [f"answer {number}" for number in range(20)]
    source = samples_of(sample("0", ["a"], *answers))
    sets = SampleSets({"align": source}, source)
    summaries = summarize_data(sets, {"a": "a"}, {"align": [3], "evaluate": [3]})

    with (tmp_path / "printed.txt").open("w") as file:
        print_data_summary(summaries, Console(file=file, width=80))

    printed = (tmp_path / "printed.txt").read_text()
    assert "align: the 10 commonest answers are 50 % of all: answer 0 5.0 %, answer 1" in printed
    assert "…" not in printed
    table = [line for line in printed.splitlines() if not line.startswith(("align:", "evaluate:"))]
    assert max(len(line) for line in table) <= 80


def test_what_is_written_is_read(tmp_path: Path) -> None:
    source = samples_of(sample("0", ["a"], "red"))
    sets = SampleSets({"align": source}, source)
    summaries = summarize_data(sets, {"a": "a"}, {"align": [3], "evaluate": [3]})

    write_data_summary(tmp_path, summaries)

    assert read_data_summary(tmp_path) == summaries
    # Studies of older versions have no such file.
    assert read_data_summary(tmp_path / "older") == []


def test_a_study_says_what_its_data_hold(recipe: dict[str, Any], tmp_path: Path) -> None:
    said = run_study(write_recipe(tmp_path, recipe), tmp_path / "study")

    assert said.exit_code == 0, said.output
    num_samples = len(read_samples(tmp_path))
    align, test = read_data_summary(tmp_path / "study")
    assert (align.samples, align.pictures, test.source) == (num_samples, num_samples, "evaluate")
    assert "tokens" in one_line(said)
    assert "align: the 2 commonest answers are 100 % of all:" in one_line(said)
    report = (tmp_path / "study" / "report.html").read_text()
    assert ">Data</h2>" in report
    assert "Top ten" in report


def make_long(folder: Path, words: int) -> None:
    """Let the first sample ask with that many words."""
    samples = read_samples(folder)
    samples[0]["conversations"][0]["value"] = "<image>" + " n" * words
    write_samples(folder, samples)


def test_a_sample_longer_than_the_positions_of_the_llm_is_named(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    """The tiny LLM has 512 positions, and no stage cuts shorter."""
    make_long(tmp_path, words=600)

    with pytest.raises(LayerfuseError, match=r"sample .*: \d+ tokens, but the LLM has 512 pos"):
        study(write_recipe(tmp_path, recipe), output=tmp_path / "study")


def test_a_cut_that_leaves_the_answer_makes_a_long_sample_usable(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    """The answer to the first question stands before the cut."""
    samples = read_samples(tmp_path)
    question, answer = samples[0]["conversations"]
    long_question = {"from": "human", "value": " n" * 600}
    long_sample = {**samples[0], "conversations": [question, answer, long_question, answer]}
    write_samples(tmp_path, [long_sample, *samples[1:]], "long.json")
    recipe["stages"]["align"] = {
        **recipe["stages"]["align"],
        "data": {"path": "long.json"},
        "max_length": 100,
    }

    study(write_recipe(tmp_path, recipe), output=tmp_path / "study")

    align, _ = read_data_summary(tmp_path / "study")
    # As long as it is, not as it is cut.
    assert align.tokens[2] > 600


def test_a_question_must_leave_positions_for_its_answer(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe["evaluate"]["max_new_tokens"] = 500

    with pytest.raises(LayerfuseError, match=r"and 500 for the answer \(max_new_tokens\), but"):
        study(write_recipe(tmp_path, recipe), output=tmp_path / "study")


def test_questions_of_the_test_are_asked_one_by_one(recipe: dict[str, Any], tmp_path: Path) -> None:
    """A conversation longer than the positions is no fault where each question fits."""
    samples = read_samples(tmp_path)
    question, answer = samples[0]["conversations"]
    long_question = {"from": "human", "value": " n" * 200}
    talk = [question, answer]
    for _ in range(3):
        talk += [long_question, answer]
    write_samples(tmp_path, [{**samples[0], "conversations": talk}, *samples[1:]], "long.json")
    recipe["evaluate"]["data"] = {"path": "long.json"}

    study(write_recipe(tmp_path, recipe), output=tmp_path / "study")

    _, test = read_data_summary(tmp_path / "study")
    assert 400 < test.tokens[2] < 512


def test_eval_names_a_question_that_leaves_no_positions(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    trained = train(write_recipe(tmp_path, recipe), arm="one", output=tmp_path / "run")
    data = data_of(str(tmp_path / "data.json"), "test")

    with pytest.raises(LayerfuseError, match=r"and 500 for the answer .*8 of 8 samples cannot be"):
        evaluate(trained.model, Evaluation(data=data, max_new_tokens=500))
    assert not (trained.model / "evaluation").exists()


@pytest.mark.parametrize(("end", "answer"), [("\n", "a\nb"), ("###", "a### b")])
def test_an_answer_that_holds_the_end_of_a_turn_is_named(
    recipe: dict[str, Any], tmp_path: Path, end: str, answer: str
) -> None:
    """Generation would stop there: no model could give this answer."""
    samples = read_samples(tmp_path)
    # A part of an end of several tokens is an answer like any other.
    samples[0]["conversations"][1]["value"] = "# 1"
    samples[1]["conversations"][1]["value"] = answer
    write_samples(tmp_path, samples)
    turn = "{% for m in messages %}{{ m.role + ': ' + m.content }}" + end + "{% endfor %}"
    (tmp_path / "own.jinja").write_text(turn)
    recipe["chat_template"] = "own.jinja"

    with pytest.raises(LayerfuseError, match=r"sample 1: an answer holds .*; 1 of 8") as raised:
        study(write_recipe(tmp_path, recipe), output=tmp_path / "study")
    assert f"holds {end!r}, at which the chat template ends a turn" in str(raised.value)
