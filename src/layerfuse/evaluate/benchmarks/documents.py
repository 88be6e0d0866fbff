"""Questions about documents, infographics and charts: DocVQA, InfographicVQA and ChartQA."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

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
    mean_of_columns,
    share,
)
from layerfuse.evaluate.benchmarks.official_pictures import picture_file
from layerfuse.vision.picture import Picture


class Anls(Benchmark):
    """A benchmark of the Robust Reading Competition: answers score by their edit distance.

    It reports the mean, ANLS, in percent as papers on multimodal LLMs print it.
    """

    headline: ClassVar[str] = "anls"

    def judge(self, item: Item, answer: str) -> Judged:
        """Score one answer; see `Benchmark.judge`."""
        return Judged(answer.strip() or None, metrics.anls(answer, item.answers))

    def columns(self, answered: Sequence[JudgedItem]) -> list[Column]:
        """Give the number that the benchmark reports; see `Benchmark.columns`."""
        return [share(answered, "anls")]


@benchmark
class DocVqa(Anls):
    """DocVQA's validation split (single documents), in the layout of either of its downloads."""

    name = "docvqa"
    title = "DocVQA (val)"
    published_questions = (5349,)
    licence = "not stated; for those who register at rrc.cvc.uab.es"
    expected = (
        "val_v1.0_withQT.json or val_v1.0.json",
        "documents/*.png or spdocvqa_images/*.png",
    )

    def load(self, folder: Path) -> list[Item]:
        """Read the questions; see `Benchmark.load`."""
        names = ("val_v1.0_withQT.json", "val_v1.0.json", "spdocvqa_qas/val_v1.0_withQT.json")
        file = official_files.first_file(folder, names)
        needed = ("questionId", "question", "image", "answers")
        rows = official_files.read_json(file, needed, key="data")
        pictures = folder / "documents"
        # The newer download has the same pictures in another folder than its questions say.
        if (folder / "spdocvqa_images").is_dir():
            pictures = folder / "spdocvqa_images"
        items: list[Item] = []
        for number, row in enumerate(rows, start=1):
            image = Path(official_files.cell_text(file, number, row, "image")).name
            item = _question(file, number, row, picture_file(pictures, image))
            items.append(item)
        return official_files.checked_items(file, items)


@benchmark
class InfoVqa(Anls):
    """InfographicVQA's validation split."""

    name = "infovqa"
    title = "InfographicVQA (val)"
    published_questions = (2801,)
    licence = "not stated; for those who register at rrc.cvc.uab.es"
    expected = ("infographicsVQA_val_v1.0_withQT.json", "infographicsvqa_images/*")

    def load(self, folder: Path) -> list[Item]:
        """Read the questions; see `Benchmark.load`."""
        file = folder / self.expected[0]
        needed = ("questionId", "question", "image_local_name", "answers")
        rows = official_files.read_json(file, needed, key="data")
        items: list[Item] = []
        for number, row in enumerate(rows, start=1):
            image = official_files.cell_text(file, number, row, "image_local_name")
            picture = picture_file(folder / "infographicsvqa_images", image)
            items.append(_question(file, number, row, picture))
        return official_files.checked_items(file, items)


@benchmark
class ChartQa(Benchmark):
    """ChartQA's test split: questions by people, and questions made from summaries of charts.

    Its headline is the mean of the two halves, which have 1,250 questions each. The files are those
    of the folder `ChartQA Dataset` in vis-nlp/ChartQA.
    """

    name = "chartqa"
    title = "ChartQA"
    published_questions = (2500,)
    licence = "GPL-3.0"
    expected = ("test/test_human.json", "test/test_augmented.json", "test/png/*.png")
    headline = "average"

    def load(self, folder: Path) -> list[Item]:
        """Read the questions, grouped into human and augmented; see `Benchmark.load`."""
        items: list[Item] = []
        for group in ("human", "augmented"):
            file = folder / "test" / f"test_{group}.json"
            rows = official_files.read_json(file, ("imgname", "query", "label"))
            for number, row in enumerate(rows, start=1):
                image = official_files.cell_text(file, number, row, "imgname")
                item = Item(
                    # The files have no ids.
                    id=f"{group}-{number}",
                    pictures=(picture_file(folder / "test" / "png", image),),
                    question=official_files.cell_text(file, number, row, "query"),
                    answers=(official_files.cell_text(file, number, row, "label"),),
                    group=group,
                )
                items.append(item)
        return official_files.checked_items(folder / "test", items)

    def judge(self, item: Item, answer: str) -> Judged:
        """Score one answer; see `Benchmark.judge`."""
        return Judged(answer.strip() or None, metrics.relaxed_match(answer, item.answers[0]))

    def columns(self, answered: Sequence[JudgedItem]) -> list[Column]:
        """Give the numbers that the benchmark reports; see `Benchmark.columns`."""
        halves = [share(of_group, name) for name, of_group in by_group(answered).items()]
        # Not of all questions: the official number is the mean of the two.
        return [mean_of_columns("average", halves), *halves]


def _question(file: Path, number: int, row: official_files.Row, picture: Picture) -> Item:
    """A question in a file of the Robust Reading Competition.

    Raises:
        LayerfuseError: a cell holds something else than its text or texts.
    """
    return Item(
        id=official_files.cell_text(file, number, row, "questionId"),
        pictures=(picture,),
        question=official_files.cell_text(file, number, row, "question"),
        answers=official_files.cell_texts(file, number, row, "answers"),
    )
