"""A chat template: conversations as text, and where their answers stand in it."""

import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from jinja2 import TemplateError

from layerfuse.errors import LayerfuseError

IMAGE_TOKEN = "<image>"
"""what marks a picture in messages, and by default in tokens too"""
LITERAL_IMAGE = "\ue002"
"""what stands in messages for the text `<image>` that is no picture: a private-use character"""
Message = dict[str, str]
"""{"role": "user" | "assistant" | "system", "content": text, `<image>` where a picture belongs}"""

# The kinds of parts that people write, each in the words of transformers and TRL or of OpenAI.
_TEXT_KINDS = ("text", "input_text", "output_text")
_IMAGE_KINDS = ("image", "image_url", "input_image")
# Where a part holds its image, in the order in which transformers looks.
_IMAGE_KEYS = ("image", "url", "path", "base64", "image_url")
_VALID_PARTS = (
    'valid parts: {"type": "text", "text": ...}; {"type": "image"}, with "image", "url", "path" or '
    '"base64" where it holds the image; {"type": "image_url", "image_url": {"url": ...}}; '
    '"input_text", "output_text" and "input_image" as OpenAI writes them'
)

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
class Content:
    """What a message says, as text."""

    text: str
    """with `<image>` where a picture belongs"""
    images: tuple[Any, ...]
    """what each image part holds (a path, an address, a PIL image); None for a part that only
    marks the place of a picture"""


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


def literal(text: str) -> str:
    """A text in which `<image>` is text, as in a question about HTML, and marks no picture.

    Args:
        text: what people write.

    Returns:
        The text for a message, with `LITERAL_IMAGE` in place of each `<image>`.
    """
    return text.replace(IMAGE_TOKEN, LITERAL_IMAGE)


def written(text: str) -> str:
    """What people wrote: the reverse of `literal`.

    Args:
        text: of a message.
    """
    return text.replace(LITERAL_IMAGE, IMAGE_TOKEN)


# Any: people's own messages, of any shape
def from_parts(content: Any) -> Content:
    """The content of a message, which is a text or a list of parts, as one text.

    Texts are joined without a separator, as the templates of transformers do.

    Args:
        content: a text, or parts such as `{"type": "text", "text": "What?"}` and
            `{"type": "image", "url": "a.png"}`, in the words of transformers, TRL or OpenAI.

    Returns:
        The text; a content that is a text holds no images, whatever markers it has.

    Raises:
        LayerfuseError: naming what is no text and no list of parts, or the part that cannot be
            read and the valid kinds.
    """
    if isinstance(content, str):
        return Content(content, ())
    if not isinstance(content, list | tuple):
        raise LayerfuseError(
            f"the content of a message is a {type(content).__name__}, not a text or a list of "
            f"parts; {_VALID_PARTS}"
        )
    text = ""
    images: list[Any] = []
    parts: list[Any] = [*content]
    for part in parts:
        kind = None
        if isinstance(part, dict):
            fields: dict[str, Any] = {**part}
            kind = fields.get("type")
            if kind in _TEXT_KINDS and isinstance(fields.get("text"), str):
                text += fields["text"]
                continue
            if kind in _IMAGE_KINDS:
                images.append(_image_of(kind, fields))
                text += IMAGE_TOKEN
                continue
        raise LayerfuseError(f"cannot read the part {_short(part)} of a message; {_VALID_PARTS}")
    return Content(text, tuple(images))


def _image_of(kind: str, fields: dict[str, Any]) -> Any:
    """What an image part holds: a path, an address, a PIL image, or None."""
    for key in _IMAGE_KEYS:
        image = fields.get(key)
        # OpenAI's `image_url` wraps the address: {"url": "a.png", "detail": "low"}
        if key == "image_url" and isinstance(image, dict):
            wrapped: dict[str, Any] = {**image}
            image = wrapped.get("url")
        if image is not None:
            return image
    # `image` alone marks a place, to which TRL and tables of datasets bring the image apart.
    # OpenAI's kinds always hold theirs, if only by the id of a file that they alone can read.
    if kind != "image":
        raise LayerfuseError(
            f"the part {_short(fields)} of a message has no image that could be read; "
            f"{_VALID_PARTS}"
        )
    return None


def _short(value: Any) -> str:
    """A value in an error: its beginning alone, as it may hold the bytes of an image."""
    brief = reprlib.Repr()
    brief.maxstring = 100
    return brief.repr(value)


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
