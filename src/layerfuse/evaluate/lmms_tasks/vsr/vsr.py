"""The statements of Visual Spatial Reasoning's test splits, and what an answer scores."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layerfuse.errors import LayerfuseError, short
from layerfuse.evaluate.answer_parsing import leading_yes_no
from layerfuse.evaluate.benchmarks import Item, official_files
from layerfuse.evaluate.benchmarks.official_pictures import picture_file
from layerfuse.evaluate.lmms_tasks.local_files import Document, as_dataset, folder_of

WORDS = {0: "no", 1: "yes"}
"""What is right, by the label of a statement."""


def random_statements(stand_in: Any) -> Any:
    """Read the statements of the random split: `process_docs` of the task.

    Args:
        stand_in: the dataset in whose place they come.

    Returns:
        A `datasets.Dataset`.

    Raises:
        LayerfuseError: the file is missing or damaged, or pictures are missing.
    """
    return _statements(folder_of("vsr"), "random")


def zero_shot_statements(stand_in: Any) -> Any:
    """Read the statements of the zero-shot split, see `random_statements`.

    Args:
        stand_in: the dataset in whose place they come.

    Returns:
        A `datasets.Dataset`.

    Raises:
        LayerfuseError: the file is missing or damaged, or pictures are missing.
    """
    return _statements(folder_of("vsr"), "zeroshot")


def _statements(folder: Path, split: str) -> Any:
    """The statements of one of the two ways to split them."""
    file = folder / "splits" / split / "test.jsonl"
    rows = official_files.read_json_lines(file, ("image", "caption", "label", "relation"))
    items: list[Item] = []
    for number, row in enumerate(rows, start=1):
        if row["label"] not in WORDS:
            raise LayerfuseError(
                f"{file} has {short(row['label'])} as 'label' in row {number}; 0 or 1 is expected"
            )
        image = official_files.cell_text(file, number, row, "image")
        item = Item(
            # The files have no ids.
            id=str(number),
            pictures=(picture_file(folder / "images", image),),
            question=official_files.cell_text(file, number, row, "caption"),
            answers=(WORDS[row["label"]],),
            group=official_files.cell_text(file, number, row, "relation"),
        )
        items.append(item)
    return as_dataset(official_files.checked_items(file, items))


def score(document: Document, answers: Sequence[str]) -> dict[str, float]:
    """Score an answer: `process_results` of the tasks.

    Args:
        document: the row of the statement.
        answers: the model's one answer.

    Returns:
        The score of each metric, 0..1.
    """
    return {"accuracy": float(leading_yes_no(answers[0]) == document["answer"])}
