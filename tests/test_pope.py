"""POPE: its files, its revisions, and how its script scores."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.benchmarks import Item
from layerfuse.evaluate.benchmarks.official_pictures import check_pictures
from layerfuse.evaluate.benchmarks.pope import SPLITS, Pope
from tests.made_up_benchmarks import answer_all, near, values_of, write_lines, write_png

PRESENT = (("a.jpg", "dog"), ("a.jpg", "cup"), ("b.jpg", "car"))
ABSENT = {
    "random": (("a.jpg", "orange"), ("b.jpg", "tv")),
    "popular": (("a.jpg", "chair"), ("a.jpg", "person"), ("b.jpg", "book")),
    "adversarial": (("a.jpg", "cat"), ("a.jpg", "fork"), ("b.jpg", "bus")),
}
"""one less in the random split, as in the revision that LLaVA-1.5 was scored with"""


def pope_rows(split: str) -> list[dict[str, Any]]:
    """The questions of one split, numbered from 1 as in every split."""
    questions = [(*pair, "yes") for pair in PRESENT] + [(*pair, "no") for pair in ABSENT[split]]
    rows: list[dict[str, Any]] = []
    for number, (picture, thing, label) in enumerate(questions, start=1):
        text = f"Is there a {thing} in the image?"
        rows.append({"question_id": number, "image": picture, "text": text, "label": label})
    return rows


def write_pope(folder: Path, questions: Path | None = None) -> None:
    """Write the three splits, in a folder of their own if one is given, and their pictures."""
    for split in SPLITS:
        write_lines((questions or folder) / f"coco_pope_{split}.json", pope_rows(split))
    for name in ("a.jpg", "b.jpg"):
        write_png(folder / "val2014" / name)


POPE_ANSWERS = {
    "dog": "Yes",
    "cup": "No, there is not.",
    "car": "There is a car. It is not blue.",
    "orange": "no",
    "tv": "I see no tv in it",
    "chair": "yes",
    "person": "No.",
    "book": "NO",
    "cat": "",
    "fork": "There is not a fork",
    "bus": "Maybe",
}
POPE_SAID_NO = ("cup", "orange", "tv", "person", "fork")
"""all else is yes to POPE's script: capitals alone are no word of no, nor is an empty answer"""


def pope_answer(item: Item) -> str:
    """What the made-up model says."""
    thing = item.question.removeprefix("Is there a ").removesuffix(" in the image?")
    return POPE_ANSWERS[thing]


def test_pope_scores_each_split_as_its_script_does(tmp_path: Path):
    write_pope(tmp_path)
    items = Pope().load(tmp_path)
    assert [len([item for item in items if item.group == split]) for split in SPLITS] == [5, 6, 6]
    assert items[0].id == "random/1"
    assert items[0].pictures[0].open().size == (4, 4)
    values = values_of(Pope(), answer_all(Pope(), items, pope_answer))
    f1_sum = Fraction(0)
    accuracy_sum = Fraction(0)
    # From the counts, without the code under test.
    for split in SPLITS:
        hits = sum(thing not in POPE_SAID_NO for _, thing in PRESENT)
        false_alarms = sum(thing not in POPE_SAID_NO for _, thing in ABSENT[split])
        number = len(PRESENT) + len(ABSENT[split])
        precision = Fraction(hits, hits + false_alarms)
        recall = Fraction(hits, len(PRESENT))
        f1 = 2 * precision * recall / (precision + recall)
        accuracy = Fraction(hits + len(ABSENT[split]) - false_alarms, number)
        f1_sum += f1
        accuracy_sum += accuracy
        assert values[f"{split} precision"] == near(100 * precision)
        assert values[f"{split} recall"] == near(100 * recall)
        assert values[f"{split} F1"] == near(100 * f1)
        assert values[f"{split} accuracy"] == near(100 * accuracy)
        assert values[f"{split} yes ratio"] == near(100 * Fraction(hits + false_alarms, number))
    assert values["F1"] == near(100 * f1_sum / 3)
    assert values["accuracy"] == near(100 * accuracy_sum / 3)
    # By hand: 4/5, 4/7 and 4/7.
    assert values["F1"] == near(Fraction(100, 3) * (Fraction(4, 5) + Fraction(8, 7)))


def test_pope_that_is_never_answered_with_yes_scores_0(tmp_path: Path):
    write_pope(tmp_path)
    items = Pope().load(tmp_path)
    values = values_of(Pope(), answer_all(Pope(), items, lambda item: "no"))
    # The script of the benchmark divides by zero here.
    assert values["F1"] == 0
    assert values["accuracy"] == near(Fraction(100, 3) * (Fraction(2, 5) + 1))


def test_pope_is_read_in_the_layout_of_llava(tmp_path: Path):
    write_pope(tmp_path, tmp_path / "coco")
    assert len(Pope().load(tmp_path)) == 17


@pytest.mark.parametrize(("number", "words"), [(2910, "2,910"), (3000, "3,000")])
def test_pope_says_which_revision_it_found(number: int, words: str):
    numbers = {"random": number, "popular": 3000, "adversarial": 3000}
    items: list[Item] = []
    for split, count in numbers.items():
        items += [Item(f"{split}/{place}", (), "?", ("no",), split) for place in range(count)]
    assert len(Pope().notes(items)) == 1
    assert f"random split has {words} questions" in Pope().notes(items)[0]
    # 2,910 questions are published for the random split alone.
    notes = Pope().notes(items[:-90])
    assert notes[1:] == ["no published revision has 2,910 questions in the adversarial split"]


def test_pope_knows_the_numbers_of_llavas_file():
    # Its three splits are one file: adversarial, random and popular, ten million apart.
    numbers = {3000: "adversarial/3000", 10000001: "random/1", 20000064: "popular/64"}
    for number, expected in numbers.items():
        assert Pope().id_in({"question_id": number, "text": "Yes"}, []) == expected
    assert Pope().id_in({"id": "popular/7"}, []) == "popular/7"
    assert Pope().id_in({"question_id": "popular/7"}, []) == "popular/7"
    assert Pope().id_in({"question_id": 30000001}, []) == "30000001"


def test_pope_refuses_splits_of_two_revisions(tmp_path: Path):
    write_pope(tmp_path)
    rows = pope_rows("popular")
    for row in rows:
        row["image"] = row["image"].replace("b.jpg", "c.jpg")
    write_lines(tmp_path / "coco_pope_popular.json", rows)
    with pytest.raises(LayerfuseError, match=r"different revisions.*differ in 2 questions.*commit"):
        Pope().load(tmp_path)


def test_pope_tells_revisions_by_a_misspelling(tmp_path: Path):
    """The revision of LLaVA-1.5 has `imange` in some questions, in all three splits alike."""
    write_pope(tmp_path)
    for split in SPLITS:
        rows = pope_rows(split)
        for row in rows:
            row["text"] = row["text"].replace("a car in the image", "an car in the imange")
        write_lines(tmp_path / f"coco_pope_{split}.json", rows)
    assert len(Pope().load(tmp_path)) == 17
    write_lines(tmp_path / "coco_pope_random.json", pope_rows("random"))
    with pytest.raises(LayerfuseError, match="different revisions"):
        Pope().load(tmp_path)


def test_pope_refuses_a_split_that_ends_between_two_lines(tmp_path: Path):
    write_pope(tmp_path)
    # Each line is whole, so that nothing but the other splits tells that one is missing.
    write_lines(tmp_path / "coco_pope_adversarial.json", pope_rows("adversarial")[:2])
    with pytest.raises(LayerfuseError, match=r"or one is cut off.*Is there a car.*b\.jpg"):
        Pope().load(tmp_path)


def test_pope_refuses_repeated_ids_and_other_labels_and_missing_pictures(tmp_path: Path):
    write_pope(tmp_path)
    (tmp_path / "val2014" / "b.jpg").unlink()
    # Answers are scored without pictures.
    items = Pope().load(tmp_path)
    with pytest.raises(LayerfuseError, match=r"1 of 2 pictures are missing.*b\.jpg"):
        check_pictures(items)
    rows = pope_rows("random")
    write_lines(tmp_path / "coco_pope_random.json", rows + rows[-1:])
    with pytest.raises(LayerfuseError, match="same id 'random/5'"):
        Pope().load(tmp_path)
    rows[1]["label"] = "maybe"
    write_lines(tmp_path / "coco_pope_random.json", rows)
    with pytest.raises(LayerfuseError, match="label 'maybe' of question 2; yes or no"):
        Pope().load(tmp_path)
