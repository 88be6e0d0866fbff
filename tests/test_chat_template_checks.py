"""A chat template must write in training what it writes in the test, or the study stops before."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from layerfuse.data.sample_sets import SampleSets
from layerfuse.errors import LayerfuseError
from layerfuse.recipe.reader import load_recipe
from layerfuse.study.check import load_checked
from tests.studies import (
    read_samples,
    save_sentence_encoder,
    write_recipe,
    write_samples,
)

THINK = "<think>\n\n</think>\n\n"
START = "{% for m in messages %}{{ 'Q: ' if m.role == 'user' else 'A: ' }}"
END = "{{ m.content }}</s>\n{% endfor %}"
THINKS_IN_EACH_ANSWER = START + "{% if m.role == 'assistant' %}" + THINK + "{% endif %}" + END
# As templates of thinking models do: thoughts stand in the last answer alone.
THINKS_IN_LAST_ANSWER = START + "{% if loop.last %}" + THINK + "{% endif %}" + END
# A greeting in conversations of one turn, as the test asks, and none in longer ones.
GREETS_SHORT_TALKS = "{% if messages|length < 3 %}Hello! {% endif %}" + START + END
# A hint behind the last question.
LAST_QUESTION = "m.role == 'user' and loop.index == messages|length - 1"
HINT = "{% if " + LAST_QUESTION + " %} Think!{% endif %}"
HINTS_AT_LAST_QUESTION = START + "{{ m.content }}" + HINT + "</s>\n{% endfor %}"
# Words that count the turns: a question that is asked alone is always the first.
COUNTS_QUESTIONS = START.replace("'Q: '", "'Q' ~ (loop.index + 1) // 2 ~ ': '") + END
# Words inside of the first turn, which no later question in training has.
FIRST_OF_ALL = START + "{% if loop.first %}Look: {% endif %}" + END
# Words that stand before the conversation, wherever it begins.
OPENS_TALKS = "<s>A chat between two.\n" + START + END
# Llama 2's: the system's words are a part of the first question.
SYSTEM_IN_QUESTION = (
    "{% for m in messages %}{% if m.role == 'system' %}"
    "{% elif m.role == 'user' %}<s>[INST] "
    "{% if messages[0].role == 'system' and loop.index == 2 %}{{ messages[0].content }}\n\n"
    "{% endif %}{{ m.content }} [/INST]{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
# Without `</s>` the model would never learn to stop.
ENDS_NO_ANSWER = START + "{{ m.content }} {% endfor %}"


def recipe_with_turns(
    recipe: dict[str, Any],
    folder: Path,
    template: str,
    turns: int,
) -> dict[str, Any]:
    """The recipe with a chat template; its samples get this number of questions."""
    # Beside the recipe, which names it by its relative path.
    (folder / "own.jinja").write_text(template)
    samples = read_samples(folder)
    for sample in samples:
        question, answer = sample["conversations"]
        # The picture is shown once, in the first question.
        later_question = {**question, "value": "again?"}
        for _ in range(turns - 1):
            sample["conversations"] += [later_question, answer]
    write_samples(folder, samples)
    return {**recipe, "chat_template": "own.jinja"}


def check(recipe: dict[str, Any], folder: Path) -> SampleSets:
    """The samples of a recipe, if nothing speaks against them."""
    samples = load_checked(load_recipe(write_recipe(folder, recipe))).usable
    return samples


@dataclass(frozen=True)
class Mismatch:
    """A template that writes otherwise in training than in the test."""

    template: str
    in_training: str
    """where the two differ, as the message shows it"""
    in_test: str


@pytest.mark.parametrize(
    "mismatch",
    [
        Mismatch(
            THINKS_IN_LAST_ANSWER,
            in_training="</s>\nA: ",
            in_test="</s>\nA: " + THINK,
        ),
        Mismatch(
            GREETS_SHORT_TALKS,
            in_training="Q: ...</s>\nA: ",
            in_test="Hello! Q: ...</s>\nA: ",
        ),
        Mismatch(
            HINTS_AT_LAST_QUESTION,
            in_training="</s>\nA: ",
            in_test=" Think!</s>\nA: ",
        ),
        Mismatch(
            COUNTS_QUESTIONS,
            in_training="</s>\nQ2: ",
            in_test="Q1: ",
        ),
        Mismatch(
            FIRST_OF_ALL,
            in_training="</s>\nQ: ",
            in_test="Q: Look: ",
        ),
    ],
    ids=["think", "greeting", "hint", "count", "first"],
)
def test_a_template_that_asks_otherwise_than_it_trains_is_named_before_training(
    recipe: dict[str, Any],
    tmp_path: Path,
    mismatch: Mismatch,
) -> None:
    changed = recipe_with_turns(recipe, tmp_path, mismatch.template, turns=2)

    with pytest.raises(LayerfuseError) as raised:
        check(changed, tmp_path)

    message = str(raised.value)
    assert "arm 'one', stage 'align', sample 0: the chat template makes the words" in message
    assert f"in training: {mismatch.in_training!r}" in message
    assert f"in the test: {mismatch.in_test!r}" in message


def test_a_template_that_ends_no_answer_is_named_before_training(
    recipe: dict[str, Any],
    tmp_path: Path,
) -> None:
    changed = recipe_with_turns(recipe, tmp_path, ENDS_NO_ANSWER, turns=1)

    with pytest.raises(LayerfuseError, match="'align': the chat template writes nothing behind"):
        check(changed, tmp_path)


@pytest.mark.parametrize(
    ("template", "turns"),
    [
        # In conversations of one turn the last answer is the only one.
        (THINKS_IN_LAST_ANSWER, 1),
        (GREETS_SHORT_TALKS, 1),
        (THINKS_IN_EACH_ANSWER, 3),
        (START + END, 3),
        (OPENS_TALKS, 3),
        (SYSTEM_IN_QUESTION, 3),
    ],
)
def test_templates_that_ask_as_they_train_are_taken(
    recipe: dict[str, Any],
    tmp_path: Path,
    template: str,
    turns: int,
) -> None:
    changed = recipe_with_turns(recipe, tmp_path, template, turns)

    samples = check(changed, tmp_path)

    assert len(samples.test) == 8


def test_a_guided_arm_may_mark_the_last_answer(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Each of its rows ends with the answer that is learned, as in the test."""
    changed = recipe_with_turns(recipe, tmp_path, THINKS_IN_LAST_ANSWER, turns=2)
    guided = {"layers": [1, 3], "fusion": {"name": "text_routed"}}

    changed["arms"] = [guided]
    samples = check(changed, tmp_path)

    assert len(samples.test) == 8
    # The same template is wrong for an arm that learns all answers of a conversation in one row.
    changed["arms"] = [guided, *recipe["arms"]]
    with pytest.raises(LayerfuseError, match="arm 'one', stage 'align'"):
        check(changed, tmp_path)


def test_an_arm_guided_by_all_questions_may_not(recipe: dict[str, Any], tmp_path: Path) -> None:
    """A conversation is one row of it, in which most answers are not the last."""
    changed = recipe_with_turns(recipe, tmp_path, THINKS_IN_LAST_ANSWER, turns=2)
    save_sentence_encoder(tmp_path / "sentences")
    averaging = {
        "name": "instruction_weighted",
        "sentence_encoder": str(tmp_path / "sentences"),
        "sentence_width": 16,
        "questions": "average",
    }
    changed["arms"] = [{"name": "averaging", "layers": "1|3", "fusion": averaging}]
    changed["baseline"] = "averaging"

    with pytest.raises(LayerfuseError, match=r"arm 'averaging', stage 'align'.*template makes"):
        check(changed, tmp_path)


def test_a_conversation_that_others_begin_is_no_fault_of_the_template(
    recipe: dict[str, Any],
    tmp_path: Path,
) -> None:
    """A greeting of the assistant, two questions in a row and a system's words are data."""
    greeting = {"from": "gpt", "value": "hello"}
    system = {"from": "system", "value": "Be brief."}
    talk = [
        {"from": "human", "value": "<image>one"},
        {"from": "human", "value": "two"},
        {"from": "gpt", "value": "2"},
        {"from": "human", "value": "three"},
        {"from": "gpt", "value": "3"},
        {"from": "gpt", "value": "again"},
    ]
    records = []
    for number in range(8):
        opening = system
        if number % 2 == 1:
            opening = greeting
        turns = [opening, *talk]
        record = {"id": str(number), "image": f"{number}.png", "conversations": turns}
        records.append(record)
    write_samples(tmp_path, records)

    samples = check(recipe, tmp_path)

    assert len(samples.test) == 8


def test_a_systems_words_in_the_first_question_are_no_fault_of_the_template(
    recipe: dict[str, Any],
    tmp_path: Path,
) -> None:
    """The test writes them before every question, as it asks each alone."""
    changed = recipe_with_turns(recipe, tmp_path, SYSTEM_IN_QUESTION, turns=2)
    samples = read_samples(tmp_path)
    for sample in samples:
        sample["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    write_samples(tmp_path, samples)

    assert len(check(changed, tmp_path).test) == 8


@dataclass(frozen=True)
class Loss:
    """A template that does not write what it is given."""

    content: str
    """what it writes of each message"""
    role: str
    lost: str
    """the words that are named"""


@pytest.mark.parametrize(
    "loss",
    [
        Loss("{{ m.content | upper }}", "system", "Be brief."),
        Loss("{{ m.content[:10] }}", "user", "<image>\\nWhat is it?"),
        Loss("{% if m.role != 'system' %}{{ m.content }}{% endif %}", "system", "Be brief."),
        Loss(
            "{% if m.role != 'user' %}{{ m.content }}{% endif %}", "user", "<image>\\nWhat is it?"
        ),
        Loss("{{ m.content | replace('<image>', '') }}", "user", "<image>\\nWhat is it?"),
        # One of two questions of the same words
        Loss("{% if loop.index != 4 %}{{ m.content }}{% endif %}", "user", "Sure?"),
    ],
    ids=["upper", "cut", "no system", "no user", "no image", "not all"],
)
def test_a_template_that_changes_what_people_say_is_named(
    recipe: dict[str, Any],
    tmp_path: Path,
    loss: Loss,
) -> None:
    (tmp_path / "own.jinja").write_text(START + loss.content + "</s>\n{% endfor %}")
    answer = {"from": "gpt", "value": "yes"}
    again = {"from": "human", "value": "Sure?"}
    samples = read_samples(tmp_path)
    for sample in samples:
        sample["conversations"] = [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "<image>\nWhat is it?"},
            answer,
            again,
            answer,
            again,
            answer,
        ]
    write_samples(tmp_path, samples)

    with pytest.raises(LayerfuseError) as raised:
        check({**recipe, "chat_template": "own.jinja"}, tmp_path)

    message = str(raised.value)
    assert (
        f"chat template changes or leaves out what the {loss.role} says: '{loss.lost}'" in message
    )
