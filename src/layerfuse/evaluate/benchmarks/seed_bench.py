"""SEED-Bench: questions with four options, about pictures and about videos."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

from layerfuse.evaluate.benchmarks.choices import (
    OptionsBenchmark,
    check_letter,
    shares_by_group,
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
from layerfuse.evaluate.benchmarks.official_files import (
    Row,
    checked_items,
    read_json,
    read_json_value,
)
from layerfuse.evaluate.benchmarks.official_pictures import picture_file

FILE = "SEED-Bench.json"
FRAMES = "SEED-Bench-video-image"
IMAGE = "image"
"""what the file calls a question about a picture"""
_CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")
_NEEDED = ("question_id", "question", *_CHOICES, "answer", "data_type", "question_type_id")


@benchmark
class SeedBenchImage(OptionsBenchmark):
    """The image part of SEED-Bench, which papers call SEED-I or SEED^I.

    It is what has the `data_type` image: DATASET.md of AILab-CVC/SEED-Bench, and
    scripts/convert_seed_for_submission.py of haotian-liu/LLaVA.
    """

    name: ClassVar[str] = "seedbench_image"
    title: ClassVar[str] = "SEED-Bench (image)"
    licence: ClassVar[str] = "CC BY-NC 4.0"
    expected: ClassVar[tuple[str, ...]] = (FILE, "SEED-Bench-image/*")
    headline: ClassVar[str] = "accuracy"
    published_questions: ClassVar[tuple[int, ...]] = (14233,)

    def load(self, folder: Path) -> list[Item]:
        """Read the questions about pictures; those about videos are left out.

        Args:
            folder: with the files.

        Returns:
            The questions; `group` is the type of question in words, and `left_out` has the ids of
            those about videos, which files of answers to all of SEED-Bench hold too.

        Raises:
            LayerfuseError: a file is missing, cut off, or of another benchmark.
        """
        file = folder / FILE
        about_pictures: list[Item] = []
        about_videos: set[str] = set()
        for kind, item in _questions(folder):
            # What happens in a video needs more than one picture.
            if kind == IMAGE:
                about_pictures.append(item)
            else:
                about_videos.add(item.id)
        left_out = frozenset(about_videos)
        return checked_items(file, [replace(item, left_out=left_out) for item in about_pictures])

    def notes(self, items: Sequence[Item]) -> list[str]:
        """Say how many questions are left out; see `Benchmark.notes`."""
        left_out = items[0].left_out
        if not left_out:
            return []
        return [
            f"{len(left_out):,} questions about videos are left out, and so are the "
            "answers to them in files of answers"
        ]

    def columns(self, answered: Sequence[JudgedItem]) -> list[Column]:
        """Give the accuracy over all questions and over each type's.

        Args:
            answered: every question once.
        """
        return [share(answered), *shares_by_group(answered)]


@benchmark
class SeedBench(OptionsBenchmark):
    """All of SEED-Bench, as LLaVA-1.5 reports it: a video is shown by the frame in its middle.

    The frames are those of LLaVA's extract_video_frames.py, which names them by the type and the
    id of the question. Files of answers are scored without any picture.
    """

    name: ClassVar[str] = "seedbench"
    title: ClassVar[str] = "SEED-Bench"
    licence: ClassVar[str] = "CC BY-NC 4.0"
    expected: ClassVar[tuple[str, ...]] = (
        FILE,
        "SEED-Bench-image/*",
        f"{FRAMES}/TYPE_QUESTION.png",
    )
    headline: ClassVar[str] = "accuracy"
    published_questions: ClassVar[tuple[int, ...]] = (19242,)

    def load(self, folder: Path) -> list[Item]:
        """Read all questions.

        Args:
            folder: with the files.

        Returns:
            The questions; `group` is `image` or `video`, and behind a stroke the type of question
            in words.

        Raises:
            LayerfuseError: a file is missing, cut off, or of another benchmark.
        """
        items: list[Item] = []
        for kind, item in _questions(folder):
            items.append(replace(item, group=f"{kind}/{item.group}"))
        return checked_items(folder / FILE, items)

    def columns(self, answered: Sequence[JudgedItem]) -> list[Column]:
        """Give the accuracy over all questions, over those of each kind and of each type.

        Args:
            answered: every question once.
        """
        columns = [share(answered)]
        # Of each kind first, then of each type.
        for part in (0, 2):
            groups = by_group(answered, key=lambda item: item.group.partition("/")[part])
            for name in sorted(groups):
                columns.append(share(groups[name], name))
        return columns


def _questions(folder: Path) -> Iterator[tuple[str, Item]]:
    """All questions of the file, each with its kind, `image` or `video`."""
    file = folder / FILE
    rows = read_json(file, _NEEDED, key="questions")
    types = _question_types(file)
    for row in rows:
        yield text_in(row, "data_type"), _item(folder, file, row, types)


def _question_types(file: Path) -> dict[str, str]:
    """The types of question in words, by their numbers; empty where the file has no list."""
    content = cast("dict[str, Any]", read_json_value(file))
    # They only name the columns, which else are numbered.
    types = content.get("question_type")
    if not isinstance(types, dict):
        return {}
    # The file has the numbers by the names.
    return {str(number): name for name, number in cast("dict[str, Any]", types).items()}


def _item(folder: Path, file: Path, row: Row, types: dict[str, str]) -> Item:
    """A question about a picture, or about a video by the frame in its middle.

    Raises:
        LayerfuseError: the answer is not A, B, C or D.
    """
    question_id = text_in(row, "question_id")
    number = text_in(row, "question_type_id")
    options = tuple(text_in(row, choice) for choice in _CHOICES)
    # The files have no suffix.
    picture = picture_file(folder / "SEED-Bench-image", text_in(row, "data_id"))
    if text_in(row, "data_type") != IMAGE:
        picture = picture_file(folder / FRAMES, f"{number}_{question_id}.png")
    return Item(
        id=question_id,
        pictures=(picture,),
        question=text_in(row, "question"),
        answers=(check_letter(file, question_id, text_in(row, "answer"), options),),
        group=types.get(number, f"type {number}"),
        options=options,
    )
