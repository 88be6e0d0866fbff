"""ScienceQA: questions of school science with options, about half of them with a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

from layerfuse.errors import LayerfuseError, short
from layerfuse.evaluate.answer_parsing import LETTERS, scienceqa_letter
from layerfuse.evaluate.benchmarks.choices import options_list, text_in
from layerfuse.evaluate.benchmarks.interface import (
    Benchmark,
    Column,
    Item,
    Judged,
    JudgedItem,
    benchmark,
    share,
)
from layerfuse.evaluate.benchmarks.official_files import (
    Row,
    checked_items,
    read_json,
    read_json_value,
)
from layerfuse.evaluate.benchmarks.official_pictures import picture_file

_SPLIT = "test"
_COLUMNS = ("question", "choices", "answer", "hint", "image", "grade", "subject")
_SUBJECTS = {
    "NAT": "natural science",
    "SOC": "social science",
    "LAN": "language science",
}
_FIRST_GRADES = tuple(f"grade{year}" for year in range(1, 7))
_LATER_GRADES = tuple(f"grade{year}" for year in range(7, 13))


@benchmark
class ScienceQa(Benchmark):
    """ScienceQA's test split, with LLaVA's way of reading answers.

    Sources: llava/eval/eval_science_qa.py of haotian-liu/LLaVA for how an answer is read and for
    the questions with a picture; tools/evaluate_acc.py of lupantech/ScienceQA for the categories.
    """

    name: ClassVar[str] = "scienceqa"
    title: ClassVar[str] = "ScienceQA"
    licence: ClassVar[str] = "CC BY-NC-SA 4.0"
    expected: ClassVar[tuple[str, ...]] = (
        "problems.json",
        "pid_splits.json",
        "images/test/<id>/image.png",
    )
    headline: ClassVar[str] = "image accuracy"
    published_questions: ClassVar[tuple[int, ...]] = (4241,)

    def load(self, folder: Path) -> list[Item]:
        """Read the questions of the test split, with and without pictures.

        Args:
            folder: with the files.

        Returns:
            The questions; `context` is the hint, `group` the subject and the grade.

        Raises:
            LayerfuseError: a file is missing, cut off, or of another benchmark.
        """
        file = folder / "problems.json"
        # The problems of all splits are in one file.
        rows = read_json(file, _COLUMNS, id_column="pid")
        problems = {str(row["pid"]): row for row in rows}
        splits = folder / "pid_splits.json"
        items: list[Item] = []
        for pid in _ids_of_split(splits):
            if pid not in problems:
                raise LayerfuseError(f"{file} has no problem {short(pid)}, which {splits} lists")
            items.append(_item(folder, file, problems[pid]))
        return checked_items(file, items)

    def judge(self, item: Item, answer: str) -> Judged:
        """Score one answer.

        Args:
            item: the question.
            answer: is wrong if it names no option in one of the ways that LLaVA's script knows.
        """
        # Older scripts guess where no option is named, so that luck scores.
        letter = scienceqa_letter(answer, len(item.options))
        return Judged(letter, float(letter == item.answers[0]))

    def columns(self, answered: Sequence[JudgedItem]) -> list[Column]:
        """Give the accuracies.

        Args:
            answered: every question once.

        Returns:
            Over all questions, over those with a picture, and over each of the official categories
            that has questions: subjects, questions with a hint in words (TXT), with a picture
            (IMG), with neither (NO), and grades.
        """
        with_picture = [each for each in answered if each.item.pictures]
        # Twice the same number, under the name of papers and the official one.
        categories: dict[str, list[JudgedItem]] = {"image accuracy": with_picture}
        for name, subject in _SUBJECTS.items():
            categories[name] = [each for each in answered if _subject(each.item) == subject]
        # A question counts in every category that it belongs to.
        categories["TXT"] = [each for each in answered if each.item.context]
        categories["IMG"] = with_picture
        categories["NO"] = [
            each for each in answered if not each.item.context and not each.item.pictures
        ]
        categories["G1-6"] = [each for each in answered if _grade(each.item) in _FIRST_GRADES]
        categories["G7-12"] = [each for each in answered if _grade(each.item) in _LATER_GRADES]
        columns = [share(answered)]
        for name, part in categories.items():
            # A part of the test split need not have all categories.
            if part:
                columns.append(share(part, name))
        return columns


def _ids_of_split(file: Path) -> list[str]:
    """The ids of the test split.

    Raises:
        LayerfuseError: the file is no mapping from splits to ids.
    """
    value = read_json_value(file)
    ids: Any = None
    if isinstance(value, dict):
        ids = cast("dict[str, Any]", value).get(_SPLIT)
    if not isinstance(ids, list):
        raise LayerfuseError(f"{file} has no list of ids under {_SPLIT!r}; one is expected")
    return [str(pid) for pid in cast("list[Any]", ids)]


def _item(folder: Path, file: Path, row: Row) -> Item:
    """A question of the test split.

    Raises:
        LayerfuseError: the answer is not the number of an option.
    """
    pid = text_in(row, "pid")
    options = tuple(str(option).strip() for option in options_list(file, row["choices"]))
    answer = row["answer"]
    if not isinstance(answer, int) or not 0 <= answer < len(options):
        raise LayerfuseError(
            f"{file} has the answer {short(answer)} to problem {pid}; the number of one of its "
            f"{len(options)} options, from 0, is expected"
        )
    pictures = ()
    name = text_in(row, "image")
    if name:
        pictures = (picture_file(folder / "images" / _SPLIT / pid, name),)
    return Item(
        id=pid,
        pictures=pictures,
        question=text_in(row, "question"),
        answers=(LETTERS[answer],),
        # Subject and grade are reported apart from each other.
        group=f"{text_in(row, 'subject')}, {text_in(row, 'grade')}",
        options=options,
        context=text_in(row, "hint"),
    )


def _subject(item: Item) -> str:
    """The subject of a question, such as `natural science`."""
    return item.group.partition(", ")[0]


def _grade(item: Item) -> str:
    """The grade of a question, such as `grade3`."""
    return item.group.partition(", ")[2]
