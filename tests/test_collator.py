"""Batches: samples as padded token ids, labels, and pixels or cached features."""

from pathlib import Path

import pytest
import torch

from layerfuse.data.collate import Collator
from layerfuse.data.feature_store import cached_features
from layerfuse.data.lazy_records import Samples
from layerfuse.errors import LayerfuseError
from layerfuse.model.processor import IGNORED, Processor
from layerfuse.vision.encoder import Encoder
from tests import tiny
from tests.sample_files import load_records, save_picture, turns

pytestmark = pytest.mark.usefixtures("home")


def encoder() -> Encoder:
    """A random DINOv2 whose patches are pooled to 2 x 2."""
    torch.manual_seed(3)
    config = tiny.vision_config("dinov2")
    return Encoder.from_config(config, [2, 4], (2, 2)).eval()


def two_images_and_none(folder: Path) -> Samples:
    """A sample with two images, and a longer one of text alone."""
    name = save_picture(folder / "a.png")
    with_images = {
        "id": "x",
        "image": [name, name],
        "conversations": turns("<image><image> Same?", "yes"),
    }
    text_only = {
        "id": "t",
        "conversations": turns("Hi", "Hello there"),
    }
    return load_records(folder, with_images, text_only)


def test_collator_pads_right_and_labels_answers(tmp_path: Path) -> None:
    samples = two_images_and_none(tmp_path)
    processor = Processor(
        tiny.image_processor(),
        tiny.tokenizer(),
        patch_size=tiny.PATCH,
    )
    collate = Collator(processor, "chat", 512, None)

    batch = collate(samples[:])

    assert batch["pixel_values"].shape[0] == 2
    # 4 x 4 patches an image, two images in the first row
    is_image = batch["input_ids"] == tiny.IMAGE_ID
    assert is_image.sum(dim=1).tolist() == [32, 0]
    lengths = batch["attention_mask"].sum(dim=1)
    for row, length in enumerate(lengths.tolist()):
        # The mask's ones are all on the left, and no padding is learned.
        assert bool(batch["attention_mask"][row, :length].all())
        padding = batch["input_ids"][row, length:]
        assert bool((padding == processor.tokenizer.pad_token_id).all())
        padding_labels = batch["labels"][row, length:]
        assert bool((padding_labels == IGNORED).all())


def test_collator_takes_pooled_features_from_a_store(tmp_path: Path) -> None:
    samples = two_images_and_none(tmp_path)
    processor = Processor(
        tiny.image_processor(),
        tiny.tokenizer(),
        patch_size=tiny.PATCH,
        token_grid=(2, 2),
    )
    store = cached_features(
        encoder,
        processor.image_processor,
        samples[0].pictures,
    )
    collate = Collator(processor, "chat", 512, store)

    batch = collate(samples[:])

    # (images, 2 x 2 tokens, width)
    assert batch["features"].patches[0].shape == (2, 4, 24)
    is_image = batch["input_ids"] == tiny.IMAGE_ID
    assert is_image.sum(dim=1).tolist() == [8, 0]


def test_collator_names_the_sample(tmp_path: Path) -> None:
    record = {
        "id": "long",
        "conversations": turns("word " * 50, "A"),
    }
    samples = load_records(tmp_path, record)
    processor = Processor(
        tiny.image_processor(),
        tiny.tokenizer(),
        patch_size=tiny.PATCH,
    )
    # Cut at 40 tokens, the sample ends before its answer.
    collate = Collator(processor, "chat", 40, None)

    with pytest.raises(LayerfuseError, match="sample long: no token is labelled"):
        collate(samples[:])
