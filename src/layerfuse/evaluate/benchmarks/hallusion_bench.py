"""HallusionBench: questions with yes or no about figures, and about the same figures changed."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from layerfuse.errors import LayerfuseError, short
from layerfuse.evaluate.benchmarks.choices import groups_right, text_in
from layerfuse.evaluate.benchmarks.interface import (
    Benchmark,
    Column,
    Item,
    Judged,
    JudgedItem,
    benchmark,
    share,
)
from layerfuse.evaluate.benchmarks.official_files import Row, checked_items, read_json
from layerfuse.evaluate.benchmarks.official_pictures import picture_file

_NEEDED = (
    "category",
    "subcategory",
    "visual_input",
    "set_id",
    "figure_id",
    "question_id",
    "question",
    "gt_answer",
)
_WORDS = {"0": "no", "1": "yes"}


@benchmark
class HallusionBench(Benchmark):
    """HallusionBench, judged by the words yes and no instead of by GPT-4.

    What is judged together, and that not to know is right where there is no figure: utils.py of
    tianyi-lab/HallusionBench.
    """

    name: ClassVar[str] = "hallusionbench"
    title: ClassVar[str] = "HallusionBench"
    licence: ClassVar[str] = "BSD-3-Clause"
    expected: ClassVar[tuple[str, ...]] = (
        "HallusionBench.json",
        "hallusion_bench/<category>/<subcategory>/*.png",
    )
    headline: ClassVar[str] = "aAcc"
    published_questions: ClassVar[tuple[int, ...]] = (1129,)

    def load(self, folder: Path) -> list[Item]:
        """Read the questions, with and without figures.

        Args:
            folder: with the files.

        Returns:
            The questions; `together` is the figure, or where there is none the set of questions.

        Raises:
            LayerfuseError: a file is missing, cut off, or of another benchmark.
        """
        file = folder / "HallusionBench.json"
        # The archive of figures unpacks to a folder of its own.
        figures = folder
        if (folder / "hallusion_bench").is_dir():
            figures = folder / "hallusion_bench"
        items: list[Item] = []
        for row in read_json(file, _NEEDED):
            items.append(_item(figures, file, row))
        return checked_items(file, items)

    def redrawn_with(self, item: Item) -> str:
        """Name the set that a question belongs to: qAcc judges all its figures together.

        Args:
            item: the question.
        """
        return item.together.rpartition("/")[0]

    def judge(self, item: Item, answer: str) -> Judged:
        """Score one answer.

        Args:
            item: the question.
            answer: with the word yes or the word no; with both or neither it is unclear.

        Returns:
            What was understood. An unclear answer is right where there is no figure, as nobody can
            know, and else wrong.
        """
        # Whole words: `know` and `nothing` do not say no.
        words = set(re.findall(r"[a-z]+", answer.lower()))
        said = [word for word in ("yes", "no") if word in words]
        if len(said) != 1:
            return Judged(None, 0.0 if item.pictures else 1.0)
        return Judged(said[0], float(said[0] == item.answers[0]))

    def columns(self, answered: Sequence[JudgedItem]) -> list[Column]:
        """Give the accuracies.

        Args:
            answered: every question once.

        Returns:
            Over questions (aAcc); over figures whose questions are all right (fAcc); over questions
            that are right about every figure of their set and without one (qAcc).
        """
        columns = [share(answered, "aAcc")]
        # As in the official code, what has no figure counts for none.
        about_figures = [each for each in answered if each.item.pictures]
        if about_figures:
            columns.append(groups_right("fAcc", about_figures))
        columns.append(groups_right("qAcc", answered, _question_of_set))
        return columns


def _item(figures: Path, file: Path, row: Row) -> Item:
    """A question.

    Raises:
        LayerfuseError: the answer is neither 0 nor 1.
    """
    category = text_in(row, "category")
    subcategory = text_in(row, "subcategory")
    set_id = text_in(row, "set_id")
    figure = text_in(row, "figure_id")
    together = f"{category}/{subcategory}/{set_id}/{figure}"
    answer = text_in(row, "gt_answer")
    if answer not in _WORDS:
        raise LayerfuseError(
            f"{file} has the answer {short(answer)} to a question about {together}; 0 for no or 1 "
            "for yes is expected"
        )
    pictures = ()
    if text_in(row, "visual_input") != "0":
        # Named as in the official code, as the paths in the file differ by revision.
        pictures = (picture_file(figures / category / subcategory, f"{set_id}_{figure}.png"),)
    return Item(
        id=f"{together}/{text_in(row, 'question_id')}",
        pictures=pictures,
        question=text_in(row, "question"),
        answers=(_WORDS[answer],),
        group=f"{category}/{subcategory}",
        together=together,
    )


def _question_of_set(item: Item) -> str:
    """What the same question about all figures of a set has in common."""
    # A set is a figure and its changed versions.
    set_of_figures = item.together.rpartition("/")[0]
    question = item.id.rpartition("/")[2]
    return f"{set_of_figures}, question {question}"
