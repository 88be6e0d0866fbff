"""What the tasks for lmms-eval share: where their files are, and a question as lmms-eval reads it.

lmms-eval loads every dataset by a builder of the library `datasets`, none of which reads these
files, and then lets the task change it (`process_docs`). The YAML files here therefore have the
builder read themselves, as a text that stands in for a dataset, and put the questions in its place.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset  # pyright: ignore[reportMissingTypeStubs]
from PIL import Image

from layerfuse.evaluate.benchmarks import Item
from layerfuse.evaluate.benchmarks.official_pictures import check_pictures
from layerfuse.vision.picture import Picture

BENCHMARKS_VARIABLE = "LAYERFUSE_BENCHMARKS"
"""The environment variable that names the folder of all benchmarks."""
Document = Mapping[str, Any]
"""A row of a task's dataset."""


def folder_of(benchmark: str) -> Path:
    """Find the files of a benchmark.

    Args:
        benchmark: its name.

    Returns:
        Its folder in `$LAYERFUSE_BENCHMARKS`, else in `benchmarks` in the working directory.
    """
    # An empty variable counts as unset.
    return Path(os.environ.get(BENCHMARKS_VARIABLE) or "benchmarks") / benchmark


def as_dataset(items: Sequence[Item]) -> Any:
    """Make a dataset for lmms-eval of questions about one picture each.

    Args:
        items: the questions.

    Returns:
        A `datasets.Dataset` of rows with `id`, `picture` (a file), `question`, `answer`, `group`.

    Raises:
        LayerfuseError: pictures are missing.
    """
    # Now, and not when the model has answered half of the questions.
    check_pictures(items)
    rows: list[dict[str, str]] = []
    for item in items:
        row = {
            "id": item.id,
            "picture": item.pictures[0].name,
            "question": item.question,
            "answer": item.answers[0],
            "group": item.group,
        }
        rows.append(row)
    # Any: `datasets` has no types
    dataset_class: Any = Dataset
    return dataset_class.from_list(rows)


def pictures(document: Document) -> list[Image.Image]:
    """Read what a question is about: `doc_to_visual` of the tasks.

    Args:
        document: the row of the question.

    Returns:
        Its one picture.

    Raises:
        LayerfuseError: the file is no readable picture.
    """
    return [Picture(document["picture"]).open()]


def words(document: Document, lmms_eval_specific_kwargs: Mapping[str, str]) -> str:
    """Write what a model is asked: `doc_to_text` of the tasks.

    Args:
        document: the row of the question.
        lmms_eval_specific_kwargs: `pre_prompt` and `post_prompt`, the words around it.

    Returns:
        The question with the words around it.
    """
    before = lmms_eval_specific_kwargs["pre_prompt"]
    behind = lmms_eval_specific_kwargs["post_prompt"]
    return f"{before}{document['question']}{behind}"
