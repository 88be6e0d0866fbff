"""AI2D: questions about diagrams of school books."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from layerfuse.errors import LayerfuseError, short
from layerfuse.evaluate.answer_parsing import LETTERS
from layerfuse.evaluate.benchmarks.choices import (
    OptionsBenchmark,
    items_of_table,
    options_list,
    text_in,
)
from layerfuse.evaluate.benchmarks.interface import (
    Column,
    Item,
    JudgedItem,
    benchmark,
    share,
)
from layerfuse.evaluate.benchmarks.official_files import (
    Row,
    checked_items,
    existing_file,
    nothing_found,
    read_parquet,
    read_tsv,
    shards_like,
)
from layerfuse.evaluate.benchmarks.official_pictures import picture_from_cell


@benchmark
class Ai2d(OptionsBenchmark):
    """AI2D: questions about diagrams of school books, the test split."""

    name: ClassVar[str] = "ai2d"
    title: ClassVar[str] = "AI2D"
    licence: ClassVar[str] = "not stated"
    expected: ClassVar[tuple[str, ...]] = ("AI2D_TEST.tsv or data/test-*.parquet",)
    headline: ClassVar[str] = "accuracy"
    published_questions: ClassVar[tuple[int, ...]] = (3088,)

    def load(self, folder: Path) -> list[Item]:
        """Read the questions.

        Args:
            folder: with the file or files.

        Returns:
            All questions; those of Parquet files, which have no ids, are called by their number.

        Raises:
            LayerfuseError: a file is missing, cut off, or of another benchmark.
        """
        # The table first, as the other files have no ids.
        table = existing_file(folder, ["AI2D_TEST.tsv"])
        if table is not None:
            rows = read_tsv(table, ["index", "question", "image", "answer", "A", "B"])
            return checked_items(table, items_of_table(table, rows))
        # `shards_like` would not name the table.
        if not list(folder.glob("data/test-*.parquet")):
            raise nothing_found(folder, ["AI2D_TEST.tsv", "data/test-*.parquet"])
        files = shards_like(folder, "data/test-*.parquet")
        items: list[Item] = []
        # The shards are one table, so that numbers go on from one to the next.
        rows = read_parquet(files, ["question", "options", "answer", "image"])
        for number, row in enumerate(rows):
            items.append(_item(folder, number, row))
        return checked_items(files[0], items)

    def columns(self, answered: Sequence[JudgedItem]) -> list[Column]:
        """Give the accuracy.

        Args:
            answered: every question once.
        """
        return [share(answered)]


def _item(folder: Path, number: int, row: Row) -> Item:
    """A question of AI2D's Parquet files, which count the options from 0.

    Raises:
        LayerfuseError: the answer is not the number of an option.
    """
    options = tuple(str(option).strip() for option in options_list(folder, row["options"]))
    # The answer is a text such as `2`.
    numbers = [str(place) for place in range(len(options))]
    answer = text_in(row, "answer")
    if answer not in numbers:
        raise LayerfuseError(
            f"{folder} has the answer {short(answer)} in row {number}; one of "
            f"{', '.join(numbers)}, the number of an option, is expected"
        )
    return Item(
        id=str(number),
        pictures=(picture_from_cell(f"{folder}, AI2D's picture {number}", row["image"]),),
        question=text_in(row, "question"),
        answers=(LETTERS[int(answer)],),
        options=options,
    )
