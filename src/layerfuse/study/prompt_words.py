"""Whether training writes the same words around questions as the test does."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from layerfuse.data.lazy_records import Samples
from layerfuse.data.sample import Sample
from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.questions import asked_alone
from layerfuse.model.chat_template import Message, TemplateWords
from layerfuse.model.config import FusionConfig
from layerfuse.model.instruction import instruction_source
from layerfuse.model.processor import Processor
from layerfuse.recipe.schema import Recipe

PROMPT_SAMPLES = 1000
"""Samples of a stage among which those are looked for whose prompts are compared."""
PROMPTS_OF_A_KIND = 10
"""Samples with the same order of roles whose prompts are compared."""


def check_prompts(
    recipe: Recipe,
    configs: list[FusionConfig],
    name: str,
    *,
    processor: Processor,
    samples: Samples,
) -> None:
    """Compare the words before an answer in training with those in the test.

    Args:
        recipe: of the study.
        configs: of its arms, in their order.
        name: of the stage.
        processor: of any arm: all have the same chat template.
        samples: of the stage, all usable.

    Raises:
        LayerfuseError: for the first arm and sample where the chat template makes them differ, and
            where it ends no answer.
    """
    stage = recipe.stages[name]
    # The plain prompt has no words before its captions, by design.
    if stage.prompt == "plain":
        return
    if not processor.turn_ends.ends_answers():
        raise LayerfuseError(
            f"stage {name!r}: the chat template writes nothing behind the last answer at which a "
            "model could learn to stop; let it end each answer with `{{ eos_token }}`"
        )
    # Chat templates look at roles and at places, seldom at words: a few samples of each kind are
    # enough.
    compared: Counter[tuple[str, ...]] = Counter()
    for sample in islice(samples, PROMPT_SAMPLES):
        roles = tuple(message["role"] for message in sample.messages)
        if compared[roles] == PROMPTS_OF_A_KIND:
            continue
        compared[roles] += 1
        for arm, config in zip(recipe.all_arms(), configs, strict=True):
            source = instruction_source(config.strategy)
            guided_by_turn = source.guided and source.by_turn
            difference = _prompt_difference(
                processor,
                sample,
                by_turn=guided_by_turn and stage.guided_by == "instruction",
            )
            if difference is None:
                continue
            raise LayerfuseError(
                f"arm {arm.label!r}, stage {name!r}, sample {sample.id}: the chat template makes "
                f"{difference.place} differ between training and the test.\n"
                f"  in training: {difference.in_training!r}\n"
                f"  in the test: {difference.in_test!r}\n"
                "Give a `chat_template` that writes the same in every turn, or data of one "
                "question per conversation"
            )


@dataclass(frozen=True)
class _Difference:
    """What the chat template writes at one place of a turn, where that is not the same."""

    place: str
    """which words, in the message"""
    in_training: str
    in_test: str


def _prompt_difference(processor: Processor, sample: Sample, by_turn: bool) -> _Difference | None:
    """Compare what stands around the questions of a conversation in training and in the test.

    Args:
        processor: holds the chat template.
        sample: the conversation.
        by_turn: whether training makes a row of each turn, as for guided arms.

    Returns:
        The first difference; None where there is none.
    """
    messages = sample.messages
    in_conversation = processor.chat.words_before_answers(messages)
    # As the test asks: each question alone, with the pictures that were shown up to it.
    asked_turns = asked_alone(sample)
    num_answers = 0
    question_place: int | None = None
    for place, message in enumerate(messages):
        if message["role"] == "user":
            question_place = place
        if message["role"] != "assistant":
            continue
        trained = in_conversation[num_answers]
        num_answers += 1
        # The test asks for no answer without a question.
        if question_place is None:
            continue
        asked = next(asked_turns).messages
        if by_turn:
            trained = processor.chat.words_before_answers(messages[: place + 1])[-1]
        tested = processor.chat.words_before_answers(asked)[0]
        if trained.since_question != tested.since_question:
            return _Difference(
                "the words before an answer",
                trained.since_question,
                tested.since_question,
            )
        if len(asked) == place + 1:
            if trained.before != tested.before:
                return _Difference("the words before an answer", trained.before, tested.before)
        elif messages[question_place - 1]["role"] == "assistant":
            # A later question follows an answer in training, which the test leaves out on purpose.
            difference = _opening_difference(processor, trained, asked)
            if difference is not None:
                return difference
        question_place = None
    return None


def _opening_difference(
    processor: Processor, trained: TemplateWords, asked: Sequence[Message]
) -> _Difference | None:
    """Compare what opens a later question in training with what opens it in the test.

    In training it follows an answer and its end, in the test the beginning of the conversation,
    such as a system's words.

    Args:
        processor: holds the chat template.
        trained: what the template writes around the question in training.
        asked: the question as the test asks it.
    """
    after_answer = processor.turn_ends.words_after_answers
    opening = trained.before_question.removeprefix(after_answer).strip()
    tested = processor.chat.words_before_answers(asked)[0].before_question
    if tested.rstrip().endswith(opening):
        return None
    # Some templates write the system's words into the first question, behind what opens it.
    without_system = [message for message in asked if message["role"] != "system"]
    if len(without_system) < len(asked):
        alone = processor.chat.words_before_answers(without_system)[0].before_question
        if alone.rstrip().endswith(opening):
            return None
    return _Difference("the words before a question", trained.before_question, tested)
