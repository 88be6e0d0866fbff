"""Samples from LLaVA JSON and JSONL, image folders, Hugging Face datasets and generated scenes."""

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from PIL import Image, UnidentifiedImageError

from layerfuse.data import scenes
from layerfuse.local_models import home
from layerfuse.processor import IMAGE_TOKEN, Message
from layerfuse.recipe import Data

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
ROLES |= {"system": "system"}
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass(frozen=True)
class Picture:
    """An image by name: a file, or the bytes of a dataset's cell."""

    name: str
    data: bytes | None = None

    def read(self) -> bytes:
        """The encoded bytes. Raises FileNotFoundError naming the file."""
        return Path(self.name).read_bytes() if self.data is None else self.data

    def digest(self) -> str:
        return hashlib.sha256(self.read()).hexdigest()

    def identify(self) -> None:
        """Read the header. Raises ValueError naming a file that is no image."""
        try:
            Image.open(self.name).close()
        except UnidentifiedImageError as error:
            raise ValueError(f"cannot read the image {self.name}: {error}") from error

    def open(self) -> Image.Image:
        """The decoded RGB image. Raises ValueError naming a file that is no readable image."""
        try:
            with Image.open(io.BytesIO(self.read())) as image:
                return image.convert("RGB")
        except (
            UnidentifiedImageError,
            OSError,
            SyntaxError,
            Image.DecompressionBombError,
        ) as error:
            raise ValueError(f"cannot read the image {self.name}: {error}") from error


@dataclass(frozen=True)
class Sample:
    """One conversation about some pictures. `families` and `categories` name each answer's kind."""

    id: str
    pictures: tuple[Picture, ...]
    messages: tuple[Message, ...]
    families: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    novel: bool = False


class Samples(Sequence[Sample]):
    """Records converted when they are read, so that large files stay small in memory."""

    def __init__(self, records: Any, convert: Callable[[int, dict[str, Any]], Sample]) -> None:
        self.records = records
        self.convert = convert

    def __len__(self) -> int:
        return len(self.records)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.convert(index % len(self), self.records[index])

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))


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
        samples = _folder(path) if path.is_dir() else _json(path, data.images)
    else:
        samples = _dataset(str(data.dataset), data.split)
    if data.limit is not None:
        chosen = range(min(data.limit, len(samples)))
        limited = samples.records
        picked = limited[: data.limit] if isinstance(limited, list) else limited.select(chosen)
        samples = Samples(picked, samples.convert)
    if not len(samples):
        raise ValueError(f"no samples in {data.path or data.dataset}")
    return samples


def check(samples: Samples) -> None:
    """Convert every sample, find every image file and read its header. Raises like `load`."""
    seen: set[str] = set()
    for sample in samples:
        for picture in sample.pictures:
            if picture.data is None and picture.name not in seen:
                seen.add(picture.name)
                if not Path(picture.name).is_file():
                    raise FileNotFoundError(f"sample {sample.id}: no image file {picture.name}")
                picture.identify()


def _write_scenes(spec: Any) -> Path:
    asked = "+".join(family[:2] for family in spec.families or ["all"])
    key = f"{spec.split}-{spec.count}-{spec.seed}-{spec.questions}-{asked}-v{scenes.VERSION}"
    folder = home() / "scenes" / key
    options = {"seed": spec.seed, "questions": spec.questions, "families": spec.families}
    scenes.write(folder, spec.count, spec.split, **options)
    return folder / ("captions.json" if spec.captions else "conversations.json")


def _json(path: Path, images: str | None = None) -> Samples:
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".jsonl":
            records = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            records = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(records, list):
        raise ValueError(f"{path} must hold a list of conversations, not {type(records).__name__}")
    base = Path(images) if images else path.parent
    if not base.is_dir():
        raise FileNotFoundError(f"no image folder {base}")
    return Samples(records, lambda i, record: _from_llava(i, record, base))


def _from_llava(index: int, record: dict[str, Any], base: Path) -> Sample:
    name = str(record.get("id", index))
    given = record.get("image", record.get("images")) or []
    given = list(given) if isinstance(given, list | tuple) else [given]
    pictures = tuple(_picture(name, k, item, base) for k, item in enumerate(given))
    turns = record.get("conversations") or record.get("messages")
    if not turns:
        raise ValueError(f"sample {name}: no conversations; its keys are {sorted(record)}")
    messages = _messages(name, turns, len(pictures))
    return Sample(
        name,
        pictures,
        messages,
        tuple(record.get("families") or ()),
        tuple(record.get("categories") or ()),
        bool(record.get("novel", False)),
    )


def _picture(sample: str, index: int, item: Any, base: Path) -> Picture:
    if isinstance(item, str):
        return Picture(str(base / item))
    if isinstance(item, dict):  # a datasets.Image cell that was not decoded
        if item.get("bytes") is not None:
            return Picture(f"{sample}#{index}", item["bytes"])
        return Picture(str(item["path"]))
    raise ValueError(f"sample {sample}: image {index} is a {type(item).__name__}, not a path")


def _messages(name: str, turns: Any, images: int) -> tuple[Message, ...]:
    """Roles and contents; questions without an answer are left out."""
    messages: list[Message] = []
    for turn in turns:
        role = ROLES.get(str(turn.get("from", turn.get("role"))))
        content = turn.get("value", turn.get("content"))
        if role is None or not isinstance(content, str):
            raise ValueError(
                f"sample {name}: cannot read the turn {turn!r}; roles: {sorted(ROLES)}"
            )
        if role == "assistant" and not content.strip():
            continue
        messages.append({"role": role, "content": content})
    markers = sum(m["content"].count(IMAGE_TOKEN) for m in messages)
    if markers == 0 and images and messages:
        first = next(m for m in messages if m["role"] != "system")
        first["content"] = IMAGE_TOKEN * images + "\n" + first["content"]
    elif markers != images:
        raise ValueError(f"sample {name}: {markers} {IMAGE_TOKEN} markers, {images} images")
    answered = [
        m
        for m, following in zip(messages, [*messages[1:], None], strict=True)
        if m["role"] != "user" or (following is not None and following["role"] == "assistant")
    ]
    if not any(m["role"] == "assistant" for m in answered):
        raise ValueError(f"sample {name}: no answer to learn from")
    lost = [m for m in messages if m not in answered and IMAGE_TOKEN in m["content"]]
    for m in reversed(lost):  # the picture belongs to the conversation, not to that question
        marker = IMAGE_TOKEN * m["content"].count(IMAGE_TOKEN)
        answered[0] = {**answered[0], "content": marker + "\n" + answered[0]["content"]}
    return tuple(answered)


def _folder(folder: Path) -> Samples:
    if (folder / "dataset_info.json").exists() or (folder / "state.json").exists():
        return _dataset(str(folder), "train")
    table = folder / "metadata.jsonl"
    if table.exists():
        rows = [json.loads(line) for line in table.read_text("utf-8").splitlines() if line.strip()]
        return Samples(
            [{"image": row["file_name"], "id": row["file_name"], **row} for row in rows],
            lambda i, row: _from_columns(i, row, folder),
        )
    images = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    missing = [p for p in images if not p.with_suffix(".txt").exists()]
    if missing or not images:
        what = f"no caption file {missing[0].with_suffix('.txt')}" if missing else "no images"
        raise FileNotFoundError(f"{folder}: {what} (and no metadata.jsonl)")
    return Samples(
        [{"id": str(p.relative_to(folder)), "image": str(p.relative_to(folder))} for p in images],
        lambda i, row: _from_columns(i, {**row, "text": _caption(folder / row["image"])}, folder),
    )


def _caption(image: Path) -> str:
    return image.with_suffix(".txt").read_text(encoding="utf-8")


def _from_columns(index: int, row: dict[str, Any], base: Path) -> Sample:
    """A row with `conversations` or `messages`, `question` and `answer`, or `text`."""
    if not row.get("conversations") and not row.get("messages"):
        question, answer = row.get("question", ""), row.get("answer", row.get("text"))
        if not isinstance(answer, str):
            raise ValueError(
                f"sample {row.get('id', index)}: needs a column conversations, messages, answer or "
                f"text; it has {sorted(row)}"
            )
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        row = {**row, "messages": turns}
    return _from_llava(index, row, base)


def _dataset(name: str, split: str) -> Samples:
    import datasets

    if Path(name).is_dir():
        found = datasets.load_from_disk(name)
        found = found[split] if isinstance(found, datasets.DatasetDict) else found
    else:
        found = datasets.load_dataset(name, split=split)
    for column in ("image", "images"):
        feature = (found.features or {}).get(column)
        if isinstance(feature, datasets.Image):
            found = found.cast_column(column, datasets.Image(decode=False))
        elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
            found = found.cast_column(column, datasets.List(datasets.Image(decode=False)))
    return Samples(found, lambda i, row: _from_columns(i, row, Path(name)))
