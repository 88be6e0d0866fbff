"""Benchmarks of layerfuse's own samples: generated scenes, and real pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from layerfuse.data.sample import Sample
from layerfuse.data.sources import load
from layerfuse.errors import LayerfuseError
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
from layerfuse.evaluate.benchmarks.official_files import checked_items
from layerfuse.evaluate.metrics import exact_match, normalize
from layerfuse.evaluate.questions import Question, questions
from layerfuse.model.chat_template import IMAGE_TOKEN, written
from layerfuse.recipe.data_source import Data, Scenes


class _Samples(Benchmark):
    """Short answers that must be equal after `normalize`, reported by group and as their mean."""

    headline = "mean"

    def judge(self, item: Item, answer: str) -> Judged:
        """Score one answer.

        Args:
            item: the question.
            answer: what the model said.

        Returns:
            The normalised answer, and whether it is the right one.
        """
        return Judged(normalize(answer) or None, exact_match(answer, item.answers[0]))

    def columns(self, answered: Sequence[JudgedItem]) -> list[Column]:
        """Give the accuracy of each group, and the mean in which each group counts the same.

        Args:
            answered: every question once.

        Returns:
            The mean first.
        """
        groups: list[Column] = []
        for name, of_group in by_group(answered).items():
            groups.append(share(of_group, name))
        return [mean_of_columns("mean", groups), *groups]


@benchmark
class GeneratedScenes(_Samples):
    """The quickstart's test: 200 scenes, five families of questions in short words."""

    name = "scenes"
    title = "scenes"
    licence = "generated; no restriction"
    expected: ClassVar[tuple[str, ...]] = ()
    needs_files = False
    families = ("colour", "shape", "count", "position", "texture")
    count = 200

    def load(self, folder: Path) -> list[Item]:
        """Draw the pictures, or take those that were drawn before.

        Args:
            folder: is not read.

        Returns:
            A question a family about each picture.
        """
        scenes = Scenes(
            count=self.count,
            seed=1,
            split="test",
            families=list(self.families),
            questions=len(self.families),
            wording="short",
        )
        return [_item(asked, asked.family) for asked in questions(load(Data(scenes=scenes)))]


@benchmark
class RealPictures(_Samples):
    """Real pictures with questions in eight categories, as a LLaVA JSON file that names them."""

    name = "realmix"
    title = "real pictures"
    licence = "of its sources: MIT, Apache-2.0, CC-BY-4.0, BSD-3-Clause"
    expected = ("test.json", "images/")

    def load(self, folder: Path) -> list[Item]:
        """Read the test pictures.

        Args:
            folder: with `test.json`, whose answers are named by `categories`.

        Returns:
            The questions; groups are their categories.

        Raises:
            LayerfuseError: the file is missing, is of other data, or a sample cannot be read.
        """
        file = folder / "test.json"
        if not file.is_file():
            raise LayerfuseError(f"{self.title}: no {file}; expected: {', '.join(self.expected)}")
        samples = load(Data(path=str(file)))
        items = [_item(asked, asked.category) for asked in questions(samples)]
        if {item.group for item in items} == {"all"}:
            raise LayerfuseError(
                f"{file} names no categories of its answers: it is no test of this benchmark"
            )
        return checked_items(file, items)


def _item(asked: Question, group: str) -> Item:
    """A question of a sample as one of a benchmark."""
    sample: Sample = asked.sample
    words = written(asked.messages[-1]["content"].replace(IMAGE_TOKEN, "")).strip()
    return Item(
        id=asked.id,
        pictures=sample.pictures,
        question=words,
        answers=(asked.answer,),
        group=group,
        family=asked.family,
    )
