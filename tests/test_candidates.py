"""Closed questions answered by likelihood."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from layerfuse.evaluate.answer import Answerer
from layerfuse.evaluate.benchmarks import BENCHMARKS, Item
from layerfuse.evaluate.candidates import (
    MOST_CANDIDATES,
    choose,
    judged_choices,
    possible_answers,
)
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


def test_the_likeliest_answer_is_chosen(answerer: Answerer, closed_items: list[Item]) -> None:
    benchmark = BENCHMARKS["mmstar"]

    choices = choose(answerer, benchmark, closed_items, PROMPT, batch_size=4)

    assert [choice.item for choice in choices] == closed_items
    for choice in choices:
        expected = {}
        for letter in "ABC"[: len(choice.item.options)]:
            expected[letter] = naive_log_likelihood(answerer, choice.item, letter)
        assert choice.log_likelihoods == pytest.approx(expected, abs=1e-4)
        assert choice.chosen == max(expected, key=lambda letter: expected[letter])
        assert choice.judged.score == float(choice.chosen == choice.item.answers[0])


def test_the_batch_changes_no_choice(answerer: Answerer, closed_items: list[Item]) -> None:
    """Rows of a batch are padded to the longest of them."""
    benchmark = BENCHMARKS["mmstar"]

    together = choose(answerer, benchmark, closed_items, PROMPT, batch_size=32)
    alone = choose(answerer, benchmark, closed_items, PROMPT, batch_size=1)

    for one, other in zip(together, alone, strict=True):
        assert one.log_likelihoods == pytest.approx(other.log_likelihoods, abs=1e-4)
        assert one.chosen == other.chosen


def test_choices_are_scored_as_answers_are(answerer: Answerer, closed_items: list[Item]) -> None:
    benchmark = BENCHMARKS["mmstar"]
    choices = choose(answerer, benchmark, closed_items, PROMPT)

    columns = benchmark.columns(judged_choices(choices))

    right = sum(choice.chosen == choice.item.answers[0] for choice in choices)
    assert columns[0].value == pytest.approx(100 * right / 3)
