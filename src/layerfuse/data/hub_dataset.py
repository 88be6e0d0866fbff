"""Hugging Face datasets, of the hub or saved in a folder."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from layerfuse.data.from_records import Reading, cells, from_columns
from layerfuse.data.lazy_records import Samples, refuse_missing_columns
from layerfuse.data.unread import READ_KEYS
from layerfuse.errors import LayerfuseError
from layerfuse.vision.picture import Picture

IMAGE_COLUMNS = ("image", "images")
"""columns of a dataset whose cells are pictures"""
MEDIA_FEATURES = ("Image", "Audio", "Video", "Pdf", "Nifti", "Mesh", "Array3D", "Array4D")
"""types of the datasets library that hold media"""
PICTURE_COLUMNS = (*IMAGE_COLUMNS, "conversations", "messages")
"""columns of a dataset that may hold pictures, in parts of a message too"""


def is_saved_dataset(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk`.

    Args:
        folder: any, or a path that does not exist.
    """
    # The first is written for one dataset, the second for a mapping of splits.
    return (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()


def open_dataset(
    name: str,
    split: str,
    reading: Reading | None = None,
    *,
    refuse_unread: bool = True,
) -> Samples:
    """The rows of a Hugging Face dataset, with undecoded images.

    Args:
        name: a hub id, or a folder written by `save_to_disk`.
        split: of the dataset; no matter in a folder without splits.
        reading: how its rows are read; by default as they are.
        refuse_unread: whether columns of media that nobody reads are an error.

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
    source = f"{name}:{split}"
    dataset = _chosen_columns(dataset, source, reading)
    if refuse_unread:
        _refuse_unread_media(dataset, source)
    else:
        # Else the library would decode them with every row.
        dataset = dataset.remove_columns(_unread_media(dataset))
    # Undecoded: the bytes are what the feature cache is addressed by.
    for column, feature in dataset.features.items():
        if _media_in(feature) is not None:
            dataset = dataset.cast_column(column, _undecoded(feature))
    rows = DatasetRows(dataset, source)
    # Its columns have the names that are read already.
    convert = partial(from_columns, reading=reading.without_names())
    return Samples(rows, convert, rows.name)


# Any: the library's datasets are typed in part only
def _chosen_columns(dataset: Any, source: str, reading: Reading) -> Any:
    """A dataset with the columns that are not left out, under the names that are read.

    Args:
        dataset: of the datasets library.
        source: names it in errors.
        reading: how it is read.

    Raises:
        LayerfuseError: a column is missing, or two would have one name.
    """
    refuse_missing_columns(source, [dict.fromkeys(dataset.column_names)], reading)
    # Raises where two columns would have one name.
    reading.chosen(dict.fromkeys(dataset.column_names))
    dataset = dataset.remove_columns(list(reading.ignored))
    new_names = {column: name for name, column in reading.columns.items()}
    return dataset.rename_columns(new_names)


# Any: as for `_chosen_columns`
def _unread_media(dataset: Any) -> list[str]:
    """The columns of a dataset that hold media and that nobody reads."""
    unread = []
    for column, feature in dataset.features.items():
        if _media_in(feature) is not None and column not in PICTURE_COLUMNS:
            unread.append(column)
    return unread


# Any: as for `_chosen_columns`
def _refuse_unread_media(dataset: Any, source: str) -> None:
    """Raise LayerfuseError if a dataset holds media that nobody reads."""
    for column in _unread_media(dataset):
        media = _media_in(dataset.features[column])
        raise LayerfuseError(
            f"{source}: nobody reads the column {column!r}, which holds media ({media}). Read are "
            f"{', '.join(READ_KEYS)}; say which one it is, such as `columns: {{image: {column}}}`, "
            f"or leave it out on purpose with `ignore_columns: [{column}]`"
        )
    for column in PICTURE_COLUMNS:
        media = _media_in(dataset.features.get(column))
        if media not in (None, "Image"):
            raise LayerfuseError(
                f"{source}: the column {column!r} holds {media}; only pictures are read"
            )


# Any: a feature is a type of the library, a list or a mapping of features
def _media_in(feature: Any) -> str | None:
    """The name of the media type in a feature of a dataset, None for a feature without media."""
    import datasets

    kind = type(feature).__name__
    if kind in MEDIA_FEATURES:
        return kind
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
        for column in row.keys() - set(IMAGE_COLUMNS):
            row[column] = self._with_pictures(row[column], index, (column,))
        return row

    # Any: what a cell of a dataset holds
    def _with_pictures(self, value: Any, index: int, path: tuple[str | int, ...]) -> Any:
        """A part of a cell, such as a message, in which images are pictures that read their bytes.

        Args:
            value: the part.
            index: of the row.
            path: the column, then the keys and places on the way to the part.
        """
        if isinstance(value, list):
            parts: list[Any] = []
            for place, part in enumerate(value):
                parts.append(self._with_pictures(part, index, (*path, place)))
            return parts
        if not isinstance(value, dict):
            return value
        if value.keys() == {"bytes", "path"} and isinstance(value["bytes"], bytes):
            name = ".".join(str(part) for part in path)
            return Picture(f"{self.name}#{index}.{name}", partial(self._bytes_in, index, path))
        return {key: self._with_pictures(part, index, (*path, key)) for key, part in value.items()}

    def _bytes_in(self, index: int, path: tuple[str | int, ...]) -> bytes:
        column, *rest = path
        part: Any = self.dataset[column][index]
        for key in rest:
            part = part[key]
        return part["bytes"]

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
