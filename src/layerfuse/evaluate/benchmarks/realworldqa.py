"""RealWorldQA: questions about pictures from cars and of daily life.

Every question ends with a line that tells how to answer: with an option's letter, or with a single
word or number. lmms-eval asks this line as it stands (`lmms_eval/tasks/realworldqa/utils.py` of
EvolvingLMMs-Lab/lmms-eval), and so does Cambrian. Here it is the context of the question, so that a
prompt can place it behind the options, or leave it out and use words of its own.
"""

import re
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
    read_parquet,
    read_tsv,
    shards_like,
)
from layerfuse.evaluate.benchmarks.official_pictures import picture_from_cell
from layerfuse.evaluate.metrics import exact_match, normalize
from layerfuse.evaluate.vqa_words import NUMBER_WORDS
from layerfuse.vision.picture import Picture

LETTER_LINE = "Please answer directly with only the letter of the correct option and nothing else."
"""the closing line of questions with options"""
WORD_LINE = "Please answer directly with a single word or number."
"""the closing line of the others"""

_CLOSING_LINE = re.compile(r"please answer directly[^\n]*", re.IGNORECASE)
# "none" may be what an open question asks for.
_NUMBERS = {word: digits for word, digits in NUMBER_WORDS.items() if word != "none"}
"""the words that lmms-eval takes for numbers"""


@benchmark
class RealWorldQa(Benchmark):
    """RealWorldQA: 765 questions about pictures from cars and of daily life."""

    name: ClassVar[str] = "realworldqa"
    title: ClassVar[str] = "RealWorldQA"
    licence: ClassVar[str] = "CC BY-ND 4.0"
    expected: ClassVar[tuple[str, ...]] = ("RealWorldQA.tsv or data/test-*.parquet",)
    headline: ClassVar[str] = "accuracy"
    published_questions: ClassVar[tuple[int, ...]] = (765,)

    def load(self, folder: Path) -> list[Item]:
        """Read the questions.

        Args:
            folder: with the file or files.

        Returns:
            All questions; `context` is the line that tells how to answer, or the same line where a
            file leaves it out. Those of Parquet files, which have no ids, are called by their
            number.

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
        """Score one answer: by the option that it names, or by its words where there are none.

        Args:
            item: the question.
            answer: what the model said; a number up to ten may be a word, as for lmms-eval.
        """
        # An open question may have a letter as its answer, such as that on a sign.
        if item.options and item.answers[0] in list(LETTERS):
            return judge_letter(item, answer)
        said = _in_digits(answer)
        return Judged(said or None, exact_match(said, _in_digits(item.answers[0])))

    def notes(self, items: Sequence[Item]) -> list[str]:
        """Say which questions no answer is right to.

        VLMEvalKit's table lacks some options that the original has, among them right ones (issue
        677 of open-compass/VLMEvalKit).

        Args:
            items: all questions.

        Returns:
            A sentence, where there are such questions.
        """
        lacking: list[str] = []
        for item in items:
            if item.options and _is_missing(item.answers[0], item.options):
                lacking.append(item.id)
        if not lacking:
            return []
        return [
            f"the right option is missing from {len(lacking)} of the {len(items)} questions, to "
            f"which no answer is right: {', '.join(lacking)}"
        ]

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
    answer = text_in(row, "answer")
    if not answer:
        raise LayerfuseError(f"RealWorldQA's question {number} has no answer; one is expected")
    asked, closing_line = split_closing_line(text_in(row, "question"))
    question, options = split_option_lines(asked)
    # Options that are written in some other way stay where they are, and the letter alone counts.
    if _is_missing(answer, options):
        question, options = asked, ()
    # VLMEvalKit's table has columns for them.
    if not options:
        options = options_of(row)
    if not closing_line:
        closing_line = LETTER_LINE if options else WORD_LINE
    return Item(
        id=number,
        pictures=(picture,),
        question=question,
        answers=(answer,),
        options=options,
        context=closing_line,
    )


def split_closing_line(text: str) -> tuple[str, str]:
    """Part a question from the words that tell how to answer it.

    Args:
        text: a question of RealWorldQA.

    Returns:
        What is asked, and the line that begins with `Please answer directly`; empty where there is
        none.
    """
    found = _CLOSING_LINE.search(text)
    if found is None:
        return text.strip(), ""
    asked = text[: found.start()] + text[found.end() :]
    return asked.strip(), found[0].strip()


def split_option_lines(asked: str) -> tuple[str, tuple[str, ...]]:
    """Take the options out of a question that has each in a line such as `A. left`.

    Some lines lack the full stop behind the letter, such as option B of question 105 (issue 677 of
    open-compass/VLMEvalKit).

    Args:
        asked: a question without its closing line.

    Returns:
        The question without its options, and these.
    """
    question: list[str] = []
    options: list[str] = []
    for line in asked.split("\n"):
        # Only the next letter makes an option, and none does behind the last.
        letter = LETTERS[len(options) : len(options) + 1]
        if letter and line.startswith(f"{letter}. "):
            options.append(line.removeprefix(f"{letter}. ").strip())
        # Not for the first, as a line of the question itself may begin with the article `A`.
        elif options and letter and line.startswith(f"{letter} "):
            options.append(line.removeprefix(f"{letter} ").strip())
        else:
            question.append(line)
    return "\n".join(question).strip(), tuple(options)


def _is_missing(answer: str, options: Sequence[str]) -> bool:
    """Whether an answer is the letter of an option that is not among these."""
    return answer in list(LETTERS) and answer not in list(LETTERS[: len(options)])


def _in_digits(answer: str) -> str:
    """An answer as it is compared: normalized, and a number in digits."""
    said = normalize(answer)
    return _NUMBERS.get(said, said)
