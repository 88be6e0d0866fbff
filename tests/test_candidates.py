"""Closed questions answered by likelihood."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from layerfuse.evaluate import candidates
from layerfuse.evaluate.answer import Answerer
from layerfuse.evaluate.answer_folder import AskedModel
from layerfuse.evaluate.asking import answer_folder
from layerfuse.evaluate.benchmarks import BENCHMARKS, Item
from layerfuse.evaluate.candidates import (
    CHOICES,
    MOST_CANDIDATES,
    Choice,
    choose,
    judged_choices,
    possible_answers,
)
from layerfuse.evaluate.questions import Question
from layerfuse.evaluate.suites import Prompt
from layerfuse.vision.picture import Picture
from tests import tiny

PROMPT = Prompt(text="{question}\n{options}", max_new_tokens=4)


def item(name: str, answer: str, group: str = "all", *options: str) -> Item:
    """A question without a picture."""
    return Item(name, (), f"Which is {name}?", (answer,), group=group, options=options)


@pytest.fixture
def closed_items(tmp_path: Path) -> list[Item]:
    """Questions with two and three options, and one that has none."""
    file = tmp_path / "picture.png"
    Image.new("RGB", (32, 32), (200, 30, 90)).save(file)
    pictures = (Picture(str(file)),)
    return [
        Item("one", pictures, "Which colour?", ("A",), options=("red", "blue")),
        Item("two", pictures, "How many things?", ("C",), options=("1", "2", "3")),
        Item("three", (), "Which of them is 2 + 2?", ("B",), options=("3", "4", "5")),
    ]


@pytest.fixture
def answerer() -> Answerer:
    """A tiny random model."""
    model = tiny.model("concat")
    return Answerer(model, tiny.processor(model))


def test_what_a_family_is_asked_is_compared_rather_than_what_its_group_is() -> None:
    """A category may hold questions of several kinds, some of them open."""
    items = [
        Item("x", (), "Which fruit?", ("apple",), group="recognition", family="fruit"),
        Item("y", (), "Which fruit?", ("pear",), group="recognition", family="fruit"),
        Item("z", (), "Is it ripe?", ("yes",), group="recognition", family="ripe"),
    ]

    assert possible_answers(items) == {
        "x": ("apple", "pear"),
        "y": ("apple", "pear"),
        "z": ("yes", "no"),
    }


def test_questions_with_options_are_answered_by_their_letters() -> None:
    possible = possible_answers([item("x", "B", "all", "red", "green", "blue")])

    assert possible == {"x": ("A", "B", "C")}


def test_yes_and_no_are_possible_even_if_one_is_never_right() -> None:
    possible = possible_answers([item("x", "yes", "pope"), item("y", "Yes", "pope")])

    assert possible == {"x": ("Yes", "No"), "y": ("Yes", "No")}


def test_else_the_answers_of_the_group_are_possible() -> None:
    items = [
        item("x", "red", "colour"),
        item("y", "2", "count"),
        item("z", "blue", "colour"),
        item("w", "red", "colour"),
    ]

    possible = possible_answers(items)

    assert possible["x"] == possible["z"] == possible["w"] == ("red", "blue")
    assert possible["y"] == ("2",)


def test_a_letter_is_no_answer_to_an_open_question() -> None:
    """RealWorldQA asks both kinds."""
    items = [item("x", "B", "all", "red", "blue"), item("y", "3", "all"), item("z", "no", "all")]

    possible = possible_answers(items)

    assert possible == {"x": ("A", "B"), "y": ("3", "no"), "z": ("3", "no")}


def test_a_group_of_too_many_answers_is_open() -> None:
    closed = [item(f"c{number}", f"word {number}", "few") for number in range(MOST_CANDIDATES)]
    open_items = [item(f"o{number}", f"name {number}", "many") for number in range(65)]

    possible = possible_answers([*closed, *open_items])

    assert set(possible) == {each.id for each in closed}
    assert MOST_CANDIDATES == 64


def naive_log_likelihood(answerer: Answerer, asked: Item, answer: str) -> float:
    """One token of the answer after the other, in a batch of one and without padding."""
    processor = answerer.processor
    words = PROMPT.ask(asked)
    inputs = {}
    if asked.pictures:
        words = "<image>\n" + words
        images = [asked.pictures[0].open()]
        inputs["pixel_values"] = processor.image_processor(images, return_tensors="pt")[
            "pixel_values"
        ]
    messages = [{"role": "user", "content": words}]
    prompt = processor.text_inputs([messages], 16)["input_ids"][0].tolist()
    said = processor.tokenizer(f"{answer}</s>", add_special_tokens=False)["input_ids"]
    total = 0.0
    for place, token in enumerate(said):
        ids = torch.tensor([prompt + said[:place]])
        with torch.no_grad():
            logits = answerer.model(input_ids=ids, **inputs).logits[0, -1].float()
        total += float(logits.log_softmax(0)[token])
    return total


def choices_of(
    answerer: Answerer, items: list[Item], folder: Path, batch_size: int = 32
) -> list[Choice]:
    """What the model chooses, kept in a folder."""
    benchmark = BENCHMARKS["mmstar"]
    kept = answer_folder(folder, benchmark, items, PROMPT, AskedModel("runs/model", "abc"))
    return choose(
        answerer,
        benchmark,
        items,
        PROMPT,
        possible_answers(items),
        kept,
        batch_size=batch_size,
    )


def test_the_likeliest_answer_is_chosen(
    answerer: Answerer, closed_items: list[Item], tmp_path: Path
) -> None:
    choices = choices_of(answerer, closed_items, tmp_path / "a", batch_size=4)

    assert [choice.id for choice in choices] == [item.id for item in closed_items]
    for choice, asked in zip(choices, closed_items, strict=True):
        expected = {}
        for letter in "ABC"[: len(asked.options)]:
            expected[letter] = naive_log_likelihood(answerer, asked, letter)
        assert choice.log_likelihoods == pytest.approx(expected, abs=1e-4)
        assert choice.chosen == max(expected, key=lambda letter: expected[letter])
        assert choice.score == float(choice.chosen == asked.answers[0])


def test_the_batch_changes_no_choice(
    answerer: Answerer, closed_items: list[Item], tmp_path: Path
) -> None:
    """Rows of a batch are padded to the longest of them."""
    together = choices_of(answerer, closed_items, tmp_path / "together", batch_size=32)
    alone = choices_of(answerer, closed_items, tmp_path / "alone", batch_size=1)

    for one, other in zip(together, alone, strict=True):
        assert one.log_likelihoods == pytest.approx(other.log_likelihoods, abs=1e-4)
        assert one.chosen == other.chosen


@pytest.mark.parametrize(
    ("batch_size", "rows"), [(1, [2, 3, 3]), (4, [2, 3, 3]), (5, [5, 3]), (32, [8])]
)
def test_no_batch_has_more_rows_than_it_may(
    answerer: Answerer,
    closed_items: list[Item],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
    rows: list[int],
) -> None:
    """The answers to one question stay together, in a forward of their own where they are more."""
    asked: list[int] = []
    measure = candidates.answer_likelihoods

    def watch(model: Answerer, questions: list[Question], **options: Any) -> list[Any]:
        assert options["batch_size"] == batch_size
        asked.append(len(questions))
        return measure(model, questions, **options)

    monkeypatch.setattr(candidates, "answer_likelihoods", watch)
    choices_of(answerer, closed_items, tmp_path / "a", batch_size=batch_size)

    assert asked == rows


def test_choices_go_on_where_they_were_stopped(
    answerer: Answerer, closed_items: list[Item], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = choices_of(answerer, closed_items, tmp_path, batch_size=2)
    file = tmp_path / CHOICES
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == 3
    # As a kill leaves it: two whole lines, and the beginning of the third.
    file.write_text("".join(lines[:2]) + lines[2][:20])
    asked: list[str] = []
    measure = candidates.answer_likelihoods

    def watch(model: Answerer, questions: list[Question], **options: Any) -> list[Any]:
        asked.extend(question.id for question in questions)
        return measure(model, questions, **options)

    monkeypatch.setattr(candidates, "answer_likelihoods", watch)
    assert choices_of(answerer, closed_items, tmp_path, batch_size=2) == whole
    assert asked == ["three"] * 3
    assert file.read_text().splitlines(keepends=True) == lines


def test_choices_are_scored_as_answers_are(
    answerer: Answerer, closed_items: list[Item], tmp_path: Path
) -> None:
    benchmark = BENCHMARKS["mmstar"]
    choices = choices_of(answerer, closed_items, tmp_path / "a")

    columns = benchmark.columns(judged_choices(benchmark, closed_items, choices))

    right = 0
    for choice, asked in zip(choices, closed_items, strict=True):
        right += choice.chosen == asked.answers[0]
    assert columns[0].value == pytest.approx(100 * right / 3)


def test_yes_and_no_are_spelled_as_the_benchmark_spells_them() -> None:
    """A model that learned `yes` is not to be asked for `Yes`."""
    possible = possible_answers([item("x", "yes", "pope"), item("y", "no", "pope")])

    assert possible == {"x": ("yes", "no"), "y": ("yes", "no")}


def test_a_model_with_closed_answers_never_chooses_what_it_cannot_say(tmp_path: Path) -> None:
    """Options C and D are none of its answers."""
    model = tiny.model("concat")
    processor = tiny.processor(model)
    ids = processor.tokenizer("AB", add_special_tokens=False).input_ids
    model.close_answers([2, *ids])
    asked = [item("x", "C", "all", "red", "green", "blue", "grey")]

    (choice,) = choices_of(Answerer(model, processor), asked, tmp_path)
    (again,) = choices_of(Answerer(model, processor), asked, tmp_path)

    assert again == choice
    assert choice.chosen in ("A", "B")
    assert choice.score == 0
    assert choice.log_likelihoods["C"] is None
    assert choice.log_likelihoods["A"] is not None


def test_of_no_sayable_answer_none_is_chosen(tmp_path: Path) -> None:
    """Rather than the first."""
    model = tiny.model("concat")
    model.close_answers([2, 70])
    asked = [item("x", "A", "all", "red", "green")]

    (choice,) = choices_of(Answerer(model, tiny.processor(model)), asked, tmp_path)

    assert choice.chosen == ""
    assert choice.score == 0
