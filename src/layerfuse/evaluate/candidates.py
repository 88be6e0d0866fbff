"""Closed questions answered by likelihood: which of the possible answers a model finds likeliest.

A model that says a right thing in a form that a benchmark does not read is wrong by its words and
right by this; one that was trained on short answers is hardly changed.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from layerfuse.evaluate.answer import Answerer
from layerfuse.evaluate.answer_parsing import LETTERS
from layerfuse.evaluate.asking import asked_question
from layerfuse.evaluate.benchmarks import Benchmark, Item
from layerfuse.evaluate.benchmarks.interface import Judged, JudgedItem
from layerfuse.evaluate.likelihood import answer_likelihoods
from layerfuse.evaluate.metrics import closed_answer
from layerfuse.evaluate.questions import Question
from layerfuse.evaluate.suites import Prompt
from layerfuse.files import write_text
from layerfuse.progress import Progress, silent

CHOICES = "choices.jsonl"
"""What a model finds likeliest, in the folder of its answers to a benchmark."""
YES_NO = ("Yes", "No")
MOST_CANDIDATES = 64
"""More different answers than this make a question open: nobody compares them all."""


@dataclass(frozen=True)
class Choice:
    """What a model finds likeliest.

    Attributes:
        item: the question.
        log_likelihoods: of each possible answer with its end, in nats, in the order in which they
            were compared.
        chosen: the likeliest answer.
        judged: what it scores.
    """

    item: Item
    log_likelihoods: dict[str, float]
    chosen: str
    judged: Judged


def possible_answers(items: Sequence[Item]) -> dict[str, tuple[str, ...]]:
    """Say which answers each closed question can have.

    Args:
        items: all questions of a benchmark.

    Returns:
        By the question's id: the letters of its options; yes and no where its group has no other
        answers; else all answers of its group. Open questions are left out: those of groups with
        more than 64 answers, and those whose right answer is no text.
    """
    in_words = [item for item in items if item.answers]
    of_group: dict[str, dict[str, None]] = {}
    for item in in_words:
        # A dict, unlike a set, keeps the order.
        of_group.setdefault(item.group, {})[item.answers[0]] = None
    possible: dict[str, tuple[str, ...]] = {}
    for item in in_words:
        answers = tuple(of_group[item.group])
        if item.options:
            possible[item.id] = tuple(LETTERS[: len(item.options)])
        elif {answer.lower() for answer in answers} <= {"yes", "no"}:
            possible[item.id] = YES_NO
        elif len(answers) <= MOST_CANDIDATES:
            possible[item.id] = answers
    return possible


def choose(
    answerer: Answerer,
    benchmark: Benchmark,
    items: Sequence[Item],
    prompt: Prompt,
    *,
    batch_size: int = 32,
    progress: Progress = silent,
) -> list[Choice]:
    """Let a model choose among the possible answers of every closed question.

    Args:
        answerer: the model.
        benchmark: whose questions they are.
        items: all its questions.
        prompt: how they are put.
        batch_size: answers compared at once.
        progress: is told of the answers that are compared.

    Returns:
        A choice for each closed question, in the order of the questions.

    Raises:
        LayerfuseError: an answer cannot be given by the model, or its likelihood is no number.
    """
    possible = possible_answers(items)
    closed = [item for item in items if item.id in possible]
    asked: list[Question] = []
    for item in closed:
        asked += [asked_question(item, prompt, answer) for answer in possible[item.id]]
    likelihoods = iter(
        answer_likelihoods(answerer, asked, batch_size=batch_size, progress=progress)
    )
    choices: list[Choice] = []
    for item in closed:
        answers = possible[item.id]
        totals = [next(likelihoods).total for _ in answers]
        chosen = answers[closed_answer(totals)]
        choices.append(
            Choice(
                item=item,
                log_likelihoods=dict(zip(answers, totals, strict=True)),
                chosen=chosen,
                judged=benchmark.judge(item, chosen),
            )
        )
    return choices


def write_choices(file: Path, choices: Sequence[Choice]) -> None:
    """Write choices as JSON lines.

    Args:
        file: is replaced if it exists.
        choices: of one benchmark.

    Raises:
        LayerfuseError: the file cannot be written.
    """
    lines: list[str] = []
    for choice in choices:
        content = {
            "id": choice.item.id,
            "log_likelihoods": choice.log_likelihoods,
            "chosen": choice.chosen,
            "score": choice.judged.score,
        }
        lines.append(json.dumps(content, ensure_ascii=False) + "\n")
    write_text(file, "".join(lines))


def judged_choices(choices: Sequence[Choice]) -> list[JudgedItem]:
    """Give choices as answers, for the columns of their benchmark.

    Args:
        choices: of all questions.

    Returns:
        The questions with what the likeliest answer scores.
    """
    return [JudgedItem(choice.item, choice.judged) for choice in choices]
