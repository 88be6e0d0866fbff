"""A chat template: conversations as text, and where their answers stand in it."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from jinja2 import TemplateError

from layerfuse.errors import LayerfuseError, short

IMAGE_TOKEN = "<image>"
"""what marks a picture in messages, and by default in tokens too"""
LITERAL_IMAGE = "\ue002"
"""what stands in messages for the text `<image>` that is no picture: a private-use character"""
Message = dict[str, str]
"""{"role": "user" | "assistant" | "system", "content": text, `<image>` where a picture belongs}"""

# Answers are rendered as these private-use characters first, so that their place in the text is
# known exactly, whatever the chat template puts around them.
_OPEN = "\ue000"
_CLOSE = "\ue001"
# So are the names of special tokens that people write, such as `</s>`: after rendering they could
# not be told from those of the chat template. Between the two stands the name's index.
_NAME_OPEN = "\ue003"
_NAME_CLOSE = "\ue004"
# A template is a program: `{{ 1 / 0 }}` and `{{ 'a' + 1 }}` raise Python's own errors.
TEMPLATE_FAULTS = (TemplateError, ArithmeticError, TypeError)
"""what rendering a wrong chat template raises"""
ANSWER_TO_COME: Message = {"role": "assistant", "content": f"{_OPEN}0{_CLOSE}"}
"""what stands for the answer that a model is asked for"""
STAND_INS = re.compile("[\ue000-\ue004]")
"""the characters of this module that stand for something else, which no text of people may hold"""
_STAND_IN = re.compile(f"{LITERAL_IMAGE}|{_NAME_OPEN}(?P<index>[0-9]+){_NAME_CLOSE}")


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
    literals: list[Span] = field(default_factory=list[Span])
    """the characters of names that people wrote, such as `</s>`: text, and no special tokens"""


@dataclass(frozen=True)
class TemplateWords:
    """What a chat template writes before an answer."""

    before: str
    """all of it, with `...` in place of what people say"""
    since_question: str
    """what follows the question, or whatever was said last"""
    before_question: str
    """what stands between the question and whatever was said before it"""


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


def question_of(messages: Sequence[Message], image_token: str = IMAGE_TOKEN) -> str:
    """The last user message without its image markers: what a guided strategy may read.

    Args:
        messages: a conversation.
        image_token: of the tokenizer, which marks a picture as well.

    Returns:
        The question, as people wrote it; an empty text where the user says nothing.
    """
    question = ""
    for message in messages:
        if message["role"] == "user":
            question = message["content"]
    question = question.replace(IMAGE_TOKEN, "").replace(image_token, "")
    return written(question).strip()


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
    # whether there is such a function is a harmless question
    asked = re.sub(r"strftime_now\s+is\s+(not\s+)?defined", "", fixed)
    other_call = re.search(r"strftime_now.*", asked)
    if other_call is not None:
        raise LayerfuseError(
            "the chat template writes today's date in a format that is not written out "
            f"({other_call[0][:60]!r}): a model would be asked other than it was trained. Write "
            "strftime_now with a format in quotes, or a date"
        )
    return fixed


def up_to_answer(template: str) -> str:
    """A chat template that writes what a model is asked: all that stands before an answer.

    It is exactly what stands there in training. `add_generation_prompt` of some templates writes
    something else, such as a space behind it or an empty thought.

    Args:
        template: a Jinja template of `messages`.

    Returns:
        A template of messages that end with `ANSWER_TO_COME`. Spaces before the answer belong to
        it, as tokenizers merge them with its first word.
    """
    mark = repr(ANSWER_TO_COME["content"])
    refusal = "raise_exception('it does not write an answer behind them')"
    # `+` keeps the white space of the template as it is
    capture = "{% set layerfuse_text +%}" + template + "{%+ endset %}"
    check = f"{{% if {mark} not in layerfuse_text %}}{{{{ {refusal} }}}}{{% endif %}}"
    cut = f"{{{{ layerfuse_text.partition({mark})[0].rstrip(' ') }}}}"
    return capture + check + cut


class _Revealed:
    """A text that grows, in which stand-ins become the names that people wrote.

    Args:
        names: of the special tokens, by the index in their stand-ins.
        pictures: what becomes of the markers of pictures; None leaves them.
    """

    def __init__(self, names: list[str], pictures: "_Pictures | None" = None) -> None:
        self.names = names
        self.pictures = pictures
        self.text = ""
        self.literals: list[Span] = []

    def add(self, hidden: str) -> None:
        """Append a text.

        Args:
            hidden: with stand-ins.
        """
        if self.pictures is not None:
            # before names are revealed, among which `<image>` may be
            hidden = self.pictures.expand(hidden)
        end = 0
        for stand_in in _STAND_IN.finditer(hidden):
            name = IMAGE_TOKEN
            if stand_in["index"] is not None:
                index = int(stand_in["index"])
                if index >= len(self.names):
                    # what people wrote only looks like a stand-in
                    continue
                name = self.names[index]
            self.text += hidden[end : stand_in.start()]
            self.literals.append(Span(len(self.text), len(self.text) + len(name)))
            self.text += name
            end = stand_in.end()
        self.text += hidden[end:]


def _pictures_in_front(words: str) -> tuple[str, str]:
    """The markers in front of what a user says, with the white space behind them, and the rest."""
    markers = re.match(f"(?:{IMAGE_TOKEN}\\s*)*", words)
    end = 0 if markers is None else markers.end()
    return words[:end], words[end:]


class _Pictures:
    """The pictures of a conversation, in the order in which its template writes them.

    Args:
        image_token: of the tokenizer.
        tokens: number of image tokens of each picture.
    """

    def __init__(self, image_token: str, tokens: Sequence[int]) -> None:
        self.image_token = image_token
        self.remaining = list(tokens)
        # both `<image>` and the tokenizer's own image token mark a picture
        self.marker = re.compile(f"{IMAGE_TOKEN}|{re.escape(image_token)}")

    def expand(self, text: str) -> str:
        """A text with as many image tokens in place of each marker as its picture has.

        Raises:
            LayerfuseError: the template writes more markers than there are pictures.
        """

        def image_run(marker: re.Match[str]) -> str:
            if not self.remaining:
                raise LayerfuseError(
                    "the chat template writes more markers of pictures than the messages hold"
                )
            return self.image_token * self.remaining.pop(0)

        # a function, as the image token itself may be `<image>`
        return self.marker.sub(image_run, text)

    def refuse_lost(self) -> None:
        """Raise LayerfuseError if the template left out a picture."""
        if self.remaining:
            raise LayerfuseError("the chat template leaves out markers of pictures")


class ChatTemplate:
    """What one chat template makes of conversations.

    Args:
        tokenizer: the LLM's, of transformers; it renders templates.
        template: the Jinja template of `messages`.
        image_token: the token of the tokenizer that stands for a visual token.
    """

    # Any: tokenizers of transformers share no type that says what they have
    def __init__(self, tokenizer: Any, template: str, image_token: str = IMAGE_TOKEN) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.image_token = image_token
        self._names = self._special_names()
        self._any_name = re.compile("|".join(re.escape(name) for name in self._names))

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text after which the model writes its answer to the last user message.

        It is exactly what stands before an answer in training; spaces that the template writes
        there belong to the answer, as tokenizers merge them with its first word.

        Args:
            messages: a conversation that ends with a user message.

        Raises:
            LayerfuseError: if the chat template refuses the conversation.
        """
        revealed = _Revealed(self._names)
        revealed.add(self._hidden_prompt(messages))
        return revealed.text

    def expanded_prompt(self, messages: Sequence[Message], tokens_per_image: int) -> Rendered:
        """The prompt with the image tokens of its pictures.

        Args:
            messages: a conversation that ends with a user message.
            tokens_per_image: image tokens that replace each marker of a picture.

        Returns:
            The text, without answers.

        Raises:
            LayerfuseError: if the chat template refuses the conversation or changes what people
                say.
        """
        text = self._hidden_prompt(messages)
        self._refuse_lost_words(self._hidden(messages), text)
        return self.revealed(text, tokens_per_image)

    def revealed(self, hidden: str, tokens_per_image: int = 1) -> Rendered:
        """A text with what people wrote and with the image tokens of its pictures.

        Args:
            hidden: the text, in which stand-ins are the names that people wrote.
            tokens_per_image: image tokens that replace each marker of a picture.

        Returns:
            The text, without answers.
        """
        # both `<image>` and the tokenizer's own image token mark a picture
        text = hidden.replace(IMAGE_TOKEN, self.image_token)
        # before names are revealed, among which `<image>` may be
        text = text.replace(self.image_token, self.image_token * tokens_per_image)
        revealed = _Revealed(self._names)
        revealed.add(text)
        return Rendered(revealed.text, [], revealed.literals)

    def words_before_answers(self, messages: Sequence[Message]) -> list[TemplateWords]:
        """What the chat template writes before each answer of a conversation.

        Args:
            messages: the conversation.

        Raises:
            LayerfuseError: if the chat template refuses the conversation, or changes what people
                say.
        """
        answers: list[str] = []
        marked_messages: list[Message] = []
        for place, message in enumerate(messages):
            mark = f"{_OPEN}{place}{_CLOSE}"
            if message["role"] == "assistant":
                answers.append(mark)
                message = {**message, "content": mark}
            elif message["role"] == "user":
                # Around the words, at which a template may look, and behind pictures in front of
                # them, around which some write something.
                in_front, words_of_user = _pictures_in_front(self.hide(message["content"]))
                message = {**message, "content": f"{in_front}{mark}{words_of_user}{mark}"}
            else:
                message = {**message, "content": self.hide(message["content"])}
            marked_messages.append(message)
        text = self._render(marked_messages)
        self._refuse_lost_words(marked_messages, text)

        # what people say is one mark, as answers are
        twice = f"({_OPEN}[0-9]+{_CLOSE}).*?\\1"
        text = re.sub(twice, r"\1", text, flags=re.DOTALL)
        # pictures in front of the words are said as well
        text = re.sub(f"(?:{IMAGE_TOKEN}\\s*)+(?={_OPEN})", "", text)
        revealed = _Revealed(self._names)
        revealed.add(text)
        text = revealed.text
        words: list[TemplateWords] = []
        for mark in answers:
            before_mark = text.partition(mark)[0]
            before = re.sub(f"{_OPEN}[0-9]+{_CLOSE}", "...", before_mark)
            before_said, _, since_question = before_mark.rpartition(_CLOSE)
            # a question stands between its mark and what was said before
            before_question = before_said.rpartition(_OPEN)[0].rpartition(_CLOSE)[2]
            words.append(TemplateWords(before, since_question, before_question))
        return words

    def conversation(
        self, messages: Sequence[Message], image_tokens: Sequence[int] | None = None
    ) -> Rendered:
        """A whole conversation, and where its answers stand.

        Args:
            messages: the conversation.
            image_tokens: number of image tokens that replace each marker of a picture; None leaves
                the markers.

        Raises:
            LayerfuseError: if the chat template refuses the conversation, leaves out an answer or
                changes what people say.
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
            else:
                message = {**message, "content": self.hide(message["content"])}
            marked_messages.append(message)

        pictures = None
        if image_tokens is not None:
            pictures = _Pictures(self.image_token, image_tokens)
        revealed = _Revealed(self._names, pictures)
        spans: list[Span] = []
        # pictures are expanded behind the template, which may write something around each
        rest = self._render(marked_messages)
        self._refuse_lost_words(marked_messages, rest)
        for mark, answer in zip(marks, answers, strict=True):
            before, separator, rest = rest.partition(mark)
            if not separator:
                raise LayerfuseError("the chat template does not write every answer, in order")
            revealed.add(before)
            # spaces before an answer are merged with its first word by tokenizers
            start = len(revealed.text.rstrip(" "))
            revealed.add(self.hide(answer))
            spans.append(Span(start, len(revealed.text)))
        revealed.add(rest)
        if pictures is not None:
            pictures.refuse_lost()
        return Rendered(revealed.text, spans, revealed.literals)

    def images_and_answers(
        self, messages: Sequence[Message], end: str, image_tokens: Sequence[int]
    ) -> Rendered:
        """All images, then the answers alone: a conversation without a chat template.

        Args:
            messages: the conversation.
            end: what follows each answer.
            image_tokens: number of image tokens of each picture.
        """
        revealed = _Revealed(self._names)
        revealed.add(self.image_token * sum(image_tokens))
        spans: list[Span] = []
        for message in messages:
            if message["role"] == "assistant":
                start = len(revealed.text)
                revealed.add(self.hide(message["content"].strip()))
                spans.append(Span(start, len(revealed.text)))
                revealed.add(end)
        return Rendered(revealed.text, spans, revealed.literals)

    def _hidden_prompt(self, messages: Sequence[Message]) -> str:
        """What stands before the next answer, with stand-ins for the names that people wrote."""
        return self._render(
            [*self._hidden(messages), ANSWER_TO_COME],
            up_to_answer(self.template),
        )

    def _hidden(self, messages: Sequence[Message]) -> list[Message]:
        """The messages with stand-ins for the names that people wrote."""
        hidden: list[Message] = []
        for message in messages:
            hidden.append({**message, "content": self.hide(message["content"])})
        return hidden

    def _refuse_lost_words(self, messages: Sequence[Message], text: str) -> None:
        """Raise LayerfuseError for a template that does not write what the user or the system says:
        a model would learn, and be asked, something else.

        Args:
            messages: what the template was given. Answers may be left out of what is asked, as
                templates of thinking models leave out thoughts.
            text: what it made of them.
        """
        numbers: Counter[tuple[str, str]] = Counter()
        for message in messages:
            # many templates trim what people say
            words = message["content"].strip()
            if message["role"] != "assistant" and words:
                numbers[message["role"], words] += 1
        for (role, words), number in numbers.items():
            if text.count(words) >= number:
                continue
            # a picture may be hundreds of tokens
            words = re.sub(f"(?:{re.escape(self.image_token)})+", IMAGE_TOKEN, words)
            words = re.sub(f"{_OPEN}[0-9]+{_CLOSE}", "", words)
            revealed = _Revealed(self._names)
            revealed.add(words)
            raise LayerfuseError(
                f"the chat template changes or leaves out what the {role} says: "
                f"{short(revealed.text)} is not in what it writes. Give a `chat_template` that "
                "writes the content of every message as it stands, image markers with it"
            )

    def _special_names(self) -> list[str]:
        """The names of all special tokens but the image token."""
        names: set[str] = set()
        for token in self.tokenizer.added_tokens_decoder.values():
            # tokens of white space are ordinary text to templates and people
            if token.special and not token.content.isspace():
                names.add(token.content)
        # these mark pictures wherever they stand
        names -= {IMAGE_TOKEN, self.image_token}
        return sorted(names)

    def hide(self, content: str) -> str:
        """What people wrote, with a stand-in for each name of a special token.

        Contents without such names stay as they are, so that the chat template makes of them what
        it always does.

        Args:
            content: of a message.
        """

        def stand_in(name: re.Match[str]) -> str:
            return f"{_NAME_OPEN}{self._names.index(name[0])}{_NAME_CLOSE}"

        if not self._names:
            return content
        return self._any_name.sub(stand_in, content)

    def _render(self, messages: Sequence[Message], template: str | None = None) -> str:
        """The text that the chat template makes of a conversation, or another one."""
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=template or self.template,
                tokenize=False,
            )
        except TEMPLATE_FAULTS as error:
            roles = [message["role"] for message in messages]
            raise LayerfuseError(f"the chat template refuses the roles {roles}: {error}") from error
