"""Ask a model the questions of a benchmark, and keep every answer as it comes."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from layerfuse.data.sample import Sample
from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.answer import Answerer
from layerfuse.evaluate.benchmarks import Benchmark, Item
from layerfuse.evaluate.benchmarks.base import JudgedItem
from layerfuse.evaluate.questions import Question, with_all_pictures
from layerfuse.evaluate.suites import Prompt
from layerfuse.files import write_text
from layerfuse.model.chat_template import literal
from layerfuse.progress import Progress, silent

ANSWERS = "answers.jsonl"
"""The answers to a benchmark, in its folder: one line as soon as each is given."""
ASKED = "asked.json"
"""How they were asked for: answers to other questions are not continued."""


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
class Asked:
    """What must be equal for the answers in a folder to be continued.

    Attributes:
        benchmark: its name.
        questions: how many it has.
        first: id of the first one.
        last: id of the last one.
        model: its folder.
        prompt: how the questions are put.
    """

    benchmark: str
    questions: int
    first: str
    last: str
    model: str
    prompt: dict[str, Any]


def ask_benchmark(
    answerer: Answerer,
    benchmark: Benchmark,
    items: Sequence[Item],
    prompt: Prompt,
    folder: Path,
    *,
    model: str,
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
        model: names the model, to tell its answers from those of others.
        batch_size: questions answered at once.
        progress: is told of the questions that are answered.

    Returns:
        Every question with what its answer scores.

    Raises:
        LayerfuseError: the folder holds answers to something else, or cannot be written.
    """
    asked = Asked(
        benchmark=benchmark.name,
        questions=len(items),
        first=items[0].id,
        last=items[-1].id,
        model=model,
        prompt=prompt.model_dump(mode="json"),
    )
    file = folder / ANSWERS
    given = _given_before(folder, asked)
    by_id = {item.id: item for item in items}
    outputs: dict[str, str] = {}
    for answer in given:
        if answer.id not in by_id:
            raise LayerfuseError(f"{file} answers {answer.id!r}, no question of {benchmark.name}")
        outputs[answer.id] = answer.output
    waiting = [item for item in items if item.id not in outputs]

    # A line at a time: what a kill leaves is whole but for its last line, which is asked again.
    with _open_to_append(file) as answers:
        for start in range(0, len(waiting), batch_size):
            batch = waiting[start : start + batch_size]
            began = time.perf_counter()
            texts = answerer.answer(
                [_question(item, prompt) for item in batch],
                max_new_tokens=prompt.max_new_tokens,
                batch_size=batch_size,
                stop=prompt.stop,
            )
            seconds = (time.perf_counter() - began) / len(batch)
            for item, text in zip(batch, texts, strict=True):
                outputs[item.id] = text
                judged = benchmark.judge(item, text)
                line = GivenAnswer(
                    id=item.id,
                    prompt=prompt.ask(item),
                    output=text,
                    parsed=judged.parsed,
                    score=judged.score,
                    seconds=round(seconds, 4),
                )
                answers.write(json.dumps(asdict(line), ensure_ascii=False) + "\n")
            answers.flush()
            progress(benchmark.title, len(outputs), len(items))
    # Judged again: an answer of an earlier version may have been read in another way.
    return [JudgedItem(item, benchmark.judge(item, outputs[item.id])) for item in items]


def _question(item: Item, prompt: Prompt) -> Question:
    """The question as a model is asked it: its pictures, then the prompt's words."""
    words = with_all_pictures(literal(prompt.ask(item)), len(item.pictures))
    messages = ({"role": "user", "content": words},)
    sample = Sample(item.id, item.pictures, messages)
    return Question(item.id, sample, messages, item.answers[0], item.group, item.group)


def _given_before(folder: Path, asked: Asked) -> list[GivenAnswer]:
    """The answers that lie in a folder already; the folder is begun if there are none.

    Raises:
        LayerfuseError: they are answers to something else, or a line is none.
    """
    note = folder / ASKED
    file = folder / ANSWERS
    if not note.is_file():
        if file.is_file():
            raise LayerfuseError(f"{file} lies beside no {ASKED}: move it, or take another folder")
        write_text(note, json.dumps(asdict(asked), indent=1) + "\n")
        return []
    before = json.loads(note.read_text("utf-8"))
    for key, value in asdict(asked).items():
        if before.get(key) != value:
            raise LayerfuseError(
                f"{folder} holds answers of another run: its {key} is {before.get(key)!r}, not "
                f"{value!r}. Remove the folder, or give another one by --output"
            )
    if not file.is_file():
        return []
    whole = _without_cut_line(file)
    given: list[GivenAnswer] = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            given.append(GivenAnswer(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise LayerfuseError(f"{file}, line {number} is no answer: {error}") from error
    return given


def _without_cut_line(file: Path) -> str:
    """The text of a file of lines; a last line without an end, which a kill left, is taken out."""
    text = file.read_text("utf-8", errors="replace")
    if text and not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        write_text(file, text)
    return text


def _open_to_append(file: Path) -> Any:
    """The file, to write lines at its end."""
    try:
        return file.open("a", encoding="utf-8")
    except OSError as error:
        raise LayerfuseError(f"cannot write {file}: {error}") from error
