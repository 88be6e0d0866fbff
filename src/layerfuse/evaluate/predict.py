"""Ask a model every question of some samples and score its answers; guided strategies also without
their guidance: does the instruction matter?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerfuse.data.feature_store import digests_of
from layerfuse.data.sample import Sample
from layerfuse.evaluate.answer import Answerer
from layerfuse.evaluate.likelihood import answer_likelihoods
from layerfuse.evaluate.metrics import exact_match
from layerfuse.evaluate.questions import Question, questions
from layerfuse.evaluate.records import AnswerRecord, ControlRecord
from layerfuse.fusion import FixedWeights, Guidance
from layerfuse.model.chat_template import question_of
from layerfuse.progress import Progress, silent
from layerfuse.recipe.schema import Evaluation
from layerfuse.vision.picture import Picture

DIGEST_LENGTH = 16
"""Hexadecimal digits by which records tell pictures apart: 64 bits."""


def predict(
    answerer: Answerer,
    samples: Sequence[Sample],
    evaluation: Evaluation,
    progress: Progress = silent,
    *,
    guidance: Guidance = "instruction",
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

    Returns:
        A record for each question, in the order of the turns.
    """
    asked = list(questions(samples))
    instruction = answerer.instructions(asked)
    controls: list[str] = []
    if instruction is not None:
        controls = list(evaluation.controls)
        # One question for all pictures: there is no other instruction to take.
        if "shuffled" in controls and (instruction == instruction[:1]).all():
            controls.remove("shuffled")
    test = _Passes(answerer, asked, evaluation, len(controls), progress)
    predictions = test.answers(0, instruction, guidance)
    # What stays so for strategies without guidance.
    weights: list[list[float] | None] = [None] * len(asked)
    controlled_answers: list[dict[str, ControlRecord]] = [{} for _ in asked]
    if instruction is not None:
        weights = answerer.layer_weights(asked, instruction, evaluation.batch_size)
        for number, control in enumerate(controls, start=1):
            guide, weighed_by = controlled(control, instruction, weights)
            texts = test.answers(number, guide, weighed_by)
            for question, text, answers in zip(asked, texts, controlled_answers, strict=True):
                answers[control] = ControlRecord(text, exact_match(text, question.answer))
    log_likelihoods = test.log_likelihoods(instruction, guidance)
    digests = _digests(answerer, asked, progress)
    records: list[AnswerRecord] = []
    for place, question in enumerate(asked):
        records.append(
            _record(
                question,
                predictions[place],
                log_likelihood=log_likelihoods[place],
                weights=weights[place],
                controls=controlled_answers[place],
                digests=[digests[picture.name] for picture in question.sample.pictures],
            )
        )
    return records


@dataclass(frozen=True)
class _Passes:
    """The passes of a test over its questions: one as trained, one for each control, and one that
    reads the right answers."""

    answerer: Answerer
    asked: list[Question]
    evaluation: Evaluation
    num_controls: int
    progress: Progress

    def answers(self, number: int, guide: Tensor | None, weighed_by: Guidance) -> list[str]:
        """The answers of a pass.

        Args:
            number: of the pass, from 0.
            guide: (questions, E), what guides each question; None without guidance.
            weighed_by: what weighs the layers of guided strategies.
        """
        return self.answerer.answer(
            self.asked,
            max_new_tokens=self.evaluation.max_new_tokens,
            batch_size=self.evaluation.batch_size,
            instruction=guide,
            guidance=weighed_by,
            progress=self._progress_of(number),
        )

    def log_likelihoods(self, guide: Tensor | None, weighed_by: Guidance) -> list[float | None]:
        """The mean log-probability of a token of each right answer; None where the test leaves
        this pass, its last one, out."""
        if not self.evaluation.log_likelihood:
            return [None] * len(self.asked)
        likelihoods = answer_likelihoods(
            self.answerer,
            self.asked,
            batch_size=self.evaluation.batch_size,
            instruction=guide,
            guidance=weighed_by,
            progress=self._progress_of(1 + self.num_controls),
        )
        return [likelihood.mean for likelihood in likelihoods]

    def _progress_of(self, number: int) -> Progress:
        """What one pass tells, as a part of all passes."""
        passes = 1 + self.num_controls
        if self.evaluation.log_likelihood:
            passes += 1

        def of_all_passes(phase: str, done: int, total: int, note: str = "") -> None:
            self.progress(phase, number * total + done, passes * total, note)

        return of_all_passes


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


def shuffled(instruction: Tensor, seed: int = 0) -> Tensor:
    """Give each question the instruction of a random other question that is worded otherwise.

    Args:
        instruction: (questions, E).
        seed: of the draws.

    Returns:
        (questions, E).

    Raises:
        ValueError: if all questions have the same instruction.
    """
    # By content: questions repeat, and a question's own words are no control.
    _, inverse = np.unique(instruction.float().numpy(), axis=0, return_inverse=True)
    # (questions,): a number for each wording
    wordings = inverse.reshape(-1)
    others_by_wording: dict[int, np.ndarray[Any, np.dtype[np.intp]]] = {}
    for number in sorted(set(wordings.tolist())):
        others_by_wording[number] = np.flatnonzero(wordings != number)
    if len(others_by_wording) < 2:
        raise ValueError("all questions have the same instruction: there is nothing to shuffle")
    rng = np.random.default_rng(seed)
    chosen = [int(rng.choice(others_by_wording[number])) for number in wordings.tolist()]
    return instruction[torch.tensor(chosen)]


def controlled(
    control: str, instruction: Tensor, weights: Sequence[Sequence[float] | None]
) -> tuple[Tensor, Guidance]:
    """What guides all questions under a control.

    Args:
        control: `shuffled` gives each question the instruction of another; `mean` fixes the
            weights at their mean over the test.
        instruction: (questions, E), that of each question.
        weights: that each question has under its own instruction; None without a picture.

    Returns:
        The instruction of each question, and what weighs the layers.
    """
    if control == "shuffled":
        return shuffled(instruction), "instruction"
    with_pictures = [of_question for of_question in weights if of_question is not None]
    if not with_pictures:
        return instruction, "uniform"
    return instruction, FixedWeights(torch.tensor(with_pictures).mean(dim=0))
