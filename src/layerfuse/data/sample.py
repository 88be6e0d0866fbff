"""One sample: a conversation about pictures, from a record in LLaVA's format or from columns."""

import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerfuse.data.picture import Picture
from layerfuse.errors import LayerfuseError
from layerfuse.model.chat_template import IMAGE_TOKEN, Message

# LLaVA's files say `human` and `gpt`, chat templates `user` and `assistant`.
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


@dataclass(frozen=True)
class Sample:
    """One conversation about some pictures."""

    id: str
    pictures: tuple[Picture, ...]
    """in the order of the image markers in the messages"""
    messages: tuple[Message, ...]
    families: tuple[str, ...] = ()
    """of each answer, such as `count`; empty where the source names none"""
    categories: tuple[str, ...] = ()
    """of each answer, such as `Hallucination`; empty where the source names none"""
    novel: bool = False
    """whether a picture shows what no training picture does"""


def by_turn(sample: Sample) -> list[Sample]:
    """One sample per answer: the conversation up to it, with the pictures that it shows.

    Args:
        sample: with any number of answers.
    """
    turns: list[Sample] = []
    num_shown = 0
    for end, message in enumerate(sample.messages, start=1):
        num_shown += message["content"].count(IMAGE_TOKEN)
        if message["role"] != "assistant":
            continue
        # Answers so far: the index of this one.
        answer = len(turns)
        turn = Sample(
            id=sample.id,
            pictures=sample.pictures[:num_shown],
            messages=sample.messages[:end],
            # Slices, because samples without families have an empty tuple.
            families=sample.families[answer : answer + 1],
            categories=sample.categories[answer : answer + 1],
            novel=sample.novel,
        )
        turns.append(turn)
    return turns


def from_llava(index: int, record: Any, base: Path) -> Sample:
    """Read a record with `conversations` or `messages`, `image` or `images`, optional `id`.

    Args:
        index: the record's place in its source, which names it where it has no `id`.
        record: from JSON.
        base: folder to which image paths are relative.

    Raises:
        LayerfuseError: naming the sample and what is wrong with it.
    """
    if not isinstance(record, dict):
        raise LayerfuseError(f"sample {index}: a {type(record).__name__}, not a mapping with keys")
    name = sample_id(index, record)
    _refuse_halves(name, "id", str(record.get("id")))
    image_cells = _image_cells(record)
    pictures = [picture_of(name, cell, base) for cell in image_cells]
    raw_turns = record.get("conversations") or record.get("messages")
    if not raw_turns:
        raise LayerfuseError(f"sample {name}: no conversations; its keys are {_keys(record)}")
    if not isinstance(raw_turns, list | tuple):
        raise LayerfuseError(
            f"sample {name}: its conversation is a {type(raw_turns).__name__}, not a list of turns"
        )
    turns = [_turn(name, turn) for turn in raw_turns]
    # Before the messages, which leave out the empty answers that kinds are counted with.
    families = _kinds(name, "families", record.get("families"), turns)
    categories = _kinds(name, "categories", record.get("categories"), turns)
    messages = _messages(name, turns, len(pictures))
    novel = record.get("novel")
    # A text such as "false" would be true.
    if novel not in (None, False, True):
        raise LayerfuseError(f"sample {name}: novel is {_short(novel)}; valid: true, false")
    return Sample(
        id=name,
        pictures=tuple(pictures),
        messages=messages,
        families=families,
        categories=categories,
        novel=bool(novel),
    )


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


def _image_cells(record: dict[str, Any]) -> list[Any]:
    """The images of a record; an empty text or list stands for none."""
    for key in ("image", "images"):
        column = record.get(key)
        if column is None:
            continue
        # Zero or false are no empty columns: `picture_of` names them.
        if isinstance(column, str | list | tuple) and len(column) == 0:
            continue
        return cells(column)
    return []


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


def _short(value: Any) -> str:
    """A value in an error: its beginning, and no half of a surrogate pair, as `repr` makes it."""
    brief = reprlib.Repr()
    brief.maxstring = 100
    return brief.repr(value)


def _keys(record: dict[Any, Any]) -> list[str]:
    """The keys of a record, as errors list them."""
    return sorted(str(key) for key in record)


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
        cell: a picture that is made already, or a path.
        base: folder to which the path is relative.

    Raises:
        LayerfuseError: the cell is anything else.
    """
    if not isinstance(cell, str | Picture):
        raise LayerfuseError(f"sample {sample}: an image is a {type(cell).__name__}, not a path")
    if isinstance(cell, Picture):
        return cell
    _refuse_halves(sample, "the path of an image", cell)
    return Picture(str(base / cell))


def _turn(name: str, turn: Any) -> Message:
    """A turn of a conversation, in LLaVA's words or those of chat templates."""
    role = None
    content = None
    if isinstance(turn, dict):
        role = ROLES.get(str(turn.get("from", turn.get("role"))))
        content = turn.get("value", turn.get("content"))
    if role is None or not isinstance(content, str):
        raise LayerfuseError(
            f"sample {name}: cannot read the turn {_short(turn)}; roles: {sorted(ROLES)}"
        )
    _refuse_halves(name, f"a turn of the {role}", content)
    return {"role": role, "content": content}


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
        raise LayerfuseError(f"sample {name}: {len(kinds)} kinds for {len(answers)} answers")
    remaining = []
    for kind, answer in zip(kinds, answers, strict=True):
        _refuse_halves(name, key, str(kind))
        # Empty answers are left out of the conversation, and so are their kinds.
        if answer.strip():
            remaining.append(str(kind))
    return tuple(remaining)


def _messages(name: str, turns: list[Message], num_pictures: int) -> tuple[Message, ...]:
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
        num_markers = _show_first(messages, num_pictures)
    if num_markers != num_pictures:
        raise LayerfuseError(
            f"sample {name}: {num_markers} {IMAGE_TOKEN} markers, {num_pictures} images"
        )
    answered: list[Message] = []
    num_lost = 0
    for place, message in enumerate(messages):
        # The last question of a conversation may have no answer, or only an empty one.
        is_answered = place + 1 < len(messages) and messages[place + 1]["role"] == "assistant"
        if message["role"] != "user" or is_answered:
            answered.append(message)
        else:
            num_lost += message["content"].count(IMAGE_TOKEN)
    if not any(message["role"] == "assistant" for message in answered):
        raise LayerfuseError(f"sample {name}: no answer to learn from")
    if num_lost > 0:
        # Pictures belong to the conversation, not to the question that is left out.
        _show_first(answered, num_lost)
    return tuple(answered)


def _show_first(messages: list[Message], num_pictures: int) -> int:
    """Put image markers before the first message that is not the system's.

    Args:
        messages: the first that is found is changed.
        num_pictures: number of markers.

    Returns:
        The number of markers that were put, 0 where there is no such message.
    """
    for message in messages:
        if message["role"] != "system":
            message["content"] = IMAGE_TOKEN * num_pictures + "\n" + message["content"]
            return num_pictures
    return 0


def from_columns(index: int, row: Any, base: Path) -> Sample:
    """Read a row with `conversations` or `messages`, `question` and `answer`, or `text`.

    Args:
        index: as for `from_llava`.
        row: of a table.
        base: as for `from_llava`.

    Raises:
        LayerfuseError: naming the sample and what is wrong with it.
    """
    # What is no mapping is named there.
    if not isinstance(row, dict) or row.get("conversations") or row.get("messages"):
        return from_llava(index, row, base)
    # A caption is the answer to no words at all.
    question = row.get("question", "")
    answer = row.get("answer", row.get("text"))
    if not isinstance(answer, str):
        raise LayerfuseError(
            f"sample {sample_id(index, row)}: needs a column conversations, messages, answer or "
            f"text; it has {_keys(row)}"
        )
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    return from_llava(index, {**row, "messages": messages}, base)
