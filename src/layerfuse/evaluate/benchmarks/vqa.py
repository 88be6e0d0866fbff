"""Open questions about photographs: VQAv2, OK-VQA, VizWiz, TextVQA and GQA.

The first four have the answers of ten people, and an answer scores by how many of them gave it; GQA
has one answer.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

from layerfuse.errors import LayerfuseError, short
from layerfuse.evaluate import metrics
from layerfuse.evaluate.benchmarks import official_files
from layerfuse.evaluate.benchmarks.interface import (
    Benchmark,
    Column,
    Item,
    Judged,
    JudgedItem,
    benchmark,
    by_group,
    share,
)
from layerfuse.evaluate.benchmarks.official_files import Row
from layerfuse.evaluate.benchmarks.official_pictures import picture_file
from layerfuse.vision.picture import Picture

_OCR_LINE = "Reference OCR token:"
"""how the line begins with which LLaVA tells a model the words that a reader of text found"""
_OCR_FILE = "llava_textvqa_val_v051_ocr.jsonl"
"""LLaVA's, of the words that were read in TextVQA's pictures"""

_OKVQA_TYPES = {
    "one": "Vehicles and Transportation",
    "two": "Brands, Companies and Products",
    "three": "Objects, Material and Clothing",
    "four": "Sports and Recreation",
    "five": "Cooking and Food",
    "six": "Geography, History, Language and Culture",
    "seven": "People and Everyday life",
    "eight": "Plants and Animals",
    "nine": "Science and Technology",
    "ten": "Weather and Climate",
    "other": "Other",
}


class SoftAccuracy(Benchmark):
    """A benchmark whose answers score by how many of ten people gave them.

    It reports the mean of all questions, and that of each group where there are several.
    """

    headline: ClassVar[str] = "accuracy"

    def notes(self, items: Sequence[Item]) -> list[str]:
        """Count the questions that fewer than ten people answered; see `Benchmark.notes`."""
        fewer = [item for item in items if len(item.answers) < metrics.ANNOTATORS]
        if not fewer:
            return []
        return [
            f"{len(fewer):,} of {len(items):,} questions have the answers of fewer "
            f"than {metrics.ANNOTATORS} people. An answer is wholly right only if "
            f"{metrics.AGREEING} others than the one left out gave it, so that these score less, "
            "and those of one person 0"
        ]

    def judge(self, item: Item, answer: str) -> Judged:
        """Score one answer; see `Benchmark.judge`."""
        said = answer.strip()
        return Judged(said or None, metrics.evalai_soft_accuracy(said, item.answers))

    def columns(self, answered: Sequence[JudgedItem]) -> list[Column]:
        """Give the numbers that the benchmark reports; see `Benchmark.columns`."""
        columns = [share(answered)]
        groups = by_group(answered)
        # The only group would be the accuracy again.
        if len(groups) > 1:
            for name, of_group in groups.items():
                columns.append(share(of_group, name))
        return columns


@benchmark
class VqaV2(SoftAccuracy):
    """VQAv2's validation split, whose answers are public, unlike those of its test splits."""

    name = "vqav2"
    title = "VQAv2 (val)"
    published_questions = (214_354,)
    licence = "CC BY 4.0; pictures of COCO under the terms of Flickr"
    expected = (
        "v2_OpenEnded_mscoco_val2014_questions.json",
        "v2_mscoco_val2014_annotations.json",
        "val2014/COCO_val2014_*.jpg",
    )

    def load(self, folder: Path) -> list[Item]:
        """Read the questions, grouped by the type of their answers; see `Benchmark.load`."""
        # The annotations call their groups as papers do.
        names = {name: name for name in ("yes/no", "number", "other")}
        files = _AnnotatedFiles(folder / self.expected[0], folder / self.expected[1])
        return files.items(folder, "answer_type", names)

    def judge(self, item: Item, answer: str) -> Judged:
        """Score one answer, written as LLaVA's `convert_vqav2_for_submission.py` writes it for the
        test server; see `Benchmark.judge`."""
        said = answer.strip()
        sent = metrics.evalai_normalize(said)
        return Judged(said or None, metrics.vqa_soft_accuracy(sent, item.answers))


@benchmark
class OkVqa(SoftAccuracy):
    """OK-VQA's validation split, which papers call its test split."""

    name = "okvqa"
    title = "OK-VQA"
    published_questions = (5046,)
    licence = "not stated; pictures of COCO under the terms of Flickr"
    expected = (
        "OpenEnded_mscoco_val2014_questions.json",
        "mscoco_val2014_annotations.json",
        "val2014/COCO_val2014_*.jpg",
    )

    def load(self, folder: Path) -> list[Item]:
        """Read the questions, grouped by the kind of knowledge; see `Benchmark.load`."""
        files = _AnnotatedFiles(folder / self.expected[0], folder / self.expected[1])
        return files.items(folder, "question_type", _OKVQA_TYPES)


@benchmark
class VizWiz(SoftAccuracy):
    """VizWiz-VQA's validation split: photographs and questions of blind people.

    That a question cannot be answered is an answer like others, the word `unanswerable`.
    """

    name = "vizwiz"
    title = "VizWiz-VQA (val)"
    published_questions = (4319,)
    licence = "CC BY 4.0"
    expected = ("val.json", "val/VizWiz_val_*.jpg")

    def load(self, folder: Path) -> list[Item]:
        """Read the questions, grouped by the type of their answers; see `Benchmark.load`."""
        file = folder / self.expected[0]
        rows = official_files.read_json(file, ("image", "question", "answers", "answer_type"))
        items: list[Item] = []
        for number, row in enumerate(rows, start=1):
            image = official_files.cell_text(file, number, row, "image")
            item = Item(
                # There is one question about each picture, and no id besides its name.
                id=Path(image).stem,
                pictures=(picture_file(folder / "val", image),),
                question=official_files.cell_text(file, number, row, "question"),
                answers=_answers(file, number, row),
                group=official_files.cell_text(file, number, row, "answer_type"),
            )
            items.append(item)
        return official_files.checked_items(file, items)

    def judge(self, item: Item, answer: str) -> Judged:
        """Score one answer, written as LLaVA's `convert_vizwiz_for_submission.py` writes it for the
        test server; see `Benchmark.judge`."""
        said = answer.strip()
        sent = metrics.evalai_normalize(said)
        return Judged(said or None, metrics.vizwiz_soft_accuracy(sent, item.answers))


@benchmark
class TextVqa(SoftAccuracy):
    """TextVQA's validation split: questions that need reading.

    LLaVA's question file is optional. Where it is there, the words that a reader of text found in
    the picture, which it has in a line `Reference OCR token: ...`, are the context of the question:
    LLaVA's published results are with them, those of most other models without.
    """

    name = "textvqa"
    title = "TextVQA (val)"
    published_questions = (5000,)
    licence = "CC BY 4.0; pictures of Open Images CC BY 2.0"
    expected = (
        "TextVQA_0.5.1_val.json",
        "train_images/*.jpg",
        f"{_OCR_FILE} (optional)",
    )

    def notes(self, items: Sequence[Item]) -> list[str]:
        """Say that the words read in the pictures are missing; see `Benchmark.notes`."""
        notes = super().notes(items)
        if not any(item.context for item in items):
            notes.append(
                f"no question has words that were read in its picture, as there is no {_OCR_FILE}: "
                "layerfuse asks without them, whatever the prompt says, and LLaVA's published "
                "scores are with them"
            )
        return notes

    def load(self, folder: Path) -> list[Item]:
        """Read the questions; see `Benchmark.load`."""
        file = folder / self.expected[0]
        needed = ("question_id", "image_id", "question", "answers")
        rows = official_files.read_json(file, needed, key="data")
        ocr_file = folder / _OCR_FILE
        words = _words_in_pictures(ocr_file) if ocr_file.is_file() else None
        items: list[Item] = []
        for number, row in enumerate(rows, start=1):
            image = official_files.cell_text(file, number, row, "image_id")
            question = official_files.cell_text(file, number, row, "question")
            context = ""
            # LLaVA's file has no ids of questions, and writes some in other cases.
            if words is not None:
                key = (image, question.lower())
                if key not in words:
                    raise LayerfuseError(
                        f"{ocr_file} has no line for the question {short(question)} about the "
                        f"picture {image} of {file}; are the two of the same version?"
                    )
                context = words[key]
            item = Item(
                id=official_files.cell_text(file, number, row, "question_id"),
                pictures=(picture_file(folder / "train_images", f"{image}.jpg"),),
                question=question,
                answers=_ten_answers(file, number, row),
                context=context,
            )
            items.append(item)
        return official_files.checked_items(file, items)

    def id_in(self, line: Mapping[str, Any], items: Sequence[Item]) -> str:
        """Say which question a line of a file of answers is about, also one of LLaVA's files.

        Args:
            line: of JSON lines; one of LLaVA has the picture's id as `question_id`, and the
                `prompt` with the question, as `eval_textvqa.py` of haotian-liu/LLaVA reads it.
            items: all questions.

        Returns:
            The question's id, or what stands in its place.

        Raises:
            LayerfuseError: the line names no question.
        """
        named = super().id_in(line, items)
        if "id" in line or "prompt" not in line:
            return named
        # Other tools have the question's id there, and a prompt beside it.
        if any(item.id == named for item in items):
            return named
        question, _ = _question_and_words(str(line["prompt"]))
        for item in items:
            # The question first: it is quicker to compare than the name of the picture is to read.
            if item.question.lower() == question and Path(item.pictures[0].name).stem == named:
                return item.id
        raise LayerfuseError(
            f"TextVQA does not ask {short(question)} about a picture {short(named)}"
        )


@benchmark
class Gqa(Benchmark):
    """GQA's balanced test-dev split.

    Of its official numbers those are reported that need nothing but the answers to these
    questions: accuracy, and that of open questions and of those with two answers to choose from.
    """

    name = "gqa"
    title = "GQA (test-dev balanced)"
    published_questions = (12_578,)
    licence = "not stated; pictures of Visual Genome CC BY 4.0"
    expected = ("testdev_balanced_questions.json", "images/*.jpg")
    headline = "accuracy"

    def load(self, folder: Path) -> list[Item]:
        """Read the questions, grouped into binary and open; see `Benchmark.load`."""
        file = folder / self.expected[0]
        needed = ("question", "imageId", "answer", "types")
        rows = official_files.read_json(file, needed, id_column="questionId")
        items: list[Item] = []
        for number, row in enumerate(rows, start=1):
            image = official_files.cell_text(file, number, row, "imageId")
            item = Item(
                id=official_files.cell_text(file, number, row, "questionId"),
                pictures=(picture_file(folder / "images", f"{image}.jpg"),),
                question=official_files.cell_text(file, number, row, "question"),
                answers=(official_files.cell_text(file, number, row, "answer"),),
                group=_gqa_group(file, number, row),
            )
            items.append(item)
        return official_files.checked_items(file, items)

    def judge(self, item: Item, answer: str) -> Judged:
        """Score one answer; see `Benchmark.judge`."""
        # LLaVA strips what its model says when it writes it down.
        said = answer.strip()
        return Judged(said or None, metrics.gqa_match(said, item.answers[0]))

    def columns(self, answered: Sequence[JudgedItem]) -> list[Column]:
        """Give the numbers that the benchmark reports; see `Benchmark.columns`."""
        columns = [share(answered)]
        for name, of_group in by_group(answered).items():
            columns.append(share(of_group, name))
        return columns


class _AnnotatedFiles:
    """A file of questions and one of their answers, as visualqa.org publishes them."""

    def __init__(self, questions: Path, annotations: Path) -> None:
        """Take the files.

        Args:
            questions: with a list `questions`.
            annotations: with a list `annotations`, by the same ids.
        """
        self.questions = questions
        self.annotations = annotations

    def items(self, folder: Path, grouped_by: str, groups: Mapping[str, str]) -> list[Item]:
        """Read them.

        Args:
            folder: has COCO's `val2014`.
            grouped_by: the column of the annotations that has the group.
            groups: names of the groups by what stands there.

        Returns:
            All questions.

        Raises:
            LayerfuseError: a file is missing, cut off, or not of this benchmark or split.
        """
        needed = ("question_id", "image_id", "question")
        rows = official_files.read_json(self.questions, needed, key="questions")
        annotations = self._annotations_by_id(grouped_by)
        items: list[Item] = []
        for number, row in enumerate(rows, start=1):
            id = official_files.cell_text(self.questions, number, row, "question_id")
            if id not in annotations:
                raise LayerfuseError(
                    f"{self.annotations} has no answers to the question {id} of {self.questions}; "
                    "are the two of the same split?"
                )
            place, annotation = annotations[id]
            group = official_files.cell_text(self.annotations, place, annotation, grouped_by)
            if group not in groups:
                raise LayerfuseError(
                    f"{self.annotations} has {group!r} as {grouped_by!r} in row {place}; valid: "
                    f"{', '.join(groups)}. Is it the file of another benchmark?"
                )
            item = Item(
                id=id,
                pictures=(_coco_picture(self.questions, folder, number, row),),
                question=official_files.cell_text(self.questions, number, row, "question"),
                answers=_answers(self.annotations, place, annotation),
                group=groups[group],
            )
            items.append(item)
        return official_files.checked_items(self.questions, items)

    def _annotations_by_id(self, grouped_by: str) -> dict[str, tuple[int, Row]]:
        """The number of the row and the row of each question's answers.

        Raises:
            LayerfuseError: the file is missing, cut off, or of another shape.
        """
        file = self.annotations
        needed = ("question_id", "answers", grouped_by)
        rows = official_files.read_json(file, needed, key="annotations")
        annotations: dict[str, tuple[int, Row]] = {}
        for number, row in enumerate(rows, start=1):
            question = official_files.cell_text(file, number, row, "question_id")
            if question in annotations:
                raise LayerfuseError(
                    f"{file} annotates question {question} in rows {annotations[question][0]} and "
                    f"{number}: download the file again"
                )
            annotations[question] = (number, row)
        return annotations


def _coco_picture(file: Path, folder: Path, number: int, row: Row) -> Picture:
    """The picture of COCO's validation split of 2014 that a question is about.

    Raises:
        LayerfuseError: its id is no whole number.
    """
    image = official_files.cell_text(file, number, row, "image_id")
    # COCO's files are called by it, with zeros before it.
    if not image.isdecimal():
        raise LayerfuseError(
            f"{file} has {image!r} as 'image_id' in row {number}; the whole number of a picture of "
            "COCO is expected"
        )
    return picture_file(folder / "val2014", f"COCO_val2014_{image.zfill(12)}.jpg")


def _answers(file: Path, number: int, row: Row) -> tuple[str, ...]:
    """The answers of all people, from a list of mappings.

    Raises:
        LayerfuseError: they are of another shape.
    """
    cell = row["answers"]
    if not isinstance(cell, list) or not cell:
        raise LayerfuseError(
            f"{file} has no list of answers in row {number}, but {short(cell)}; the answers of all "
            "people are expected"
        )
    answers: list[str] = []
    for given in cast("list[Any]", cell):
        if not isinstance(given, dict) or "answer" not in given:
            raise LayerfuseError(
                f"{file} has {short(given)} among the answers in row {number}; a mapping with "
                "'answer' is expected"
            )
        answers.append(official_files.cell_text(file, number, cast("Row", given), "answer"))
    return tuple(answers)


def _ten_answers(file: Path, number: int, row: Row) -> tuple[str, ...]:
    """The answers of ten people, from a list of texts.

    Raises:
        LayerfuseError: there is another number of them.
    """
    answers = official_files.cell_texts(file, number, row, "answers")
    if len(answers) != metrics.ANNOTATORS:
        raise LayerfuseError(
            f"{file} has {len(answers)} answers in row {number}; those of "
            f"{metrics.ANNOTATORS} people are expected"
        )
    return answers


def _words_in_pictures(file: Path) -> dict[tuple[str, str], str]:
    """LLaVA's words in the pictures, by the picture and the question in lower case.

    Raises:
        LayerfuseError: the file is cut off, or a record has no such line.
    """
    words: dict[tuple[str, str], str] = {}
    for number, row in enumerate(
        official_files.read_json_lines(file, ("question_id", "text")), start=1
    ):
        text = official_files.cell_text(file, number, row, "text")
        question, of_picture = _question_and_words(text)
        if not question or of_picture is None:
            raise LayerfuseError(
                f"{file} has {short(row['text'])} as 'text' in row {number}; a question and a line "
                f"with {_OCR_LINE!r} are expected"
            )
        # What LLaVA calls the question's id is the picture's.
        image = official_files.cell_text(file, number, row, "question_id")
        words[image, question] = of_picture
    return words


def _question_and_words(prompt: str) -> tuple[str, str | None]:
    """The question in lower case and the words in the picture that a prompt of LLaVA holds.

    Args:
        prompt: a line with the question, one with the words before or behind it, or none, and one
            on how to answer.

    Returns:
        An empty question where there is none; None for words where there is no line of them, or
        more than one.
    """
    lines = prompt.split("\n")
    ocr_lines = [line for line in lines if line.startswith(_OCR_LINE)]
    others = [line for line in lines if not line.startswith(_OCR_LINE)]
    question = others[0].lower() if others else ""
    if len(ocr_lines) != 1:
        return question, None
    return question, ocr_lines[0].removeprefix(_OCR_LINE).strip()


def _gqa_group(file: Path, number: int, row: Row) -> str:
    """Whether a question of GQA is binary or open, by the rule of its official evaluation.

    Raises:
        LayerfuseError: the row does not say the question's structure.
    """
    types = row["types"]
    if not isinstance(types, dict) or "structural" not in types:
        raise LayerfuseError(
            f"{file} has {short(types)} as 'types' in row {number}; a mapping with 'structural' is "
            "expected"
        )
    if cast("Row", types)["structural"] == "query":
        return "open"
    return "binary"
