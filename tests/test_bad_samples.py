"""One bad sample never stops a study unnamed: it is a fault with its file, its index and its id."""

import re
import struct
import zlib
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from layerfuse.data.picture_folder import image_files
from layerfuse.data.sources import faults
from layerfuse.errors import LayerfuseError
from layerfuse.vision.picture import Picture
from tests.sample_files import (
    ids_of,
    last_texts,
    load_path,
    load_records,
    only_fault,
    save_lines,
    save_picture,
)


def talk(question: Any = "<image>\nColour?", answer: Any = "red") -> list[dict[str, Any]]:
    """One question and its answer, which may be anything but texts."""
    return [
        {"from": "human", "value": question},
        {"from": "gpt", "value": answer},
    ]


def record(**changes: Any) -> dict[str, Any]:
    """A good record about `a.png`, or a bad one by these changes."""
    return {
        "id": "q",
        "image": "a.png",
        "conversations": talk(),
        **changes,
    }


# Halves of surrogate pairs stand for half an emoji, which JSON can write and UTF-8 cannot.
BAD_RECORDS = [
    # What is no record
    (None, "sample 1: a NoneType, not a mapping"),
    ([record()], "sample 1: a list, not a mapping"),
    ("text", "sample 1: a str, not a mapping"),
    # Images
    (record(image=0), "sample q: an image is a int, not a path"),
    # False is falsy, and could pass for no image.
    (record(image=False), "sample q: an image is a bool, not a path"),
    (record(image={}), "sample q: an image is a dict, not a path"),
    (record(image=["a.png", None]), "sample q: an image is a NoneType, not a path"),
    (record(image="a\0.png"), "sample q: cannot read the image"),
    (record(image="x" * 5000), "sample q: cannot read the image"),
    (record(image="."), "sample q: cannot read the image"),
    (record(image="\ud83d.png"), "sample q: the path of an image holds half a surrogate pair"),
    # Conversations
    (record(conversations=7), "sample q: its conversation is a int, not a list of turns"),
    (
        record(conversations={"from": "human"}),
        "sample q: its conversation is a dict, not a list",
    ),
    # A text has a length and parts, and could pass for a list.
    (record(conversations="hello"), "sample q: its conversation is a str, not a list of turns"),
    (record(conversations=0), "sample q: no conversations; its keys are"),
    (record(conversations=[1, 2]), "sample q: cannot read the turn 1; roles"),
    (
        record(conversations=talk(answer=None)),
        "sample q: cannot read the turn {'from': 'gpt'",
    ),
    (record(conversations=talk(answer=["red"])), "sample q: cannot read the turn"),
    (
        record(conversations=talk("<image> \ud83d?")),
        r"a turn of the user holds half .*\\ud83d as",
    ),
    (
        record(conversations=talk(answer="\ude00")),
        r"a turn of the assistant holds .*character 1,",
    ),
    # What else a record says
    (record(id="\ud83d"), r"sample \\ud83d: id holds half a surrogate pair"),
    (record(families=3), "sample q: families is a int, not a list of one for each answer"),
    (record(families=[None]), "sample q: families holds None; valid: a text for each answer"),
    (record(families=[float("nan")]), "sample q: families holds nan"),
    (record(families=[{"a": 1}]), "sample q: families holds {'a': 1}"),
    (record(categories=[" "]), "sample q: categories holds ' '"),
    (record(id={"row": 1}), "sample 1: its id is {'row': 1}; valid: a text or a number"),
    (record(id=[1]), r"sample 1: its id is \[1\]"),
    (record(id=float("nan")), "sample 1: its id is nan"),
    (record(image={"bytes": "iVBORw", "path": None}), "sample q: an image is a dict, not a path"),
    (record(id=True), "sample 1: its id is True"),
    (record(families="c"), "sample q: families is a str, not a list of one for each answer"),
    (record(categories={"a": 1}), "sample q: categories is a dict, not a list"),
    (record(families=["\ud83d"]), "sample q: families holds half a surrogate pair"),
    # A text that is not empty is truthy, whatever it says.
    (record(novel="false"), "sample q: novel is 'false'; valid: true, false"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_RECORDS)
def test_records_of_any_shape(tmp_path: Path, bad: Any, message: str) -> None:
    """Named with file, index and id; all others are read."""
    save_picture(tmp_path / "a.png")
    before = record(id="before")
    # Without an id it is called by its index.
    after = record(id=None)

    samples = load_records(tmp_path, before, bad, after)

    fault = only_fault(samples)
    assert fault.index == 1
    assert re.search(message, fault.reason)
    file = tmp_path / "data.json"
    assert fault.reason.endswith(f"({file}, index 1)")
    named = re.search("sample (.*?):", fault.reason)
    assert named is not None
    assert fault.sample_id == named[1]
    # It can be printed.
    fault.reason.encode()
    good_samples = samples.without({1})
    assert [sample.id for sample in good_samples] == ["before", "2"]


def test_whole_surrogate_pairs_are_text(tmp_path: Path) -> None:
    # Many writers of JSON escape an emoji as two halves: together they are good text.
    save_picture(tmp_path / "a.png")
    smiling = record(conversations=talk(answer="\U0001f600"))

    samples = load_records(tmp_path, smiling)

    written = (tmp_path / "data.json").read_text()
    assert "\\ud83d\\ude00" in written
    assert last_texts(samples) == ["😀"]


def test_every_bad_record_is_counted_in_every_source(tmp_path: Path) -> None:
    """The same records in a LLaVA file, and in a table beside the pictures."""
    save_picture(tmp_path / "a.png")
    bad_records = [bad for bad, _ in BAD_RECORDS]
    num_bad = len(bad_records)

    samples = load_records(tmp_path, *bad_records, record())
    assert len(faults(samples)) == num_bad

    good_row = {"file_name": "a.png", "text": "red"}
    save_lines(tmp_path / "metadata.jsonl", good_row, *bad_records, good_row)
    samples = load_path(tmp_path)
    # All but the first row and the last
    assert list(faults(samples)) == list(range(1, num_bad + 1))


def test_captions_that_are_missing_or_odd_are_named(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        save_picture(tmp_path / f"{name}.png")
    # b.png has no caption, c.txt is UTF-16, d.txt holds nothing to learn.
    (tmp_path / "a.txt").write_text("red")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfer\0")
    (tmp_path / "d.txt").write_text(" \n")

    samples = load_path(tmp_path)

    by_index = faults(samples)
    assert list(by_index) == [1, 2, 3]
    missing_id, missing_reason = by_index[1]
    assert missing_id == "b.png"
    missing_file = tmp_path / "b.txt"
    assert f"sample b.png: no caption file {missing_file} ({tmp_path}, in" in missing_reason
    utf16_id, utf16_reason = by_index[2]
    assert utf16_id == "c.png"
    utf16_file = tmp_path / "c.txt"
    assert f"sample c.png: cannot read {utf16_file}: its byte order mark" in utf16_reason
    empty_id, empty_reason = by_index[3]
    assert empty_id == "d.png"
    assert "sample d.png: no answer to learn from" in empty_reason


# What macOS keeps beside every file on a foreign disk, under the file's name behind "._"
APPLE_DOUBLE = b"\0\5\x16\7\0\2\0\0Mac OS X"


def test_hidden_files_and_those_of_macos_are_no_pictures(tmp_path: Path) -> None:
    # The folder of the data may be hidden itself.
    folder = tmp_path / ".data"
    names = [
        "a.png",
        ".thumbnails/a.png",
        "b/.cache/a.png",
        "b/c.png",
    ]
    for name in names:
        file = folder / name
        save_picture(file)
        file.with_suffix(".txt").write_text("red")
    (folder / "._a.png").write_bytes(APPLE_DOUBLE)
    (folder / "b" / "._c.png").write_bytes(APPLE_DOUBLE)
    (folder / "folder.png").mkdir()
    # A link to nothing is a picture that is missing, not one that was never meant.
    (folder / "gone.png").symlink_to("nothing")
    (folder / "gone.txt").write_text("red")

    expected = ["a.png", "b/c.png", "gone.png"]
    assert image_files(folder) == [folder / name for name in expected]
    samples = load_path(folder)
    assert ids_of(samples) == expected
    fault = only_fault(samples)
    assert fault.index == 2
    assert "no image file" in fault.reason


def test_captions_without_a_picture_are_named(tmp_path: Path) -> None:
    save_picture(tmp_path / "a.png")
    # a.png has a caption, b is of a format that is not read, the picture of c is lost.
    for name in ("a.txt", "b.heic", "b.txt", "c.txt", "README.txt", "notes.pdf"):
        (tmp_path / name).write_text("red")

    samples = load_path(tmp_path)

    by_index = faults(samples)
    assert ids_of(samples.without(by_index)) == ["a.png"]
    reasons = dict(by_index.values())
    assert list(reasons) == ["b.txt", "c.txt"]
    assert "sample b.txt: a caption without a picture" in reasons["b.txt"]
    assert "; b.heic is none" in reasons["b.txt"]
    assert "sample c.txt: a caption without a picture" in reasons["c.txt"]


@pytest.mark.parametrize(
    "name", ["metadata.csv", "metadata.json", "metadata.parquet", "Metadata.JSONL", "metadata.tsv"]
)
@pytest.mark.parametrize("folder", [".", "train"])
def test_tables_that_nobody_reads_are_named(tmp_path: Path, name: str, folder: str) -> None:
    for stem in ("a", "train/b"):
        save_picture(tmp_path / f"{stem}.png")
        (tmp_path / f"{stem}.txt").write_text("red")
    # A folder is no table.
    (tmp_path / "metadata.d").mkdir()
    (tmp_path / folder / name).write_text("")

    with pytest.raises(LayerfuseError, match=rf"{name}, (a table that|which) nobody"):
        load_path(tmp_path)


def test_two_tables_are_named(tmp_path: Path) -> None:
    for name in ("metadata.jsonl", "metadata.csv"):
        (tmp_path / name).write_text("")

    with pytest.raises(
        LayerfuseError, match=r"metadata\.csv and metadata\.jsonl, of which only one"
    ):
        load_path(tmp_path)


def test_file_names_that_are_no_text_are_named(tmp_path: Path) -> None:
    # Linux takes any bytes for a name; Python reads those that are not UTF-8 as surrogates.
    latin_stem = b"caf\xe9".decode("utf-8", "surrogateescape")
    for stem in ("a", latin_stem):
        save_picture(tmp_path / f"{stem}.png")
        (tmp_path / f"{stem}.txt").write_text("red")

    samples = load_path(tmp_path)

    fault = only_fault(samples)
    assert fault.sample_id == r"caf\udce9.png"
    assert "id holds half a surrogate pair" in fault.reason


def test_cells_of_a_dataset_that_hold_no_file_are_named(tmp_path: Path) -> None:
    save_picture(tmp_path / "a.png")
    good = {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}
    gone = {"bytes": None, "path": "gone.png"}
    columns = {"answer": ["A", "A"], "image": [good, gone]}
    # As plain columns: the library would read the files of a column of images when it saves them.
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "set")

    ((index, (_, reason)),) = faults(load_path(tmp_path / "set")).items()

    assert index == 1
    assert "sample 1: no image file gone.png" in reason


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG: length, kind, content and checksum."""
    length = struct.pack(">I", len(content))
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return length + kind + content + checksum


def header(side: int, colour_type: int) -> bytes:
    """The first chunk of a square PNG of 8 bits; colour type 0 is grey, 2 is RGB."""
    fields = struct.pack(">IIBBBBB", side, side, 8, colour_type, 0, 0, 0)
    return chunk(b"IHDR", fields)


def pixel_data(num_bytes: int) -> bytes:
    """The chunk of pixels of a PNG, of so many zeros."""
    return chunk(b"IDAT", zlib.compress(bytes(num_bytes)))


def test_decompression_bombs_are_named(tmp_path: Path) -> None:
    """A few bytes that become gigabytes: of pixels, or of text."""
    save_picture(tmp_path / "a.png")
    # 60,000 x 60,000 pixels of 3 bytes
    many_pixels = header(60_000, colour_type=2) + pixel_data(1000)
    # 10 MB of text as a few kB: Pillow allows 1 MB.
    text = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**7)))
    long_text = header(1, colour_type=0) + text + pixel_data(2)
    records = []
    for name, chunks in {"pixels": many_pixels, "text": long_text}.items():
        file = tmp_path / f"{name}.png"
        file.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks + chunk(b"IEND", b""))
        records.append(record(id=name, image=file.name))
        picture = Picture(str(file))
        with pytest.raises(LayerfuseError, match=rf"cannot read the image .*{name}\.png"):
            picture.open()

    samples = load_records(tmp_path, *records, record())

    faulty_ids = [sample_id for sample_id, _ in faults(samples).values()]
    assert faulty_ids == ["pixels", "text"]


def test_thin_pictures_are_found_by_their_header(tmp_path: Path) -> None:
    # Encoders resize the shorter side to their own size: of 1 x 20,000 that would be gigabytes.
    file = tmp_path / "thin.png"
    Image.new("RGB", (1, 201)).save(file)

    samples = load_records(tmp_path, record(image="thin.png"))

    fault = only_fault(samples)
    assert "1 x 201 pixels" in fault.reason
    # A picture of a dataset is not looked at before it is opened.
    with pytest.raises(LayerfuseError, match="1 x 201 pixels"):
        Picture(str(file)).open()


def test_readers_may_fail_in_any_way() -> None:
    """A dataset's library raises errors of its own, or gives anything but bytes."""

    def fail() -> bytes:
        raise KeyError("column")

    def give_nothing() -> Any:
        return None

    def give_text() -> Any:
        return "text"

    for reader in (fail, give_nothing, give_text):
        picture = Picture("set#0.0", reader)
        with pytest.raises(LayerfuseError, match=r"cannot read the image set#0\.0"):
            picture.open()
