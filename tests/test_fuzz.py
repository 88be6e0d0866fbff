"""Mutated records and files of records: an error that names them, or exactly what they say.

Nothing else may leave the readers: no error but `LayerfuseError`, and no text that silently becomes
another one.
"""

import copy
import json
import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from layerfuse.data.from_records import Reading, from_llava
from layerfuse.data.lazy_records import Samples
from layerfuse.data.sample import Sample
from layerfuse.data.sources import faults
from layerfuse.model.processor import IMAGE_TOKEN
from tests.mutations import SHORT_AND_FULL, mutate, outcome_of
from tests.sample_files import load_path, save_lines

ODD_VALUES: list[Any] = [
    None,
    # Numbers, of which JSON of Python writes all
    0,
    7,
    -1.5,
    10**30,
    float("nan"),
    True,
    # Texts: empty ones, halves of surrogate pairs, what is no path, other ends of lines
    "",
    " \n",
    "text",
    "\ud83d",
    "a\ude00b",
    "\0",
    "../" * 400,
    "😀\u2028\x85",
    IMAGE_TOKEN,
    # Lists and mappings where none belongs
    [],
    {},
    [[]],
    [None],
    ["text", 3],
    {"from": "gpt", "value": "more"},
    {"from": ["gpt"], "value": {}},
]
KEYS = ("id", "image", "images", "conversations", "messages", "from", "role", "value", "content")
MORE_KEYS = ("families", "categories", "novel", "question", "answer", "text", "file_name", "")


def good_records() -> list[Any]:
    """A record of every kind: two of conversations, and two of rows of a table."""
    llava_turns = [
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "A"},
        {"from": "human", "value": "Why?"},
        {"from": "gpt", "value": "B"},
    ]
    llava = {
        "id": "llava",
        "image": "a.png",
        "conversations": llava_turns,
        "families": ["count", "colour"],
    }
    chat_messages = [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ]
    chat = {
        "id": 7,
        "images": ["a.png", "a.png"],
        "messages": chat_messages,
        "novel": True,
    }
    row = {
        "id": "row",
        "image": "a.png",
        "question": "What?",
        "answer": "A",
    }
    caption = {
        "id": "caption",
        "file_name": "a.png",
        "text": "A",
        "categories": ["Other"],
    }
    return [llava, chat, row, caption]


@dataclass
class Place:
    """A place inside a value, where another one can be put."""

    holder: Any
    """a mapping or a list"""
    key: Any
    """the key or index of the place in its holder"""


def places(value: Any) -> list[Place]:
    """Every place inside a value, at any depth."""
    keys: list[Any] = []
    if isinstance(value, dict):
        keys = list(value)
    if isinstance(value, list):
        keys = list(range(len(value)))
    inside: list[Place] = []
    for key in keys:
        inside.append(Place(value, key))
        inside.extend(places(value[key]))
    return inside


def change(place: Place, dice: random.Random) -> None:
    """Remove, wrap, rename, repeat, garble or replace what is at a place."""
    holder = place.holder
    key = place.key
    value = holder[key]
    kind = dice.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 1:
        holder[key] = [value]
    elif kind == 2 and isinstance(holder, dict):
        new_key = dice.choice(KEYS + MORE_KEYS)
        holder[new_key] = holder.pop(key)
    elif kind == 3 and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(value))
    elif kind == 4 and isinstance(value, str):
        at = dice.randrange(len(value) + 1)
        inserted = str(dice.choice(ODD_VALUES))
        holder[key] = value[:at] + inserted + value[at:]
    else:
        # A copy, because later changes may go into it.
        holder[key] = copy.deepcopy(dice.choice(ODD_VALUES))


def mutate_record(record: Any, dice: random.Random) -> Any:
    """A record with one to five changes, or an odd value in its place."""
    # In a list, so that the record as a whole is a place too.
    mutated = [copy.deepcopy(record)]
    num_changes = dice.choice((1, 1, 2, 5))
    for _ in range(num_changes):
        place = dice.choice(places(mutated))
        change(place, dice)
        if not mutated:
            return dice.choice(ODD_VALUES)
    return mutated[0]


def mutated_records(count: int) -> list[Any]:
    """So many mutated records, of every kind the same number."""
    originals = good_records()
    records = []
    for number in range(count):
        # Seeded by the number: a failure is made again by itself.
        dice = random.Random(number)
        original = originals[number % len(originals)]
        records.append(mutate_record(original, dice))
    return records


def naive_answers(record: dict[str, Any]) -> list[str]:
    """The texts that a record has an assistant say."""
    turns = record.get("conversations") or record.get("messages")
    if not turns:
        text: Any = record.get("answer", record.get("text"))
        return [text]
    answers = []
    for turn in turns:
        speaker = turn.get("from", turn.get("role"))
        text = turn.get("value", turn.get("content"))
        # An empty answer is left out with its question.
        if speaker in ("gpt", "assistant") and text.strip():
            answers.append(text)
    return answers


def naive_pictures(record: dict[str, Any]) -> list[str]:
    """The paths that a record names."""
    cell = record.get("image") or record.get("images") or []
    if isinstance(cell, str):
        return [cell]
    return cell


def without_marker(text: str, num_pictures: int) -> str:
    """A text without the markers that are put before a first turn that has none."""
    return text.removeprefix(IMAGE_TOKEN * num_pictures + "\n")


def check_sample(sample: Sample, record: dict[str, Any], folder: Path) -> None:
    """A sample says and shows what its record does.

    Args:
        sample: made of the record.
        record: mutated, but still a record.
        folder: to which the paths of images are relative.
    """
    num_pictures = len(sample.pictures)
    answers = []
    num_markers = 0
    for message in sample.messages:
        num_markers += message["content"].count(IMAGE_TOKEN)
        if message["role"] == "assistant":
            # The first turn may be an answer: the marker is put before it, whoever speaks.
            answers.append(without_marker(message["content"], num_pictures))
    expected = [without_marker(text, num_pictures) for text in naive_answers(record)]
    assert answers == expected
    assert num_markers == num_pictures
    paths = [str(folder / cell) for cell in naive_pictures(record)]
    names = [picture.name for picture in sample.pictures]
    # Those of a last question without an answer are left out with it.
    assert names == paths[: len(names)]
    assert bool(names) == bool(paths)
    # It can be written.
    json.dumps(repr(sample)).encode()
    for picture in sample.pictures:
        picture.open()


def check_samples(samples: Samples, records: list[Any]) -> int:
    """Every sample is a named fault, or says and shows what its record does.

    Returns:
        The number of samples that are no faults.
    """
    bad = faults(samples)
    for index, (sample_id, reason) in bad.items():
        assert f"sample {sample_id}: " in reason
        assert reason.endswith(f"({samples.source}, index {index})")
        # Can be printed and written.
        reason.encode()
        sample_id.encode()
    usable = samples.without(bad)
    folder = Path(samples.source).parent
    for index, sample in zip(usable.order, usable, strict=True):
        check_sample(sample, records[index], folder)
    # No record is lost between the two.
    assert len(usable) + len(bad) == len(records)
    return len(usable)


@pytest.mark.parametrize("count", SHORT_AND_FULL)
def test_mutated_records(tmp_path: Path, count: int) -> None:
    """In a JSON file, and in a table beside the pictures."""
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    records = mutated_records(count)

    file = tmp_path / "d.json"
    file.write_text(json.dumps(records))
    num_usable = check_samples(load_path(file), records)

    rows = []
    for record in records:
        if isinstance(record, dict):
            # In a table the name of the file stands for the image and for the id.
            name = record.get("file_name")
            record = {"image": name, "id": name, **record}
        rows.append(record)
    save_lines(tmp_path / "metadata.jsonl", *records)
    num_rows = check_samples(load_path(tmp_path), rows)

    # Two of the four kinds of records are rows, which a file of conversations does not hold.
    assert count / 30 < num_usable < num_rows < count * 9 / 10


@pytest.mark.parametrize("count", SHORT_AND_FULL)
def test_mutated_text_files(tmp_path: Path, count: int) -> None:
    """The bytes of files of records: an error that names the file, or samples as above."""
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    whole = json.dumps(good_records(), ensure_ascii=False, indent=1)
    lines = [json.dumps(record) for record in good_records()]
    # As Windows ends its lines
    contents = (whole.encode(), "\r\n".join(lines).encode())
    num_read = 0
    for number in range(count):
        dice = random.Random(number)
        mutated = mutate(dice.choice(contents), dice)
        # JSON in lines or as a list, whatever the file is called.
        file = tmp_path / dice.choice(("d.json", "d.jsonl"))
        file.write_bytes(mutated.content)

        outcome = outcome_of(partial(load_path, file))

        if outcome.value is None:
            assert str(file) in outcome.refusal
        else:
            num_read += 1
            check_samples(outcome.value, list(outcome.value.records))
    # The mutations leave some to be read, and refuse some.
    assert count / 10 < num_read < count * 9 / 10


def test_odd_values_everywhere() -> None:
    """Every key of a record with every odd value: no draw decides what is tried."""
    convert = partial(from_llava, reading=Reading(Path("folder")))
    for original in good_records():
        num_places = len(places([original]))
        for number in range(num_places):
            for value in ODD_VALUES:
                changed = [copy.deepcopy(original)]
                place = places(changed)[number]
                place.holder[place.key] = value
                samples = Samples(changed, convert, "list")
                # Raises nothing but what makes a fault.
                faults(samples)
