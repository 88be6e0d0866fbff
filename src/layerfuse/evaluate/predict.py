"""Ask a model every question of some samples and score its answers; guided strategies also without
their guidance: does the instruction matter?"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerfuse.data.feature_store import digests_of
from layerfuse.data.sample import Sample
from layerfuse.evaluate.answer import Answerer
from layerfuse.evaluate.answer_folder import ANSWERS, AnswerFolder, GivenAnswer, Row
from layerfuse.evaluate.likelihood import AnswerLikelihood, answer_likelihoods
from layerfuse.evaluate.metrics import exact_match, normalize
from layerfuse.evaluate.questions import Question, questions
from layerfuse.evaluate.records import AnswerRecord, ControlRecord
from layerfuse.fusion import FixedWeights, Guidance
from layerfuse.model.chat_template import question_of
from layerfuse.progress import Progress, silent
from layerfuse.recipe.evaluate_settings import Evaluation
from layerfuse.vision.picture import Picture

LIKELIHOODS = "likelihoods.jsonl"
"""How likely the right answers are, in the folder of the answers."""
DIGEST_LENGTH = 16
"""Hexadecimal digits by which records tell pictures apart: 64 bits."""


def predict(
    answerer: Answerer,
    samples: Sequence[Sample],
    evaluation: Evaluation,
    progress: Progress = silent,
    *,
    guidance: Guidance = "instruction",
    likelihoods: Sequence[AnswerLikelihood] | None = None,
    kept: AnswerFolder | None = None,
) -> list[AnswerRecord]:
    """Ask a model every question of some samples, greedily, and score its answers.

    Records also hold how likely the right answer is, and those of guided strategies the layer
    weights and the answers under each control.

    Args:
        answerer: the model.
        samples: what it is asked.
        evaluation: how.
        progress: is told of the questions that are answered, those of the controls included.
        guidance: what weighs the layers of guided strategies, but for the controls.
        likelihoods: of the right answers, with this guidance, where they are known already; None
            measures them if the evaluation says so.
        kept: an open folder: what lies there is not asked again, what is asked is added as it
            comes, and all processes that were launched together share the work. None keeps
            nothing, and asks everything in this process.

    Returns:
        A record for each question, in the order of the turns.

    Raises:
        LayerfuseError: the folder holds something else, or cannot be written.
    """
    asked = list(questions(samples))
    instruction = answerer.instructions(asked)
    controls = _controls(evaluation, instruction)
    measures_likelihood = evaluation.log_likelihood and likelihoods is None
    # Each is read twice: how likely its right answers are, and what it answers.
    passes_of_control = 2 if measures_likelihood or likelihoods is not None else 1
    passes = 1 + measures_likelihood + passes_of_control * len(controls)
    test = _Passes(answerer, asked, evaluation, passes, progress, kept)
    if measures_likelihood:
        likelihoods = test.likelihoods(LIKELIHOODS, instruction, guidance)
    predictions = test.answers(ANSWERS, instruction, guidance, likelihoods)
    # What stays so for strategies without guidance.
    weights: list[list[float] | None] = [None] * len(asked)
    controlled_answers: list[dict[str, ControlRecord]] = [{} for _ in asked]
    if instruction is not None:
        weights = answerer.layer_weights(asked, instruction, evaluation.batch_size)
        for control in controls:
            guide, weighed_by = controlled(control, instruction, weights, kinds_of(asked))
            of_control = None
            # Read as the guided answers are: in bfloat16 a right answer that is forced and one that
            # is generated can round apart, and whoever has two tries is right more often.
            if likelihoods is not None:
                of_control = test.likelihoods(f"likelihoods.{control}.jsonl", guide, weighed_by)
            texts = test.answers(f"answers.{control}.jsonl", guide, weighed_by, of_control)
            for question, text, answers in zip(asked, texts, controlled_answers, strict=True):
                answers[control] = ControlRecord(text, exact_match(text, question.answer))
    digests = _digests(answerer, asked, progress)
    records: list[AnswerRecord] = []
    for place, question in enumerate(asked):
        log_likelihood = None
        # a model with closed answers cannot give every answer
        if likelihoods is not None and isfinite(likelihoods[place].total):
            log_likelihood = likelihoods[place].mean
        records.append(
            _record(
                question,
                predictions[place],
                log_likelihood=log_likelihood,
                weights=weights[place],
                controls=controlled_answers[place],
                digests=[digests[picture.name] for picture in question.sample.pictures],
            )
        )
    return records


def _controls(evaluation: Evaluation, instruction: Tensor | None) -> list[str]:
    """The controls that can be asked about these instructions (questions, E)."""
    if instruction is None:
        return []
    # One question for all pictures: there is no other instruction to take.
    if (instruction == instruction[:1]).all():
        return [control for control in evaluation.controls if control == "mean"]
    return list(evaluation.controls)


@dataclass(frozen=True)
class KeptLikelihood:
    """How likely the right answer to a question is: a line of likelihoods.jsonl.

    Attributes:
        id: of the question.
        likelihood: of its right answer.
        seconds: that it took; those of a batch are shared among its questions.
    """

    id: str
    likelihood: AnswerLikelihood
    seconds: float


@dataclass
class _Passes:
    """The passes of a test over its questions: one that reads the right answers, one as trained,
    and one for each control."""

    answerer: Answerer
    asked: list[Question]
    evaluation: Evaluation
    num_passes: int
    progress: Progress
    kept: AnswerFolder | None
    num_finished: int = 0

    def likelihoods(
        self, name: str, guide: Tensor | None, weighed_by: Guidance
    ) -> list[AnswerLikelihood]:
        """How likely the right answers are.

        Args:
            name: of the file that keeps them.
            guide: (questions, E), what guides each question; None without guidance.
            weighed_by: what weighs the layers of guided strategies.
        """

        def measure(places: Sequence[int]) -> list[KeptLikelihood]:
            started = time.perf_counter()
            measured = answer_likelihoods(
                self.answerer,
                [self.asked[place] for place in places],
                batch_size=len(places),
                instruction=_of_places(guide, places),
                guidance=weighed_by,
                keep_impossible=True,
            )
            seconds = _seconds_each(started, len(places))
            rows: list[KeptLikelihood] = []
            for place, likelihood in zip(places, measured, strict=True):
                rows.append(KeptLikelihood(self.asked[place].id, likelihood, seconds))
            return rows

        rows = self._pass(name, KeptLikelihood, {}, measure)
        return [rows[question.id].likelihood for question in self.asked]

    def answers(
        self,
        name: str,
        guide: Tensor | None,
        weighed_by: Guidance,
        likelihoods: Sequence[AnswerLikelihood] | None = None,
    ) -> list[str]:
        """What the model answers. Answers that are known to be right are not generated again.

        Args:
            name: of the file that keeps them.
            guide: (questions, E), what guides each question; None without guidance.
            weighed_by: what weighs the layers of guided strategies.
            likelihoods: of the right answers with this guide; None where they are not known.
        """
        max_new_tokens = self.evaluation.max_new_tokens

        def generate(places: Sequence[int]) -> list[GivenAnswer]:
            started = time.perf_counter()
            texts = self.answerer.answer(
                [self.asked[place] for place in places],
                max_new_tokens=max_new_tokens,
                batch_size=len(places),
                instruction=_of_places(guide, places),
                guidance=weighed_by,
            )
            seconds = _seconds_each(started, len(places))
            rows: list[GivenAnswer] = []
            for place, text in zip(places, texts, strict=True):
                rows.append(_given(self.asked[place], text, seconds))
            return rows

        known: dict[str, GivenAnswer] = {}
        if likelihoods is not None:
            for question, likelihood in zip(self.asked, likelihoods, strict=True):
                # Another batch might say otherwise: generation asks such a question alone.
                unsure = self.answerer.batch_invariant and likelihood.too_close
                if likelihood.greedy and not unsure and likelihood.tokens <= max_new_tokens:
                    known[question.id] = _given(question, question.answer.strip(), 0.0)
        rows = self._pass(name, GivenAnswer, known, generate)
        return [rows[question.id].output for question in self.asked]

    def _pass(
        self,
        name: str,
        kind: type[Row],
        known: Mapping[str, Row],
        work: Callable[[Sequence[int]], list[Row]],
    ) -> dict[str, Row]:
        """One pass over all questions.

        Args:
            name: of the file that keeps its lines.
            kind: of the lines.
            known: lines that need no work, by the ids of their questions.
            work: gives the lines of the questions at some places.

        Returns:
            The lines by the ids of their questions.
        """
        rows: dict[str, Row] = {}
        if self.kept is not None:
            rows = self.kept.read(name, kind)
            self.kept.append(name, [row for row in known.values() if row.id not in rows])
        rows = {**known, **rows}
        waiting = [place for place, asked in enumerate(self.asked) if asked.id not in rows]
        size = self.evaluation.batch_size
        batches = [waiting[start : start + size] for start in range(0, len(waiting), size)]
        done: Iterator[list[Row]] = map(work, batches)
        if self.kept is not None:
            done = self.kept.work(name, batches, work)
        earlier = self.num_finished * len(self.asked)
        of_all = self.num_passes * len(self.asked)
        for given in done:
            for row in given:
                rows[row.id] = row
            self.progress("evaluate", earlier + len(rows), of_all)
        self.num_finished += 1
        return rows


def _of_places(guide: Tensor | None, places: Sequence[int]) -> Tensor | None:
    """What guides the questions at some places."""
    if guide is None:
        return None
    return guide[list(places)]


def _seconds_each(started: float, number: int) -> float:
    """What each of some questions took that were asked together."""
    return round((time.perf_counter() - started) / number, 4)


def _given(question: Question, text: str, seconds: float) -> GivenAnswer:
    """What is kept of one answer."""
    return GivenAnswer(
        id=question.id,
        prompt=question_of(question.messages),
        output=text,
        parsed=normalize(text),
        score=exact_match(text, question.answer),
        seconds=seconds,
    )


def _digests(answerer: Answerer, asked: Sequence[Question], progress: Progress) -> dict[str, str]:
    """The digests of the questions' pictures by name, of their bytes, shortened."""
    pictures: dict[str, Picture] = {}
    for question in asked:
        for picture in question.sample.pictures:
            pictures[picture.name] = picture
    if answerer.store is not None:
        # The store has read them already.
        whole = answerer.store.digests
    else:
        whole = digests_of(pictures.values(), progress)
    return {name: whole[name][:DIGEST_LENGTH] for name in pictures}


def _record(
    question: Question,
    prediction: str,
    *,
    log_likelihood: float | None,
    weights: list[float] | None,
    controls: dict[str, ControlRecord],
    digests: list[str],
) -> AnswerRecord:
    """What is written of one answer."""
    pictures = question.sample.pictures
    image = None
    # The pictures of a dataset have names too, but no file that a report could show.
    if pictures and pictures[0].reader is None:
        image = pictures[0].name
    if weights is not None:
        weights = [round(weight, 5) for weight in weights]
    return AnswerRecord(
        id=question.id,
        sample=question.sample.id,
        image=image,
        question=question_of(question.messages),
        answer=question.answer,
        prediction=prediction,
        score=exact_match(prediction, question.answer),
        family=question.family,
        category=question.category,
        novel=question.sample.novel,
        weights=weights,
        controls=controls,
        pictures=digests,
        log_likelihood=log_likelihood,
    )


def kinds_of(asked: Sequence[Question]) -> list[str]:
    """The kind of each question: its category, or its family where all are of one category.

    Args:
        asked: all questions of a test.

    Returns:
        The kinds, in their order.
    """
    categories = [question.category for question in asked]
    if len(set(categories)) > 1:
        return categories
    return [question.family for question in asked]


def shuffled(instruction: Tensor, seed: int = 0, kinds: Sequence[str] | None = None) -> Tensor:
    """Give each question the instruction of a random other question that is worded otherwise.

    Args:
        instruction: (questions, E).
        seed: of the draws.
        kinds: of each question; the other question is of another kind where one of another kind is
            worded otherwise. None: of any kind.

    Returns:
        (questions, E).

    Raises:
        ValueError: if all questions have the same instruction.
    """
    # By content: questions repeat, and a question's own words are no control.
    _, inverse = np.unique(instruction.float().numpy(), axis=0, return_inverse=True)
    # (questions,): a number for each wording
    wordings = inverse.reshape(-1)
    if len(set(wordings.tolist())) < 2:
        raise ValueError("all questions have the same instruction: there is nothing to shuffle")
    kind_names = np.array(kinds if kinds is not None else [""] * len(wordings))
    others: dict[tuple[int, str], np.ndarray[Any, np.dtype[np.intp]]] = {}
    rng = np.random.default_rng(seed)
    chosen: list[int] = []
    for number, kind in zip(wordings.tolist(), kind_names.tolist(), strict=True):
        if (number, kind) not in others:
            worded_otherwise = wordings != number
            both = np.flatnonzero(worded_otherwise & (kind_names != kind))
            others[number, kind] = both if len(both) else np.flatnonzero(worded_otherwise)
        chosen.append(int(rng.choice(others[number, kind])))
    return instruction[torch.tensor(chosen)]


def controlled(
    control: str,
    instruction: Tensor,
    weights: Sequence[Sequence[float] | None],
    kinds: Sequence[str],
) -> tuple[Tensor, Guidance]:
    """What guides all questions under a control.

    Args:
        control: `shuffled` gives each question the instruction of another, `other_category` that of
            one of another kind; `mean` fixes the weights at their mean over the test.
        instruction: (questions, E), that of each question.
        weights: that each question has under its own instruction; None without a picture.
        kinds: of each question.

    Returns:
        The instruction of each question, and what weighs the layers.
    """
    if control == "shuffled":
        return shuffled(instruction), "instruction"
    if control == "other_category":
        return shuffled(instruction, kinds=kinds), "instruction"
    with_pictures = [of_question for of_question in weights if of_question is not None]
    if not with_pictures:
        return instruction, "uniform"
    return instruction, FixedWeights(torch.tensor(with_pictures).mean(dim=0))
