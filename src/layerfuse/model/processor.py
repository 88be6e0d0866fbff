"""Text and pictures in, model inputs out: chat template, image tokens, answer labels."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from transformers import BatchFeature, ProcessorMixin

from layerfuse.errors import LayerfuseError
from layerfuse.fusion import parse
from layerfuse.model.config import ImageTokens
from layerfuse.model.instruction import instruction_source

IMAGE_TOKEN = "<image>"
"""what marks a picture in messages, and by default in tokens too"""
IGNORED = -100
"""the label of a token that is not learned, as in PyTorch's cross-entropy"""
Message = dict[str, str]
"""{"role": "user" | "assistant" | "system", "content": text, `<image>` where a picture belongs}"""

# Answers are rendered as these private-use characters first, so that their place in the text is
# known exactly, whatever the chat template puts around them.
_OPEN = "\ue000"
_CLOSE = "\ue001"

# How answers may close: tokenizers merge some of these with a newline behind them into one token.
_CLOSINGS = ("a", "1", ".", ",", "!", "?", ":", ";", ")", "]", "}", '"', "'", "%", "*", "`")


class NoLabelError(LayerfuseError):
    """No token of a sample is left to learn from."""


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


def _with_fixed_date(template: str) -> str:
    """A chat template that writes the same day for ever, the one that Llama 3's own template falls
    back to: a model is not asked on the day on which it was trained."""

    def as_text(call: re.Match[str]) -> str:
        day = datetime(2024, 7, 26, tzinfo=UTC)
        return repr(day.strftime(call["format"]))

    return re.sub(
        r"strftime_now\(\s*(?P<quote>['\"])(?P<format>.*?)(?P=quote)\s*\)", as_text, template
    )


@dataclass(frozen=True)
class EndTokens:
    """The tokens that training labels behind an answer."""

    alone: list[int]
    """hold nothing of the answer, such as `</s>` or a newline"""
    merged: list[int]
    """hold the answer's last characters too, such as a full stop with a newline"""


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


class Processor(ProcessorMixin):
    """Image processor and tokenizer of one `FusionVLM`.

    Args:
        image_processor: the encoder's, of transformers.
        tokenizer: the LLM's, of transformers.
        patch_size: pixels of a patch, both ways.
        token_grid: (rows, columns) to which patches are pooled; None: no pooling.
        fusion: the model's strategy in recipe form.
        layers: number of selected layers; with `fusion` it decides how many tokens an image
            becomes.
        image_token: the token of the tokenizer that stands for a visual token.
        chat_template: a Jinja template of `messages`; None takes the tokenizer's own. Where it
            writes today's date, it is changed to write always the same.

    Raises:
        LayerfuseError: if the tokenizer is a slow one, has no chat template (and none is given) or
            lacks the image token.
    """

    # Any: image processors and tokenizers of transformers share no type that says what they have
    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int = 14,
        token_grid: Sequence[int] | None = None,
        fusion: dict[str, Any] | None = None,
        layers: int = 1,
        image_token: str = IMAGE_TOKEN,
        chat_template: str | None = None,
    ) -> None:
        template: Any = chat_template or tokenizer.chat_template
        if isinstance(template, dict):
            # some tokenizers have several by name, for tools or documents
            template_by_name: dict[str, str] = {**template}
            template = template_by_name["default"]
        if not tokenizer.is_fast:
            raise LayerfuseError(
                "the LLM needs a fast tokenizer: slow ones give no offsets of tokens"
            )
        if template is None:
            raise LayerfuseError(
                f"the tokenizer of {tokenizer.name_or_path or 'the LLM'} has no chat template; "
                "pass `chat_template` (a Jinja template of `messages`), for example the text of "
                "recipes/templates/vicuna_v1.jinja"
            )
        if image_token not in tokenizer.get_vocab():
            raise LayerfuseError(
                f"the tokenizer lacks the image token {image_token!r}; its special tokens are "
                f"{tokenizer.all_special_tokens}. Name one of them, or leave `image_token` unset: "
                "`FusionVLM.compose` and `layerfuse.model.pretrained.load_tokenizer` add "
                f"{IMAGE_TOKEN!r}"
            )

        # saved by transformers: every attribute that has the name of an argument
        self.patch_size = patch_size
        self.token_grid: list[int] | None = None
        if token_grid:
            self.token_grid = list(token_grid)
        self.fusion = fusion or {"name": "single"}
        self.layers = layers
        self.image_token = image_token

        strategy = parse(self.fusion)
        self.image_tokens = ImageTokens(strategy, layers, patch_size, self.token_grid)
        self.instruction = instruction_source(strategy)
        self.image_token_id: int = tokenizer.convert_tokens_to_ids(image_token)
        # what `_turn_end` found, with the template that it belongs to
        self._known_end: tuple[Any, str] = (None, "")
        # the model's answer continues a row at its right end
        tokenizer.padding_side = "left"
        # Any: transformers does not annotate its constructor
        parent: Any = super()
        parent.__init__(image_processor, tokenizer, chat_template=_with_fixed_date(template))

    def num_image_tokens(self, height: int, width: int) -> int:
        """Tokens that one preprocessed image of that many pixels becomes."""
        return self.image_tokens.of_pixels(height, width)

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **_: Any) -> str:
        """What transformers' own call writes for an image.

        Args:
            image_inputs: what the image processor gave.
            image_idx: index of the image.
        """
        height, width = image_inputs["pixel_values"][image_idx].shape[-2:]
        return self.image_token * self.num_image_tokens(height, width)

    def prompt(self, messages: list[Message]) -> str:
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

    def inputs(
        self, conversations: list[list[Message]], images: list[Any] | None = None
    ) -> BatchFeature:
        """Left-padded model inputs that end where the answers begin.

        Args:
            conversations: one per row, each ending with a user message.
            images: PIL images, in reading order over all rows.

        Returns:
            `pixel_values` (images, 3, height, width) if there are images, and what `text_inputs`
            gives.

        Raises:
            LayerfuseError: if the chat template refuses a conversation.
        """
        if not images:
            return BatchFeature(self.text_inputs(conversations, 0))
        inputs: dict[str, Any] = dict(self.image_processor(images, return_tensors="pt"))
        height, width = inputs["pixel_values"].shape[-2:]
        tokens_per_image = self.num_image_tokens(height, width)
        inputs.update(self.text_inputs(conversations, tokens_per_image))
        return BatchFeature(inputs)

    def text_inputs(
        self, conversations: Sequence[Sequence[Message]], tokens_per_image: int
    ) -> dict[str, torch.Tensor]:
        """The one way to build what the model is asked.

        Args:
            conversations: one per row, each ending with a user message.
            tokens_per_image: image tokens that replace each `<image>` marker.

        Returns:
            Left-padded `input_ids` and `attention_mask` (rows, T) that end where the answers
            begin, and `instruction` (rows, E) for strategies that read the question.

        Raises:
            LayerfuseError: if the chat template refuses a conversation.
        """
        texts: list[str] = []
        questions: list[str] = []
        for messages in conversations:
            # Both `<image>` and the tokenizer's own image token mark a picture.
            prompt = self.prompt(list(messages)).replace(IMAGE_TOKEN, self.image_token)
            texts.append(prompt.replace(self.image_token, self.image_token * tokens_per_image))
            questions.append(question_of(messages).replace(self.image_token, "").strip())
        # the template has written the special tokens already
        tokens = self.tokenizer(
            texts,
            add_special_tokens=False,
            padding=True,
            return_tensors="pt",
        )
        inputs: dict[str, torch.Tensor] = {
            "input_ids": tokens["input_ids"],
            "attention_mask": tokens["attention_mask"],
        }
        instruction = self.instruction.embed(questions)
        if instruction is not None:
            inputs["instruction"] = instruction
        return inputs

    def end_tokens(self) -> EndTokens:
        """The tokens that end an answer, as `encode` labels them: whatever the chat template writes
        there, and the end of sequence of the plain prompt."""
        alone: set[int] = set()
        merged: set[int] = set()
        for closing in _CLOSINGS:
            for text, answers in self._probes(closing):
                # a chat template writes the special tokens itself
                encoded = self.tokenizer(
                    text,
                    add_special_tokens=False,
                    return_offsets_mapping=True,
                )
                for answer in answers:
                    for span in self._token_spans(text, encoded, [answer]):
                        first, last = encoded["offset_mapping"][span.end - 1]
                        token = encoded["input_ids"][span.end - 1]
                        if first >= answer.end:
                            alone.add(token)
                        elif text[answer.end : last].strip(" "):
                            merged.add(token)
        if self.tokenizer.eos_token_id is not None:
            alone.add(self.tokenizer.eos_token_id)
        return EndTokens(sorted(alone), sorted(merged - alone))

    def ends_answers(self) -> bool:
        """Whether training labels anything behind the last answer of a conversation; if not, a
        model never learns to stop."""
        for text, answers in self._probes(_CLOSINGS[0]):
            encoded = self.tokenizer(
                text,
                add_special_tokens=False,
                return_offsets_mapping=True,
            )
            for span in self._token_spans(text, encoded, answers[-1:]):
                _, last = encoded["offset_mapping"][span.end - 1]
                if last <= answers[-1].end:
                    return False
        return True

    # Any: transformers' GenerationConfig declares no types
    def set_stop_tokens(self, generation_config: Any) -> None:
        """Let generation stop where training ends an answer, and where the LLM itself stops.

        The one place that decides where answers stop. It is saved with the model.

        Args:
            generation_config: of the model; its `eos_token_id` is changed.
        """
        stops: list[int] = []
        # transformers has a number for one token and a list for several
        of_llm = generation_config.eos_token_id
        if isinstance(of_llm, int):
            stops.append(of_llm)
        elif of_llm is not None:
            stops.extend(of_llm)
        ends = self.end_tokens()
        for token in [*ends.alone, *ends.merged]:
            if token not in stops:
                stops.append(token)
        if len(stops) == 1:
            generation_config.eos_token_id = stops[0]
        elif stops:
            generation_config.eos_token_id = stops

    def answer_texts(self, rows: torch.Tensor) -> list[str]:
        """What the model said, without the end of its turn.

        Args:
            rows: (rows, T) generated tokens, without the prompt.

        Returns:
            One answer per row, without spaces around it.
        """
        ends = self.end_tokens()
        answers: list[list[int]] = []
        # Any: torch does not type lists of a tensor's values
        generated: Any = rows
        for tokens in generated.tolist():
            answer: list[int] = []
            for token in tokens:
                # an end that is no special token would else be decoded
                if token in ends.alone:
                    break
                answer.append(token)
                if token in ends.merged:
                    break
            answers.append(answer)
        texts: list[str] = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def encode(
        self,
        messages: list[Message],
        image_tokens: list[int],
        *,
        prompt: Literal["chat", "plain"] = "chat",
        max_length: int | None = None,
        answers: Literal["all", "last"] = "all",
    ) -> dict[str, torch.Tensor]:
        """A training conversation, of which only answers are labelled.

        Args:
            messages: the conversation, with an `<image>` marker per image.
            image_tokens: the token count of each image, in order.
            prompt: `chat` writes the chat template; `plain` the images and the answers alone
                (LLaVA's alignment format).
            max_length: tokens that are left of a longer conversation; None leaves all.
            answers: whether all answers are labelled or the last alone.

        Returns:
            `input_ids` and `labels`, both (T,); labels are -100 where nothing is to be learned.

        Raises:
            NoLabelError: when no token is labelled.
            LayerfuseError: when the number of images does not fit the text, when `max_length`
                would cut image tokens away, or the chat template refuses the conversation.
        """
        messages = self._expand(messages, image_tokens)
        rendered = self._plain(messages) if prompt == "plain" else self._chat(messages)
        spans = rendered.answers
        if answers == "last":
            spans = spans[-1:]
        # a chat template writes the special tokens itself
        encoded = self.tokenizer(
            rendered.text,
            add_special_tokens=prompt == "plain",
            return_offsets_mapping=True,
        )

        ids: list[int] = encoded["input_ids"]
        labels = [IGNORED] * len(ids)
        for span in self._token_spans(rendered.text, encoded, spans):
            for place in range(span.start, span.end):
                # an answer may hold an image, which is not for the LLM to write
                if ids[place] != self.image_token_id:
                    labels[place] = ids[place]

        input_tensor = torch.tensor(ids)[:max_length]
        label_tensor = torch.tensor(labels)[:max_length]
        image_places = input_tensor == self.image_token_id
        if int(image_places.sum()) != sum(image_tokens):
            raise LayerfuseError(
                f"{len(ids)} tokens: max_length {max_length} would cut image tokens"
            )
        if bool((label_tensor == IGNORED).all()):
            raise NoLabelError(f"no token is labelled ({len(ids)} tokens, max_length {max_length})")
        return {"input_ids": input_tensor, "labels": label_tensor}

    def _token_spans(self, text: str, encoded: Any, answers: list[Span]) -> Iterator[Span]:
        """The tokens of each answer, with those that end its turn, if any."""
        ids: list[int] = encoded["input_ids"]
        # the first and last + 1 characters of every token
        offsets: list[tuple[int, int]] = encoded["offset_mapping"]
        end_tokens = self._special_ids() - {self.image_token_id}
        for answer in answers:
            inside: list[int] = []
            for index, (first, last) in enumerate(offsets):
                # tokens that a tokenizer adds by itself cover no character
                if first < last and first < answer.end and last > answer.start:
                    inside.append(index)
            if not inside:
                continue
            end = inside[-1] + 1
            # templates may write spaces before the end of a turn
            after = end
            while after < len(ids) and not text[slice(*offsets[after])].strip():
                after += 1
            if after < len(ids) and ids[after] in end_tokens:
                end = after + 1
            else:
                end = self._after_ordinary_end(text, encoded, answer, end)
            yield Span(inside[0], end)

    def _after_ordinary_end(self, text: str, encoded: Any, answer: Span, end: int) -> int:
        """Where a turn ends that no special token ends right after its answer.

        Args:
            text: the conversation.
            encoded: its tokens.
            answer: the answer's characters.
            end: the last token of the answer + 1.

        Returns:
            The last token that is labelled + 1. It is the first special token of the end of the
            turn, where that begins with other characters, else the first token of that end, at
            which generation can stop; `end` where the template ends no turn.
        """
        turn_end = self._turn_end()
        if not turn_end.strip(" ") or not text.startswith(turn_end, answer.end):
            return end
        end_tokens = self._special_ids() - {self.image_token_id}
        # spaces may be tokens of their own, but end nothing
        begin = answer.end + len(turn_end) - len(turn_end.lstrip(" "))
        ordinary = end
        for index in range(end, len(encoded["input_ids"])):
            first, last = encoded["offset_mapping"][index]
            if first >= answer.end + len(turn_end):
                break
            if encoded["input_ids"][index] in end_tokens:
                return index + 1
            if ordinary == end and first <= begin < last:
                ordinary = index + 1
        return ordinary

    def _turn_end(self) -> str:
        """What the chat template writes after every answer, the last one too; often nothing but an
        end-of-turn token and a newline."""
        template, turn_end = self._known_end
        if template != self.chat_template:
            turn_end = ""
            ends: list[str] = []
            for text, answers in self._probes(_CLOSINGS[0]):
                starts = [answer.start for answer in answers]
                for answer, next_start in zip(answers, [*starts[1:], len(text)], strict=True):
                    ends.append(text[answer.end : next_start])
            if ends:
                # the last turn ends with the text, all others go on with the next question
                turn_end = min(ends, key=len)
            for other in ends:
                while not other.startswith(turn_end):
                    turn_end = turn_end[:-1]
            self._known_end = (self.chat_template, turn_end)
        return turn_end

    def _probes(self, closing: str) -> Iterator[tuple[str, list[Span]]]:
        """Conversations of one and of two turns whose answers close with the given character, and
        their answers; those that the chat template refuses are left out."""
        turn = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": f"a{closing}"},
        ]
        for messages in (turn, [*turn, *turn]):
            try:
                rendered = self._chat(messages)
            except LayerfuseError:
                # what matters of it is told for the samples that need it
                continue
            yield rendered.text, rendered.answers

    def _special_ids(self) -> set[int]:
        """The ids of all special tokens, the added ones too."""
        special: set[int] = set()
        for token_id, token in self.tokenizer.added_tokens_decoder.items():
            if token.special:
                special.add(token_id)
        return special

    def _render(self, messages: list[Message]) -> str:
        """The text that the chat template makes of a conversation."""
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.chat_template,
                tokenize=False,
            )
        except TemplateError as error:
            roles = [message["role"] for message in messages]
            raise LayerfuseError(f"the chat template refuses the roles {roles}: {error}") from error

    def _chat(self, messages: list[Message]) -> Rendered:
        """The conversation in the chat template, and where its answers stand."""
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

    def _plain(self, messages: list[Message]) -> Rendered:
        """All images, then the answers, each with an end-of-sequence token."""
        count = 0
        for message in messages:
            count += message["content"].count(self.image_token)
        text: str = self.image_token * count
        spans: list[Span] = []
        for message in messages:
            if message["role"] == "assistant":
                answer = message["content"].strip()
                spans.append(Span(len(text), len(text) + len(answer)))
                text += answer + self.tokenizer.eos_token
        return Rendered(text, spans)

    def _expand(self, messages: list[Message], image_tokens: list[int]) -> list[Message]:
        """The messages with as many image tokens in place of each marker as its image becomes."""
        markers = 0
        for message in messages:
            markers += message["content"].count(IMAGE_TOKEN)
        if markers != len(image_tokens):
            raise LayerfuseError(f"{markers} {IMAGE_TOKEN} markers, {len(image_tokens)} images")

        counts = iter(image_tokens)

        def image_run(marker: re.Match[str]) -> str:
            return self.image_token * next(counts)

        expanded: list[Message] = []
        for message in messages:
            # a function, as the image token itself may be `<image>`
            content = re.sub(IMAGE_TOKEN, image_run, message["content"])
            expanded.append({**message, "content": content})
        return expanded
