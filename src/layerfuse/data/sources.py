"""Samples from LLaVA JSON (lines), image folders, Hugging Face datasets and generated scenes."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from layerfuse.data import scene_files
from layerfuse.data.from_records import (
    Reading,
    cells,
    from_columns,
    from_llava,
    identify,
    sample_id,
)
from layerfuse.data.picture import Picture
from layerfuse.data.sample import Sample
from layerfuse.data.scenes import VERSION
from layerfuse.data.text_files import read_json, read_text
from layerfuse.data.unread import READ_KEYS
from layerfuse.errors import LayerfuseError
from layerfuse.paths import home
from layerfuse.recipe.schema import Data, Scenes

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
TABLES = ("metadata.jsonl", "metadata.jsonl.gz")
"""tables beside the images of a folder; the first that is there is read"""
IMAGE_COLUMNS = ("image", "images")
"""columns of a dataset whose cells are pictures"""
PICTURE_COLUMNS = (*IMAGE_COLUMNS, "conversations", "messages")
"""columns of a dataset that may hold pictures, in parts of a message too"""

Item = TypeVar("Item")


@dataclass
class Records(Sequence[Item]):
    """Records converted when they are read, so that large files stay small in memory."""

    records: Any  # a list from JSON, or a dataset, whose library has no typed rows
    convert: Callable[[int, dict[str, Any]], Item]
    """is given a record's own index and the record"""
    source: str = "a list of records"
    """the file, the folder or the dataset, which names a record together with its index"""
    identify: Callable[[int, Any], str] = sample_id
    """the id of a record, also of one that cannot be converted"""

    def __post_init__(self) -> None:
        # Chooses some of the records; each keeps its own index.
        self.order: Sequence[int] = range(len(self.records))

    def __len__(self) -> int:
        return len(self.order)

    # Any: one item for an index, a list of them for a slice
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return self.read(self.order[index])

    # Not the iterator of `Sequence`, which ends without a word at an IndexError of a record.
    def __iter__(self) -> Iterator[Item]:
        for record_index in self.order:
            yield self.read(record_index)

    def read(self, record_index: int) -> Item:
        """Convert one record.

        Args:
            record_index: its own index, not its place here.

        Raises:
            LayerfuseError: naming the source and the index, and what is wrong with the record.
        """
        try:
            return self.convert(record_index, self.records[record_index])
        except LayerfuseError as error:
            message = f"{error} {self.place(record_index)}"
            # Names of files may hold halves of surrogate pairs, which no file and no screen shows.
            printable = message.encode("utf-8", "backslashreplace").decode("utf-8")
            raise LayerfuseError(printable) from error

    def place(self, record_index: int) -> str:
        """Where a record is, for the end of a message.

        Args:
            record_index: its own index, not its place here.
        """
        return f"({self.source}, index {record_index})"

    def without(self, left_out: Collection[int]) -> "Records[Item]":
        """All but some records.

        Args:
            left_out: their own indices, not their places here.
        """
        remaining = Records(self.records, self.convert, self.source, self.identify)
        remaining.order = [index for index in self.order if index not in left_out]
        return remaining


Samples = Records[Sample]


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


def _refuse_missing_columns(source: str, records: Iterable[Any], reading: Reading) -> None:
    """Raise LayerfuseError for a column that the recipe names and no record has.

    Args:
        source: names the records in the error.
        records: all of them.
        reading: how they are read.
    """
    missing = {*reading.columns.values(), *reading.ignored}
    keys: set[str] = set()
    for record in records:
        if not missing:
            return
        # What is no mapping is named when it is read.
        if isinstance(record, dict):
            missing -= record.keys()
            keys.update(str(key) for key in record)
    if missing:
        raise LayerfuseError(
            f"{source} has no column {', '.join(sorted(missing))}, which the recipe's columns or "
            f"ignore_columns name; it has {', '.join(sorted(keys))}"
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
    folder = home() / "scenes" / key
    scene_files.write(
        folder,
        spec.count,
        spec.split,
        seed=spec.seed,
        questions=spec.questions,
        families=spec.families,
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
    if isinstance(records, dict) and ("conversations" in records or "messages" in records):
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
    _refuse_missing_columns(str(path), records, reading)
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
    _refuse_missing_columns(str(table), rows, reading)
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


def is_saved_dataset(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk`.

    Args:
        folder: any, or a path that does not exist.
    """
    # The first is written for one dataset, the second for a mapping of splits.
    return (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()


def open_dataset(name: str, split: str, reading: Reading | None = None) -> Samples:
    """The rows of a Hugging Face dataset, with undecoded images.

    Args:
        name: a hub id, or a folder written by `save_to_disk`.
        split: of the dataset; no matter in a folder without splits.
        reading: how its rows are read; by default as they are.

    Raises:
        LayerfuseError: the dataset or the split is missing or cannot be read, or a column holds
            media that nobody reads.
    """
    if reading is None:
        reading = Reading(Path(name))
    # Imported late: it is large, and few sources need it.
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        if Path(name).is_dir():
            dataset = datasets.load_from_disk(name)
        else:
            dataset = datasets.load_dataset(name, split=split)
    # ValueError: unknown splits and damaged tables; the others: no such dataset, no network.
    except (OSError, ValueError, DatasetsError) as error:
        raise LayerfuseError(f"cannot read the dataset {name} ({split}): {error}") from error
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise LayerfuseError(f"{name} has no split {split!r}; valid: {list(dataset)}")
        dataset = dataset[split]
    dataset = _chosen_columns(dataset, f"{name}:{split}", reading)
    # Undecoded: the bytes are what the feature cache is addressed by.
    for column, feature in dataset.features.items():
        if _media_in(feature) is not None:
            dataset = dataset.cast_column(column, _undecoded(feature))
    rows = DatasetRows(dataset, f"{name}:{split}")
    # Its columns have the names that are read already.
    as_named = Reading(reading.base, literal_answers=reading.literal_answers)
    return Samples(rows, partial(from_columns, reading=as_named), rows.name)


# Any: the library's datasets are typed in part only
def _chosen_columns(dataset: Any, source: str, reading: Reading) -> Any:
    """A dataset with the columns that are not left out, under the names that are read.

    Args:
        dataset: of the datasets library.
        source: names it in errors.
        reading: how it is read.

    Raises:
        LayerfuseError: a column is missing, two would have one name, or one holds media that
            nobody reads.
    """
    _refuse_missing_columns(source, [dict.fromkeys(dataset.column_names)], reading)
    # Raises where two columns would have one name.
    reading.chosen(dict.fromkeys(dataset.column_names))
    dataset = dataset.remove_columns(list(reading.ignored))
    new_names = {column: name for name, column in reading.columns.items()}
    dataset = dataset.rename_columns(new_names)
    for column, feature in dataset.features.items():
        media = _media_in(feature)
        if media is None:
            continue
        if column not in PICTURE_COLUMNS:
            raise LayerfuseError(
                f"{source}: nobody reads the column {column!r}, which holds media ({media}). Read "
                f"are {', '.join(READ_KEYS)}; say which one it is, such as `columns: {{image: "
                f"{column}}}`, or leave it out on purpose with `ignore_columns: [{column}]`"
            )
        if media != "Image":
            raise LayerfuseError(
                f"{source}: the column {column!r} holds {media}; only pictures are read"
            )
    return dataset


# Any: a feature is a type of the library, a list or a mapping of features
def _media_in(feature: Any) -> str | None:
    """The name of the media type in a feature of a dataset, None for a feature without media."""
    import datasets

    for media in (datasets.Image, datasets.Audio, datasets.Video, datasets.Pdf):
        if isinstance(feature, media):
            return media.__name__
    inner: list[Any] = []
    if isinstance(feature, dict):
        inner = list(feature.values())
    elif isinstance(feature, datasets.List | datasets.LargeList):
        inner = [feature.feature]
    for part in inner:
        media_name = _media_in(part)
        if media_name is not None:
            return media_name
    return None


# Any: as for `_media_in`
def _undecoded(feature: Any) -> Any:
    """A feature of a dataset with its images left undecoded."""
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, dict):
        return {name: _undecoded(part) for name, part in feature.items()}
    if isinstance(feature, datasets.List | datasets.LargeList):
        return type(feature)(_undecoded(feature.feature))
    return feature


@dataclass
class DatasetRows:
    """The rows of a dataset with pictures, which read their bytes when asked, as image cells."""

    dataset: Any  # of the datasets library, or any sequence of such rows
    name: str
    """of the dataset and its split, which makes the pictures' names unique"""

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            row = dict(self.dataset[index])
        # The library decodes the other columns here, and raises whatever their decoders raise.
        except Exception as error:
            raise LayerfuseError(f"sample {index}: the row cannot be read: {error}") from error
        for column in IMAGE_COLUMNS:
            if column not in row:
                continue
            pictures = []
            for place, cell in enumerate(cells(row[column])):
                pictures.append(self._picture(cell, index, column, place))
            row[column] = pictures
        return row

    def _picture(self, cell: Any, index: int, column: str, place: int) -> Any:
        """The picture of an image cell; what is none is returned as it is, to be named later.

        Args:
            cell: of an undecoded image: its bytes, or the path of its file.
            index: of the row.
            column: of the cell.
            place: of the image in a cell that holds several.
        """
        if not isinstance(cell, dict):
            return cell
        if cell.get("bytes") is not None:
            # The bytes are left in the dataset's file, so that a copy for another process is small.
            read = partial(self._bytes, index, column, place)
            return Picture(f"{self.name}#{index}.{place}", read)
        if cell.get("path"):
            return Picture(str(cell["path"]))
        return cell.get("path")

    def _bytes(self, index: int, column: str, place: int) -> bytes:
        return cells(self.dataset[column][index])[place]["bytes"]
