"""POPE: whether an object is in a picture, asked with absent objects of three kinds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from layerfuse.errors import LayerfuseError, short
from layerfuse.evaluate.answer_parsing import first_sentence_yes_no
from layerfuse.evaluate.benchmarks.choices import text_in
from layerfuse.evaluate.benchmarks.interface import (
    Benchmark,
    Column,
    Item,
    Judged,
    JudgedItem,
    benchmark,
    by_group,
    mean_of_columns,
)
from layerfuse.evaluate.benchmarks.official_files import checked_items, read_json_lines
from layerfuse.evaluate.benchmarks.official_pictures import picture_file
from layerfuse.evaluate.metrics import BinaryCounts, count_yes_no

SPLITS = ("random", "popular", "adversarial")
"""The kinds of absent objects: any, frequent ones, and those that often go with one that is there.
"""
LLAVA_RANDOM_QUESTIONS = 2910
"""Questions of the random split in POPE's commit e3e3926, with which LLaVA-1.5 was scored
(docs/Evaluation.md of haotian-liu/LLaVA)."""
SPLIT_QUESTIONS = 3000
"""Questions of every split in POPE's present release, and of the other two in that commit."""

_LLAVA_SPLITS = ("adversarial", "random", "popular")
"""in the order in which LLaVA's file numbers them"""
_LLAVA_OFFSET = 10_000_000


@benchmark
class Pope(Benchmark):
    """POPE on pictures of COCO, whose score is the mean of its three splits' F1.

    How lines and ids are written: output/coco of AoiDragon/POPE, and `llava_pope_test.jsonl` of
    LLaVA's `eval.zip`.
    """

    name: ClassVar[str] = "pope"
    title: ClassVar[str] = "POPE"
    licence: ClassVar[str] = "MIT (questions), COCO's terms of use (pictures)"
    expected: ClassVar[tuple[str, ...]] = (
        "coco_pope_random.json",
        "coco_pope_popular.json",
        "coco_pope_adversarial.json",
        "val2014/COCO_val2014_*.jpg",
    )
    headline: ClassVar[str] = "F1"

    def load(self, folder: Path) -> list[Item]:
        """Read the questions of all three splits.

        Args:
            folder: with the files of one revision, in it or in `coco`; see `notes`.

        Returns:
            The questions; an id has the split before the official number, which every split begins
            anew.

        Raises:
            LayerfuseError: a file is missing, cut off, of another benchmark or of another revision
                than the others.
        """
        # LLaVA keeps the questions in a folder `coco` beside that of the pictures.
        questions = folder
        if not (folder / _file_name("random")).exists() and (folder / "coco").is_dir():
            questions = folder / "coco"
        items: list[Item] = []
        for split in SPLITS:
            items += _read_split(questions / _file_name(split), folder / "val2014", split)
        # First, as it says more than a missing picture would.
        _check_one_revision(questions, items)
        return checked_items(questions, items)

    def notes(self, items: Sequence[Item]) -> list[str]:
        """Which revision of the questions was found.

        Args:
            items: all questions.

        Returns:
            One sentence, and another for each split that has no published number of questions.
        """
        numbers = {split: 0 for split in SPLITS}
        for item in items:
            numbers[item.group] += 1
        notes: list[str] = []
        random = numbers["random"]
        if random == LLAVA_RANDOM_QUESTIONS:
            notes.append(
                "the random split has 2,910 questions: the revision of POPE's commit e3e3926, with "
                "which the scores of LLaVA-1.5 were published"
            )
        elif random == SPLIT_QUESTIONS:
            notes.append(
                "the random split has 3,000 questions: another revision than that of LLaVA-1.5's "
                "published scores, which has 2,910"
            )
        for split, number in numbers.items():
            # The other two splits had 3,000 questions all along.
            published = [SPLIT_QUESTIONS]
            if split == "random":
                published.append(LLAVA_RANDOM_QUESTIONS)
            if number not in published:
                notes.append(f"no published revision has {number:,} questions in the {split} split")
        return notes

    def id_in(self, line: Mapping[str, Any], items: Sequence[Item]) -> str:
        """Say which question a line of a file of answers is about, also one of LLaVA's files.

        Args:
            line: of JSON lines; LLaVA adds 10 million to the `question_id` of the random split,
                and 20 million to that of the popular one.
            items: all questions.

        Returns:
            The question's id, or what stands in its place.

        Raises:
            LayerfuseError: the line names no question.
        """
        named = super().id_in(line, items)
        if "id" in line or not named.isdecimal():
            return named
        place, number = divmod(int(named), _LLAVA_OFFSET)
        if place >= len(_LLAVA_SPLITS):
            return named
        return f"{_LLAVA_SPLITS[place]}/{number}"

    def judge(self, item: Item, answer: str) -> Judged:
        """Score one answer.

        Args:
            item: the question.
            answer: is yes unless its first sentence has a word of no.
        """
        # There is no third answer: what says neither is yes.
        word = first_sentence_yes_no(answer)
        return Judged(word, float(word == item.answers[0]))

    def columns(self, answered: Sequence[JudgedItem]) -> list[Column]:
        """Give the numbers of all splits, in percent.

        Args:
            answered: every question once.

        Returns:
            The means of the splits' F1 and accuracy, and each split's F1, accuracy, precision,
            recall and share of yes.

        Raises:
            LayerfuseError: nothing of a split was answered.
        """
        splits = by_group(answered)
        of_splits: list[Column] = []
        f1_values: list[float] = []
        accuracies: list[Column] = []
        for split in SPLITS:
            if split not in splits:
                raise LayerfuseError(
                    f"POPE's score needs answers of all splits; there are none of {split}"
                )
            # The mean is over splits, which may have different numbers of questions.
            counts = _count(splits[split])
            f1_values.append(counts.f1)
            of_split = _split_columns(split, counts, splits[split])
            accuracies += [column for column in of_split if column.name == f"{split} accuracy"]
            of_splits += of_split
        questions = len(answered)
        mean_f1 = 100 * sum(f1_values) / len(SPLITS)
        return [
            Column("F1", mean_f1, 100.0, questions),
            mean_of_columns("accuracy", accuracies),
            *of_splits,
        ]


def _file_name(split: str) -> str:
    """The file of a split."""
    return f"coco_pope_{split}.json"


def _read_split(file: Path, pictures: Path, split: str) -> list[Item]:
    """The questions of one split.

    Raises:
        LayerfuseError: the file is missing, cut off, or of another benchmark.
    """
    items: list[Item] = []
    for row in read_json_lines(file, ["question_id", "image", "text", "label"]):
        label = text_in(row, "label")
        if label not in ("yes", "no"):
            raise LayerfuseError(
                f"{file} has the label {short(label)} of question {row['question_id']}; yes or no "
                "is expected"
            )
        item = Item(
            # All splits count from the same number.
            id=f"{split}/{text_in(row, 'question_id')}",
            pictures=(picture_file(pictures, text_in(row, "image")),),
            question=text_in(row, "text"),
            answers=(label,),
            group=split,
        )
        items.append(item)
    return items


def _check_one_revision(folder: Path, items: Sequence[Item]) -> None:
    """Refuse splits of different revisions, and one that was cut off between two lines.

    POPE asks about the same present objects of the same pictures in every split. The revision of
    commit e3e3926 has `imange` for `image` in questions with `an`, which tells it from others too.

    Raises:
        LayerfuseError: the splits ask about different ones.
    """
    present: dict[str, set[tuple[str, str]]] = {split: set() for split in SPLITS}
    for item in items:
        # The absent objects are what splits differ in.
        if item.answers[0] == "yes":
            present[item.group].add((item.pictures[0].name, item.question))
    first = SPLITS[0]
    for split in SPLITS[1:]:
        differing = present[first] ^ present[split]
        if differing:
            # The smallest, so that the same files give the same error.
            picture, question = min(differing)
            raise LayerfuseError(
                f"{folder} has splits of different revisions of POPE, or one is cut off: "
                f"{_file_name(first)} and {_file_name(split)} differ in {len(differing)} questions "
                f"about objects that are in a picture, such as {short(question)} about "
                f"{Path(picture).name}. Download all three from one commit"
            )


def _count(answered: Sequence[JudgedItem]) -> BinaryCounts:
    """How often yes and no were said, and were right."""
    said = [each.judged.parsed or "other" for each in answered]
    right = [each.item.answers[0] for each in answered]
    return count_yes_no(said, right)


def _split_columns(
    split: str, counts: BinaryCounts, answered: Sequence[JudgedItem]
) -> list[Column]:
    """The numbers of one split, in percent."""
    values = {
        "F1": counts.f1,
        "accuracy": counts.accuracy,
        "precision": counts.precision,
        "recall": counts.recall,
        "yes ratio": counts.yes_ratio,
    }
    columns: list[Column] = []
    for name, value in values.items():
        # The others are no means over all answers.
        mean_of = answered if name == "accuracy" else ()
        columns.append(Column(f"{split} {name}", 100 * value, 100.0, counts.answers, mean_of))
    return columns
