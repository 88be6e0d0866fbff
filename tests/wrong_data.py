"""Wrong data of every kind that docs/data.md has a message for, made in the current folder.

The tables are keyed by a part of the message that no other message of the page holds.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image
from transformers import (
    BitImageProcessorPil,
    ConvNextImageProcessorPil,
    LlavaNextImageProcessorPil,
)

from layerfuse.data.sources import faults, load
from layerfuse.errors import LayerfuseError
from layerfuse.model.chat_template import with_fixed_date
from layerfuse.recipe.data_source import Data
from tests.test_picture_depths import png

QUESTION = {"from": "human", "value": "<image>\nHow many chairs are there?"}
ANSWER = {"from": "gpt", "value": "Two."}
TURNS = [QUESTION, ANSWER]
GOOD = {"id": "kitchen-1", "image": "kitchen.jpg", "conversations": TURNS}


def good(**changes: Any) -> dict[str, Any]:
    """A record that is read, or a bad one by these changes."""
    return {**GOOD, **changes}


def message_of(**data: Any) -> str:
    """What is said of some data, as a recipe names it: of its first bad sample, or of all of it."""
    try:
        by_index = faults(load(Data.model_validate(data)))
    except LayerfuseError as error:
        return str(error)
    _, reason = next(iter(by_index.values()))
    return reason


@dataclass(frozen=True)
class BadRecord:
    """A record of a JSON file, and how the recipe reads it."""

    record: Any
    settings: dict[str, Any] = field(default_factory=dict[str, Any])


PICTURE_PART = {"role": "user", "content": [{"type": "image", "path": "kitchen.jpg"}]}
VIDEO_PART = {"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}
VIDEO_MARKER = {"from": "human", "value": "<video>\nWhat happens?"}
WITHOUT_PICTURE = {"id": "kitchen-1", "conversations": [{**QUESTION, "value": "?"}, ANSWER]}

BAD_RECORDS = {
    "1 <image> markers": BadRecord(good(image=["kitchen.jpg", "garden.jpg"])),
    "no answer to learn from": BadRecord(good(conversations=[QUESTION])),
    "has both image and images": BadRecord(good(images=["garden.jpg"])),
    "'from': 'tool'": BadRecord(good(conversations=[QUESTION, {"from": "tool", "value": "2"}])),
    "names one speaker as from": BadRecord(
        good(conversations=[QUESTION, {**ANSWER, "role": "user"}]),
    ),
    "holds the private-use character": BadRecord(
        good(conversations=[QUESTION, {"from": "gpt", "value": "\ue002"}]),
    ),
    # Of a list that holds anything but records, the place is the only name.
    "not a mapping with keys": BadRecord("text"),
    "is elsewhere": BadRecord(good(image="https://example.org/kitchen.jpg")),
    "its turns name 1 pictures": BadRecord(
        {"image": "garden.jpg", "messages": [PICTURE_PART, ANSWER]}
    ),
    "cannot read the part": BadRecord({"messages": [VIDEO_PART, ANSWER]}),
    "nobody reads 'imgs'": BadRecord({**WITHOUT_PICTURE, "imgs": ["kitchen.jpg"]}),
    "has no column imgs": BadRecord(
        {"image": "kitchen.jpg", "conversations": TURNS},
        {"columns": {"images": "imgs"}},
    ),
    "reads 'crop' as 'image'": BadRecord(
        good(crop="chair.jpg"),
        {"columns": {"image": "crop"}},
    ),
    # JSON can write it as an escape, UTF-8 cannot hold it.
    "half a surrogate pair": BadRecord(
        good(conversations=[QUESTION, {"from": "gpt", "value": "\ud83d"}]),
    ),
    "holds <video>": BadRecord(good(conversations=[VIDEO_MARKER, ANSWER])),
    "holds <img>": BadRecord(
        good(conversations=[QUESTION, {"from": "gpt", "value": "Write <img>."}]),
    ),
    "families is a str": BadRecord(good(families="count")),
    "families holds None": BadRecord(good(families=[None])),
    "its id is": BadRecord(good(id={"row": 1})),
    "an option that the model would not see": BadRecord(good(A="One.", B="Two.")),
    "what is learned": BadRecord(
        good(conversations=[QUESTION, {**ANSWER, "weight": 0}]),
    ),
    "nobody reads 'before'": BadRecord(good(before={"image": {"path": "photos/1"}})),
}


def save_dataset(*columns: str) -> None:
    """Save the dataset `chairs` of one row, with these columns of pictures."""
    cell = {"bytes": Path("kitchen.jpg").read_bytes(), "path": None}
    content: dict[str, list[Any]] = {"answer": ["Two."]}
    for column in columns:
        content[column] = [cell]
    dataset = datasets.Dataset.from_dict(content)
    # What tells that a column holds pictures, whatever it is called.
    for column in columns:
        dataset = dataset.cast_column(column, datasets.Image())
    datasets.DatasetDict({"train": dataset}).save_to_disk("chairs")


def name_another_split() -> str:
    save_dataset("image")
    return message_of(dataset="chairs", split="test")


def bring_another_column() -> str:
    save_dataset("image", "depth")
    return message_of(dataset="chairs")


def message_of_photos(*names: str, table: dict[str, str] | None = None) -> str:
    """What is said of a folder with files of these names, and a table of one row if it is given."""
    photos = Path("photos")
    photos.mkdir()
    for name in names:
        shutil.copy("kitchen.jpg", photos / name)
    if table is not None:
        (photos / "metadata.jsonl").write_text(json.dumps(table))
    return message_of(path="photos")


def forget_all_pictures() -> str:
    return message_of_photos()


def forget_all_captions() -> str:
    return message_of_photos("kitchen.jpg")


def forget_one_caption() -> str:
    Path("photos").mkdir()
    shutil.copy("kitchen.jpg", "photos/garden.jpg")
    shutil.copy("kitchen.jpg", "photos/kitchen.jpg")
    # Where no picture has a caption, the folder is refused as a whole.
    Path("photos/kitchen.txt").write_text("Two chairs.")
    return message_of(path="photos")


def call_a_caption_otherwise() -> str:
    row = {"file_name": "kitchen.jpg", "caption": "Two chairs."}
    return message_of_photos("kitchen.jpg", table=row)


def name_no_picture() -> str:
    return message_of_photos(table={"text": "Two chairs."})


def bring_a_table_of_commas() -> str:
    Path("photos").mkdir()
    Path("photos/metadata.csv").write_text("file_name,text\nkitchen.jpg,Two chairs.\n")
    return message_of(path="photos")


def bring_two_tables() -> str:
    Path("photos").mkdir()
    Path("photos/metadata.jsonl.gz").touch()
    return message_of_more_photos({"file_name": "kitchen.jpg", "text": "Two chairs."})


def message_of_more_photos(row: dict[str, str]) -> str:
    """What is said of the folder `photos` with a table of one row."""
    Path("photos/metadata.jsonl").write_text(json.dumps(row))
    return message_of(path="photos")


def bring_a_table_in_a_subfolder() -> str:
    Path("photos/train").mkdir(parents=True)
    Path("photos/train/metadata.jsonl").touch()
    return message_of(path="photos")


def bring_a_picture_of_another_format() -> str:
    Path("photos").mkdir()
    Path("photos/garden.heic").touch()
    Path("photos/garden.txt").write_text("Two trees.")
    return message_of(path="photos")


def mark_the_picture_behind_words() -> str:
    row = {"file_name": "kitchen.jpg", "text": "Two chairs. <image>"}
    return message_of_photos("kitchen.jpg", table=row)


def name_two_pictures() -> str:
    row = {"file_name": "kitchen.jpg", "image": "garden.jpg", "text": "Two chairs."}
    return message_of_photos("kitchen.jpg", table=row)


def message_of_bytes(content: bytes) -> str:
    """What is said of a file `train.json` with this content."""
    Path("train.json").write_bytes(content)
    return message_of(path="train.json")


def leave_out_a_quote() -> str:
    # The first two lines are valid: the error is in the third.
    return message_of_bytes(b'{"id": 1}\n{"id": 2}\n{"id": 3, oops}\n')


def write_utf_16() -> str:
    return message_of_bytes(b"\xff\xfe" + "[]".encode("utf-16-le"))


def write_latin_1() -> str:
    return message_of_bytes('[\n{"id": "caf\xe9"}]'.encode("latin-1"))


def wrap_the_list() -> str:
    return message_of_bytes(b'{"data": []}')


def keep_more_beside_the_list() -> str:
    return message_of_bytes(b'{"text": "Chairs", "data": [{"id": "kitchen-1"}]}')


def put_two_files_together() -> str:
    return message_of_bytes(b'[{"id": 1}][{"id": 2}]')


def compute_the_date() -> str:
    with pytest.raises(LayerfuseError) as refused:
        with_fixed_date("Today: {{ strftime_now(day_format) }}")
    return str(refused.value)


BAD_SOURCES: dict[str, Callable[[], str]] = {
    "has no split": name_another_split,
    "nobody reads the column 'depth'": bring_another_column,
    "photos: no images": forget_all_pictures,
    "photos: no caption file": forget_all_captions,
    "sample garden.jpg": forget_one_caption,
    "needs a column": call_a_caption_otherwise,
    "names no picture": name_no_picture,
    "holds metadata.csv": bring_a_table_of_commas,
    "metadata.jsonl and metadata.jsonl.gz, of": bring_two_tables,
    "subfolder photos/train": bring_a_table_in_a_subfolder,
    "a caption without a picture": bring_a_picture_of_another_format,
    "behind other words": mark_the_picture_behind_words,
    "has both file_name": name_two_pictures,
    "Expecting property name": leave_out_a_quote,
    "another list begins": put_two_files_together,
    "byte order mark ff fe": write_utf_16,
    "the byte 0xe9": write_latin_1,
    "must hold a list": wrap_the_list,
    "holds one mapping": keep_more_beside_the_list,
    "writes today's date": compute_the_date,
}


def save_eps(file: Path) -> None:
    Image.new("RGB", (6, 4)).save(file, "EPS")


def save_text(file: Path) -> None:
    file.write_text("no picture")


def save_half(file: Path) -> None:
    # BMP is not compressed, so that no library's version changes the number of missing bytes.
    Image.new("RGB", (40, 30)).save(file)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def save_line(file: Path) -> None:
    Image.new("L", (20000, 50)).save(file)


def save_signed(file: Path) -> None:
    Image.fromarray(np.zeros((2, 2), np.int32)).save(file)


def save_floating_point(file: Path) -> None:
    Image.fromarray(np.zeros((2, 2), np.float32)).save(file)


def save_fits(file: Path) -> None:
    # Each card of the header has 80 characters.
    header = b""
    for card in ("SIMPLE  =                    T", "BITPIX  =                   16"):
        header += card.encode().ljust(80)
    for name, number in {"NAXIS": 2, "NAXIS1": 2, "NAXIS2": 2}.items():
        header += f"{name:<8}= {number:>20}".encode().ljust(80)
    header += b"END"
    # Both the header and the data fill blocks of this size.
    file.write_bytes(header.ljust(2880) + bytes(2880))


# All samples of 12 bits.
RAMP = np.arange(4096).reshape(64, 64)


def save_beyond_the_highest(file: Path) -> None:
    # The tag SMaxSampleValue.
    Image.fromarray(RAMP.astype(np.uint16)).save(file, tiffinfo={341: 4000})


def save_unscaled_colours(file: Path) -> None:
    file.write_bytes(png(np.stack([RAMP, RAMP, RAMP], axis=-1), significant_bits=12))


BAD_PICTURES: dict[str, Callable[[Path], None]] = {
    "figure.png": save_eps,
    "page.png": save_text,
    "half.bmp": save_half,
    "line.png": save_line,
    "scan.tif: signed pixels": save_signed,
    "depth.tif": save_floating_point,
    "sky.fits": save_fits,
    "scan.tif: samples from 0": save_beyond_the_highest,
    "scan.png": save_unscaled_colours,
}


# By the folder of the encoder.
BAD_IMAGE_PROCESSORS: dict[str, Any] = {
    "./enc": BitImageProcessorPil(size={"shortest_edge": 32}, do_center_crop=False),
    "./tiles": LlavaNextImageProcessorPil(),
    "./own": ConvNextImageProcessorPil(),
}
