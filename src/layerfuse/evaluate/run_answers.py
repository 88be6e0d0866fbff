"""Answers to a benchmark that lie in files: of layerfuse, of other tools, of papers.

A file of answers is JSON lines, each with the `id` of a question and the `answer` to it; what
LLaVA's files call them, `question_id` and `text`, is read too. An Excel file has the columns
`index` and `prediction`, as what is sent to MMBench's server.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from layerfuse.data import text_files
from layerfuse.errors import LayerfuseError, short
from layerfuse.evaluate.answer_folder import ANSWERS, ASKED, read_asked
from layerfuse.evaluate.benchmarks import Benchmark, Item
from layerfuse.evaluate.benchmarks.interface import JudgedItem
from layerfuse.evaluate.benchmarks.official_files import read_xlsx

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
        if not name:
            raise LayerfuseError(f"{text!r} names no run: write NAME=FOLDER, or a folder alone")
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
            question or one that is answered already, or questions have no answer.
    """
    outputs: dict[str, str] = {}
    known = {item.id for item in items}
    for number, line in _lines(file):
        place = f"{file}, line {number}"
        answer = _answer_in(line, place)
        try:
            item_id = benchmark.id_in(line, items)
        except LayerfuseError as error:
            raise LayerfuseError(f"{place}: {error}") from error
        if item_id not in known:
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
            f"{file} answers {len(outputs):,} of the {len(items):,} questions of "
            f"{benchmark.title}; the first without an answer is {missing[0]!r}"
        )
    return [JudgedItem(item, benchmark.judge(item, outputs[item.id])) for item in items]


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
            content: Any = json.loads(line)
        # RecursionError: lists in lists without an end.
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
        prediction = row["prediction"]
        # An empty cell is an empty answer, and Excel makes numbers of digits.
        said = "" if prediction is None else str(prediction)
        lines.append((number, {"id": str(row["index"]), "prediction": said}))
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
