"""Pictures without questions, to look at an encoder with."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from layerfuse.data import sources as conversations
from layerfuse.data.picture import Picture
from layerfuse.data.sample import picture_of
from layerfuse.recipe.schema import Data, Scenes

SCENES = 200
"""Generated scenes among the default pictures."""


def find_pictures(source: str | None, split: str = "train", limit: int | None = None) -> Any:
    """A sequence of `Picture`s: the images in a folder, of a LLaVA JSON, or of a dataset (hub id or
    folder; its column `image` or `images`), or, without a source, generated scenes and photographs.

    Raises FileNotFoundError or ValueError if there are none.
    """
    path = Path(source or "")
    if source is None:
        found: Any = [*photographs(), *_of(Data(scenes=Scenes(count=SCENES, questions=1)))]
    elif path.suffix in (".json", ".jsonl"):
        found = _of(Data(path=source))
    elif path.is_dir() and not conversations.is_saved_dataset(path):
        found = []
        for file in sorted(path.rglob("*")):
            # A folder can be named like an image.
            if file.suffix.lower() in conversations.IMAGE_SUFFIXES and file.is_file():
                found.append(Picture(str(file)))
    elif path.is_dir() or (not path.exists() and source[0] not in "./" and source.count("/") < 2):
        found = conversations.Records(conversations.open_dataset(source, split).records, _first)
    else:
        raise FileNotFoundError(f"no folder, LLaVA JSON or dataset {source}")
    if not found:
        suffixes = ", ".join(sorted(conversations.IMAGE_SUFFIXES))
        raise FileNotFoundError(f"no images ({suffixes}) in {source}")
    if limit is None:
        return found
    return found[:limit]


def require_look(module: str) -> Path:
    """The folder of a package of the extra `look`. Raises ImportError that says how to get it."""
    found = find_spec(module)
    if found is None or found.origin is None:
        raise ImportError(f"this needs the package {module}: pip install 'layerfuse[look]'")
    return Path(found.origin).parent


def photographs() -> list[Picture]:
    """The pictures inside scikit-image's wheel (photographs, micrographs, textures, drawings), read
    as files: its loaders would download others. Raises ImportError without scikit-image."""
    folder = require_look("skimage") / "data"
    files = [*folder.glob("*.jpg"), *folder.glob("*.png")]
    return [Picture(str(file)) for file in sorted(files)]


def _first(index: int, row: dict[str, Any]) -> Picture:
    first = next(iter(conversations.cells(row.get("image") or row.get("images"))), None)
    return picture_of(f"row {index}", first, Path())


def _of(data: Data) -> list[Picture]:
    # Several questions can be about one picture: it counts once, at its first place.
    by_name: dict[str, Picture] = {}
    for sample in conversations.load(data):
        for picture in sample.pictures:
            by_name[picture.name] = picture
    return list(by_name.values())


def batches(
    pictures: Sequence[Picture], processors: Sequence[Any], batch_size: int, start: int = 0
) -> Iterator[tuple[list[str], list[Tensor]]]:
    """(names, pixel values of each processor) of the pictures from `start` on, prepared in
    a second thread while the encoder runs.

    Raises ValueError naming a picture that cannot be used.
    """

    def prepare(begin: int) -> tuple[list[str], list[Tensor]]:
        names = []
        images = []
        for index in range(begin, min(begin + batch_size, len(pictures))):
            picture = pictures[index]
            names.append(picture.name)
            images.append(picture.open())
        pixels = []
        for processor in processors:
            pixels.append(processor(images, return_tensors="pt")["pixel_values"])
        return names, pixels

    starts = range(start, len(pictures), batch_size)
    with ThreadPoolExecutor(max_workers=1) as thread:
        ahead = None
        for begin in starts:
            # The next batch is prepared while the caller works on this one.
            ready = None
            if ahead is not None:
                ready = ahead.result()
            ahead = thread.submit(prepare, begin)
            if ready is not None:
                yield ready
        if ahead is not None:
            yield ahead.result()
