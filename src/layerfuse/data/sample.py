"""One sample: a conversation about pictures."""

from dataclasses import dataclass

from layerfuse.model.chat_template import IMAGE_TOKEN, Message
from layerfuse.vision.picture import Picture


@dataclass(frozen=True)
class Sample:
    """One conversation about some pictures."""

    id: str
    pictures: tuple[Picture, ...]
    """in the order of the image markers in the messages"""
    messages: tuple[Message, ...]
    families: tuple[str, ...] = ()
    """of each answer, such as `count`; empty where the source names none"""
    categories: tuple[str, ...] = ()
    """of each answer, such as `Hallucination`; empty where the source names none"""
    novel: bool = False
    """whether a picture shows what no training picture does"""


def by_turn(sample: Sample) -> list[Sample]:
    """One sample per answer: the conversation up to it, with the pictures that it shows.

    Args:
        sample: with any number of answers.
    """
    turns: list[Sample] = []
    num_shown = 0
    for end, message in enumerate(sample.messages, start=1):
        num_shown += message["content"].count(IMAGE_TOKEN)
        if message["role"] != "assistant":
            continue
        # Answers so far: the index of this one.
        answer = len(turns)
        turn = Sample(
            id=sample.id,
            pictures=sample.pictures[:num_shown],
            messages=sample.messages[:end],
            # Slices, because samples without families have an empty tuple.
            families=sample.families[answer : answer + 1],
            categories=sample.categories[answer : answer + 1],
            novel=sample.novel,
        )
        turns.append(turn)
    return turns
