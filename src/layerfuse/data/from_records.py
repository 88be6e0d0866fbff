"""From records, in LLaVA's format, in that of chat templates or in columns, to samples."""

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from layerfuse.data.sample import Sample
from layerfuse.data.unread import refuse_markers, refuse_unread, refuse_unread_in_turn, short
from layerfuse.errors import LayerfuseError
from layerfuse.model.chat_template import IMAGE_TOKEN, Message, from_parts, literal
from layerfuse.vision.picture import Picture

# LLaVA's files say `human` and `gpt`, chat templates `user` and `assistant`; ShareGPT's files name
# the model that answered.
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
}


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


@dataclass(frozen=True)
class _Turn:
    """A turn of a conversation."""

    message: Message
    images: tuple[Any, ...]
    """what its image parts hold; None for a part that only marks a place"""


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
    columns = [column for column in COLUMNS if not _is_empty(record.get(column))]
    if columns and not has_turns:
        return from_columns(index, record, reading.without_names())
    if columns:
        raise LayerfuseError(
            f"sample {name}: has a conversation and {' and '.join(columns)} too; leave one of them "
            "out with `ignore_columns`"
        )
    _refuse_halves(name, "id", str(record.get("id")))
    turns = _turns(name, record, reading)
    image_cells = _image_cells(name, record, turns)
    refuse_unread(name, record, shows_pictures=bool(image_cells))
    pictures = [picture_of(name, cell, reading.base) for cell in image_cells]
    all_messages = [turn.message for turn in turns]
    # Before the messages, which leave out the empty answers that kinds are counted with.
    families = _kinds(name, "families", record.get("families"), all_messages)
    categories = _kinds(name, "categories", record.get("categories"), all_messages)
    shown = _messages(name, all_messages, len(pictures))
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
            f"{_keys(row)}"
        )
    if len(answers) > 1:
        raise LayerfuseError(
            f"sample {name}: has both answer and text; leave one of them out with `ignore_columns`"
        )
    # A caption is the answer to no words at all.
    question = row.get("question")
    if question is None:
        question = ""
    answer = row[answers[0]]
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


def sample_id(index: int, record: Any) -> str:
    """What names a sample in messages and results.

    Args:
        index: the record's place in its source.
        record: of the source, of any shape.

    Returns:
        The record's `id`, or its place where it has none. Half a surrogate pair, which no file
        could hold, is written with a backslash.
    """
    identity = None
    if isinstance(record, dict):
        identity = record.get("id")
    if identity is None:
        identity = index
    return str(identity).encode("utf-8", "backslashreplace").decode("utf-8")


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
        if cell["bytes"] is not None:
            return _embedded_picture("picture in a message", cell["bytes"])
        cell = cell["path"]
    if not isinstance(cell, str):
        raise LayerfuseError(f"sample {sample}: an image is a {type(cell).__name__}, not a path")
    _refuse_halves(sample, "the path of an image", cell)
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


def _turns(name: str, record: dict[str, Any], reading: Reading) -> list[_Turn]:
    """The turns of a record, the system's first."""
    for first, second in (("conversations", "messages"), ("image", "images")):
        if not _is_empty(record.get(first)) and not _is_empty(record.get(second)):
            raise LayerfuseError(
                f"sample {name}: has both {first} and {second}; leave one of them out with "
                f"`ignore_columns`"
            )
    raw_turns = record.get("conversations") or record.get("messages")
    if not raw_turns:
        raise LayerfuseError(f"sample {name}: no conversations; its keys are {_keys(record)}")
    if not isinstance(raw_turns, list | tuple):
        raise LayerfuseError(
            f"sample {name}: its conversation is a {type(raw_turns).__name__}, not a list of turns"
        )
    turns = [_turn(name, turn, reading.literal_answers) for turn in raw_turns]
    system = record.get("system")
    if not _is_empty(system):
        if turns[0].message["role"] == "system":
            raise LayerfuseError(f"sample {name}: has a column system and a turn of the system")
        turns.insert(0, _turn(name, {"role": "system", "content": system}, False))
    speaks = [turn.message["role"] for turn in turns]
    # Its question would have no answer, or its answer no question.
    if "system" in speaks[_first_of_others(speaks) :]:
        raise LayerfuseError(
            f"sample {name}: a turn of the system follows others; valid: at the beginning"
        )
    return _joined(turns)


def _first_of_others(roles: list[str]) -> int:
    """The place of the first turn that is not the system's."""
    for place, role in enumerate(roles):
        if role != "system":
            return place
    return len(roles)


def _joined(turns: list[_Turn]) -> list[_Turn]:
    """The turns with those of the user that follow each other as one: a template may take no two in
    a row, and only the last of them would be asked."""
    joined: list[_Turn] = []
    for turn in turns:
        follows_user = bool(joined) and joined[-1].message["role"] == "user"
        if follows_user and turn.message["role"] == "user":
            before = joined.pop()
            text = before.message["content"] + "\n" + turn.message["content"]
            turn = _Turn({"role": "user", "content": text}, before.images + turn.images)
        joined.append(turn)
    return joined


def _is_empty(value: Any) -> bool:
    """Whether a column holds nothing: no value, or an empty text or list. Zero and false are no
    empty columns; what reads them names them."""
    return value is None or (isinstance(value, str | list | tuple) and len(value) == 0)


def _turn(name: str, turn: Any, literal_answers: bool) -> _Turn:
    """A turn of a conversation, in LLaVA's words or those of chat templates."""
    role = None
    content = None
    if isinstance(turn, dict):
        # Tables have both spellings where rows differ, one of them without a value.
        speaker = turn.get("from")
        if speaker is None:
            speaker = turn.get("role")
        role = ROLES.get(str(speaker))
        content = turn.get("value")
        if content is None:
            content = turn.get("content")
        elif turn.get("content") not in (None, content):
            raise LayerfuseError(
                f"sample {name}: the turn {short(turn)} says one thing as value and another as "
                "content"
            )
    if role is None:
        raise LayerfuseError(
            f"sample {name}: cannot read the turn {short(turn)}; roles: {sorted(ROLES)}"
        )
    is_text = isinstance(content, str)
    is_parts = isinstance(content, list | tuple) and len(content) > 0
    if not (is_text or is_parts):
        raise LayerfuseError(
            f"sample {name}: cannot read the turn {short(turn)}: its content is {short(content)}, "
            "no text and no list of parts"
        )
    try:
        joined = from_parts(content)
    except LayerfuseError as error:
        raise LayerfuseError(
            f"sample {name}: cannot read the turn {short(turn)}: {error}"
        ) from error
    text = joined.text
    _refuse_halves(name, f"a turn of the {role}", text)
    refuse_unread_in_turn(name, turn)
    if role == "assistant" and literal_answers:
        text = literal(text)
    else:
        refuse_markers(name, role, text)
    return _Turn({"role": role, "content": text}, joined.images)


def _image_cells(name: str, record: dict[str, Any], turns: list[_Turn]) -> list[Any]:
    """The images of a record: of its columns, or of the parts of its turns."""
    of_parts: list[Any] = []
    for turn in turns:
        for image in turn.images:
            if image is not None:
                of_parts.append(image)
    of_columns: list[Any] = []
    for key in ("image", "images"):
        # An empty text or list stands for no picture.
        if not _is_empty(record.get(key)):
            of_columns.extend(cells(record[key]))
    if of_parts and of_columns:
        raise LayerfuseError(
            f"sample {name}: its turns name {len(of_parts)} pictures and its columns "
            f"{len(of_columns)}; name them in one of both places"
        )
    return of_parts or of_columns


def _refuse_halves(name: str, place: str, text: str) -> None:
    """Raise LayerfuseError for half a surrogate pair, which no tokenizer and no file can hold.

    Args:
        name: of the sample.
        place: where the text stands.
        text: from JSON, whose escapes can write any half.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ord(text[error.start])
        raise LayerfuseError(
            f"sample {name}: {place} holds half a surrogate pair, \\u{half:04x} as character "
            f"{error.start + 1}, which stands for no character: was an emoji cut in two?"
        ) from error


def _keys(record: dict[Any, Any]) -> list[str]:
    """The keys of a record, as errors list them."""
    return sorted(str(key) for key in record)


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
        _refuse_halves(name, key, str(kind))
        # Empty answers are left out of the conversation, and so are their kinds.
        if answer.strip():
            remaining.append(str(kind))
    return tuple(remaining)


@dataclass(frozen=True)
class _Shown:
    """A conversation that is learned from."""

    messages: tuple[Message, ...]
    pictures: list[int]
    """the places of its pictures in the record, in the order of the markers"""


def _messages(name: str, turns: list[Message], num_pictures: int) -> _Shown:
    """The turns with the pictures' markers; questions without an answer are left out.

    Args:
        name: of the sample.
        turns: of the record; their content may be changed.
        num_pictures: of the record.
    """
    messages = []
    num_markers = 0
    for turn in turns:
        if turn["role"] != "assistant" or turn["content"].strip():
            messages.append(turn)
            num_markers += turn["content"].count(IMAGE_TOKEN)
    if num_markers == 0 and num_pictures > 0:
        # As LLaVA does: pictures that no marker places come before the first question.
        _show_first(messages, num_pictures)
        num_markers = num_pictures
    if num_markers != num_pictures:
        raise LayerfuseError(
            f"sample {name}: {num_markers} {IMAGE_TOKEN} markers, {num_pictures} images"
        )
    answered: list[Message] = []
    pictures: list[int] = []
    # Pictures of questions that are left out: they are shown from the next question on.
    carried: list[int] = []
    next_picture = 0
    for place, message in enumerate(messages):
        num_shown = message["content"].count(IMAGE_TOKEN)
        of_message = list(range(next_picture, next_picture + num_shown))
        next_picture += num_shown
        # The last question of a conversation may have no answer, or only an empty one.
        is_answered = place + 1 < len(messages) and messages[place + 1]["role"] == "assistant"
        if message["role"] == "user" and not is_answered:
            carried.extend(of_message)
            continue
        if message["role"] == "user" and carried:
            message["content"] = IMAGE_TOKEN * len(carried) + "\n" + message["content"]
            pictures.extend(carried)
            carried = []
        pictures.extend(of_message)
        answered.append(message)
    if not any(message["role"] == "assistant" for message in answered):
        raise LayerfuseError(f"sample {name}: no answer to learn from")
    if num_pictures > 0 and not pictures:
        raise LayerfuseError(f"sample {name}: no answer follows its pictures")
    return _Shown(tuple(answered), pictures)


def _show_first(messages: list[Message], num_pictures: int) -> None:
    """Put image markers into the first question, or, where nobody asks, before the first answer.

    Args:
        messages: a question is changed or added.
        num_pictures: number of markers.
    """
    markers = IMAGE_TOKEN * num_pictures + "\n"
    first_answer = len(messages)
    for place, message in enumerate(messages):
        if message["role"] == "user":
            message["content"] = markers + message["content"]
            return
        if message["role"] == "assistant":
            first_answer = min(first_answer, place)
    # A caption is the answer to no words at all. A picture in it would be something to say.
    messages.insert(first_answer, {"role": "user", "content": markers})
