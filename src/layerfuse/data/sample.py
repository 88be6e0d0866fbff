"""One sample: a conversation about pictures, from a record in LLaVA's format or from columns."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerfuse.data.picture import Picture
from layerfuse.errors import LayerfuseError
from layerfuse.model.processor import IMAGE_TOKEN, Message

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


@dataclass(frozen=True)
class Sample:
    """One conversation about some pictures. `families` and `categories` name each answer's kind."""

    id: str
    pictures: tuple[Picture, ...]
    messages: tuple[Message, ...]
    families: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    novel: bool = False


def by_turn(sample: Sample) -> list[Sample]:
    """One sample per answer: the conversation up to it, with the pictures that it shows."""
    turns: list[Sample] = []
    num_shown = 0
    for end, message in enumerate(sample.messages, start=1):
        num_shown += message["content"].count(IMAGE_TOKEN)
        if message["role"] != "assistant":
            continue
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
    """A record with `conversations` or `messages`, `image` or `images`, optional `id`.

    Image paths are relative to `base`. Raises LayerfuseError naming the sample.
    """
    if not isinstance(record, dict):
        raise LayerfuseError(f"sample {index}: a {type(record).__name__}, not a mapping with keys")
    name = str(record.get("id", index))
    image_cells = cells(record.get("image") or record.get("images") or None)
    pictures = tuple(picture_of(name, cell, base) for cell in image_cells)
    raw = record.get("conversations") or record.get("messages")
    if not raw:
        raise LayerfuseError(f"sample {name}: no conversations; its keys are {sorted(record)}")
    turns = [_turn(name, turn) for turn in raw]
    families = _kinds(name, record.get("families") or (), turns)
    categories = _kinds(name, record.get("categories") or (), turns)
    messages = _messages(name, turns, len(pictures))
    return Sample(
        id=name,
        pictures=pictures,
        messages=messages,
        families=families,
        categories=categories,
        novel=bool(record.get("novel", False)),
    )


def cells(column: Any) -> list[Any]:
    """The images of a column that holds one, several or none."""
    if isinstance(column, list | tuple):
        return list(column)
    if column is None:
        return []
    return [column]


def picture_of(sample: str, cell: Any, base: Path) -> Picture:
    """The picture in an image cell: one that is made, or a path relative to `base`."""
    if not isinstance(cell, str | Picture):
        raise LayerfuseError(f"sample {sample}: an image is a {type(cell).__name__}, not a path")
    if isinstance(cell, Picture):
        return cell
    return Picture(str(base / cell))


def _turn(name: str, turn: Any) -> Message:
    role = content = None
    if isinstance(turn, dict):
        role = ROLES.get(str(turn.get("from", turn.get("role"))))
        content = turn.get("value", turn.get("content"))
    if role is None or not isinstance(content, str):
        raise LayerfuseError(
            f"sample {name}: cannot read the turn {turn!r}; roles: {sorted(ROLES)}"
        )
    return {"role": role, "content": content}


def _kinds(name: str, kinds: Any, turns: list[Message]) -> tuple[str, ...]:
    """The family or category of every answer that is kept."""
    answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    if not kinds:
        return ()
    if len(kinds) != len(answers):
        raise LayerfuseError(f"sample {name}: {len(kinds)} kinds for {len(answers)} answers")
    # Empty answers are left out of the conversation, and so are their kinds.
    pairs = zip(kinds, answers, strict=True)
    return tuple(str(kind) for kind, answer in pairs if answer.strip())


def _messages(name: str, turns: list[Message], images: int) -> tuple[Message, ...]:
    """The turns with the pictures' markers; questions without an answer are left out."""
    messages = [t for t in turns if t["role"] != "assistant" or t["content"].strip()]
    talk = [m for m in messages if m["role"] != "system"]
    markers = sum(m["content"].count(IMAGE_TOKEN) for m in messages)
    if markers == 0 and images and talk:
        talk[0]["content"] = IMAGE_TOKEN * images + "\n" + talk[0]["content"]
    elif markers != images:
        raise LayerfuseError(f"sample {name}: {markers} {IMAGE_TOKEN} markers, {images} images")
    answered: list[Message] = []
    lost = 0
    for m, following in zip(messages, [*messages[1:], None], strict=True):
        if m["role"] != "user" or (following is not None and following["role"] == "assistant"):
            answered.append(m)
        else:  # its pictures belong to the conversation, not to that question
            lost += m["content"].count(IMAGE_TOKEN)
    if not any(m["role"] == "assistant" for m in answered):
        raise LayerfuseError(f"sample {name}: no answer to learn from")
    if lost:
        first = next(m for m in answered if m["role"] != "system")
        first["content"] = IMAGE_TOKEN * lost + "\n" + first["content"]
    return tuple(answered)


def from_columns(index: int, row: dict[str, Any], base: Path) -> Sample:
    """A row with `conversations` or `messages`, `question` and `answer`, or `text`."""
    if not row.get("conversations") and not row.get("messages"):
        question, answer = row.get("question", ""), row.get("answer", row.get("text"))
        if not isinstance(answer, str):
            raise LayerfuseError(
                f"sample {row.get('id', index)}: needs a column conversations, messages, answer or "
                f"text; it has {sorted(row)}"
            )
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        row = {**row, "messages": turns}
    return from_llava(index, row, base)
