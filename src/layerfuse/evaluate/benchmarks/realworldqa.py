"""RealWorldQA: questions about pictures from cars and of daily life."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.answer_parsing import LETTERS
from layerfuse.evaluate.benchmarks.choices import (
    judge_letter,
    options_of,
    pictures_by_index,
    text_in,
)
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
    existing_file,
    nothing_found,
    picture_from_cell,
    read_parquet,
    read_tsv,
    shards_like,
)
from layerfuse.evaluate.metrics import exact_match, normalize
from layerfuse.vision.picture import Picture


@benchmark
class RealWorldQa(Benchmark):
    """RealWorldQA: 765 questions about pictures from cars and of daily life."""

    name: ClassVar[str] = "realworldqa"
    title: ClassVar[str] = "RealWorldQA"
    licence: ClassVar[str] = "CC BY-ND 4.0"
    expected: ClassVar[tuple[str, ...]] = ("RealWorldQA.tsv or data/test-*.parquet",)
    headline: ClassVar[str] = "accuracy"

    def load(self, folder: Path) -> list[Item]:
        """Read the questions.

        Args:
            folder: with the file or files.

        Returns:
            All questions, without the words that tell how to answer; those of Parquet files, which
            have no ids, are called by their number.

        Raises:
            LayerfuseError: a file is missing, cut off, or of another benchmark.
        """
        items: list[Item] = []
        # The table first, as the other files have no ids.
        table = existing_file(folder, ["RealWorldQA.tsv"])
        if table is not None:
            rows = read_tsv(table, ["index", "question", "image", "answer"])
            pictures = pictures_by_index(table, rows)
            for row in rows:
                index = text_in(row, "index")
                items.append(_item(row, index, pictures[index]))
            return checked_items(table, items)
        # `shards_like` would not name the table.
        if not list(folder.glob("data/test-*.parquet")):
            raise nothing_found(folder, ["RealWorldQA.tsv", "data/test-*.parquet"])
        files = shards_like(folder, "data/test-*.parquet")
        # Numbers go on from one shard to the next.
        for number, row in enumerate(read_parquet(files, ["question", "answer", "image"])):
            picture = picture_from_cell(f"{folder}, RealWorldQA's {number}", row["image"])
            items.append(_item(row, str(number), picture))
        return checked_items(files[0], items)

    def judge(self, item: Item, answer: str) -> Judged:
        """Score one answer: by the option that it names, or by its words where it has none.

        Args:
            item: the question.
            answer: what the model said.
        """
        # An open question may have a letter as its answer, such as that on a sign.
        if item.options and item.answers[0] in list(LETTERS):
            return judge_letter(item, answer)
        return Judged(normalize(answer) or None, exact_match(answer, item.answers[0]))

    def columns(self, answered: Sequence[JudgedItem]) -> list[Column]:
        """Give the accuracy.

        Args:
            answered: every question once.
        """
        return [share(answered)]


def _item(row: Row, number: str, picture: Picture) -> Item:
    """A question, whose options stand in its words or in columns.

    Raises:
        LayerfuseError: it has no answer.
    """
    question, options = split_option_lines(text_in(row, "question"))
    # VLMEvalKit's table has columns for them.
    if not options:
        options = options_of(row)
    answer = text_in(row, "answer")
    if not answer:
        raise LayerfuseError(f"RealWorldQA's question {number} has no answer; one is expected")
    return Item(
        id=number,
        pictures=(picture,),
        question=question,
        answers=(answer,),
        options=options,
    )


def split_option_lines(text: str) -> tuple[str, tuple[str, ...]]:
    """Take the options out of a question that has each in a line such as `A. left`.

    Args:
        text: a question of RealWorldQA; a line that begins with `Please answer directly` tells how
            to answer.

    Returns:
        The question without both, and its options.
    """
    question: list[str] = []
    options: list[str] = []
    for line in text.split("\n"):
        # Only the next letter makes an option, and none does behind the last.
        next_letter = LETTERS[len(options) : len(options) + 1]
        if next_letter and line.startswith(f"{next_letter}. "):
            options.append(line.removeprefix(f"{next_letter}. ").strip())
        elif not line.startswith("Please answer directly"):
            question.append(line)
    return "\n".join(question).strip(), tuple(options)
