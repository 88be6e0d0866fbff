"""Which families of questions become tasks for probes, and how their pictures are divided."""

import json
from pathlib import Path

import pytest

from layerfuse.errors import LayerfuseError
from layerfuse.look.tasks import Task, find_tasks

KINDS = ["size", "wide", "named", "same", "rare", "untested"]
"""Kinds of questions that `question_and_answer` knows."""


def question_and_answer(kind: str, k: int) -> list[str]:
    """What is asked and answered about picture k."""
    no_or_yes = "ny"[k % 2]
    if kind == "size":
        return ["How big?", ("Small.", "big", "big")[k % 3]]
    if kind == "wide":
        # 8 different questions: as many as a task may have
        return [f"Is it {k % 8}?", no_or_yes]
    if kind == "named":
        # One more
        return [f"Do you see {k % 9}?", no_or_yes]
    if kind == "same":
        return ["Which planet?", "earth"]
    if kind == "rare":
        # Too few pictures show "odd" for it to be learned
        if k < 4:
            return ["What kind?", "odd"]
        return ["What kind?", ("cat", "dog")[k % 2]]
    return ["New?", no_or_yes]


def write_conversations(
    file: Path,
    pictures: int,
    kinds: list[str],
    families: bool = True,
) -> str:
    """Write a LLaVA JSON that asks all these kinds of questions about each picture."""
    records = []
    for k in range(pictures):
        turns = []
        for kind in kinds:
            question, answer = question_and_answer(kind, k)
            turns.append({"from": "human", "value": question})
            turns.append({"from": "gpt", "value": answer})
        record = {"image": f"{k}.png", "conversations": turns}
        if families:
            record["families"] = kinds
        records.append(record)
    file.write_text(json.dumps(records))
    return str(file)


@pytest.fixture
def train_data(tmp_path: Path) -> str:
    """36 pictures with all kinds of questions."""
    return write_conversations(tmp_path / "train.json", 36, KINDS)


@pytest.fixture
def held_out(tmp_path: Path) -> str:
    """12 pictures with all kinds but the last."""
    return write_conversations(tmp_path / "test.json", 12, KINDS[:-1])


def test_families_with_few_wordings_and_common_answers_are_tasks(
    train_data: str, held_out: str
) -> None:
    problem = find_tasks(train_data, held_out)

    classes = {task.name: task.classes for task in problem.tasks}
    assert classes == {
        "rare": ["cat", "dog"],
        "size": ["big", "small"],
        "wide": ["n", "y"],
    }
    (rare,) = [task for task in problem.tasks if task.name == "rare"]
    # A rare answer is no class, but still asked for in the test
    assert rare.test[3:6] == ["odd", "cat", "dog"]


def test_what_is_no_task_is_left_out_with_the_reason(train_data: str, held_out: str) -> None:
    problem = find_tasks(train_data, held_out)

    assert problem.left_out["named"] == "9 different questions"
    assert problem.left_out["same"] == "1 answers with 5 training pictures"
    # It has two answers; the test asks for none of them
    assert "2 answers" not in problem.left_out["untested"]


def test_chance_is_the_commonest_training_answer(train_data: str, held_out: str) -> None:
    (size,) = find_tasks(train_data, held_out, ["size"]).tasks
    # "a" is the commonest; a picture without a question does not count, an unknown answer does
    task = Task(
        "t",
        train=["a", "b", "a"],
        test=["b", "b", "a", "c", None],
        classes=[],
    )

    assert size.chance == 8 / 12
    assert task.chance == 1 / 4


def test_only_the_tasks_that_were_asked_for_are_made(train_data: str, held_out: str) -> None:
    problem = find_tasks(train_data, held_out, ["size"])

    assert [task.name for task in problem.tasks] == ["size"]


def test_without_families_a_question_is_a_family(tmp_path: Path) -> None:
    data = write_conversations(tmp_path / "plain.json", 36, ["size", "same"], families=False)

    problem = find_tasks(data, None)

    assert [task.name for task in problem.tasks] == ["how big?"]
    assert set(problem.left_out) == {"which planet?"}


def test_an_unknown_task_is_named_with_all_valid_ones(tmp_path: Path) -> None:
    data = write_conversations(tmp_path / "d.json", 36, ["named", "size", "wide"])

    message = r"no task \['tint'\]; tasks: \['size', 'wide'\], left out: .*'named': '9 differ"
    with pytest.raises(LayerfuseError, match=message):
        find_tasks(data, None, ["size", "tint"])


def test_one_file_is_split_by_picture(tmp_path: Path) -> None:
    """A picture in both parts would let a probe remember its answer."""
    data = Path(write_conversations(tmp_path / "d.json", 40, ["size"]))
    records = json.loads(data.read_text())
    data.write_text(json.dumps([*records, *records]))

    test_parts = []
    for seed in (3, 3, 4):
        problem = find_tasks(str(data), None, seed=seed)
        train_names = {picture.name for picture in problem.train}
        test_names = {picture.name for picture in problem.test}
        assert len(problem.train) == 28
        assert len(problem.test) == 12
        assert len(train_names | test_names) == 40
        test_parts.append(test_names)

    # The seed decides which pictures are drawn
    first, same_seed, other_seed = test_parts
    assert first == same_seed
    assert first != other_seed
