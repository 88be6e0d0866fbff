"""Closed questions answered by likelihood: which of the possible answers a model finds likeliest.

A model that says a right thing in a form that a benchmark does not read is wrong by its words and
right by this; one that was trained on short answers is hardly changed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

from layerfuse.evaluate.answer import Answerer
from layerfuse.evaluate.answer_folder import AnswerFolder
from layerfuse.evaluate.answer_parsing import LETTERS
from layerfuse.evaluate.asking import asked_question
from layerfuse.evaluate.benchmarks import Benchmark, Item
from layerfuse.evaluate.benchmarks.interface import JudgedItem
from layerfuse.evaluate.likelihood import AnswerLikelihood, answer_likelihoods
from layerfuse.evaluate.metrics import closed_answer
from layerfuse.evaluate.near_ties import by_itself
from layerfuse.evaluate.questions import Question
from layerfuse.evaluate.suites import Prompt
from layerfuse.progress import Progress, silent

CHOICES = "choices.jsonl"
"""What a model finds likeliest, in the folder of its answers to a benchmark."""
YES_NO = ("Yes", "No")
LOWER_YES_NO = ("yes", "no")
MOST_CANDIDATES = 64
"""More different answers than this make a question open: nobody compares them all."""


@dataclass(frozen=True)
class Choice:
    """What a model finds likeliest: a line of choices.jsonl.

    Attributes:
        id: of the question.
        log_likelihoods: of each possible answer with its end, in nats, in the order in which they
            were compared; None where a model with closed answers cannot give it.
        chosen: the likeliest answer; empty where it can give none of them.
        score: 0..1.
    """

    id: str
    log_likelihoods: dict[str, float | None]
    chosen: str
    score: float


def possible_answers(items: Sequence[Item]) -> dict[str, tuple[str, ...]]:
    """Say which answers each closed question can have.

    Args:
        items: all questions of a benchmark.

    Returns:
        By the question's id: the letters of its options; yes and no where its family, or else its
        group, has no other answers, as the benchmark spells them; else all answers of its family
        or group to questions without options. Open questions are left out: those with more than 64
        possible answers, and those whose right answer is no text.
    """
    possible: dict[str, tuple[str, ...]] = {}
    without_options: list[Item] = []
    of_kind: dict[str, dict[str, None]] = {}
    for item in items:
        if item.answers and item.options:
            possible[item.id] = tuple(LETTERS[: len(item.options)])
        elif item.answers:
            without_options.append(item)
            # A dict, unlike a set, keeps the order.
            of_kind.setdefault(item.family or item.group, {})[item.answers[0]] = None
    for item in without_options:
        answers = tuple(of_kind[item.family or item.group])
        if {*answers} <= {"yes", "no"}:
            possible[item.id] = LOWER_YES_NO
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
    possible: Mapping[str, tuple[str, ...]],
    kept: AnswerFolder,
    *,
    batch_size: int = 32,
    progress: Progress = silent,
) -> list[Choice]:
    """Let a model choose among the possible answers of every closed question.

    Args:
        answerer: the model.
        benchmark: whose questions they are.
        items: its questions.
        prompt: how they are put.
        possible: the answers of the closed ones, by `possible_answers`.
        kept: the folder of its answers; choices that lie there already are kept.
        batch_size: answers that a process compares at once.
        progress: is told of the questions that are answered.

    Returns:
        A choice for each closed question, in the order of the questions.

    Raises:
        LayerfuseError: the likelihood of an answer is no number, or the folder cannot be used.
    """
    closed = [item for item in items if item.id in possible]

    def compare(batch: Sequence[Item]) -> list[Choice]:
        return _compare(answerer, benchmark, batch, prompt, possible, batch_size)

    with kept.opened():
        choices = kept.read(CHOICES, Choice)
        waiting = [item for item in closed if item.id not in choices]
        batches = _batches(waiting, possible, batch_size)
        progress(benchmark.title, len(choices), len(closed))
        for compared in kept.work(CHOICES, batches, compare):
            for choice in compared:
                choices[choice.id] = choice
            progress(benchmark.title, len(choices), len(closed))
    return [choices[item.id] for item in closed]


def _batches(
    items: Sequence[Item], possible: Mapping[str, tuple[str, ...]], batch_size: int
) -> list[list[Item]]:
    """Questions whose possible answers fill a batch, or one question with more of them."""
    batches: list[list[Item]] = []
    room = 0
    for item in items:
        answers = len(possible[item.id])
        if answers > room:
            batches.append([])
            room = batch_size
        batches[-1].append(item)
        room -= answers
    return batches


def _compare(
    answerer: Answerer,
    benchmark: Benchmark,
    batch: Sequence[Item],
    prompt: Prompt,
    possible: Mapping[str, tuple[str, ...]],
    batch_size: int,
) -> list[Choice]:
    """The choices of the questions of one batch."""
    asked: list[Question] = []
    for item in batch:
        asked += [asked_question(item, prompt, answer) for answer in possible[item.id]]
    measured = answer_likelihoods(answerer, asked, batch_size=batch_size, keep_impossible=True)
    choices: list[Choice] = []
    first = 0
    for item in batch:
        answers = possible[item.id]
        of_item = slice(first, first + len(answers))
        first += len(answers)
        likelihoods = measured[of_item]
        if answerer.batch_invariant and _too_close(likelihoods):
            with by_itself():
                likelihoods = answer_likelihoods(
                    answerer.alone(), asked[of_item], batch_size=1, keep_impossible=True
                )
        totals = [likelihood.total for likelihood in likelihoods]
        best = closed_answer(totals)
        chosen = ""
        if isfinite(totals[best]):
            chosen = answers[best]
        of_answers: dict[str, float | None] = {}
        for answer, total in zip(answers, totals, strict=True):
            of_answers[answer] = total if isfinite(total) else None
        choices.append(
            Choice(
                id=item.id,
                log_likelihoods=of_answers,
                chosen=chosen,
                score=benchmark.judge(item, chosen).score,
            )
        )
    return choices


def _too_close(likelihoods: Sequence[AnswerLikelihood]) -> bool:
    """Whether another batch might find another answer the likeliest."""
    place = closed_answer([likelihood.total for likelihood in likelihoods])
    best = likelihoods[place]
    if not isfinite(best.total):
        # None can be given, in any batch.
        return False
    lowest = best.total - best.reach
    others = [*likelihoods[:place], *likelihoods[place + 1 :]]
    return any(other.total + other.reach >= lowest for other in others)


def judged_choices(
    benchmark: Benchmark, items: Sequence[Item], choices: Sequence[Choice]
) -> list[JudgedItem]:
    """Give choices as answers, for the columns of their benchmark.

    Args:
        benchmark: of the questions.
        items: all its questions.
        choices: of all questions, in their order.

    Returns:
        The questions with what the likeliest answer scores.
    """
    judged: list[JudgedItem] = []
    for item, choice in zip(items, choices, strict=True):
        judged.append(JudgedItem(item, benchmark.judge(item, choice.chosen)))
    return judged
