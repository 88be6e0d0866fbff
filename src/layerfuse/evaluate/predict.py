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
from layerfuse.evaluate.likelihood import AnswerLikelihood, answer_likelihoods
from layerfuse.evaluate.metrics import exact_match
from layerfuse.evaluate.questions import Question, questions
from layerfuse.evaluate.records import AnswerRecord, ControlRecord
from layerfuse.fusion import FixedWeights, Guidance
from layerfuse.model.chat_template import question_of
from layerfuse.progress import Progress, silent
from layerfuse.recipe.evaluate_settings import Evaluation
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
    likelihoods: Sequence[AnswerLikelihood] | None = None,
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
    measures_likelihood = evaluation.log_likelihood and likelihoods is None
    passes = 1 + len(controls) + measures_likelihood
    test = _Passes(answerer, asked, evaluation, passes, progress)
    if measures_likelihood:
        likelihoods = test.likelihoods(instruction, guidance)
    predictions = test.answers(instruction, guidance, likelihoods)
    # What stays so for strategies without guidance.
    weights: list[list[float] | None] = [None] * len(asked)
    controlled_answers: list[dict[str, ControlRecord]] = [{} for _ in asked]
    if instruction is not None:
        weights = answerer.layer_weights(asked, instruction, evaluation.batch_size)
        for control in controls:
            guide, weighed_by = controlled(control, instruction, weights)
            texts = test.answers(guide, weighed_by)
            for question, text, answers in zip(asked, texts, controlled_answers, strict=True):
                answers[control] = ControlRecord(text, exact_match(text, question.answer))
    digests = _digests(answerer, asked, progress)
    records: list[AnswerRecord] = []
    for place, question in enumerate(asked):
        log_likelihood = None
        if likelihoods is not None:
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


@dataclass
class _Passes:
    """The passes of a test over its questions: one that reads the right answers, one as trained,
    and one for each control."""

    answerer: Answerer
    asked: list[Question]
    evaluation: Evaluation
    num_passes: int
    progress: Progress
    num_finished: int = 0

    def likelihoods(self, guide: Tensor | None, weighed_by: Guidance) -> list[AnswerLikelihood]:
        """How likely the right answers are.

        Args:
            guide: (questions, E), what guides each question; None without guidance.
            weighed_by: what weighs the layers of guided strategies.
        """
        measured = answer_likelihoods(
            self.answerer,
            self.asked,
            batch_size=self.evaluation.batch_size,
            instruction=guide,
            guidance=weighed_by,
            progress=self._progress_of_pass(),
        )
        self.num_finished += 1
        return measured

    def answers(
        self,
        guide: Tensor | None,
        weighed_by: Guidance,
        likelihoods: Sequence[AnswerLikelihood] | None = None,
    ) -> list[str]:
        """What the model answers. Answers that are known to be right are not generated again.

        Args:
            guide: (questions, E), what guides each question; None without guidance.
            weighed_by: what weighs the layers of guided strategies.
            likelihoods: of the right answers with this guide; None where they are not known.
        """
        max_new_tokens = self.evaluation.max_new_tokens
        texts = [question.answer.strip() for question in self.asked]
        open_places: list[int] = []
        for place in range(len(self.asked)):
            known = likelihoods[place] if likelihoods is not None else None
            if known is None or not known.greedy or known.tokens > max_new_tokens:
                open_places.append(place)
        if guide is not None:
            guide = guide[open_places]
        generated = self.answerer.answer(
            [self.asked[place] for place in open_places],
            max_new_tokens=max_new_tokens,
            batch_size=self.evaluation.batch_size,
            instruction=guide,
            guidance=weighed_by,
            progress=self._progress_of_pass(num_known=len(self.asked) - len(open_places)),
        )
        for place, text in zip(open_places, generated, strict=True):
            texts[place] = text
        self.num_finished += 1
        return texts

    def _progress_of_pass(self, num_known: int = 0) -> Progress:
        """What a pass tells, as a part of all passes; so many questions need nothing in it."""
        earlier = self.num_finished * len(self.asked) + num_known
        of_all = self.num_passes * len(self.asked)

        def of_all_passes(phase: str, done: int, total: int, note: str = "") -> None:
            self.progress(phase, earlier + done, of_all, note)

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
