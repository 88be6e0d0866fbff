"""What lmms-eval asks, as questions of layerfuse; nothing here needs lmms-eval itself."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from PIL import Image

from layerfuse.data.sample import Sample
from layerfuse.errors import LayerfuseError, short
from layerfuse.evaluate.questions import Question, with_all_pictures
from layerfuse.model.chat_template import IMAGE_TOKEN, Message, literal
from layerfuse.model.content_parts import from_parts
from layerfuse.vision.picture import Picture, as_read

MODEL = "layerfuse"
"""The name by which lmms-eval knows the models: `lmms-eval --model layerfuse`."""
MAX_NEW_TOKENS = 1024
"""Longest answer where a task sets none, as lmms-eval's own LLaVA has it."""
ANSWER_OPTIONS = ("until", "max_new_tokens")
"""Generation options that are followed."""
GREEDY_OPTIONS = ("do_sample", "temperature", "top_k", "top_p", "seed")
"""Generation options about sampling, which change nothing where an answer is greedy."""
ONE_OPTIONS = ("num_beams", "repetition_penalty")
"""Generation options that change nothing where they are 1."""
PICTURE_OPTIONS = ("image_aspect_ratio",)
"""Options for LLaVA's own code: the model's processor says here how pictures are prepared."""


@dataclass(frozen=True)
class AnswerLimits:
    """Where an answer ends, beside the model's own end.

    Attributes:
        max_new_tokens: longest answer, in tokens.
        stop: texts that end it.
    """

    max_new_tokens: int
    stop: tuple[str, ...]


def answer_limits(options: Mapping[str, Any]) -> AnswerLimits:
    """Read the generation options of a task, of which greedy answers are given alone.

    Args:
        options: lmms-eval's `gen_kwargs`.

    Returns:
        What they say of an answer's end.

    Raises:
        LayerfuseError: they ask for something else than greedy answers, or are not known.
    """
    known = (*ANSWER_OPTIONS, *GREEDY_OPTIONS, *ONE_OPTIONS, *PICTURE_OPTIONS)
    unknown = [name for name in options if name not in known]
    if unknown:
        raise LayerfuseError(
            f"layerfuse does not know the generation options {', '.join(unknown)}; "
            f"valid: {', '.join(known)}"
        )
    if not _is_greedy(options):
        asked = {name: options[name] for name in GREEDY_OPTIONS if name in options}
        raise LayerfuseError(
            f"layerfuse answers greedily, and the task asks for samples by {asked}: "
            "give do_sample=False or temperature=0 (lmms-eval --gen_kwargs temperature=0)"
        )
    for name in ONE_OPTIONS:
        if options.get(name) not in (None, 1):
            raise LayerfuseError(
                f"layerfuse answers greedily, without {name}={options[name]!r}; valid: 1"
            )
    longest = options.get("max_new_tokens")
    if longest is None:
        longest = MAX_NEW_TOKENS
    if not isinstance(longest, int) or longest < 1:
        raise LayerfuseError(f"max_new_tokens is {longest!r}; valid: a whole number from 1")
    until = options.get("until")
    if until is None:
        until = []
    if isinstance(until, str):
        until = [until]
    # An empty text stands everywhere, and ends nothing.
    stop = [str(text) for text in until if text]
    return AnswerLimits(longest, tuple(stop))


def _is_greedy(options: Mapping[str, Any]) -> bool:
    """Whether the options ask for the likeliest token each time, in the words of lmms-eval's
    models: they sample where `do_sample` says so, and else where the temperature is above 0."""
    if options.get("temperature") == 0 or options.get("top_k") == 1:
        return True
    do_sample = options.get("do_sample")
    if do_sample is None:
        return options.get("temperature") is None
    return not do_sample


def asked_of_text(text: Any, visuals: Any, name: str) -> Question:
    """Make a question of a text and pictures.

    Args:
        text: the question's words. As many `<image>` in it as there are pictures, or fewer, say
            where the last of them stand; all others stand in front. Of more, each is text.
        visuals: the pictures, None for none.
        name: of the question.

    Returns:
        The question.

    Raises:
        LayerfuseError: there is something else than a text and pictures.
    """
    if not isinstance(text, str):
        raise LayerfuseError(f"{name}: the question is {short(text)}, no text")
    pictures = _pictures(visuals, name)
    # An `<image>` to which no picture can belong is a word, as in a question about HTML.
    if text.count(IMAGE_TOKEN) > len(pictures):
        text = literal(text)
    message: Message = {"role": "user", "content": with_all_pictures(text, len(pictures))}
    return _question(name, (message,), pictures)


def asked_in_messages(messages: Any, name: str) -> Question:
    """Make a question of whole messages.

    Args:
        messages: role and content each, as lmms-eval's tasks write them; in their words `<image>`
            is text, as their pictures are parts of their own.
        name: of the question.

    Returns:
        The question.

    Raises:
        LayerfuseError: they are no messages, hold more than texts and pictures, or do not end
            with a question.
    """
    if not isinstance(messages, list) or not messages:
        raise LayerfuseError(f"{name}: {short(messages)} is no list of messages")
    read: list[Message] = []
    visuals: list[Any] = []
    for message in cast("list[dict[str, Any]]", messages):
        role = message["role"]
        if role not in ("system", "user", "assistant"):
            raise LayerfuseError(f"{name}: {role!r} is no role; valid: system, user, assistant")
        try:
            content = from_parts(_literal_content(message["content"]))
        except LayerfuseError as error:
            raise LayerfuseError(f"{name}: {error}") from error
        words = content.text
        # Pictures before all words are shown as they are where a text is asked with pictures.
        if words.startswith(IMAGE_TOKEN * len(content.images)):
            without = words.removeprefix(IMAGE_TOKEN * len(content.images))
            words = with_all_pictures(without, len(content.images))
        read.append({"role": role, "content": words})
        visuals.extend(content.images)
    if read[-1]["role"] != "user":
        raise LayerfuseError(f"{name}: the last message is the {read[-1]['role']}'s, no question")
    return _question(name, tuple(read), _pictures(visuals, name))


def _literal_content(content: Any) -> Any:
    """The content of a message, in whose words `<image>` is text: its pictures are parts."""
    if isinstance(content, str):
        return literal(content)
    parts: list[Any] = []
    for part in content:
        if part.get("type") == "text":
            part = {**part, "text": literal(part["text"])}
        parts.append(part)
    return parts


def _question(name: str, messages: tuple[Message, ...], pictures: Sequence[Picture]) -> Question:
    """A question without a right answer, which lmms-eval keeps to itself."""
    sample = Sample(name, tuple(pictures), messages)
    return Question(name, sample, messages, answer="", family="all", category="all")


def _pictures(visuals: Any, name: str) -> list[Picture]:
    """The pictures of a question.

    Args:
        visuals: images, or names of pictures' files; None for none.
        name: of the question.

    Raises:
        LayerfuseError: there is something else, such as a sound.
    """
    if visuals is None:
        return []
    if not isinstance(visuals, list | tuple):
        raise LayerfuseError(f"{name}: {short(visuals)} is no list of pictures")
    pictures: list[Picture] = []
    for place, visual in enumerate(cast("Sequence[Any]", visuals), start=1):
        if isinstance(visual, str | Path):
            # Whether it is a picture or a video is seen when it is opened.
            pictures.append(Picture(str(visual)))
            continue
        if not isinstance(visual, Image.Image):
            raise LayerfuseError(f"{name}: {short(visual)} is no picture; layerfuse sees no others")
        file = io.BytesIO()
        try:
            # PNG keeps every pixel; it is decoded at once, so nothing is gained by making it small.
            as_read(visual).save(file, "PNG", compress_level=0)
        except LayerfuseError as error:
            raise LayerfuseError(f"{name}, picture {place}: {error}") from error
        pictures.append(Picture(f"{name}, picture {place}", file.getvalue))
    return pictures
