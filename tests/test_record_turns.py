"""The turns of a record: parts, pictures and their places, and what is said by nobody."""

import base64
from pathlib import Path
from typing import Any

import datasets
import pytest

from layerfuse.data.sources import load
from layerfuse.errors import LayerfuseError
from layerfuse.recipe.data_source import Data
from tests.one_record import TURNS, png, read

PARTS = [{"type": "image"}, {"type": "text", "text": "Colour?"}]


@pytest.mark.parametrize(
    ("part", "columns"),
    [
        ({"type": "image"}, {"image": "a.png"}),
        ({"type": "image"}, {"images": ["a.png"]}),
        ({"type": "image", "image": "a.png"}, {}),
        ({"type": "image", "path": "a.png"}, {}),
        ({"type": "image_url", "image_url": {"url": "a.png"}}, {}),
    ],
)
def test_messages_in_parts_are_read(part: dict[str, Any], columns: dict[str, Any]) -> None:
    """As transformers, TRL and OpenAI write them; the picture stands where its part does."""
    asked = {"role": "user", "content": [{"type": "text", "text": "Look: "}, part]}
    answered = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}

    sample = read({"messages": [asked, answered], **columns})

    assert [picture.name for picture in sample.pictures] == ["folder/a.png"]
    assert sample.messages[0]["content"] == "Look: <image>"
    assert sample.messages[1]["content"] == "red"


def test_pictures_in_messages_of_a_dataset_are_read(tmp_path: Path) -> None:
    """Undecoded, so that they have the digest of their own bytes."""
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": {"bytes": png(), "path": None}, "text": None}],
        },
        {"role": "assistant", "content": [{"type": "text", "image": None, "text": "red"}]},
    ]
    part = {
        "type": datasets.Value("string"),
        "image": datasets.Image(),
        "text": datasets.Value("string"),
    }
    message = {"role": datasets.Value("string"), "content": datasets.List(part)}
    features = datasets.Features({"messages": datasets.List(message)})
    dataset = datasets.Dataset.from_dict({"messages": [messages]}, features=features)
    dataset.save_to_disk(tmp_path / "set")

    (sample,) = load(Data(path=str(tmp_path / "set")))

    assert sample.pictures[0].read() == png()
    assert sample.messages[0]["content"] == "<image>"


def test_a_picture_inside_the_file_is_read() -> None:
    address = "data:image/png;base64," + base64.b64encode(png()).decode()
    part = {"type": "image_url", "image_url": {"url": address}}

    sample = read({"messages": [{"role": "user", "content": [part]}, TURNS[1]]})

    assert sample.pictures[0].read() == png()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("https://example.org/a.png", "is elsewhere; only files are read"),
        ("data:image/png;base64,???", "cannot be read"),
        ("data:image/svg+xml,<svg/>", "its content is not in base64"),
    ],
)
def test_pictures_that_are_no_files_are_named(address: str, message: str) -> None:
    with pytest.raises(LayerfuseError, match=f"sample 0: the image .*{message}"):
        read({"image": address, "conversations": TURNS})


def test_pictures_named_in_turns_and_in_columns_are_refused() -> None:
    part = {"type": "image", "path": "a.png"}
    turns = [{"role": "user", "content": [part]}, TURNS[1]]

    with pytest.raises(LayerfuseError, match="its turns name 1 pictures and its columns 1"):
        read({"image": "b.png", "messages": turns})


def test_a_picture_stands_before_the_first_question_not_in_a_greeting() -> None:
    greeting = {"from": "gpt", "value": "Hello!"}

    sample = read({"image": "a.png", "conversations": [greeting, *TURNS]})

    assert [message["content"] for message in sample.messages] == [
        "Hello!",
        "<image>\nColour?",
        "red",
    ]


def test_the_picture_of_a_caption_stands_before_it() -> None:
    sample = read({"image": "a.png", "conversations": [TURNS[1]]})

    assert sample.messages == (
        {"role": "user", "content": "<image>\n"},
        {"role": "assistant", "content": "red"},
    )


@pytest.mark.parametrize("role", ["chatgpt", "bing", "bard"])
def test_the_models_of_sharegpt_are_assistants(role: str) -> None:
    sample = read({"conversations": [TURNS[0], {"from": role, "value": "red"}]})

    assert sample.messages[1]["role"] == "assistant"


def test_two_turns_of_the_user_are_one_question() -> None:
    turns = [{"from": "human", "value": "<image>\nThis is a chair."}, *TURNS]

    sample = read({"image": "a.png", "conversations": turns})

    assert sample.messages[0]["content"] == "<image>\nThis is a chair.\nColour?"


def test_a_picture_in_base64_is_read() -> None:
    part = {"type": "image", "base64": base64.b64encode(png()).decode()}

    sample = read({"messages": [{"role": "user", "content": [part]}, TURNS[1]]})

    assert sample.pictures[0].read() == png()


def test_a_picture_of_an_unanswered_question_is_shown_from_the_next_one_on() -> None:
    """Pictures keep their order: each stands where its own marker does."""
    turns = [
        {"from": "human", "value": "Hello."},
        {"from": "gpt", "value": "Yes."},
        {"from": "human", "value": "<image>Which?"},
        {"from": "gpt", "value": ""},
        {"from": "human", "value": "<image>Colour?"},
        {"from": "gpt", "value": "red"},
        {"from": "human", "value": "<image>And this?"},
    ]

    sample = read({"images": ["a.png", "b.png", "c.png"], "conversations": turns})

    assert [Path(picture.name).name for picture in sample.pictures] == ["a.png", "b.png"]
    assert [message["content"] for message in sample.messages] == [
        "Hello.",
        "Yes.",
        "<image>\n<image>Colour?",
        "red",
    ]


def test_pictures_that_no_answer_follows_are_named() -> None:
    turns = [TURNS[0], TURNS[1], {"from": "human", "value": "<image>And this?"}]

    with pytest.raises(LayerfuseError, match="no answer follows its pictures"):
        read({"image": "a.png", "conversations": turns})


def test_a_turn_of_the_system_between_others_is_refused() -> None:
    system = {"from": "system", "value": "Be brief."}

    with pytest.raises(LayerfuseError, match="a turn of the system follows others"):
        read({"conversations": [TURNS[0], system, TURNS[1]]})


def test_a_turn_that_says_two_things_is_refused() -> None:
    turn = {"from": "gpt", "value": "red", "content": "blue"}

    with pytest.raises(LayerfuseError, match="says one thing as value and another as content"):
        read({"conversations": [TURNS[0], turn]})


def test_a_turn_of_two_speakers_is_refused() -> None:
    turn = {"from": "gpt", "role": "user", "value": "Colour?"}

    with pytest.raises(LayerfuseError, match="names one speaker as from and another as role"):
        read({"conversations": [turn, TURNS[1]]})


@pytest.mark.parametrize("literal_answers", [False, True])
def test_a_character_that_stands_for_a_marker_is_refused(literal_answers: bool) -> None:
    """An icon of U+E002 would be learned as `<image>`."""
    turn = {"from": "gpt", "value": "red \ue002"}

    with pytest.raises(LayerfuseError, match=r"holds the private-use character U\+E002"):
        read({"conversations": [TURNS[0], turn]}, literal_answers=literal_answers)


def test_a_speaker_may_be_named_in_both_ways() -> None:
    turn = {"from": "human", "role": "user", "value": "Colour?"}

    sample = read({"conversations": [turn, TURNS[1]]})

    assert sample.messages[0] == {"role": "user", "content": "Colour?"}


@pytest.mark.parametrize(
    "part",
    [
        {"type": "text", "text": "Colour?", "image": "a.png"},
        {"type": "image", "image": "a.png", "text": "Colour?"},
        {"type": "image", "image": "a.png", "path": "b.png"},
        {"type": "image", "source": {"data": "iVBOR"}},
    ],
)
def test_a_part_that_holds_more_than_is_read_is_refused(part: dict[str, Any]) -> None:
    with pytest.raises(LayerfuseError, match="which nobody reads there"):
        read({"messages": [{"role": "user", "content": [part]}, TURNS[1]]})
