"""A chat template: conversations as text, and where their answers stand in it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from jinja2 import TemplateError

from layerfuse.errors import LayerfuseError

IMAGE_TOKEN = "<image>"
"""what marks a picture in messages, and by default in tokens too"""
Message = dict[str, str]
"""{"role": "user" | "assistant" | "system", "content": text, `<image>` where a picture belongs}"""

# Answers are rendered as these private-use characters first, so that their place in the text is
# known exactly, whatever the chat template puts around them.
_OPEN = "\ue000"
_CLOSE = "\ue001"


@dataclass(frozen=True)
class Span:
    """A stretch of characters or of tokens."""

    start: int
    """the first"""
    end: int
    """the last + 1"""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    text: str
    answers: list[Span]
    """the characters of each answer, in order"""


@dataclass(frozen=True)
class TemplateWords:
    """What a chat template writes before an answer."""

    before: str
    """all of it, with `...` in place of what people say"""
    since_question: str
    """what follows the question, or whatever was said last"""


def question_of(messages: Sequence[Message]) -> str:
    """The last user message without its image markers: what a guided strategy may read.

    Args:
        messages: a conversation.

    Returns:
        The question; an empty text where the user says nothing.
    """
    question = ""
    for message in messages:
        if message["role"] == "user":
            question = message["content"]
    return question.replace(IMAGE_TOKEN, "").strip()


def with_fixed_date(template: str) -> str:
    """A chat template that writes the same day for ever, the one that Llama 3's own template falls
    back to: a model is not asked on the day on which it was trained.

    Args:
        template: a Jinja template, in which `strftime_now("format")` is today's date.

    Raises:
        LayerfuseError: if the template computes the format of a date.
    """

    def as_text(call: re.Match[str]) -> str:
        day = datetime(2024, 7, 26, tzinfo=UTC)
        return repr(day.strftime(call["format"]))

    literal_call = r"strftime_now\s*\(\s*(?P<quote>['\"])(?P<format>.*?)(?P=quote)\s*\)"
    fixed = re.sub(literal_call, as_text, template)
    other_call = re.search(r"strftime_now\s*\(.*", fixed)
    if other_call is not None:
        raise LayerfuseError(
            "the chat template writes today's date in a format that is not written out "
            f"({other_call[0][:60]!r}): a model would be asked other than it was trained. Write "
            "strftime_now with a format in quotes, or a date"
        )
    return fixed


class ChatTemplate:
    """What one chat template makes of conversations.

    Args:
        tokenizer: the LLM's, of transformers; it renders templates.
        template: the Jinja template of `messages`.
    """

    # Any: tokenizers of transformers share no type that says what they have
    def __init__(self, tokenizer: Any, template: str) -> None:
        self.tokenizer = tokenizer
        self.template = template

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text after which the model writes its answer to the last user message.

        It is exactly what stands before an answer in training; spaces that the template writes
        there belong to the answer, as tokenizers merge them with its first word.

        Args:
            messages: a conversation that ends with a user message.

        Raises:
            LayerfuseError: if the chat template refuses the conversation.
        """
        # not `add_generation_prompt`, which some templates write differently from an answer
        text = self._render([*messages, {"role": "assistant", "content": _OPEN}])
        return text[: text.index(_OPEN)].rstrip(" ")

    def words_before_answers(self, messages: Sequence[Message]) -> list[TemplateWords]:
        """What the chat template writes before each answer of a conversation.

        Args:
            messages: the conversation; of all but the system's only the roles matter.

        Raises:
            LayerfuseError: if the chat template refuses the conversation.
        """
        answers: list[str] = []
        marked_messages: list[Message] = []
        for place, message in enumerate(messages):
            if message["role"] != "system":
                mark = f"{_OPEN}{place}{_CLOSE}"
                if message["role"] == "assistant":
                    answers.append(mark)
                message = {**message, "content": mark}
            marked_messages.append(message)

        words: list[TemplateWords] = []
        text = self._render(marked_messages)
        for mark in answers:
            before = re.sub(f"{_OPEN}.*?{_CLOSE}", "...", text.partition(mark)[0])
            since_question = text.partition(mark)[0].rpartition(_CLOSE)[2]
            words.append(TemplateWords(before, since_question))
        return words

    def conversation(self, messages: Sequence[Message]) -> Rendered:
        """A whole conversation, and where its answers stand.

        Args:
            messages: the conversation.

        Raises:
            LayerfuseError: if the chat template refuses the conversation or leaves out an answer.
        """
        # rendered with a mark in place of each answer, whose text may also stand elsewhere
        answers: list[str] = []
        marks: list[str] = []
        marked_messages: list[Message] = []
        for message in messages:
            if message["role"] == "assistant":
                mark = f"{_OPEN}{len(marks)}{_CLOSE}"
                marks.append(mark)
                answers.append(message["content"].strip())
                message = {**message, "content": mark}
            marked_messages.append(message)

        text = ""
        spans: list[Span] = []
        rest = self._render(marked_messages)
        for mark, answer in zip(marks, answers, strict=True):
            before, separator, rest = rest.partition(mark)
            if not separator:
                raise LayerfuseError("the chat template does not write every answer, in order")
            text += before
            # spaces before an answer are merged with its first word by tokenizers
            spans.append(Span(len(text.rstrip(" ")), len(text) + len(answer)))
            text += answer
        return Rendered(text + rest, spans)

    def _render(self, messages: Sequence[Message]) -> str:
        """The text that the chat template makes of a conversation."""
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=self.template,
                tokenize=False,
            )
        except TemplateError as error:
            roles = [message["role"] for message in messages]
            raise LayerfuseError(f"the chat template refuses the roles {roles}: {error}") from error
