"""The files of generated scenes: written whole or not at all, the same for the same settings."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from layerfuse.data.scene_files import write
from layerfuse.data.scenes import FAMILIES, Scene, sample
from layerfuse.data.sources import load
from layerfuse.errors import LayerfuseError
from layerfuse.recipe.data_source import Data, Scenes


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file of a folder, by its path in there."""
    content_by_path = {}
    for file in folder.rglob("*"):
        if file.is_file():
            path = str(file.relative_to(folder))
            content_by_path[path] = file.read_bytes()
    return content_by_path


def read_list(file: Path) -> list[dict[str, Any]]:
    """The records of a JSON file."""
    return json.loads(file.read_text("utf-8"))


def conversations(folder: Path) -> list[dict[str, Any]]:
    """The conversations about the scenes of a folder."""
    return read_list(folder / "conversations.json")


def said_by(record: dict[str, Any], speaker: str) -> list[str]:
    """What one of the two says in a conversation."""
    texts = []
    for turn in record["conversations"]:
        if turn["from"] == speaker:
            texts.append(turn["value"])
    return texts


def test_the_same_settings_give_the_same_files(tmp_path: Path) -> None:
    first = write(tmp_path / "deep" / "a", 12, "test", seed=3, questions=5)
    same_settings = write(tmp_path / "b", 12, "test", seed=3, questions=5)
    other_seed = write(tmp_path / "c", 12, "test", seed=4, questions=5)

    assert first == tmp_path / "deep" / "a"
    assert contents(same_settings) == contents(first)
    assert contents(other_seed) != contents(first)


def test_short_wordings_ask_the_same_of_the_same_pictures(tmp_path: Path) -> None:
    asked = conversations(write(tmp_path / "asked", 6, "train", questions=8))
    short = conversations(write(tmp_path / "short", 6, "train", questions=8, wording="short"))

    for question, word in zip(asked, short, strict=True):
        assert said_by(word, "gpt") == said_by(question, "gpt")
        for family, text in zip(word["families"], said_by(word, "human"), strict=True):
            assert text.removeprefix("<image>\n").startswith(family)
            assert text.endswith(":")


def test_scenes_of_another_wording_are_not_taken_for_these(tmp_path: Path) -> None:
    write(tmp_path / "scenes", 3, "train", wording="short")

    with pytest.raises(LayerfuseError, match="'wording': 'short'"):
        write(tmp_path / "scenes", 3, "train")


def test_each_wording_of_a_recipe_has_scenes_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAYERFUSE_HOME", str(tmp_path))

    for wording in ("question", "short", "question"):
        scenes = Scenes.model_validate({"count": 2, "wording": wording})
        first = load(Data(scenes=scenes))[0]
        asked = first.messages[0]["content"]
        assert asked.endswith(":") == (wording == "short")


@pytest.fixture(scope="module")
def twelve_scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of twelve scenes of a test split, with five questions each."""
    folder = tmp_path_factory.mktemp("scenes") / "data"
    return write(folder, 12, "test", seed=3, questions=5)


def test_pictures_are_those_of_the_scenes(twelve_scenes: Path) -> None:
    records = conversations(twelve_scenes)
    assert len(records) == 12
    scenes = sample(12, "test", seed=3)
    for number, (scene, record) in enumerate(zip(scenes, records, strict=True), start=1):
        assert record["id"] == f"test-{number:06d}"
        assert record["image"] == f"images/{number:06d}.png"
        # PNG is lossless.
        with Image.open(twelve_scenes / record["image"]) as picture:
            assert picture.mode == "RGB"
            assert picture.tobytes() == scene.render().tobytes()


def test_conversations_ask_about_their_scenes(twelve_scenes: Path) -> None:
    scenes = sample(12, "test", seed=3)
    for scene, record in zip(scenes, conversations(twelve_scenes), strict=True):
        speakers = [turn["from"] for turn in record["conversations"]]
        assert speakers == ["human", "gpt"] * 5
        # The picture is shown once, before the first question.
        questions = said_by(record, "human")
        assert questions[0].startswith("<image>\n")
        assert json.dumps(record["conversations"]).count("<image>") == 1
        expected_answers = []
        expected_categories = []
        for family in record["families"]:
            expected_answers.append(scene.answer(family))
            expected_categories.append(FAMILIES[family].category)
        assert said_by(record, "gpt") == expected_answers
        assert record["categories"] == expected_categories
        assert record["novel"] is scene.novel


def test_captions_describe_the_same_scenes(twelve_scenes: Path) -> None:
    records = conversations(twelve_scenes)
    captions = read_list(twelve_scenes / "captions.json")
    assert len(captions) == 12
    scenes = sample(12, "test", seed=3)
    for scene, record, caption in zip(scenes, records, captions, strict=True):
        assert caption["id"] == record["id"]
        assert caption["image"] == record["image"]
        assert caption["conversations"] == [
            {"from": "human", "value": "<image>"},
            {"from": "gpt", "value": scene.caption()},
        ]


def test_finished_folder_is_left_alone(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", 6, "train")
    picture = folder / "images" / "000001.png"
    picture.write_bytes(b"mine")

    # The share of novel pairs is no matter when training.
    assert write(folder, 6, "train", novel_share=0.5) == folder

    assert picture.read_bytes() == b"mine"


def test_a_folder_with_other_content_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", 6, "train")
    with pytest.raises(LayerfuseError, match=r"'count': 6.*'seed': 0"):
        write(folder, 7, "train", seed=1)

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("keep")
    with pytest.raises(LayerfuseError, match="foreign"):
        write(foreign, 6, "train")
    assert contents(foreign) == {"notes.txt": b"keep"}


def test_settings_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", 2, "train")
    (folder / "scenes.json").write_text("{")

    with pytest.raises(LayerfuseError, match=r"cannot read .*scenes\.json"):
        write(folder, 2, "train")


def test_another_process_may_write_the_same_folder_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def rename_too_late(self: Path, target: Path) -> Path:
        # After the pictures are drawn and before the folder is renamed, another process finishes.
        monkeypatch.undo()
        write(target, 2, "train")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_too_late)
    folder = write(tmp_path / "data", 2, "train")

    assert len(conversations(folder)) == 2
    names = [file.name for file in tmp_path.iterdir()]
    assert names == ["data"]


def test_empty_folder_is_filled(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()

    write(empty, 2, "train")

    assert len(conversations(empty)) == 2


def test_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Scene) -> Image.Image:
        raise OSError("disk full")

    monkeypatch.setattr(Scene, "render", fail)
    with pytest.raises(LayerfuseError, match=r"cannot write the scenes .*data: disk full"):
        write(tmp_path / "data", 4, "train")

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"count": 0}, "count=0"),
        ({"split": "valid"}, "'valid'"),
        ({"seed": -1}, "seed=-1"),
        ({"questions": 0}, "questions"),
        # There are eight families.
        ({"questions": 9}, "questions"),
        ({"novel_share": 1.5}, "novel_share=1.5"),
    ],
)
def test_bad_arguments_are_refused_before_writing(
    tmp_path: Path, wrong: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = {"count": 4, "split": "train", **wrong}

    with pytest.raises(LayerfuseError, match=message):
        write(tmp_path / "data", **arguments)

    assert list(tmp_path.iterdir()) == []


def count_by_family(records: Sequence[dict[str, Any]]) -> dict[str, Counter[str]]:
    """How often each answer of each family occurs in conversations."""
    counts: dict[str, Counter[str]] = {}
    for record in records:
        answers = said_by(record, "gpt")
        for family, answer in zip(record["families"], answers, strict=True):
            counts.setdefault(family, Counter())[answer] += 1
    return counts


def test_only_the_chosen_families_are_asked_and_stay_balanced(tmp_path: Path) -> None:
    chosen = ["colour", "texture", "presence"]

    folder = write(tmp_path / "few", 240, "train", questions=2, families=chosen)

    counts = count_by_family(conversations(folder))
    assert set(counts) == set(chosen)
    for family in chosen:
        numbers = counts[family].values()
        num_answers = len(FAMILIES[family].answers)
        assert len(numbers) == num_answers
        largest_share = max(numbers) / sum(numbers)
        assert largest_share < 1 / num_answers + 0.02


def test_families_that_cannot_be_asked_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    with pytest.raises(LayerfuseError, match=r"unknown question families .'smell'.; valid"):
        write(folder, 3, "train", families=["smell"])

    chosen = ["colour", "texture", "presence"]
    with pytest.raises(LayerfuseError, match="between 1 and 3, not 4"):
        write(folder, 3, "train", questions=4, families=chosen)

    assert not folder.exists()
