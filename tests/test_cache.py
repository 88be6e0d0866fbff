"""The feature cache: addressed by content, each picture encoded once, listed and cleared."""

import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from layerfuse.data import feature_shards as shards
from layerfuse.data import feature_store
from layerfuse.data.collate import Collator
from layerfuse.data.feature_store import cached_features, digests_of
from layerfuse.errors import LayerfuseError
from layerfuse.vision.encoder import Encoder
from layerfuse.vision.picture import Picture
from layerfuse_cli.app import app
from tests import tiny
from tests.counting_encoder import (
    CountingEncoder,
    change_last_byte,
    encode,
    load_encoder,
    make_pictures,
    pictures_by_layer,
    same,
    shard_files,
)

pytestmark = pytest.mark.usefixtures("home")


@torch.no_grad()
def test_what_is_read_is_what_the_encoder_says(tmp_path: Path) -> None:
    pictures = make_pictures(tmp_path)
    # One picture twice: it is encoded once.
    store = encode([*pictures, pictures[0]])
    images = [picture.open() for picture in pictures]
    inputs = tiny.image_processor()(images, return_tensors="pt")
    encoded = load_encoder([1, 3])(inputs["pixel_values"])
    expected = encoded.take(torch.tensor([4, 0, 4]))

    features = store.features([pictures[4], pictures[0], pictures[4]])

    assert features.grid == (2, 2)
    assert features.layers == (1, 3)
    tensors = features.patches + features.summary
    expected_tensors = expected.patches + expected.summary
    for tensor, expected_tensor in zip(tensors, expected_tensors, strict=True):
        torch.testing.assert_close(tensor, expected_tensor)
    last_layer = store.restrict([3])
    assert last_layer.features([pictures[1]]).layers == (3,)


def test_only_what_is_missing_is_encoded(tmp_path: Path) -> None:
    pictures = make_pictures(tmp_path)
    encode(pictures, (1, 2))
    assert CountingEncoder.seen == 10

    encode(pictures, (2,))
    assert CountingEncoder.seen == 0

    # Each layer has its own pictures.
    encode(pictures[:4], (1, 3))
    assert CountingEncoder.seen == 4
    encode(pictures, (1, 3))
    assert CountingEncoder.seen == 6

    # Other content under the same name: its batch of two is encoded.
    Image.new("RGB", (40, 30), "white").save(pictures[0].name)
    encode(pictures, (1, 3))
    assert CountingEncoder.seen == 2

    # The same content under another name.
    copy = tmp_path / "copy.png"
    copy.write_bytes(pictures[3].read())
    encode([*pictures, Picture(str(copy))], (1, 3))
    assert CountingEncoder.seen == 0


@pytest.mark.parametrize("change", ["weights", "preprocessing", "dtype", "grid"])
def test_another_encoder_or_preprocessing_is_another_address(tmp_path: Path, change: str) -> None:
    # Two settings at one address would mix their features in one study.
    pictures = make_pictures(tmp_path, 2)
    encode(pictures)

    def changed_encoder() -> Encoder:
        encoder = load_encoder([1, 3])
        if change == "weights":
            blocks = encoder.family.blocks(encoder.tower)
            first_weights = next(iter(blocks.parameters()))
            with torch.no_grad():
                first_weights.mul_(1.001)
        elif change == "grid":
            encoder.token_grid = (1, 2)
        elif change == "dtype":
            encoder = encoder.bfloat16()
        return encoder

    image_processor = tiny.image_processor()
    if change == "preprocessing":
        image_processor.image_mean = [0.4, 0.4, 0.4]
    CountingEncoder.seen = 0
    cached_features(changed_encoder, image_processor, pictures)

    assert CountingEncoder.seen == 2


def test_stopped_and_continued_makes_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a stopped pass has written is kept, and the rest is as if nobody had stopped it.
    pictures = make_pictures(tmp_path)
    expected = encode(pictures).features(pictures)
    other_home = tmp_path / "other"
    monkeypatch.setenv("LAYERFUSE_HOME", str(other_home))
    # A shard after every batch
    monkeypatch.setattr(feature_store, "SHARD_SECONDS", 0)

    with pytest.raises(KeyboardInterrupt):
        encode(pictures, stop_after=3)
    # Three batches in each of two layers
    assert len(shard_files(other_home)) == 2 * 3
    features = encode(pictures).features(pictures)

    assert CountingEncoder.seen == 4
    assert same(features, expected)


def test_progress_is_told_of_every_picture_and_batch(tmp_path: Path) -> None:
    pictures = make_pictures(tmp_path, 4)
    calls: list[tuple[str, int, int]] = []

    def record_progress(phase: str, done: int, total: int, note: str = "") -> None:
        calls.append((phase, done, total))

    encode(pictures, progress=record_progress)
    assert calls == [
        ("encoding pictures", 1, 2),
        ("encoding pictures", 2, 2),
    ]

    calls.clear()
    digests_of(pictures[:2], record_progress)
    assert calls == [
        ("reading pictures", 1, 2),
        ("reading pictures", 2, 2),
    ]


def test_pictures_that_cannot_be_decoded_stop_or_are_named(tmp_path: Path) -> None:
    pictures = make_pictures(tmp_path, 5)
    name = pictures[3].name
    whole = pictures[3].read()
    half = whole[: len(whole) // 2]
    Path(name).write_bytes(half)

    store = encode(pictures)

    assert list(store.bad) == [name]
    assert "cannot read the image" in store.bad[name]
    good = [picture for picture in pictures if picture.name not in store.bad]
    assert store.features(good).patches[0].shape[0] == 4
    assert pictures_by_layer() == [4, 4]


def test_a_batch_of_which_only_bad_pictures_are_missing_is_not_encoded(tmp_path: Path) -> None:
    # A picture that nobody can decode stays missing: its batch would be encoded in every study.
    pictures = make_pictures(tmp_path, 5)
    Path(pictures[0].name).write_bytes(b"no picture")
    encode(pictures)

    store = encode(pictures)

    assert list(store.bad) == [pictures[0].name]
    assert CountingEncoder.seen == 0
    # Nor does a batch of text alone take it for its blank picture.
    processor = tiny.processor(tiny.model("single"))
    collator = Collator(processor, "chat", 99, store)
    assert collator.blank_picture() == pictures[1]


def run_cache(*arguments: str) -> Result:
    """What `layerfuse cache` with these arguments says."""
    return CliRunner().invoke(app, ["cache", *arguments])


def test_list_and_clear(tmp_path: Path) -> None:
    pictures = make_pictures(tmp_path)
    assert "empty" in run_cache("list").output

    encode(pictures)
    listed = run_cache("list").output
    assert "dinov2" in listed
    # A line for each layer
    assert listed.count("float32") == 2

    # Nothing is removed by a name that nothing has.
    assert run_cache("clear", "nonsense").exit_code == 2
    assert pictures_by_layer() == [10, 10]
    first_name = next(iter(shards.layer_folders()))
    assert run_cache("clear", first_name).exit_code == 0
    assert pictures_by_layer() == [10]
    assert run_cache("clear").exit_code == 0
    assert pictures_by_layer() == []


def test_verify_drops_what_is_damaged(tmp_path: Path, home: Path) -> None:
    pictures = make_pictures(tmp_path)
    encode(pictures)
    assert "nothing is damaged" in run_cache("verify").output

    first_shard = shard_files(home)[0]
    change_last_byte(first_shard)
    first_shard.with_suffix(".tmp").write_bytes(b"left by a killed writer")
    result = run_cache("verify")
    assert result.exit_code == 1
    # The line may be broken anywhere between two words.
    words = " ".join(result.output.split())
    assert "1 damaged, 9 kept" in words

    assert run_cache("verify").exit_code == 0
    assert not list(home.rglob("*.tmp"))
    # The batch of what was dropped
    encode(pictures)
    assert CountingEncoder.seen == 2


def test_the_cache_folder_may_be_unwritable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("LAYERFUSE_HOME", str(file))

    with pytest.raises(LayerfuseError, match=r"cannot make the cache folder .*file"):
        encode(make_pictures(tmp_path))

    assert os.listdir(tmp_path).count("file") == 1
