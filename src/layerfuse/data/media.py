"""Which keys and values of a record name pictures, sounds or films, under whatever name."""

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# A word of a key that names pictures, sounds or films: `imgs`, `fileName`, `video_path`.
_MEDIA_WORD = re.compile(
    r"(image|img|picture|pic|photo|screenshot|thumbnail|video|vid|audio|sound|speech|media|frame"
    r"|file|pixel|jpe?g|png|gif|pdf|mp[34]|wav|webp|tiff|heic|svg|movie|clip|film|voice|recording"
    r"|depth|mask|crop|attachment|base64|b64|bytes"
    r"|bild|bilder|foto|imagen|imagem|immagine|obraz|zdjecie|resim|gambar|kuva|billede|anh"
    r"|изображение|картинка|фото|видео|аудио|صورة|تصویر)"
    r"(s|es|name|path|file|list|data|bytes|b64)*"
)
# Written without spaces between words: any part of a key counts.
_MEDIA_SIGNS = re.compile(
    "图片|图像|照片|截图|视频|音频|画像|写真|動画|音声|이미지|사진|비디오|चित्र"
)
# Words that say that a key only describes media: `image_width`, `video_id`.
_DESCRIBING_WORDS = {
    *("id", "ids", "idx", "index", "num", "count", "size", "sizes", "width", "height", "w", "h"),
    *("aspect", "ratio", "resolution", "shape", "mode", "format", "quality", "orientation"),
    *("source", "origin", "license", "licence", "author", "date", "split", "dataset", "title"),
    *("category", "categories", "class", "classes", "type", "types", "label", "labels", "tags"),
    *("language", "languages", "lang", "model", "encoder", "processor"),
    *("caption", "captions", "description", "descriptions", "hash", "md5", "sha", "digest"),
}
_DESCRIBING_SIGNS = re.compile("描述|说明|标题|宽|高|编号|数量|类|ID")
# Beside a picture that is read, an address says where it was found.
_ADDRESS_WORDS = {"url", "urls", "uri", "link", "links"}

_MEDIA_FILE = re.compile(
    r"[^\n]{1,500}\.(a?png|jpe?g|jpe|jfif|webp|gif|bmp|dib|tiff?|p[pgbn]m|pfm|pcx|heic|avif|svg|pdf"
    r"|eps|jp2|j2k|jpx|jxl|psd|exr|hdr|heif|dcm|nii(\.gz)?|dng|cr2|nef|arw|raw|tga|ico|fits"
    r"|mp4|m4v|avi|mov|mkv|webm|mpe?g|flv|wmv|3gp|ogv|m2ts"
    r"|mp3|wav|flac|og[ga]|opus|aac|m4a|aiff?|wma|amr|midi?"
    r"|np[yz]|pcd|ply|glb|gltf|stl)",
    re.IGNORECASE,
)
# What stands around names that a text holds: lists as text, `<a.png>`, `![](a.png)`.
_AROUND_NAMES = " \t\r\n\"'`[](){}<>,;"
_MEDIA_DATA = re.compile(r"data:((image|video|audio)/|[^,\s]{0,100};base64,)", re.IGNORECASE)
# How PNG, JPEG, GIF, WebP with WAV, PDF and Ogg begin in base64.
_MEDIA_BASE64 = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "JVBERi0", "T2dnUw")
# Longer than any digest: the content of a file of some format.
_LONG_BASE64 = re.compile(r"[A-Za-z0-9+/]{1000,}={0,2}")


def words_of(key: str) -> list[str]:
    """The words of a key in small letters without accents: `videoPath` and `video_path` have two.

    Args:
        key: of any language.
    """
    separated = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", key)
    if not key.isascii():
        separated = re.sub("[\u0300-\u036f]", "", unicodedata.normalize("NFD", separated))
    return re.findall(r"[^\W\d_]+", separated.lower())


def describes(key: str) -> bool:
    """Whether a key only describes something, such as `image_width` or `correct_option_label`.

    Args:
        key: of any language.
    """
    return bool(_DESCRIBING_WORDS.intersection(words_of(key)) or _DESCRIBING_SIGNS.search(key))


def names_media(key: str, value: Any, *, shows_pictures: bool) -> bool:
    """Whether a key or its value names pictures, sounds or films.

    Args:
        key: of a record or of a turn.
        value: what it holds, not empty.
        shows_pictures: whether pictures of the record are read; beside them an address of the web
            says where they were found.
    """
    if _holds_media(value, addresses=not shows_pictures):
        return True
    # Numbers and truths about media are no media.
    if not isinstance(value, str | list | dict):
        return False
    if shows_pictures and _ADDRESS_WORDS.intersection(words_of(key)):
        return False
    return _is_media_key(key)


def _is_media_key(key: str) -> bool:
    """Whether a key names media, and does not only describe them."""
    if describes(key):
        return False
    if _MEDIA_SIGNS.search(key):
        return True
    return any(_MEDIA_WORD.fullmatch(word) for word in words_of(key))


@dataclass(frozen=True)
class _Part:
    """A part of a value, and whether keys around it name media."""

    value: Any
    under_media: bool


def _holds_media(value: Any, *, addresses: bool) -> bool:
    """Whether a value is or holds a media file's name or content.

    Args:
        value: of JSON or of a table, of any depth.
        addresses: whether addresses of the web count, too.
    """
    # Not by calling itself: JSON may be deeper than Python's stack.
    waiting = [_Part(value, under_media=False)]
    while waiting:
        part = waiting.pop()
        if isinstance(part.value, bytes | bytearray | memoryview):
            return True
        if isinstance(part.value, str):
            names_something = part.under_media and not _is_address(part.value)
            if names_something or _is_media(part.value, addresses=addresses):
                return True
        elif isinstance(part.value, list | tuple):
            waiting.extend(_Part(item, part.under_media) for item in part.value)
        elif isinstance(part.value, Mapping):
            if _is_file_cell(part.value):
                return True
            waiting.extend(_parts_of_mapping(part))
    return False


def _parts_of_mapping(part: _Part) -> list[_Part]:
    """The values of a mapping: `{"image": {"path": "a"}}` names media, `{"image": {"width": 3}}`
    does not."""
    parts: list[_Part] = []
    for key, value in part.value.items():
        is_about_media = part.under_media or _is_media_key(str(key))
        # An empty text names nothing.
        if value != "":
            parts.append(_Part(value, is_about_media and not describes(str(key))))
    return parts


def _is_file_cell(cell: Mapping[Any, Any]) -> bool:
    """Whether a mapping is what tables have of a file: its bytes, its path or both."""
    if not cell or not cell.keys() <= {"bytes", "path"}:
        return False
    return any(value for value in cell.values())


def _is_address(text: str) -> bool:
    return text.startswith(("http://", "https://"))


def _is_media(text: str, *, addresses: bool) -> bool:
    """Whether a text is a media file's name or its content."""
    if _MEDIA_DATA.match(text) or text.startswith(_MEDIA_BASE64) or _LONG_BASE64.fullmatch(text):
        return True
    if _is_address(text) and not addresses:
        return False
    # Each line may name a file, but a page that mentions some is no list of them.
    for line in text.strip().split("\n"):
        without_query = re.split("[?#]", line.strip(_AROUND_NAMES))[0]
        if not _MEDIA_FILE.fullmatch(without_query):
            return False
    return True
