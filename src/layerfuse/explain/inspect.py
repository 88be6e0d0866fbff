"""The verb `inspect`: one answer of one model, as figures and a page."""

import hashlib
import re
from pathlib import Path

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.answer import LONGEST_ANSWER
from layerfuse.evaluate.load_answerer import load_answerer
from layerfuse.explain.answer_figures import draw
from layerfuse.explain.contributions import means_of_pictures, stored_means
from layerfuse.explain.inspection import Inspection, inspect_reading, save
from layerfuse.explain.page import write_page
from layerfuse.explain.reading import read
from layerfuse.files import refuse_unwritable
from layerfuse.look.pictures import find_pictures
from layerfuse.progress import Progress, silent

QUESTION_LENGTH = 40
"""letters of a question that name its folder, at most"""


def inspect_answer(
    model: Path,
    image: Path,
    question: str,
    output: Path,
    *,
    data: str | None = None,
    split: str = "train",
    limit: int | None = None,
    max_new_tokens: int = LONGEST_ANSWER,
    progress: Progress = silent,
) -> Inspection:
    """Ask a model one question about one picture, and write what can be seen of the answer.

    Args:
        model: folder of a trained model.
        image: a picture.
        question: the question.
        output: folder that gets `inspect.html`, `inspect.json`, `inspect.safetensors`,
            `picture.png` and `figures/`.
        data: pictures whose mean stands in for each layer, in the forms of `layerfuse similarity`;
            None takes the means that the model stores, or those of this picture.
        split: of a dataset.
        limit: of the pictures of `data`.
        max_new_tokens: longest answer, in tokens.
        progress: told of every batch of `data`.

    Returns:
        What was seen.

    Raises:
        LayerfuseError: the model, the picture or the data cannot be read, or the folder cannot be
            written.
    """
    if not question.strip():
        raise LayerfuseError("the question is empty: ask something")
    refuse_unwritable(output)
    answerer = load_answerer(model)
    reading = read(answerer, image, question, max_new_tokens)
    if data is None:
        means = stored_means(answerer, reading)
    else:
        means = means_of_pictures(answerer, find_pictures(data, split, limit), progress)
    # The folder of an arm says more than `model` inside it.
    name = model.resolve()
    if name.name == "model":
        name = name.parent
    inspection = inspect_reading(
        answerer, reading, means, name=name.name, max_new_tokens=max_new_tokens
    )
    save(inspection, output)
    draw(inspection, output / "figures")
    write_page(inspection, output)
    return inspection


def default_folder(model: Path, image: Path, question: str) -> Path:
    """Name the folder of an inspection after its picture and question, inside the model's.

    Args:
        model: folder of a trained model.
        image: a picture.
        question: the question.

    Returns:
        A folder, which need not exist.
    """
    words = re.sub(r"[^a-z0-9]+", "-", question.lower()).strip("-")[:QUESTION_LENGTH]
    # Words alone are the same for pictures of one name, and for questions of other scripts.
    digest = hashlib.sha256(f"{image.absolute()}\n{question}".encode()).hexdigest()[:6]
    return model / "inspection" / f"{image.stem}-{words or 'question'}-{digest}"
