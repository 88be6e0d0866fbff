"""Folders, files and datasets of pictures to look at an encoder with."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from layerfuse.errors import LayerfuseError
from layerfuse.look import pictures
from layerfuse.look.pictures import find_pictures, photographs


def write_picture(file: Path) -> None:
    """Write a small picture, and the folders that it stands in."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (30, 40), "red").save(file)


def test_folders_are_searched_with_their_subfolders(tmp_path: Path) -> None:
    for name in ("b.png", "a/c.JPG", "a/d/e.webp", "z.tiff"):
        write_picture(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not a picture")
    # A folder is no picture
    (tmp_path / "z.png").mkdir()

    names = []
    for picture in find_pictures(str(tmp_path)):
        names.append(os.path.relpath(picture.name, tmp_path))

    assert names == ["a/c.JPG", "a/d/e.webp", "b.png", "z.tiff"]


@pytest.mark.parametrize(
    ("limit", "number"),
    [
        (1, 1),
        # There are four
        (9, 4),
    ],
)
def test_a_limit_takes_the_first_pictures(tmp_path: Path, limit: int, number: int) -> None:
    for name in ("a.png", "b.png", "c.png", "d.png"):
        write_picture(tmp_path / name)

    assert len(find_pictures(str(tmp_path), limit=limit)) == number


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_llava_files_give_each_picture_once(tmp_path: Path, suffix: str) -> None:
    conversation = [
        {"from": "human", "value": "What?"},
        {"from": "gpt", "value": "A"},
    ]
    # One name, none, or a list of names; two of them come twice
    names_of_samples: list[Any] = [
        "b.png",
        "a.png",
        "b.png",
        [],
        ["a.png", "c.png"],
    ]
    records = []
    for names in names_of_samples:
        records.append({"image": names, "conversations": conversation})
    text = "\n".join(map(json.dumps, records))
    if suffix == "json":
        text = json.dumps(records)
    file = tmp_path / f"data.{suffix}"
    file.write_text(text)

    names = [picture.name for picture in find_pictures(str(file))]

    # In the order of their first places
    assert names == [str(tmp_path / name) for name in ("b.png", "a.png", "c.png")]
    assert len(find_pictures(str(file), limit=2)) == 2


def saved_colours(several: bool) -> datasets.Dataset:
    """A dataset with a black, a red and a white picture, a cell or a list of one in each row."""
    name = "image"
    kind: Any = datasets.Image()
    if several:
        name = "images"
        kind = datasets.List(datasets.Image())
    cells: list[Any] = []
    for colour in ("black", "red", "white"):
        image = Image.new("RGB", (8, 6), colour)
        if several:
            cells.append([image])
        else:
            cells.append(image)
    return datasets.Dataset.from_dict(
        {name: cells},
        features=datasets.Features({name: kind}),
    )


def first_reds(
    source: Path,
    split: str = "train",
    limit: int | None = None,
) -> list[int]:
    """The red of the first pixel of each picture."""
    reds = []
    for picture in find_pictures(str(source), split, limit):
        pixels = np.asarray(picture.open())
        reds.append(int(pixels[0, 0, 0]))
    return reds


@pytest.mark.parametrize("several", [False, True])
def test_saved_datasets(tmp_path: Path, several: bool) -> None:
    saved_colours(several).save_to_disk(tmp_path / "set")

    assert first_reds(tmp_path / "set") == [0, 255, 255]
    assert first_reds(tmp_path / "set", limit=2) == [0, 255]


@pytest.mark.parametrize("several", [False, True])
def test_splits_of_saved_datasets(tmp_path: Path, several: bool) -> None:
    red_and_white = saved_colours(several).select([1, 2])
    datasets.DatasetDict({"test": red_and_white}).save_to_disk(tmp_path / "split")

    assert first_reds(tmp_path / "split", "test") == [255, 255]
    with pytest.raises(LayerfuseError, match=r"no split 'train'; valid: \['test'\]"):
        find_pictures(str(tmp_path / "split"))


@pytest.fixture
def few_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The number of scenes among the default pictures, which are found without a network."""
    # A call of None fails, whoever makes it
    monkeypatch.setattr(socket.socket, "connect", None)
    monkeypatch.setenv("LAYERFUSE_HOME", str(tmp_path))
    monkeypatch.setattr(pictures, "SCENES", 5)
    return 5


@pytest.mark.usefixtures("few_scenes")
def test_photographs_come_with_a_package() -> None:
    photos = photographs()

    assert len(photos) >= 23
    for photo in photos:
        assert min(photo.open().size) > 1


def test_no_source_gives_photographs_and_scenes(few_scenes: int) -> None:
    photos = photographs()

    defaults = find_pictures(None)

    scenes = defaults[len(photos) :]
    assert defaults[: len(photos)] == photos
    assert find_pictures(None, limit=len(photos)) == photos
    assert len(scenes) == few_scenes
    # Scenes differ
    assert len({scene.digest() for scene in scenes}) == few_scenes


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty", "no images .*empty"),
        ("missing", "no folder, LLaVA JSON or dataset .*missing"),
        ("missing.json", "no such file .*missing.json"),
        ("picture.png", "no folder, LLaVA JSON or dataset .*picture.png"),
    ],
)
def test_what_holds_no_pictures(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()

    with pytest.raises(LayerfuseError, match=message):
        find_pictures(str(tmp_path / name))


def test_a_hub_id_that_is_nowhere() -> None:
    with pytest.raises(LayerfuseError, match="nobody/nothing"):
        find_pictures("nobody/nothing")


@pytest.mark.parametrize("name", ["owner/set", "owner/set-v1.5"])
def test_hub_ids(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A version in the name is no suffix of a file."""
    asked: list[tuple[str, str]] = []

    def load_dataset(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        # As the hub holds pictures: encoded, with the name of their file
        cell = {"bytes": b"1", "path": name}
        return datasets.Dataset.from_dict({"image": [cell]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    assert find_pictures(name, "a")[0].read() == b"1"
    assert asked == [(name, "a")]


def test_other_media_of_a_dataset_do_not_matter_to_a_look(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png")
    content = {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}
    dataset = datasets.Dataset.from_dict({"image": [content], "mask": [content]})
    for column in ("image", "mask"):
        dataset = dataset.cast_column(column, datasets.Image())
    dataset.save_to_disk(tmp_path / "set")

    (picture,) = find_pictures(str(tmp_path / "set"))

    assert picture.read() == content["bytes"]
