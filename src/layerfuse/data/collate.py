"""From samples to batches."""

import io
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler

from layerfuse.data.feature_store import FeatureStore
from layerfuse.data.picture import Picture
from layerfuse.data.sample import Sample, by_turn
from layerfuse.model.processor import IGNORED, NoLabelError, Processor, question_of

PICTURE_LENGTH = 2000  # a picture's share of a sample's length, in characters


@dataclass
class SampleDataset(Dataset[Sample]):
    """Samples as a map-style dataset; with `crop`, each picture is cut to a random part of at least
    that share of its sides, which seed, epoch and index decide."""

    samples: Sequence[Sample]
    crop: float | None = None
    seed: int = 0
    epoch: int = 0

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        sample = self.samples[index]
        if self.crop is None:
            return sample
        draw = random.Random(f"{self.seed} {self.epoch} {index}")
        pictures = []
        for picture in sample.pictures:
            width, height = draw.uniform(self.crop, 1), draw.uniform(self.crop, 1)
            left, top = draw.uniform(0, 1 - width), draw.uniform(0, 1 - height)
            pictures.append(replace(picture, crop=(left, top, left + width, top + height)))
        return replace(sample, pictures=tuple(pictures))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def lengths(self) -> list[int]:
        """The rough length of every sample, the same for all strategies."""
        return [
            sum(len(m["content"]) for m in sample.messages) + PICTURE_LENGTH * len(sample.pictures)
            for sample in self.samples
        ]


@dataclass
class LengthGroups(Sampler[int]):
    """Random order in which every `batch_size` neighbours have similar lengths: samples are sorted
    within windows of `WINDOW` batches of a shuffled epoch, and the batches shuffled again. Samples
    that come twice fill the last batch, so that all processes share whole ones."""

    WINDOW: ClassVar = 50

    lengths: torch.Tensor
    batch_size: int
    seed: int
    epoch: int = 0

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / self.batch_size) * self.batch_size

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        draw = torch.Generator().manual_seed(self.seed + 2**20 * self.epoch)
        once = torch.randperm(len(self.lengths), generator=draw)
        order = once.repeat(math.ceil(len(self) / len(once)))[: len(self)]
        batches: list[torch.Tensor] = []
        for window in order.split(self.WINDOW * self.batch_size):
            ranked = window[self.lengths[window].argsort(stable=True)]
            batches += ranked.split(self.batch_size)
        shuffled = [batches[i] for i in torch.randperm(len(batches), generator=draw)]
        yield from torch.cat(shuffled).tolist()


@dataclass
class Collator:
    """Makes training batches: right-padded text, answer labels, pixels or cached features.

    With `guidance: instruction`, for strategies that one guides, a conversation of several answers
    becomes one row per answer, so that each is guided by its own question and by nothing after it;
    the labelled tokens stay the same. With `blank`, a batch of text alone gets a picture behind its
    first row, masked and without labels, so that every process runs the same modules. Raises
    ValueError naming the sample that cannot be used (no label left, image tokens cut).
    """

    processor: Processor
    prompt: Literal["chat", "plain"]
    max_length: int
    store: FeatureStore | None
    guidance: Literal["instruction", "uniform"] = "instruction"
    blank: bool = False

    @property
    def guided(self) -> bool:
        """Whether an instruction guides these batches."""
        return self.guidance == "instruction" and self.processor.instruction.guided

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        if self.guided:
            samples = [turn for sample in samples for turn in by_turn(sample)]
        batch = visual_inputs(self.processor, samples, self.store)
        tokens = image_tokens(self.processor, batch)
        rows = [(sample, self._encode(sample, tokens)) for sample in samples]
        if any(row is None for _, row in rows):
            samples = [sample for sample, row in rows if row is not None]
            batch = visual_inputs(self.processor, samples, self.store)
        encoded = [row for _, row in rows if row is not None]
        blank = self._blank() if self.blank and not batch else None
        if blank is not None:
            batch = visual_inputs(self.processor, [Sample("blank", (blank,), ())], self.store)
            # behind the row: nothing attends to it, nothing is learned from it
            filling = {"input_ids": self.processor.image_token_id, "labels": IGNORED}
            width = (0, image_tokens(self.processor, batch))
            for name, value in {**filling, "attention_mask": 0}.items():
                encoded[0][name] = F.pad(encoded[0][name], width, value=value)
        pad = self.processor.tokenizer.pad_token_id
        ids = pad_sequence([e["input_ids"] for e in encoded], batch_first=True, padding_value=pad)
        labels = pad_sequence([e["labels"] for e in encoded], True, padding_value=IGNORED)
        mask = pad_sequence([e["attention_mask"] for e in encoded], batch_first=True)
        if self.guided:
            questions = [question_of(sample.messages) for sample in samples]
            instruction = self.processor.instruction.embed(questions)
            if instruction is not None:
                batch["instruction"] = instruction
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": labels,
            "guidance": self.guidance,
            **batch,
        }

    def _encode(self, sample: Sample, tokens: int) -> dict[str, torch.Tensor] | None:
        """The sample's row; None for one turn of many whose answer `max_length` cuts away."""
        try:
            row = self.processor.encode(
                list(sample.messages),
                [tokens] * len(sample.pictures),
                self.prompt,
                self.max_length,
                "last" if self.guided else "all",
            )
        except NoLabelError as error:
            answers = sum(m["role"] == "assistant" for m in sample.messages)
            if self.guided and answers > 1:
                return None
            raise ValueError(f"sample {sample.id}: {error}") from error
        except ValueError as error:
            raise ValueError(f"sample {sample.id}: {error}") from error
        return row | {"attention_mask": torch.ones_like(row["input_ids"])}

    def _blank(self) -> Picture | None:
        """Any picture that the store holds (none: no batch shows one), or a grey one."""
        if self.store is not None:
            held = self.store.pictures.items()
            return next((p for name, p in held if name not in self.store.bad), None)
        file = io.BytesIO()
        Image.new("RGB", (64, 64), "grey").save(file, "PNG")
        return Picture("grey", file.getvalue)


def visual_inputs(
    processor: Processor, samples: Sequence[Sample], store: FeatureStore | None
) -> dict[str, Any]:
    """`features` from the store, or `pixel_values`, of all the pictures in reading order."""
    pictures = [picture for sample in samples for picture in sample.pictures]
    if not pictures:
        return {}
    if store is not None:
        return {"features": store.features(pictures)}
    images = [picture.open() for picture in pictures]
    return dict(processor.image_processor(images, return_tensors="pt"))


def image_tokens(processor: Processor, batch: dict[str, Any]) -> int:
    """Tokens per image of a batch from `visual_inputs`."""
    if "features" in batch:
        return processor.image_tokens.of_grid(batch["features"].grid)
    if "pixel_values" in batch:
        return processor.num_image_tokens(*batch["pixel_values"].shape[-2:])
    return 0
