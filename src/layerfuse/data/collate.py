"""From samples to batches."""

import io
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler

from layerfuse.data.feature_store import FeatureStore
from layerfuse.data.sample import Sample, by_turn
from layerfuse.errors import LayerfuseError
from layerfuse.model.chat_template import question_of
from layerfuse.model.processor import IGNORED, NoLabelError, Processor
from layerfuse.vision.picture import Picture

PICTURE_LENGTH = 2000
"""a picture's share of a sample's length, in characters"""


@dataclass
class SampleDataset(Dataset[Sample]):
    """Samples as a map-style dataset.

    Seed, epoch and index decide how a picture is cropped, so that loaders in other processes and
    continued runs see the same pictures.
    """

    samples: Sequence[Sample]
    crop: float | None = None
    """cut each picture to a random part of at least this share of each side; None keeps all"""
    seed: int = 0
    epoch: int = 0

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        sample = self.samples[index]
        if self.crop is None:
            return sample
        rng = random.Random(f"{self.seed} {self.epoch} {index}")
        pictures = []
        for picture in sample.pictures:
            # In shares of the sides.
            width = rng.uniform(self.crop, 1)
            height = rng.uniform(self.crop, 1)
            left = rng.uniform(0, 1 - width)
            top = rng.uniform(0, 1 - height)
            box = (left, top, left + width, top + height)
            pictures.append(replace(picture, crop=box))
        return replace(sample, pictures=tuple(pictures))

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, with crops of its own.

        Args:
            epoch: from 0.
        """
        self.epoch = epoch

    def with_pictures(self) -> list[bool]:
        """Whether each sample has pictures, and is not text alone."""
        return [len(sample.pictures) > 0 for sample in self.samples]

    def lengths(self) -> list[int]:
        """The rough length of every sample in characters, the same for all strategies."""
        lengths = []
        for sample in self.samples:
            # Not in tokens: strategies make different numbers of image tokens, and the order of the
            # samples must not depend on the strategy.
            length = PICTURE_LENGTH * len(sample.pictures)
            for message in sample.messages:
                length += len(message["content"])
            lengths.append(length)
        return lengths


@dataclass
class LengthGroups(Sampler[int]):
    """Random order in which every `batch_size` neighbours have similar lengths.

    Samples are sorted within windows of `WINDOW` batches of a shuffled epoch, and the batches
    shuffled again. Samples that come twice fill the last batch, so that all processes share whole
    ones.

    With `with_pictures`, samples that have pictures and samples of text alone come in batches of
    their own, of similar lengths each. An epoch has as many batches as without: where what is left
    over of both fits into one batch, it becomes one, as in LLaVA's release.
    """

    WINDOW: ClassVar = 50

    lengths: Tensor
    """of all samples, (samples,)"""
    batch_size: int
    """global, over all processes"""
    seed: int
    epoch: int = 0
    with_pictures: Tensor | None = None
    """whether each sample has pictures, (samples,) of bool; None mixes both kinds"""

    def __len__(self) -> int:
        return self._in_whole_batches(len(self.lengths))

    def _in_whole_batches(self, samples: int) -> int:
        """So many samples, and those that fill the last batch."""
        return math.ceil(samples / self.batch_size) * self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, with an order of its own.

        Args:
            epoch: from 0.
        """
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        # 2^20 apart: another epoch of one seed is no epoch of the next seed.
        generator = torch.Generator().manual_seed(self.seed + 2**20 * self.epoch)
        shuffled = torch.randperm(len(self.lengths), generator=generator)
        batches: list[Tensor] = []
        for part in self._parts(shuffled):
            for window in part.split(self.WINDOW * self.batch_size):
                by_length = self.lengths[window].argsort(stable=True)
                batches.extend(window[by_length].split(self.batch_size))
        # Batches in random order, else each window would go from short to long.
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield from batches[index].tolist()

    def _parts(self, shuffled: Tensor) -> list[Tensor]:
        """What shares no batch with the rest of the epoch: one part, or one per kind of sample and
        one of what is left over. Each has whole batches."""
        if self.with_pictures is None:
            return [self._filled(shuffled)]
        shows_picture = self.with_pictures[shuffled]
        kinds = [shuffled[shows_picture], shuffled[~shows_picture]]
        left_over = [len(kind) % self.batch_size for kind in kinds]
        if 0 in left_over or sum(left_over) > self.batch_size:
            # Filling the last batch of each kind by itself makes no batch more.
            return _not_empty([self._filled(kind) for kind in kinds])

        whole_batches = []
        rest = []
        for kind, size in zip(kinds, left_over, strict=True):
            whole = len(kind) - size
            whole_batches.append(kind[:whole])
            rest.append(kind[whole:])
        # The rest stands last, so that samples of whole batches fill it.
        epoch = self._filled(torch.cat([*whole_batches, *rest]))
        return _not_empty([*whole_batches, epoch[-self.batch_size :]])

    def _filled(self, samples: Tensor) -> Tensor:
        """Samples in whole batches, the last one filled from their beginning."""
        length = self._in_whole_batches(len(samples))
        # More than once through where there are fewer samples than a batch holds.
        repeats = math.ceil(length / max(1, len(samples)))
        return samples.repeat(repeats)[:length]


def _not_empty(parts: list[Tensor]) -> list[Tensor]:
    """The parts that hold samples: of no samples, splitting would make an empty batch."""
    return [part for part in parts if len(part) > 0]


@dataclass
class EncodedRow:
    """One row of a batch before it is padded; all of (T,)."""

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor


@dataclass(frozen=True)
class Collator:
    """Makes training batches: right-padded text, answer labels, pixels or cached features.

    With `guidance: instruction`, for strategies that one guides, a conversation of several answers
    becomes one row per answer, so that each is guided by its own question and by nothing after it;
    the labelled tokens stay the same. Where the strategy averages questions, it stays one row.
    """

    processor: Processor
    prompt: Literal["chat", "plain"]
    max_length: int
    """longest row in tokens; what is longer is cut at the end"""
    store: FeatureStore | None
    """features of all pictures; None makes batches of pixels"""
    guidance: Literal["instruction", "uniform"] = "instruction"
    blank: bool = False
    """whether a batch of text alone gets a picture behind its first row, masked and without labels,
    so that every process runs the same modules"""

    @property
    def guided(self) -> bool:
        """Whether an instruction guides these batches."""
        return self.guidance == "instruction" and self.processor.instruction.guided

    @property
    def rows_by_turn(self) -> bool:
        """Whether each answer becomes a row of its own."""
        return self.guided and self.processor.instruction.by_turn

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Make a batch.

        Args:
            samples: its conversations.

        Returns:
            Keyword arguments of the model: `input_ids`, `attention_mask` and `labels` (rows, T),
            `guidance`, and, where there are pictures, `features` or `pixel_values`; where the
            answers of a conversation are rows, each picture is there once, and `image_index` says
            which each row shows; for guided rows also `instruction`.

        Raises:
            LayerfuseError: naming the sample that cannot be used (no label left, image tokens cut).
        """
        if self.rows_by_turn:
            samples = _turns_of(samples)
        visual = self._visual(samples)
        # Every picture of a batch has the same number of tokens.
        tokens_per_image = image_tokens(self.processor, visual)
        usable = []
        rows = []
        for sample in samples:
            row = self._encode(sample, tokens_per_image)
            if row is not None:
                usable.append(sample)
                rows.append(row)
        if len(usable) < len(samples):
            # The pictures of turns that were cut away must not stay in the batch.
            visual = self._visual(usable)
        if self.blank and not visual:
            visual = self._add_blank(rows[0])

        batch = self._pad(rows)
        batch["guidance"] = self.guidance
        batch.update(visual)
        if self.guided:
            instruction = self._instruction(usable)
            if instruction is not None:
                batch["instruction"] = instruction
        return batch

    def _visual(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """What the model is given of the pictures: of each once, where turns share them."""
        if not self.rows_by_turn:
            return visual_inputs(self.processor, samples, self.store)
        shown: list[Picture] = []
        for sample in samples:
            shown.extend(sample.pictures)
        place = {picture: number for number, picture in enumerate(dict.fromkeys(shown))}
        if len(place) == len(shown):
            return visual_inputs(self.processor, samples, self.store)
        once = Sample("once", tuple(place), ())
        visual = visual_inputs(self.processor, [once], self.store)
        visual["image_index"] = torch.tensor([place[picture] for picture in shown])
        return visual

    def _instruction(self, samples: Sequence[Sample]) -> Tensor | None:
        """What guides the rows, (rows, E): the embedding of the question, or the mean of those of
        all questions; None where the model makes it."""
        source = self.processor.instruction
        if self.rows_by_turn:
            return source.embed([question_of(sample.messages) for sample in samples])
        means = []
        for sample in samples:
            embedded = source.embed([question_of(turn.messages) for turn in by_turn(sample)])
            if embedded is None:
                return None
            means.append(embedded.mean(dim=0))
        return torch.stack(means)

    def _encode(self, sample: Sample, tokens_per_image: int) -> EncodedRow | None:
        """The sample's row; None for one turn of many whose answer `max_length` cuts away."""
        # Such a row is one turn: the answers before it are labelled in rows of their own.
        answers: Literal["all", "last"] = "all"
        if self.rows_by_turn:
            answers = "last"
        try:
            encoded = self.processor.encode(
                list(sample.messages),
                [tokens_per_image] * len(sample.pictures),
                prompt=self.prompt,
                max_length=self.max_length,
                answers=answers,
            )
        except LayerfuseError as error:
            if isinstance(error, NoLabelError) and self.rows_by_turn and _num_answers(sample) > 1:
                return None
            raise LayerfuseError(f"sample {sample.id}: {error}") from error
        return EncodedRow(
            input_ids=encoded["input_ids"],
            labels=encoded["labels"],
            attention_mask=torch.ones_like(encoded["input_ids"]),
        )

    def _pad(self, rows: list[EncodedRow]) -> dict[str, Any]:
        """Rows of different lengths as tensors (rows, T), padded at the right."""
        input_ids = pad_sequence(
            [row.input_ids for row in rows],
            batch_first=True,
            padding_value=self.processor.tokenizer.pad_token_id,
        )
        attention_mask = pad_sequence([row.attention_mask for row in rows], batch_first=True)
        labels = pad_sequence(
            [row.labels for row in rows],
            batch_first=True,
            padding_value=IGNORED,
        )
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}

    def _add_blank(self, row: EncodedRow) -> dict[str, Any]:
        """Put the image tokens of a blank picture behind a row, and return its visual inputs."""
        picture = self.blank_picture()
        if picture is None:
            return {}
        blank_sample = Sample("blank", (picture,), ())
        visual = visual_inputs(self.processor, [blank_sample], self.store)
        # Behind the row: nothing attends to it, nothing is learned from it.
        width = (0, image_tokens(self.processor, visual))
        row.input_ids = F.pad(row.input_ids, width, value=self.processor.image_token_id)
        row.labels = F.pad(row.labels, width, value=IGNORED)
        row.attention_mask = F.pad(row.attention_mask, width, value=0)
        return visual

    def blank_picture(self) -> Picture | None:
        """Any picture of the store, None if it holds none; without a store a grey one."""
        if self.store is None:
            file = io.BytesIO()
            Image.new("RGB", (64, 64), "grey").save(file, "PNG")
            return Picture("grey", file.getvalue)
        for name, picture in self.store.pictures.items():
            if name not in self.store.bad:
                return picture
        # No batch of any process shows a picture then.
        return None


def _turns_of(samples: Sequence[Sample]) -> list[Sample]:
    """One sample per answer."""
    turns = []
    for sample in samples:
        turns.extend(by_turn(sample))
    return turns


def _num_answers(sample: Sample) -> int:
    return sum(message["role"] == "assistant" for message in sample.messages)


def visual_inputs(
    processor: Processor, samples: Sequence[Sample], store: FeatureStore | None
) -> dict[str, Any]:
    """What the model is given of the pictures of some samples.

    Args:
        processor: preprocesses pixels.
        samples: in the order of the batch's rows.
        store: holds the features; None reads the pictures.

    Returns:
        `features` from the store, or `pixel_values` (pictures, 3, height, width), of all pictures
        in reading order; nothing where there are none.

    Raises:
        LayerfuseError: a picture cannot be read.
    """
    pictures = []
    for sample in samples:
        pictures.extend(sample.pictures)
    if not pictures:
        return {}
    if store is not None:
        return {"features": store.features(pictures)}
    images = [picture.open() for picture in pictures]
    return dict(processor.image_processor(images, return_tensors="pt"))


def image_tokens(processor: Processor, batch: dict[str, Any]) -> int:
    """Tokens per image.

    Args:
        processor: knows what the fusion makes of a grid.
        batch: from `visual_inputs`.
    """
    if "features" in batch:
        return processor.image_tokens.of_grid(batch["features"].grid)
    if "pixel_values" in batch:
        height, width = batch["pixel_values"].shape[-2:]
        return processor.num_image_tokens(height, width)
    return 0
