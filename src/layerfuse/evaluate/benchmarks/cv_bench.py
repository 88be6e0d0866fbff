"""CV-Bench: counting, relations, depth and distance in pictures of three sources."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.answer_parsing import strict_option_letter
from layerfuse.evaluate.benchmarks.choices import (
    check_letter,
    options_list,
    text_in,
)
from layerfuse.evaluate.benchmarks.interface import (
    Benchmark,
    Column,
    Item,
    Judged,
    JudgedItem,
    benchmark,
    by_group,
    mean_of_columns,
    share,
)
from layerfuse.evaluate.benchmarks.official_files import (
    Row,
    checked_items,
    existing_file,
    nothing_found,
    read_json_lines,
    read_parquet,
)
from layerfuse.evaluate.benchmarks.official_pictures import picture_file, picture_from_cell
from layerfuse.vision.picture import Picture

SOURCES = ("ADE20K", "COCO", "Omni3D")

_TABLES = ("test_2d.parquet", "test_3d.parquet")
_LINES = ("test_2d.jsonl", "test_3d.jsonl")
_NEEDED = ("idx", "type", "task", "question", "choices", "answer", "source")
_ANSWER = re.compile(r"\(([A-Z])\)")


@benchmark
class CvBench(Benchmark):
    """CV-Bench, whose score is the mean of its 2D and its 3D half.

    The score is (2D + 3D) / 2, where 2D is (ADE20K + COCO) / 2 and 3D is Omni3D: the formula of
    lmms_eval/tasks/cv_bench/utils.py in EvolvingLMMs-Lab/lmms-eval.
    """

    name: ClassVar[str] = "cvbench"
    title: ClassVar[str] = "CV-Bench"
    licence: ClassVar[str] = "Apache 2.0"
    expected: ClassVar[tuple[str, ...]] = (
        "test_2d.parquet and test_3d.parquet, or test.parquet",
        "or test.jsonl (or test_2d.jsonl and test_3d.jsonl) and img/*",
    )
    headline: ClassVar[str] = "accuracy"
    published_questions: ClassVar[tuple[int, ...]] = (2638,)

    def load(self, folder: Path) -> list[Item]:
        """Read the questions.

        Args:
            folder: with the files.

        Returns:
            All questions; `group` is the source of the picture and the task.

        Raises:
            LayerfuseError: a file is missing, cut off, or of another benchmark, or a source has no
                questions.
        """
        files = _files(folder)
        items: list[Item] = []
        for file in files:
            if file.suffix == ".parquet":
                for row in read_parquet(file, [*_NEEDED, "image"]):
                    name = f"{file}, picture {text_in(row, 'idx')}"
                    items.append(_item(file, row, picture_from_cell(name, row["image"])))
            else:
                for row in read_json_lines(file, [*_NEEDED, "filename"]):
                    picture = picture_file(folder, text_in(row, "filename"))
                    items.append(_item(file, row, picture))
        # The mean over two of three sources would pass for the benchmark's score.
        found = {_source(item) for item in items}
        if found != set(SOURCES):
            raise LayerfuseError(
                f"{files[0].parent} has questions about {', '.join(sorted(found))}; CV-Bench has "
                f"them about {', '.join(SOURCES)}"
            )
        return checked_items(files[0], items)

    def judge(self, item: Item, answer: str) -> Judged:
        """Score one answer, which must be the option's letter.

        Args:
            item: the question.
            answer: what the model said.
        """
        # Stricter than Cambrian's own script, which takes the first character of any answer for
        # its letter, so that "both" is B (eval/eval/omni/omni_test.py of cambrian-mllm/cambrian).
        letter = strict_option_letter(answer, len(item.options))
        return Judged(letter, float(letter == item.answers[0]))

    def columns(self, answered: Sequence[JudgedItem]) -> list[Column]:
        """Give the accuracies.

        Args:
            answered: every question once.

        Returns:
            The mean of both halves; the halves, of which 2D is the mean of its two sources,
            whatever their sizes; each source's and each task's accuracy.

        Raises:
            LayerfuseError: nothing about one of the sources was answered.
        """
        sources = by_group(answered, key=_source)
        missing = [source for source in SOURCES if source not in sources]
        if missing:
            raise LayerfuseError(
                "CV-Bench's score needs answers about all sources; there are none about "
                f"{', '.join(missing)}"
            )
        ade20k, coco, omni3d = [share(sources[source], source) for source in SOURCES]
        two_d = mean_of_columns("2D", [ade20k, coco])
        three_d = mean_of_columns("3D", [omni3d])
        # The tasks are reported beside the score and are no part of it.
        tasks = by_group(answered, key=_task)
        by_task = [share(tasks[task], task) for task in sorted(tasks)]
        both = mean_of_columns("accuracy", [two_d, three_d])
        return [both, two_d, three_d, ade20k, coco, omni3d, *by_task]


def _files(folder: Path) -> list[Path]:
    """The files with the questions, of whichever revision is there.

    Raises:
        LayerfuseError: there are none, or one half is missing.
    """
    # Before 2025 both halves were in one file.
    whole = existing_file(folder, ["test.parquet"])
    if whole is not None:
        return [whole]
    for halves in (_TABLES, _LINES):
        # With one half alone, the reader tells that the other is missing.
        if existing_file(folder, halves) is not None:
            return [folder / name for name in halves]
    lines = existing_file(folder, ["test.jsonl"])
    if lines is not None:
        return [lines]
    raise nothing_found(folder, [*_TABLES, "test.parquet", "test.jsonl"])


def _item(file: Path, row: Row, picture: Picture) -> Item:
    """A question.

    Raises:
        LayerfuseError: the answer is not an option's letter in brackets.
    """
    # Both halves may count from 0.
    question_id = f"{text_in(row, 'type')}/{text_in(row, 'idx')}"
    options = tuple(str(option).strip() for option in options_list(file, row["choices"]))
    answer = text_in(row, "answer")
    # Written as `(B)`.
    written = _ANSWER.fullmatch(answer)
    letter = written[1] if written else answer
    return Item(
        id=question_id,
        pictures=(picture,),
        question=text_in(row, "question"),
        answers=(check_letter(file, question_id, letter, options),),
        group=f"{text_in(row, 'source')}/{text_in(row, 'task')}",
        options=options,
    )


def _source(item: Item) -> str:
    """The source of a question's picture."""
    return item.group.partition("/")[0]


def _task(item: Item) -> str:
    """What a question asks for."""
    return item.group.partition("/")[2]
