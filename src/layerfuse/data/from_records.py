"""From records, in LLaVA's format, in that of chat templates or in columns, to samples."""

import base64
import binascii
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from layerfuse.data.sample import Sample
from layerfuse.data.turns import (
    Turn,
    is_empty,
    keys_of,
    messages_of,
    read_turns,
    refuse_halves,
)
from layerfuse.data.unread import refuse_unread
from layerfuse.errors import LayerfuseError, short
from layerfuse.model.chat_template import IMAGE_TOKEN, Message
from layerfuse.vision.picture import Picture

COLUMNS = ("question", "answer", "text")
"""what stands for a conversation in a table"""


@dataclass(frozen=True)
class Reading:
    """How the records of one source are read."""

    base: Path
    """folder to which image paths are relative"""
    columns: Mapping[str, str] = field(default_factory=dict)
    """what a column is called in the source, by what is read"""
    ignored: tuple[str, ...] = ()
    """columns that are left out on purpose"""
    literal_answers: bool = False
    """whether `<image>` in an answer is text, not a picture"""

    def chosen(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """A record under the names that are read, without what is left out.

        Args:
            record: as its source has it.

        Raises:
            LayerfuseError: two columns would have one name.
        """
        remaining = {key: value for key, value in record.items() if key not in self.ignored}
        for name, column in self.columns.items():
            # Records may lack columns that others have; `sources` refuses those that none has.
            if column not in remaining:
                continue
            if name in remaining and name != column:
                raise LayerfuseError(
                    f"`columns` reads {column!r} as {name!r}, but there is a column {name!r} too: "
                    f"leave it out with `ignore_columns: [{name}]`"
                )
            remaining[name] = remaining.pop(column)
        return remaining

    def without_names(self) -> "Reading":
        """How a record is read that has the names that are read already."""
        return Reading(self.base, literal_answers=self.literal_answers)


def from_llava(index: int, record: Any, reading: Reading) -> Sample:
    """Read a record with `conversations` or `messages`, `image` or `images`, optional `id`; one
    with neither of the first two may have columns, as for `from_columns`.

    Args:
        index: the record's place in its source, which names it where it has no `id`.
        record: from JSON.
        reading: how records of its source are read.

    Raises:
        LayerfuseError: naming the sample and what is wrong with it.
    """
    record = _chosen(index, record, reading)
    name = sample_id(index, record)
    has_turns = bool(record.get("conversations") or record.get("messages"))
    columns = [column for column in COLUMNS if not is_empty(record.get(column))]
    if columns and not has_turns:
        return from_columns(index, record, reading.without_names())
    if columns:
        raise LayerfuseError(
            f"sample {name}: has a conversation and {' and '.join(columns)} too; leave one of them "
            "out with `ignore_columns`"
        )
    _refuse_bad_id(name, record.get("id"))
    turns = read_turns(name, record, reading.literal_answers)
    image_cells = _image_cells(name, record, turns)
    refuse_unread(name, record, shows_pictures=bool(image_cells))
    pictures = [picture_of(name, cell, reading.base) for cell in image_cells]
    all_messages = [turn.message for turn in turns]
    # Before the messages, which leave out the empty answers that kinds are counted with.
    families = _kinds(name, "families", record.get("families"), all_messages)
    categories = _kinds(name, "categories", record.get("categories"), all_messages)
    shown = messages_of(name, all_messages, len(pictures))
    novel = record.get("novel")
    # A text such as "false" would be true.
    if novel not in (None, False, True):
        raise LayerfuseError(f"sample {name}: novel is {short(novel)}; valid: true, false")
    return Sample(
        id=name,
        pictures=tuple(pictures[place] for place in shown.pictures),
        messages=shown.messages,
        families=families,
        categories=categories,
        novel=bool(novel),
    )


def from_columns(index: int, row: Any, reading: Reading) -> Sample:
    """Read a row with `conversations` or `messages`, `question` and `answer`, or `text`.

    Args:
        index: as for `from_llava`.
        row: of a table.
        reading: as for `from_llava`.

    Raises:
        LayerfuseError: naming the sample and what is wrong with it.
    """
    row = _chosen(index, row, reading)
    name = sample_id(index, row)
    if row.get("conversations") or row.get("messages"):
        return from_llava(index, row, reading.without_names())
    answers = []
    for column in ("answer", "text"):
        # Tables have no value where another row has one.
        if row.get(column) is not None:
            answers.append(column)
    if len(answers) == 0:
        raise LayerfuseError(
            f"sample {name}: needs a column conversations, messages, answer or text; it has "
            f"{keys_of(row)}"
        )
    if len(answers) > 1:
        raise LayerfuseError(
            f"sample {name}: has both answer and text; leave one of them out with `ignore_columns`"
        )
    question = row.get("question")
    answer = row[answers[0]]
    # A caption is the answer to no words at all.
    if question is None:
        question = ""
        if isinstance(answer, str) and not reading.literal_answers:
            answer = _caption(name, answer)
    for column, value in (("question", question), (answers[0], answer)):
        if not isinstance(value, str):
            raise LayerfuseError(
                f"sample {name}: its {column} is {short(value)}, a {type(value).__name__}, not a "
                "text"
            )
    record = {key: value for key, value in row.items() if key not in COLUMNS}
    record["messages"] = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    return from_llava(index, record, reading.without_names())


def _caption(name: str, text: str) -> str:
    """A caption without the marker of its picture, which stands before it anyway.

    Raises:
        LayerfuseError: the marker stands behind words, which would be learned without the picture.
    """
    if IMAGE_TOKEN not in text:
        return text
    caption = text.strip().removeprefix(IMAGE_TOKEN).lstrip()
    if IMAGE_TOKEN in caption:
        raise LayerfuseError(
            f"sample {name}: its caption holds {IMAGE_TOKEN} behind other words, but a picture "
            "stands before its caption; take it out, or let it be text by `literal_answers: true`"
        )
    return caption


def sample_id(index: int, record: Any) -> str:
    """What names a sample in messages and results.

    Args:
        index: the record's place in its source.
        record: of the source, of any shape.

    Returns:
        The record's `id`, or its place where it has none that is a text or a number. Half a
        surrogate pair, which no file could hold, is written with a backslash.
    """
    identity = index
    # An empty text is what tables have for nothing.
    if isinstance(record, dict) and _is_name(record.get("id")) and record["id"] != "":
        identity = record["id"]
    return str(identity).encode("utf-8", "backslashreplace").decode("utf-8")


def _is_name(value: Any) -> bool:
    """Whether a value can name something: a text or a number."""
    if isinstance(value, float):
        # Tables write whole numbers so, and NaN for nothing.
        return math.isfinite(value)
    return isinstance(value, str | int) and not isinstance(value, bool)


def _refuse_bad_id(name: str, identity: Any) -> None:
    """Raise LayerfuseError for an id that names nothing, or that no file could hold."""
    if identity is None:
        return
    if not _is_name(identity):
        raise LayerfuseError(
            f"sample {name}: its id is {short(identity)}; valid: a text or a number, or no id"
        )
    refuse_halves(name, "id", str(identity))


def identify(reading: Reading, index: int, record: Any) -> str:
    """What names a record, also one that cannot be converted.

    Args:
        reading: how records of its source are read.
        index: the record's place in its source.
        record: of the source, of any shape.
    """
    try:
        return sample_id(index, _chosen(index, record, reading))
    except LayerfuseError:
        return sample_id(index, record)


def cells(column: Any) -> list[Any]:
    """The images of a column that holds one, several or none.

    Args:
        column: from JSON or a dataset's row.
    """
    if isinstance(column, list | tuple):
        return list(column)
    if column is None:
        return []
    return [column]


def picture_of(sample: str, cell: Any, base: Path) -> Picture:
    """The picture in an image cell.

    Args:
        sample: names the sample in errors.
        cell: a picture that is made already, a path, a `data:` address that holds it, or a
            dataset's undecoded image.
        base: folder to which the path is relative.

    Raises:
        LayerfuseError: the cell is anything else.
    """
    if isinstance(cell, Picture):
        return cell
    # What the datasets library makes of an image in a message.
    if isinstance(cell, dict) and cell.keys() == {"bytes", "path"}:
        # JSON has no bytes: a text there could be base64 or anything else.
        if isinstance(cell["bytes"], bytes):
            return _embedded_picture("picture in a message", cell["bytes"])
        if cell["bytes"] is None:
            cell = cell["path"]
    if not isinstance(cell, str):
        raise LayerfuseError(f"sample {sample}: an image is a {type(cell).__name__}, not a path")
    refuse_halves(sample, "the path of an image", cell)
    if cell.startswith("data:"):
        return _embedded_picture(cell.partition(",")[0], _decoded(sample, cell))
    if cell.startswith(("http://", "https://")):
        raise LayerfuseError(
            f"sample {sample}: the image {cell} is elsewhere; only files are read: download it and "
            "give its path"
        )
    return Picture(str(base / cell.removeprefix("file://")))


def _embedded_picture(kind: str, content: bytes) -> Picture:
    """The picture whose encoded bytes a record holds itself."""
    # Pictures with one name are one picture.
    return Picture(f"{kind} {sha256(content).hexdigest()[:16]}", partial(bytes, content))


def _decoded(sample: str, address: str) -> bytes:
    """The content of an address such as `data:image/png;base64,...`."""
    description, _, content = address.partition(",")
    try:
        if not description.endswith(";base64"):
            raise ValueError("its content is not in base64")
        return base64.b64decode(content, validate=True)
    except (ValueError, binascii.Error) as error:
        raise LayerfuseError(
            f"sample {sample}: the image {short(address)} cannot be read: {error}"
        ) from error


def _chosen(index: int, record: Any, reading: Reading) -> dict[str, Any]:
    """The columns of a record that are not left out, under the names that are read."""
    if not isinstance(record, dict):
        raise LayerfuseError(f"sample {index}: a {type(record).__name__}, not a mapping with keys")
    try:
        return reading.chosen(record)
    except LayerfuseError as error:
        raise LayerfuseError(f"sample {sample_id(index, record)}: {error}") from error


def _image_cells(name: str, record: dict[str, Any], turns: list[Turn]) -> list[Any]:
    """The images of a record: of its columns, or of the parts of its turns."""
    of_parts: list[Any] = []
    for turn in turns:
        for image in turn.images:
            if image is not None:
                of_parts.append(image)
    of_columns: list[Any] = []
    for key in ("image", "images"):
        # An empty text or list stands for no picture.
        if not is_empty(record.get(key)):
            of_columns.extend(cells(record[key]))
    if of_parts and of_columns:
        raise LayerfuseError(
            f"sample {name}: its turns name {len(of_parts)} pictures and its columns "
            f"{len(of_columns)}; name them in one of both places"
        )
    return of_parts or of_columns


def _kinds(name: str, key: str, kinds: Any, turns: list[Message]) -> tuple[str, ...]:
    """The family or category of every answer that stays in the conversation.

    Args:
        name: of the sample.
        key: what the record calls them.
        kinds: one for each answer, or none at all.
        turns: of the record, with empty answers.
    """
    answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    if kinds is None:
        return ()
    # A text has a length too, and would give each answer one of its letters.
    if not isinstance(kinds, list | tuple):
        raise LayerfuseError(
            f"sample {name}: {key} is a {type(kinds).__name__}, not a list of one for each answer"
        )
    if len(kinds) == 0:
        return ()
    if len(kinds) != len(answers):
        raise LayerfuseError(f"sample {name}: {len(kinds)} {key} for {len(answers)} answers")
    remaining = []
    for kind, answer in zip(kinds, answers, strict=True):
        # `None` and `nan` would be families of the report.
        if not _is_name(kind) or not str(kind).strip():
            raise LayerfuseError(
                f"sample {name}: {key} holds {short(kind)}; valid: a text for each answer"
            )
        refuse_halves(name, key, str(kind))
        # Empty answers are left out of the conversation, and so are their kinds.
        if answer.strip():
            remaining.append(str(kind))
    return tuple(remaining)
