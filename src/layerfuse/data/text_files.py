"""Text files as the world writes them: UTF-8, JSON as a list or in lines, compressed or not."""

import codecs
import gzip
import json
import zlib
from pathlib import Path
from typing import Any

from layerfuse.errors import LayerfuseError

JSON_SUFFIXES = (".json", ".jsonl")

# The longer marks first: that of UTF-32 begins with that of UTF-16.
_OTHER_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)

_GZIP_MAGIC = b"\x1f\x8b"

# Bytes that no UTF-8 text of people holds (tabs and line ends are left out). They decode without an
# error, but to another text: UTF-16 without a mark has zeros, ISO-2022 has 0x1b.
_CONTROL_BYTES = bytes([*range(0x00, 0x09), *range(0x0E, 0x20)])

_BYTE_ORDER_MARK = "\ufeff"
_JSON_SPACE = " \t\r\n"


def is_json(file: Path) -> bool:
    """Whether a file is JSON or JSON lines by its name, compressed or not.

    Args:
        file: any; it need not exist.
    """
    return _plain_suffix(file) in JSON_SUFFIXES


def read_text(file: Path) -> str:
    r"""The text of a UTF-8 file, without its byte order mark and with `\n` for `\r\n`.

    Args:
        file: may be compressed by gzip, whatever its name.

    Raises:
        LayerfuseError: the file cannot be read, or is in another encoding, which is named with its
            line and column.
    """
    try:
        content = file.read_bytes()
        if content.startswith(_GZIP_MAGIC):
            content = gzip.decompress(content)
    # ValueError: a path that holds a zero, or half a surrogate pair.
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise LayerfuseError(f"cannot read {file}: {error}") from error
    for mark, encoding in _OTHER_MARKS:
        if content.startswith(mark):
            raise _not_utf8(file, f"its byte order mark {mark.hex(' ')} is that of {encoding}")
    content = content.removeprefix(codecs.BOM_UTF8)
    # Before it is decoded: zeros tell more of UTF-16 than the first byte that is not UTF-8.
    # Several times faster than to search a large file for each of them.
    if len(content.translate(None, _CONTROL_BYTES)) < len(content):
        positions = [content.find(control) for control in _CONTROL_BYTES]
        first = min(position for position in positions if position >= 0)
        byte = content[first]
        place = _place(content, first)
        raise _not_utf8(
            file,
            f"the control byte 0x{byte:02x} in {place} is that of another encoding or of no text",
        )
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = content[error.start]
        place = _place(content, error.start)
        raise _not_utf8(file, f"the byte 0x{byte:02x} in {place} is not UTF-8") from error
    return text.replace("\r\n", "\n")


def read_json(file: Path) -> Any:
    """What a file of JSON or of JSON lines holds, told apart by its content.

    Args:
        file: as for `read_text`.

    Returns:
        The list of the records for JSON lines, empty lines being none; else the file's one value.
        One value in a file called `.jsonl` is a list of it.

    Raises:
        LayerfuseError: naming the file, and the line and the column of what is wrong.
    """
    text = read_text(file)
    start = len(text) - len(text.lstrip(_JSON_SPACE))
    if start == len(text):
        return []
    # A list over several lines may be called `.jsonl` too; anything else there is a record.
    if _plain_suffix(file) == ".jsonl" and text[start] != "[":
        return _read_lines(file, text)
    try:
        value, end = json.JSONDecoder(object_pairs_hook=mapping_of).raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise _invalid(file, error.lineno, error.colno, error.msg) from error
    # RecursionError: lists in lists without an end; ValueError: a number of thousands of digits.
    except (RecursionError, ValueError) as error:
        raise LayerfuseError(f"{file} is not valid JSON: {error}") from error
    rest = text[end:].lstrip(" \t\r")
    if not rest.strip(_JSON_SPACE):
        return value
    # In JSON lines the first value is a line of its own, and no list.
    is_line = rest.startswith("\n") and "\n" not in text[start:end]
    if is_line and not isinstance(value, list):
        return _read_lines(file, text)
    extra = len(text) - len(text[end:].lstrip(_JSON_SPACE))
    reason = "Extra data"
    if isinstance(value, list) and text[extra] == "[":
        reason = (
            "another list begins behind the first one. Were two files put behind each other? Make "
            "one list of both"
        )
    error = json.JSONDecodeError(reason, text, extra)
    raise _invalid(file, error.lineno, error.colno, error.msg)


def mapping_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a mapping in JSON, as `object_pairs_hook` of its reader.

    Args:
        pairs: of keys and values, as they stand.

    Returns:
        The mapping.

    Raises:
        ValueError: a key stands twice, of which one would be lost.
    """
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one mapping")
    return mapping


def _plain_suffix(file: Path) -> str:
    """The suffix in small letters, without that of the compression."""
    name = file.name.lower().removesuffix(".gz")
    return Path(name).suffix


def _read_lines(file: Path, text: str) -> list[Any]:
    """The records of JSON lines.

    Args:
        file: names the file in errors.
        text: of the file.
    """
    records = []
    # Not `splitlines`, which also splits at U+2028 and U+0085: inside strings they are text.
    for number, line in enumerate(text.split("\n"), start=1):
        # Files with byte order marks, one behind the other, have marks at later lines too.
        line = line.removeprefix(_BYTE_ORDER_MARK)
        if not line.strip(_JSON_SPACE):
            continue
        try:
            records.append(json.loads(line, object_pairs_hook=mapping_of))
        except json.JSONDecodeError as error:
            raise _invalid(file, number, error.colno, error.msg) from error
        except (RecursionError, ValueError) as error:
            raise LayerfuseError(f"{file} is not valid JSON in line {number}: {error}") from error
    return records


def _invalid(file: Path, line: int, column: int, reason: str) -> LayerfuseError:
    """The error of a file that is not valid JSON; line and column count from 1."""
    return LayerfuseError(f"{file} is not valid JSON in line {line}, column {column}: {reason}")


def _not_utf8(file: Path, reason: str) -> LayerfuseError:
    """The error of a file in another encoding, which nobody can tell for sure from its bytes."""
    return LayerfuseError(
        f"cannot read {file}: {reason}; valid: UTF-8, with or without a byte order mark "
        "(convert it, for example with `iconv -f ENCODING -t UTF-8`)"
    )


def _place(content: bytes, position: int) -> str:
    """Line and column, in characters from 1, of a byte.

    Args:
        content: UTF-8 as far as can be told.
        position: of the byte.
    """
    line = content.count(b"\n", 0, position) + 1
    line_start = content.rfind(b"\n", 0, position) + 1
    column = len(content[line_start:position].decode("utf-8", "replace")) + 1
    return f"line {line}, column {column}"
