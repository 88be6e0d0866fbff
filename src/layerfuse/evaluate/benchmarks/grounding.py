"""Which part of a picture words mean: RefCOCO, RefCOCO+ and RefCOCOg, and captions of RefCOCOg.

Their official files are pickles with segmentations for code of 2016, so everybody evaluates a
conversion. Read here is a plain one, JSON lines, with one referring sentence each:

    {"image": "train2014/COCO_train2014_000000000009.jpg", "sentence": "the red cup",
     "bbox": [10.0, 20.0, 30.0, 40.0], "width": 640, "height": 480, "split": "val"}

`image` is relative to the benchmark's folder. `bbox` is left, top, width and height in pixels, as
in COCO's own files. `width` and `height` are those of the picture. `split` is one that papers
report. `id` is optional, such as the `sent_id` of the official files; else a question's id is its
split and line.

CIDEr of captions is that of the library pycocoevalcap, which everybody's published numbers are
from, and which is imported when it is needed. Its class `Cider` needs no Java, but the official
tokenizer, Stanford's PTB, does: captions are therefore split by `caption_words` here, into words
in lower case without punctuation. PTB differs in rare cases, such as `don't`, which it makes two
words of; small differences from published numbers have that cause.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, cast

from layerfuse.errors import LayerfuseError, short
from layerfuse.evaluate import boxes
from layerfuse.evaluate.benchmarks import official_files
from layerfuse.evaluate.benchmarks.interface import (
    Benchmark,
    Box,
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
from layerfuse.evaluate.boxes import BoxForm

IOU_NEEDED = 0.5
"""The overlap, in shares of the union, from which on a box is right."""

HIGHEST_CIDER = 1000.0
"""CIDEr of captions that equal their only reference: 10, in percent as papers print it."""

_LIBRARY_HIGHEST = 10.0
"""The same, as the library gives it."""

_WORD = re.compile(r"\w+(?:'\w+)*")

_NEEDED = ("image", "sentence", "bbox", "width", "height", "split")


@dataclass(frozen=True)
class Reference:
    """A sentence that refers to a part of a picture.

    Attributes:
        id: of the sentence.
        image: name of the picture's file.
        sentence: such as `the red cup`.
        box: that it means, in pixels.
        size: width and height of the picture in pixels.
        split: such as `testA`.
    """

    id: str
    image: str
    sentence: str
    box: Box
    size: tuple[int, int]
    split: str


class ReferringExpressions(Benchmark):
    """A benchmark that asks for the box of what a sentence means.

    It reports the share of answers whose box overlaps the right one by half of their union, for
    each split, and the mean of the splits.
    """

    licence: ClassVar[str] = "not stated; pictures of COCO under the terms of Flickr"
    headline: ClassVar[str] = "average"
    split_sizes: ClassVar[Mapping[str, int]]
    """how many sentences each split has"""

    def load(self, folder: Path) -> list[Item]:
        """Read the questions, grouped by split; see `Benchmark.load`."""
        file = folder / self.expected[0]
        items: list[Item] = []
        for reference in read_references(file, tuple(self.split_sizes)):
            item = Item(
                id=reference.id,
                pictures=(picture_file(folder, reference.image),),
                question=reference.sentence,
                # What is right is a box, however a model writes it.
                answers=(),
                group=reference.split,
                boxes=(reference.box,),
                size=reference.size,
            )
            items.append(item)
        return official_files.checked_items(file, items)

    def judge(self, item: Item, answer: str) -> Judged:
        """Score one answer; see `Benchmark.judge`."""
        if item.size is None:
            raise LayerfuseError(f"the question {item.id} does not say how large its picture is")
        box = boxes.read_box(answer, item.box_form, item.size)
        if box is None:
            return Judged(None, 0.0)
        is_right = boxes.box_iou(box, item.boxes[0]) >= IOU_NEEDED
        # In pixels, so that answers of models with different scales can be compared.
        edges = ", ".join(f"{edge:.1f}" for edge in box)
        off_scale = boxes.is_off_scale(answer, item.box_form)
        return Judged(f"[{edges}]", float(is_right), off_scale)

    def notes(self, items: Sequence[Item]) -> list[str]:
        """Say which splits are not whole or missing from the average; see `Benchmark.notes`."""
        found = dict.fromkeys(self.split_sizes, 0)
        for item in items:
            found[item.group] += 1
        notes: list[str] = []
        missing = [split for split, count in found.items() if count == 0]
        if missing:
            present = sorted(split for split in found if split not in missing)
            notes.append(
                f"no reference of {', '.join(missing)}; the average is over "
                f"{', '.join(present)} alone"
            )
        for split, published in self.split_sizes.items():
            if found[split] not in (0, published):
                notes.append(
                    f"{split} has {found[split]:,} sentences, and the published one {published:,}"
                )
        return notes

    def notes_on_answers(self, answered: Sequence[JudgedItem]) -> list[str]:
        """Count boxes that are probably in another scale; see `Benchmark.notes_on_answers`."""
        off_scale = [each for each in answered if each.judged.off_scale]
        if not off_scale:
            return []
        return [
            f"{len(off_scale):,} of {len(answered):,} answers are boxes with a "
            f"number above {boxes.FAR_BEYOND:g}, and were read as 0..1 of the picture; their scale "
            "is probably another one. Say it by `boxes` of the prompt, or for answers of other "
            "tools by a file boxes.yaml in their folder, such as `{scale: pixels, padded: false}`"
        ]

    def with_box_form(self, item: Item, form: BoxForm) -> Item:
        """Give a question to be answered by a box in a form; see `Benchmark.with_box_form`."""
        return replace(item, box_form=form)

    def columns(self, answered: Sequence[JudgedItem]) -> list[Column]:
        """Give the numbers that the benchmark reports; see `Benchmark.columns`."""
        of_splits = [share(of_split, name) for name, of_split in by_group(answered).items()]
        return [mean_of_columns("average", of_splits), *of_splits]


@benchmark
class RefCoco(ReferringExpressions):
    """RefCOCO: people's sentences from a game in which the other player finds what they mean."""

    name = "refcoco"
    title = "RefCOCO"
    split_sizes: ClassVar[Mapping[str, int]] = {"val": 10_834, "testA": 5657, "testB": 5095}
    expected = ("refcoco.jsonl", "train2014/COCO_train2014_*.jpg")


@benchmark
class RefCocoPlus(ReferringExpressions):
    """RefCOCO+: the same game, without words of place."""

    name = "refcoco+"
    title = "RefCOCO+"
    split_sizes: ClassVar[Mapping[str, int]] = {"val": 10_758, "testA": 5726, "testB": 4889}
    expected = ("refcoco+.jsonl", "train2014/COCO_train2014_*.jpg")


@benchmark
class RefCocoG(ReferringExpressions):
    """RefCOCOg in the split of the University of Maryland: longer sentences, without a game."""

    name = "refcocog"
    title = "RefCOCOg"
    split_sizes: ClassVar[Mapping[str, int]] = {"val": 4896, "test": 9602}
    expected = ("refcocog.jsonl", "train2014/COCO_train2014_*.jpg")


@benchmark
class RefCocoGCaptions(Benchmark):
    """Captions of the parts of pictures in RefCOCOg: CIDEr against the sentences of people.

    What is asked is a box, such as `[0.1, 0.2, 0.35, 0.4]`, which a prompt puts behind words such
    as LLaVA's `Please provide a short description for this region:`.

    CIDEr weighs a word by how rare it is in all references, so it exists only for all answers
    together: a single answer scores whether it is one of the references, word for word.
    """

    name = "refcocog-captions"
    title = "RefCOCOg region captioning"
    licence = "not stated; pictures of COCO under the terms of Flickr"
    expected = ("refcocog.jsonl", "train2014/COCO_train2014_*.jpg")
    headline = "average"
    splits: ClassVar[tuple[str, ...]] = ("val", "test")

    def load(self, folder: Path) -> list[Item]:
        """Read the parts of pictures, each with all its sentences; see `Benchmark.load`."""
        file = folder / self.expected[0]
        references: dict[tuple[str, str, Box], list[Reference]] = {}
        for reference in read_references(file, self.splits):
            # All sentences about a part of a picture have its box to the last digit.
            key = (reference.split, reference.image, reference.box)
            references.setdefault(key, []).append(reference)
        items: list[Item] = []
        for of_part in references.values():
            first = of_part[0]
            item = Item(
                id=first.id,
                pictures=(picture_file(folder, first.image),),
                question=written_box(first.box, boxes.LLAVA_BOXES, first.size),
                answers=tuple(reference.sentence for reference in of_part),
                group=first.split,
                boxes=(first.box,),
                size=first.size,
            )
            items.append(item)
        return official_files.checked_items(file, items)

    def with_box_form(self, item: Item, form: BoxForm) -> Item:
        """Give a question that tells its box in a form; see `Benchmark.with_box_form`."""
        if item.size is None:
            raise LayerfuseError(f"the question {item.id} does not say how large its picture is")
        question = written_box(item.boxes[0], form, item.size)
        return replace(item, question=question, box_form=form)

    def judge(self, item: Item, answer: str) -> Judged:
        """Score one answer; see `Benchmark.judge`, and above on what a single one scores."""
        words = caption_words(answer)
        references = [caption_words(reference) for reference in item.answers]
        is_reference = bool(words) and words in references
        return Judged(answer.strip() or None, float(is_reference))

    def columns(self, answered: Sequence[JudgedItem]) -> list[Column]:
        """Give the numbers that the benchmark reports; see `Benchmark.columns`."""
        return self.redrawn_columns(self.scored_together(answered))

    def scored_together(self, answered: Sequence[JudgedItem]) -> list[JudgedItem]:
        """Score each caption by its CIDEr, as a share of the highest; see `Benchmark`.

        References that are drawn twice must not make their words less rare: all words would weigh
        less in redrawn pictures than in all, and the interval would lie beside the number.
        """
        scores: dict[str, float] = {}
        # Each split by itself, as how rare a word is depends on the references beside it.
        for of_split in by_group(answered).values():
            for each, cider in zip(of_split, _ciders(of_split), strict=True):
                scores[each.item.id] = cider / _LIBRARY_HIGHEST
        scored: list[JudgedItem] = []
        for each in answered:
            judged = replace(each.judged, score=scores[each.item.id])
            scored.append(replace(each, judged=judged))
        return scored

    def redrawn_columns(self, redrawn: Sequence[JudgedItem]) -> list[Column]:
        """Give the mean CIDEr of each split, and the mean of the splits; see `Benchmark`."""
        of_splits: list[Column] = []
        for name, of_split in by_group(redrawn).items():
            total = sum(each.judged.score for each in of_split)
            value = HIGHEST_CIDER * total / len(of_split)
            of_splits.append(Column(name, value, HIGHEST_CIDER, len(of_split)))
        return [mean_of_columns("average", of_splits), *of_splits]


@benchmark
class RefCocoCaptions(RefCocoGCaptions):
    """The same of the parts of pictures in RefCOCO."""

    name = "refcoco-captions"
    title = "RefCOCO region captioning"
    expected = ("refcoco.jsonl", "train2014/COCO_train2014_*.jpg")
    splits: ClassVar[tuple[str, ...]] = ("val", "testA", "testB")


@benchmark
class RefCocoPlusCaptions(RefCocoCaptions):
    """The same of the parts of pictures in RefCOCO+."""

    name = "refcoco+-captions"
    title = "RefCOCO+ region captioning"
    expected = ("refcoco+.jsonl", "train2014/COCO_train2014_*.jpg")


def read_references(file: Path, splits: Sequence[str]) -> list[Reference]:
    """Read the sentences of a file in the format that the module describes.

    Args:
        file: JSON lines.
        splits: that the benchmark has.

    Returns:
        All sentences.

    Raises:
        LayerfuseError: the file is missing or cut off, or a split or a box is not valid.
    """
    references: list[Reference] = []
    for number, row in enumerate(official_files.read_json_lines(file, _NEEDED), start=1):
        split = official_files.cell_text(file, number, row, "split")
        if split not in splits:
            raise LayerfuseError(
                f"{file} has {split!r} as 'split' in row {number}; valid: {', '.join(splits)}"
            )
        id = f"{split}-{number}"
        if "id" in row:
            id = official_files.cell_text(file, number, row, "id")
        size = (_side(file, number, row, "width"), _side(file, number, row, "height"))
        reference = Reference(
            id=id,
            image=official_files.cell_text(file, number, row, "image"),
            sentence=official_files.cell_text(file, number, row, "sentence"),
            box=_box(file, number, row["bbox"], size),
            size=size,
            split=split,
        )
        references.append(reference)
    return references


def written_box(box: Box, form: BoxForm, size: tuple[int, int]) -> str:
    """Write a box as a model is told it: what `read_box` reads, up to rounding.

    Args:
        box: in pixels.
        form: in which it is told.
        size: width and height of the picture in pixels.

    Returns:
        Left, top, right and bottom in brackets: hundredths of the `unit` scale without zeros at
        the end, as LLaVA-1.5's training data have them (`[0.28, 0.34, 0.4, 0.71]`), and whole
        numbers of the others.
    """
    span = (max(size), max(size)) if form.padded else size
    # As `read_box` takes them away.
    before = (span[0] - size[0]) // 2
    above = (span[1] - size[1]) // 2
    edges: list[str] = []
    for place, edge in enumerate(box):
        is_across = place % 2 == 0
        pixels = edge + (before if is_across else above)
        if form.scale == "pixels":
            edges.append(f"{pixels:.0f}")
            continue
        share_of_side = pixels / (span[0] if is_across else span[1])
        if form.scale == "unit":
            # Plus 0, as an edge a little beyond the picture would be -0.0.
            edges.append(str(round(share_of_side, 2) + 0.0))
        else:
            edges.append(f"{share_of_side * boxes.WHOLE_SIDE[form.scale]:.0f}")
    return f"[{', '.join(edges)}]"


def caption_words(caption: str) -> list[str]:
    """The words of a caption as CIDEr counts them here.

    Args:
        caption: any text.

    Returns:
        Runs of letters and digits in lower case, with apostrophes within them.
    """
    return _WORD.findall(caption.lower())


def _ciders(answered: Sequence[JudgedItem]) -> list[float]:
    """CIDEr of each of some captions, 0..10, with the words weighed by the references of all.

    Raises:
        LayerfuseError: its library is not installed.
    """
    try:
        from pycocoevalcap.cider.cider import (  # pyright: ignore[reportMissingTypeStubs]
            Cider,  # pyright: ignore[reportUnknownVariableType]
        )
    except ImportError as error:
        raise LayerfuseError(
            "CIDEr needs the library pycocoevalcap, which is not installed: run "
            "`pip install 'layerfuse[captions]'`"
        ) from error
    references: dict[str, list[str]] = {}
    captions: dict[str, list[str]] = {}
    for each in answered:
        # The library splits at spaces.
        sentences = [" ".join(caption_words(sentence)) for sentence in each.item.answers]
        references[each.item.id] = sentences
        captions[each.item.id] = [" ".join(caption_words(each.judged.parsed or ""))]
    _, scores = cast("Any", Cider)().compute_score(references, captions)
    return [float(score) for score in scores]


def _side(file: Path, number: int, row: official_files.Row, column: str) -> int:
    """A side of a picture in pixels.

    Raises:
        LayerfuseError: it is no whole number above zero.
    """
    side = row[column]
    if not isinstance(side, int) or isinstance(side, bool) or side < 1:
        raise LayerfuseError(
            f"{file} has {short(side)} as {column!r} in row {number}; a picture's side in whole "
            "pixels is expected"
        )
    return side


def _box(file: Path, number: int, cell: Any, size: tuple[int, int]) -> Box:
    """A box by its corners, from left, top, width and height.

    Raises:
        LayerfuseError: these are not four numbers, or the box is not in the picture.
    """
    expected = "four numbers are expected: left, top, width and height in pixels"
    if not isinstance(cell, list) or len(cast("list[Any]", cell)) != 4:
        raise LayerfuseError(f"{file} has {short(cell)} as 'bbox' in row {number}; {expected}")
    for edge in cast("list[Any]", cell):
        # JSON's true and false are whole numbers to Python.
        is_number = isinstance(edge, (int, float)) and not isinstance(edge, bool)
        if not is_number or not math.isfinite(edge):
            raise LayerfuseError(f"{file} has {short(cell)} as 'bbox' in row {number}; {expected}")
    left, top, width, height = cast("list[float]", cell)
    right, bottom = left + width, top + height
    # COCO's boxes reach over the edge by rounding.
    is_inside = left >= -1 and top >= -1 and right <= size[0] + 1 and bottom <= size[1] + 1
    if width <= 0 or height <= 0 or not is_inside:
        raise LayerfuseError(
            f"{file} has the box {short(cell)} in row {number}, which is not within its picture of "
            f"{size[0]} x {size[1]} pixels; {expected}. Are its last two numbers a corner?"
        )
    return (left, top, right, bottom)
