"""The turns of a conversation, as records write them, and the messages that are learned from."""

from dataclasses import dataclass
from typing import Any

from layerfuse.data.unread import refuse_markers, refuse_unread_in_turn
from layerfuse.errors import LayerfuseError, short
from layerfuse.model.chat_template import IMAGE_TOKEN, STAND_INS, Message, literal
from layerfuse.model.content_parts import from_parts

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


@dataclass(frozen=True)
class Turn:
    """A turn of a conversation."""

    message: Message
    images: tuple[Any, ...]
    """what its image parts hold; None for a part that only marks a place"""


def read_turns(name: str, record: dict[str, Any], literal_answers: bool) -> list[Turn]:
    """The turns of a record, the system's first.

    Args:
        name: of the sample.
        record: with conversations or messages.
        literal_answers: whether `<image>` in an answer is text.

    Raises:
        LayerfuseError: naming the sample and the turn that cannot be read.
    """
    for first, second in (("conversations", "messages"), ("image", "images")):
        if not is_empty(record.get(first)) and not is_empty(record.get(second)):
            raise LayerfuseError(
                f"sample {name}: has both {first} and {second}; leave one of them out with "
                f"`ignore_columns`"
            )
    raw_turns = record.get("conversations") or record.get("messages")
    if not raw_turns:
        raise LayerfuseError(f"sample {name}: no conversations; its keys are {keys_of(record)}")
    if not isinstance(raw_turns, list | tuple):
        raise LayerfuseError(
            f"sample {name}: its conversation is a {type(raw_turns).__name__}, not a list of turns"
        )
    turns = [_turn(name, turn, literal_answers) for turn in raw_turns]
    system = record.get("system")
    if not is_empty(system):
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


def _joined(turns: list[Turn]) -> list[Turn]:
    """The turns with those of the user that follow each other as one: a template may take no two in
    a row, and only the last of them would be asked."""
    joined: list[Turn] = []
    for turn in turns:
        follows_user = bool(joined) and joined[-1].message["role"] == "user"
        if follows_user and turn.message["role"] == "user":
            before = joined.pop()
            text = before.message["content"] + "\n" + turn.message["content"]
            turn = Turn({"role": "user", "content": text}, before.images + turn.images)
        joined.append(turn)
    return joined


def _turn(name: str, turn: Any, literal_answers: bool) -> Turn:
    """A turn of a conversation, in LLaVA's words or those of chat templates."""
    role = None
    content = None
    if isinstance(turn, dict):
        role = _role_of(name, turn)
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
    refuse_halves(name, f"a turn of the {role}", text)
    _refuse_stand_ins(name, role, text)
    refuse_unread_in_turn(name, turn)
    if role == "assistant" and literal_answers:
        text = literal(text)
    else:
        refuse_markers(name, role, text)
    return Turn({"role": role, "content": text}, joined.images)


def _refuse_stand_ins(name: str, role: str, text: str) -> None:
    """Refuse the characters that stand for something else while a conversation is written: a U+E002
    of an icon font would be learned as `<image>`."""
    stand_in = STAND_INS.search(text)
    if stand_in is not None:
        raise LayerfuseError(
            f"sample {name}: a turn of the {role} holds the private-use character "
            f"U+{ord(stand_in[0]):04X}; valid: texts without U+E000 to U+E004, which stand for "
            "markers while a conversation is written"
        )


def _role_of(name: str, turn: dict[Any, Any]) -> str | None:
    """Who speaks in a turn; None for a speaker that nobody knows."""
    # Tables have both spellings where rows differ, one of them without a value.
    speakers = [turn[key] for key in ("from", "role") if not is_empty(turn.get(key))]
    roles = [ROLES.get(str(speaker)) for speaker in speakers]
    if not roles:
        return None
    if roles[0] != roles[-1]:
        raise LayerfuseError(
            f"sample {name}: the turn {short(turn)} names one speaker as from and another as role"
        )
    return roles[0]


@dataclass(frozen=True)
class LearnedTurns:
    """A conversation that is learned from."""

    messages: tuple[Message, ...]
    pictures: list[int]
    """the places of its pictures in the record, in the order of the markers"""


def messages_of(name: str, turns: list[Message], num_pictures: int) -> LearnedTurns:
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
    return LearnedTurns(tuple(answered), pictures)


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


def is_empty(value: Any) -> bool:
    """Whether a column holds nothing: no value, or an empty text or list. Zero and false are no
    empty columns; what reads them names them.

    Args:
        value: of the column.
    """
    return value is None or (isinstance(value, str | list | tuple) and len(value) == 0)


def keys_of(record: dict[Any, Any]) -> list[str]:
    """The keys of a record, as errors list them.

    Args:
        record: of any keys.
    """
    return sorted(str(key) for key in record)


def refuse_halves(name: str, place: str, text: str) -> None:
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
