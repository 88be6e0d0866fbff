"""OCRBench: a thousand questions on reading text, from other datasets."""

from collections.abc import Sequence
from pathlib import Path

from layerfuse.errors import LayerfuseError
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
)
from layerfuse.evaluate.benchmarks.official_pictures import picture_file

_RECOGNITION = (
    "Regular Text Recognition",
    "Irregular Text Recognition",
    "Artistic Text Recognition",
    "Handwriting Recognition",
    "Digit String Recognition",
    "Non-Semantic Text Recognition",
)
"""the types whose sum is reported as text recognition"""

_FORMULAS = "Handwritten Mathematical Expression Recognition"
"""the type whose answers are LaTeX, all from HME100k: their spaces mean nothing, their case does"""

_PUBLISHED = {
    "Text Recognition": 300,
    "Scene Text-centric VQA": 200,
    "Doc-oriented VQA": 200,
    "Key Information Extraction": 200,
    _FORMULAS: 100,
}
"""how many questions the published file has of each type, or of each sum that is reported"""

TYPES = (
    *_RECOGNITION,
    "Scene Text-centric VQA",
    "Doc-oriented VQA",
    "Key Information Extraction",
    _FORMULAS,
)


@benchmark
class OcrBench(Benchmark):
    """OCRBench: how many questions are right, of 1,000.

    Types and sums are those of OCRBench/example.py in Yuliang-Liu/MultimodalOCR.
    """

    name = "ocrbench"
    title = "OCRBench"
    licence = "not stated; the datasets it draws on have their own"
    expected = ("OCRBench.json", "OCRBench_Images/")
    headline = "score"
    counts_answers = True

    def load(self, folder: Path) -> list[Item]:
        """Read the questions, grouped by their type; see `Benchmark.load`."""
        file = folder / self.expected[0]
        needed = ("dataset_name", "type", "question", "answers", "image_path")
        rows = official_files.read_json(file, needed)
        items: list[Item] = []
        for number, row in enumerate(rows, start=1):
            kind = official_files.cell_text(file, number, row, "type")
            if kind not in TYPES:
                raise LayerfuseError(
                    f"{file} has {kind!r} as 'type' in row {number}; valid: {', '.join(TYPES)}"
                )
            dataset = official_files.cell_text(file, number, row, "dataset_name")
            image = official_files.cell_text(file, number, row, "image_path")
            item = Item(
                # The ids in the file are those of the datasets it draws on, which repeat.
                id=f"{number}-{dataset}",
                pictures=(picture_file(folder / "OCRBench_Images", image),),
                question=official_files.cell_text(file, number, row, "question"),
                answers=_answers(file, number, row),
                group=kind,
            )
            items.append(item)
        return official_files.checked_items(file, items)

    def notes(self, items: Sequence[Item]) -> list[str]:
        """Say where these are not the published questions; see `Benchmark.notes`."""
        found = dict.fromkeys(_PUBLISHED, 0)
        for item in items:
            reported = "Text Recognition" if item.group in _RECOGNITION else item.group
            found[reported] += 1
        if found == _PUBLISHED:
            return []
        expected = ", ".join(f"{count} {name}" for name, count in _PUBLISHED.items())
        there = ", ".join(str(count) for count in found.values())
        return [
            f"{len(items):,} questions were found ({there} of these types), and the "
            f"published file has {sum(_PUBLISHED.values()):,}: {expected}. The score is of other "
            "questions than in papers, and so is an average with it"
        ]

    def judge(self, item: Item, answer: str) -> Judged:
        """Score one answer: it is right if it contains a right one; see `Benchmark.judge`."""
        said = answer.strip()
        score = metrics.ocrbench_contains(said, item.answers, item.group == _FORMULAS)
        return Judged(said or None, score)

    def columns(self, answered: Sequence[JudgedItem]) -> list[Column]:
        """Give the numbers that the benchmark reports; see `Benchmark.columns`."""
        groups = by_group(answered)
        # Papers print this sum beside the other four types.
        recognition: list[JudgedItem] = []
        for kind in _RECOGNITION:
            recognition += groups.get(kind, [])
        columns = [_right(answered, "score")]
        if recognition:
            columns.append(_right(recognition, "Text Recognition"))
        for kind in TYPES:
            # A part of the questions may have no question of a type.
            if kind in groups:
                columns.append(_right(groups[kind], kind))
        return columns


def _right(answered: Sequence[JudgedItem], name: str) -> Column:
    """How many answers are right, of all, as the benchmark counts."""
    right = sum(each.judged.score for each in answered)
    return Column(name, right, float(len(answered)), len(answered), answered)


def _answers(file: Path, number: int, row: official_files.Row) -> tuple[str, ...]:
    """The right answers: the file has a text where there is one, and a list where there are more.

    Raises:
        LayerfuseError: there is neither.
    """
    if isinstance(row["answers"], list):
        return official_files.cell_texts(file, number, row, "answers")
    return (official_files.cell_text(file, number, row, "answers"),)
