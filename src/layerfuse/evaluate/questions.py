"""The questions of samples, each to be asked on its own."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

from layerfuse.data.sample import Sample
from layerfuse.model.chat_template import IMAGE_TOKEN, Message, literal, written
from layerfuse.vision.picture import Picture


@dataclass(frozen=True)
class Question:
    """One question to ask on its own, and the answer to expect."""

    id: str
    sample: Sample
    messages: tuple[Message, ...]
    answer: str
    family: str
    category: str

    def with_answer(self) -> Sample:
        """The question with its answer, as the test asks it.

        Returns:
            A conversation of one question, the system's words before it.
        """
        answer: Message = {"role": "assistant", "content": literal(self.answer)}
        return replace(self.sample, messages=(*self.messages, answer))


def questions(samples: Iterable[Sample]) -> Iterator[Question]:
    """Every answered turn of every sample, each with the pictures that were shown up to it in front
    of it: those of later turns would be an answer's future, which training does not show either.

    Args:
        samples: conversations.

    Yields:
        The questions in the order of the turns.
    """
    # Several samples may have one id: their turns are counted on.
    asked_of: Counter[str] = Counter()
    for sample in samples:
        for asked in _asked_turns(sample):
            yield Question(
                id=f"{sample.id}/{asked_of[sample.id]}",
                sample=replace(sample, pictures=asked.pictures),
                messages=asked.messages,
                answer=asked.answer,
                family=sample.families[asked.place] if sample.families else "all",
                category=sample.categories[asked.place] if sample.categories else "all",
            )
            asked_of[sample.id] += 1


def asked_alone(sample: Sample) -> Iterator[Sample]:
    """Every question of a sample with its answer, as the test asks it.

    Args:
        sample: a conversation.

    Yields:
        A conversation of one question, the system's words before it.
    """
    for question in questions([sample]):
        yield question.with_answer()


@dataclass(frozen=True)
class _AskedTurn:
    """What is asked of a turn, on its own."""

    messages: tuple[Message, ...]
    """the system's words and the question"""
    pictures: tuple[Picture, ...]
    """in the order of the markers in the messages"""
    answer: str
    place: int
    """of the answer among all answers of the sample, to which families and categories belong"""


def _asked_turns(sample: Sample) -> Iterator[_AskedTurn]:
    """Every question of a sample that an answer follows."""
    system: list[Message] = []
    # The pictures so far: those in the system's words stay there.
    of_system: list[Picture] = []
    of_turns: list[Picture] = []
    question: Message | None = None
    num_answers = 0
    remaining = iter(sample.pictures)
    for message in sample.messages:
        shown = list(islice(remaining, message["content"].count(IMAGE_TOKEN)))
        if message["role"] == "system":
            system.append(message)
            of_system.extend(shown)
            continue
        if message["role"] == "assistant" and question is not None:
            content = with_all_pictures(question["content"], len(of_turns))
            yield _AskedTurn(
                messages=(*system, {"role": "user", "content": content}),
                pictures=(*of_system, *of_turns),
                answer=written(message["content"]).strip(),
                place=num_answers,
            )
        # After the question is asked: it must not see a picture in its own answer.
        of_turns.extend(shown)
        if message["role"] == "user":
            question = message
        else:
            # A greeting, and a second answer in a row, have a family too.
            question = None
            num_answers += 1


def with_all_pictures(text: str, pictures: int) -> str:
    """The words of a question with a marker for each picture that was shown up to it.

    Args:
        text: the question; its own markers, which stand where its words say, are of the last
            pictures.
        pictures: how many there are; those before the question's own go in front of it.

    Returns:
        The words; of markers to which no picture belongs, all pictures are in front instead.
    """
    own = text.count(IMAGE_TOKEN)
    if own > pictures:
        text = text.replace(IMAGE_TOKEN, "").strip()
        own = 0
    in_front = IMAGE_TOKEN * (pictures - own)
    # a picture in front of the words needs no line of its own between it and the others
    if not in_front or text.startswith(IMAGE_TOKEN):
        return in_front + text
    return in_front + "\n" + text
