"""`group_by: modality_length`: samples with pictures and text alone in batches of their own."""

import math
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainingArguments

from layerfuse.data.collate import LengthGroups, SampleDataset
from layerfuse.data.sample import Sample
from layerfuse.recipe.stage import Stage
from layerfuse.train.trainer import FusionTrainer
from layerfuse.vision.picture import Picture
from tests import tiny

BATCH = 4
SEED = 3

# Numbers of samples with pictures and of text alone, by what is left over of both; and how many
# batches then hold both kinds.
CASES = {
    "both rests fit into one batch": (401, 202, 1),
    "both rests fill one batch": (402, 202, 1),
    "both rests need two batches": (403, 203, 0),
    "a rest of pictures alone": (401, 200, 0),
    "a rest of text alone": (400, 203, 0),
    "no rest": (400, 200, 0),
    "pictures alone": (401, 0, 0),
    "text alone": (0, 202, 0),
    "less than a batch of pictures": (3, 8, 0),
    "less than a batch of text": (9, 1, 1),
    "less than a batch of both": (1, 2, 1),
}


def make_samples(with_picture: int, text_alone: int) -> tuple[list[int], list[bool]]:
    """Lengths of samples, and whether each has pictures, both kinds in any order."""
    total = with_picture + text_alone
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(10, 2000, (total,), generator=generator).tolist()
    order = torch.randperm(total, generator=generator).tolist()
    return lengths, [place < with_picture for place in order]


def epoch_of(lengths: list[int], shows: list[bool], epoch: int = 0) -> list[list[int]]:
    """The batches of an epoch, as the sampler makes them."""
    groups = LengthGroups(torch.tensor(lengths), BATCH, SEED, epoch, torch.tensor(shows))
    order = list(groups)
    assert len(order) == len(groups)
    return [order[start : start + BATCH] for start in range(0, len(order), BATCH)]


def naive_filled(samples: list[int]) -> list[int]:
    """Samples, and its first ones again until the last batch is whole."""
    filled = list(samples)
    place = 0
    while len(filled) % BATCH != 0:
        filled.append(filled[place])
        place += 1
    return filled


def naive_sorted_batches(samples: list[int], lengths: list[int]) -> list[list[int]]:
    """Batches of samples of similar length: sorted within fifty batches."""
    batches = []
    for start in range(0, len(samples), 50 * BATCH):
        window = sorted(samples[start : start + 50 * BATCH], key=lambda index: lengths[index])
        while window:
            batches.append(window[:BATCH])
            window = window[BATCH:]
    return batches


def naive_epoch(lengths: list[int], shows: list[bool]) -> list[list[int]]:
    """The first epoch in plain lists: kinds apart, then what is left over of both."""
    generator = torch.Generator().manual_seed(SEED)
    shuffled = torch.randperm(len(lengths), generator=generator).tolist()
    pictures = [index for index in shuffled if shows[index]]
    texts = [index for index in shuffled if not shows[index]]
    pictures_left = len(pictures) % BATCH
    texts_left = len(texts) % BATCH

    if pictures_left > 0 and texts_left > 0 and pictures_left + texts_left <= BATCH:
        whole_pictures = pictures[: len(pictures) - pictures_left]
        whole_texts = texts[: len(texts) - texts_left]
        mixed = pictures[len(whole_pictures) :] + texts[len(whole_texts) :]
        # Filled by those with pictures first.
        supply = whole_pictures + whole_texts + mixed
        while len(mixed) < BATCH:
            mixed.append(supply.pop(0))
    else:
        whole_pictures = naive_filled(pictures)
        whole_texts = naive_filled(texts)
        mixed = []

    batches = naive_sorted_batches(whole_pictures, lengths)
    batches += naive_sorted_batches(whole_texts, lengths)
    batches += naive_sorted_batches(mixed, lengths)
    order: list[int] = torch.randperm(len(batches), generator=generator).tolist()
    return [batches[place] for place in order]


@pytest.mark.parametrize("case", CASES)
def test_the_order_is_that_of_plain_lists(case: str) -> None:
    with_picture, text_alone, _ = CASES[case]
    lengths, shows = make_samples(with_picture, text_alone)

    assert epoch_of(lengths, shows) == naive_epoch(lengths, shows)


@pytest.mark.parametrize("case", CASES)
def test_kinds_are_apart_in_as_many_batches_as_mixed(case: str) -> None:
    """So that the steps of an epoch are known without the data."""
    with_picture, text_alone, expected_mixed = CASES[case]
    lengths, shows = make_samples(with_picture, text_alone)

    batches = epoch_of(lengths, shows)

    assert len(batches) == math.ceil(len(lengths) / BATCH)
    seen: set[int] = set()
    mixed = 0
    for batch in batches:
        assert len(batch) == BATCH
        seen.update(batch)
        kinds = {shows[index] for index in batch}
        if len(kinds) == 2:
            mixed += 1
    assert seen == set(range(len(lengths)))
    assert mixed == expected_mixed


def test_batches_of_each_kind_have_similar_lengths_in_random_order() -> None:
    lengths, shows = make_samples(400, 200)
    batches = epoch_of(lengths, shows)

    spans = []
    for batch in batches:
        lengths_of_batch = [lengths[index] for index in batch]
        spans.append(max(lengths_of_batch) - min(lengths_of_batch))

    # Within fifty batches of four, neighbours in length are 10 apart; of random fours, 1200.
    assert sum(spans) / len(spans) < 100
    of_pictures = [shows[batch[0]] for batch in batches]
    # Not first one kind, then the other.
    assert True in of_pictures[:20]
    assert False in of_pictures[:20]
    assert epoch_of(lengths, shows, epoch=1) != batches


def test_one_kind_alone_is_grouped_by_length() -> None:
    lengths, shows = make_samples(401, 0)

    by_length = list(LengthGroups(torch.tensor(lengths), BATCH, SEED))

    batches = epoch_of(lengths, shows)
    assert list(chain.from_iterable(batches)) == by_length


def test_samples_say_whether_they_show_a_picture() -> None:
    question = {"role": "user", "content": "Is it red?"}
    text = Sample("text", (), (question,))
    shown = Sample("picture", (Picture("a.png"),), (question,))

    assert SampleDataset([text, shown]).with_pictures() == [False, True]


def shows_pictures(samples: list[Sample]) -> dict[str, Tensor]:
    """A batch that says of each sample whether it has pictures."""
    return {"shows": torch.tensor([len(sample.pictures) > 0 for sample in samples])}


def make_kind_collator(blank: bool) -> Any:
    """What makes such batches; it stands for a `Collator` and needs no processor."""
    return shows_pictures


@pytest.mark.parametrize(("group_by", "apart"), [("length", False), ("modality_length", True)])
def test_a_stage_trains_on_batches_of_one_kind(group_by: str, apart: bool, tmp_path: Path) -> None:
    question = {"role": "user", "content": "Is it red?"}
    samples = []
    for index in range(8):
        # A text as long as a picture counts: lengths alone would mix the kinds.
        samples.append(Sample(f"picture {index}", (Picture("a.png"),), (question,)))
        long_text = {"role": "user", "content": "red " * 502 + "??"}
        samples.append(Sample(f"text {index}", (), (long_text,)))
    stage = Stage.model_validate(
        {
            "data": {"path": "a.json"},
            "learning_rates": {"fusion": 1.0},
            "batch_size": BATCH,
            "group_by": group_by,
        }
    )
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=BATCH,
        use_cpu=True,
        report_to="none",
    )
    trainer = FusionTrainer(
        stage,
        make_collator=make_kind_collator,
        model=tiny.model("single"),
        args=arguments,
        train_dataset=SampleDataset(samples),
    )

    batches = list(trainer.get_train_dataloader())

    assert len(batches) == 4
    pure = [len(set(batch["shows"].tolist())) == 1 for batch in batches]
    assert all(pure) == apart
