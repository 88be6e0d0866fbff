"""MMBench: questions with options that are asked once for each rotation of their options."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from layerfuse.errors import LayerfuseError, short
from layerfuse.evaluate.benchmarks.choices import (
    OptionsBenchmark,
    check_letter,
    groups_right,
    options_of,
    pictures_by_index,
    text_in,
)
from layerfuse.evaluate.benchmarks.interface import (
    Column,
    Item,
    JudgedItem,
    benchmark,
    by_group,
    share,
)
from layerfuse.evaluate.benchmarks.official_files import Row, checked_items, first_file, read_tsv

_FILES = (
    "MMBench_DEV_EN.tsv",
    "MMBench_DEV_EN_V11.tsv",
    "mmbench_dev_20230712.tsv",
    "mmbench_dev_en_20231003.tsv",
)
"""VLMEvalKit's files, LLaVA's (docs/Evaluation.md) and that of open-compass/MMBench (README.md)"""
_FILES_CN = ("MMBench_DEV_CN.tsv", "mmbench_dev_cn_20231003.tsv")
"""VLMEvalKit's and LLaVA's, of the same questions in Chinese"""
_SPLIT = "dev"
_ROTATION = 10**6
"""what each further rotation of a question adds to its index"""


@benchmark
class MmBench(OptionsBenchmark):
    """MMBench's development split in English, right only where every rotation is right."""

    name: ClassVar[str] = "mmbench"
    title: ClassVar[str] = "MMBench"
    licence: ClassVar[str] = "Apache 2.0"
    files: ClassVar[tuple[str, ...]] = _FILES
    expected: ClassVar[tuple[str, ...]] = (" or ".join(_FILES),)
    headline: ClassVar[str] = "circular"
    published_questions: ClassVar[tuple[int, ...]] = (4329, 4377)

    def load(self, folder: Path) -> list[Item]:
        """Read the questions of the development split, each with all its rotations.

        Args:
            folder: with the file.

        Returns:
            A question for each rotation; `together` is the index of the unrotated question,
            `group` the broad and the narrow category, `context` the hint.

        Raises:
            LayerfuseError: the file is missing, cut off, without answers or of another benchmark,
                or a question lacks a rotation.
        """
        file = first_file(folder, self.files)
        needed = ["index", "question", "A", "B", "answer", "category", "image"]
        rows = read_tsv(file, needed)
        # A file may hold the test split as well, which has no answers.
        asked = [row for row in rows if text_in(row, "split") in (_SPLIT, "")]
        # Of all rows: one of this split may name one of another.
        pictures = pictures_by_index(file, rows)
        items: list[Item] = []
        for row in asked:
            index = text_in(row, "index")
            options = options_of(row)
            item = Item(
                id=index,
                pictures=(pictures[index],),
                question=text_in(row, "question"),
                answers=(check_letter(file, index, text_in(row, "answer"), options),),
                group=_category(row),
                options=options,
                context=text_in(row, "hint"),
                together=str(_index(file, index) % _ROTATION),
            )
            items.append(item)
        # First, as a row that is there twice would be no rotation too few.
        checked_items(file, items)
        _check_rotations(file, items)
        return items

    def columns(self, answered: Sequence[JudgedItem]) -> list[Column]:
        """Give the accuracies.

        Args:
            answered: every rotation of every question once.

        Returns:
            Circular accuracy, in which a question is right if all its rotations are; plain
            accuracy, which is that of the unrotated questions; and the circular accuracy of each
            broad category, or of each category where a file has no broad ones.
        """
        # What the paper calls vanilla evaluation.
        unrotated = [each for each in answered if each.item.id == each.item.together]
        columns = [groups_right("circular", answered), share(unrotated, "plain")]
        categories = by_group(answered, key=lambda item: item.group.partition("/")[0])
        for name in sorted(categories):
            columns.append(groups_right(name, categories[name]))
        return columns


@benchmark
class MmBenchCn(MmBench):
    """MMBench's development split in Chinese."""

    name: ClassVar[str] = "mmbench-cn"
    title: ClassVar[str] = "MMBench-CN"
    files: ClassVar[tuple[str, ...]] = _FILES_CN
    expected: ClassVar[tuple[str, ...]] = (" or ".join(_FILES_CN),)
    published_questions: ClassVar[tuple[int, ...]] = (4329,)


def _category(row: Row) -> str:
    """The broad and the narrow category, such as `attribute_reasoning/function_reasoning`."""
    narrow = text_in(row, "category")
    broad = text_in(row, "l2-category")
    return f"{broad}/{narrow}" if broad else narrow


def _index(file: Path, index: str) -> int:
    """The index of a row as a number.

    Raises:
        LayerfuseError: it is none.
    """
    if not index.isdecimal():
        raise LayerfuseError(f"{file} has the index {short(index)}; a whole number is expected")
    return int(index)


def _check_rotations(file: Path, items: Sequence[Item]) -> None:
    """Refuse a question that has not as many rotations as options.

    Raises:
        LayerfuseError: names the question and what it lacks.
    """
    questions: dict[str, list[Item]] = {}
    for item in items:
        questions.setdefault(item.together, []).append(item)
    for index, rotations in questions.items():
        # Sets, as the order of the file does not matter.
        found = {int(item.id) for item in rotations}
        # N rotations of N options put the right one under each letter once.
        count = len(rotations[0].options)
        expected = {int(index) + _ROTATION * turn for turn in range(count)}
        if found != expected:
            raise LayerfuseError(
                f"{file} has the question {index} with {count} options under the indices "
                f"{_listed(found)}; {_listed(expected)} are expected, one for each rotation of the "
                "options"
            )


def _listed(numbers: set[int]) -> str:
    """Numbers for an error."""
    return ", ".join(str(number) for number in sorted(numbers))
