"""Pictures of every kind open as upright RGB; folders, files and datasets of them are found."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from transformers import AutoModel, CLIPImageProcessorPil, SiglipImageProcessorPil

from layerfuse.data.picture import Picture
from layerfuse.errors import LayerfuseError
from layerfuse.look import pictures
from layerfuse.look.pictures import find_pictures, photographs
from layerfuse.vision.encoder import Encoder
from tests import tiny

GRAY = np.arange(256).reshape(16, 16)
RAMP = np.arange(65536).reshape(256, 256)
RED, WHITE, LIGHT = [255, 0, 0], [255] * 3, [204] * 3
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3)).astype(np.uint8))


def palette() -> Image.Image:
    made = Image.new("P", (3, 1))
    made.putdata([0, 1, 2])
    made.putpalette([255, 0, 0, 0, 0, 255, 0, 0, 0])
    return made


def array(pixels: Any, kind: str = "u1") -> Image.Image:
    return Image.fromarray(np.array(pixels).astype(kind))


TURN = Image.Exif()
TURN[0x0112] = 6  # to be shown turned by 90 degrees clockwise: left becomes top
HALVES = [0] * 16 + [255] * 16
RGBA = [[[*RED, 255], [0, 0, 255, 0], [0, 0, 0, 51]]]
KINDS: dict[str, tuple[Image.Image, dict[str, Any], Any]] = {
    "gray.png": (array(GRAY), {}, GRAY[..., None]),
    "bits.png": (array(GRAY > 99, "?"), {}, 255 * (GRAY > 99)[..., None]),
    "16.png": (array(RAMP, "<u2"), {}, np.round(RAMP / 257)[..., None]),
    "16.tif": (array(RAMP, "<u2"), {}, np.round(RAMP / 257)[..., None]),
    "16-big-endian.tif": (array(RAMP, ">u2"), {}, np.round(RAMP / 257)[..., None]),
    "rgba.png": (array(RGBA), {}, [[RED, WHITE, LIGHT]]),
    "la.png": (array([[[9, 255], [9, 0], [0, 51]]]), {}, [[[9] * 3, WHITE, LIGHT]]),
    "bytes.png": (palette(), {"transparency": bytes([255, 0, 51])}, [[RED, WHITE, LIGHT]]),
    "index.png": (palette(), {"transparency": 1}, [[RED, WHITE, [0] * 3]]),
    "index.gif": (palette(), {"transparency": 1}, [[RED, WHITE, [0] * 3]]),
    "cmyk.jpg": (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), {}, [[RED] * 8] * 8),
    "turned.jpg": (array([HALVES] * 8), {"exif": TURN}, np.reshape(HALVES, (32, 1, 1))),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_opens_as_rgb(tmp_path: Path, name: str) -> None:
    made, options, expected = KINDS[name]
    made.save(tmp_path / name, **options)
    found = Picture(str(tmp_path / name)).open()
    rows, columns = found.height, found.width
    assert found.mode == "RGB"
    assert (rows, columns) == ((32, 8) if name == "turned.jpg" else made.size[::-1])
    expected = np.broadcast_to(expected, (rows, columns, 3))
    np.testing.assert_allclose(np.asarray(found), expected, atol=4 if name == "cmyk.jpg" else 0)


def broken(file: Path) -> None:
    if file.stem == "half":
        NOISE.save(file)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif file.stem == "comment":  # which Pillow refuses by a ValueError of its own
        info = PngInfo()
        info.add_text("comment", "x" * 2_000_000, zip=True)
        NOISE.save(file, pnginfo=info)
    elif file.stem == "float":
        array(np.ones((4, 4)), "f4").save(file)
    else:
        file.write_text("no picture" if file.stem == "text" else "")


@pytest.mark.parametrize(
    "name", ["float.tif", "half.png", "half.jpg", "text.png", "empty.png", "comment.png"]
)
def test_unreadable_pictures_are_named(tmp_path: Path, name: str) -> None:
    broken(tmp_path / name)
    with pytest.raises(LayerfuseError, match=rf"cannot read the image .*{name}"):
        Picture(str(tmp_path / name)).open()


@pytest.mark.parametrize("size", [(20000, 50), (50, 20000), (201, 1)])
def test_too_thin_pictures_are_named_with_their_size(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("L", size).save(tmp_path / "thin.png")
    with pytest.raises(LayerfuseError, match=rf"thin\.png has {size[0]} x {size[1]} pixels"):
        Picture(str(tmp_path / "thin.png")).open()


CROP: dict[str, Any] = {
    "size": {"shortest_edge": tiny.SIZE},
    "crop_size": {"height": tiny.SIZE, "width": tiny.SIZE},
}


@torch.no_grad()
@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2"])
def test_extreme_pictures_reach_an_encoder(tmp_path: Path, name: str) -> None:
    """Sides of 1 and 3 pixels are not taken for channels."""
    process: Any = {
        "clip": CLIPImageProcessorPil(**CROP),
        "siglip": SiglipImageProcessorPil(size=CROP["crop_size"]),
        "dinov2": tiny.image_processor(),
    }[name]
    for k, size in enumerate([(1, 1), (3, 3), (3, 40), (40, 3), (1, 200), (20000, 200)]):
        Image.new("RGB", size, "red").save(tmp_path / f"{k}.png")
    images = [picture.open() for picture in find_pictures(str(tmp_path))]
    pixels = process(images, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (6, 3, tiny.SIZE, tiny.SIZE)
    assert (pixels == pixels[:1, :, :1, :1]).all()
    assert (pixels[:, 0] > pixels[:, 1]).all()
    tower: Any = AutoModel.from_config(tiny.vision_config(name))
    found = Encoder(tower, range(5)).eval()(pixels)
    assert all(x.isfinite().all() and x.shape == (6, 16, 24) for x in found.patches)


def test_folders(tmp_path: Path) -> None:
    for name in ("b.png", "a/c.JPG", "a/d/e.webp", "z.tiff"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        NOISE.save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not a picture")
    names = [os.path.relpath(p.name, tmp_path) for p in find_pictures(str(tmp_path))]
    assert names == ["a/c.JPG", "a/d/e.webp", "b.png", "z.tiff"]
    assert [len(find_pictures(str(tmp_path), limit=k)) for k in (1, 9)] == [1, 4]
    (tmp_path / "z.png").mkdir()
    assert len(find_pictures(str(tmp_path))) == 4, "a folder is no picture"


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_llava_files_give_each_picture_once(tmp_path: Path, suffix: str) -> None:
    talk = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A"}]
    shown: list[Any] = ["b.png", "a.png", "b.png", [], ["a.png", "c.png"]]
    records = [{"image": names, "conversations": talk} for names in shown]
    text = json.dumps(records) if suffix == "json" else "\n".join(map(json.dumps, records))
    (tmp_path / f"data.{suffix}").write_text(text)
    expected = [str(tmp_path / name) for name in ("b.png", "a.png", "c.png")]
    assert [p.name for p in find_pictures(str(tmp_path / f"data.{suffix}"))] == expected
    assert len(find_pictures(str(tmp_path / f"data.{suffix}"), limit=2)) == 2


@pytest.mark.parametrize("several", [False, True])
def test_saved_datasets(tmp_path: Path, several: bool) -> None:
    images = [Image.new("RGB", (8, 6), colour) for colour in ("black", "red", "white")]
    kind: Any = datasets.List(datasets.Image()) if several else datasets.Image()
    name, cells = ("images", [[x] for x in images]) if several else ("image", images)
    made = datasets.Dataset.from_dict({name: cells}, datasets.Features({name: kind}))
    made.save_to_disk(tmp_path / "set")
    datasets.DatasetDict({"test": made.select([1, 2])}).save_to_disk(tmp_path / "split")
    for found, expected in (
        (find_pictures(str(tmp_path / "set")), [0, 255, 255]),
        (find_pictures(str(tmp_path / "set"), limit=2), [0, 255]),
        (find_pictures(str(tmp_path / "split"), "test"), [255, 255]),
    ):
        assert [np.asarray(p.open())[0, 0, 0] for p in found] == expected
    with pytest.raises(LayerfuseError, match=r"no split 'train'; valid: \['test'\]"):
        find_pictures(str(tmp_path / "split"))


def test_no_source_gives_photographs_and_scenes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket.socket, "connect", None)
    monkeypatch.setenv("LAYERFUSE_HOME", str(tmp_path))
    monkeypatch.setattr(pictures, "SCENES", 5)
    photos, found = photographs(), find_pictures(None)
    assert len(photos) >= 23
    assert all(min(p.open().size) > 1 for p in photos)
    assert found[: len(photos)] == find_pictures(None, limit=len(photos)) == photos
    assert len({p.digest() for p in found[len(photos) :]}) == len(found) - len(photos) == 5


def test_what_holds_no_pictures(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source, message in {
        "empty": "no images .*empty",
        "missing": "no folder, LLaVA JSON or dataset .*missing",
        "missing.json": "no such file .*missing.json",
        "picture.png": "no folder, LLaVA JSON or dataset .*picture.png",
    }.items():
        with pytest.raises(LayerfuseError, match=message):
            find_pictures(str(tmp_path / source))
    with pytest.raises(LayerfuseError, match="nobody/nothing"):
        find_pictures("nobody/nothing")


@pytest.mark.parametrize("name", ["owner/set", "owner/set-v1.5"])
def test_hub_ids(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    made = datasets.Dataset.from_dict({"image": [{"bytes": b"1", "path": name}]})
    monkeypatch.setattr(
        datasets, "load_dataset", lambda given, split: {(name, "a"): made}[given, split]
    )
    assert find_pictures(name, "a")[0].read() == b"1"
