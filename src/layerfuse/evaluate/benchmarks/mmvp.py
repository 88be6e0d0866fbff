"""MMVP: pairs of pictures that CLIP takes for the same, with the same question about both."""

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from layerfuse.data import text_files
from layerfuse.errors import LayerfuseError, short
from layerfuse.evaluate.benchmarks.choices import OptionsBenchmark, check_letter, groups_right
from layerfuse.evaluate.benchmarks.interface import (
    Column,
    Item,
    JudgedItem,
    benchmark,
    share,
)
from layerfuse.evaluate.benchmarks.official_files import checked_items
from layerfuse.evaluate.benchmarks.official_pictures import picture_file

_OPTION = re.compile(r"\(([a-z])\)")


@benchmark
class Mmvp(OptionsBenchmark):
    """MMVP, in which a pair is right only if both its questions are.

    The answers are those of the release. Two of its pairs, the questions 99 and 100 and the
    questions 279 and 280, are reported to have each other's answers (issues 14 and 30 of
    tsb0601/MMVP).
    """

    name: ClassVar[str] = "mmvp"
    title: ClassVar[str] = "MMVP"
    licence: ClassVar[str] = "MIT"
    expected: ClassVar[tuple[str, ...]] = ("Questions.csv", "MMVP Images/*.jpg")
    headline: ClassVar[str] = "pair accuracy"
    published_questions: ClassVar[tuple[int, ...]] = (300,)

    def load(self, folder: Path) -> list[Item]:
        """Read the questions.

        Args:
            folder: with the files.

        Returns:
            The questions; `together` is the number of the pair, of which the first is 1.

        Raises:
            LayerfuseError: a file is missing, cut off, or of another benchmark, or a question has
                no partner.
        """
        file = folder / "Questions.csv"
        items: list[Item] = []
        for cells in _read_lines(file):
            items.append(_item(folder, file, cells))
        checked_items(file, items)
        _check_pairs(file, items)
        return items

    def columns(self, answered: Sequence[JudgedItem]) -> list[Column]:
        """Give the share of pairs whose questions are both right, and that of right questions.

        Args:
            answered: every question once.
        """
        return [groups_right("pair accuracy", answered), share(answered)]


def _read_lines(file: Path) -> list[list[str]]:
    """The lines of the file below its header, whose first cell is spelled `lndex` in one release.

    Raises:
        LayerfuseError: the file is missing, cut off, or has other columns.
    """
    if not file.is_file():
        raise LayerfuseError(f"there is no file {file}; MMVP's questions are expected there")
    text = text_files.read_text(file)
    try:
        table = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise LayerfuseError(
            f"{file} is not a complete CSV file: {error}; was its download cut off?"
        ) from error
    # Empty lines at the end are no questions.
    lines = [cells for cells in table if cells]
    # The name of the first column is not looked at.
    header = [name.strip() for name in lines[0]] if lines else []
    if header[1:] != ["Question", "Options", "Correct Answer"]:
        raise LayerfuseError(
            f"{file} has the columns {', '.join(header) or 'none'}; Index, Question, Options and "
            "Correct Answer are expected. Is it the file of another benchmark?"
        )
    for cells in lines[1:]:
        if len(cells) != len(header):
            raise LayerfuseError(
                f"{file} has a row of {len(cells)} cells, {short(cells)}; {len(header)} are "
                "expected. Was its download cut off?"
            )
    return lines[1:]


def _item(folder: Path, file: Path, cells: Sequence[str]) -> Item:
    """The question of one line.

    Raises:
        LayerfuseError: its number, its options or its answer are not in the file's usual form.
    """
    index, question, written_options, answer = [cell.strip() for cell in cells]
    if not index.isdecimal() or int(index) == 0:
        raise LayerfuseError(f"{file} has the index {short(index)}; a number from 1 is expected")
    # Before the first option stands nothing; then each letter and its text.
    beginning, *parts = _OPTION.split(written_options)
    letters = "".join(parts[0::2])
    options = tuple(text.strip() for text in parts[1::2])
    if beginning.strip() or len(options) < 2 or letters != "abcdefghij"[: len(options)]:
        raise LayerfuseError(
            f"{file} has the options {short(written_options)} in row {index}; such as "
            "(a) Open (b) Closed are expected"
        )
    # Written as `(a)`.
    letter = answer.strip("()").upper()
    # The picture of question 01 is 1.jpg.
    number = int(index)
    return Item(
        id=str(number),
        pictures=(picture_file(folder / "MMVP Images", f"{number}.jpg"),),
        question=question,
        answers=(check_letter(file, index, letter, options),),
        options=options,
        together=str((number + 1) // 2),
    )


def _check_pairs(file: Path, items: Sequence[Item]) -> None:
    """Refuse a question without a partner.

    Raises:
        LayerfuseError: names the question.
    """
    numbers = {int(item.id) for item in items}
    for number in sorted(numbers):
        # Questions 1 and 2 are a pair, and 3 and 4.
        partner = number + 1 if number % 2 == 1 else number - 1
        if partner not in numbers:
            raise LayerfuseError(
                f"{file} has the question {number} without its partner {partner}; MMVP's questions "
                "are pairs. Was its download cut off?"
            )
