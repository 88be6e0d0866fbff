"""Samples from Hugging Face datasets, whose rows hold their pictures."""

import io
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image

from layerfuse.data.feature_store import FeatureStore, cached_features
from layerfuse.data.hub_dataset import DatasetRows
from layerfuse.errors import LayerfuseError
from layerfuse.vision.encoder import Encoder
from layerfuse.vision.picture import Picture
from tests import tiny
from tests.sample_files import load_dataset, save_picture, texts_of

pytestmark = pytest.mark.usefixtures("home")

# RGB as the decoder gives it
RED = (255, 0, 0)
LIME = (0, 255, 0)
BLUE = (0, 0, 255)
WHITE = (255, 255, 255)
GREEN = (0, 128, 0)


def encoder(layers: list[int]) -> Encoder:
    """A random DINOv2 with these layers and the fourth, whose patches are pooled to 2 x 2."""
    torch.manual_seed(3)
    config = tiny.vision_config("dinov2")
    made = Encoder.from_config(config, [*layers, 4], (2, 2))
    return made.eval()


def cached(pictures: list[Picture]) -> FeatureStore:
    """A store of the second layer's and the fourth layer's features of these pictures."""
    load_encoder = partial(encoder, [2])
    return cached_features(load_encoder, tiny.image_processor(), pictures)


def save_images(folder: Path, images: list[Image.Image]) -> None:
    """Save a dataset in which each row holds an image, a question and an answer."""
    columns: dict[str, Any] = {
        "image": images,
        "question": ["?"] * len(images),
        "answer": ["!"] * len(images),
    }
    dataset = datasets.Dataset.from_dict(columns)
    dataset = dataset.cast_column("image", datasets.Image())
    dataset.save_to_disk(folder)


def pictures_of(folder: Path) -> list[Picture]:
    """All pictures of a saved dataset, in the order of its rows."""
    pictures = []
    for sample in load_dataset(folder):
        pictures.extend(sample.pictures)
    return pictures


def test_hugging_face_datasets(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 30), "green")
    columns: dict[str, Any] = {
        "image": [image, image],
        "question": ["a?", "b?"],
        "answer": ["A", "B"],
    }
    dataset = datasets.Dataset.from_dict(columns)
    dataset = dataset.cast_column("image", datasets.Image())
    dataset.save_to_disk(tmp_path / "set")

    samples = load_dataset(tmp_path / "set", limit=1)

    assert len(samples) == 1
    decoded = samples[0].pictures[0].open()
    assert decoded.getpixel((0, 0)) == GREEN
    assert texts_of(samples[0]) == ["<image>\na?", "A"]
    assert len(load_dataset(tmp_path / "set")) == 2


@torch.no_grad()
def test_equal_ids_of_two_datasets_are_two_pictures(tmp_path: Path) -> None:
    # Row 0 of a train set and row 0 of a test set would share features if rows alone named them.
    first_pictures = []
    for colour in ("red", "blue"):
        image = Image.new("RGB", (40, 30), colour)
        save_images(tmp_path / colour, [image])
        first_pictures.extend(pictures_of(tmp_path / colour))
    red_picture, blue_picture = first_pictures

    store = cached(first_pictures)

    red = store.features([red_picture]).patches[0]
    blue = store.features([blue_picture]).patches[0]
    assert not torch.equal(red, blue)


@torch.no_grad()
def test_a_store_for_another_process_holds_no_pictures_of_a_dataset(tmp_path: Path) -> None:
    noise = []
    for _ in range(4):
        grey = Image.effect_noise((400, 300), 60)
        noise.append(grey.convert("RGB"))
    save_images(tmp_path / "set", noise)
    pictures = pictures_of(tmp_path / "set")
    num_bytes = sum(len(picture.read()) for picture in pictures)
    assert num_bytes > 100_000

    store = cached(pictures)

    sent = pickle.dumps(store)
    assert len(sent) < 10_000
    cached_patches = store.features(pictures).patches[0]
    images = [picture.open() for picture in pictures]
    inputs = tiny.image_processor()(images, return_tensors="pt")
    expected = encoder([2])(inputs["pixel_values"]).patches[0]
    torch.testing.assert_close(expected, cached_patches)
    assert not torch.equal(cached_patches[0], cached_patches[1])

    for file in (tmp_path / "home").rglob("*.safetensors"):
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + b"?")
    received: FeatureStore = pickle.loads(sent)
    # The last picture is encoded again, from the dataset's file.
    repaired_patches = received.features(pictures).patches[0]
    assert torch.equal(repaired_patches, cached_patches)
    # Without the encoder that repaired it.
    assert len(pickle.dumps(received)) < 10_000


def test_rows_of_datasets_hold_their_own_pictures(tmp_path: Path) -> None:
    """Lists of pictures, of which some are files, and rows without any."""
    files = {}
    for colour in ("red", "lime", "blue", "white"):
        files[colour] = tmp_path / f"{colour}.png"
        save_picture(files[colour], colour)
    both_bytes = [
        {"bytes": files["red"].read_bytes(), "path": None},
        {"bytes": files["lime"].read_bytes(), "path": "x"},
    ]
    file_and_bytes = [
        {"bytes": None, "path": str(files["blue"])},
        {"bytes": files["white"].read_bytes(), "path": None},
    ]
    columns: dict[str, Any] = {
        "images": [both_bytes, file_and_bytes, None],
        # A column of the other name that holds nothing hides no picture.
        "image": [None] * 3,
        "question": ["a?", "b?", "c?"],
        "answer": ["!"] * 3,
    }
    dataset = datasets.Dataset.from_dict(columns)
    dataset = dataset.cast_column("images", datasets.List(datasets.Image()))
    dataset.save_to_disk(tmp_path / "set")

    samples = load_dataset(tmp_path / "set")

    colours_by_row = []
    names = set()
    for sample in samples:
        colours = []
        for picture in sample.pictures:
            names.add(picture.name)
            decoded = picture.open()
            colours.append(decoded.getpixel((0, 0)))
        colours_by_row.append(colours)
    assert colours_by_row == [[RED, LIME], [BLUE, WHITE], []]
    # One name for two pictures would give both the same features.
    assert len(names) == 4
    assert samples[2].messages[0]["content"] == "c?"


def test_pictures_in_parts_of_messages_stay_in_the_datasets_file(tmp_path: Path) -> None:
    """Those of a whole study are known at once, and would not fit into memory."""
    rows: list[dict[str, Any]] = []
    for colour in ("red", "blue"):
        file = io.BytesIO()
        Image.new("RGB", (40, 30), colour).save(file, "PNG")
        cell = {"bytes": file.getvalue(), "path": None}
        asked = [
            {"type": "image", "image": cell, "text": None},
            {"type": "text", "image": None, "text": "what?"},
        ]
        said = [{"type": "text", "image": None, "text": colour}]
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        rows.append({"messages": messages})
    part = {
        "type": datasets.Value("string"),
        "image": datasets.Image(),
        "text": datasets.Value("string"),
    }
    message = {"role": datasets.Value("string"), "content": datasets.List(part)}
    features = datasets.Features({"messages": datasets.List(message)})
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "set")

    red, blue = pictures_of(tmp_path / "set")

    assert red.name != blue.name
    assert red.open().getpixel((0, 0)) == RED
    assert blue.open().getpixel((0, 0)) == BLUE
    # A copy for another process says where the bytes are, and does not hold them.
    assert red.read() not in pickle.dumps(red)


def test_a_cell_with_a_path_alone_is_a_file(tmp_path: Path) -> None:
    # Saving a dataset fills such cells with bytes, so that this one comes from a list.
    path = str(tmp_path / "blue.png")
    cell = {"bytes": None, "path": path}
    rows = DatasetRows([{"image": cell}], "set")

    (picture,) = rows[0]["image"]

    assert picture.name == path


def test_a_missing_split_names_the_valid_ones(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"question": ["?"], "answer": ["!"]})
    splits = datasets.DatasetDict({"dev": rows})
    splits.save_to_disk(tmp_path / "set")

    with pytest.raises(LayerfuseError, match=r"no split 'train'; valid: \['dev'\]"):
        load_dataset(tmp_path / "set")

    assert len(load_dataset(tmp_path / "set", split="dev")) == 1


def test_datasets_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    damaged = tmp_path / "set"
    damaged.mkdir()
    (damaged / "state.json").write_text("{")

    for name in ("set", "missing"):
        with pytest.raises(LayerfuseError, match=rf"cannot read the dataset .*{name}"):
            load_dataset(tmp_path / name)
