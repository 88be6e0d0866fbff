"""Samples from LLaVA JSON (lines), image folders, Hugging Face datasets and generated scenes."""

from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

from layerfuse.data import scene_files
from layerfuse.data.from_records import Reading, from_llava, identify
from layerfuse.data.hub_dataset import is_saved_dataset, open_dataset
from layerfuse.data.lazy_records import Samples, refuse_missing_columns
from layerfuse.data.picture_folder import from_folder
from layerfuse.data.scenes import VERSION
from layerfuse.data.text_files import read_json
from layerfuse.data.unread import READ_KEYS
from layerfuse.errors import LayerfuseError
from layerfuse.paths import home
from layerfuse.recipe.data_source import Data, Scenes

# What people call the list of the records, where a mapping is around it.
_RECORD_LISTS = {"data", "records", "samples", "examples", "rows", "items", "train", "test"}
_TURN_LISTS = {"conversations", "messages"}


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
    if data.skip >= len(samples) > 0:
        place = data.path or data.dataset or "the scenes"
        raise LayerfuseError(
            f"skip: {data.skip} leaves none of the {len(samples)} samples of {place}; give a "
            "smaller number"
        )
    samples.order = samples.order[data.skip :]
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
    if isinstance(records, list) and len(records) == 1:
        _refuse_wrapped(path, records[0], data.ignore_columns)
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


def _refuse_wrapped(path: Path, record: Any, ignored: Collection[str]) -> None:
    """Raise LayerfuseError for a mapping around the list of records, whose other keys make it look
    like a record itself.

    Args:
        path: of the file.
        record: the only one of the file.
        ignored: keys that are left out on purpose.
    """
    if not isinstance(record, dict):
        return
    for key, value in record.items():
        if key in READ_KEYS or key in ignored or not isinstance(value, list):
            continue
        mappings = [item for item in value if isinstance(item, dict)]
        has_turns = any(_TURN_LISTS & mapping.keys() for mapping in mappings)
        if has_turns or (mappings and key in _RECORD_LISTS):
            raise LayerfuseError(
                f"{path} holds one mapping, of which {key!r} is a list of {len(mappings)} "
                "mappings. If these are the records, write them as a list without a mapping around "
                f"them; if not, leave them out on purpose with `ignore_columns: [{key}]`"
            )


def _from_folder(folder: Path, data: Data) -> Samples:
    """The samples of a saved dataset, or of a folder of pictures.

    Args:
        folder: exists.
        data: the source that it belongs to.
    """
    reading = _reading(folder, data)
    if is_saved_dataset(folder):
        return open_dataset(str(folder), data.split, reading)
    return from_folder(folder, reading)
