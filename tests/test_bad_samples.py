"""One bad sample never stops a study unnamed: it is a fault with its file, its index and its id."""

import json
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from layerfuse.data.picture import Picture
from layerfuse.data.sources import Samples, faults, image_files, load
from layerfuse.errors import LayerfuseError
from layerfuse.recipe.schema import Data

# a red and a green half, so that turning it shows
STORED = np.zeros((8, 16, 3), np.uint8)
STORED[:, :8, 0] = 255
STORED[:, 8:, 1] = 255


def turns(question: Any = "<image>\nColour?", answer: Any = "red") -> list[dict[str, Any]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def record(**changes: Any) -> dict[str, Any]:
    return {"id": "q", "image": "a.png", "conversations": turns(), **changes}


def from_json(folder: Path, *records: Any) -> Samples:
    Image.fromarray(STORED).save(folder / "a.png")
    (folder / "d.json").write_text(json.dumps(records))
    return load(Data(path=str(folder / "d.json")))


BAD_RECORDS = [
    (None, "sample 1: a NoneType, not a mapping"),
    ([record()], "sample 1: a list, not a mapping"),
    ("text", "sample 1: a str, not a mapping"),
    (record(image=0), "sample q: an image is a int, not a path"),
    (record(image=False), "sample q: an image is a bool, not a path"),
    (record(image={}), "sample q: an image is a dict, not a path"),
    (record(image=["a.png", None]), "sample q: an image is a NoneType, not a path"),
    (record(image="a\0.png"), "sample q: cannot read the image"),
    (record(image="x" * 5000), "sample q: cannot read the image"),
    (record(image="."), "sample q: cannot read the image"),
    (record(image="\ud83d.png"), "sample q: the path of an image holds half a surrogate pair"),
    (record(conversations=7), "sample q: its conversation is a int, not a list of turns"),
    (record(conversations={"from": "human"}), "sample q: its conversation is a dict, not a list"),
    (record(conversations="hello"), "sample q: its conversation is a str, not a list of turns"),
    (record(conversations=0), "sample q: no conversations; its keys are"),
    (record(conversations=[1, 2]), "sample q: cannot read the turn 1; roles"),
    (record(conversations=turns(answer=None)), "sample q: cannot read the turn {'from': 'gpt'"),
    (record(conversations=turns(answer=["red"])), "sample q: cannot read the turn"),
    (record(conversations=turns("<image> \ud83d?")), r"a turn of the user holds half .*\\ud83d as"),
    (record(conversations=turns(answer="\ude00")), r"a turn of the assistant holds .*character 1,"),
    (record(id="\ud83d"), r"sample \\ud83d: id holds half a surrogate pair"),
    (record(families=3), "sample q: families is a int, not a list of one for each answer"),
    (record(families="c"), "sample q: families is a str, not a list of one for each answer"),
    (record(categories={"a": 1}), "sample q: categories is a dict, not a list"),
    (record(families=["\ud83d"]), "sample q: families holds half a surrogate pair"),
    (record(novel="false"), "sample q: novel is 'false'; valid: true, false"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_RECORDS)
def test_records_of_any_shape(tmp_path: Path, bad: Any, message: str) -> None:
    """Named with file, index and id; all others are read."""
    samples = from_json(tmp_path, record(id="before"), bad, record(id=None))
    ((index, (sample_id, reason)),) = faults(samples).items()
    assert index == 1
    assert re.search(message, reason)
    assert reason.endswith(f"({tmp_path / 'd.json'}, index 1)")
    assert sample_id == re.search("sample (.*?):", reason)[1]  # pyright: ignore
    reason.encode()  # can be printed
    assert [sample.id for sample in samples.without({1})] == ["before", "2"]


def test_whole_surrogate_pairs_are_text(tmp_path: Path) -> None:
    samples = from_json(tmp_path, record(conversations=turns(answer="\U0001f600")))
    assert "\\ud83d\\ude00" in (tmp_path / "d.json").read_text()
    assert samples[0].messages[-1]["content"] == "😀"


def test_every_bad_record_is_counted_in_every_source(tmp_path: Path) -> None:
    """The same records in a table beside the pictures."""
    rows = [bad for bad, _ in BAD_RECORDS]
    good = {"file_name": "a.png", "text": "red"}
    assert len(faults(from_json(tmp_path, *rows, record()))) == len(rows)
    lines = [json.dumps(row) for row in [good, *rows, good]]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    samples = load(Data(path=str(tmp_path)))
    assert list(faults(samples)) == list(range(1, len(rows) + 1))


def test_captions_that_are_missing_or_odd_are_named(tmp_path: Path) -> None:
    for name in "abcd":
        Image.fromarray(STORED).save(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("red")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfer\0")
    (tmp_path / "d.txt").write_text(" \n")
    found = faults(load(Data(path=str(tmp_path))))
    assert {index: sample_id for index, (sample_id, _) in found.items()} == {
        1: "b.png",
        2: "c.png",
        3: "d.png",
    }
    assert f"sample b.png: no caption file {tmp_path / 'b.txt'} ({tmp_path}, in" in found[1][1]
    assert f"sample c.png: cannot read {tmp_path / 'c.txt'}: its byte order mark" in found[2][1]
    assert "sample d.png: no answer to learn from" in found[3][1]


def test_hidden_files_and_those_of_macos_are_no_pictures(tmp_path: Path) -> None:
    folder = tmp_path / ".data"
    for name in ("a.png", ".thumbnails/a.png", "b/.cache/a.png", "b/c.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(STORED).save(folder / name)
        (folder / name).with_suffix(".txt").write_text("red")
    (folder / "._a.png").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    (folder / "b" / "._c.png").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    (folder / "folder.png").mkdir()
    (folder / "gone.png").symlink_to("nothing")
    (folder / "gone.txt").write_text("red")
    assert image_files(folder) == [folder / name for name in ("a.png", "b/c.png", "gone.png")]
    samples = load(Data(path=str(folder)))
    assert [sample.id for sample in samples] == ["a.png", "b/c.png", "gone.png"]
    ((index, (_, reason)),) = faults(samples).items()
    assert index == 2
    assert "no image file" in reason


def test_file_names_that_are_no_text_are_named(tmp_path: Path) -> None:
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    for stem in ("a", name):
        Image.fromarray(STORED).save(tmp_path / f"{stem}.png")
        (tmp_path / f"{stem}.txt").write_text("red")
    ((sample_id, reason),) = faults(load(Data(path=str(tmp_path)))).values()
    assert sample_id == r"caf\udce9.png"
    assert "id holds half a surrogate pair" in reason


def test_rows_of_a_dataset_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    """A picture of a column that the library decodes, and cells that hold nothing."""
    Image.fromarray(STORED).save(tmp_path / "a.png")
    good = {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}
    bad = {"bytes": b"no picture", "path": None}
    rows: dict[str, Any] = {"mask": [good, bad, good], "answer": ["A"] * 3}
    rows["image"] = [good, good, {"bytes": None, "path": "gone.png"}]
    made = datasets.Dataset.from_dict(rows).cast_column("mask", datasets.Image())
    made.save_to_disk(tmp_path / "set")
    samples = load(Data(path=str(tmp_path / "set")))
    reasons = [reason for _, reason in faults(samples).values()]
    assert list(faults(samples)) == [1, 2]
    assert "sample 1: the row cannot be read: cannot identify image file" in reasons[0]
    assert reasons[0].endswith("set:train, index 1)")
    assert "sample 2: no image file gone.png" in reasons[1]


def jpeg_with(tags: bytes, folder: Path) -> Picture:
    """A JPEG whose EXIF holds some bytes."""
    exif = b"Exif\0\0" + tags
    # every pixel with its own colour, so that the two halves keep theirs
    Image.fromarray(STORED).save(folder / "photo.jpg", exif=exif, quality=100, subsampling=0)
    return Picture(str(folder / "photo.jpg"))


def tag(number: int, kind: int, count: int, value: bytes) -> bytes:
    return struct.pack("<HHI", number, kind, count) + value.ljust(4, b"\0")


def directory(*tags: bytes) -> bytes:
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + b"".join(tags) + bytes(4)


ORIENTATION = tag(0x112, 3, 1, b"\6")
# The first five make Pillow fail where it writes an EXIF again, each with another error; the sixth
# makes it read no tag behind it.
ODD_TAGS = {
    "text in a number": tag(0x11A, 2, 2, b"x"),
    "a number out of range": tag(0x11A, 6, 3, b"\x8e\x11{\xff"),
    "bytes in a number": tag(0x128, 1, 1, b"v"),
    "a number in a text": tag(0x10F, 11, 1, b"\xa2}\xa1\xbd"),
    "a directory before the start": tag(0x8769, 9, 1, b"..\2\xf0"),
    "a rational without bytes": tag(0x11B, 5, 1, struct.pack("<I", 9999)),
    "an unknown type": tag(0x9999, 200, 1, b"x"),
    "too many values": tag(0x132, 3, 2**31, b"x"),
}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("odd", ODD_TAGS.values(), ids=ODD_TAGS)
def test_photos_with_odd_tags_are_turned(tmp_path: Path, odd: bytes) -> None:
    """As the orientation says, whatever the tags beside it hold."""
    expected = np.rot90(STORED, -1)
    for tags in (directory(ORIENTATION, odd), directory(odd, ORIENTATION)):
        picture = jpeg_with(tags, tmp_path)
        assert picture.fault() is None
        shown = picture.open()
        assert shown.size == (8, 16)
        assert np.abs(np.asarray(shown, np.int64) - expected).max() < 40
        # Nobody turns it once more.
        assert not shown.getexif()


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize(
    "tags",
    [
        b"",
        b"II",
        b"no tags at all",
        directory(tag(0x112, 3, 1, b"\x09")),
        directory(tag(0x112, 2, 2, b"6")),
        directory(tag(0x112, 5, 1, b"\xff\xff")),
        directory(tag(0x112, 7, 1, b"\6")),
        directory(ORIENTATION)[:12],
    ],
)
def test_photos_without_a_readable_orientation_are_shown_as_stored(
    tmp_path: Path, tags: bytes
) -> None:
    shown = jpeg_with(tags, tmp_path).open()
    assert shown.size == (16, 8)
    assert np.abs(np.asarray(shown, np.int64) - STORED).max() < 40


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation(tmp_path: Path, orientation: int) -> None:
    """In formats that hold it in an EXIF, behind the pixels, or in a tag of their own."""
    naive = {
        1: STORED,
        2: STORED[:, ::-1],
        3: STORED[::-1, ::-1],
        4: STORED[::-1],
        5: STORED.transpose(1, 0, 2),
        6: STORED.transpose(1, 0, 2)[:, ::-1],
        7: STORED[::-1, ::-1].transpose(1, 0, 2),
        8: STORED.transpose(1, 0, 2)[::-1],
    }
    exif = Image.Exif()
    exif[0x112] = orientation
    for suffix in ("png", "webp", "tif"):
        file = tmp_path / f"a.{suffix}"
        Image.fromarray(STORED).save(file, exif=exif, lossless=True)
        shown = np.asarray(Picture(str(file)).open())
        assert np.array_equal(shown, naive[orientation]), suffix


def chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def test_decompression_bombs_are_named(tmp_path: Path) -> None:
    """A few bytes that become gigabytes: of pixels, or of text."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    pixels = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))
    small = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    text = small + chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**7)))
    text += chunk(b"IDAT", zlib.compress(bytes(2)))
    records = []
    for name, chunks in {"pixels": pixels, "text": text}.items():
        content = b"\x89PNG\r\n\x1a\n" + chunks + chunk(b"IEND", b"")
        (tmp_path / f"{name}.png").write_bytes(content)
        records.append(record(id=name, image=f"{name}.png"))
        with pytest.raises(LayerfuseError, match=rf"cannot read the image .*{name}\.png"):
            Picture(str(tmp_path / f"{name}.png")).open()
    found = faults(from_json(tmp_path, *records, record()))
    assert [sample_id for sample_id, _ in found.values()] == ["pixels", "text"]


def test_thin_pictures_are_found_by_their_header(tmp_path: Path) -> None:
    Image.new("RGB", (1, 201)).save(tmp_path / "thin.png")
    ((_, reason),) = faults(from_json(tmp_path, record(image="thin.png"))).values()
    assert "1 x 201 pixels" in reason


def test_readers_may_fail_in_any_way() -> None:
    """A dataset's library raises errors of its own."""

    def fail() -> bytes:
        raise KeyError("column")

    for reader in (fail, lambda: None, lambda: "text"):
        picture = Picture("set#0.0", reader)  # pyright: ignore
        with pytest.raises(LayerfuseError, match=r"cannot read the image set#0\.0"):
            picture.open()
