"""Answers to a benchmark that lie in files: of layerfuse, of other tools, of papers.

A file of answers is JSON lines, each with the `id` of a question and the `answer` to it; what
LLaVA's files call them, `question_id` and `text`, is read too. An Excel file has the columns
`index` and `prediction`, as what is sent to MMBench's server. How the model of
another tool writes boxes is said by a file `boxes.yaml` in the folder of its answers, such as
`{scale: pixels, padded: false}`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import ValidationError

from layerfuse.data import text_files
from layerfuse.errors import LayerfuseError, short
from layerfuse.evaluate.answer_folder import ANSWERS, ASKED, read_asked
from layerfuse.evaluate.asking import digest_of_questions
from layerfuse.evaluate.benchmarks import Benchmark, Item
from layerfuse.evaluate.benchmarks.interface import JudgedItem, judged_item
from layerfuse.evaluate.benchmarks.official_files import cell_text, read_xlsx
from layerfuse.evaluate.boxes import BoxForm
from layerfuse.evaluate.suites import Prompt
from layerfuse.files import read_yaml
from layerfuse.recipe.reader import problems_of

BOXES = "boxes.yaml"
"""How the boxes of another tool's answers are written, in the folder of the run."""
EXCEL = ".xlsx"
ANSWER_KEYS = ("answer", "output", "text", "prediction")
"""One of them: a line of layerfuse holds `output`, one of LLaVA `text`."""


@dataclass(frozen=True)
class Run:
    """One model whose answers are compared.

    Attributes:
        name: in tables.
        folder: of its answers, a file or a folder for each benchmark.
    """

    name: str
    folder: Path

    @classmethod
    def parse(cls, text: str) -> "Run":
        """Read how the command line names a run.

        Args:
            text: a folder, or `NAME=FOLDER`.

        Returns:
            The run; a folder without a name is called as the folder is.

        Raises:
            LayerfuseError: there is no such folder, or its name is empty.
        """
        name, separator, folder = text.partition("=")
        # A folder may have such a sign in its own name.
        if not separator or Path(text).is_dir():
            folder = text
            name = Path(text).resolve().name
        path = Path(folder)
        if not name or not name.isprintable():
            raise LayerfuseError(
                f"{text!r} names no run: write NAME=FOLDER, with a name of one line, or a folder "
                "alone"
            )
        if not path.is_dir():
            raise LayerfuseError(
                f"no folder {folder}: give one that `layerfuse eval --suite` wrote, or one of your "
                "own with a file BENCHMARK.jsonl for each benchmark"
            )
        return cls(name, path)

    def file_of(self, benchmark: str) -> Path | None:
        """Find the answers to a benchmark.

        Args:
            benchmark: its name.

        Returns:
            The file; None where the run has no answers to it.

        Raises:
            LayerfuseError: there are two such files.
        """
        places = [self.folder / benchmark / ANSWERS]
        places += [self.folder / f"{benchmark}{suffix}" for suffix in (".jsonl", EXCEL)]
        found = [file for file in places if file.is_file()]
        if len(found) > 1:
            raise LayerfuseError(f"{found[0]} and {found[1]} answer {benchmark}: remove one")
        return found[0] if found else None

    def prompt_of(self, benchmark: str) -> Any:
        """Say how the questions of a benchmark were put.

        Args:
            benchmark: its name.

        Returns:
            The prompt as layerfuse wrote it down; None for answers of other tools.

        Raises:
            LayerfuseError: what was written down cannot be read.
        """
        file = self.folder / benchmark / ASKED
        return read_asked(file).get("prompt") if file.is_file() else None


def judged_answers(file: Path, benchmark: Benchmark, items: Sequence[Item]) -> list[JudgedItem]:
    """Read and score a file of answers.

    Args:
        file: of JSON lines, or an Excel file.
        benchmark: that they answer.
        items: all its questions.

    Returns:
        Every question with what its answer scores.

    Raises:
        LayerfuseError: the file is empty or cut off, a line is no answer, answers an unknown
            question or one that is answered already, questions have no answer, or what lies beside
            the file says that other questions were asked.
    """
    asked = file.parent / ASKED
    if file.name == ANSWERS and asked.is_file():
        items = _as_asked(asked, benchmark, items)
    else:
        items = _with_said_boxes(file, benchmark, items)
    outputs: dict[str, str] = {}
    known = {item.id for item in items}
    # The same for all questions, of which there is at least one.
    left_out = items[0].left_out
    for number, line in _lines(file):
        place = f"{file}, line {number}"
        answer = _answer_in(line, place)
        try:
            item_id = benchmark.id_in(line, items)
        except LayerfuseError as error:
            raise LayerfuseError(f"{place}: {error}") from error
        if item_id not in known and item_id not in left_out:
            raise LayerfuseError(
                f"{place} answers {short(item_id)}, no question of {benchmark.title}, whose ids "
                f"are such as {items[0].id!r}"
            )
        if item_id in outputs:
            raise LayerfuseError(f"{place} answers {item_id!r} a second time")
        outputs[item_id] = answer
    missing = [item.id for item in items if item.id not in outputs]
    # A score over fewer questions would be that of another benchmark.
    if missing:
        raise LayerfuseError(
            f"{file} answers {len(items) - len(missing):,} of the {len(items):,} questions of "
            f"{benchmark.title}; the first without an answer is {missing[0]!r}"
        )
    return [judged_item(benchmark, item, outputs[item.id]) for item in items]


def _as_asked(file: Path, benchmark: Benchmark, items: Sequence[Item]) -> Sequence[Item]:
    """The questions as a model was asked them.

    Args:
        file: asked.json.
        benchmark: that the answers beside it are scored as answers to.
        items: all its questions, as they are at hand.

    Raises:
        LayerfuseError: another benchmark was asked, or other questions of it.
    """
    asked = read_asked(file)
    name = asked.get("benchmark", benchmark.name)
    if name != benchmark.name:
        raise LayerfuseError(
            f"{file} says that the answers beside it are to another benchmark, {short(name)}, and "
            f"not to {benchmark.name}"
        )
    if "prompt" not in asked:
        return items
    try:
        prompt = Prompt.model_validate(asked["prompt"])
    except ValidationError as error:
        raise LayerfuseError(f"{file}, prompt:\n{problems_of(error)}") from error
    if prompt.boxes is not None:
        form = prompt.boxes
        items = [benchmark.with_box_form(item, form) for item in items]
    # Not their pictures, which scoring does without.
    at_hand = digest_of_questions(items, prompt)
    if asked.get("questions", at_hand) != at_hand:
        raise LayerfuseError(
            f"{file} says that the answers beside it are to other questions than those of "
            f"{benchmark.title} at hand, or to the same about pictures of other names, or to a "
            "part of them (`layerfuse eval --limit`): score them with the files that they were "
            "asked with, and ask all questions"
        )
    return items


def _with_said_boxes(file: Path, benchmark: Benchmark, items: Sequence[Item]) -> Sequence[Item]:
    """The questions, with how another tool's model writes boxes where a file of the run says it.

    Args:
        file: of answers.
        benchmark: that they answer.
        items: all its questions.

    Raises:
        LayerfuseError: that file does not say how boxes are written.
    """
    folder = file.parent.parent if file.name == ANSWERS else file.parent
    said = folder / BOXES
    # It is about the benchmarks with boxes alone, of all that the run has answers to.
    if not items[0].boxes or not said.is_file():
        return items
    try:
        form = BoxForm.model_validate(read_yaml(text_files.read_text(said)))
    except yaml.YAMLError as error:
        raise LayerfuseError(f"cannot read {said}: {error}") from error
    except ValidationError as error:
        raise LayerfuseError(f"{said}:\n{problems_of(error)}") from error
    return [benchmark.with_box_form(item, form) for item in items]


def _lines(file: Path) -> list[tuple[int, Mapping[str, Any]]]:
    """The lines of a file of answers with their numbers, from 1."""
    if file.suffix == EXCEL:
        return _rows(file)
    lines: list[tuple[int, Mapping[str, Any]]] = []
    # Not `splitlines`, which would split at separators within an answer too.
    for number, line in enumerate(text_files.read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            content: Any = json.loads(line, object_pairs_hook=text_files.mapping_of)
        # RecursionError: lists in lists without an end; ValueError: a key that stands twice too.
        except (ValueError, RecursionError) as error:
            raise LayerfuseError(
                f"{file}, line {number} is no JSON, or cut off: {error}"
            ) from error
        if not isinstance(content, dict):
            raise LayerfuseError(
                f"{file}, line {number} holds {short(content)}; expected: an object with id and "
                "answer"
            )
        lines.append((number, cast("dict[str, Any]", content)))
    if not lines:
        raise LayerfuseError(f"{file} holds no answers")
    return lines


def _rows(file: Path) -> list[tuple[int, Mapping[str, Any]]]:
    """The rows of an Excel file as lines; what stands beside the predictions is not read."""
    lines: list[tuple[int, Mapping[str, Any]]] = []
    # The first line is the head.
    for number, row in enumerate(read_xlsx(file, ("index", "prediction")), 2):
        # An empty cell is an empty answer, and Excel makes numbers of digits.
        index = cell_text(file, number, row, "index")
        lines.append(
            (number, {"id": index, "prediction": cell_text(file, number, row, "prediction")})
        )
    return lines


def _answer_in(line: Mapping[str, Any], place: str) -> str:
    """The answer that a line holds.

    Raises:
        LayerfuseError: it holds none, several, or one that is no text.
    """
    found = [key for key in ANSWER_KEYS if key in line]
    if not found:
        raise LayerfuseError(
            f"{place} holds no answer; expected one of {', '.join(ANSWER_KEYS)}, found: "
            f"{', '.join(line) or 'nothing'}"
        )
    # Other tools write what is right beside what was said, and call it `answer`.
    if len(found) > 1:
        raise LayerfuseError(
            f"{place} holds {' and '.join(found)}, and which of them the model said is not known: "
            "leave one"
        )
    answer = line[found[0]]
    if not isinstance(answer, str):
        raise LayerfuseError(f"{place}: the answer {short(answer)} is no text")
    return answer
