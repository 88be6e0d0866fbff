"""The small interface behind every benchmark: its questions, and what an answer scores."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.boxes import LLAVA_BOXES, Box, BoxForm
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
        family: questions of one kind, whose right answers are each other's possible ones; empty
            where these are those of the group.
        options: texts of the options A, B, ... of a closed question; empty for an open one.
        context: words that belong to the question and that a prompt may leave out, such as a
            hint, the words that a reader of text found in the picture, or the benchmark's own line
            on how to answer; empty where there are none.
        together: what is judged with it, such as both questions about one picture; empty where it
            is judged alone.
        boxes: that are right, or that the question is about; empty where it has none.
        size: width and height of the picture in pixels, where boxes belong to it.
        box_form: how the model that is asked writes boxes and is told them.
        left_out: ids of questions in the same files that the benchmark does not ask, but that
            files of answers may hold, such as those about videos; the same for all its questions.
    """

    id: str
    pictures: tuple[Picture, ...]
    question: str
    answers: tuple[str, ...]
    group: str = "all"
    family: str = ""
    options: tuple[str, ...] = ()
    context: str = ""
    together: str = ""
    boxes: tuple[Box, ...] = ()
    size: tuple[int, int] | None = None
    box_form: BoxForm = LLAVA_BOXES
    # Thousands of ids, which say nothing of this question.
    left_out: frozenset[str] = field(default=frozenset(), repr=False, compare=False)


@dataclass(frozen=True)
class Judged:
    """What was understood of an answer, and what it scores.

    Attributes:
        parsed: what the benchmark reads in the answer; None where it finds nothing.
        score: 0..1, before anything is judged together.
        off_scale: whether it is a box that was probably written in another scale than it was read
            in.
    """

    parsed: str | None
    score: float
    off_scale: bool = False


@dataclass(frozen=True)
class JudgedItem:
    """A question with what its answer scored.

    Attributes:
        item: the question.
        judged: what was understood, and its score.
        is_empty: whether the answer was nothing, or spaces alone.
    """

    item: Item
    judged: Judged
    is_empty: bool = False


@dataclass(frozen=True)
class Column:
    """A number that a benchmark reports, as its papers print it.

    Attributes:
        name: such as `accuracy` or `perception`.
        value: on the benchmark's own scale.
        best: the highest value that it can have.
        questions: how many it is over.
        mean_of: the answers whose scores it is the mean of, each of the same weight, up to a
            constant factor; empty where it is something else, such as F1, CIDEr, a score of pairs,
            or a mean of groups of different sizes.
    """

    name: str
    value: float
    best: float
    questions: int
    # Says where the number comes from, and is no part of it.
    mean_of: Sequence[JudgedItem] = field(default=(), repr=False, compare=False)

    def written(self) -> dict[str, str | float]:
        """Give the number as it is written to files, without the answers that it comes from."""
        return {
            "name": self.name,
            "value": self.value,
            "best": self.best,
            "questions": self.questions,
        }


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
        counts_answers: whether its numbers are those of right answers, and whole, not shares.
        published_questions: how many the published files have, for each of their revisions; empty
            where that is not known or `notes` says more of it.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    licence: ClassVar[str]
    expected: ClassVar[tuple[str, ...]]
    headline: ClassVar[str]
    needs_files: ClassVar[bool] = True
    counts_answers: ClassVar[bool] = False
    published_questions: ClassVar[tuple[int, ...]] = ()

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

    def scored_together(self, answered: Sequence[JudgedItem]) -> list[JudgedItem]:
        """Score the answers whose scores depend on all questions, once, before any are redrawn.

        Args:
            answered: every question once.

        Returns:
            The answers in the same order, for `redrawn_columns`.
        """
        return list(answered)

    def redrawn_columns(self, redrawn: Sequence[JudgedItem]) -> list[Column]:
        """Give the numbers that the benchmark reports on redrawn pictures.

        Args:
            redrawn: answers of `scored_together`, some of them several times, others never.

        Returns:
            The same columns as those of all questions, where each of them has a question.
        """
        return self.columns(redrawn)

    def notes(self, items: Sequence[Item]) -> list[str]:
        """Say what a reader of the scores must know of the questions, such as their revision.

        Their number is compared by `notes_on_questions`.

        Args:
            items: all questions, as `load` gave them.

        Returns:
            Sentences without the benchmark's name; may be empty.
        """
        return []

    def notes_on_answers(self, answered: Sequence[JudgedItem]) -> list[str]:
        """Say what a reader of the scores must know of the answers, such as a doubtful scale.

        Args:
            answered: every question once.

        Returns:
            Sentences without the benchmark's name; may be empty.
        """
        return []

    def with_box_form(self, item: Item, form: BoxForm) -> Item:
        """Give a question to a model that writes boxes in some form, and is told them in it.

        Args:
            item: the question, as `load` gave it.
            form: of the boxes.

        Returns:
            The question.

        Raises:
            LayerfuseError: the benchmark has no boxes.
        """
        raise LayerfuseError(f"{self.title} has no boxes whose form could be said")


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


def notes_on_questions(known: Benchmark, items: Sequence[Item]) -> list[str]:
    """Say what a reader of a benchmark's scores must know of its questions.

    A file that was cut off at the end of a row is whole in every other respect, so that the number
    of questions is compared with the published one.

    Args:
        known: the benchmark.
        items: all questions, as it loaded them.

    Returns:
        Sentences that begin with the benchmark's title; may be empty.
    """
    notes = known.notes(items)
    if known.published_questions and len(items) not in known.published_questions:
        published = " or ".join(f"{count:,}" for count in known.published_questions)
        notes.insert(
            0,
            f"{len(items):,} questions were found, and the published files have {published}. Is a "
            "file cut off? The scores are of other questions than in papers",
        )
    return [f"{known.title}: {note}" for note in notes]


def notes_on_answers(known: Benchmark, answered: Sequence[JudgedItem]) -> list[str]:
    """Say what a reader of a benchmark's scores must know of the answers.

    Args:
        known: the benchmark.
        answered: every question once.

    Returns:
        Sentences that begin with the benchmark's title; may be empty.
    """
    return [f"{known.title}: {note}" for note in known.notes_on_answers(answered)]


def judged_item(benchmark: Benchmark, item: Item, answer: str) -> JudgedItem:
    """Judge the answer to a question.

    Args:
        benchmark: whose question it is.
        item: the question.
        answer: what the model said, as it said it.

    Returns:
        The question with what the answer scores.
    """
    return JudgedItem(item, benchmark.judge(item, answer), is_empty=not answer.strip())


def share(answered: Sequence[JudgedItem], name: str = "accuracy") -> Column:
    """The mean score of some answers, in percent.

    Args:
        answered: at least one.
        name: of the column.

    Returns:
        The column.
    """
    total = sum(each.judged.score for each in answered)
    return Column(name, 100 * total / len(answered), 100.0, len(answered), answered)


def mean_of_columns(name: str, parts: Sequence[Column]) -> Column:
    """The mean of some columns, each of the same weight, whatever its number of questions.

    Args:
        name: of the mean.
        parts: at least one, over different questions and with one highest value.

    Returns:
        The column.
    """
    value = sum(part.value for part in parts) / len(parts)
    questions = sum(part.questions for part in parts)
    sizes = {len(part.mean_of) for part in parts}
    answered: list[JudgedItem] = []
    # Only of parts of one size do all answers weigh the same.
    if len(sizes) == 1:
        for part in parts:
            answered += part.mean_of
    return Column(name, value, parts[0].best, questions, answered)


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
