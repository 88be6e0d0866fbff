"""Pictures in, reports out: batches prepared in a second thread while the encoder runs, progress,
and JSON files that are written whole or not at all."""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from torch import Tensor

from layerfuse.data.samples import Picture


def batches(
    pictures: Sequence[Picture], processors: Sequence[Any], batch_size: int, start: int = 0
) -> Iterator[tuple[list[str], list[Tensor]]]:
    """(names, pixel values of each processor) of the pictures from `start` on.

    Raises ValueError naming a picture that cannot be used.
    """

    def prepare(begin: int) -> tuple[list[str], list[Tensor]]:
        chosen = [pictures[i] for i in range(begin, min(begin + batch_size, len(pictures)))]
        images = [picture.open() for picture in chosen]
        pixels = [p(images, return_tensors="pt")["pixel_values"] for p in processors]
        return [picture.name for picture in chosen], pixels

    starts = range(start, len(pictures), batch_size)
    with ThreadPoolExecutor(max_workers=1) as thread:
        ahead = None
        for begin in [*starts, None]:
            ready = ahead and ahead.result()
            ahead = None if begin is None else thread.submit(prepare, begin)
            if ready:
                yield ready


def progress_bar(console: Console) -> Progress:
    """A progress bar with a count and the time left."""
    return Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console)


def write_json(file: Path, report: dict[str, Any]) -> Path:
    """Replace `file` by a report."""
    partial = file.with_suffix(".tmp")
    partial.write_text(json.dumps(report) + "\n", "utf-8")
    return partial.replace(file)


def read_json(file: Path) -> dict[str, Any]:
    """A report. Raises ValueError naming a file that holds none."""
    try:
        return json.loads(file.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is damaged ({error}): delete it to measure again") from error
