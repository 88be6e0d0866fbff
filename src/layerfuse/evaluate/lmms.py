"""The plug-in of lmms-eval: its tasks ask models of layerfuse.

lmms-eval finds `manifest` by the entry point in the group `lmms_eval.models`, and then the two
classes by their names: `SimpleModel` is asked a text with pictures, `ChatModel` whole messages.
This is the one module that imports lmms-eval; layerfuse does without it.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, cast

from accelerate import Accelerator  # pyright: ignore[reportMissingTypeStubs]
from accelerate.utils import DistributedType  # pyright: ignore[reportMissingTypeStubs]
from rich.console import Console

from layerfuse.errors import LayerfuseError, short
from layerfuse.evaluate.answer import Answerer
from layerfuse.evaluate.likelihood import answer_likelihoods
from layerfuse.evaluate.lmms_requests import (
    MODEL,
    AnswerLimits,
    answer_limits,
    asked_in_messages,
    asked_of_text,
)
from layerfuse.evaluate.load_answerer import load_answerer
from layerfuse.evaluate.questions import Question
from layerfuse.progress import Progress, shown_progress, silent

MOST_ROUNDS = 100
"""After so many rounds a task is taken to never end."""
SPLIT_MODELS = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
"""What would split one model over processes: here each has a whole one and its share of tasks."""

# Any: lmms-eval is not installed where the types are checked, and a class needs its base
_LmmsEvalModel: Any = import_module("lmms_eval.api.model").lmms
_Answered: Any = import_module("lmms_eval.api.instance").GenerationResult


def manifest() -> Any:
    """Name the classes for lmms-eval: what the entry point loads.

    Returns:
        A `ModelManifest` of lmms-eval.
    """
    # Not above: lmms-eval loads entry points while it imports the package of this module.
    registry: Any = import_module("lmms_eval.models.registry_v2")
    return registry.ModelManifest(
        model_id=MODEL,
        simple_class_path=f"{__name__}.SimpleModel",
        chat_class_path=f"{__name__}.ChatModel",
    )


@dataclass(frozen=True)
class _NextRound:
    """What a task asks next of several rounds.

    Attributes:
        question: None where the rounds have ended.
        answers: those so far, as the task gives them back; None where it does not.
        info: what the task wants to be given in the next round.
    """

    question: Question | None
    answers: list[str] | None
    info: Any


@dataclass
class _Rounds:
    """The rounds of one request, of which each is asked on its own."""

    # Any: lmms-eval's own class
    request: Any
    answers: list[str] = field(default_factory=list[str])
    info: Any = None
    ended: bool = False


class LayerfuseModel(_LmmsEvalModel):
    """A model of layerfuse for lmms-eval; all that both kinds of requests share.

    Every error stops the run: an answer that could not be given must not count as a wrong one.

    Args:
        pretrained: the folder of a trained model.
        batch_size: requests answered at once.
        device: where the model runs; the accelerator of this process by default.
        batch_invariant: ask again alone what is too close to call; likelihoods that tasks compare
            are those of the batch all the same.
        answerer: the model of the folder where it is loaded already.

    Raises:
        LayerfuseError: there is no model in the folder, or an option cannot be followed.
    """

    def __init__(
        self,
        pretrained: str | Path,
        batch_size: int | str = 1,
        device: str | None = None,
        batch_invariant: bool = True,
        answerer: Answerer | None = None,
    ) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise LayerfuseError(f"batch_size is {batch_size!r}; valid: a whole number from 1")
        self.batch_size = int(batch_size)
        # First: under several processes it chooses the device of this one.
        self.accelerator = Accelerator()
        if self.accelerator.distributed_type in SPLIT_MODELS:
            raise LayerfuseError(
                f"lmms-eval was started under {self.accelerator.distributed_type.value}, which "
                "splits a model over processes; each process has a whole model here: start it by "
                "`accelerate launch --multi_gpu`"
            )
        # lmms-eval reads its share of the questions by these.
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        # lmms-eval reads `pretrained=7` as a number.
        self.answerer = answerer or load_answerer(
            Path(str(pretrained)), batch_invariant=batch_invariant
        )
        if device is not None:
            self.answerer.model.to(device)

    @property
    def device(self) -> Any:
        """The device of the model, where lmms-eval gathers the numbers of requests."""
        return self.answerer.model.device

    @abstractmethod
    def limits_of(self, request: Any) -> AnswerLimits:
        """Read where the answer to a request ends.

        Args:
            request: an `Instance` of lmms-eval.

        Returns:
            The limits.

        Raises:
            LayerfuseError: the request asks for something else than a greedy answer.
        """

    @abstractmethod
    def question_of(self, request: Any) -> Question:
        """Read the question of a request.

        Args:
            request: an `Instance` of lmms-eval.

        Returns:
            The question with its pictures.

        Raises:
            LayerfuseError: the request has another shape, or holds what is no picture or text.
        """

    @abstractmethod
    def first_round(self, request: Any) -> Question:
        """Read the first question of a request of several rounds.

        Args:
            request: an `Instance` of lmms-eval.

        Returns:
            The question with its pictures.

        Raises:
            LayerfuseError: as for `question_of`.
        """

    @abstractmethod
    def next_round(self, rounds: _Rounds, number: int) -> _NextRound:
        """Have the task say what it asks next.

        Args:
            rounds: those so far.
            number: of the next round, from 1.

        Returns:
            What is asked, or that nothing is.

        Raises:
            LayerfuseError: the task answers in another shape.
        """

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer requests greedily.

        Args:
            requests: `Instance`s of lmms-eval.

        Returns:
            Their answers, in order.

        Raises:
            LayerfuseError: a request cannot be read, or its answer not be given.
        """
        answers: dict[int, str] = {}
        with self._shown_progress() as progress:
            for limits, places in self._batches(requests):
                # Batch by batch, so that the pictures of a batch alone are in memory.
                questions = [self.question_of(requests[place]) for place in places]
                texts = self._ask(questions, limits)
                answers.update(zip(places, texts, strict=True))
                progress("lmms-eval: answers", len(answers), len(requests))
        return [answers[place] for place in range(len(requests))]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """Answer requests of several rounds; the task makes each round of the answers before it.

        Args:
            requests: `Instance`s of lmms-eval.

        Returns:
            For each request the answers of its rounds. Lists, as lmms-eval would write a tuple of
            texts out as one text.

        Raises:
            LayerfuseError: a request cannot be read, its answer not be given, or a task never ends.
        """
        answers: dict[int, list[str]] = {}
        with self._shown_progress() as progress:
            for limits, places in self._batches(requests):
                batch = [_Rounds(requests[place]) for place in places]
                self._ask_rounds(batch, limits)
                for place, rounds in zip(places, batch, strict=True):
                    answers[place] = rounds.answers
                progress("lmms-eval: rounds", len(answers), len(requests))
        return [answers[place] for place in range(len(requests))]

    def _ask_rounds(self, batch: Sequence[_Rounds], limits: AnswerLimits) -> None:
        """Ask all the rounds of some requests, and leave their answers in them."""
        for number in range(MOST_ROUNDS):
            asked: list[_Rounds] = []
            questions: list[Question] = []
            for rounds in batch:
                if rounds.ended:
                    continue
                question = self._question_of_round(rounds, number)
                if question is None:
                    rounds.ended = True
                    continue
                asked.append(rounds)
                questions.append(question)
            if not asked:
                return
            for rounds, text in zip(asked, self._ask(questions, limits), strict=True):
                rounds.answers.append(text)
        raise LayerfuseError(
            f"task {batch[0].request.task_name} was asked {MOST_ROUNDS} rounds and did not end: "
            "its doc_to_text must say when the rounds are over"
        )

    def _question_of_round(self, rounds: _Rounds, number: int) -> Question | None:
        """The question of a round, None behind the last one."""
        if number == 0:
            return self.first_round(rounds.request)
        following = self.next_round(rounds, number)
        if following.answers is not None:
            rounds.answers = following.answers
        rounds.info = following.info
        return following.question

    def _ask(self, questions: Sequence[Question], limits: AnswerLimits) -> list[str]:
        """The answers to the questions of one batch."""
        return self.answerer.answer(
            questions,
            max_new_tokens=limits.max_new_tokens,
            batch_size=self.batch_size,
            stop=limits.stop,
        )

    def _batches(self, requests: Sequence[Any]) -> Iterator[tuple[AnswerLimits, list[int]]]:
        """The places of requests that are answered at once: they have the same limits."""
        places_of: dict[AnswerLimits, list[int]] = {}
        for place, request in enumerate(requests):
            places_of.setdefault(self.limits_of(request), []).append(place)
        for limits, places in places_of.items():
            for start in range(0, len(places), self.batch_size):
                yield limits, places[start : start + self.batch_size]

    def _document(self, task: str, split: str, place: int) -> Any:
        """The row of a task's dataset that a request is about."""
        return self.task_dict[task][split][place]

    def _shown_progress(self) -> Any:
        """A context in which progress is shown, by the first of several processes alone."""
        if self._rank == 0:
            return shown_progress(Console())
        return nullcontext(cast("Progress", silent))


class SimpleModel(LayerfuseModel):
    """A model that is asked a text with pictures: `lmms-eval --model layerfuse --force_simple`.

    As many `<image>` in the text as there are pictures, or fewer, say where the last of them
    stand; all others stand in front. Without pictures, or with more `<image>` than pictures, each
    is text. Arguments: see `LayerfuseModel`.
    """

    is_simple: ClassVar[bool] = True

    def limits_of(self, request: Any) -> AnswerLimits:
        """Read where an answer ends; see `LayerfuseModel.limits_of`."""
        # The second element of both kinds of requests that are answered.
        return answer_limits(request.args[1])

    def question_of(self, request: Any) -> Question:
        """Read a question; see `LayerfuseModel.question_of`."""
        text, _, doc_to_visual, place, task, split = _elements(request, 6)
        visuals = doc_to_visual(self._document(task, split, place))
        return asked_of_text(text, visuals, f"{task}/{split}/{place}")

    def first_round(self, request: Any) -> Question:
        """Read a first question; see `LayerfuseModel.first_round`."""
        text, _, doc_to_visual, _, place, task, split = _elements(request, 7)
        visuals = doc_to_visual(self._document(task, split, place))
        return asked_of_text(text, visuals, f"{task}/{split}/{place}")

    def next_round(self, rounds: _Rounds, number: int) -> _NextRound:
        """Read what is asked next; see `LayerfuseModel.next_round`."""
        _, _, _, doc_to_text, place, task, split = _elements(rounds.request, 7)
        said = _said_of_round(
            doc_to_text,
            self._document(task, split, place),
            rounds,
            number,
            ("visuals", "text", "whether it was the last round", "answers", "info"),
        )
        visuals, text, has_ended, answers, info = said
        if has_ended:
            return _NextRound(None, _texts(answers), info)
        question = asked_of_text(text, visuals, f"{task}/{split}/{place}, round {number}")
        return _NextRound(question, _texts(answers), info)

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Measure how likely answers are.

        lmms-eval's name is that of lm-eval, but its scorer takes the option with the *least*
        value, as its models give the loss of `transformers`: the mean over the answer's tokens,
        its end among them. The same is given here.

        Args:
            requests: `Instance`s of lmms-eval.

        Returns:
            For each the loss, in nats a token, and whether the answer is the greedy one, wrapped
            as lmms-eval's evaluator takes both: version 0.7.3 writes a bare pair out as a text,
            which its scorer then cannot read.

        Raises:
            LayerfuseError: a request cannot be read, or the model not give the answer.
        """
        results: list[Any] = []
        with self._shown_progress() as progress:
            for start in range(0, len(requests), self.batch_size):
                batch = requests[start : start + self.batch_size]
                likelihoods = answer_likelihoods(
                    self.answerer,
                    [self._with_answer(request) for request in batch],
                    batch_size=self.batch_size,
                )
                for likelihood in likelihoods:
                    results.append(_Answered((-likelihood.mean, likelihood.greedy)))
                progress("lmms-eval: likelihoods", len(results), len(requests))
        return results

    def _with_answer(self, request: Any) -> Question:
        """The question of a request with the answer whose likelihood is asked for."""
        text, answer, doc_to_visual, place, task, split = _elements(request, 6)
        document = self._document(task, split, place)
        # A task of one answer gives what makes it of the document, a task of options their texts.
        if not isinstance(answer, str):
            answer = answer(document)
        name = f"{task}/{split}/{place}"
        asked = asked_of_text(text, doc_to_visual(document), name)
        # The space that lmms-eval writes before an option is the chat template's business.
        return Question(name, asked.sample, asked.messages, str(answer).strip(), task, task)


class ChatModel(LayerfuseModel):
    """A model that is asked whole messages, what lmms-eval takes where it can.

    Arguments: see `LayerfuseModel`.
    """

    is_simple: ClassVar[bool] = False

    def limits_of(self, request: Any) -> AnswerLimits:
        """Read where an answer ends; see `LayerfuseModel.limits_of`."""
        return answer_limits(_elements(request, 6)[2])

    def question_of(self, request: Any) -> Question:
        """Read a question; see `LayerfuseModel.question_of`."""
        # Six elements; lmms-eval's guide to new models speaks of five.
        _, doc_to_messages, _, place, task, split = _elements(request, 6)
        messages = doc_to_messages(self._document(task, split, place))
        return asked_in_messages(messages, f"{task}/{split}/{place}")

    def first_round(self, request: Any) -> Question:
        """Read a first question; see `LayerfuseModel.first_round`."""
        return self.question_of(request)

    def next_round(self, rounds: _Rounds, number: int) -> _NextRound:
        """Read what is asked next; see `LayerfuseModel.next_round`."""
        _, doc_to_messages, _, place, task, split = _elements(rounds.request, 6)
        said = _said_of_round(
            doc_to_messages,
            self._document(task, split, place),
            rounds,
            number,
            ("messages", "whether it was the last round", "answers", "info"),
        )
        messages, has_ended, answers, info = said
        if has_ended:
            return _NextRound(None, _texts(answers), info)
        question = asked_in_messages(messages, f"{task}/{split}/{place}, round {number}")
        return _NextRound(question, _texts(answers), info)

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Refuse: lmms-eval gives such requests to simple models alone.

        Args:
            requests: `Instance`s of lmms-eval.

        Raises:
            LayerfuseError: always.
        """
        raise LayerfuseError(
            "lmms-eval asks chat models for no likelihoods: run these tasks with --force_simple"
        )


def _elements(request: Any, number: int) -> tuple[Any, ...]:
    """What a request holds.

    Raises:
        LayerfuseError: it holds another number of elements.
    """
    held = tuple(request.args)
    if len(held) != number:
        raise LayerfuseError(
            f"a request of task {request.task_name} holds {len(held)} elements, not {number}: "
            "another version of lmms-eval, or a task of a kind that layerfuse does not know"
        )
    return held


def _said_of_round(
    ask_task: Callable[..., Any],
    document: Any,
    rounds: _Rounds,
    number: int,
    expected: tuple[str, ...],
) -> tuple[Any, ...]:
    """What a task says of its next round.

    Args:
        ask_task: `doc_to_text` or `doc_to_messages` of the task.
        document: that the rounds are about.
        rounds: those so far.
        number: of the next round, from 1.
        expected: names what it should say.

    Raises:
        LayerfuseError: it says something else.
    """
    said = ask_task(
        document,
        round_idx=number,
        previous_output=list(rounds.answers),
        previous_round_info=rounds.info,
    )
    if not isinstance(said, tuple) or len(cast("tuple[Any, ...]", said)) != len(expected):
        raise LayerfuseError(
            f"task {rounds.request.task_name} says {short(said)} of round {number}; "
            f"expected: ({', '.join(expected)})"
        )
    return cast("tuple[Any, ...]", said)


def _texts(answers: Any) -> list[str] | None:
    """Answers as a task gives them back."""
    if answers is None:
        return None
    return [str(answer) for answer in answers]
