"""A chat template for processors that do nothing of what layerfuse's own does.

Layerfuse's processor joins lists of parts to texts and ends a prompt where answers begin in
training, whatever the template. Elsewhere the template itself must do both.
"""

from layerfuse.model.chat_template import ANSWER_TO_COME, IMAGE_TOKEN, up_to_answer

# Texts are joined without a separator, and a picture is one image token, as in training.
_JOIN_PARTS = """\
{%- set joined = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set said = namespace(text='') -%}
{%- if message.content is string -%}
{%- set said.text = message.content -%}
{%- elif message.content -%}
{%- for part in message.content -%}
{%- if part.type in ('image', 'image_url', 'input_image') -%}
{%- set said.text = said.text + IMAGE -%}
{%- elif part.type in ('text', 'input_text', 'output_text') -%}
{%- set said.text = said.text + part.text -%}
{%- else -%}
{{- raise_exception('a part of a message is neither text nor image: ' + part.type) -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- set said.text = said.text | replace(MARK, IMAGE) -%}
{%- set joined.messages = joined.messages + [dict(message, content=said.text)] -%}
{%- endfor -%}
{%- set messages = joined.messages -%}
"""


def stock_template(template: str, image_token: str) -> str:
    """A chat template that writes by itself what training wrote.

    Args:
        template: layerfuse's, a Jinja template of messages whose contents are texts.
        image_token: the token of the tokenizer that stands for a picture.

    Returns:
        A template of messages whose contents are texts or lists of parts, which with
        `add_generation_prompt` ends exactly where an answer begins in training.
    """
    join_parts = _JOIN_PARTS.replace("IMAGE", repr(image_token)).replace("MARK", repr(IMAGE_TOKEN))
    to_come = f"{{%- set messages = messages + [{ANSWER_TO_COME!r}] -%}}"
    asked = "{%- set add_generation_prompt = false -%}" + to_come + up_to_answer(template)
    # `+` keeps the template's white space; Jinja drops one line's end at the end of a template
    whole = template.removesuffix("\n")
    asked_or_whole = (
        "{%- if add_generation_prompt -%}" + asked + "{%- else +%}" + whole + "{%+ endif %}"
    )
    return join_parts + asked_or_whole
