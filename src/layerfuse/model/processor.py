"""Text and pictures in, model inputs out: chat template, image tokens, answer labels."""

import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from transformers import BatchFeature, ProcessorMixin

from layerfuse.fusion import parse
from layerfuse.model.config import ImageTokens
from layerfuse.model.instruction import instruction_source

IMAGE_TOKEN = "<image>"
IGNORED = -100
Message = dict[str, str]
"""{"role": "user" | "assistant" | "system", "content": text, `<image>` where a picture belongs}"""

Spans = list[tuple[int, int]]
"""first and last + 1 characters of the answers in a text"""

# Answers are rendered as these private-use characters first, so that their place in the text is
# known exactly, whatever the chat template puts around them.
_OPEN, _CLOSE = "\ue000", "\ue001"


class NoLabelError(ValueError):
    """No token of a sample is left to learn from."""


def question_of(messages: Sequence[Message]) -> str:
    """The last user message without its image markers: what a guided strategy may read."""
    asked = [m["content"] for m in messages if m["role"] == "user"]
    return asked[-1].replace(IMAGE_TOKEN, "").strip() if asked else ""


class Processor(ProcessorMixin):
    """Image processor and tokenizer of one `FusionVLM`.

    `fusion` is the model's strategy in recipe form and `layers` its number of selected layers: they
    decide how many tokens an image becomes.
    Raises ValueError if the tokenizer has no chat template (and none is given) or lacks the image
    token.
    """

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
        chat_template = template["default"] if isinstance(template, dict) else template
        if not tokenizer.is_fast:
            raise ValueError("the LLM needs a fast tokenizer: slow ones give no offsets of tokens")
        if chat_template is None:
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path or 'the LLM'} has no chat template; "
                "pass `chat_template` (a Jinja template of `messages`), for example the text of "
                "recipes/templates/vicuna_v1.jinja"
            )
        if image_token not in tokenizer.get_vocab():
            raise ValueError(
                f"the tokenizer lacks the image token {image_token!r}; its special tokens are "
                f"{tokenizer.all_special_tokens}. Name one of them, or leave `image_token` unset: "
                "`FusionVLM.compose` and `layerfuse.model.pretrained.load_tokenizer` add "
                f"{IMAGE_TOKEN!r}"
            )
        self.patch_size = patch_size
        self.token_grid = list(token_grid) if token_grid else None
        self.fusion = fusion or {"name": "single"}
        self.layers = layers
        strategy = parse(self.fusion)
        self.image_tokens = ImageTokens(strategy, layers, patch_size, self.token_grid)
        self.instruction = instruction_source(strategy)
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        tokenizer.padding_side = "left"
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def num_image_tokens(self, height: int, width: int) -> int:
        """Tokens that one preprocessed image of that many pixels becomes."""
        return self.image_tokens.of_pixels(height, width)

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **_: Any) -> str:
        height, width = image_inputs["pixel_values"][image_idx].shape[-2:]
        return self.image_token * self.num_image_tokens(height, width)

    def prompt(self, messages: list[Message]) -> str:
        """The text after which the model writes its answer to the last user message.

        It is exactly what stands before an answer in training; spaces that the template writes
        there belong to the answer, as tokenizers merge them with its first word.
        """
        text = self._render([*messages, {"role": "assistant", "content": _OPEN}])
        return text[: text.index(_OPEN)].rstrip(" ")

    def inputs(
        self, conversations: list[list[Message]], images: list[Any] | None = None
    ) -> BatchFeature:
        """Left-padded model inputs that end where the answers begin; `images` in reading order.

        With a strategy that reads sentences, `instruction` holds the embedding of each
        conversation's last question.
        """
        pixels: dict[str, Any] = {}
        tokens_per_image = 0
        if images:
            pixels = dict(self.image_processor(images, return_tensors="pt"))
            tokens_per_image = self.num_image_tokens(*pixels["pixel_values"].shape[-2:])
        return BatchFeature({**pixels, **self.text_inputs(conversations, tokens_per_image)})

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
        """
        texts = []
        questions = []
        for messages in conversations:
            # Both `<image>` and the tokenizer's own image token mark a picture.
            prompt = self.prompt(list(messages)).replace(IMAGE_TOKEN, self.image_token)
            texts.append(prompt.replace(self.image_token, self.image_token * tokens_per_image))
            questions.append(question_of(messages).replace(self.image_token, "").strip())
        tokens = self.tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
        inputs = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
        instruction = self.instruction.embed(questions)
        if instruction is not None:
            inputs["instruction"] = instruction
        return inputs

    def encode(
        self,
        messages: list[Message],
        image_tokens: list[int],
        prompt: Literal["chat", "plain"] = "chat",
        max_length: int | None = None,
        answers: Literal["all", "last"] = "all",
    ) -> dict[str, torch.Tensor]:
        """`input_ids` and `labels` (T,) of a training conversation; only answers are labelled, all
        of them or the last.

        `image_tokens` is the token count of each image in order. `prompt: plain` writes the images
        and the answers alone (LLaVA's alignment format). Raises ValueError when the number of
        images does not fit the text or when `max_length` would cut image tokens away, and
        NoLabelError when no token is labelled.
        """
        messages = self._expand(messages, image_tokens)
        text, spans = self._plain(messages) if prompt == "plain" else self._chat(messages)
        spans = spans[-1:] if answers == "last" else spans
        encoded = self.tokenizer(
            text, add_special_tokens=prompt == "plain", return_offsets_mapping=True
        )
        ids, labels = encoded["input_ids"], [IGNORED] * len(encoded["input_ids"])
        for first, last in self._labelled(text, encoded, spans):
            own = ids[first:last]
            labels[first:last] = [IGNORED if k == self.image_token_id else k for k in own]
        kept = torch.tensor(ids)[:max_length], torch.tensor(labels)[:max_length]
        if int((kept[0] == self.image_token_id).sum()) != sum(image_tokens):
            raise ValueError(f"{len(ids)} tokens: max_length {max_length} would cut image tokens")
        if bool((kept[1] == IGNORED).all()):
            raise NoLabelError(f"no token is labelled ({len(ids)} tokens, max_length {max_length})")
        return {"input_ids": kept[0], "labels": kept[1]}

    def _labelled(self, text: str, encoded: Any, spans: Spans) -> Iterator[tuple[int, int]]:
        """Token ranges of the answers, each with the special token that ends its turn, if any."""
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        added = self.tokenizer.added_tokens_decoder
        special = {k for k, token in added.items() if token.special} - {self.image_token_id}
        for start, end in spans:
            inside = [i for i, (a, b) in enumerate(offsets) if a < b and a < end and b > start]
            if not inside:
                continue
            after = inside[-1] + 1
            while after < len(ids) and not text[slice(*offsets[after])].strip():
                after += 1
            closed = after < len(ids) and ids[after] in special
            yield inside[0], after + 1 if closed else inside[-1] + 1

    def _render(self, messages: list[Message]) -> str:
        how: Any = {"chat_template": self.chat_template, "tokenize": False}
        try:
            return self.tokenizer.apply_chat_template(messages, **how)
        except TemplateError as error:
            roles = [m["role"] for m in messages]
            raise ValueError(f"the chat template refuses the roles {roles}: {error}") from error

    def _chat(self, messages: list[Message]) -> tuple[str, Spans]:
        answers = [m["content"].strip() for m in messages if m["role"] == "assistant"]
        marks = iter(f"{_OPEN}{i}{_CLOSE}" for i in range(len(answers)))
        shown = [{**m, "content": next(marks)} if m["role"] == "assistant" else m for m in messages]
        rest, text, spans = self._render(shown), "", []
        for i, answer in enumerate(answers):
            before, mark, rest = rest.partition(f"{_OPEN}{i}{_CLOSE}")
            if not mark:
                raise ValueError("the chat template does not write every answer, in order")
            text += before
            spans.append((len(text.rstrip(" ")), len(text) + len(answer)))
            text += answer
        return text + rest, spans

    def _plain(self, messages: list[Message]) -> tuple[str, Spans]:
        count = sum(m["content"].count(self.image_token) for m in messages)
        text, spans = self.image_token * count, []
        for answer in (m["content"].strip() for m in messages if m["role"] == "assistant"):
            spans.append((len(text), len(text) + len(answer)))
            text += answer + self.tokenizer.eos_token
        return text, spans

    def _expand(self, messages: list[Message], image_tokens: list[int]) -> list[Message]:
        """The messages with as many image tokens in place of each marker as its image becomes."""
        markers = sum(m["content"].count(IMAGE_TOKEN) for m in messages)
        if markers != len(image_tokens):
            raise ValueError(f"{markers} {IMAGE_TOKEN} markers, {len(image_tokens)} images")
        runs = (self.image_token * count for count in image_tokens)
        return [
            {**m, "content": re.sub(IMAGE_TOKEN, lambda _: next(runs), m["content"])}
            for m in messages
        ]
