"""Contents of messages that are lists of parts, as transformers, TRL and OpenAI write them."""

from dataclasses import dataclass
from typing import Any

from layerfuse.errors import LayerfuseError, short
from layerfuse.model.chat_template import IMAGE_TOKEN

# The kinds of parts that people write, each in the words of transformers and TRL or of OpenAI.
_TEXT_KINDS = ("text", "input_text", "output_text")
_IMAGE_KINDS = ("image", "image_url", "input_image")
# Where a part holds its image, in the order in which transformers looks.
_IMAGE_KEYS = ("image", "url", "path", "base64", "image_url")
# What services write beside, which changes nothing of what is said.
_REMARKS = ("detail", "cache_control", "annotations", "index", "id")
_VALID_PARTS = (
    'valid parts: {"type": "text", "text": ...}; {"type": "image"}, with "image", "url", "path" or '
    '"base64" where it holds the image; {"type": "image_url", "image_url": {"url": ...}}; '
    '"input_text", "output_text" and "input_image" as OpenAI writes them'
)


@dataclass(frozen=True)
class Content:
    """What a message says, as text."""

    text: str
    """with `<image>` where a picture belongs"""
    images: tuple[Any, ...]
    """what each image part holds (a path, an address, a PIL image); None for a part that only
    marks the place of a picture"""


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
            _refuse_unread(fields, kind)
            if kind in _TEXT_KINDS and isinstance(fields.get("text"), str):
                text += fields["text"]
                continue
            if kind in _IMAGE_KINDS:
                images.append(_image_of(kind, fields))
                text += IMAGE_TOKEN
                continue
        raise LayerfuseError(f"cannot read the part {short(part)} of a message; {_VALID_PARTS}")
    return Content(text, tuple(images))


def _refuse_unread(fields: dict[str, Any], kind: Any) -> None:
    """Raise LayerfuseError for a part that holds more than is read of its kind."""
    held = [key for key, value in fields.items() if value not in (None, "", [], {})]
    if kind in _TEXT_KINDS:
        unread = [key for key in held if key not in ("type", "text", *_REMARKS)]
    elif kind in _IMAGE_KINDS:
        images = [key for key in held if key in _IMAGE_KEYS]
        unread = [key for key in held if key not in ("type", *_IMAGE_KEYS, *_REMARKS)]
        # of several only the first would be read
        unread += images[1:]
    else:
        return
    if unread:
        raise LayerfuseError(
            f"the part {short(fields)} of a message holds {', '.join(unread)}, which nobody reads "
            f"there; {_VALID_PARTS}"
        )


def _image_of(kind: str, fields: dict[str, Any]) -> Any:
    """What an image part holds: a path, an address, a PIL image, or None."""
    for key in _IMAGE_KEYS:
        image = fields.get(key)
        # OpenAI's `image_url` wraps the address: {"url": "a.png", "detail": "low"}
        if key == "image_url" and isinstance(image, dict):
            wrapped: dict[str, Any] = {**image}
            image = wrapped.get("url")
        if key == "base64" and isinstance(image, str) and not image.startswith("data:"):
            # As an address, so that nobody takes it for a path.
            return f"data:image/unknown;base64,{image}"
        if image is not None:
            return image
    # `image` alone marks a place, to which TRL and tables of datasets bring the image apart.
    # OpenAI's kinds always hold theirs, if only by the id of a file that they alone can read.
    if kind != "image":
        raise LayerfuseError(
            f"the part {short(fields)} of a message has no image that could be read; {_VALID_PARTS}"
        )
    return None


@dataclass(frozen=True)
class TextConversation:
    """A conversation whose contents are texts."""

    messages: list[dict[str, Any]]
    """with all their keys, such as transformers' `tool_calls`"""
    images: list[Any]
    """those that the parts of its contents hold, in order"""


# Any: people's own messages, of any shape
def with_texts(messages: Any) -> TextConversation:
    """A conversation for transformers, whose contents may be lists of parts.

    Args:
        messages: as people write them.

    Returns:
        The conversation; messages without a content stay as they are.

    Raises:
        LayerfuseError: naming a part that cannot be read.
    """
    chat = TextConversation([], [])
    for message in messages:
        with_text: dict[str, Any] = {**message}
        # answers that call tools may have none
        if with_text.get("content") is not None:
            content = from_parts(with_text["content"])
            for image in content.images:
                if image is not None:
                    chat.images.append(image)
            with_text["content"] = content.text
        chat.messages.append(with_text)
    return chat
