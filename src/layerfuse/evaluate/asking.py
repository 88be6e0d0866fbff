"""Ask a model the questions of a benchmark, and keep every answer as it comes."""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from layerfuse.data.sample import Sample
from layerfuse.errors import LayerfuseError, short
from layerfuse.evaluate.answer import Answerer
from layerfuse.evaluate.benchmarks import Benchmark, Item
from layerfuse.evaluate.benchmarks.interface import JudgedItem
from layerfuse.evaluate.questions import Question, with_all_pictures
from layerfuse.evaluate.suites import Prompt
from layerfuse.files import locked, write_text
from layerfuse.model.chat_template import literal
from layerfuse.progress import Progress, silent

ANSWERS = "answers.jsonl"
"""The answers to a benchmark, in its folder: one line as soon as each is given."""
ASKED = "asked.json"
"""How they were asked for: answers to other questions are not continued."""
MODEL_FILES = (".json", ".jinja", ".safetensors")
"""What the names of the files end with that a model is loaded from."""


@dataclass(frozen=True)
class GivenAnswer:
    """A model's answer to one question of a benchmark: a line of answers.jsonl.

    Attributes:
        id: of the question.
        prompt: what the model was asked, without markers of pictures.
        output: what it said, to the end of its answer.
        parsed: what the benchmark reads in it; None where it finds nothing.
        score: 0..1.
        seconds: that the answer took; those of a batch are shared among its questions.
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
    def of(cls, folder: Path) -> "AskedModel":
        """Name the model in a folder.

        Args:
            folder: of a trained model.

        Returns:
            Its folder, and the SHA-256 of the files that it is loaded from.

        Raises:
            LayerfuseError: a file cannot be read.
        """
        digest = hashlib.sha256()
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
        benchmark: its name.
        model: the digest of its files.
        prompt: how the questions are put.
        questions: digest of all questions as they are put, with their ids and pictures' names.
        folder: of the model; it alone may differ.
    """

    benchmark: str
    model: str
    prompt: dict[str, Any]
    questions: str
    folder: str


_DIFFERENCES = {
    "benchmark": "to another benchmark",
    "model": "of another model, or of this one before it was trained again",
    "prompt": "to another prompt",
    "questions": "to other questions, or to the same about other pictures",
}
"""What is said where a part of `Asked` differs."""


def ask_benchmark(
    answerer: Answerer,
    benchmark: Benchmark,
    items: Sequence[Item],
    prompt: Prompt,
    folder: Path,
    *,
    model: AskedModel,
    batch_size: int = 32,
    progress: Progress = silent,
) -> list[JudgedItem]:
    """Ask a model every question of a benchmark that it has not answered yet.

    Args:
        answerer: the model.
        benchmark: whose questions they are.
        items: all its questions.
        prompt: how they are put.
        folder: of the answers; those that lie there already are kept.
        model: tells its answers from those of others.
        batch_size: questions answered at once.
        progress: is told of the questions that are answered.

    Returns:
        Every question with what its answer scores.

    Raises:
        LayerfuseError: the folder holds answers to something else, another process is writing it,
            or it cannot be written.
    """
    asked = Asked(
        benchmark=benchmark.name,
        model=model.digest,
        prompt=prompt.model_dump(mode="json"),
        questions=_digest(items, prompt),
        folder=model.folder,
    )
    _begin(folder, asked)

    def refuse() -> None:
        raise LayerfuseError(f"another process is writing the answers in {folder}")

    # Two processes would ask everything twice, and write into each other's lines.
    with locked(folder / ".lock", refuse):
        outputs = _given_before(folder / ANSWERS, benchmark, items)
        waiting = [item for item in items if item.id not in outputs]
        progress(benchmark.title, len(outputs), len(items))
        for start in range(0, len(waiting), batch_size):
            batch = waiting[start : start + batch_size]
            given = _ask_batch(answerer, benchmark, batch, prompt)
            for answer in given:
                outputs[answer.id] = answer.output
            # A kill leaves whole lines but for the last one, which is asked again.
            _append(folder / ANSWERS, given)
            progress(benchmark.title, len(outputs), len(items))
    # Judged again: an answer of an earlier version may have been read in another way.
    return [JudgedItem(item, benchmark.judge(item, outputs[item.id])) for item in items]


def _ask_batch(
    answerer: Answerer, benchmark: Benchmark, batch: Sequence[Item], prompt: Prompt
) -> list[GivenAnswer]:
    """The answers to the questions of one batch."""
    began = time.perf_counter()
    texts = answerer.answer(
        [asked_question(item, prompt) for item in batch],
        max_new_tokens=prompt.max_new_tokens,
        batch_size=len(batch),
        stop=prompt.stop,
    )
    seconds = (time.perf_counter() - began) / len(batch)
    given: list[GivenAnswer] = []
    for item, text in zip(batch, texts, strict=True):
        judged = benchmark.judge(item, text)
        answer = GivenAnswer(
            id=item.id,
            prompt=prompt.ask(item),
            output=text,
            parsed=judged.parsed,
            score=judged.score,
            seconds=round(seconds, 4),
        )
        given.append(answer)
    return given


def asked_question(item: Item, prompt: Prompt, answer: str = "") -> Question:
    """Give a question as a model is asked it: its pictures, then the prompt's words.

    Args:
        item: of a benchmark.
        prompt: how it is put.
        answer: whose likelihood is measured; asking does not need it, and what is right may be a
            box and no text.

    Returns:
        The question.
    """
    words = with_all_pictures(literal(prompt.ask(item)), len(item.pictures))
    messages = ({"role": "user", "content": words},)
    sample = Sample(item.id, item.pictures, messages)
    return Question(item.id, sample, messages, answer, item.group, item.group)


def _digest(items: Sequence[Item], prompt: Prompt) -> str:
    """The SHA-256 of all that is asked, in whatever order."""
    asked: list[str] = []
    for item in items:
        # Without the folder, which may be moved.
        pictures = [Path(picture.name).name for picture in item.pictures]
        asked.append(json.dumps([item.id, prompt.ask(item), pictures]))
    return hashlib.sha256("\n".join(sorted(asked)).encode()).hexdigest()


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
    for key, difference in _DIFFERENCES.items():
        if before.get(key) != asdict(asked)[key]:
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
        raise LayerfuseError(f"cannot read {file}: {error}") from error
    if not isinstance(content, dict):
        raise LayerfuseError(f"{file} holds {short(content)}; a mapping is expected")
    return cast("dict[str, Any]", content)


def _given_before(file: Path, benchmark: Benchmark, items: Sequence[Item]) -> dict[str, str]:
    """The answers that lie in a file already, by the ids of their questions.

    Raises:
        LayerfuseError: a line is no answer to a question of the benchmark, or comes twice.
    """
    if not file.is_file():
        return {}
    known = {item.id for item in items}
    given: dict[str, str] = {}
    # Not `splitlines`, which would split at separators within a text too.
    for number, line in enumerate(_whole_lines(file), 1):
        place = f"{file}, line {number}"
        try:
            answer = GivenAnswer(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise LayerfuseError(f"{place} is no answer: {error}") from error
        # JSON has other kinds of values than texts.
        texts: list[Any] = [answer.id, answer.output]
        if not all(isinstance(text, str) for text in texts):
            raise LayerfuseError(f"{place} is no answer: its id or its output is no text")
        if answer.id not in known:
            raise LayerfuseError(
                f"{place} answers {short(answer.id)}, no question of {benchmark.name}"
            )
        if answer.id in given:
            raise LayerfuseError(f"{place} answers {answer.id!r} a second time")
        given[answer.id] = answer.output
    return given


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
    return text.split("\n")[:-1]


def _append(file: Path, answers: Sequence[GivenAnswer]) -> None:
    """Write a line for each answer at the end of a file.

    Raises:
        LayerfuseError: the disk is full, or the file may not be written.
    """
    lines = [json.dumps(asdict(answer)) + "\n" for answer in answers]
    try:
        # Opened anew for every batch: closing it may be what fails.
        with file.open("a", encoding="utf-8") as opened:
            opened.write("".join(lines))
    except OSError as error:
        raise LayerfuseError(f"cannot write {file}: {error}") from error
