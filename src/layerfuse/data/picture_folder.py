"""Folders of pictures, with a table of rows or with a caption beside each picture."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from layerfuse.data.from_records import Reading, from_columns, identify
from layerfuse.data.lazy_records import Samples, refuse_missing_columns
from layerfuse.data.sample import Sample
from layerfuse.data.text_files import read_json, read_text
from layerfuse.errors import LayerfuseError, short

IMAGE_SUFFIXES = {
    *(".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff"),
    *(".jp2", ".j2k", ".ppm", ".pgm"),
}
TABLES = ("metadata.jsonl", "metadata.jsonl.gz")
"""tables beside the images of a folder that are read"""

# Texts about a folder, which are no captions.
_NOTES = {"readme", "license", "licence", "notice", "citation", "changelog", "attribution"}


def from_folder(folder: Path, reading: Reading) -> Samples:
    """The samples of a table beside images, or of images with captions.

    Args:
        folder: exists, and was not written by the datasets library.
        reading: how its rows are read.

    Raises:
        LayerfuseError: there are no images, or captions and tables that nobody would read.
    """
    table = _table_of(folder)
    if table is not None:
        return _from_table(table, reading)
    records = _captioned_records(folder)
    if not records:
        raise LayerfuseError(f"{folder}: no images (and no metadata.jsonl)")
    if reading.columns or reading.ignored:
        raise LayerfuseError(
            f"{folder} is a folder of captions without a table, in which `columns` and "
            "`ignore_columns` name nothing; leave them out"
        )
    # The folder is of another kind, or its captions are elsewhere.
    if not any("caption" in record for record in records):
        caption_file = (folder / records[0]["image"]).with_suffix(".txt")
        raise LayerfuseError(f"{folder}: no caption file {caption_file} (and no metadata.jsonl)")
    return Samples(records, partial(_captioned, reading), str(folder))


def image_files(folder: Path) -> list[Path]:
    """The image files in a folder and its subfolders, in the order of their names.

    Hidden files and folders are left out: macOS writes `._name.jpg` beside `name.jpg` on foreign
    disks, which is no picture, and editors keep copies in hidden folders.

    Args:
        folder: may be hidden itself.
    """
    return [file for file in _visible_files(folder) if _is_picture(file)]


def _visible_files(folder: Path) -> list[Path]:
    """The files in a folder and its subfolders that are not hidden, in the order of their names."""
    files = []
    # Sorted, because the order of a folder's files differs between file systems.
    for file in sorted(folder.rglob("*")):
        is_hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        # A folder can be named like an image. A link to nothing stays, to be named.
        if not is_hidden and not file.is_dir():
            files.append(file)
    return files


def _is_picture(file: Path) -> bool:
    """Whether a file has a suffix of the formats that are read."""
    return file.suffix.lower() in IMAGE_SUFFIXES


def _is_table(file: Path) -> bool:
    """Whether a file is called as tables beside pictures are, such as `metadata.csv`."""
    is_metadata = file.name.lower().startswith("metadata.")
    return is_metadata and not _is_picture(file) and file.suffix.lower() != ".txt"


def _table_of(folder: Path) -> Path | None:
    """The table of a folder, None if it has none.

    Raises:
        LayerfuseError: there is another table than those that are read, or more than one.
    """
    tables = [file for file in sorted(folder.iterdir()) if file.is_file() and _is_table(file)]
    if not tables:
        return None
    names = " and ".join(table.name for table in tables)
    if len(tables) > 1:
        raise LayerfuseError(
            f"{folder} holds {names}, of which only one would be read; keep the one that is meant"
        )
    if tables[0].name not in TABLES:
        raise LayerfuseError(
            f"{folder} holds {names}, a table that nobody reads; read are {' and '.join(TABLES)}: "
            "write its rows there, one mapping in each line"
        )
    return tables[0]


def _captioned_records(folder: Path) -> list[dict[str, Any]]:
    """A record for each picture, with its caption's file if there is one, and for each caption
    without a picture, which is a bad sample.

    Raises:
        LayerfuseError: a table is in a subfolder, where nobody would read it.
    """
    files = _visible_files(folder)
    # By the path without a suffix, which a picture and its caption have in common.
    beside: dict[Path, list[Path]] = {}
    for file in files:
        beside.setdefault(file.with_suffix(""), []).append(file)
    records = []
    for file in files:
        name = str(file.relative_to(folder))
        record: dict[str, Any] = {"id": name}
        if _is_table(file):
            raise LayerfuseError(
                f"{folder} has no table, but its subfolder {file.parent} has {file.name}, which "
                f"nobody would read; give the subfolder as path"
            )
        if _is_picture(file):
            record["image"] = name
            # A picture without one is a bad sample, which is named when it is read.
            if file.with_suffix(".txt").exists():
                record["caption"] = file.with_suffix(".txt")
            records.append(record)
        elif file.suffix == ".txt" and file.stem.lower() not in _NOTES:
            others = [other for other in beside[file.with_suffix("")] if other != file]
            if not any(_is_picture(other) for other in others):
                record["caption"] = file
                record["beside"] = [other.name for other in others]
                records.append(record)
    return records


def _captioned(reading: Reading, index: int, record: dict[str, Any]) -> Sample:
    """An image with the caption beside it, which is read only now."""
    name = record["id"]
    if "image" not in record:
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        other_file = "".join(f"; {other} is none" for other in record["beside"])
        raise LayerfuseError(
            f"sample {name}: a caption without a picture; read are pictures that end in "
            f"{suffixes}{other_file}"
        )
    if "caption" not in record:
        caption_file = (reading.base / record["image"]).with_suffix(".txt")
        raise LayerfuseError(f"sample {name}: no caption file {caption_file}")
    try:
        caption = read_text(record["caption"])
    except LayerfuseError as error:
        raise LayerfuseError(f"sample {name}: {error}") from error
    row = {"id": name, "image": record["image"], "text": caption}
    return from_columns(index, row, reading)


def _from_table(table: Path, reading: Reading) -> Samples:
    """The rows of a `metadata.jsonl`, whose `file_name` names the image."""
    rows = read_json(table)
    if not isinstance(rows, list):
        raise LayerfuseError(f"{table} must hold a mapping in each line, not {rows!r}")
    refuse_missing_columns(str(table), rows, reading)
    convert = partial(_from_row, reading)
    return Samples(rows, convert, str(table), partial(_identify_row, reading))


def _from_row(reading: Reading, index: int, row: Any) -> Sample:
    """A row of a `metadata.jsonl`, with its `file_name` as image."""
    name = _identify_row(reading, index, row)
    if _has_file_name(reading, row):
        row = _with_image(name, row, reading)
        # What is left out is gone already; `image` may be one of it.
        reading = replace(reading, ignored=())
    sample = from_columns(index, row, reading)
    # These tables describe pictures: a row that shows none is a mistake.
    if not sample.pictures:
        raise LayerfuseError(
            f"sample {sample.id}: names no picture: a row needs file_name, or a column that "
            f"`columns: {{image: ...}}` names; it has {sorted(map(str, row))}"
        )
    return sample


def _with_image(name: str, row: dict[str, Any], reading: Reading) -> dict[str, Any]:
    """A row whose `file_name` is called as what it is: the image, and the id where there is none.

    Args:
        name: of the sample.
        row: with a `file_name` that names its picture.
        reading: how it is read.

    Raises:
        LayerfuseError: the row names another picture too.
    """
    file_name = row["file_name"]
    named = {"id": name, "image": file_name}
    for key, value in row.items():
        if key == "file_name" or key in reading.ignored:
            continue
        if key in (reading.columns.get("image", "image"), reading.columns.get("images", "images")):
            # Which of the two would be the picture?
            if value not in (None, "", [], file_name):
                raise LayerfuseError(
                    f"sample {name}: has both file_name ({short(file_name)}) and {key} "
                    f"({short(value)}); leave one of them out with `ignore_columns`"
                )
            continue
        # The name above is made of it.
        if key != reading.columns.get("id", "id"):
            named[key] = value
    return named


def _has_file_name(reading: Reading, row: Any) -> bool:
    """Whether `file_name` of a row names its picture: it is not left out nor read as another."""
    if not isinstance(row, dict) or "file_name" not in row:
        return False
    return "file_name" not in (*reading.ignored, *reading.columns.values())


def _identify_row(reading: Reading, index: int, row: Any) -> str:
    """What names a row, also one that cannot be converted: its id, else the name of its file."""
    column = reading.columns.get("id", "id")
    if _has_file_name(reading, row) and row.get(column) is None:
        row = {**row, column: row["file_name"]}
    return identify(reading, index, row)
