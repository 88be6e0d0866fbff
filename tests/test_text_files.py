"""Text files as the world writes them, read by every reader in one way."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from layerfuse.data.sources import load
from layerfuse.data.text_files import is_json, read_json, read_text
from layerfuse.errors import LayerfuseError
from layerfuse.recipe.schema import Data

BOM = b"\xef\xbb\xbf"
SEPARATORS = "one\u2028two\u2029three\x85four"


def record(answer: str) -> dict[str, Any]:
    return {
        "id": answer,
        "conversations": [{"from": "human", "value": "Say it"}, {"from": "gpt", "value": answer}],
    }


def lines(*records: Any, end: str = "\n") -> bytes:
    return "".join(json.dumps(r, ensure_ascii=False) + end for r in records).encode()


def answers(file: Path) -> list[str]:
    return [sample.messages[-1]["content"] for sample in load(Data(path=str(file)))]


def write(file: Path, content: bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


RECORDS = [record("é 😀"), record(SEPARATORS)]
LIST = json.dumps(RECORDS, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    "content",
    [
        LIST,
        json.dumps(RECORDS, indent=1).encode(),
        b"\r\n " + LIST.replace(b"}, {", b"},\r\n{"),
        lines(*RECORDS),
        lines(*RECORDS).rstrip(),
        lines(*RECORDS, end="\r\n"),
        lines(*RECORDS, end="\n \t\r\n\n"),
        lines(RECORDS[0]) + BOM + lines(RECORDS[1]),
    ],
    ids=["list", "indented", "crlf list", "lines", "no end", "crlf", "empty lines", "two files"],
)
@pytest.mark.parametrize("mark", [b"", BOM], ids=["plain", "bom"])
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
    assert answers(file) == ["é 😀", SEPARATORS]


def test_one_record_is_json_lines_too(tmp_path: Path) -> None:
    for name in ("d.json", "d.jsonl"):
        assert answers(write(tmp_path / name, lines(record("A")))) == ["A"]
    with pytest.raises(LayerfuseError, match="must hold a list of conversations, not dict"):
        load(Data(path=str(write(tmp_path / "other.json", b'{"data": []}'))))


def test_compressed_by_content_and_damaged(tmp_path: Path) -> None:
    content = gzip.compress(LIST)
    assert answers(write(tmp_path / "no-suffix.json", content)) == ["é 😀", SEPARATORS]
    for damaged in (content[:-9], content[:20] + b"\0\0" + content[22:]):
        file = write(tmp_path / "damaged.json.gz", damaged)
        with pytest.raises(LayerfuseError, match=r"cannot read .*damaged\.json\.gz"):
            load(Data(path=str(file)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", lines(*RECORDS) + b'\n{"id": 4, oops}', "line 4, column 11: Expecting prop"),
        ("d.json", lines(*RECORDS) + b'\r\n{"id": 4, oops}', "line 4, column 11: Expecting prop"),
        ("d.jsonl", b'{"id": "' + SEPARATORS.encode(), "line 1, column 8: Unterminated"),
        ("d.jsonl", b'{"a": 1},\n{"a": 2},', "line 1, column 9: Extra data"),
        ("d.jsonl", b'{"a": \n{"b": 1}', "line 1, column 7: Expecting value"),
        ("d.json", b'[{"a": 1},\n {"a" 2}]', "line 2, column 7: Expecting ':'"),
        ("d.json", b"[\n1\n]\n\n [2]", "line 5, column 2: Extra data"),
        ("d.json", b"hello", "line 1, column 1: Expecting value"),
    ],
)
def test_errors_name_file_line_and_column(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    file = write(tmp_path / name, content)
    with pytest.raises(LayerfuseError, match=re.escape(f"{file} is not valid JSON in {message}")):
        load(Data(path=str(file)))


@pytest.mark.parametrize("value", [b"[" * 100_000, b'{"a":' * 100_000, b"[1" + b"0" * 5000 + b"]"])
def test_json_beyond_limits_is_named(tmp_path: Path, value: bytes) -> None:
    for name in ("d.json", "d.jsonl"):
        with pytest.raises(LayerfuseError, match=rf"{name} is not valid JSON"):
            load(Data(path=str(write(tmp_path / name, value))))


OTHER_ENCODINGS = {
    "utf-16": "its byte order mark ff fe is that of UTF-16",
    "utf-32": "its byte order mark ff fe 00 00 is that of UTF-32",
    "utf-16-le": "the control byte 0x00 in line 1, column 2 is",
    "utf-16-be": "the control byte 0x00 in line 1, column 1 is",
    "utf-32-be": "the control byte 0x00 in line 1, column 1 is",
    "latin-1": "the byte 0xe9 in line 2, column 11 is not UTF-8",
    "iso2022_jp_2004": "the control byte 0x1b in line 2, column 11 is",
}


@pytest.mark.parametrize("encoding", OTHER_ENCODINGS)
def test_another_encoding_is_named_and_never_guessed(tmp_path: Path, encoding: str) -> None:
    """In JSON, in JSON lines, in tables and in captions, by one message."""
    text = '[\n{"text": "é"}]'
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    for name in ("d.json", "d.jsonl", "metadata.jsonl"):
        file = write(tmp_path / name, text.encode(encoding))
        expected = f"cannot read {file}: {OTHER_ENCODINGS[encoding]}"
        source = file if name != "metadata.jsonl" else tmp_path
        with pytest.raises(LayerfuseError, match=re.escape(expected)) as caught:
            load(Data(path=str(source)))
        assert "valid: UTF-8, with or without a byte order mark" in str(caught.value)
    (tmp_path / "metadata.jsonl").unlink()
    caption = write(tmp_path / "a.txt", text.encode(encoding))
    expected = f"cannot read {caption}: {OTHER_ENCODINGS[encoding]}"
    with pytest.raises(LayerfuseError, match=re.escape(expected)):
        load(Data(path=str(tmp_path)))[0]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    """In a caption and in a table, whose first key it would change."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    write(tmp_path / "a.txt", BOM + "ein Würfel\r\n".encode())
    assert read_text(tmp_path / "a.txt") == "ein Würfel\n"
    assert answers(tmp_path) == ["ein Würfel\n"]
    rows = BOM + lines({"file_name": "a.png", "text": SEPARATORS}, end="\r\n")
    (sample,) = load(Data(path=str(write(tmp_path / "metadata.jsonl", rows).parent)))
    assert sample.messages[-1]["content"] == SEPARATORS
    assert sample.pictures[0].name == str(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").unlink()
    write(tmp_path / "metadata.jsonl.gz", gzip.compress(rows))
    assert answers(tmp_path) == [SEPARATORS]
