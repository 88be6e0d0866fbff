"""MMStar: questions with four options that cannot be answered without the picture."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from layerfuse.evaluate.answer_parsing import LETTERS
from layerfuse.evaluate.benchmarks.choices import (
    OptionsBenchmark,
    check_letter,
    items_of_table,
    shares_by_group,
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
    checked_items,
    existing_file,
    nothing_found,
    read_parquet,
    read_tsv,
)
from layerfuse.evaluate.benchmarks.official_pictures import picture_from_cell


@benchmark
class MmStar(OptionsBenchmark):
    """MMStar: 1,500 questions that cannot be answered without the picture."""

    name: ClassVar[str] = "mmstar"
    title: ClassVar[str] = "MMStar"
    licence: ClassVar[str] = "not stated"
    expected: ClassVar[tuple[str, ...]] = ("MMStar.tsv or mmstar.parquet",)
    headline: ClassVar[str] = "accuracy"
    published_questions: ClassVar[tuple[int, ...]] = (1500,)

    def load(self, folder: Path) -> list[Item]:
        """Read the questions.

        Args:
            folder: with the file.

        Returns:
            All questions; `group` is the category.

        Raises:
            LayerfuseError: the file is missing, cut off, or of another benchmark.
        """
        # The table first: it has the options in columns, which needs no guess.
        table = existing_file(folder, ["MMStar.tsv"])
        if table is not None:
            rows = read_tsv(table, ["index", "question", "image", "answer", "category", "A", "B"])
            return checked_items(table, items_of_table(table, rows))
        file = existing_file(folder, ["mmstar.parquet", "data/mmstar.parquet"])
        if file is None:
            raise nothing_found(folder, ["MMStar.tsv", "mmstar.parquet"])
        rows = read_parquet(file, ["index", "question", "image", "answer", "category"])
        items: list[Item] = []
        for row in rows:
            index = text_in(row, "index")
            question, options = split_options(text_in(row, "question"))
            item = Item(
                id=index,
                pictures=(picture_from_cell(f"{file}, picture {index}", row["image"]),),
                question=question,
                answers=(check_letter(file, index, text_in(row, "answer"), options or "ABCD"),),
                group=text_in(row, "category"),
                options=options,
            )
            items.append(item)
        return checked_items(file, items)

    def columns(self, answered: Sequence[JudgedItem]) -> list[Column]:
        """Give the accuracy over all questions and over each category's.

        Args:
            answered: every question once.
        """
        return [share(answered), *shares_by_group(answered)]


def split_options(text: str) -> tuple[str, tuple[str, ...]]:
    """Take the options out of a question such as `What? Options: A: a cup, B: a glass`.

    Args:
        text: of MMStar's Parquet file.

    Returns:
        The question and its options; the whole text and no options where they are written in
        another way.
    """
    # The last marker, as the question itself may speak of options.
    question, marker, written = text.rpartition("Options:")
    if not marker:
        return text, ()
    options: list[str] = []
    # Parted before letters alone, as options have commas of their own.
    for place, part in enumerate(re.split(r",\s*(?=[A-J]: )", written.strip())):
        beginning = f"{LETTERS[place]}: "
        # Letters out of order are no options, or not all of them.
        if not part.startswith(beginning):
            return text, ()
        options.append(part.removeprefix(beginning).strip())
    if len(options) < 2:
        return text, ()
    return question.strip(), tuple(options)
