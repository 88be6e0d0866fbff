"""What probes classify: families of questions with short answers, as tasks over pictures."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from layerfuse.data.lazy_records import Samples
from layerfuse.data.sample import by_turn
from layerfuse.data.sources import load
from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.metrics import normalize
from layerfuse.model.chat_template import question_of
from layerfuse.recipe.data_source import Data, Scenes
from layerfuse.vision.picture import Picture

WORDINGS = 8
"""A family with more different questions asks about what the question names."""
COMMON = 5
"""An answer needs so many training pictures to be a class."""
TEST_SHARE = 0.3
"""Share of the pictures that is drawn for the test where no test is given."""
SCENES: dict[Literal["train", "test"], int] = {"train": 800, "test": 400}
"""Generated scenes of each part where no data is given."""


@dataclass(frozen=True)
class Task:
    """One family of questions."""

    name: str
    train: list[str | None]
    """The answer about each training picture; None: not asked."""
    test: list[str | None]
    """The answer about each test picture; None: not asked."""
    classes: list[str]
    """Answers that can be learned, in alphabetical order."""

    @property
    def chance(self) -> float:
        """Accuracy on the test pictures of always giving the commonest training answer."""
        # The test must not decide what is guessed
        counts = Counter(answer for answer in self.train if answer is not None)
        commonest, _ = counts.most_common(1)[0]
        asked = [answer for answer in self.test if answer is not None]
        return asked.count(commonest) / len(asked)


@dataclass(frozen=True)
class Problem:
    """Tasks over training and test pictures."""

    train: list[Picture]
    test: list[Picture]
    tasks: list[Task]
    left_out: dict[str, str]
    """Families that are no task, with the reason."""


@dataclass(frozen=True)
class _Answered:
    """A picture and its first answer of each family."""

    picture: Picture
    answers: dict[str, str] = field(default_factory=dict)


_Answers = dict[str, _Answered]
"""By the picture's name, in the order of the data."""


def task_names(tasks: str | None) -> list[str] | None:
    """Read the names of tasks.

    Args:
        tasks: such as `count,shape`.

    Returns:
        The names, each once; None where none is given.
    """
    names: list[str] = []
    for part in (tasks or "").split(","):
        name = part.strip()
        if name and name not in names:
            names.append(name)
    return names or None


def find_tasks(
    data: str | None,
    test: str | None,
    wanted: list[str] | None = None,
    seed: int = 0,
) -> Problem:
    """Find the tasks in training and test samples.

    A task is a family of questions or, where samples name no families, a question.

    Args:
        data: a LLaVA JSON file or a folder with captions; None: scenes are generated.
        test: the same for the test; None: three tenths of the pictures of `data` are drawn.
        wanted: names of tasks; None: all.
        seed: draws the test pictures.

    Returns:
        The tasks that can be learned and measured, with their pictures.

    Raises:
        LayerfuseError: the samples cannot be used, or there is no task, or none of a wanted name.
    """
    train_samples, test_samples = _load(data, test)
    train, wordings = _answers_of(train_samples)
    if test_samples is None:
        train, tested = _divide(train, seed)
    else:
        tested, _ = _answers_of(test_samples)

    possible: list[Task] = []
    left_out: dict[str, str] = {}
    # In a fixed order: files do not depend on which family a sample names first
    for name in sorted(wordings):
        task = _task(name, train, tested)
        if task is None:
            continue
        reason = _why_left_out(task, wordings[name])
        if reason is None:
            possible.append(task)
        else:
            left_out[name] = reason

    names = [task.name for task in possible]
    missing = sorted(set(wanted or ()) - set(names))
    if missing or not names:
        raise LayerfuseError(f"no task {missing or ''}; tasks: {names}, left out: {left_out}")
    return Problem(
        train=[answered.picture for answered in train.values()],
        test=[answered.picture for answered in tested.values()],
        tasks=[task for task in possible if wanted is None or task.name in wanted],
        left_out=left_out,
    )


def _load(data: str | None, test: str | None) -> tuple[Samples, Samples | None]:
    """The training samples, and those of the test if there are any."""
    if data is None and test is not None:
        raise LayerfuseError("test pictures need training pictures: give the data too")
    if data is None:
        train_scenes = Scenes(count=SCENES["train"], split="train", questions=8)
        test_scenes = Scenes(count=SCENES["test"], split="test", questions=8)
        return load(Data(scenes=train_scenes)), load(Data(scenes=test_scenes))
    train_samples = load(Data(path=data))
    if not test:
        return train_samples, None
    return train_samples, load(Data(path=test))


def _answers_of(samples: Samples) -> tuple[_Answers, dict[str, set[str]]]:
    """What is answered about each picture, and the different questions of each family."""
    answers: _Answers = {}
    wordings: dict[str, set[str]] = {}
    for sample in samples:
        # With several pictures it is unclear whose features hold the answer
        if len(sample.pictures) != 1:
            continue
        picture = sample.pictures[0]
        answered = answers.setdefault(picture.name, _Answered(picture))
        for turn in by_turn(sample):
            question = normalize(question_of(turn.messages))
            family = question
            if turn.families:
                family = turn.families[0]
            # Every wording counts, also one whose answer is not used
            wordings.setdefault(family, set()).add(question)
            answer = normalize(turn.messages[-1]["content"])
            # A picture that is asked twice counts once, with its first answer
            answered.answers.setdefault(family, answer)
    return answers, wordings


def _divide(answers: _Answers, seed: int) -> tuple[_Answers, _Answers]:
    """Draw pictures for the test; both parts keep the order of the data."""
    # Sorted first: the draw must not depend on the order of the records
    shuffled = np.random.default_rng(seed).permutation(sorted(answers)).tolist()
    held_out = set(shuffled[: round(TEST_SHARE * len(shuffled))])
    train: _Answers = {}
    tested: _Answers = {}
    for name, answered in answers.items():
        if name in held_out:
            tested[name] = answered
        else:
            train[name] = answered
    return train, tested


def _task(name: str, train: _Answers, test: _Answers) -> Task | None:
    """The task of this name; None if no training picture is asked for it."""
    train_answers = [answered.answers.get(name) for answered in train.values()]
    test_answers = [answered.answers.get(name) for answered in test.values()]
    counts = Counter(answer for answer in train_answers if answer is not None)
    if not counts:
        return None
    # Sorted, so that equal data give equal classifiers
    classes = sorted(answer for answer, count in counts.items() if count >= COMMON)
    return Task(name=name, train=train_answers, test=test_answers, classes=classes)


def _why_left_out(task: Task, questions: set[str]) -> str | None:
    """Why a family cannot be learned or measured; None if it can."""
    if len(questions) > WORDINGS:
        return f"{len(questions)} different questions"
    if len(task.classes) < 2:
        return f"{len(task.classes)} answers with {COMMON} training pictures"
    if not any(task.test):
        return "not asked about a test picture"
    return None
