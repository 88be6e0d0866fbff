"""The synthetic scenes: balance, held-out pairs, geometry, determinism and the written format."""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from layerfuse.data import drawing
from layerfuse.data.drawing import SIZE
from layerfuse.data.scene_files import choose_families, write
from layerfuse.data.scenes import (
    FAMILIES,
    HELD_OUT,
    PAIRS,
    Scene,
    sample,
)
from layerfuse.errors import LayerfuseError

ANSWERS = {name: family.answers for name, family in FAMILIES.items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def conversations(folder: Path) -> list[dict]:
    return json.loads((folder / "conversations.json").read_text("utf-8"))


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("count", [1, 7, 48, 333])
def test_every_answer_is_dealt_out_evenly(split, count):
    made = sample(count, split, seed=5)
    for family, values in ANSWERS.items():
        counts = Counter(scene.answer(family) for scene in made)
        assert set(counts) <= set(values)
        shares = [counts[value] for value in values]
        assert max(shares) - min(shares) <= 1, family


@pytest.mark.parametrize(("split", "count"), [("train", 400), ("test", 150)])
@pytest.mark.parametrize("questions", [1, 3, 6, 8])
def test_asked_answers_stay_balanced(split, count, questions):
    made = sample(count, split, seed=2)
    asked = list(choose_families(made, tuple(FAMILIES), questions, np.random.default_rng(0)))
    assert all(len(set(families)) == questions for families in asked)
    for family, values in ANSWERS.items():
        counts = Counter(
            scene.answer(family)
            for scene, families in zip(made, asked, strict=True)
            if family in families
        )
        total = sum(counts.values())
        assert total == pytest.approx(count * questions / 8, abs=len(values) + 2)
        # Within two items, or two percentage points where that is more.
        assert max(counts.values()) - total / len(values) <= max(2, 0.02 * total), family


def test_held_out_pairs_never_occur_in_training():
    assert len(HELD_OUT) == 8
    assert len({c for c, _ in HELD_OUT}) == len({s for _, s in HELD_OUT}) == 8
    made = sample(1000, "train", novel_share=0.9)
    assert not any(scene.novel for scene in made)
    assert {(scene.colour, scene.shape) for scene in made} == set(PAIRS) - HELD_OUT
    assert not HELD_OUT & {scene.asked for scene in made}
    text = " ".join(scene.caption() for scene in made)
    assert not any(f"{colour} {shape}" in text for colour, shape in HELD_OUT)


@pytest.mark.parametrize(("share", "novel"), [(0.0, 0), (0.25, 80), (0.5, 160), (1.0, 320)])
def test_test_splits_hold_their_share_of_novel_pairs(share, novel):
    made = sample(320, "test", novel_share=share)
    assert sum(scene.novel for scene in made) == novel
    counts = Counter((scene.colour, scene.shape) for scene in made if scene.novel)
    assert set(counts.values()) <= {novel // 8}
    absent = [scene.asked for scene in made if scene.answer("presence") == "no"]
    assert sum(a in HELD_OUT for a in absent) == pytest.approx(share * 160, abs=25)


def test_wrong_presence_questions_change_colour_shape_or_both():
    absent = [s for s in sample(1200, "train") if s.answer("presence") == "no"]
    kinds = Counter((s.asked[0] == s.colour, s.asked[1] == s.shape) for s in absent)
    assert set(kinds) == {(False, True), (True, False), (False, False)}
    assert all(150 < kinds[kind] < 250 for kind in kinds)


def extent(scene: Scene) -> tuple[float, float, float, float]:
    xs = [pose.x for pose in scene.objects]
    ys = [pose.y for pose in scene.objects]
    r = scene.radius
    return min(xs) - r, min(ys) - r, max(xs) + r, max(ys) + r


@pytest.mark.parametrize("split", ["train", "test"])
def test_objects_card_and_mark_lie_apart_and_inside(split):
    for scene in sample(300, split, seed=1):
        spots = [(pose.x, pose.y) for pose in scene.objects]
        assert len(spots) == int(scene.count)
        pairs = [(a, b) for i, a in enumerate(spots) for b in spots[:i]]
        assert all(math.dist(a, b) > 2 * scene.radius + 2 for a, b in pairs)
        left, top, right, bottom = extent(scene)
        x, y = scene.card.x, scene.card.y
        turn = math.radians(abs(scene.card.angle))
        half = scene.card.side / 2 * (math.cos(turn) + math.sin(turn))
        assert min(left, top, x - half, y - half) >= 4
        assert max(right, bottom, x + half, y + half) <= SIZE - 4
        mark = scene.mark_at
        assert all(math.dist(mark, spot) > scene.radius + 6 for spot in spots)
        assert max(abs(mark[0] - x), abs(mark[1] - y)) > half + 6
        assert 6 < min(mark) <= max(mark) < SIZE - 6
        gaps = {
            "left": left - x - half,
            "right": x - half - right,
            "top": top - y - half,
            "bottom": y - half - bottom,
        }
        assert [name for name, gap in gaps.items() if gap > 0] == [scene.position]
        level = left < x < right if scene.position in ("top", "bottom") else top < y < bottom
        assert level


def test_the_card_lies_at_many_places():
    made = [s for s in sample(600, "train") if s.position == "left"]
    assert len({round(s.card.x / 40) for s in made}) >= 3
    assert len({round(s.card.y / 40) for s in made}) >= 4


def test_outlines_fit_the_circle_the_geometry_reserves():
    for shape in ANSWERS["shape"]:
        assert 0.9 < np.abs(drawing.outline(shape)).max() <= 1.001


def test_scenes_depend_on_split_and_seed_alone():
    assert sample(30, "train", 4) == sample(30, "train", 4)
    assert sample(30, "train", 4) != sample(30, "train", 5)
    assert sample(30, "train", 4) != sample(30, "test", 4, novel_share=0)
    assert len({scene.light for scene in sample(50, "train")}) == 50


def test_no_test_image_equals_a_train_image():
    made = [*sample(60, "train"), *sample(60, "test"), *sample(60, "train", 1)]
    pictures = [scene.render() for scene in made]
    assert {(p.size, p.mode) for p in pictures} == {((SIZE, SIZE), "RGB")}
    assert len({p.tobytes() for p in pictures}) == len(made)


def test_every_attribute_shows_in_the_picture():
    scene = sample(1, "train")[0]
    for name, field in (("detail", "detail"), ("letter", "letter"), ("texture", "texture")):
        pictures = {replace(scene, **{field: v}).render().tobytes() for v in ANSWERS[name]}
        assert len(pictures) == len(ANSWERS[name])
    for name in ("colour", "shape"):
        pictures = {replace(scene, **{name: v}).render().tobytes() for v in ANSWERS[name]}
        assert len(pictures) == 8


def test_questions_belong_to_one_family_and_answers_to_the_scene():
    rng = np.random.default_rng(0)
    owner: dict[str, str] = {}
    for scene in sample(200, "test"):
        for family in FAMILIES:
            question, answer = scene.ask(family, rng)
            assert owner.setdefault(question, family) == family
            assert answer in ANSWERS[family]
            assert answer == scene.answer(family)
            assert question.endswith("?")
            assert "{" not in question
            if family == "presence":
                named = " ".join(scene.asked)
                assert question.endswith(f" {named}?")
                assert (answer == "yes") == (named == f"{scene.colour} {scene.shape}")
        words = scene.caption().replace(",", "").split()
        assert len(words) <= 16
        for family in ("colour", "count", "position", "letter", "texture"):
            assert scene.answer(family) in words
        assert scene.shape in {words[2], words[2].removesuffix("s")}
    assert any(q.startswith("Is there an orange ") for q in owner)


def test_written_folder_is_valid_and_deterministic(tmp_path):
    first = write(tmp_path / "deep" / "a", 12, "test", seed=3, questions=5)
    again = write(tmp_path / "b", 12, "test", seed=3, questions=5)
    other = write(tmp_path / "c", 12, "test", seed=4, questions=5)
    assert first == tmp_path / "deep" / "a"
    assert contents(first) == contents(again)
    assert contents(first) != contents(other)
    made = sample(12, "test", seed=3)
    talks = conversations(first)
    captions = json.loads((first / "captions.json").read_text("utf-8"))
    assert len(talks) == len(captions) == 12
    for i, (scene, talk, caption) in enumerate(zip(made, talks, captions, strict=True)):
        assert talk["id"] == caption["id"] == f"test-{i + 1:06d}"
        assert talk["image"] == caption["image"] == f"images/{i + 1:06d}.png"
        with Image.open(first / talk["image"]) as picture:
            assert picture.mode == "RGB"
            assert picture.tobytes() == scene.render().tobytes()
        turns = talk["conversations"]
        assert [t["from"] for t in turns] == ["human", "gpt"] * 5
        assert turns[0]["value"].startswith("<image>\n")
        assert sum(t["value"].count("<image>") for t in turns) == 1
        assert [t["value"] for t in turns[1::2]] == [scene.answer(f) for f in talk["families"]]
        assert talk["categories"] == [FAMILIES[f].category for f in talk["families"]]
        assert talk["novel"] is scene.novel
        assert caption["conversations"] == [
            {"from": "human", "value": "<image>"},
            {"from": "gpt", "value": scene.caption()},
        ]


def test_finished_folder_is_left_alone_and_another_refused(tmp_path):
    folder = write(tmp_path / "data", 6, "train")
    (folder / "images" / "000001.png").write_bytes(b"mine")
    assert write(folder, 6, "train", novel_share=0.5) == folder  # no matter when training
    assert (folder / "images" / "000001.png").read_bytes() == b"mine"
    with pytest.raises(LayerfuseError, match=r"'count': 6.*'seed': 0"):
        write(folder, 7, "train", seed=1)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("keep")
    with pytest.raises(LayerfuseError, match="foreign"):
        write(foreign, 6, "train")
    assert contents(foreign) == {"notes.txt": b"keep"}


def test_settings_that_cannot_be_read_are_named(tmp_path):
    folder = write(tmp_path / "data", 2, "train")
    (folder / "scenes.json").write_text("{")
    with pytest.raises(LayerfuseError, match=r"cannot read .*scenes\.json"):
        write(folder, 2, "train")


def test_another_process_may_write_the_same_folder_first(tmp_path, monkeypatch):
    rename = Path.rename

    def beaten(self: Path, target: Path) -> Path:
        monkeypatch.undo()
        write(target, 2, "train")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", beaten)
    assert len(conversations(write(tmp_path / "data", 2, "train"))) == 2
    assert [file.name for file in tmp_path.iterdir()] == ["data"]


def test_empty_folder_is_filled(tmp_path):
    (tmp_path / "empty").mkdir()
    assert len(conversations(write(tmp_path / "empty", 2, "train"))) == 2


def test_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def broken(_: Scene) -> Image.Image:
        raise OSError("disk full")

    monkeypatch.setattr(Scene, "render", broken)
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
        ({"questions": 9}, "questions"),
        ({"novel_share": 1.5}, "novel_share=1.5"),
    ],
)
def test_bad_arguments_are_refused_before_writing(tmp_path, wrong, message):
    arguments = {"count": 4, "split": "train", **wrong}
    with pytest.raises(LayerfuseError, match=message):
        write(tmp_path / "data", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_only_the_chosen_families_are_asked_and_stay_balanced(tmp_path):
    chosen = ["colour", "texture", "presence"]
    write(tmp_path / "few", 240, "train", questions=2, families=chosen)
    talks = json.loads((tmp_path / "few" / "conversations.json").read_text())
    said = Counter()
    for talk in talks:
        answers = [turn["value"] for turn in talk["conversations"][1::2]]
        said.update(zip(talk["families"], answers, strict=True))
    assert {family for family, _ in said} == set(chosen)
    for family in chosen:
        counts = [n for (name, _), n in said.items() if name == family]
        assert len(counts) == len(ANSWERS[family])
        assert max(counts) / sum(counts) < 1 / len(counts) + 0.02
    with pytest.raises(LayerfuseError, match=r"unknown question families .'smell'.; valid"):
        write(tmp_path / "bad", 3, "train", families=["smell"])
    with pytest.raises(LayerfuseError, match="between 1 and 3, not 4"):
        write(tmp_path / "bad", 3, "train", questions=4, families=chosen)
    assert not (tmp_path / "bad").exists()
