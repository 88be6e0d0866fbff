"""Pictures without questions, to look at an encoder with."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from layerfuse.data.from_records import cells, picture_of
from layerfuse.data.hub_dataset import is_saved_dataset, open_dataset
from layerfuse.data.lazy_records import Records
from layerfuse.data.picture_folder import IMAGE_SUFFIXES, image_files
from layerfuse.data.sources import load
from layerfuse.data.text_files import is_json
from layerfuse.errors import LayerfuseError
from layerfuse.recipe.data_source import Data, Scenes
from layerfuse.vision.picture import Picture

SCENES = 200
"""Generated scenes among the default pictures."""

Batch = tuple[list[str], list[Tensor]]
"""Names of B pictures, and their pixel values (B, 3, height, width) by each processor."""


def find_pictures(
    source: str | None,
    split: str = "train",
    limit: int | None = None,
) -> Sequence[Picture]:
    """Find pictures.

    Args:
        source: a folder of images, a LLaVA JSON, or a dataset (hub id or saved folder; its column
            `image` or `images`). None: photographs and generated scenes.
        split: split of a dataset.
        limit: use only the first pictures.

    Returns:
        At least one picture. Those of a dataset are read when they are used.

    Raises:
        LayerfuseError: there are none, or the source cannot be read.
    """
    pictures: Sequence[Picture]
    path = Path(source or "")
    if source is None:
        scenes = _pictures_of(Data(scenes=Scenes(count=SCENES, questions=1)))
        pictures = [*photographs(), *scenes]
    elif is_json(path):
        pictures = _pictures_of(Data(path=source))
    elif path.is_dir() and not is_saved_dataset(path):
        pictures = _images_in(path)
    elif path.is_dir() or _may_be_hub_id(source):
        pictures = _pictures_of_dataset(source, split)
    else:
        raise LayerfuseError(f"no folder, LLaVA JSON or dataset {source}")
    if not pictures:
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise LayerfuseError(f"no images ({suffixes}) in {source}")
    if limit is None:
        return pictures
    return pictures[:limit]


def _may_be_hub_id(source: str) -> bool:
    """Whether this can name a dataset of the hub, `owner/name` or `name`."""
    if Path(source).exists() or source[0] in "./":
        return False
    return source.count("/") < 2


def _images_in(folder: Path) -> list[Picture]:
    """The images in a folder and its subfolders."""
    return [Picture(str(file)) for file in image_files(folder)]


def _pictures_of(data: Data) -> list[Picture]:
    """The pictures of samples, each once."""
    # Several questions can be about one picture: it keeps its first place
    by_name: dict[str, Picture] = {}
    for sample in load(data):
        for picture in sample.pictures:
            by_name[picture.name] = picture
    return list(by_name.values())


def _pictures_of_dataset(source: str, split: str) -> Sequence[Picture]:
    """The first picture of each row of a Hugging Face dataset."""
    try:
        # Masks and other media beside the pictures do not matter to a look.
        rows = open_dataset(source, split, refuse_unread=False).records
    except LayerfuseError:
        raise
    # What is wrong with a name, a split or the network, the package datasets says by many types
    except (OSError, ValueError) as error:
        raise LayerfuseError(f"the dataset {source} cannot be opened: {error}") from error
    return Records(rows, _first_picture)


def _first_picture(index: int, row: dict[str, Any]) -> Picture:
    """The first picture of a row of a dataset."""
    row_cells = cells(row.get("image") or row.get("images"))
    # An empty row is refused with its number when the picture is made
    cell = next(iter(row_cells), None)
    return picture_of(f"row {index}", cell, Path())


def require_look(module: str) -> Path:
    """Check that a package of the extra `look` is installed.

    Args:
        module: the name that is imported.

    Returns:
        The package's folder.

    Raises:
        LayerfuseError: it is missing; the message says how to get it.
    """
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise LayerfuseError(f"this needs the package {module}: pip install 'layerfuse[look]'")
    return Path(spec.origin).parent


def photographs() -> list[Picture]:
    """Find the pictures inside scikit-image's wheel: photographs, micrographs, textures, drawings.

    Returns:
        The pictures, by name.

    Raises:
        LayerfuseError: scikit-image is not installed.
    """
    # Read as files, since scikit-image's own loaders would download more
    folder = require_look("skimage") / "data"
    files = [*folder.glob("*.jpg"), *folder.glob("*.png")]
    return [Picture(str(file)) for file in sorted(files)]


def batches(
    pictures: Sequence[Picture],
    processors: Sequence[Any],
    batch_size: int,
    start: int = 0,
) -> Iterator[Batch]:
    """Prepare pictures in a second thread while the encoder runs.

    Args:
        pictures: what to prepare.
        processors: image processors (`Any`: transformers gives them no common type).
        batch_size: B, pictures prepared at once; the last batch may be smaller.
        start: the first picture.

    Yields:
        A batch of pictures, with the pixel values of each processor.

    Raises:
        LayerfuseError: a picture cannot be used; it is named.
    """

    def prepare(begin: int) -> Batch:
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

    # Decoding lets go of Python's lock, so one more thread is enough to keep the encoder busy
    with ThreadPoolExecutor(max_workers=1) as thread:
        ahead: Future[Batch] | None = None
        for begin in range(start, len(pictures), batch_size):
            ready = None
            if ahead is not None:
                ready = ahead.result()
            # The next batch is prepared while the caller works on this one
            ahead = thread.submit(prepare, begin)
            if ready is not None:
                yield ready
        if ahead is not None:
            yield ahead.result()
