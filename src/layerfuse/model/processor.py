"""Text and pictures in, model inputs out: chat template, image tokens, answer labels."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
        chat_template: a Jinja template of `messages`; None takes the tokenizer's own.

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
        # the model's answer continues a row at its right end
        tokenizer.padding_side = "left"
        # Any: transformers does not annotate its constructor
        parent: Any = super()
        parent.__init__(image_processor, tokenizer, chat_template=template)

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
        """The tokens of each answer, with the special token that ends its turn, if any."""
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
            yield Span(inside[0], end)

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
