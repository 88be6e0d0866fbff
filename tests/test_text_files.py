"""Text files as the world writes them, read by every reader in one way."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from layerfuse.data.text_files import is_json, read_json, read_text
from layerfuse.errors import LayerfuseError
from tests.sample_files import last_texts, load_path, save_picture, turns

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# What some readers take for ends of lines, JSON and UTF-8 for ordinary characters
SEPARATORS = "one\u2028two\u2029three\x85four"


def record(answer: str) -> dict[str, Any]:
    """A record of text alone with this answer."""
    return {
        "id": answer,
        "conversations": turns("Say it", answer),
    }


def lines(*records: Any, end: str = "\n") -> bytes:
    """Records as JSON lines in UTF-8, without escapes."""
    text = ""
    for line_record in records:
        text += json.dumps(line_record, ensure_ascii=False) + end
    return text.encode()


def write(file: Path, content: bytes) -> Path:
    """Write a file and give its path."""
    file.write_bytes(content)
    return file


RECORDS = [record("é 😀"), record(SEPARATORS)]
ANSWERS = ["é 😀", SEPARATORS]
LIST = json.dumps(RECORDS, ensure_ascii=False).encode()

# The same two records, as different programs write them
LAYOUTS = {
    "list": LIST,
    "indented": json.dumps(RECORDS, indent=1).encode(),
    "crlf list": b"\r\n " + LIST.replace(b"}, {", b"},\r\n{"),
    "lines": lines(*RECORDS),
    "no end": lines(*RECORDS).rstrip(),
    "crlf": lines(*RECORDS, end="\r\n"),
    "empty lines": lines(*RECORDS, end="\n \t\r\n\n"),
    # Put behind each other by `cat`: the second file's mark is in the middle.
    "two files": lines(RECORDS[0]) + BYTE_ORDER_MARK + lines(RECORDS[1]),
}


@pytest.mark.parametrize("content", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("mark", [b"", BYTE_ORDER_MARK], ids=["plain", "bom"])
@pytest.mark.parametrize("name", ["d.json", "d.jsonl", "d.json.gz", "d.jsonl.gz", "D.JSON"])
def test_json_is_told_apart_by_its_content(
    tmp_path: Path, name: str, mark: bytes, content: bytes
) -> None:
    content = mark + content
    if name.endswith("gz"):
        content = gzip.compress(content)
    file = write(tmp_path / name, content)

    assert is_json(file)
    assert read_json(file) == RECORDS
    assert last_texts(load_path(file)) == ANSWERS


@pytest.mark.parametrize("name", ["d.json", "d.jsonl"])
def test_one_record_is_json_lines_too(tmp_path: Path, name: str) -> None:
    # A file of one line is a mapping for JSON, not a list.
    file = write(tmp_path / name, lines(record("A")))

    assert last_texts(load_path(file)) == ["A"]


def test_a_mapping_that_is_no_record_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "other.json", b'{"data": []}')

    with pytest.raises(LayerfuseError, match="must hold a list of conversations, not dict"):
        load_path(file)


def test_compressed_files_are_known_by_their_content(tmp_path: Path) -> None:
    file = write(tmp_path / "no-suffix.json", gzip.compress(LIST))

    assert last_texts(load_path(file)) == ANSWERS


def test_damaged_compressed_files_are_named(tmp_path: Path) -> None:
    content = gzip.compress(LIST)
    # Without the checksum at the end
    cut = content[:-9]
    overwritten = content[:20] + b"\0\0" + content[22:]
    for damaged in (cut, overwritten):
        file = write(tmp_path / "damaged.json.gz", damaged)
        with pytest.raises(LayerfuseError, match=r"cannot read .*damaged\.json\.gz"):
            load_path(file)


INVALID_FILES = [
    # Empty lines count too; the suffix does not decide.
    (
        "d.jsonl",
        lines(*RECORDS) + b'\n{"id": 4, oops}',
        "line 4, column 11: Expecting prop",
    ),
    (
        "d.json",
        lines(*RECORDS) + b'\r\n{"id": 4, oops}',
        "line 4, column 11: Expecting prop",
    ),
    # Separators end no line.
    (
        "d.jsonl",
        b'{"id": "' + SEPARATORS.encode(),
        "line 1, column 8: Unterminated",
    ),
    (
        "d.jsonl",
        b'{"a": 1},\n{"a": 2},',
        "line 1, column 9: Extra data",
    ),
    (
        "d.jsonl",
        b'{"a": \n{"b": 1}',
        "line 1, column 7: Expecting value",
    ),
    (
        "d.json",
        b'[{"a": 1},\n {"a" 2}]',
        "line 2, column 7: Expecting ':'",
    ),
    (
        "d.json",
        b"[\n1\n]\n\n [2]",
        "line 5, column 2: another list begins behind the first one",
    ),
    (
        "d.json",
        b'[{"a": 1}][{"a": 2}]',
        "line 1, column 11: another list begins behind the first one",
    ),
    (
        "d.jsonl",
        b'[{"a": 1}]\n[{"a": 2}]',
        "line 2, column 1: another list begins behind the first one",
    ),
    (
        "d.json",
        b"hello",
        "line 1, column 1: Expecting value",
    ),
]


@pytest.mark.parametrize(("name", "content", "message"), INVALID_FILES)
def test_errors_name_file_line_and_column(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    file = write(tmp_path / name, content)

    expected = re.escape(f"{file} is not valid JSON in {message}")
    with pytest.raises(LayerfuseError, match=expected):
        load_path(file)


# Deeper than Python's parser goes, and a number longer than Python reads
BEYOND_LIMITS = [
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"[1" + b"0" * 5000 + b"]",
]


@pytest.mark.parametrize("name", ["d.json", "d.jsonl"])
@pytest.mark.parametrize("value", BEYOND_LIMITS)
def test_json_beyond_limits_is_named(tmp_path: Path, name: str, value: bytes) -> None:
    file = write(tmp_path / name, value)

    with pytest.raises(LayerfuseError, match=rf"{name} is not valid JSON"):
        load_path(file)


OTHER_ENCODINGS = {
    "utf-16": "its byte order mark ff fe is that of UTF-16",
    # Begins like UTF-16's.
    "utf-32": "its byte order mark ff fe 00 00 is that of UTF-32",
    "utf-16-le": "the control byte 0x00 in line 1, column 2 is",
    "utf-16-be": "the control byte 0x00 in line 1, column 1 is",
    "utf-32-be": "the control byte 0x00 in line 1, column 1 is",
    "latin-1": "the byte 0xe9 in line 2, column 11 is not UTF-8",
    # All its bytes are ASCII: it is valid UTF-8 of another text.
    "iso2022_jp_2004": "the control byte 0x1b in line 2, column 11 is",
}


@pytest.mark.parametrize("encoding", OTHER_ENCODINGS)
@pytest.mark.parametrize("name", ["d.json", "d.jsonl", "metadata.jsonl"])
def test_another_encoding_is_named_and_never_guessed(
    tmp_path: Path, name: str, encoding: str
) -> None:
    """In JSON, in JSON lines and in tables, by one message."""
    save_picture(tmp_path / "a.png")
    text = '[\n{"text": "é"}]'
    file = write(tmp_path / name, text.encode(encoding))
    source = file
    if name == "metadata.jsonl":
        # A table is found in its folder.
        source = tmp_path

    expected = re.escape(f"cannot read {file}: {OTHER_ENCODINGS[encoding]}")
    with pytest.raises(LayerfuseError, match=expected) as caught:
        load_path(source)

    assert "valid: UTF-8, with or without a byte order mark" in str(caught.value)


@pytest.mark.parametrize("encoding", OTHER_ENCODINGS)
def test_captions_in_another_encoding_are_named(tmp_path: Path, encoding: str) -> None:
    save_picture(tmp_path / "a.png")
    text = '[\n{"text": "é"}]'
    caption_file = write(tmp_path / "a.txt", text.encode(encoding))
    samples = load_path(tmp_path)

    expected = re.escape(f"cannot read {caption_file}: {OTHER_ENCODINGS[encoding]}")
    with pytest.raises(LayerfuseError, match=expected):
        samples[0]


def test_the_byte_order_mark_of_a_caption_is_no_text(tmp_path: Path) -> None:
    save_picture(tmp_path / "a.png")
    caption = BYTE_ORDER_MARK + "ein Würfel\r\n".encode()
    caption_file = write(tmp_path / "a.txt", caption)

    assert read_text(caption_file) == "ein Würfel\n"
    assert last_texts(load_path(tmp_path)) == ["ein Würfel\n"]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.jsonl.gz"])
def test_the_byte_order_mark_of_a_table_is_no_key(tmp_path: Path, name: str) -> None:
    # It would become a part of the first key, and no row would have a file name.
    save_picture(tmp_path / "a.png")
    row = {"file_name": "a.png", "text": SEPARATORS}
    content = BYTE_ORDER_MARK + lines(row, end="\r\n")
    if name.endswith("gz"):
        content = gzip.compress(content)
    write(tmp_path / name, content)

    samples = load_path(tmp_path)

    assert last_texts(samples) == [SEPARATORS]
    assert samples[0].pictures[0].name == str(tmp_path / "a.png")
