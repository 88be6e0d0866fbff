"""Pictures of benchmarks: in files, in base64, and in the cells of tables."""

import base64
import binascii
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

from layerfuse.errors import LayerfuseError, short
from layerfuse.evaluate.benchmarks.interface import Item
from layerfuse.evaluate.benchmarks.official_files import described
from layerfuse.vision.picture import Picture


def picture_from_bytes(name: str, data: bytes) -> Picture:
    """A picture whose encoded bytes are at hand.

    Args:
        name: by which errors call it; distinct pictures have distinct names.
        data: such as those of a PNG file.

    Returns:
        The picture.

    Raises:
        LayerfuseError: there are no bytes.
    """
    if not data:
        raise LayerfuseError(f"the picture {name} is empty; an encoded picture is expected")
    # `bytes` gives its argument back without a copy, and can be sent to other processes.
    return Picture(name, reader=partial(bytes, data))


def picture_from_base64(name: str, text: str) -> Picture:
    """A picture that is written in base64.

    Args:
        name: by which errors call it; distinct pictures have distinct names.
        text: with or without `data:image/png;base64,` before it, and line ends within it.

    Returns:
        The picture.

    Raises:
        LayerfuseError: the text is no base64, or is cut off.
    """
    if text.startswith("data:"):
        text = text.partition(",")[2]
    without_space = "".join(text.split())
    try:
        # At once, so that a broken cell is found when the file is read and not hours later.
        data = base64.b64decode(without_space, validate=True)
    except (binascii.Error, ValueError) as error:
        raise LayerfuseError(
            f"the picture {name} is not valid base64: {error}. It begins with "
            f"{short(without_space[:20])} and has {len(without_space)} characters; was the file "
            "cut off?"
        ) from error
    return picture_from_bytes(name, data)


def picture_from_cell(name: str, cell: Any) -> Picture:
    """A picture in a cell of a Parquet file.

    Args:
        name: by which errors call it; distinct pictures have distinct names.
        cell: the mapping `{"bytes": ..., "path": ...}`, or the bytes alone.

    Returns:
        The picture.

    Raises:
        LayerfuseError: the cell holds no bytes.
    """
    data = cell
    if isinstance(cell, Mapping):
        data = cast("Mapping[str, Any]", cell).get("bytes")
    if not isinstance(data, bytes):
        raise LayerfuseError(
            f"the picture {name} is {described(cell)}; its encoded bytes are expected"
        )
    return picture_from_bytes(name, data)


def picture_file(folder: Path, name: str) -> Picture:
    """A picture in a file, which need not be there: answers are scored without pictures.

    Args:
        folder: of the pictures.
        name: of the file, as the benchmark gives it.

    Returns:
        The picture.
    """
    return Picture(str(folder / name))


def are_without_pictures(items: Iterable[Item]) -> bool:
    """Whether questions have files of pictures, and none of them is there: enough for scoring.

    Args:
        items: the questions.
    """
    names = _picture_files(items)
    return bool(names) and not any(Path(name).is_file() for name in names)


def check_pictures(items: Iterable[Item]) -> None:
    """Refuse questions whose pictures' files are missing; asking needs them, scoring does not.

    Args:
        items: the questions.

    Raises:
        LayerfuseError: counts the missing files and names the first.
    """
    names = _picture_files(items)
    missing = [name for name in names if not Path(name).is_file()]
    if missing:
        raise LayerfuseError(
            f"{len(missing)} of {len(names)} pictures are missing, the first is {missing[0]}. "
            "Unpack the benchmark's pictures there"
        )


def _picture_files(items: Iterable[Item]) -> list[str]:
    """The names of the files of pictures, each once."""
    # Many questions are about the same picture; a dict, unlike a set, keeps the order.
    names: dict[str, None] = {}
    for item in items:
        for picture in item.pictures:
            # What has a reader is in memory.
            if picture.reader is None:
                names[picture.name] = None
    return list(names)
