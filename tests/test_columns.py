"""What is read of a record, under which names, and what is refused because nobody reads it."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image
from pydantic import ValidationError

from layerfuse.data.from_records import Reading, from_columns, from_llava
from layerfuse.data.hub_dataset import DatasetRows
from layerfuse.data.lazy_records import Samples
from layerfuse.data.sample import Sample
from layerfuse.data.sources import faults, load
from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.questions import questions
from layerfuse.recipe.schema import Data

TURNS = [{"from": "human", "value": "Colour?"}, {"from": "gpt", "value": "red"}]


def read(record: dict[str, Any], **settings: Any) -> Sample:
    """A record of a JSON file as a sample."""
    return from_llava(0, record, Reading(Path("folder"), **settings))


def write_json(folder: Path, *records: dict[str, Any]) -> str:
    """A JSON file of records; its path."""
    file = folder / "d.json"
    file.write_text(json.dumps(records), encoding="utf-8")
    return str(file)


def png() -> bytes:
    """The bytes of a small red PNG."""
    file = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(file, "PNG")
    return file.getvalue()


def save_dataset(folder: Path, **columns: Any) -> str:
    """A saved dataset in which `image`, `imgs` and `scan` are columns of pictures; its path."""
    dataset = datasets.Dataset.from_dict(columns)
    for column in {"image", "imgs", "scan"} & columns.keys():
        dataset = dataset.cast_column(column, datasets.Image())
    dataset.save_to_disk(folder / "set")
    return str(folder / "set")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("imgs", ["a.png"]),
        ("filename", "a.png"),
        ("file_name", "a.png"),
        ("imagePath", "photos/a"),
        ("IMAGE", "a.png"),
        ("photo", "a"),
        ("video", "a.mp4"),
        ("audio", {"path": "a.wav"}),
        ("video_frames", ["1.jpg", "2.jpg"]),
        ("where", "pictures/a.JPG"),
        ("content", "data:image/png;base64,AAAA"),
        ("url", "https://example.org/a.webp?size=2"),
        ("nested", {"first": ["b.tiff"]}),
        ("system_prompt", "Be brief."),
        ("tools", [{"name": "search"}]),
        ("choices", ["red", "blue"]),
    ],
)
def test_a_key_that_names_media_or_changes_what_is_asked_is_refused(key: str, value: Any) -> None:
    with pytest.raises(LayerfuseError, match=rf"sample 0: nobody reads '{key}'.*Read are id, im"):
        read({key: value, "conversations": TURNS})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_id", "000042"),
        ("image_width", 640),
        ("image_caption", "a red square"),
        ("num_images", 3),
        ("video", None),
        ("imgs", []),
        ("system_prompt", ""),
        ("source", "coco"),
        ("model", "gpt-4"),
        ("split", "val"),
        ("question_type", "colour"),
        ("coco_url", "https://example.org/a.jpg"),
        ("image_url", "https://example.org/a.jpg"),
    ],
)
def test_information_about_a_picture_that_is_read_is_no_mistake(key: str, value: Any) -> None:
    sample = read({key: value, "image": "a.png", "conversations": TURNS})

    assert [picture.name for picture in sample.pictures] == ["folder/a.png"]


def test_keys_of_a_turn_that_nobody_reads_are_refused() -> None:
    turns = [{"role": "user", "content": "Colour?", "images": ["a.png"]}, TURNS[1]]

    with pytest.raises(LayerfuseError, match=r"nobody reads 'images'.*Read are from, role"):
        read({"conversations": turns})


@pytest.mark.parametrize(
    "marker",
    [
        "<video>",
        "<img>",
        "<Image>",
        "<image_1>",
        "<image1>",
        "<|image|>",
        "<|vision_start|>",
        "<|video_pad|>",
        "<ImageHere>",
        "<audio>",
        "<img/>",
        "[IMG]",
    ],
)
def test_a_marker_that_nobody_reads_is_refused(marker: str) -> None:
    turns = [{"from": "human", "value": f"{marker}\nWhat?"}, TURNS[1]]

    with pytest.raises(LayerfuseError) as caught:
        read({"image": "a.png", "conversations": turns})

    assert f"a turn of the user holds {marker}, a marker that nobody reads" in str(caught.value)


@pytest.mark.parametrize(
    "text", ["1 < 2 > 0", "<b>bold</b>", "[image]", '<img src="a.png">', "<s>"]
)
def test_other_words_in_brackets_are_text(text: str) -> None:
    sample = read({"conversations": [{"from": "human", "value": text}, TURNS[1]]})

    assert sample.messages[0]["content"] == text


def test_markers_in_answers_are_text_where_the_recipe_says_so() -> None:
    answer = {"from": "gpt", "value": "Write <image> and <video>."}
    record = {"image": "a.png", "conversations": [TURNS[0], answer]}

    with pytest.raises(LayerfuseError, match=r"turn of the assistant holds <video>.*literal_answ"):
        read(record)
    sample = read(record, literal_answers=True)

    assert len(sample.pictures) == 1
    assert sample.messages[0]["content"] == "<image>\nColour?"
    assert "<image>" not in sample.messages[1]["content"]


def test_the_answer_to_expect_is_what_people_wrote() -> None:
    answer = {"from": "gpt", "value": "Write <image>."}
    record = {"image": "a.png", "conversations": [TURNS[0], answer]}

    (question,) = questions([read(record, literal_answers=True)])

    assert question.answer == "Write <image>."


def test_columns_are_read_under_other_names(tmp_path: Path) -> None:
    record = {"uid": "first", "imgs": ["a.png", "b.png"], "talk": TURNS}
    path = write_json(tmp_path, record)
    data = Data(path=path, columns={"id": "uid", "images": "imgs", "conversations": "talk"})

    (sample,) = load(data)

    assert sample.id == "first"
    assert [Path(picture.name).name for picture in sample.pictures] == ["a.png", "b.png"]
    assert sample.messages[1]["content"] == "red"


def test_a_column_that_is_left_out_on_purpose_is_no_mistake(tmp_path: Path) -> None:
    path = write_json(
        tmp_path, {"image": "a.png", "mask": "m.png", "video": "v.mp4", "conversations": TURNS}
    )

    (sample,) = load(Data(path=path, ignore_columns=["mask", "video"]))

    assert len(sample.pictures) == 1


def test_a_column_that_no_record_has_is_refused(tmp_path: Path) -> None:
    path = write_json(tmp_path, {"image": "a.png", "conversations": TURNS})

    with pytest.raises(LayerfuseError, match=r"has no column picture, .* it has conversations, im"):
        load(Data(path=path, columns={"image": "picture"}))
    with pytest.raises(LayerfuseError, match="has no column masks"):
        load(Data(path=path, ignore_columns=["masks"]))


def test_two_columns_of_one_name_are_refused() -> None:
    record = {"image": "a.png", "crop": "b.png", "conversations": TURNS}

    with pytest.raises(LayerfuseError, match=r"reads 'crop' as 'image', but .*ignore_columns: \[i"):
        read(record, columns={"image": "crop"})


@pytest.mark.parametrize(
    "settings",
    [
        {"columns": {"picture": "imgs"}},
        {"columns": {"image": "a", "images": "a"}},
        {"columns": {"image": "a"}, "ignore_columns": ["a"]},
    ],
)
def test_names_that_mean_nothing_are_refused_in_the_recipe(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Data.model_validate({"path": "d.json", **settings})


def test_both_spellings_of_one_thing_are_refused() -> None:
    with pytest.raises(LayerfuseError, match="has both image and images"):
        read({"image": "a.png", "images": ["b.png"], "conversations": TURNS})
    with pytest.raises(LayerfuseError, match="has both conversations and messages"):
        read({"conversations": TURNS, "messages": TURNS})


def test_a_system_text_is_the_first_turn() -> None:
    sample = read({"system": "Be brief.", "image": "a.png", "conversations": TURNS})

    assert sample.messages[0] == {"role": "system", "content": "Be brief."}
    assert sample.messages[1]["content"] == "<image>\nColour?"


def test_a_dataset_with_an_image_column_that_nobody_reads_is_refused(tmp_path: Path) -> None:
    picture = {"bytes": png(), "path": None}
    path = save_dataset(tmp_path, imgs=[picture], question=["Colour?"], answer=["red"])

    with pytest.raises(LayerfuseError, match=r"nobody reads the column 'imgs', which holds media"):
        load(Data(dataset=path))
    (sample,) = load(Data(dataset=path, columns={"image": "imgs"}))

    assert sample.pictures[0].read() == png()


def test_an_image_column_of_a_dataset_is_left_out_on_purpose(tmp_path: Path) -> None:
    picture = {"bytes": png(), "path": None}
    path = save_dataset(tmp_path, image=[picture], scan=[picture], answer=["red"])

    (sample,) = load(Data(dataset=path, ignore_columns=["scan"]))

    assert len(sample.pictures) == 1


def test_a_row_of_a_dataset_that_cannot_be_read_is_named() -> None:
    class Damaged(list[dict[str, Any]]):
        """Rows of which the second one cannot be decoded."""

        def __getitem__(self, index: Any) -> Any:
            if index == 1:
                raise OSError("damaged")
            return super().__getitem__(index)

    rows = DatasetRows(Damaged([{"answer": "a"}, {"answer": "b"}]), "set:train")
    samples = Samples(rows, lambda index, row: from_columns(index, row, Reading(Path())), rows.name)

    ((index, (_, reason)),) = faults(samples).items()

    assert index == 1
    assert reason == "sample 1: the row cannot be read: damaged (set:train, index 1)"


def test_a_row_beside_pictures_names_one(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    rows = [{"file_name": "a.png", "text": "a"}, {"text": "b"}]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")

    ((index, (_, reason)),) = faults(load(Data(path=str(tmp_path)))).items()

    assert index == 1
    assert "names no picture: a row needs file_name" in reason


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


def test_records_of_a_json_file_may_have_columns() -> None:
    sample = read({"image": "a.png", "question": "Colour?", "answer": "red"})

    assert [message["content"] for message in sample.messages] == ["<image>\nColour?", "red"]


@pytest.mark.parametrize("column", ["question", "answer", "text"])
def test_a_conversation_and_a_column_beside_it_are_refused(column: str) -> None:
    with pytest.raises(LayerfuseError, match=f"has a conversation and {column} too"):
        read({"conversations": TURNS, column: "other"})


def test_an_answer_and_a_text_are_refused() -> None:
    with pytest.raises(LayerfuseError, match="has both answer and text"):
        read({"answer": "red", "text": "A red square."})


def test_an_empty_column_beside_the_other_spelling_is_nothing() -> None:
    """Arrow writes both where rows differ."""
    turns = [
        {"from": None, "role": "user", "value": None, "content": "Colour?"},
        {"from": "gpt", "role": None, "value": "red", "content": None},
    ]

    of_columns = read({"answer": None, "text": "red"})
    of_turns = read({"conversations": None, "messages": turns})

    assert of_columns.messages[-1]["content"] == of_turns.messages[-1]["content"] == "red"


def test_two_turns_of_the_user_are_one_question() -> None:
    turns = [{"from": "human", "value": "<image>\nThis is a chair."}, *TURNS]

    sample = read({"image": "a.png", "conversations": turns})

    assert sample.messages[0]["content"] == "<image>\nThis is a chair.\nColour?"


def test_a_number_for_an_answer_is_named() -> None:
    with pytest.raises(LayerfuseError, match="its answer is 3, a int, not a text"):
        read({"question": "How many?", "answer": 3})
    with pytest.raises(LayerfuseError, match="its content is 3, no text"):
        read({"conversations": [TURNS[0], {"from": "gpt", "value": 3}]})


@pytest.mark.parametrize(
    ("key", "advice"),
    [("system_prompt", "{system: system_prompt}"), ("video", "{image: video}")],
)
def test_the_advice_names_what_a_key_could_be(key: str, advice: str) -> None:
    with pytest.raises(LayerfuseError) as caught:
        read({key: "a", "conversations": TURNS})

    assert f"`columns: {advice}`" in str(caught.value)


def test_a_picture_in_base64_is_read() -> None:
    part = {"type": "image", "base64": base64.b64encode(png()).decode()}

    sample = read({"messages": [{"role": "user", "content": [part]}, TURNS[1]]})

    assert sample.pictures[0].read() == png()


def test_options_that_would_do_nothing_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("red", encoding="utf-8")

    with pytest.raises(LayerfuseError, match="is a folder, and `images` is for a JSON file"):
        load(Data(path=str(tmp_path), images=str(tmp_path)))
    with pytest.raises(LayerfuseError, match="is a folder of captions without a table"):
        load(Data(path=str(tmp_path), columns={"answer": "caption"}))
    with pytest.raises(ValidationError, match="images is for a JSON file alone"):
        Data(dataset="set", images=str(tmp_path))
    with pytest.raises(ValidationError, match="generated scenes have no columns"):
        Data.model_validate({"scenes": {"count": 2}, "ignore_columns": ["a"]})


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


@pytest.mark.parametrize("value", ["b.png", "data:image/png;base64,AA", {"first": "b.png"}])
def test_media_in_a_turn_are_refused_whatever_their_key(value: Any) -> None:
    with pytest.raises(LayerfuseError, match=r"nobody reads 'bild' .*of a turn"):
        read({"conversations": [{**TURNS[0], "bild": value}, TURNS[1]]})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("before", "b.png"),
        ("extra", {"images": ["b.png"]}),
        ("scan", "b.dcm#1"),
        ("b64", "iVBORw0KGgoAAAA"),
        ("mask", "m"),
        ("option_a", "red"),
        ("system_instruction", "Be brief."),
        ("Image", "b.png"),
        ("family", "colour"),
    ],
)
def test_keys_beside_a_picture_that_is_read(key: str, value: Any) -> None:
    with pytest.raises(LayerfuseError, match=f"nobody reads '{key}'"):
        read({"image": "a.png", key: value, "conversations": TURNS})


def test_information_may_be_as_deep_as_json_is() -> None:
    deep: Any = "x"
    for _ in range(3000):
        deep = [deep]

    assert read({"meta": deep, "conversations": TURNS}).messages[1]["content"] == "red"


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    """JSON's readers take the last, without a word."""
    talk = json.dumps(TURNS)
    (tmp_path / "d.jsonl").write_text(
        f'{{"image": "a.png", "image": "b.png", "conversations": {talk}}}'
    )

    with pytest.raises(LayerfuseError, match=r"line 1: the key 'image' stands twice"):
        load(Data(path=str(tmp_path / "d.jsonl")))
