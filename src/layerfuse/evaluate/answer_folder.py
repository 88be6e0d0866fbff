"""The folder of a run of `eval`: what was asked, and every answer as soon as it is given.

A run that was stopped goes on from what lies there, and answers to something else are refused. Of
several processes that were launched together, each asks its share of the questions, and the first
alone reads and writes the folder.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import Field, asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from layerfuse.errors import LayerfuseError, short
from layerfuse.files import locked, write_text
from layerfuse.hardware import joined_process
from layerfuse.vision.picture import Picture

ANSWERS = "answers.jsonl"
"""The answers, one line as soon as each is given."""
ASKED = "asked.json"
"""How they were asked for: answers to other questions are not continued."""
MODEL_FILES = (".json", ".jinja", ".safetensors")
"""What the names of the files end with that a model is loaded from."""


class KeptRow(Protocol):
    """A dataclass whose instances are lines of a file."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def id(self) -> str:
        """Of the question."""
        ...


Row = TypeVar("Row", bound=KeptRow)
Batch = TypeVar("Batch")


@dataclass(frozen=True)
class GivenAnswer:
    """A model's answer to one question: a line of answers.jsonl.

    Attributes:
        id: of the question.
        prompt: what the model was asked, without markers of pictures.
        output: what it said, to the end of its answer.
        parsed: what is read in it; None where nothing is found.
        score: 0..1.
        seconds: that the answer took; those of a batch are shared among its questions. 0 where it
            is known from the likelihood of the right answer, which greedy decoding would give.
    """

    id: str
    prompt: str
    output: str
    parsed: str | None
    score: float
    seconds: float


@dataclass(frozen=True)
class AskedModel:
    """Which model gave the answers.

    Attributes:
        folder: of the model, as it was named; it may be moved.
        digest: of its files: a model that was trained again is another one.
    """

    folder: str
    digest: str

    @classmethod
    def of(
        cls, folder: Path, dtype: str | None = None, *, batch_invariant: bool = True
    ) -> "AskedModel":
        """Name the model in a folder.

        Args:
            folder: of a trained model.
            dtype: of its arithmetic; None is that in which it was saved.
            batch_invariant: whether its answers do not depend on the batch.

        Returns:
            Its folder, and the SHA-256 of the files that it is loaded from and of how it answers.

        Raises:
            LayerfuseError: a file cannot be read.
        """
        digest = hashlib.sha256()
        if dtype is not None:
            # answers in other numbers are other answers
            digest.update(f"{dtype}\n".encode())
        if not batch_invariant:
            digest.update(b"as batched\n")
        try:
            for file in sorted(folder.iterdir()):
                if file.suffix not in MODEL_FILES or not file.is_file():
                    continue
                with file.open("rb") as opened:
                    content = hashlib.file_digest(opened, "sha256").hexdigest()
                digest.update(f"{file.name} {content}\n".encode())
        except OSError as error:
            raise LayerfuseError(f"cannot read the model in {folder}: {error}") from error
        return cls(str(folder), digest.hexdigest())


@dataclass(frozen=True)
class Asked:
    """What must be equal for the answers in a folder to be continued: the content of asked.json.

    Attributes:
        benchmark: its name; `data` for samples of the user's own.
        model: the digest of its files.
        prompt: how the questions are put, and how long answers may be.
        questions: digest of all questions as they are put, with their ids and pictures' names.
        pictures: digest of those, by `digest_of_pictures`.
        folder: of the model; it alone may differ.
    """

    benchmark: str
    model: str
    prompt: dict[str, Any]
    questions: str
    pictures: str
    folder: str


_DIFFERENCES = {
    "benchmark": "to another benchmark",
    "model": "of another model, of this one before it was trained again, in another --dtype, or "
    "with another --batch-invariant",
    "prompt": "to another prompt",
    "questions": "to other questions, or to the same about pictures of other names",
    "pictures": "to the same questions about other pictures",
}
"""What is said where a part of `Asked` differs."""


class AnswerFolder:
    """The answers that one model gives to one set of questions, as files of JSON lines.

    Args:
        folder: is made when it is opened.
        asked: what the answers are to.
        questions: the ids of all questions.
    """

    def __init__(self, folder: Path, asked: Asked, questions: Collection[str]) -> None:
        self.folder = folder
        self.asked = asked
        self.questions = frozenset(questions)
        self.process = joined_process()

    @contextmanager
    def opened(self) -> Generator[None]:
        """Hold the folder, so that no other run writes into it.

        Yields:
            Nothing.

        Raises:
            LayerfuseError: the folder holds answers to something else, another run is writing it,
                or it cannot be written.
        """
        if not self.process.is_first:
            yield
            return
        _begin(self.folder, self.asked)

        def refuse() -> None:
            raise LayerfuseError(f"another process is writing the answers in {self.folder}")

        # Two runs would ask everything twice, and write into each other's lines.
        with locked(self.folder / ".lock", refuse):
            yield

    def read(self, name: str, kind: type[Row]) -> dict[str, Row]:
        """Read the lines that are there already.

        Args:
            name: of the file, which may be missing.
            kind: of the lines.

        Returns:
            The lines by the ids of their questions, the same in every process.

        Raises:
            LayerfuseError: a line is of another kind, of an unknown question, or comes twice.
        """
        rows: dict[str, Row] = {}
        if self.process.is_first:
            rows = self._read(self.folder / name, kind)
        # All processes must agree on which questions are left.
        return self.process.from_first(rows)

    def _read(self, file: Path, kind: type[Row]) -> dict[str, Row]:
        """The lines of a file by the ids of their questions."""
        if not file.is_file():
            return {}
        reader = TypeAdapter(kind)
        rows: dict[str, Row] = {}
        for number, line in enumerate(_whole_lines(file), 1):
            place = f"{file}, line {number}"
            try:
                # Strict: a number is no text, and what is not written here is not read as such.
                row = reader.validate_json(line, strict=True, extra="forbid")
            except ValidationError as error:
                reason = error.errors()[0]
                where = ".".join(str(part) for part in reason["loc"])
                raise LayerfuseError(
                    f"{place} is no answer: {where}: {reason['msg']}. Take the line out, and its "
                    "question is asked again"
                ) from error
            if row.id not in self.questions:
                raise LayerfuseError(
                    f"{place} answers {short(row.id)}, no question of {self.asked.benchmark}. "
                    f"Take the line out, or score the file by `layerfuse compare`"
                )
            if row.id in rows:
                raise LayerfuseError(
                    f"{place} answers {row.id!r} a second time: take one of the lines out"
                )
            rows[row.id] = row
        return rows

    def work(
        self,
        name: str,
        batches: Sequence[Batch],
        answer: Callable[[Batch], list[Row]],
    ) -> Iterator[list[Row]]:
        """Answer batches, each in one of the processes, and keep the lines as they come.

        Args:
            name: of the file that the lines are added to.
            batches: the same in every process.
            answer: gives the lines of a batch.

        Yields:
            Lines that were just written, in the order of the batches, the same in every process.

        Raises:
            LayerfuseError: the file cannot be written.
        """
        for start in range(0, len(batches), self.process.number):
            own = start + self.process.index
            rows: list[Row] = []
            if own < len(batches):
                rows = answer(batches[own])
            rows = self.process.gather(rows)
            # A kill leaves whole lines but for the last one, which is asked again.
            self.append(name, rows)
            yield rows

    def append(self, name: str, rows: Sequence[KeptRow]) -> None:
        """Add lines at the end of a file.

        Args:
            name: of the file.
            rows: to write; of several processes the first writes.

        Raises:
            LayerfuseError: the disk is full, or the file may not be written.
        """
        if not self.process.is_first:
            return
        lines = [json.dumps(asdict(row)) + "\n" for row in rows]
        file = self.folder / name
        try:
            # Opened anew for every batch: closing it may be what fails.
            with file.open("a", encoding="utf-8") as opened:
                opened.write("".join(lines))
        except OSError as error:
            raise LayerfuseError(f"cannot write {file}: {error}") from error


def digest_of(questions: Sequence[Any]) -> str:
    """The digest of questions, in whatever order.

    Args:
        questions: each as what JSON can hold.

    Returns:
        Their SHA-256.
    """
    lines = sorted(json.dumps(question) for question in questions)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def digest_of_pictures(asked: Iterable[tuple[str, Sequence[Picture]]]) -> str:
    """The digest of what pictures are known by without reading all of their files.

    Args:
        asked: the ids of questions, in whatever order, with the pictures of each.

    Returns:
        The SHA-256 of how many bytes the file of each picture of each question has, or of the bytes
        of a picture that is no file. A file in the place of another is told from it unless both are
        of the same length; folders may be moved.

    Raises:
        LayerfuseError: a picture cannot be read.
    """
    # Many questions are about the same picture.
    known: dict[str, str] = {}
    lines: list[str] = []
    for question, pictures in asked:
        for picture in pictures:
            if picture.name not in known:
                is_file = picture.reader is None
                known[picture.name] = str(picture.file_bytes()) if is_file else picture.digest()
        lines.append(json.dumps([question, *(known[picture.name] for picture in pictures)]))
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _begin(folder: Path, asked: Asked) -> None:
    """Write down what is asked, or check that it is what the folder was begun for.

    Raises:
        LayerfuseError: the folder is of another run, or cannot be written.
    """
    note = folder / ASKED
    if not note.is_file():
        answers = folder / ANSWERS
        if answers.is_file():
            raise LayerfuseError(
                f"{answers} lies beside no {ASKED}: move it, or take another folder"
            )
        write_text(note, json.dumps(asdict(asked), indent=1) + "\n")
        return
    before = read_asked(note)
    wanted = asdict(asked)
    for key, difference in _DIFFERENCES.items():
        # Earlier versions did not write down which pictures were asked about.
        if key == "pictures" and key not in before:
            continue
        if before.get(key) != wanted[key]:
            raise LayerfuseError(
                f"{folder} holds answers {difference}. Remove the folder, or give another one by "
                "--output"
            )


def read_asked(file: Path) -> dict[str, Any]:
    """Read how the answers beside a file were asked for.

    Args:
        file: asked.json.

    Returns:
        Its content, as `Asked` has it.

    Raises:
        LayerfuseError: it cannot be read.
    """
    try:
        content: Any = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise LayerfuseError(
            f"cannot read {file}: {error}. It says what the answers beside it are to: move the "
            "folder away, and they are asked for again"
        ) from error
    if not isinstance(content, dict):
        raise LayerfuseError(
            f"{file} holds {short(content)}; a mapping is expected. Move the folder away, and its "
            "answers are asked for again"
        )
    return cast("dict[str, Any]", content)


def _whole_lines(file: Path) -> list[str]:
    """The lines of a file; a last one without an end, which a kill left, is taken out of it."""
    try:
        content = file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        text = whole.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LayerfuseError(f"cannot read {file}: {error}") from error
    if len(whole) < len(content):
        write_text(file, text)
    # Not `splitlines`, which would split at separators within a text too.
    return text.split("\n")[:-1]
