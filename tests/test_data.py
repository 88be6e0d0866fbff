"""Samples from LLaVA files, from folders of images and from generated scenes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from layerfuse.data.lazy_records import Samples
from layerfuse.data.sources import faults, load
from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.questions import questions
from layerfuse.recipe.data_source import Data
from layerfuse.vision.picture import Picture
from tests.sample_files import (
    ids_of,
    last_texts,
    load_path,
    load_records,
    only_fault,
    save_lines,
    save_picture,
    texts_of,
    turns,
)

pytestmark = pytest.mark.usefixtures("home")


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_llava_files(tmp_path: Path, name: str) -> None:
    save_picture(tmp_path / "a.png")
    save_picture(tmp_path / "b" / "c.png")
    two_turns = {
        "id": "x",
        "image": "a.png",
        "conversations": turns("<image>\nWhat?", "A", "Why?", "B"),
    }
    # An id may be a number, and a record may show several images.
    two_images = {
        "id": 7,
        "image": ["a.png", "b/c.png"],
        "conversations": turns("<image><image> Same?", "no"),
    }
    text_only = {
        "id": "text",
        "conversations": turns("Hello", "Hi"),
    }
    unanswered_end = {
        "id": "end",
        "image": "b/c.png",
        "conversations": turns("No marker", "yes", "unanswered"),
    }
    empty_answer = {
        "id": "hole",
        "conversations": turns("one", "", "two", "2"),
    }
    records = [
        two_turns,
        two_images,
        text_only,
        unanswered_end,
        empty_answer,
    ]
    file = tmp_path / name
    if name == "data.jsonl":
        save_lines(file, *records)
    else:
        file.write_text(json.dumps(records))

    samples = load_path(file)

    assert not faults(samples)
    assert ids_of(samples) == ["x", "7", "text", "end", "hole"]
    num_pictures = [len(sample.pictures) for sample in samples]
    assert num_pictures == [1, 2, 0, 1, 0]
    first_picture = samples[0].pictures[0]
    assert first_picture.name == str(tmp_path / "a.png")
    assert samples[0].messages[2] == {"role": "user", "content": "Why?"}
    # An image without a marker is shown before the first turn; what nobody answered teaches
    # nothing.
    assert texts_of(samples[3]) == ["<image>\nNo marker", "yes"]
    assert texts_of(samples[4]) == ["two", "2"]


def test_the_image_of_an_unanswered_first_question_is_kept(tmp_path: Path) -> None:
    # The marker stands in the question that is dropped: the sample would lose its image.
    record = {
        "id": "x",
        "image": save_picture(tmp_path / "a.png"),
        "conversations": turns("<image>\nfirst", "", "second", "2"),
    }

    samples = load_records(tmp_path, record)

    assert texts_of(samples[0]) == ["<image>\nsecond", "2"]


def test_images_in_another_folder_and_limit(tmp_path: Path) -> None:
    save_picture(tmp_path / "pictures" / "a.png")
    records = []
    for answer in range(5):
        record = {
            "image": "a.png",
            "conversations": turns("<image>", str(answer)),
        }
        records.append(record)
    file = tmp_path / "d.json"
    file.write_text(json.dumps(records))

    data = Data(
        path=str(file),
        images=str(tmp_path / "pictures"),
        limit=3,
    )
    samples = load(data)

    assert not faults(samples)
    # A record without an id is called by its index.
    assert ids_of(samples) == ["0", "1", "2"]

    # The first samples and the others, so that one file holds validation data too.
    first = load(data.model_copy(update={"limit": 2}))
    others = load(data.model_copy(update={"skip": 2, "limit": None}))
    assert ids_of(first) == ["0", "1"]
    assert ids_of(others) == ["2", "3", "4"]
    behind_them = load(data.model_copy(update={"skip": 2, "limit": 1}))
    assert ids_of(behind_them) == ["2"]
    with pytest.raises(LayerfuseError, match="skip: 5 leaves none of the 5 samples"):
        load(data.model_copy(update={"skip": 5}))


def test_image_folders(tmp_path: Path) -> None:
    captioned = tmp_path / "captioned"
    for number in range(2):
        save_picture(captioned / f"{number}.png")
        caption_file = captioned / f"{number}.txt"
        caption_file.write_text(f"caption {number}")

    samples = load_path(captioned)

    assert last_texts(samples) == ["caption 0", "caption 1"]
    question = samples[0].messages[0]["content"]
    assert question.startswith("<image>")

    table_folder = tmp_path / "table"
    save_picture(table_folder / "a.png")
    row = {
        "file_name": "a.png",
        "question": "What?",
        "answer": "red",
    }
    save_lines(table_folder / "metadata.jsonl", row)

    sample = load_path(table_folder)[0]

    assert texts_of(sample) == ["<image>\nWhat?", "red"]


def test_a_marker_within_a_caption_is_named(tmp_path: Path) -> None:
    """The words before it would be learned as if they could be known without the picture."""
    save_picture(tmp_path / "a.png")
    caption_file = tmp_path / "a.txt"

    caption_file.write_text("<image> a cat")
    assert texts_of(load_path(tmp_path)[0]) == ["<image>\n", "a cat"]
    caption_file.write_text("a cat <image>")

    ((_, reason),) = faults(load_path(tmp_path)).values()
    assert "its caption holds <image> behind other words" in reason


def load_row(folder: Path, row: dict[str, Any], **settings: Any) -> Samples:
    """The samples of a folder with a table of one row."""
    for name in ("a.png", "b.png"):
        save_picture(folder / name)
    save_lines(folder / "metadata.jsonl", row)
    return load(Data(path=str(folder), **settings))


@pytest.mark.parametrize("column", ["image", "images", "picture"])
def test_a_row_that_names_two_pictures_is_a_bad_sample(tmp_path: Path, column: str) -> None:
    row = {"file_name": "a.png", column: "b.png", "text": "red"}
    columns = {}
    if column == "picture":
        columns = {"image": column}

    fault = only_fault(load_row(tmp_path, row, columns=columns))
    (by_file_name,) = load_row(tmp_path, row, ignore_columns=[column])
    (by_column,) = load_row(tmp_path, row, ignore_columns=["file_name"], columns=columns)
    (of_one_picture,) = load_row(tmp_path, {**row, column: "a.png"}, columns=columns)

    assert fault.sample_id == "a.png"
    assert f"has both file_name ('a.png') and {column} ('b.png')" in fault.reason
    assert [Path(picture.name).name for picture in by_file_name.pictures] == ["a.png"]
    assert [Path(picture.name).name for picture in by_column.pictures] == ["b.png"]
    assert len(of_one_picture.pictures) == 1


def test_an_empty_id_is_none(tmp_path: Path) -> None:
    assert ids_of(load_records(tmp_path, {"id": "", "text": "red"})) == ["0"]


def test_a_row_is_called_by_its_id_whatever_its_column(tmp_path: Path) -> None:
    row = {"file_name": "a.png", "uid": "first", "text": "red"}

    assert ids_of(load_row(tmp_path, row)) == ["a.png"]
    assert ids_of(load_row(tmp_path, row, columns={"id": "uid"})) == ["first"]


@pytest.mark.parametrize(
    "value",
    [
        {"text": "Chairs", "data": [{"id": "a"}]},
        {"id": "v1", "annotations": [{"image": "a.png", "conversations": turns("a", "b")}]},
    ],
)
def test_a_mapping_around_the_records_is_refused(tmp_path: Path, value: dict[str, Any]) -> None:
    for name, content in (("d.json", value), ("e.json", [value])):
        (tmp_path / name).write_text(json.dumps(content))
        with pytest.raises(LayerfuseError, match="holds one mapping, of which"):
            load_path(tmp_path / name)


def test_one_record_with_a_list_of_mappings_is_a_record(tmp_path: Path) -> None:
    record = {"text": "red", "boxes": [{"label": "chair", "at": [1, 2]}], "data": ["a"]}

    assert last_texts(load_records(tmp_path, record)) == ["red"]


def test_families_follow_their_answers(tmp_path: Path) -> None:
    # The second question has no answer: without it the third family would count for the wrong one.
    record: dict[str, Any] = {
        "id": "x",
        "conversations": turns("one", "1", "none", "", "two", "2"),
        "families": ["a", "b", "c"],
    }
    samples = load_records(tmp_path, record)
    assert samples[0].families == ("a", "c")

    record["families"] = ["a", "b"]
    samples = load_records(tmp_path, record)
    with pytest.raises(LayerfuseError, match="sample x: 2 families for 3 answers"):
        samples[0]


def test_scenes_are_read_by_the_same_loader() -> None:
    scenes = {
        "count": 12,
        "split": "test",
        "questions": 3,
    }
    samples = load(Data.model_validate({"scenes": scenes}))
    assert not faults(samples)
    assert len(samples) == 12
    for sample in samples:
        assert len(sample.families) == 3
        assert len(list(questions([sample]))) == 3

    scenes_with_captions = {**scenes, "captions": True}
    captions = load(Data.model_validate({"scenes": scenes_with_captions}))
    assert ids_of(captions) == ids_of(samples)
    assert captions[0].messages[0]["content"] == "<image>"


BAD_RECORDS = [
    (
        {"conversations": turns("only a question")},
        "sample q: no answer to learn",
    ),
    (
        {"conversations": turns("<image>", "A")},
        "sample q: 1 <image> markers, 0 im",
    ),
    (
        {"image": "a.png", "conversations": turns("<image><image>", "A")},
        "2 <image>",
    ),
    (
        {"image": "gone.png", "conversations": turns("<image>", "A")},
        "sample q: no i",
    ),
    (
        {},
        "sample q: no conversations; its keys are",
    ),
    (
        {"conversations": [{"from": "robot", "value": "x"}]},
        "cannot read the turn",
    ),
    (
        {"image": 7, "conversations": turns("<image>", "A")},
        "sample q: an image is a int",
    ),
]


@pytest.mark.parametrize(("content", "message"), BAD_RECORDS)
def test_bad_samples_are_named(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    save_picture(tmp_path / "a.png")

    samples = load_records(tmp_path, {"id": "q", **content})

    fault = only_fault(samples)
    assert re.search(message, fault.reason)


def test_bad_files(tmp_path: Path) -> None:
    missing = tmp_path / "none.json"
    with pytest.raises(LayerfuseError, match="no such file or folder of samples"):
        load_path(missing)

    broken = tmp_path / "broken.json"
    broken.write_text("[{")
    with pytest.raises(LayerfuseError, match=r"broken\.json is not valid JSON"):
        load_path(broken)

    mapping = tmp_path / "dict.json"
    mapping.write_text("{}")
    with pytest.raises(LayerfuseError, match="must hold a list of conversations, not dict"):
        load_path(mapping)

    empty = tmp_path / "empty.json"
    empty.write_text("[]")
    with pytest.raises(LayerfuseError, match="no samples in"):
        load_path(empty)

    # JSON is UTF-8: another encoding is not guessed.
    latin = tmp_path / "latin.json"
    latin.write_bytes('["é"]'.encode("latin-1"))
    with pytest.raises(LayerfuseError, match=r"cannot read .*latin\.json"):
        load_path(latin)


def test_bad_folders(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(LayerfuseError, match="no images"):
        load_path(folder)

    save_picture(folder / "a.png")
    with pytest.raises(LayerfuseError, match=r"no caption file .*a\.txt"):
        load_path(folder)

    table = folder / "metadata.jsonl"
    table.write_text('{"file_name": "a.png"}\n{')
    with pytest.raises(LayerfuseError, match=r"metadata\.jsonl is not valid JSON in line 2"):
        load_path(folder)


def test_a_caption_that_cannot_be_read_is_a_bad_sample(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_picture(tmp_path / f"{name}.png")
        caption_file = tmp_path / f"{name}.txt"
        caption_file.write_text("caption")
    samples = load_path(tmp_path)

    # Captions are read when they are needed: this one changes after the folder was looked at.
    latin = "é".encode("latin-1")
    (tmp_path / "b.txt").write_bytes(latin)

    fault = only_fault(samples)
    assert fault.index == 1
    assert "b.txt" in fault.reason


def test_broken_images_are_named(tmp_path: Path) -> None:
    text = tmp_path / "text.png"
    text.write_text("not an image")
    cut = tmp_path / "cut.png"
    save_picture(cut)
    whole = cut.read_bytes()
    half = whole[: len(whole) // 2]
    cut.write_bytes(half)

    for file in (text, cut):
        picture = Picture(str(file))
        with pytest.raises(LayerfuseError, match=rf"cannot read the image .*{file.name}"):
            picture.open()


def test_grey_and_transparent_images_become_rgb(tmp_path: Path) -> None:
    file = tmp_path / "image.png"
    for mode in ("L", "RGBA", "P", "I;16"):
        Image.new(mode, (4, 4)).save(file)

        decoded = Picture(str(file)).open()

        assert decoded.mode == "RGB"
