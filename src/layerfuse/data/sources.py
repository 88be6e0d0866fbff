"""Samples from LLaVA JSON and JSONL, image folders, Hugging Face datasets and generated scenes."""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from layerfuse.data import scenes
from layerfuse.data.picture import Picture
from layerfuse.data.sample import Sample, cells, from_columns, from_llava
from layerfuse.errors import LayerfuseError
from layerfuse.paths import home
from layerfuse.recipe.schema import Data

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


Item = TypeVar("Item")


@dataclass
class Records(Sequence[Item]):
    """Records converted when they are read, so that large files stay small in memory. `order`
    chooses some of them; each keeps its own index."""

    records: Any
    convert: Callable[[int, dict[str, Any]], Item]

    def __post_init__(self) -> None:
        self.order: Sequence[int] = range(len(self.records))

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        record_index = self.order[index]
        return self.convert(record_index, self.records[record_index])

    def without(self, left_out: Collection[int]) -> "Records[Item]":
        """All but those with these indices (their own, not their places here)."""
        remaining = Records(self.records, self.convert)
        remaining.order = [index for index in self.order if index not in left_out]
        return remaining


Samples = Records[Sample]


def load(data: Data) -> Samples:
    """The samples of a data source. Generated scenes are written on first use.

    Raises FileNotFoundError or ValueError, naming the file or the sample, for anything that cannot
    be used.
    """
    if data.scenes is not None:
        samples = _json(_write_scenes(data.scenes))
    elif data.path is not None:
        path = Path(data.path)
        if not path.exists():
            raise FileNotFoundError(f"no such file or folder of samples: {path}")
        samples = _folder(path, data.split) if path.is_dir() else _json(path, data.images)
    else:
        samples = open_dataset(str(data.dataset), data.split)
    if data.limit is not None:
        samples.order = samples.order[: data.limit]
    if not len(samples):
        raise LayerfuseError(f"no samples in {data.path or data.dataset}")
    return samples


def faults(samples: Samples) -> dict[int, tuple[str, str]]:
    """(id, reason) of every sample that cannot be converted, or whose image file is missing or has
    no readable header, by its index."""
    faulty: dict[int, tuple[str, str]] = {}
    # Many samples show the same picture: each file is looked at once.
    picture_faults: dict[str, str | None] = {}
    for index in samples.order:
        try:
            sample = samples.convert(index, samples.records[index])
        except ValueError as error:
            faulty[index] = (str(index), str(error))
            continue
        for picture in sample.pictures:
            if picture.reader is None and picture.name not in picture_faults:
                picture_faults[picture.name] = picture.fault()
            reason = picture_faults.get(picture.name)
            if reason:
                faulty[index] = (sample.id, f"sample {sample.id}: {reason}")
    return faulty


def _write_scenes(spec: Any) -> Path:
    asked = "+".join(spec.families or ["all"])
    key = f"{spec.split}-{spec.count}-{spec.seed}-{spec.questions}-{asked}-v{scenes.VERSION}"
    folder = home() / "scenes" / key
    scenes.write(
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


def _json(path: Path, images: str | None = None) -> Samples:
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".jsonl":
            records = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            records = json.loads(text)
    except json.JSONDecodeError as error:
        raise LayerfuseError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(records, list):
        raise LayerfuseError(
            f"{path} must hold a list of conversations, not {type(records).__name__}"
        )
    base = Path(images) if images else path.parent
    if not base.is_dir():
        raise FileNotFoundError(f"no image folder {base}")
    return Samples(records, partial(from_llava, base=base))


def _folder(folder: Path, split: str) -> Samples:
    if is_saved_dataset(folder):
        return open_dataset(str(folder), split)
    table = folder / "metadata.jsonl"
    if table.exists():
        rows = [json.loads(line) for line in table.read_text("utf-8").splitlines() if line.strip()]
        return Samples(
            [{"image": r.get("file_name"), "id": r.get("file_name"), **r} for r in rows],
            partial(from_columns, base=folder),
        )
    images = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    missing = [p for p in images if not p.with_suffix(".txt").exists()]
    if missing or not images:
        what = f"no caption file {missing[0].with_suffix('.txt')}" if missing else "no images"
        raise FileNotFoundError(f"{folder}: {what} (and no metadata.jsonl)")
    return Samples(
        [{"id": str(p.relative_to(folder)), "image": str(p.relative_to(folder))} for p in images],
        partial(_captioned, folder),
    )


def _captioned(folder: Path, index: int, row: dict[str, Any]) -> Sample:
    text = (folder / row["image"]).with_suffix(".txt").read_text("utf-8")
    return from_columns(index, {**row, "text": text}, folder)


def is_saved_dataset(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return any((folder / f"{name}.json").exists() for name in ("state", "dataset_dict"))


def open_dataset(name: str, split: str) -> Samples:
    """The rows of a Hugging Face dataset, a hub id or a saved folder, with undecoded images."""
    import datasets

    if Path(name).is_dir():
        dataset = datasets.load_from_disk(name)
        if isinstance(dataset, datasets.DatasetDict):
            if split not in dataset:
                raise LayerfuseError(f"{name} has no split {split!r}; valid: {list(dataset)}")
            dataset = dataset[split]
    else:
        dataset = datasets.load_dataset(name, split=split)
    for column in ("image", "images"):
        feature = (dataset.features or {}).get(column)
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
        elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
            dataset = dataset.cast_column(column, datasets.List(datasets.Image(decode=False)))
    return Samples(_Rows(dataset, f"{name}:{split}"), partial(from_columns, base=Path(name)))


@dataclass
class _Rows:
    """The rows of a dataset with pictures, which read their bytes when asked, as image cells."""

    dataset: Any
    name: str

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = dict(self.dataset[index])
        for column in row.keys() & {"image", "images"}:
            pictures = []
            for place, cell in enumerate(cells(row[column])):
                pictures.append(self._picture(cell, index, column, place))
            row[column] = pictures
        return row

    def _picture(self, cell: Any, index: int, column: str, k: int) -> Any:
        if not isinstance(cell, dict):  # of a datasets.Image that is not decoded
            return cell
        if cell.get("bytes") is None:
            return cell["path"] and Picture(str(cell["path"]))
        return Picture(f"{self.name}#{index}.{k}", partial(self._bytes, index, column, k))

    def _bytes(self, index: int, column: str, k: int) -> bytes:
        return cells(self.dataset[column][index])[k]["bytes"]
