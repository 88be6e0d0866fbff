"""What nobody reads of a record is refused: it would be missing without a word."""

import html
import re
import unicodedata
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from layerfuse.errors import LayerfuseError, short
from layerfuse.model.chat_template import IMAGE_TOKEN
from layerfuse.recipe.schema import ReadColumn

READ_KEYS: tuple[str, ...] = get_args(ReadColumn)
"""what is read of a record"""
TURN_KEYS = ("from", "role", "value", "content")
"""what is read of a turn"""

# A word of a key that names pictures, sounds or films: `imgs`, `fileName`, `video_path`.
_MEDIA_WORD = re.compile(
    r"(image|img|picture|pic|photo|screenshot|thumbnail|video|vid|audio|sound|speech|media|frame"
    r"|file|pixel|jpe?g|png|gif|pdf|mp[34]|wav|webp|tiff|heic|svg|movie|clip|film|voice|recording"
    r"|depth|mask|crop|attachment|base64|b64|bytes|bild|foto)(s|name|path|file|list|data|bytes|b64)*"
)
# Words that say that a key only describes media: `image_width`, `video_id`.
_DESCRIBING_WORDS = {
    *("id", "ids", "index", "num", "count", "size", "sizes", "width", "height", "w", "h"),
    *("aspect", "ratio", "resolution", "shape", "mode", "format", "quality", "orientation"),
    *("source", "origin", "license", "licence", "author", "date", "split", "dataset", "title"),
    *("category", "categories", "class", "classes", "type", "types", "label", "labels", "tags"),
    *("caption", "captions", "description", "descriptions", "hash", "md5", "sha", "digest"),
}
# Beside a picture that is read, an address says where it was found.
_ADDRESS_WORDS = {"url", "urls", "uri", "link", "links"}
# Texts that would change what is asked.
_SYSTEM_KEYS = {
    *("systemprompt", "systemmessage", "systeminstruction", "systemtext", "sys", "sysprompt"),
    *("preprompt", "persona"),
}
_ASKING_KEYS = {
    *("prompt", "instruction", "instructions", "input", "context", "hint"),
    *("choices", "options", "candidates", "multiplechoices", "answerchoices", "answeroptions"),
    *("optiona", "optionb", "choicea", "choiceb", "history", "query", "lecture", "passage"),
    *("questionprefix", "questionsuffix", "prefix", "suffix", "postprompt"),
    *("tools", "functions", "toolcalls", "functioncall", "reasoningcontent"),
}
# Other spellings of what is read.
_MISSPELLED = {name: name for name in READ_KEYS if name != "id"} | {
    "family": "families",
    "conversation": "conversations",
    "message": "messages",
}
_MEDIA_FILE = re.compile(
    r"[^\n]{1,500}\.(png|jpe?g|jfif|webp|gif|bmp|tiff?|ppm|pgm|heic|avif|svg|pdf"
    r"|jp2|j2k|jxl|psd|exr|heif|dcm|nii(\.gz)?|dng|raw|tga|ico"
    r"|mp4|m4v|avi|mov|mkv|webm|mpe?g|flv|wmv|3gp|mp3|wav|flac|ogg|opus|aac|m4a|npy)",
    re.IGNORECASE,
)
_MEDIA_DATA = re.compile(r"data:(image|video|audio)/", re.IGNORECASE)
# How PNG, JPEG, GIF and WebP begin in base64.
_MEDIA_BASE64 = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")

# `<img>`, `< image >`, `<image_1>`, `<image 1>`, `</image>`, `<ImageHere>`, `<image_pad>`; not HTML
# with attributes, such as `<img src=..>`.
_TAG = re.compile(r"<\s*[|/]?\s*(?P<name>[^\W\d]\w*)[\s:-]*\d*\s*/?\|?\s*>")
_MARKER_WORD = re.compile(
    r"(image|img|picture|pic|photo|video|vid|clip|audio|wav|sound|speech|vision|visual|media|frame"
    r"|pdf|bild|imagen|图片|图像|画像)(s|here|token)*\d*"
)
# LLaVA's own marks; behind `<|` these are ends of turns, which people may write about.
_LLAVA_TAG = re.compile(r"<im_(patch|start|end)>")
_BRACKETS = re.compile(
    r"\[\s*(img|image|picture|photo|video|audio)[\s_:-]*(break|end|\d+)?\s*\]"
    r"|\{\s*\{?\s*(img|image|picture|photo|video|audio)\s*\}?\s*\}",
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
    for key, unread in _unread(record, READ_KEYS, shows_pictures).items():
        raise LayerfuseError(
            f"sample {name}: nobody reads {key!r} ({short(record[key])}), {unread.reason}. Read "
            f"are {', '.join(READ_KEYS)}; say which one it is, such as "
            f"`columns: {{{unread.example}: {key}}}`, or leave it out on purpose with "
            f"`ignore_columns: [{key}]`"
        )


def refuse_unread_in_turn(name: str, turn: Mapping[str, Any]) -> None:
    """Refuse a turn of a conversation as `refuse_unread` does a record.

    Args:
        name: of the sample.
        turn: of any keys.

    Raises:
        LayerfuseError: naming the key and what is read.
    """
    for key, unread in _unread(turn, TURN_KEYS, shows_pictures=False).items():
        raise LayerfuseError(
            f"sample {name}: nobody reads {key!r} ({short(turn[key])}) of a turn, {unread.reason}. "
            f"Read are {', '.join(TURN_KEYS)}: name pictures in the record's image or images, or "
            "in parts of the content"
        )


@dataclass(frozen=True)
class _Unread:
    """Why a key matters that nobody reads."""

    reason: str
    example: str
    """what it could be"""


def _unread(
    record: Mapping[str, Any], read: Collection[str], shows_pictures: bool
) -> dict[str, _Unread]:
    """The keys that nobody reads and that matter."""
    unread: dict[str, _Unread] = {}
    for key, value in record.items():
        # Empty columns are what tables have for nothing.
        is_empty = value is None or (isinstance(value, str | list | dict) and len(value) == 0)
        if key in read or is_empty:
            continue
        name = "".join(_words(str(key)))
        misspelled = _MISSPELLED.get(name)
        if _names_media(str(key), value, shows_pictures):
            unread[key] = _Unread("which names media", "image")
        elif misspelled is not None and read is READ_KEYS:
            unread[key] = _Unread(f"which is read as {misspelled!r} alone", misspelled)
        elif name in _SYSTEM_KEYS:
            unread[key] = _Unread("which would change what is asked", "system")
        elif name in _ASKING_KEYS:
            unread[key] = _Unread("which would change what is asked", "question")
    return unread


def _names_media(key: str, value: Any, shows_pictures: bool) -> bool:
    """Whether a key or its value names pictures, sounds or films."""
    # Beside a picture that is read, an address says where it was found.
    if _holds_media(value, addresses=not shows_pictures):
        return True
    # Numbers and truths about media are no media.
    if not isinstance(value, str | bytes | list | dict):
        return False
    words = _words(key)
    describing = _DESCRIBING_WORDS
    if shows_pictures:
        describing = describing | _ADDRESS_WORDS
    if describing.intersection(words):
        return False
    return any(_MEDIA_WORD.fullmatch(word) for word in words)


def _holds_media(value: Any, addresses: bool) -> bool:
    """Whether a value is or holds a media file's name or content.

    Args:
        value: of JSON, of any depth.
        addresses: whether addresses of the web count, too.
    """
    # Not by calling itself: JSON may be deeper than Python's stack.
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, bytes):
            return True
        if isinstance(part, str) and _is_media(part, addresses):
            return True
        if isinstance(part, list):
            waiting.extend(part)
        if isinstance(part, dict):
            waiting.extend(part.values())
    return False


def _is_media(text: str, addresses: bool) -> bool:
    """Whether a text is a media file's name or its content."""
    if _MEDIA_DATA.match(text) or text.startswith(_MEDIA_BASE64):
        return True
    if text.startswith(("http://", "https://")) and not addresses:
        return False
    without_query = re.split("[?#]", text)[0]
    return bool(_MEDIA_FILE.fullmatch(without_query))


def _words(key: str) -> list[str]:
    """The words of a key in small letters: `videoPath` and `video_path` have two."""
    separated = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", key)
    return re.findall(r"[a-z]+", separated.lower())


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
