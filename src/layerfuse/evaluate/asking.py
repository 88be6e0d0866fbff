"""Ask a model the questions of a benchmark, and keep every answer as it comes."""

import time
from collections.abc import Sequence
from pathlib import Path

from layerfuse.data.sample import Sample
from layerfuse.evaluate.answer import Answerer
from layerfuse.evaluate.answer_folder import (
    ANSWERS,
    AnswerFolder,
    Asked,
    AskedModel,
    GivenAnswer,
    digest_of,
    digest_of_pictures,
)
from layerfuse.evaluate.benchmarks import Benchmark, Item
from layerfuse.evaluate.benchmarks.interface import JudgedItem, judged_item
from layerfuse.evaluate.questions import Question, with_all_pictures
from layerfuse.evaluate.suites import Prompt
from layerfuse.model.chat_template import literal
from layerfuse.progress import Progress, silent


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
        batch_size: questions that a process answers at once.
        progress: is told of the questions that are answered.

    Returns:
        Every question with what its answer scores.

    Raises:
        LayerfuseError: the folder holds answers to something else, another run is writing it, or
            it cannot be written.
    """
    kept = answer_folder(folder, benchmark, items, prompt, model)
    with kept.opened():
        given = kept.read(ANSWERS, GivenAnswer)
        outputs = {item_id: answer.output for item_id, answer in given.items()}
        waiting = [item for item in items if item.id not in outputs]
        batches = [waiting[at : at + batch_size] for at in range(0, len(waiting), batch_size)]

        def answer(batch: Sequence[Item]) -> list[GivenAnswer]:
            return _ask_batch(answerer, benchmark, batch, prompt)

        progress(benchmark.title, len(outputs), len(items))
        for answers in kept.work(ANSWERS, batches, answer):
            for row in answers:
                outputs[row.id] = row.output
            progress(benchmark.title, len(outputs), len(items))
    # Judged again: an answer of an earlier version may have been read in another way.
    return [judged_item(benchmark, item, outputs[item.id]) for item in items]


def answer_folder(
    folder: Path,
    benchmark: Benchmark,
    items: Sequence[Item],
    prompt: Prompt,
    model: AskedModel,
) -> AnswerFolder:
    """Give the folder of a model's answers to a benchmark.

    Args:
        folder: of the answers.
        benchmark: whose questions they are.
        items: all its questions.
        prompt: how they are put.
        model: that answers.

    Returns:
        The folder, not opened yet.

    Raises:
        LayerfuseError: a picture is missing.
    """
    asked = Asked(
        benchmark=benchmark.name,
        model=model.digest,
        # Without what it does not say: answers to a prompt without a form of boxes are continued.
        prompt=prompt.model_dump(mode="json", exclude_none=True),
        questions=digest_of_questions(items, prompt),
        pictures=digest_of_pictures((item.id, item.pictures) for item in items),
        folder=model.folder,
    )
    return AnswerFolder(folder, asked, [item.id for item in items])


def digest_of_questions(items: Sequence[Item], prompt: Prompt) -> str:
    """The digest of questions as they are put.

    Args:
        items: all questions of a benchmark.
        prompt: how they are put.

    Returns:
        The SHA-256 of them, their ids and the names of their pictures, which need not be there.
    """
    questions: list[list[object]] = []
    for item in items:
        # Without the folder, which may be moved.
        pictures = [Path(picture.name).name for picture in item.pictures]
        questions.append([item.id, prompt.ask(item), pictures])
    return digest_of(questions)


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
