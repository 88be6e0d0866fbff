"""The questions of OCR-VQA's test split, and what an answer scores."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate import metrics
from layerfuse.evaluate.benchmarks import Item, official_files
from layerfuse.evaluate.benchmarks.official_pictures import picture_file
from layerfuse.evaluate.lmms_tasks.local_files import Document, as_dataset, folder_of

TEST = 3
"""The number of the test split; 1 is for training and 2 for validation."""


def questions(stand_in: Any) -> Any:
    """Read the questions: `process_docs` of the task.

    Args:
        stand_in: the dataset in whose place they come.

    Returns:
        A `datasets.Dataset`.

    Raises:
        LayerfuseError: the file is missing or damaged, or pictures are missing.
    """
    folder = folder_of("ocrvqa")
    file = folder / "dataset.json"
    needed = ("imageURL", "questions", "answers", "genre", "split")
    books = official_files.read_json(file, needed, id_column="id")
    items: list[Item] = []
    for number, book in enumerate(books, start=1):
        if book["split"] != TEST:
            continue
        asked = official_files.cell_texts(file, number, book, "questions")
        answers = official_files.cell_texts(file, number, book, "answers")
        if len(asked) != len(answers):
            raise LayerfuseError(
                f"{file} has {len(asked)} questions and {len(answers)} answers about the book "
                f"{book['id']!r}; one answer to each question is expected"
            )
        # So the script of its authors calls what it downloads.
        suffix = Path(official_files.cell_text(file, number, book, "imageURL")).suffix
        picture = picture_file(folder / "images", f"{book['id']}{suffix}")
        genre = official_files.cell_text(file, number, book, "genre")
        for place, (question, answer) in enumerate(zip(asked, answers, strict=True), start=1):
            items.append(Item(f"{book['id']}-{place}", (picture,), question, (answer,), genre))
    return as_dataset(official_files.checked_items(file, items))


def score(document: Document, answers: Sequence[str]) -> dict[str, float]:
    """Score an answer: `process_results` of the task.

    Args:
        document: the row of the question.
        answers: the model's one answer.

    Returns:
        The score of each metric, 0..1.
    """
    return {"accuracy": metrics.exact_match(answers[0], document["answer"])}
