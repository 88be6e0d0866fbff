"""Questions with options A, B, ...: how files hold them, and how an answer is judged."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from layerfuse.errors import LayerfuseError, short
from layerfuse.evaluate.answer_parsing import LETTERS, option_letter, strict_option_letter
from layerfuse.evaluate.benchmarks.interface import (
    Benchmark,
    Column,
    Item,
    Judged,
    JudgedItem,
    by_group,
    share,
)
from layerfuse.evaluate.benchmarks.official_files import Row
from layerfuse.evaluate.benchmarks.official_pictures import picture_from_base64
from layerfuse.vision.picture import Picture

_LONGEST_REFERENCE = 64
"""characters of a cell that names the row with the picture; every picture has more"""


def text_in(row: Row, column: str) -> str:
    """A cell as text.

    Args:
        row: of a table.
        column: need not exist.

    Returns:
        The text without spaces around it; empty where nothing stands, which some files write `nan`.
    """
    value = row.get(column)
    if value is None:
        return ""
    text = str(value).strip()
    # Which is what pandas writes for an empty cell.
    return "" if text == "nan" else text


def options_of(row: Row) -> tuple[str, ...]:
    """The options that stand in columns A, B, ...

    Args:
        row: of a table.

    Returns:
        The options up to the first empty cell.
    """
    options: list[str] = []
    for letter in LETTERS:
        text = text_in(row, letter)
        if not text:
            break
        options.append(text)
    return tuple(options)


def check_letter(file: Path, question: str, letter: str, options: Sequence[str]) -> str:
    """Check the right answer of a question with options.

    Args:
        file: for the error.
        question: its id, for the error.
        letter: what the file calls right.
        options: of the question.

    Returns:
        The letter.

    Raises:
        LayerfuseError: no option has this letter.
    """
    # A list, as a string would take `AB` for one of its letters.
    letters = list(LETTERS[: len(options)])
    if letter not in letters:
        raise LayerfuseError(
            f"{file} has the answer {short(letter)} to the question {question}, whose options are "
            f"{', '.join(letters) or 'none'}; is it a split without answers?"
        )
    return letter


def pictures_by_index(file: Path, rows: Sequence[Row]) -> dict[str, Picture]:
    """The pictures of a TSV file, whose rows may name another row that has the same picture.

    Args:
        file: of the rows.
        rows: with an index, and a picture in base64 or the index of the row that has it.

    Returns:
        The pictures by the index of the row.

    Raises:
        LayerfuseError: a picture is no base64, or a row is named that has none.
    """
    # One of the rows about a picture has it, which saves megabytes of base64.
    cells = {text_in(row, "index"): text_in(row, "image") for row in rows}
    decoded: dict[str, Picture] = {}
    pictures: dict[str, Picture] = {}
    for index, cell in cells.items():
        source = index if len(cell) > _LONGEST_REFERENCE else cell
        if len(cells.get(source, "")) <= _LONGEST_REFERENCE:
            raise LayerfuseError(
                f"{file} has {short(cell)} for the picture of row {index}; base64 or the index of "
                "a row with a picture is expected"
            )
        # One picture for all its rows, so that it is encoded once.
        if source not in decoded:
            decoded[source] = picture_from_base64(f"{file}, picture {source}", cells[source])
        pictures[index] = decoded[source]
    return pictures


def judge_letter(item: Item, answer: str) -> Judged:
    """Score an answer that should name an option.

    Args:
        item: the question; without options where they stand in its words.
        answer: what the model said.

    Returns:
        The letter that was understood, and whether it is right.
    """
    if item.options:
        # Options whose texts are known are recognized by them too.
        letter = option_letter(answer, item.options)
    else:
        # The number of options is not known.
        letter = strict_option_letter(answer, len(LETTERS))
    return Judged(letter, float(letter == item.answers[0]))


class OptionsBenchmark(Benchmark):
    """A benchmark whose answers name one of the options A, B, ..."""

    def judge(self, item: Item, answer: str) -> Judged:
        """Score one answer by the option that it names.

        Args:
            item: the question.
            answer: what the model said.

        Returns:
            The letter that was understood, and whether it is right.
        """
        return judge_letter(item, answer)


def items_of_table(file: Path, rows: Sequence[Row]) -> list[Item]:
    """The questions of a TSV file in the form of VLMEvalKit.

    Args:
        file: of the rows, for errors.
        rows: with index, question, image, answer, A, B, ..., and perhaps category and hint.

    Returns:
        A question for each row.

    Raises:
        LayerfuseError: an answer is no option, or a picture cannot be read.
    """
    pictures = pictures_by_index(file, rows)
    items: list[Item] = []
    for row in rows:
        index = text_in(row, "index")
        options = options_of(row)
        item = Item(
            id=index,
            pictures=(pictures[index],),
            question=text_in(row, "question"),
            answers=(check_letter(file, index, text_in(row, "answer"), options),),
            # Not every benchmark has categories.
            group=text_in(row, "category") or "all",
            options=options,
            context=text_in(row, "hint"),
        )
        items.append(item)
    return items


def options_list(file: Path, cell: Any) -> list[Any]:
    """The options that stand in one cell.

    Args:
        file: for the error.
        cell: a list.

    Returns:
        The list.

    Raises:
        LayerfuseError: it is no list, or has no options or more than letters.
    """
    if not isinstance(cell, list):
        raise LayerfuseError(f"{file} has {short(cell)} as options; a list is expected")
    options = cast("list[Any]", cell)
    if not 0 < len(options) <= len(LETTERS):
        raise LayerfuseError(
            f"{file} has a question with {len(options)} options; 1 to {len(LETTERS)} are expected"
        )
    return options


def shares_by_group(answered: Sequence[JudgedItem]) -> list[Column]:
    """The accuracy of each group.

    Args:
        answered: at least one.

    Returns:
        A column for each, sorted by name.
    """
    groups = by_group(answered)
    return [share(groups[name], name) for name in sorted(groups)]


def groups_right(
    name: str,
    answered: Sequence[JudgedItem],
    key: Callable[[Item], str] = lambda item: item.together,
) -> Column:
    """The share of groups in which every answer is right, in percent.

    Args:
        name: of the column.
        answered: at least one.
        key: names the group of a question; what is judged together, if none is given.

    Returns:
        The column, which is over so many groups.
    """
    groups = by_group(answered, key)
    right = 0
    for answers in groups.values():
        if all(each.judged.score == 1 for each in answers):
            right += 1
    return Column(name, 100 * right / len(groups), 100.0, len(groups))
