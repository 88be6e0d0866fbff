"""The small interface behind every benchmark: its questions, and what an answer scores."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.boxes import Box
from layerfuse.vision.picture import Picture


@dataclass(frozen=True)
class Item:
    """One question of a benchmark.

    Attributes:
        id: of the question, unique in the benchmark.
        pictures: that it is about, in the order in which they are shown; may be empty.
        question: what is asked, without a prompt's words around it.
        answers: what is right: the option's letter, the one answer, or those of all annotators.
        group: the task, split or topic by which the benchmark reports.
        options: texts of the options A, B, ... of a closed question; empty for an open one.
        context: words that belong to the question and that a prompt may leave out, such as a
            hint, the words that a reader of text found in the picture, or the benchmark's own line
            on how to answer; empty where there are none.
        together: what is judged with it, such as both questions about one picture; empty where it
            is judged alone.
        boxes: that are right, or that the question is about; empty where it has none.
        size: width and height of the picture in pixels, where boxes belong to it.
    """

    id: str
    pictures: tuple[Picture, ...]
    question: str
    answers: tuple[str, ...]
    group: str = "all"
    options: tuple[str, ...] = ()
    context: str = ""
    together: str = ""
    boxes: tuple[Box, ...] = ()
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Judged:
    """What was understood of an answer, and what it scores.

    Attributes:
        parsed: what the benchmark reads in the answer; None where it finds nothing.
        score: 0..1, before anything is judged together.
    """

    parsed: str | None
    score: float


@dataclass(frozen=True)
class JudgedItem:
    """A question with what its answer scored."""

    item: Item
    judged: Judged


@dataclass(frozen=True)
class Column:
    """A number that a benchmark reports, as its papers print it.

    Attributes:
        name: such as `accuracy` or `perception`.
        value: on the benchmark's own scale.
        best: the highest value that it can have.
        questions: how many it is over.
    """

    name: str
    value: float
    best: float
    questions: int


class Benchmark(ABC):
    """A benchmark: how its files are read, how an answer is judged, what is reported.

    Attributes:
        name: by which suites name it.
        title: as papers print it.
        licence: of its questions and pictures, in a few words.
        expected: the files that `load` wants, relative to the benchmark's folder, for errors and
            for the page of benchmarks.
        headline: the column that stands for the benchmark where a table has one column for it.
        needs_files: whether it has files to be downloaded; else it makes its own questions.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    licence: ClassVar[str]
    expected: ClassVar[tuple[str, ...]]
    headline: ClassVar[str]
    needs_files: ClassVar[bool] = True

    @abstractmethod
    def load(self, folder: Path) -> list[Item]:
        """Read the questions.

        Args:
            folder: with the files as they are downloaded.

        Returns:
            All questions, with unique ids.

        Raises:
            LayerfuseError: a file is missing, cut off, or of another benchmark.
        """

    @abstractmethod
    def judge(self, item: Item, answer: str) -> Judged:
        """Score one answer.

        Args:
            item: the question.
            answer: what the model said, as it said it.

        Returns:
            What was understood, and its score.
        """

    @abstractmethod
    def columns(self, answered: Sequence[JudgedItem]) -> list[Column]:
        """Give the numbers that the benchmark reports.

        Args:
            answered: every question once.

        Returns:
            The headline among them.
        """

    def id_in(self, line: Mapping[str, Any], items: Sequence[Item]) -> str:
        """Say which question a line of a file of answers is about.

        Args:
            line: of JSON lines, by layerfuse, by another tool, or released with a paper.
            items: all questions.

        Returns:
            The question's id, or what stands in its place.

        Raises:
            LayerfuseError: the line names no question.
        """
        for key in ("id", "question_id"):
            if key in line:
                return str(line[key])
        raise LayerfuseError(
            f"a line names no question: expected id or question_id, found: {', '.join(line)}"
        )

    def redrawn_with(self, item: Item) -> str:
        """Name what a question belongs to that is redrawn as a whole, beside its pictures.

        Args:
            item: the question.

        Returns:
            The same for all questions that any column judges together; empty for one that is
            judged alone.
        """
        return item.together

    def notes(self, items: Sequence[Item]) -> list[str]:
        """Say what a reader of the scores must know of the questions, such as their revision.

        Args:
            items: all questions, as `load` gave them.

        Returns:
            Sentences; may be empty.
        """
        return []


BENCHMARKS: dict[str, Benchmark] = {}
"""All benchmarks by name."""

Registered = TypeVar("Registered", bound=Benchmark)


def benchmark(registered: type[Registered]) -> type[Registered]:
    """Register a benchmark under its name.

    Args:
        registered: its class, without arguments.

    Returns:
        The class.
    """
    if registered.name in BENCHMARKS:
        raise ValueError(f"two benchmarks are called {registered.name!r}")
    BENCHMARKS[registered.name] = registered()
    return registered


def share(answered: Sequence[JudgedItem], name: str = "accuracy") -> Column:
    """The mean score of some answers, in percent.

    Args:
        answered: at least one.
        name: of the column.

    Returns:
        The column.
    """
    total = sum(each.judged.score for each in answered)
    return Column(name, 100 * total / len(answered), 100.0, len(answered))


def by_group(
    answered: Sequence[JudgedItem], key: Callable[[Item], str] = lambda item: item.group
) -> dict[str, list[JudgedItem]]:
    """Sort answers into groups.

    Args:
        answered: the answers.
        key: names the group of a question.

    Returns:
        The answers by group, in the order in which the groups first come.
    """
    groups: dict[str, list[JudgedItem]] = {}
    for each in answered:
        groups.setdefault(key(each.item), []).append(each)
    return groups
