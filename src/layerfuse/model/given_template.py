"""The chat template of a given model, for messages whose contents are texts with `<image>`.

Templates of multimodal models read lists of parts. Which of two ways of making parts keeps what
people say is found by trying.
"""

from typing import Any

from layerfuse.errors import LayerfuseError
from layerfuse.model.chat_template import IMAGE_TOKEN, TEMPLATE_FAULTS, ChatTemplate

_AS_PARTS = """\
{%- set parted = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set said = namespace(parts=[]) -%}
{%- for text in message.content.split(MARK) -%}
{%- if not loop.first -%}
{%- set said.parts = said.parts + [{'type': 'image'}] -%}
{%- set text = text.removeprefix(LINE_END) -%}
{%- endif -%}
{%- if text -%}
{%- set said.parts = said.parts + [{'type': 'text', 'text': text}] -%}
{%- endif -%}
{%- endfor -%}
{%- set parted.messages = parted.messages + [dict(message, content=said.parts)] -%}
{%- endfor -%}
{%- set messages = parted.messages -%}
"""
_ASKED = [{"role": "user", "content": f"{IMAGE_TOKEN}\nWhat is it?"}]


# Any: processors of transformers share no type that says what they have
def given_template(processor: Any) -> str | None:
    """The chat template of a stock processor, for layerfuse's own.

    Args:
        processor: of the given model, of transformers.

    Returns:
        A Jinja template of messages that are texts; None where the given one changes what people
        say, or cannot render a picture and a question.
    """
    template: Any = processor.chat_template
    if not isinstance(template, str):
        return None
    bos = _adds_bos(processor)
    image_token: str = processor.image_token
    # As it stands; with its own line behind a picture; with that of the message.
    for line_end in (None, "\n", ""):
        candidate = template
        if line_end is not None:
            as_parts = _AS_PARTS.replace("LINE_END", repr(line_end))
            # the tokenizer's own token is in messages where layerfuse has expanded it
            candidate = as_parts.replace("MARK", repr(image_token)) + template
        if bos:
            candidate = "{{- bos_token -}}" + candidate
        if _keeps_words(processor, candidate, image_token):
            return candidate
    return None


def _adds_bos(processor: Any) -> bool:
    """Whether the stock processor begins prompts with a token that its template does not write."""
    tokenizer = processor.tokenizer
    if tokenizer.bos_token is None or tokenizer("a").input_ids[0] != tokenizer.bos_token_id:
        return False
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    try:
        text: str = processor.apply_chat_template(messages)
    except TEMPLATE_FAULTS:
        return False
    return not text.startswith(tokenizer.bos_token)


def _keeps_words(processor: Any, template: str, image_token: str) -> bool:
    """Whether a template writes a picture and a question as a message says them."""
    chat = ChatTemplate(processor.tokenizer, template, image_token)
    try:
        text = chat.expanded_prompt(_ASKED, 1).text
    except LayerfuseError:
        return False
    return text.count(image_token) == 1
