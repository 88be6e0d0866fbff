"""From samples to batches."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from layerfuse.data.cache import FeatureStore
from layerfuse.data.samples import Sample, by_turn
from layerfuse.processor import IGNORED, Processor, question_of


class SampleDataset(Dataset[Sample]):
    """Samples as a map-style dataset."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


class Collator:
    """Makes training batches: right-padded text, answer labels, pixels or cached features.

    With `guided`, for strategies that an instruction guides, a conversation of several answers
    becomes one row per answer, so that each is guided by its own question and by nothing after it;
    the labelled tokens stay the same. Raises ValueError naming the sample that cannot be used (no
    label left, image tokens cut).
    """

    def __init__(
        self,
        processor: Processor,
        prompt: Literal["chat", "plain"],
        max_length: int,
        store: FeatureStore | None,
        guided: bool = False,
    ) -> None:
        self.processor = processor
        self.prompt: Literal["chat", "plain"] = prompt
        self.max_length = max_length
        self.store = store
        self.guided = guided

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        if self.guided:
            samples = [turn for sample in samples for turn in by_turn(sample)]
        batch = visual_inputs(self.processor, samples, self.store)
        counts = image_tokens(self.processor, batch)
        encoded = []
        for sample in samples:
            try:
                tokens = [counts] * len(sample.pictures)
                encoded.append(
                    self.processor.encode(
                        list(sample.messages),
                        tokens,
                        self.prompt,
                        self.max_length,
                        "last" if self.guided else "all",
                    )
                )
            except ValueError as error:
                raise ValueError(f"sample {sample.id}: {error}") from error
        pad = self.processor.tokenizer.pad_token_id
        ids = pad_sequence([e["input_ids"] for e in encoded], batch_first=True, padding_value=pad)
        labels = pad_sequence([e["labels"] for e in encoded], True, padding_value=IGNORED)
        lengths = torch.tensor([len(e["input_ids"]) for e in encoded])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        if self.guided and self.processor.reads == "sentence":
            asked = [question_of(sample.messages) for sample in samples]
            batch["instruction"] = self.processor.sentences(asked)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, **batch}


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
        return processor.num_fused_tokens(batch["features"].grid)
    if "pixel_values" in batch:
        return processor.num_image_tokens(*batch["pixel_values"].shape[-2:])
    return 0
