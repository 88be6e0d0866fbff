"""What nobody reads of a record is refused: it would be missing without a word."""

import html
import re
import unicodedata
from collections.abc import Collection, Mapping, Sized
from dataclasses import dataclass
from typing import Any, get_args

from layerfuse.data.media import describes, names_media, words_of
from layerfuse.errors import LayerfuseError, short
from layerfuse.model.chat_template import IMAGE_TOKEN
from layerfuse.recipe.data_source import ReadColumn

READ_KEYS: tuple[str, ...] = get_args(ReadColumn)
"""what is read of a record"""
TURN_KEYS = ("from", "role", "value", "content")
"""what is read of a turn"""

# Texts that would change what is asked.
_SYSTEM_KEYS = {
    *("systemprompt", "systemmessage", "systeminstruction", "systemtext", "sys", "sysprompt"),
    *("preprompt", "persona"),
}
_ASKING_KEYS = {
    *("prompt", "instruction", "instructions", "input", "context", "hint"),
    *("history", "query", "lecture", "passage", "premise", "hypothesis"),
    *("questionprefix", "questionsuffix", "prefix", "suffix", "postprompt"),
    *("tools", "functions", "toolcalls", "functioncall", "reasoningcontent"),
}
# Other spellings of what is read.
_MISSPELLED = {name: name for name in READ_KEYS if name != "id"} | {
    "family": "families",
    "conversation": "conversations",
    "message": "messages",
}
# A key of its own for each thing that may be chosen: `option_a`, `choice2`, `answerB`.
_OPTION_KEY = re.compile(
    r"(option|opt|choice|candidate|distractor|alternative|ending)[\W_]*([a-j]|\d+)|answer[\W_]*[a-j]",
    re.IGNORECASE,
)
# One key, without separators, for all of them: `answer_choices`, `option_texts`.
_OPTIONS = re.compile(
    r".*(options?|opts|choices?|candidates?|distractors|alternatives|endings)"
    r"(lists?|texts?|values?|json|str|string)?"
)
# `correct_option` names one of them, and `multiple_choice_answer` says it.
_CHOSEN_WORDS = {"correct", "right", "gold", "golden", "best", "chosen", "answer"}
# Columns that are called by a letter or a number alone, where the first two of a row are there.
_OPTION_ROWS = ("ABCDEFGHIJ", "abcdefghij", "0123456789", "123456789")

# Marks of what is learned, and the values under which everything is learned, as without them.
_LEARNING_KEYS = {
    **dict.fromkeys(("weight", "lossweight", "sampleweight", "turnweight"), ("1", "1.0")),
    **dict.fromkeys(("loss", "train", "trainable", "learn"), ("1", "1.0", "true")),
    **dict.fromkeys(("lossmask", "trainonturn", "trainonanswer"), ("1", "1.0", "true")),
    **dict.fromkeys(("mask", "masked", "ignore", "ignoreloss", "skip"), ("0", "0.0", "false")),
    **dict.fromkeys(("trainoninput", "trainoninputs", "trainonprompt"), ("0", "0.0", "false")),
}
# Of a whole record, these words may say anything: the weight of what is shown, a split.
_LEARNING_KEYS_OF_RECORDS = {
    *("lossweight", "sampleweight", "trainonanswer", "trainoninput", "trainoninputs"),
    *("trainonprompt",),
}

# `<img>`, `< image >`, `<image_1>`, `<image 1>`, `</image>`, `<ImageHere>`, `<image_pad>`; not HTML
# with attributes, such as `<img src=..>`.
_TAG = re.compile(r"<\s*[|/]?\s*(?P<name>[^\W\d]\w*)[\s:-]*\d*\s*/?\|?\s*>")
_MARKER_WORD = re.compile(
    r"(image|img|picture|pic|photo|video|vid|clip|audio|wav|sound|speech|vision|visual|media|frame"
    r"|pdf|bild|imagen|图片|图像|画像)(s|here|token|pad|patch|placeholder)*\d*"
)
# LLaVA's own marks; behind `<|` these are ends of turns, which people may write about.
_LLAVA_TAG = re.compile(r"<im_(patch|start|end)>")
_BRACKETS = re.compile(
    r"\[\s*(img|image|picture|photo|video|audio)[\s_:-]*(break|end|\d+)?\s*\]"
    r"|\{\s*\{?\s*(img|image|picture|photo|video|audio)\s*\}?\s*\}"
    r"|\$(img|image|picture|photo|video|audio)\$",
    re.IGNORECASE,
)
# Characters that nobody sees.
_UNSEEN = re.compile("[\u200b\u200c\u200d\u2060\ufeff]")


def refuse_unread(name: str, record: Mapping[str, Any], *, shows_pictures: bool) -> None:
    """Refuse a record that names media, or texts that change what is asked, under a key that
    nobody reads.

    Args:
        name: of the sample.
        record: of any keys.
        shows_pictures: whether pictures of the record are read.

    Raises:
        LayerfuseError: naming the key, what is read and how to map or ignore it.
    """
    unread = _unread(record, READ_KEYS, shows_pictures=shows_pictures)
    if not unread:
        return
    key, first = next(iter(unread.items()))
    # Options stand in several columns, which are one mistake.
    alike = [str(other) for other, reason in unread.items() if reason == first]
    raise LayerfuseError(
        f"sample {name}: nobody reads {key!r} ({short(record[key])}), {first.reason}. Read are "
        f"{', '.join(READ_KEYS)}; {first.advice.replace('KEY', str(key))}, or leave it out on "
        f"purpose with `ignore_columns: [{', '.join(alike)}]`"
    )


def refuse_unread_in_turn(name: str, turn: Mapping[str, Any]) -> None:
    """Refuse a turn of a conversation as `refuse_unread` does a record.

    Args:
        name: of the sample.
        turn: of any keys.

    Raises:
        LayerfuseError: naming the key and what is read.
    """
    unread = _unread(turn, TURN_KEYS, shows_pictures=False)
    if not unread:
        return
    key, first = next(iter(unread.items()))
    raise LayerfuseError(
        f"sample {name}: nobody reads {key!r} ({short(turn[key])}) of a turn, {first.reason}. Read "
        f"are {', '.join(TURN_KEYS)}: {first.advice_in_turn}"
    )


@dataclass(frozen=True)
class _Unread:
    """Why a key matters that nobody reads."""

    reason: str
    advice: str
    """for a record, with KEY for the key"""
    advice_in_turn: str


def _misnamed(reason: str, example: str) -> _Unread:
    """A key that could be one of those that are read.

    Args:
        reason: why it matters.
        example: what it could be.
    """
    return _Unread(
        reason,
        f"say which one it is, such as `columns: {{{example}: KEY}}`",
        "name pictures in the record's image or images, or in parts of the content",
    )


_MEDIA = _misnamed("which names media", "image")
_SYSTEM = _misnamed("which would change what is asked", "system")
_ASKING = _misnamed("which would change what is asked", "question")
_OPTION = _Unread(
    "an option that the model would not see",
    "write the options into the question",
    "write the options into the content",
)
_LEARNING = _Unread(
    "which would change what is learned",
    "every answer is learned alike",
    "every answer is learned alike; take out the key, or the turn",
)


def _unread(
    record: Mapping[str, Any], read: Collection[str], *, shows_pictures: bool
) -> dict[str, _Unread]:
    """The keys that nobody reads and that matter."""
    unread: dict[str, _Unread] = {}
    option_row = _option_row(record)
    for key, value in record.items():
        # Empty columns are what tables have for nothing.
        is_empty = value is None or (isinstance(value, Sized) and len(value) == 0)
        if key in read or is_empty:
            continue
        name = "".join(words_of(str(key)))
        misspelled = _MISSPELLED.get(name)
        if names_media(str(key), value, shows_pictures=shows_pictures):
            unread[key] = _MEDIA
        elif misspelled is not None and read is READ_KEYS:
            unread[key] = _misnamed(f"which is read as {misspelled!r} alone", misspelled)
        elif name in _SYSTEM_KEYS:
            unread[key] = _SYSTEM
        elif key in option_row or _holds_options(str(key), value):
            unread[key] = _OPTION
        elif name in _ASKING_KEYS:
            unread[key] = _ASKING
        elif _changes_learning(name, value, of_turn=read is TURN_KEYS):
            unread[key] = _LEARNING
    return unread


def _option_row(record: Mapping[str, Any]) -> set[str]:
    """The keys `A`, `B`, ... of a record that has at least the first two."""
    for letters in _OPTION_ROWS:
        present = [letter for letter in letters if record.get(letter) not in (None, "")]
        if letters[0] in present and letters[1] in present:
            return set(present)
    return set()


def _holds_options(key: str, value: Any) -> bool:
    """Whether a key holds what may be chosen as an answer."""
    if _OPTION_KEY.fullmatch(key):
        return True
    words = words_of(key)
    if describes(key) or _CHOSEN_WORDS.intersection(words[-1:] + words[:1]):
        # `answer_choices` begins with such a word, and holds them all the same.
        return words[:1] == ["answer"] and bool(_OPTIONS.fullmatch("".join(words[1:])))
    # Numbers count them.
    return isinstance(value, str | list | dict) and bool(_OPTIONS.fullmatch("".join(words)))


def _changes_learning(name: str, value: Any, *, of_turn: bool) -> bool:
    """Whether a mark says that something is learned less, more or not at all.

    Args:
        name: of the key, without separators.
        value: a number, a truth, or one of these as a text.
        of_turn: whether it is a key of a turn.
    """
    if not of_turn and name not in _LEARNING_KEYS_OF_RECORDS:
        return False
    harmless = _LEARNING_KEYS.get(name)
    return harmless is not None and str(value).lower() not in harmless


def refuse_markers(name: str, role: str, text: str) -> None:
    """Refuse a text in which something other than `<image>` marks media.

    Args:
        name: of the sample.
        role: whose text it is.
        text: of a turn.

    Raises:
        LayerfuseError: naming the marker and the one that is read.
    """
    for tag in _TAG.finditer(text):
        if tag[0] == IMAGE_TOKEN:
            continue
        words = tag["name"].lower().split("_")
        if any(_MARKER_WORD.fullmatch(word) for word in words):
            raise LayerfuseError(_marker_message(name, role, tag[0]))
    for pattern in (_LLAVA_TAG, _BRACKETS):
        marker = pattern.search(text)
        if marker is not None:
            raise LayerfuseError(_marker_message(name, role, marker[0]))
    # Wide brackets, HTML's escapes and unseen characters make a marker look like the one that is
    # read.
    seen = _UNSEEN.sub("", unicodedata.normalize("NFKC", html.unescape(text)))
    if seen.count(IMAGE_TOKEN) != text.count(IMAGE_TOKEN):
        raise LayerfuseError(_marker_message(name, role, f"{IMAGE_TOKEN} in other characters"))


def _marker_message(name: str, role: str, marker: str) -> str:
    hint = ""
    if role == "assistant":
        hint = " Where answers only write about markers, set `literal_answers: true`"
    return (
        f"sample {name}: a turn of the {role} holds {marker}, a marker that nobody reads; a "
        f"picture is marked by {IMAGE_TOKEN}, and other media are not read.{hint}"
    )
