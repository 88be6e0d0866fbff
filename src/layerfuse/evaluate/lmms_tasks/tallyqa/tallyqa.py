"""The questions of TallyQA's test split, and what an answer scores."""

from collections.abc import Sequence
from typing import Any

from layerfuse.errors import LayerfuseError, short
from layerfuse.evaluate import metrics
from layerfuse.evaluate.benchmarks import Item, official_files
from layerfuse.evaluate.benchmarks.official_pictures import picture_file
from layerfuse.evaluate.lmms_tasks.local_files import Document, as_dataset, folder_of


def questions(stand_in: Any) -> Any:
    """Read the questions: `process_docs` of the task.

    Args:
        stand_in: the dataset in whose place they come.

    Returns:
        A `datasets.Dataset`.

    Raises:
        LayerfuseError: the file is missing or damaged, or pictures are missing.
    """
    folder = folder_of("tallyqa")
    file = folder / "test.json"
    rows = official_files.read_json(file, ("image", "question", "answer", "issimple"))
    items: list[Item] = []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row["issimple"], bool):
            raise LayerfuseError(
                f"{file} has {short(row['issimple'])} as 'issimple' in row {number}; "
                "true or false is expected"
            )
        image = official_files.cell_text(file, number, row, "image")
        item = Item(
            # The ids of questions are those of the datasets that they come from.
            id=str(number),
            pictures=(picture_file(folder / "images", image),),
            question=official_files.cell_text(file, number, row, "question"),
            answers=(official_files.cell_text(file, number, row, "answer"),),
            group="simple" if row["issimple"] else "complex",
        )
        items.append(item)
    return as_dataset(official_files.checked_items(file, items))


def score(document: Document, answers: Sequence[str]) -> dict[str, float]:
    """Score an answer: `process_results` of the task.

    Args:
        document: the row of the question.
        answers: the model's one answer; numbers up to ten may be words.

    Returns:
        The score of each metric, 0..1; of the two groups that of the question's own.
    """
    said = metrics.vqa_normalize(answers[0])
    right = metrics.exact_match(said, document["answer"])
    return {"accuracy": right, f"accuracy_{document['group']}": right}
