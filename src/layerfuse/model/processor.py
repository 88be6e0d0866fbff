"""Text and pictures in, model inputs out: chat template, image tokens, answer labels."""

import inspect
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin
from transformers.image_processing_backends import PilBackend

# From its module: as a name of transformers itself it wants torchvision in 5.16.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.processing_utils import MultiModalData
from transformers.utils.chat_template_utils import Chat
from transformers.utils.hub import CHAT_TEMPLATE_FILE

from layerfuse.errors import LayerfuseError
from layerfuse.model.chat_template import (
    ANSWER_TO_COME,
    IMAGE_TOKEN,
    TEMPLATE_FAULTS,
    ChatTemplate,
    Message,
    question_of,
    up_to_answer,
    with_fixed_date,
)
from layerfuse.model.config import image_tokens_of
from layerfuse.model.content_parts import TextConversation, from_parts, with_texts
from layerfuse.model.given_pictures import flat, read_images
from layerfuse.model.instruction import instruction_source
from layerfuse.model.tokens import TextTokenizer
from layerfuse.model.turn_ends import TurnEnds

IGNORED = -100
"""the label of a token that is not learned, as in PyTorch's cross-entropy"""
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
"""transformers' options of loading that say how to read from a hub"""


class NoLabelError(LayerfuseError):
    """No token of a sample is left to learn from."""


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
        *,
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

        self.image_tokens = image_tokens_of(
            self.fusion,
            layers=layers,
            patch_size=patch_size,
            token_grid=self.token_grid,
        )
        self.instruction = instruction_source(self.image_tokens.strategy)
        self.image_token_id: int = tokenizer.convert_tokens_to_ids(image_token)
        self.text_tokenizer = TextTokenizer(tokenizer, self.image_token_id)
        self._chat: ChatTemplate | None = None
        self._turn_ends: TurnEnds | None = None
        # the model's answer continues a row at its right end
        tokenizer.padding_side = "left"
        # Any: transformers does not annotate its constructor
        parent: Any = super()
        parent.__init__(image_processor, tokenizer, chat_template=with_fixed_date(template))

    @staticmethod
    def validate_init_kwargs(
        processor_config: dict[str, Any], valid_kwargs: Sequence[str]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What of a saved processor `__init__` does not take, and what it takes.

        Args:
            processor_config: what was saved.
            valid_kwargs: the names that transformers counts, which are not those of arguments that
                must be named: it would load a processor without any of its settings.
        """
        parameters = inspect.signature(Processor.__init__).parameters
        # Any: transformers does not annotate what it gives
        parent: Any = ProcessorMixin
        return parent.validate_init_kwargs(processor_config, [*valid_kwargs, *parameters])

    # Any: all that transformers takes and gives
    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **options: Any) -> Any:
        """As in transformers, with a chat template that can be used.

        Args:
            pretrained_model_name_or_path: the folder of a saved model, or a hub id.
            args: more of transformers' own arguments.
            options: more of transformers' own arguments.

        Raises:
            LayerfuseError: naming a chat template that is damaged.
        """
        file = Path(str(pretrained_model_name_or_path)) / CHAT_TEMPLATE_FILE
        if file.is_file():
            try:
                file.read_text("utf-8")
            except UnicodeDecodeError as error:
                raise _damaged_template(file, error) from error
        # Any: transformers does not annotate what it gives
        parent: Any = super()
        processor = parent.from_pretrained(pretrained_model_name_or_path, *args, **options)
        of_hub = {name: options[name] for name in HUB_OPTIONS if name in options}
        if not isinstance(processor.image_processor, PilBackend):
            # Where torchvision is installed, transformers takes its resizing: other pixels than
            # those of the training, which reads pictures by Pillow.
            image_processors: Any = AutoImageProcessor
            processor.image_processor = image_processors.from_pretrained(
                pretrained_model_name_or_path, backend="pil", **of_hub
            )
        processor.instruction.find_bundled(str(pretrained_model_name_or_path), of_hub)
        # transformers takes any text; half a template would be noticed at the first question
        try:
            processor.chat.expanded_prompt([{"role": "user", "content": "Is it whole?"}], 0)
        except LayerfuseError as error:
            raise _damaged_template(file, error) from error
        return processor

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

    # servers plan memory by it, before they have pictures
    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[Sequence[int]] | None = None, **_: Any
    ) -> MultiModalData:
        """Tokens of pictures of some sizes: all become as large, and so as many tokens.

        Args:
            image_sizes: (height, width) in pixels of each picture, before it is processed.
        """
        if image_sizes is None:
            return MultiModalData()
        blank = self.image_processor([Image.new("RGB", (64, 64))], return_tensors="pt")
        height, width = blank["pixel_values"].shape[-2:]
        tokens = self.num_image_tokens(height, width)
        return MultiModalData(
            num_image_tokens=[tokens] * len(image_sizes),
            num_image_patches=[1] * len(image_sizes),
        )

    @property
    def chat(self) -> ChatTemplate:
        """The chat template, as it stands now: transformers lets users replace it."""
        # Any: transformers' annotation allows templates by name, of which `__init__` took one
        template: Any = self.chat_template
        if self._chat is None or self._chat.template != template:
            # kept, as it collects the names of all special tokens
            self._chat = ChatTemplate(self.tokenizer, template, self.image_token)
        return self._chat

    @property
    def turn_ends(self) -> TurnEnds:
        """Where answers end, in training and in generation."""
        if self._turn_ends is None or self._turn_ends.chat.template != self.chat_template:
            # kept, as it takes conversations to learn how a template ends turns
            self._turn_ends = TurnEnds(self.chat, self.text_tokenizer)
        return self._turn_ends

    # Any: all that transformers takes and gives
    def __call__(self, images: Any = None, *args: Any, **options: Any) -> Any:
        """As in transformers, with pictures that are read as training reads them.

        Args:
            images: PIL images, paths, or what else transformers takes; lists of these.
            args: more of transformers' own arguments.
            options: more of transformers' own arguments.

        Raises:
            LayerfuseError: if a picture cannot be read.
        """
        # Any: transformers annotates neither what it takes nor what it gives
        parent: Any = super()
        return parent.__call__(read_images(images), *args, **options)

    # Any: people's own messages, and all that transformers takes and gives. Its many arguments are
    # given by name, which it does not ask for.
    def apply_chat_template(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        conversation: Any,
        chat_template: str | None = None,
        tools: Any = None,
        documents: Any = None,
        add_generation_prompt: bool = False,
        *,
        tokenize: bool = False,
        return_tensors: Any = "auto",
        return_dict: bool = False,
        sanitize_control_tokens: bool = True,
        processor_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """As in transformers, for contents that are texts or lists of parts.

        Args:
            conversation: one or several; images inside of parts are loaded.
            chat_template: a Jinja template instead of the processor's own.
            tools, documents, return_tensors, return_dict: as in transformers.
            add_generation_prompt: whether the text ends where an answer begins, as in training,
                whatever the template itself writes for a generation prompt.
            tokenize: whether to make model inputs; else a text, with an image token a picture.
            sanitize_control_tokens: not read: names of special tokens that people write are always
                text, as in training.
            processor_kwargs: for the processor's call. The tokenizer adds no tokens of its own
                unless these say so, as in training: chat templates write them.
            options: more of transformers' own arguments.

        Raises:
            LayerfuseError: naming a part or an image that cannot be read, if the images do not fit
                the markers, or if the chat template refuses a conversation.
        """
        del sanitize_control_tokens
        conversations, is_batch = _conversations(conversation)
        chats: list[list[dict[str, Any]]] = []
        # of each conversation
        images: list[list[Any]] = []
        for messages in conversations:
            chat = self._hidden_chat(messages)
            if add_generation_prompt:
                chat.messages.append({**ANSWER_TO_COME})
            chats.append(chat.messages)
            images.append(chat.images)

        # Any: as for `chat`
        template: Any = chat_template or self.chat_template
        if add_generation_prompt:
            template = up_to_answer(template)
        # Any: transformers annotates conversations of texts alone
        parent: Any = super()
        render = partial(parent.apply_chat_template, tools=tools, documents=documents, **options)
        hidden: list[str] = self._rendered(render, chats, template)
        rendered = [self.chat.revealed(text) for text in hidden]
        if not tokenize:
            texts = [text.text for text in rendered]
            return texts if is_batch else texts[0]

        call_options: dict[str, Any] = dict(processor_kwargs or {})
        if any(images):
            read = read_images(images)
            call_options.setdefault("images", read if is_batch else read[0])
        given = flat(call_options.get("images"))
        self._refuse_other_number(hidden, len(given))
        if any(text.literals for text in rendered):
            if return_tensors == "auto":
                return_tensors = call_options.pop("return_tensors", None)
            inputs = self._inputs_as_text(hidden, given, call_options, return_tensors)
            return inputs if return_dict else inputs["input_ids"]
        if "text_kwargs" not in call_options:
            call_options.setdefault("add_special_tokens", False)
        # Not by transformers' own rendering, whose versions hand on pictures in different ways.
        if return_tensors != "auto":
            call_options["return_tensors"] = return_tensors
        texts = [text.text for text in rendered]
        pictures = call_options.pop("images", None)
        made = self(pictures, text=texts if is_batch else texts[0], **call_options)
        return made if return_dict else made["input_ids"]

    # Any: people's own messages
    def _hidden_chat(self, messages: Any) -> TextConversation:
        """A conversation of texts, with stand-ins for the names of special tokens in them."""
        if isinstance(messages, Chat):
            # Any: what transformers wraps is typed as a mapping, but is a list of them
            wrapped: Any = messages
            messages = wrapped.messages
        chat = with_texts(messages)
        for message in chat.messages:
            # answers that call tools may have none
            if message.get("content") is not None:
                # both `<image>` and the tokenizer's own image token mark a picture
                text = message["content"].replace(IMAGE_TOKEN, self.image_token)
                message["content"] = self.chat.hide(text)
        return chat

    # Any: transformers' own method
    def _rendered(self, render: Any, chats: list[list[dict[str, Any]]], template: str) -> list[str]:
        """The texts that a chat template makes of conversations."""
        try:
            return render(chats, template, tokenize=False)
        except TEMPLATE_FAULTS as error:
            roles = [message["role"] for message in chats[0]]
            raise LayerfuseError(f"the chat template refuses the roles {roles}: {error}") from error

    def _refuse_other_number(self, hidden: list[str], images: int) -> None:
        """Raise LayerfuseError if there are not as many markers of pictures as images."""
        markers = sum(text.count(self.image_token) for text in hidden)
        if markers != images:
            raise LayerfuseError(
                f"{markers} markers of pictures in the messages, {images} images. Each part that "
                f"is an image is a marker, and so is each `{IMAGE_TOKEN}` in a text; where that is "
                "text, write it by `layerfuse.model.chat_template.literal`"
            )

    # Any: images of any kind, and transformers' options
    def _inputs_as_text(
        self, hidden: list[str], images: list[Any], options: dict[str, Any], return_tensors: Any
    ) -> BatchFeature:
        """Model inputs of rendered conversations in which people wrote names of special tokens.

        Raises:
            LayerfuseError: for options that are not read here.
        """
        unread = sorted({*options} - {"images", "padding", "max_length", "add_special_tokens"})
        if unread:
            raise LayerfuseError(
                f"`processor_kwargs` {unread} cannot be used where people write the names of "
                "special tokens; valid: images, padding, max_length"
            )
        inputs: dict[str, Any] = {}
        tokens_per_image = 0
        if images:
            pixels = self.image_processor(read_images(images), return_tensors=return_tensors)
            inputs.update(pixels)
            height, width = inputs["pixel_values"][0].shape[-2:]
            tokens_per_image = self.num_image_tokens(height, width)
        rows: list[list[int]] = []
        for text in hidden:
            rendered = self.chat.revealed(text, tokens_per_image)
            rows.append(self.text_tokenizer.tokens(rendered).ids)
        padded = self.tokenizer.pad(
            {"input_ids": rows},
            padding=options.get("padding", False),
            max_length=options.get("max_length"),
            return_tensors=return_tensors,
        )
        inputs.update(padded)
        return BatchFeature(inputs)

    def inputs(
        self, conversations: list[list[Message]], images: list[Any] | None = None
    ) -> BatchFeature:
        """Left-padded model inputs that end where the answers begin.

        Args:
            conversations: one per row, each ending with a user message; contents may be lists of
                parts, which mark the places of the images.
            images: PIL images, in reading order over all rows.

        Returns:
            `pixel_values` (images, 3, height, width) if there are images, and what `text_inputs`
            gives.

        Raises:
            LayerfuseError: if the chat template refuses a conversation, a part cannot be read or
                holds an image itself.
        """
        conversations = [_marked(messages) for messages in conversations]
        if not images:
            return BatchFeature(self.text_inputs(conversations, 0))
        inputs: dict[str, Any] = dict(
            self.image_processor(read_images(images), return_tensors="pt")
        )
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
        rows: list[list[int]] = []
        questions: list[str] = []
        for messages in conversations:
            prompt = self.chat.expanded_prompt(messages, tokens_per_image)
            rows.append(self.text_tokenizer.tokens(prompt).ids)
            questions.append(question_of(messages, self.image_token))
        tokens = self.tokenizer.pad({"input_ids": rows}, padding=True, return_tensors="pt")
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
        _refuse_other_markers(messages, len(image_tokens))
        if prompt == "plain":
            end = self.tokenizer.eos_token
            rendered = self.chat.images_and_answers(messages, end, image_tokens)
        else:
            rendered = self.chat.conversation(messages, image_tokens)
        spans = rendered.answers
        if answers == "last":
            spans = spans[-1:]
        # a chat template writes the special tokens itself
        tokens = self.text_tokenizer.tokens(rendered, add_special_tokens=prompt == "plain")

        ids = tokens.ids
        labels = [IGNORED] * len(ids)
        for span in self.turn_ends.token_spans(rendered.text, tokens, spans):
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


def _refuse_other_markers(messages: list[Message], images: int) -> None:
    """Raise LayerfuseError if there are not as many markers of pictures as images."""
    markers = 0
    for message in messages:
        markers += message["content"].count(IMAGE_TOKEN)
    if markers != images:
        raise LayerfuseError(f"{markers} {IMAGE_TOKEN} markers, {images} images")


def _damaged_template(file: Path, error: Exception) -> LayerfuseError:
    """The message for a saved chat template that cannot be used."""
    return LayerfuseError(
        f"cannot read {file}, or it is damaged: {error}. Copy the model's folder again"
    )


# Any: people's own messages
def _conversations(conversation: Any) -> tuple[list[Any], bool]:
    """One or several conversations as a list, and whether there were several.

    Raises:
        LayerfuseError: there are no messages.
    """
    if len(conversation) == 0:
        raise LayerfuseError("apply_chat_template got a conversation without messages")
    # pipelines of transformers wrap each of several conversations in an object
    if isinstance(conversation[0], list | tuple | Chat):
        return list(conversation), True
    return [conversation], False


def _marked(messages: list[Message]) -> list[Message]:
    """A conversation whose contents are texts, with a marker for each part that is an image."""
    marked: list[Message] = []
    for message in messages:
        content = from_parts(message["content"])
        if any(image is not None for image in content.images):
            raise LayerfuseError(
                "a part of a message holds an image, which `Processor.inputs` takes in `images`: "
                "give it there, opened by Pillow, or use `apply_chat_template` with tokenize=True"
            )
        marked.append({**message, "content": content.text})
    return marked
