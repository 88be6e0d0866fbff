"""Classification tasks about pictures, from samples with short answers."""

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from layerfuse.data.conversations import Samples, load
from layerfuse.data.samples import Picture, by_turn
from layerfuse.evaluate.run import normalize
from layerfuse.processor import IMAGE_TOKEN
from layerfuse.recipe import Data, Scenes

WORDINGS = 8
"""A family with more different questions asks about what the question names."""
COMMON = 5
"""An answer needs so many training pictures to be a class."""
Answers = dict[str, tuple[Picture, dict[str, str]]]
SCENES: dict[Literal["train", "test"], int] = {"train": 800, "test": 400}


@dataclass
class Task:
    """One family of questions: the answer about each picture, by its place; None: not asked."""

    name: str
    train: list[str | None]
    test: list[str | None]
    classes: list[str]

    @property
    def chance(self) -> float:
        """Accuracy on the test pictures of always giving the commonest training answer."""
        asked = [a for a in self.test if a is not None]
        commonest = Counter(a for a in self.train if a is not None).most_common(1)[0][0]
        return asked.count(commonest) / len(asked)


@dataclass
class Problem:
    """Tasks over training and test pictures, and the families that are none, with the reason."""

    train: list[Picture]
    test: list[Picture]
    tasks: list[Task]
    left_out: dict[str, str]

    def described(self) -> dict[str, Any]:
        """What a report says about the tasks."""
        return {
            "train_pictures": len(self.train),
            "test_pictures": len(self.test),
            "tasks": {t.name: {"chance": t.chance, "classes": t.classes} for t in self.tasks},
            "left_out": self.left_out,
        }


def task_names(tasks: str | None) -> list[str] | None:
    """The names in `count,shape`, each once; None for none."""
    return list(dict.fromkeys(n.strip() for n in tasks.split(",") if n.strip())) if tasks else None


def find_tasks(
    data: str | None, test: str | None, wanted: list[str] | None = None, seed: int = 0
) -> Problem:
    """The tasks of two LLaVA JSON files (or folders with captions). Without `test`, three tenths of
    the pictures are drawn for it; without `data`, scenes are generated.

    A task is a family (or, where samples name none, a question). Raises ValueError if there is no
    task, or none of the name `wanted`.
    """
    if data is None and test is not None:
        raise ValueError("test pictures need training pictures: give the data too")
    if data is None:
        parts = [Scenes(count=n, split=split, questions=8) for split, n in SCENES.items()]
        samples: list[Samples] = [load(Data(scenes=part)) for part in parts]
    else:
        samples = [load(Data(path=path)) for path in (data, test) if path]
    train, wordings = _answers(samples[0])
    if len(samples) > 1:
        tested, _ = _answers(samples[1])
    else:
        names = np.random.default_rng(seed).permutation(sorted(train)).tolist()
        held = set(names[: round(0.3 * len(names))])
        tested = {name: train.pop(name) for name in list(train) if name in held}
    problem = Problem([p for p, _ in train.values()], [p for p, _ in tested.values()], [], {})
    for name in sorted({task for _, found in train.values() for task in found}):
        columns = [[found.get(name) for _, found in part.values()] for part in (train, tested)]
        counts = Counter(a for a in columns[0] if a is not None)
        classes = sorted(a for a, n in counts.items() if n >= COMMON)
        task = Task(name, columns[0], columns[1], classes)
        if len(wordings[name]) > WORDINGS:
            problem.left_out[name] = f"{len(wordings[name])} different questions"
        elif len(task.classes) < 2:
            problem.left_out[name] = f"{len(task.classes)} answers with {COMMON} training pictures"
        elif not any(task.test):
            problem.left_out[name] = "not asked about a test picture"
        else:
            problem.tasks.append(task)
    found = [task.name for task in problem.tasks]
    missing = sorted(set(wanted or ()) - set(found))
    if missing or not found:
        raise ValueError(f"no task {missing or ''}; tasks: {found}, left out: {problem.left_out}")
    problem.tasks = [task for task in problem.tasks if wanted is None or task.name in wanted]
    return problem


def _answers(samples: Samples) -> tuple[Answers, dict[str, set[str]]]:
    """Per picture its first answer of each task, and the questions of each task."""
    answers: Answers = {}
    wordings: dict[str, set[str]] = {}
    for sample in (sample for sample in samples if len(sample.pictures) == 1):
        picture = sample.pictures[0]
        found = answers.setdefault(picture.name, (picture, {}))[1]
        for turn in by_turn(sample):
            asked = [m["content"] for m in turn.messages if m["role"] == "user"]
            question = normalize(asked[-1].replace(IMAGE_TOKEN, "")) if asked else ""
            task = turn.families[0] if turn.families else question
            wordings.setdefault(task, set()).add(question)
            found.setdefault(task, normalize(turn.messages[-1]["content"]))
    return answers, wordings
