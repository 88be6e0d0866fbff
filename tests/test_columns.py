"""What is read of a record, under which names, and what is refused because nobody reads it."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image
from pydantic import ValidationError

from layerfuse.data.from_records import Reading, from_columns
from layerfuse.data.hub_dataset import DatasetRows
from layerfuse.data.lazy_records import Samples
from layerfuse.data.sources import faults, load
from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.questions import questions
from layerfuse.recipe.data_source import Data
from tests.one_record import TURNS, png, read


def write_json(folder: Path, *records: dict[str, Any]) -> str:
    """A JSON file of records; its path."""
    file = folder / "d.json"
    file.write_text(json.dumps(records), encoding="utf-8")
    return str(file)


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
        ("Options", {"A": "red", "B": "blue"}),
        ("answer_choices", "['red', 'blue']"),
        ("option_1", 3),
        ("answerB", "blue"),
        ("distractor2", "blue"),
        ("loss_weight", 0.5),
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
        ("audio_language", "en"),
        ("clip_model", "ViT-B/32"),
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
        # As the tables of VQA have them
        ("multiple_choice_answer", "red"),
        ("answers", [{"answer": "red", "answer_confidence": "yes", "answer_id": 1}]),
        ("correct_choice_idx", 1),
        ("num_choices", "4"),
        ("answer_type", "other"),
        ("meta", {"image": {"width": 640, "format": "png"}, "image_id": "42"}),
        ("rationale", "It is red, as in a.png.\nSo it is."),
        ("bbox", [1, 2, 3, 4]),
        # Of what is shown, not of what is learned
        ("weight", 3),
        ("train", True),
        ("A", "a column of one letter alone"),
        ("图片描述", "a red square"),
    ],
)
def test_information_about_a_picture_that_is_read_is_no_mistake(key: str, value: Any) -> None:
    sample = read({key: value, "image": "a.png", "conversations": TURNS})

    assert [picture.name for picture in sample.pictures] == ["folder/a.png"]


@pytest.mark.parametrize(
    "value",
    [
        {"path": "pictures/1", "bytes": None},
        [{"bytes": b"GIF89a", "path": None}],
        bytearray(b"GIF89a"),
        {"first": {"image": {"path": "pictures/1"}}},
        {"first": {"image": ["pictures/1"]}},
        ["red", ["a.MP4"]],
        '["a.png", "b.png"]',
        " ![](a.png)\n",
        "a.png\nb.png",
        "data:application/octet-stream;base64,AAAA",
        "A" * 1200,
    ],
)
def test_media_are_told_by_their_value_whatever_their_key(value: Any) -> None:
    with pytest.raises(LayerfuseError, match=r"nobody reads 'before' .*, which names media"):
        read({"image": "a.png", "before": value, "conversations": TURNS})


@pytest.mark.parametrize("key", ["图片路径", "картинка", "imágenes", "fotos", "이미지"])
def test_media_are_told_by_keys_of_other_languages(key: str) -> None:
    with pytest.raises(LayerfuseError, match=f"nobody reads '{key}' .*, which names media"):
        read({"image": "a.png", key: "pictures/1", "conversations": TURNS})


@pytest.mark.parametrize("letters", ["ABC", "ab", "1234"])
def test_options_in_columns_of_their_own_are_refused(tmp_path: Path, letters: str) -> None:
    options = {letter: f"option {letter}" for letter in letters}
    row = {"image": "a.png", "question": "Which?", "answer": "option A", **options}
    path = write_json(tmp_path, row)

    ((_, reason),) = faults(load(Data(path=path))).values()
    (sample,) = load(Data(path=path, ignore_columns=list(letters)))

    # All at once, to be copied.
    assert f"`ignore_columns: [{', '.join(letters)}]`" in reason
    assert sample.messages[0]["content"] == "<image>\nWhich?"


@pytest.mark.parametrize(
    ("mark", "value"),
    [
        ("weight", 0),
        ("weight", 0.5),
        ("loss", False),
        ("train", False),
        ("train", "false"),
        ("masked", True),
        ("mask", 1),
        ("options", ["red", "blue"]),
    ],
)
def test_a_turn_that_is_learned_otherwise_is_refused(mark: str, value: Any) -> None:
    with pytest.raises(LayerfuseError, match=f"nobody reads '{mark}' .*of a turn"):
        read({"conversations": [TURNS[0], {**TURNS[1], mark: value}]})


@pytest.mark.parametrize(
    ("mark", "value"),
    [("weight", 1), ("weight", 1.0), ("loss", True), ("train", "True"), ("masked", False)],
)
def test_a_turn_that_is_learned_as_any_other_is_read(mark: str, value: Any) -> None:
    sample = read({"conversations": [TURNS[0], {**TURNS[1], mark: value}]})

    assert sample.messages[1]["content"] == "red"


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
        "[Image 1]",
        "{{image}}",
        "< image >",
        "<image 1>",
        "<image:0>",
        "</image>",
        "<im_patch>",
        "<vid>",
        "<imgpad>",
        "<|imagepad|>",
        "$image$",
    ],
)
def test_a_marker_that_nobody_reads_is_refused(marker: str) -> None:
    turns = [{"from": "human", "value": f"{marker}\nWhat?"}, TURNS[1]]

    with pytest.raises(LayerfuseError) as caught:
        read({"image": "a.png", "conversations": turns})

    assert f"a turn of the user holds {marker}, a marker that nobody reads" in str(caught.value)


@pytest.mark.parametrize("marker", ["\uff1cimage\uff1e", "&lt;image&gt;", "<image\u200b>"])
def test_a_marker_in_other_characters_is_refused(marker: str) -> None:
    turns = [{"from": "human", "value": f"{marker}What?"}, TURNS[1]]

    with pytest.raises(LayerfuseError, match="holds <image> in other characters"):
        read({"image": "a.png", "conversations": turns})


@pytest.mark.parametrize(
    "text",
    [
        "1 < 2 > 0",
        "<b>bold</b>",
        "[1]",
        "<|im_start|>",
        "{x}",
        "$5 and an image for $6",
        '<img src="a.png">',
        "<s>",
    ],
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
