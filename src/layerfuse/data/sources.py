"""Samples from LLaVA JSON (lines), image folders, Hugging Face datasets and generated scenes."""

from functools import partial
from pathlib import Path
from typing import Any

from layerfuse.data import scene_files
from layerfuse.data.from_records import Reading, from_columns, from_llava, identify
from layerfuse.data.hub_dataset import is_saved_dataset, open_dataset
from layerfuse.data.lazy_records import Samples, refuse_missing_columns
from layerfuse.data.sample import Sample
from layerfuse.data.scenes import VERSION
from layerfuse.data.text_files import read_json, read_text
from layerfuse.data.unread import READ_KEYS
from layerfuse.errors import LayerfuseError
from layerfuse.paths import home
from layerfuse.recipe.schema import Data, Scenes

IMAGE_SUFFIXES = {
    *(".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff"),
    *(".jp2", ".j2k", ".ppm", ".pgm"),
}
TABLES = ("metadata.jsonl", "metadata.jsonl.gz")
"""tables beside the images of a folder; the first that is there is read"""


def load(data: Data) -> Samples:
    """The samples of a data source. Generated scenes are written on first use.

    Args:
        data: of a recipe.

    Raises:
        LayerfuseError: naming the file or dataset that is missing or cannot be used.
    """
    if data.scenes is not None:
        samples = _from_json(_write_scenes(data.scenes), data)
    elif data.path is not None:
        samples = _from_path(Path(data.path), data)
    else:
        samples = open_dataset(
            str(data.dataset),
            data.split,
            _reading(Path(str(data.dataset)), data),
        )
    # The first in the file's order, so that a smaller limit gives a part of the same samples.
    if data.limit is not None:
        samples.order = samples.order[: data.limit]
    if len(samples) == 0:
        raise LayerfuseError(f"no samples in {data.path or data.dataset}")
    return samples


def _from_path(path: Path, data: Data) -> Samples:
    if not path.exists():
        raise LayerfuseError(f"no such file or folder of samples: {path}")
    if path.is_dir():
        if data.images is not None:
            raise LayerfuseError(
                f"{path} is a folder, and `images` is for a JSON file alone; leave it out"
            )
        return _from_folder(path, data)
    return _from_json(path, data)


def _reading(base: Path, data: Data) -> Reading:
    """How a recipe reads the records of a source, whose image paths are relative to `base`."""
    return Reading(
        base,
        columns={name: column for name, column in data.columns.items()},
        ignored=tuple(data.ignore_columns),
        literal_answers=data.literal_answers,
    )


def faults(samples: Samples) -> dict[int, tuple[str, str]]:
    """The samples that cannot be converted, or whose image file is missing or has no header.

    Args:
        samples: of any source.

    Returns:
        (id, reason) by the sample's own index.
    """
    faulty: dict[int, tuple[str, str]] = {}
    # Many samples show the same picture: each file is looked at once.
    picture_faults: dict[str, str | None] = {}
    # The records' own indices, not their places: they are what names a sample.
    for index in samples.order:
        try:
            sample = samples.read(index)
        except LayerfuseError as error:
            faulty[index] = (_id_of(samples, index), str(error))
            continue
        for picture in sample.pictures:
            # Only files: a dataset's cells are decoded when the pictures are encoded.
            if picture.reader is None and picture.name not in picture_faults:
                picture_faults[picture.name] = picture.fault()
            reason = picture_faults.get(picture.name)
            if reason:
                message = f"sample {sample.id}: {reason} {samples.place(index)}"
                faulty[index] = (sample.id, message)
                break
    return faulty


def _id_of(samples: Samples, index: int) -> str:
    """The id of a sample that cannot be converted."""
    try:
        return samples.identify(index, samples.records[index])
    except LayerfuseError:
        # Not even its record can be read.
        return str(index)


def _write_scenes(spec: Scenes) -> Path:
    """The LLaVA JSON of generated scenes, which are written if they are not yet there."""
    families = "+".join(spec.families or ["all"])
    # All that the pictures and questions depend on: other settings are another folder.
    key = f"{spec.split}-{spec.count}-{spec.seed}-{spec.questions}-{families}-v{VERSION}"
    if spec.wording != "question":
        key = f"{key}-{spec.wording}"
    folder = home() / "scenes" / key
    scene_files.write(
        folder,
        spec.count,
        spec.split,
        seed=spec.seed,
        questions=spec.questions,
        families=spec.families,
        wording=spec.wording,
    )
    if spec.captions:
        return folder / "captions.json"
    return folder / "conversations.json"


def _from_json(path: Path, data: Data) -> Samples:
    """The conversations of a LLaVA file.

    Args:
        path: JSON with one list, or JSON lines.
        data: the source that it belongs to.
    """
    records = read_json(path)
    if isinstance(records, dict) and any(key in records for key in READ_KEYS):
        # JSON lines with one record look like this, whatever the file is called.
        records = [records]
    if not isinstance(records, list):
        raise LayerfuseError(
            f"{path} must hold a list of conversations, not {type(records).__name__}"
        )
    base = path.parent
    if data.images:
        base = Path(data.images)
    if not base.is_dir():
        raise LayerfuseError(f"no image folder {base}")
    reading = _reading(base, data)
    refuse_missing_columns(str(path), records, reading)
    convert = partial(from_llava, reading=reading)
    return Samples(records, convert, str(path), partial(identify, reading))


def _from_folder(folder: Path, data: Data) -> Samples:
    """The samples of a saved dataset, of a table beside images, or of images with captions.

    Args:
        folder: exists.
        data: the source that it belongs to.
    """
    reading = _reading(folder, data)
    if is_saved_dataset(folder):
        return open_dataset(str(folder), data.split, reading)
    for name in TABLES:
        table = folder / name
        if table.exists():
            return _from_table(table, reading)
    records = []
    num_captioned = 0
    for file in image_files(folder):
        # A picture without one is a bad sample, which is named when it is read.
        if file.with_suffix(".txt").exists():
            num_captioned += 1
        name = str(file.relative_to(folder))
        records.append({"id": name, "image": name})
    if not records:
        raise LayerfuseError(f"{folder}: no images (and no metadata.jsonl)")
    if data.columns or data.ignore_columns:
        raise LayerfuseError(
            f"{folder} is a folder of captions without a table, in which `columns` and "
            "`ignore_columns` name nothing; leave them out"
        )
    # The folder is of another kind, or its captions are elsewhere.
    if num_captioned == 0:
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
    files = []
    # Sorted, because the order of a folder's files differs between file systems.
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        is_hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        # A folder can be named like an image. A link to nothing stays, to be named.
        if not is_hidden and not file.is_dir():
            files.append(file)
    return files


def _from_table(table: Path, reading: Reading) -> Samples:
    """The rows of a `metadata.jsonl`, whose `file_name` names the image."""
    rows = read_json(table)
    if not isinstance(rows, list):
        raise LayerfuseError(f"{table} must hold a mapping in each line, not {rows!r}")
    refuse_missing_columns(str(table), rows, reading)
    records = []
    for row in rows:
        record = row
        # What is no mapping is named when it is read.
        if isinstance(row, dict) and "file_name" in row:
            # Columns called image or id come before the file's name.
            record = {"image": row["file_name"], "id": row["file_name"], **row}
            del record["file_name"]
        records.append(record)
    convert = partial(_from_row, reading)
    return Samples(records, convert, str(table), partial(identify, reading))


def _from_row(reading: Reading, index: int, row: Any) -> Sample:
    """A row of a `metadata.jsonl`, with its `file_name` as image."""
    sample = from_columns(index, row, reading)
    # These tables describe pictures: a row that shows none is a mistake.
    if not sample.pictures:
        raise LayerfuseError(
            f"sample {sample.id}: names no picture: a row needs file_name, or a column that "
            f"`columns: {{image: ...}}` names; it has {sorted(map(str, row))}"
        )
    return sample


def _captioned(reading: Reading, index: int, row: dict[str, Any]) -> Sample:
    """An image with the caption beside it, which is read only now."""
    caption_file = (reading.base / row["image"]).with_suffix(".txt")
    if not caption_file.exists():
        raise LayerfuseError(f"sample {row['id']}: no caption file {caption_file}")
    try:
        caption = read_text(caption_file)
    except LayerfuseError as error:
        raise LayerfuseError(f"sample {row['id']}: {error}") from error
    return from_columns(index, {**row, "text": caption}, reading)
