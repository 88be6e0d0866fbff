"""Samples from every kind of source; batches; the feature cache."""

import json
import pickle
import re
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image

from layerfuse.data.collate import Collator
from layerfuse.data.feature_store import FeatureStore, cached_features
from layerfuse.data.picture import Picture
from layerfuse.data.sources import DatasetRows, Samples, faults, load
from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.answer import questions
from layerfuse.model.processor import IGNORED, Processor
from layerfuse.recipe.schema import Data
from layerfuse.vision.encoder import Encoder
from tests import tiny


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERFUSE_HOME", str(tmp_path / "home"))


def picture(folder: Path, name: str, colour: str = "red") -> str:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), colour).save(folder / name)
    return name


def turns(*said: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(said)]


def from_json(folder: Path, *records: dict[str, Any], name: str = "data.json") -> Samples:
    text = json.dumps(records)
    if name.endswith("jsonl"):
        text = "\n".join(map(json.dumps, records))
    (folder / name).write_text(text)
    return load(Data(path=str(folder / name)))


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_llava_files(tmp_path: Path, name: str) -> None:
    one, two = picture(tmp_path, "a.png"), picture(tmp_path, "b/c.png")
    samples = from_json(
        tmp_path,
        {"id": "x", "image": one, "conversations": turns("<image>\nWhat?", "A", "Why?", "B")},
        {"id": 7, "image": [one, two], "conversations": turns("<image><image> Same?", "no")},
        {"id": "text", "conversations": turns("Hello", "Hi")},
        {"id": "end", "image": two, "conversations": turns("No marker", "yes", "unanswered")},
        {"id": "hole", "conversations": turns("one", "", "two", "2")},
        name=name,
    )
    assert not faults(samples)
    assert [s.id for s in samples] == ["x", "7", "text", "end", "hole"]
    assert [len(s.pictures) for s in samples] == [1, 2, 0, 1, 0]
    assert samples[0].pictures[0].name == str(tmp_path / "a.png")
    assert samples[0].messages[2] == {"role": "user", "content": "Why?"}
    assert [m["content"] for m in samples[3].messages] == ["<image>\nNo marker", "yes"]
    assert [m["content"] for m in samples[4].messages] == ["two", "2"]


def test_the_image_of_an_unanswered_first_question_is_kept(tmp_path: Path) -> None:
    name = picture(tmp_path, "a.png")
    talk = turns("<image>\nfirst", "", "second", "2")
    samples = from_json(tmp_path, {"id": "x", "image": name, "conversations": talk})
    assert [m["content"] for m in samples[0].messages] == ["<image>\nsecond", "2"]


def test_images_in_another_folder_and_limit(tmp_path: Path) -> None:
    picture(tmp_path / "pictures", "a.png")
    records = [{"image": "a.png", "conversations": turns("<image>", str(k))} for k in range(5)]
    (tmp_path / "d.json").write_text(json.dumps(records))
    source = Data(path=str(tmp_path / "d.json"), images=str(tmp_path / "pictures"), limit=3)
    samples = load(source)
    assert not faults(samples)
    assert [s.id for s in samples] == ["0", "1", "2"]


def test_image_folders(tmp_path: Path) -> None:
    captioned = tmp_path / "captioned"
    for k in range(2):
        picture(captioned, f"{k}.png")
        (captioned / f"{k}.txt").write_text(f"caption {k}")
    samples = load(Data(path=str(captioned)))
    assert [s.messages[-1]["content"] for s in samples] == ["caption 0", "caption 1"]
    assert samples[0].messages[0]["content"].startswith("<image>")
    table = tmp_path / "table"
    picture(table, "a.png")
    row = {"file_name": "a.png", "question": "What?", "answer": "red"}
    (table / "metadata.jsonl").write_text(json.dumps(row))
    sample = load(Data(path=str(table)))[0]
    assert [m["content"] for m in sample.messages] == ["<image>\nWhat?", "red"]


def test_hugging_face_datasets(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 30), "green")
    rows: dict[str, Any] = {"image": [image, image], "question": ["a?", "b?"], "answer": ["A", "B"]}
    made = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    made.save_to_disk(tmp_path / "set")
    samples = load(Data(dataset=str(tmp_path / "set"), limit=1))
    assert len(samples) == 1
    assert samples[0].pictures[0].open().getpixel((0, 0)) == (0, 128, 0)
    assert [m["content"] for m in samples[0].messages] == ["<image>\na?", "A"]
    assert len(load(Data(path=str(tmp_path / "set")))) == 2


@torch.no_grad()
def test_equal_ids_of_two_datasets_are_two_pictures(tmp_path: Path) -> None:
    """Row 0 of a train set and row 0 of a test set keep their own features."""
    shown = []
    for name in ("red", "blue"):
        rows = {"image": [Image.new("RGB", (40, 30), name)], "question": ["?"], "answer": ["!"]}
        made = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
        made.save_to_disk(tmp_path / name)
        shown.append(load(Data(dataset=str(tmp_path / name)))[0].pictures[0])
    store = cached_features(partial(encoder, [2]), tiny.image_processor(), shown)
    red, blue = (store.features([picture]).patches[0] for picture in shown)
    assert not torch.equal(red, blue)


def test_a_store_for_another_process_holds_no_pictures_of_a_dataset(tmp_path: Path) -> None:
    noise = [Image.effect_noise((400, 300), 60).convert("RGB") for _ in range(4)]
    rows: dict[str, Any] = {"image": noise, "question": ["?"] * 4, "answer": ["!"] * 4}
    made = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    made.save_to_disk(tmp_path / "set")
    pictures_of_set = [
        p for sample in load(Data(dataset=str(tmp_path / "set"))) for p in sample.pictures
    ]
    assert sum(len(p.read()) for p in pictures_of_set) > 100_000
    store = cached_features(partial(encoder, [2]), tiny.image_processor(), pictures_of_set)
    sent = pickle.dumps(store)
    assert len(sent) < 10_000
    expected = store.features(pictures_of_set).patches[0]
    with torch.no_grad():
        images = tiny.image_processor()([p.open() for p in pictures_of_set], return_tensors="pt")
        torch.testing.assert_close(encoder([2])(images["pixel_values"]).patches[0], expected)
    assert not torch.equal(expected[0], expected[1])
    for file in (tmp_path / "home").rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    other: FeatureStore = pickle.loads(sent)
    with torch.no_grad():  # the last is encoded again, from the dataset's file
        assert torch.equal(other.features(pictures_of_set).patches[0], expected)
    assert len(pickle.dumps(other)) < 10_000  # without the encoder that repaired it


def test_rows_of_datasets_hold_their_own_pictures(tmp_path: Path) -> None:
    """Lists of pictures, of which some are files, and rows without any."""
    colours = ["red", "lime", "blue", "white"]
    for name in colours:
        picture(tmp_path, f"{name}.png", name)
    red, lime, blue, white = (tmp_path / f"{name}.png" for name in colours)
    cells = [
        [{"bytes": red.read_bytes(), "path": None}, {"bytes": lime.read_bytes(), "path": "x"}],
        [{"bytes": None, "path": str(blue)}, {"bytes": white.read_bytes(), "path": None}],
        None,
    ]
    rows: dict[str, Any] = {"images": cells, "question": ["a?", "b?", "c?"], "answer": ["!"] * 3}
    rows["image"] = [None] * 3
    made = datasets.Dataset.from_dict(rows)
    made = made.cast_column("images", datasets.List(datasets.Image()))
    made.save_to_disk(tmp_path / "set")
    samples = load(Data(dataset=str(tmp_path / "set")))
    shown = [[p.open().getpixel((0, 0)) for p in sample.pictures] for sample in samples]
    assert shown == [[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (255, 255, 255)], []]
    assert len({p.name for sample in samples for p in sample.pictures}) == 4
    assert samples[2].messages[0]["content"] == "c?"
    held = {"image": {"bytes": None, "path": str(blue)}}  # saving a dataset fills such cells
    (file,) = DatasetRows([held], "set")[0]["image"]
    assert file.name == str(blue)


def test_families_follow_their_answers(tmp_path: Path) -> None:
    talk = turns("one", "1", "none", "", "two", "2")
    record = {"id": "x", "conversations": talk, "families": ["a", "b", "c"]}
    assert from_json(tmp_path, record)[0].families == ("a", "c")
    with pytest.raises(LayerfuseError, match="sample x: 2 kinds for 3 answers"):
        from_json(tmp_path, {**record, "families": ["a", "b"]})[0]


def test_a_missing_split_names_the_valid_ones(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"question": ["?"], "answer": ["!"]})
    datasets.DatasetDict({"dev": rows}).save_to_disk(tmp_path / "set")
    with pytest.raises(LayerfuseError, match=r"no split 'train'; valid: \['dev'\]"):
        load(Data(dataset=str(tmp_path / "set")))
    assert len(load(Data(dataset=str(tmp_path / "set"), split="dev"))) == 1


def test_scenes_are_read_by_the_same_loader() -> None:
    spec = {"count": 12, "split": "test", "questions": 3}
    samples = load(Data.model_validate({"scenes": spec}))
    assert not faults(samples)
    assert len(samples) == 12
    assert all(len(s.families) == 3 == len(list(questions([s]))) for s in samples)
    captions = load(Data.model_validate({"scenes": {**spec, "captions": True}}))
    assert [s.id for s in captions] == [s.id for s in samples]
    assert captions[0].messages[0]["content"] == "<image>"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"id": "q", "conversations": turns("only a question")}, "sample q: no answer to learn"),
        ({"id": "q", "conversations": turns("<image>", "A")}, "sample q: 1 <image> markers, 0 im"),
        ({"id": "q", "image": "a.png", "conversations": turns("<image><image>", "A")}, "2 <image>"),
        (
            {"id": "q", "image": "gone.png", "conversations": turns("<image>", "A")},
            "sample q: no i",
        ),
        ({"id": "q"}, "sample q: no conversations; its keys are"),
        ({"id": "q", "conversations": [{"from": "robot", "value": "x"}]}, "cannot read the turn"),
        (
            {"id": "q", "image": 7, "conversations": turns("<image>", "A")},
            "sample q: an image is a int",
        ),
    ],
)
def test_bad_samples_are_named(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    picture(tmp_path, "a.png")
    ((_, reason),) = faults(from_json(tmp_path, record)).values()
    assert re.search(message, reason)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(LayerfuseError, match="no such file or folder of samples"):
        load(Data(path=str(tmp_path / "none.json")))
    (tmp_path / "broken.json").write_text("[{")
    with pytest.raises(LayerfuseError, match=r"broken\.json is not valid JSON"):
        load(Data(path=str(tmp_path / "broken.json")))
    (tmp_path / "dict.json").write_text("{}")
    with pytest.raises(LayerfuseError, match="must hold a list of conversations, not dict"):
        load(Data(path=str(tmp_path / "dict.json")))
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(LayerfuseError, match="no samples in"):
        load(Data(path=str(tmp_path / "empty.json")))
    (tmp_path / "folder").mkdir()
    with pytest.raises(LayerfuseError, match="no images"):
        load(Data(path=str(tmp_path / "folder")))
    picture(tmp_path / "folder", "a.png")
    with pytest.raises(LayerfuseError, match=r"no caption file .*a\.txt"):
        load(Data(path=str(tmp_path / "folder")))
    (tmp_path / "folder" / "metadata.jsonl").write_text('{"file_name": "a.png"}\n{')
    with pytest.raises(LayerfuseError, match=r"metadata\.jsonl is not valid JSON in line 2"):
        load(Data(path=str(tmp_path / "folder")))
    (tmp_path / "latin.json").write_bytes('["é"]'.encode("latin-1"))
    with pytest.raises(LayerfuseError, match=r"cannot read .*latin\.json"):
        load(Data(path=str(tmp_path / "latin.json")))


def test_datasets_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "state.json").write_text("{")
    for name in ("set", "missing"):
        with pytest.raises(LayerfuseError, match=rf"cannot read the dataset .*{name}"):
            load(Data(dataset=str(tmp_path / name)))


def test_a_caption_that_cannot_be_read_is_a_bad_sample(tmp_path: Path) -> None:
    for name in ("a", "b"):
        picture(tmp_path, f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("caption")
    samples = load(Data(path=str(tmp_path)))
    (tmp_path / "b.txt").write_bytes("é".encode("latin-1"))
    ((index, (_, reason)),) = faults(samples).items()
    assert index == 1
    assert "b.txt" in reason


def test_broken_images_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not an image")
    picture(tmp_path, "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    for name in ("text.png", "cut.png"):
        with pytest.raises(LayerfuseError, match=rf"cannot read the image .*{name}"):
            Picture(str(tmp_path / name)).open()


def test_grey_and_transparent_images_become_rgb(tmp_path: Path) -> None:
    for mode in ("L", "RGBA", "P", "I;16"):
        Image.new(mode, (4, 4)).save(tmp_path / "image.png")
        assert Picture(str(tmp_path / "image.png")).open().mode == "RGB"


def pictures(folder: Path, count: int = 5) -> list[Picture]:
    names = [picture(folder, f"{k}.png", f"rgb({40 * k},0,90)") for k in range(count)]
    return [Picture(str(folder / name)) for name in names]


def encoder(layers: list[int]) -> Encoder:
    torch.manual_seed(3)
    return Encoder.from_config(tiny.vision_config("dinov2"), [*layers, 4], (2, 2)).eval()


def test_collator_pads_right_and_labels_answers(tmp_path: Path) -> None:
    name = picture(tmp_path, "a.png")
    samples = from_json(
        tmp_path,
        {"id": "x", "image": [name, name], "conversations": turns("<image><image> Same?", "yes")},
        {"id": "t", "conversations": turns("Hi", "Hello there")},
    )
    processor = Processor(tiny.image_processor(), tiny.tokenizer(), patch_size=tiny.PATCH)
    batch = Collator(processor, "chat", 512, None)(samples[:])
    assert batch["pixel_values"].shape[0] == 2
    assert (batch["input_ids"] == tiny.IMAGE_ID).sum(dim=1).tolist() == [32, 0]
    lengths = batch["attention_mask"].sum(dim=1)
    for row, length in enumerate(lengths.tolist()):
        assert bool(batch["attention_mask"][row, :length].all())
        assert bool((batch["labels"][row, length:] == IGNORED).all())
    store = cached_features(partial(encoder, [2]), processor.image_processor, samples[0].pictures)
    pooled = Processor(
        tiny.image_processor(), tiny.tokenizer(), patch_size=tiny.PATCH, token_grid=(2, 2)
    )
    batch = Collator(pooled, "chat", 512, store)(samples[:])
    assert batch["features"].patches[0].shape == (2, 4, 24)
    assert (batch["input_ids"] == tiny.IMAGE_ID).sum(dim=1).tolist() == [8, 0]


def test_collator_names_the_sample(tmp_path: Path) -> None:
    samples = from_json(tmp_path, {"id": "long", "conversations": turns("word " * 50, "A")})
    processor = Processor(tiny.image_processor(), tiny.tokenizer(), patch_size=tiny.PATCH)
    with pytest.raises(LayerfuseError, match="sample long: no token is labelled"):
        Collator(processor, "chat", 40, None)(samples[:])
