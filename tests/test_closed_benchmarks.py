"""Benchmarks with closed answers: small folders in the official layouts, scored by hand."""

import base64
import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.benchmarks import BENCHMARKS, Benchmark, Column, Item
from layerfuse.evaluate.benchmarks.interface import JudgedItem
from layerfuse.evaluate.benchmarks.mme import COGNITION, PERCEPTION, Mme, find_by_llava_id
from layerfuse.evaluate.benchmarks.mmstar import split_options
from layerfuse.evaluate.benchmarks.official_files import check_pictures
from layerfuse.evaluate.benchmarks.pope import SPLITS, Pope

CLOSED = (
    "ai2d",
    "cvbench",
    "hallusionbench",
    "mmbench",
    "mme",
    "mmstar",
    "mmvp",
    "pope",
    "realworldqa",
    "scienceqa",
    "seedbench_image",
)


def png(shade: int = 0) -> bytes:
    """A small picture."""
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 90, 200)).save(file, "PNG")
    return file.getvalue()


def png_text(shade: int = 0) -> str:
    """A small picture in base64."""
    return base64.b64encode(png(shade)).decode()


def write_picture(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(png())


def write_lines(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_tsv(file: Path, rows: Sequence[Mapping[str, str]]) -> None:
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    import pyarrow
    from pyarrow import parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file)


def answer_all(
    benchmark: Benchmark, items: Sequence[Item], answer: Callable[[Item], str]
) -> list[JudgedItem]:
    return [JudgedItem(item, benchmark.judge(item, answer(item))) for item in items]


def columns_of(benchmark: Benchmark, answered: Sequence[JudgedItem]) -> dict[str, Column]:
    columns = benchmark.columns(answered)
    by_name = {column.name: column for column in columns}
    assert len(by_name) == len(columns)
    assert benchmark.headline in by_name
    for column in columns:
        assert 0 <= column.value <= column.best
    return by_name


def values_of(benchmark: Benchmark, answered: Sequence[JudgedItem]) -> dict[str, float]:
    return {name: column.value for name, column in columns_of(benchmark, answered).items()}


def near(value: Fraction | float) -> Any:
    return pytest.approx(float(value), abs=1e-12)


# All of them


@pytest.mark.parametrize("name", CLOSED)
def test_every_benchmark_says_what_it_is(name: str):
    benchmark = BENCHMARKS[name]
    assert benchmark.title
    assert benchmark.licence
    assert benchmark.expected
    assert benchmark.headline


@pytest.mark.parametrize("name", CLOSED)
def test_an_empty_folder_is_refused(name: str, tmp_path: Path):
    with pytest.raises(LayerfuseError, match="expected"):
        BENCHMARKS[name].load(tmp_path)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("ai2d", "AI2D_TEST.tsv"),
        ("mmbench", "MMBench_DEV_EN.tsv"),
        ("mmstar", "MMStar.tsv"),
        ("realworldqa", "RealWorldQA.tsv"),
    ],
)
def test_the_table_of_another_benchmark_is_refused(name: str, file: str, tmp_path: Path):
    write_tsv(tmp_path / file, [{"index": "1", "caption": "a cup", "image": png_text()}])
    with pytest.raises(LayerfuseError, match=r"needed are .*another benchmark"):
        BENCHMARKS[name].load(tmp_path)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("pope", "coco_pope_random.json"),
        ("scienceqa", "problems.json"),
        ("seedbench_image", "SEED-Bench.json"),
        ("hallusionbench", "HallusionBench.json"),
    ],
)
@pytest.mark.parametrize("content", ['[{"caption": "a cup"}]', '{"a": 1}', '[{"question_id": 1,'])
def test_the_json_of_another_benchmark_and_half_a_file_are_refused(
    name: str, file: str, content: str, tmp_path: Path
):
    (tmp_path / file).write_text(content)
    with pytest.raises(LayerfuseError, match=file):
        BENCHMARKS[name].load(tmp_path)


# POPE

PRESENT = (("a.jpg", "dog"), ("a.jpg", "cup"), ("b.jpg", "car"))
ABSENT = {
    "random": (("a.jpg", "orange"), ("b.jpg", "tv")),
    "popular": (("a.jpg", "chair"), ("a.jpg", "person"), ("b.jpg", "book")),
    "adversarial": (("a.jpg", "cat"), ("a.jpg", "fork"), ("b.jpg", "bus")),
}


def pope_rows(split: str) -> list[dict[str, Any]]:
    questions = [(*pair, "yes") for pair in PRESENT] + [(*pair, "no") for pair in ABSENT[split]]
    rows: list[dict[str, Any]] = []
    for number, (picture, thing, label) in enumerate(questions, start=1):
        text = f"Is there a {thing} in the image?"
        rows.append({"question_id": number, "image": picture, "text": text, "label": label})
    return rows


def write_pope(folder: Path, questions: Path | None = None) -> None:
    for split in SPLITS:
        write_lines((questions or folder) / f"coco_pope_{split}.json", pope_rows(split))
    for name in ("a.jpg", "b.jpg"):
        write_picture(folder / "val2014" / name)


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


def test_pope_refuses_a_split_that_ends_between_two_lines(tmp_path: Path):
    write_pope(tmp_path)
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


# MME


def write_mme(folder: Path) -> None:
    """Fourteen tasks, the first seven in folders of their own for pictures and texts."""
    for place, task in enumerate(PERCEPTION + COGNITION):
        for number in range(1, 4 if task == "existence" else 2):
            pictures = folder / task
            texts = folder / task
            if place < 7:
                pictures = folder / task / "images"
                texts = folder / task / "questions_answers_YN"
            suffix = "jpg" if task in PERCEPTION else "png"
            write_picture(pictures / f"000{number}.{suffix}")
            texts.mkdir(parents=True, exist_ok=True)
            lines = (
                f"Is this {task}? Please answer yes or no.\tYes\n"
                "Is this  a cup? Please answer yes or no.\tNo\n\n"
            )
            (texts / f"000{number}.txt").write_text(lines)


def mme_answer(item: Item) -> str:
    """Existence has one right picture, one half right and one with no answer; others say yes."""
    if item.group == "existence" and item.together.endswith("0001.jpg"):
        return "Yes, it is" if item.answers == ("yes",) else "No."
    if item.group == "existence" and item.together.endswith("0003.jpg"):
        return "It is. Yes" if item.answers == ("yes",) else "The answer is no"
    return " YES"


def test_mme_adds_accuracy_and_accuracy_plus_of_each_task(tmp_path: Path):
    write_mme(tmp_path)
    items = Mme().load(tmp_path)
    assert len(items) == 2 * (14 + 2)
    answered = answer_all(Mme(), items, mme_answer)
    columns = columns_of(Mme(), answered)
    # 3 of 6 questions and 1 of 3 pictures; elsewhere 1 of 2 questions and none of 1.
    assert columns["existence"].value == near(100 * (Fraction(3, 6) + Fraction(1, 3)))
    assert columns["count"].value == near(50)
    assert columns["perception"].value == near(9 * 50 + 50 + Fraction(100, 3))
    assert columns["cognition"].value == near(4 * 50)
    assert [columns[name].best for name in ("perception", "cognition", "OCR")] == [2000, 800, 200]
    assert columns["perception"].questions == 2 * (10 + 2)
    unread = [each for each in answered if each.judged.parsed is None]
    assert {each.item.together for each in unread} == {"existence/0003.jpg"}
    for suffix in ("MME_Benchmark_release_version", "MME_Benchmark_release_version/MME_Benchmark"):
        release = tmp_path / "release" / suffix.replace("/", "_")
        write_mme(release / suffix)
        assert [item.id for item in Mme().load(release)] == [item.id for item in items]


def test_mme_that_is_all_right_has_the_best_scores(tmp_path: Path):
    write_mme(tmp_path)
    items = Mme().load(tmp_path)
    columns = columns_of(Mme(), answer_all(Mme(), items, lambda item: item.answers[0]))
    assert [column.value for column in columns.values()] == [2000, 800, *[200] * 14]


def test_mme_notes_another_number_of_questions_than_the_published_one(tmp_path: Path):
    write_mme(tmp_path)
    items = Mme().load(tmp_path)
    assert "32 questions" in Mme().notes(items)[0]
    assert Mme().notes(items[:1] * 2374) == []


def test_mme_finds_the_questions_of_llavas_files(tmp_path: Path):
    write_mme(tmp_path)
    items = Mme().load(tmp_path)
    text = "Is this a cup?\nAnswer the question using a single word or phrase."
    found = find_by_llava_id(items, "code_reasoning/0001.png", text)
    assert found.id == "code_reasoning/0001.png/2"
    assert found.question == "Is this a cup?"
    # With its own instruction, as the folder has it.
    own = "Is this a cup? Please answer yes or no."
    assert find_by_llava_id(items, "code_reasoning/0001.png", own) == found
    # Tasks with a folder for pictures have it in LLaVA's ids.
    of_folder = find_by_llava_id(items, "existence/images/0002.jpg", own)
    assert of_folder.id == "existence/0002.jpg/2"
    line = {"question_id": "existence/images/0002.jpg", "prompt": text, "text": "No"}
    assert Mme().id_in(line, items) == of_folder.id
    assert Mme().id_in({"id": "count/0001.jpg/1"}, items) == "count/0001.jpg/1"
    with pytest.raises(LayerfuseError, match=r"no picture 'count/9\.jpg'; an id such as"):
        find_by_llava_id(items, "count/9.jpg", text)
    with pytest.raises(LayerfuseError, match="and not 'Is this a tree"):
        find_by_llava_id(items, "count/0001.jpg", "Is this a tree?")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("A?\tYes\nB?\tNo\nC?\tNo\n", "has 3 questions; MME has two"),
        ("A?\tYes\n", "has 1 questions; MME has two"),
        ("A?\tYes\nB? No\n", "in line 2; a question, a tab and Yes or No"),
    ],
)
def test_mme_refuses_pictures_that_have_not_two_questions(content: str, words: str, tmp_path: Path):
    write_mme(tmp_path)
    (tmp_path / "OCR" / "0001.txt").write_text(content)
    with pytest.raises(LayerfuseError, match=words):
        Mme().load(tmp_path)


def test_mme_is_read_without_its_pictures(tmp_path: Path):
    """Files of answers are scored without them, under the ids that the release's pictures give."""
    write_mme(tmp_path)
    with_pictures = [item.id for item in Mme().load(tmp_path)]
    pictures = [*tmp_path.rglob("*.jpg"), *tmp_path.rglob("*.png")]
    for picture in pictures:
        picture.unlink()
    for folder in tmp_path.rglob("images"):
        folder.rmdir()

    items = Mme().load(tmp_path)

    assert [item.id.split(".")[0] for item in items] == [id.split(".")[0] for id in with_pictures]
    suffixes = {item.group: item.id.split(".")[1][:3] for item in items}
    assert suffixes == {
        **dict.fromkeys(PERCEPTION, "jpg"),
        **dict.fromkeys(COGNITION, "png"),
    }
    # LLaVA's file may name a picture of the other kind.
    of_ocr = [item for item in items if item.group == "OCR"]
    named = {"question_id": "OCR/0001.png", "prompt": of_ocr[1].question}
    assert Mme().id_in(named, items) == of_ocr[1].id
    with pytest.raises(LayerfuseError, match=f"{len(pictures)} of {len(pictures)} pictures are"):
        check_pictures(items)


def test_mme_refuses_missing_tasks_and_pictures(tmp_path: Path):
    write_mme(tmp_path)
    (tmp_path / "OCR" / "0001.jpg").rename(tmp_path / "OCR" / "0002.jpg")
    with pytest.raises(LayerfuseError, match=r"1 of \d+ pictures are missing.*OCR/0001\.jpg"):
        check_pictures(Mme().load(tmp_path))
    (tmp_path / "OCR").rename(tmp_path / "ocr_")
    with pytest.raises(LayerfuseError, match="no folder for OCR; one for each"):
        Mme().load(tmp_path)
    with pytest.raises(LayerfuseError, match="none of existence"):
        Mme().columns([])


# ScienceQA


def write_scienceqa(folder: Path) -> dict[str, Any]:
    def problem(**changes: Any) -> dict[str, Any]:
        usual = {
            "question": "Which?",
            "choices": ["ice", "steam", "sand"],
            "answer": 1,
            "hint": "",
            "image": None,
            "grade": "grade3",
            "subject": "natural science",
            "split": "test",
        }
        return {**usual, **changes}

    problems = {
        "4": problem(image="image.png"),
        "5": problem(hint="Think.", grade="grade7", subject="social science"),
        "11": problem(subject="language science", answer=0, choices=["a", "b"]),
        "12": problem(image="image.png", hint="Look.", grade="grade12", answer=2),
        "99": problem(split="train"),
    }
    (folder / "problems.json").write_text(json.dumps(problems))
    splits = {"train": ["99"], "test": ["4", "5", "11", "12"]}
    (folder / "pid_splits.json").write_text(json.dumps(splits))
    for pid in ("4", "12"):
        write_picture(folder / "images" / "test" / pid / "image.png")
    return problems


def test_scienceqa_reports_the_official_categories(tmp_path: Path):
    write_scienceqa(tmp_path)
    benchmark = BENCHMARKS["scienceqa"]
    items = benchmark.load(tmp_path)
    assert [item.id for item in items] == ["4", "5", "11", "12"]
    assert items[3].context == "Look."
    # No option is named by the third, which is no option A; C is none of the third's.
    answers = {"4": "B. steam", "5": "A", "11": "the first", "12": "The answer is C."}
    answered = answer_all(benchmark, items, lambda item: answers[item.id])
    assert [each.judged.parsed for each in answered] == ["B", "A", None, "C"]
    assert values_of(benchmark, answered) == {
        "accuracy": 50,
        "image accuracy": 100,
        "NAT": 100,
        "SOC": 0,
        "LAN": 0,
        "TXT": 50,
        "IMG": 100,
        "NO": 0,
        "G1-6": 50,
        "G7-12": 50,
    }
    assert benchmark.judge(items[2], "C").parsed is None
    without_pictures = [each for each in answered if not each.item.pictures]
    names = [column.name for column in benchmark.columns(without_pictures)]
    assert "IMG" not in names


def test_scienceqa_refuses_what_does_not_fit(tmp_path: Path):
    problems = write_scienceqa(tmp_path)
    benchmark = BENCHMARKS["scienceqa"]
    (tmp_path / "images" / "test" / "12" / "image.png").unlink()
    items = benchmark.load(tmp_path)
    with pytest.raises(LayerfuseError, match="1 of 2 pictures are missing"):
        check_pictures(items)
    problems["11"]["answer"] = 2
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    with pytest.raises(LayerfuseError, match="answer 2 to problem 11; the number of one of its 2"):
        benchmark.load(tmp_path)
    (tmp_path / "pid_splits.json").write_text('{"test": ["4", "4"]}')
    with pytest.raises(LayerfuseError, match="same id '4'"):
        benchmark.load(tmp_path)
    (tmp_path / "pid_splits.json").write_text('{"test": ["7"]}')
    with pytest.raises(LayerfuseError, match="no problem '7'"):
        benchmark.load(tmp_path)
    (tmp_path / "pid_splits.json").write_text('["4"]')
    with pytest.raises(LayerfuseError, match="no list of ids under 'test'"):
        benchmark.load(tmp_path)


# MMBench


def mmbench_rows() -> list[dict[str, str]]:
    """Two questions, of three and of two options, and one of the test split."""
    rows: list[dict[str, str]] = []
    questions = (("7", ("red", "green", "blue"), "AR"), ("30", ("left", "right"), "LR"))
    for index, options, broad in questions:
        for turn in range(len(options)):
            turned = options[turn:] + options[:turn]
            row = {
                "index": str(int(index) + 1000000 * turn),
                "question": "Which?",
                "hint": "" if index == "7" else "Look.",
                **dict(zip("ABCD", [*turned, "", ""], strict=False)),
                "answer": "ABC"[turned.index(options[1])],
                "category": "colour",
                "l2-category": broad,
                # Rotations name the row that has the picture.
                "image": png_text(int(index)) if turn == 0 else index,
                "split": "dev",
            }
            row.setdefault("D", "")
            rows.append(row)
    rows.append({**rows[0], "index": "50", "answer": "", "split": "test"})
    return rows


def test_mmbench_is_right_only_where_every_rotation_is(tmp_path: Path):
    write_tsv(tmp_path / "MMBench_DEV_EN.tsv", mmbench_rows())
    benchmark = BENCHMARKS["mmbench"]
    items = benchmark.load(tmp_path)
    assert [item.id for item in items] == ["7", "1000007", "2000007", "30", "1000030"]
    assert [len(item.options) for item in items] == [3, 3, 3, 2, 2]
    assert items[2].pictures == items[0].pictures
    assert items[2].pictures[0].read() == png(7)
    assert items[3].context == "Look."
    # The second rotation of the first question is wrong; the others name letters or options.
    answers = {"7": "B", "1000007": "B", "2000007": "(C)", "30": "right", "1000030": "A."}
    answered = answer_all(benchmark, items, lambda item: answers[item.id])
    assert [each.judged.score for each in answered] == [1, 0, 1, 1, 1]
    columns = columns_of(benchmark, answered)
    values = {name: column.value for name, column in columns.items()}
    assert values == {"circular": 50, "plain": 100, "AR": 0, "LR": 100}
    assert [column.questions for column in columns.values()] == [2, 2, 1, 1]


def test_mmbench_refuses_a_question_without_a_rotation(tmp_path: Path):
    file = tmp_path / "mmbench_dev_20230712.tsv"
    rows = mmbench_rows()
    write_tsv(file, rows[:2] + rows[3:])
    words = "question 7 with 3 options under the indices 7, 1000007; 7, 1000007, 2000007 are"
    with pytest.raises(LayerfuseError, match=words):
        BENCHMARKS["mmbench"].load(tmp_path)
    write_tsv(file, [*rows, rows[1]])
    with pytest.raises(LayerfuseError, match="same id '1000007'"):
        BENCHMARKS["mmbench"].load(tmp_path)


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("answer", "D", "answer 'D' to the question 7, whose options are A, B, C"),
        ("answer", "", "a split without answers"),
        ("image", "8", "'8' for the picture of row 7; base64 or the index"),
        ("image", png_text()[:-2], "not valid base64"),
        ("split", "test", "7 with 3 options under the indices 1000007, 2000007; 7,"),
    ],
)
def test_mmbench_refuses_what_does_not_fit(column: str, value: str, words: str, tmp_path: Path):
    rows = mmbench_rows()
    rows[0][column] = value
    write_tsv(tmp_path / "MMBench_DEV_EN.tsv", rows)
    with pytest.raises(LayerfuseError, match=words):
        BENCHMARKS["mmbench"].load(tmp_path)


def test_mmbench_refuses_half_a_file(tmp_path: Path):
    file = tmp_path / "MMBench_DEV_EN.tsv"
    write_tsv(file, mmbench_rows())
    text = file.read_text()
    file.write_text(text[: text.index("left") + 2])
    with pytest.raises(LayerfuseError, match="cut off"):
        BENCHMARKS["mmbench"].load(tmp_path)


# SEED-Bench


def write_seed(folder: Path) -> list[dict[str, Any]]:
    questions: list[dict[str, Any]] = []
    kinds = (("101", "image", 1), ("102", "image", 1), ("103", "image", 5), ("104", "video", 10))
    for question_id, data_type, number in kinds:
        row: dict[str, Any] = {
            "question_id": question_id,
            "question": "What?",
            "data_id": f"{question_id}_7",
            "data_type": data_type,
            "question_type_id": number,
            "answer": "C",
        }
        for letter in "abcd":
            row[f"choice_{letter}"] = f"{letter}{letter}"
        questions.append(row)
        if data_type == "image":
            write_picture(folder / "SEED-Bench-image" / f"{question_id}_7")
    return questions


def test_seed_bench_reads_the_questions_about_pictures(tmp_path: Path):
    types = {"Scene Understanding": 1, "Instances Counting": 5, "Action Recognition": 10}
    content = {"questions": write_seed(tmp_path), "question_type": types}
    (tmp_path / "SEED-Bench.json").write_text(json.dumps(content))
    benchmark = BENCHMARKS["seedbench_image"]
    items = benchmark.load(tmp_path)
    assert [item.id for item in items] == ["101", "102", "103"]
    # The second names an option by its words, the third none.
    answers = {"101": "A", "102": "cc", "103": "I cannot tell"}
    answered = answer_all(benchmark, items, lambda item: answers[item.id])
    values = values_of(benchmark, answered)
    assert values["accuracy"] == near(Fraction(100, 3))
    assert values["Scene Understanding"] == 50
    assert values["Instances Counting"] == 0


def test_seed_bench_refuses_what_does_not_fit(tmp_path: Path):
    file = tmp_path / "SEED-Bench.json"
    questions = write_seed(tmp_path)
    file.write_text(json.dumps({"questions": questions + questions[:1]}))
    with pytest.raises(LayerfuseError, match="same id '101'"):
        BENCHMARKS["seedbench_image"].load(tmp_path)
    file.write_text(json.dumps({"questions": questions[3:]}))
    with pytest.raises(LayerfuseError, match="no questions that the benchmark asks"):
        BENCHMARKS["seedbench_image"].load(tmp_path)
    questions[0]["answer"] = "E"
    file.write_text(json.dumps({"questions": questions}))
    with pytest.raises(LayerfuseError, match="answer 'E' to the question 101"):
        BENCHMARKS["seedbench_image"].load(tmp_path)


# MMStar


def test_mmstar_reads_both_of_its_files_alike(tmp_path: Path):
    table: list[dict[str, str]] = []
    records: list[dict[str, Any]] = []
    for index, category in (("0", "math"), ("1", "coarse perception"), ("2", "math")):
        options = {"A": "one, two", "B": "three", "C": "four", "D": "five"}
        common = {"index": index, "answer": "B", "category": category}
        table.append({**common, "question": "How many?", "image": png_text(3), **options})
        written = ", ".join(f"{letter}: {text}" for letter, text in options.items())
        question = f"How many?\nOptions: {written}"
        records.append({**common, "question": question, "image": {"bytes": png(3)}})
    (tmp_path / "table").mkdir()
    write_tsv(tmp_path / "table" / "MMStar.tsv", table)
    write_parquet(tmp_path / "parquet" / "mmstar.parquet", records)
    benchmark = BENCHMARKS["mmstar"]
    items = benchmark.load(tmp_path / "table")
    others = benchmark.load(tmp_path / "parquet")
    assert [item.options for item in items] == [item.options for item in others]
    assert [item.question for item in items] == [item.question for item in others]
    assert [item.answers for item in items] == [item.answers for item in others]
    assert others[0].pictures[0].read() == png(3)
    answers = {"0": "B", "1": "(b) three", "2": "D"}
    answered = answer_all(benchmark, others, lambda item: answers[item.id])
    values = values_of(benchmark, answered)
    assert values["accuracy"] == near(Fraction(200, 3))
    assert (values["coarse perception"], values["math"]) == (100, 50)


@pytest.mark.parametrize(
    "text", ["What is it? (A) 1 (B) 2", "Options: A. 1, B. 2", "Options: A: 1", "A? Options: B: 1"]
)
def test_mmstars_options_stay_in_the_question_where_they_are_written_otherwise(text: str):
    assert split_options(text) == (text, ())


def test_mmstar_judges_a_question_with_options_in_its_words_by_the_letter_alone(tmp_path: Path):
    record = {"index": 0, "answer": "D", "category": "math", "question": "What? (A) 1 (D) 4"}
    write_parquet(tmp_path / "mmstar.parquet", [{**record, "image": {"bytes": png()}}])
    item = BENCHMARKS["mmstar"].load(tmp_path)[0]
    assert BENCHMARKS["mmstar"].judge(item, "(D)").score == 1
    assert BENCHMARKS["mmstar"].judge(item, "4").parsed is None


# AI2D


def test_ai2d_reads_the_table_and_the_hubs_files_alike(tmp_path: Path):
    rows: list[dict[str, str]] = []
    records: list[dict[str, Any]] = []
    for number, answer in enumerate((2, 0, 1)):
        options = ["root", "leaf", "stem"]
        # All three are about one picture, which the first row has.
        image = png_text(9) if number == 0 else "0"
        row = {"index": str(number), "question": "What is X?", "image": image}
        rows.append({**row, **dict(zip("ABC", options, strict=True)), "answer": "ABC"[answer]})
        record = {"question": "What is X?", "options": options, "answer": str(answer)}
        records.append({**record, "image": {"bytes": png(9), "path": None}})
    (tmp_path / "table").mkdir()
    write_tsv(tmp_path / "table" / "AI2D_TEST.tsv", rows)
    hub = tmp_path / "hub" / "data"
    write_parquet(hub / "test-00000-of-00002.parquet", records[:2])
    write_parquet(hub / "test-00001-of-00002.parquet", records[2:])
    benchmark = BENCHMARKS["ai2d"]
    items = benchmark.load(tmp_path / "table")
    others = benchmark.load(tmp_path / "hub")
    for item, other in zip(items, others, strict=True):
        assert (item.id, item.question, item.options) == (other.id, other.question, other.options)
        assert item.answers == other.answers
        assert item.pictures[0].read() == other.pictures[0].read()
    answered = answer_all(benchmark, items, lambda item: "C")
    assert values_of(benchmark, answered) == {"accuracy": near(Fraction(100, 3))}


def test_ai2d_refuses_a_missing_shard_half_a_shard_and_another_answer(tmp_path: Path):
    record = {"question": "What?", "options": ["a", "b"], "answer": "2", "image": {"bytes": png()}}
    file = tmp_path / "data" / "test-00000-of-00002.parquet"
    write_parquet(file, [record])
    with pytest.raises(LayerfuseError, match="1 of the 2 files"):
        BENCHMARKS["ai2d"].load(tmp_path)
    file = file.rename(tmp_path / "data" / "test-00000-of-00001.parquet")
    with pytest.raises(LayerfuseError, match="answer '2' in row 0; one of 0, 1"):
        BENCHMARKS["ai2d"].load(tmp_path)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(LayerfuseError, match="cut off"):
        BENCHMARKS["ai2d"].load(tmp_path)


# CV-Bench


def cv_bench_records() -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    kinds = (
        ("2D", "Count", "ADE20K"),
        ("2D", "Relation", "COCO"),
        ("2D", "Count", "COCO"),
        ("2D", "Count", "COCO"),
        ("3D", "Depth", "Omni3D"),
        ("3D", "Distance", "Omni3D"),
    )
    for number, (half, task, source) in enumerate(kinds):
        record = {
            "idx": number % 4,
            "type": half,
            "task": task,
            "source": source,
            "question": "How many?",
            "choices": ["1", "2", "3"],
            "answer": "(B)",
            "filename": f"img/{half}/{number}.png",
        }
        records.append(record)
    return records


def test_cv_bench_weighs_its_halves_and_sources_alike(tmp_path: Path):
    records = cv_bench_records()
    with_pictures = [{**record, "image": {"bytes": png()}} for record in records]
    write_parquet(tmp_path / "halves" / "test_2d.parquet", with_pictures[:4])
    write_parquet(tmp_path / "halves" / "test_3d.parquet", with_pictures[4:])
    write_parquet(tmp_path / "whole" / "test.parquet", with_pictures)
    write_lines(tmp_path / "lines" / "test.jsonl", records)
    for record in records:
        write_picture(tmp_path / "lines" / record["filename"])
    benchmark = BENCHMARKS["cvbench"]
    items = benchmark.load(tmp_path / "halves")
    # Both halves count from 0.
    assert [item.id for item in items] == ["2D/0", "2D/1", "2D/2", "2D/3", "3D/0", "3D/1"]
    for layout in ("whole", "lines"):
        others = benchmark.load(tmp_path / layout)
        assert [item.id for item in others] == [item.id for item in items]
        assert [item.group for item in others] == [item.group for item in items]
        assert [item.answers for item in others] == [item.answers for item in items]
    # ADE20K is right; of COCO's three the first; of Omni3D's two none, as words are no letter.
    answers = {"2D/0": "(B)", "2D/1": "B.", "2D/2": "C", "2D/3": "b is it", "3D/1": "2"}
    answered = answer_all(benchmark, items, lambda item: answers.get(item.id, "the answer is B"))
    two_d = (1 + Fraction(1, 3)) / 2
    expected = {
        "accuracy": 100 * two_d / 2,
        "2D": 100 * two_d,
        "3D": 0,
        "ADE20K": 100,
        "COCO": Fraction(100, 3),
        "Omni3D": 0,
        "Count": Fraction(100, 3),
        "Depth": 0,
        "Distance": 0,
        "Relation": 100,
    }
    values = values_of(benchmark, answered)
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        assert values[name] == near(value)


def test_cv_bench_refuses_a_missing_half_and_a_missing_source(tmp_path: Path):
    records = [{**record, "image": {"bytes": png()}} for record in cv_bench_records()]
    write_parquet(tmp_path / "test_2d.parquet", records[:4])
    with pytest.raises(LayerfuseError, match=r"no file .*test_3d\.parquet"):
        BENCHMARKS["cvbench"].load(tmp_path)
    write_parquet(tmp_path / "test.parquet", records[:4])
    with pytest.raises(LayerfuseError, match="about ADE20K, COCO; CV-Bench has them about"):
        BENCHMARKS["cvbench"].load(tmp_path)
    write_parquet(tmp_path / "test.parquet", [*records, records[0]])
    with pytest.raises(LayerfuseError, match="same id '2D/0'"):
        BENCHMARKS["cvbench"].load(tmp_path)
    with pytest.raises(LayerfuseError, match="none about ADE20K, COCO, Omni3D"):
        BENCHMARKS["cvbench"].columns([])


# RealWorldQA


def test_realworldqa_judges_letters_and_short_answers(tmp_path: Path):
    closed = (
        "Where is the car?\n\nA. Left\nB. Straight\nC. Right\n"
        "Please answer directly with only the letter of the correct option and nothing else."
    )
    opened = "How many lanes are there?\nPlease answer directly with a single word or number."
    questions = ((closed, "B"), (closed, "C"), (opened, "2"), (opened, "No"), (opened, "A"))
    records = [
        {"question": question, "answer": answer, "image": {"bytes": png()}}
        for question, answer in questions
    ]
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", records)
    benchmark = BENCHMARKS["realworldqa"]
    items = benchmark.load(tmp_path)
    assert [item.id for item in items] == ["0", "1", "2", "3", "4"]
    assert items[0].question == "Where is the car?"
    assert items[0].options == ("Left", "Straight", "Right")
    assert items[2].question == "How many lanes are there?"
    assert items[2].options == ()
    answers = {"0": "B. Straight", "1": "left", "2": "12", "3": "no.", "4": "a"}
    answered = answer_all(benchmark, items, lambda item: answers[item.id])
    assert [each.judged.score for each in answered] == [1, 0, 0, 1, 1]
    assert [each.judged.parsed for each in answered] == ["B", "A", "12", "no", "a"]
    assert benchmark.judge(items[2], " ").parsed is None
    assert values_of(benchmark, answered) == {"accuracy": 60}


def test_realworldqa_is_read_from_a_table(tmp_path: Path):
    row = {"index": "0", "question": "Where?", "answer": "B", "image": png_text()}
    rows = [{**row, "A": "left", "B": "right"}, {**row, "index": "1", "A": "", "B": ""}]
    write_tsv(tmp_path / "RealWorldQA.tsv", rows)
    items = BENCHMARKS["realworldqa"].load(tmp_path)
    assert [item.options for item in items] == [("left", "right"), ()]
    assert BENCHMARKS["realworldqa"].judge(items[0], "right").score == 1
    rows[1]["answer"] = ""
    write_tsv(tmp_path / "RealWorldQA.tsv", rows)
    with pytest.raises(LayerfuseError, match="question 1 has no answer"):
        BENCHMARKS["realworldqa"].load(tmp_path)


# MMVP

MMVP_LINES = (
    "lndex,Question,Options,Correct Answer",
    "1,Is the door open?,(a) Open (b) Closed,(a)",
    '2,"Is the door, there, open?",(a) Open (b) Closed,(b)',
    "3,How many?,(a) 3 (b) 4,(b)",
    "4,How many?,(a) 3 (b) 4,(a)",
)


def write_mmvp(folder: Path, lines: Sequence[str] = MMVP_LINES) -> None:
    (folder / "Questions.csv").write_text("\n".join(lines) + "\n")
    for number in range(1, 5):
        write_picture(folder / "MMVP Images" / f"{number}.jpg")


def test_mmvp_is_right_only_where_both_of_a_pair_are(tmp_path: Path):
    write_mmvp(tmp_path)
    benchmark = BENCHMARKS["mmvp"]
    items = benchmark.load(tmp_path)
    assert items[1].question == "Is the door, there, open?"
    assert items[0].options == ("Open", "Closed")
    assert [item.together for item in items] == ["1", "1", "2", "2"]
    # Letters of either case, and an option's words; the last is wrong.
    answers = {"1": "(a)", "2": "Closed", "3": "B", "4": "B"}
    answered = answer_all(benchmark, items, lambda item: answers[item.id])
    columns = columns_of(benchmark, answered)
    assert columns["pair accuracy"].value == 50
    assert columns["pair accuracy"].questions == 2
    assert columns["accuracy"].value == 75


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (MMVP_LINES[:4], "question 3 without its partner 4"),
        ((*MMVP_LINES, MMVP_LINES[4]), "same id '4'"),
        ((*MMVP_LINES[:4], "4,How"), "a row of 2 cells"),
        ((*MMVP_LINES[:4], '4,"How'), "not a complete CSV"),
        (("Index,Caption", "1,a cup"), "columns Index, Caption; Index, Question, Options"),
        ((MMVP_LINES[0], "x,A?,(a) 1 (b) 2,(a)"), "index 'x'; a number from 1"),
        ((MMVP_LINES[0], "1,A?,1 or 2,(a)"), "options '1 or 2' in row 1; such as"),
        ((MMVP_LINES[0], "1,A?,(a) 1 (b) 2,(c)"), "answer 'C' to the question 1"),
    ],
)
def test_mmvp_refuses_what_does_not_fit(lines: Sequence[str], words: str, tmp_path: Path):
    write_mmvp(tmp_path, lines)
    with pytest.raises(LayerfuseError, match=words):
        BENCHMARKS["mmvp"].load(tmp_path)


# HallusionBench


def hallusion_rows() -> list[dict[str, str]]:
    """A set with two figures and two questions, and one with a question without a figure."""
    rows: list[dict[str, str]] = []
    figures = (
        ("VD", "0", "1", "0", "1"),
        ("VD", "0", "1", "1", "0"),
        ("VD", "1", "2", "0", "0"),
        ("VD", "1", "2", "1", "1"),
        ("VS", "0", "0", "0", "1"),
        ("VS", "1", "1", "0", "0"),
    )
    for category, figure, visual, question, right in figures:
        row = {
            "category": category,
            "subcategory": "chart",
            "visual_input": visual,
            "set_id": "3",
            "figure_id": figure,
            "question_id": question,
            "question": "Is it longer?",
            "gt_answer": right,
        }
        rows.append(row)
    return rows


def write_hallusion(folder: Path, rows: Sequence[Mapping[str, str]]) -> None:
    (folder / "HallusionBench.json").write_text(json.dumps(rows))
    for name in ("VD/chart/3_0.png", "VD/chart/3_1.png", "VS/chart/3_1.png"):
        write_picture(folder / "hallusion_bench" / name)


def test_hallusion_bench_counts_questions_figures_and_questions_of_a_set(tmp_path: Path):
    write_hallusion(tmp_path, hallusion_rows())
    benchmark = BENCHMARKS["hallusionbench"]
    items = benchmark.load(tmp_path)
    assert [len(item.pictures) for item in items] == [1, 1, 1, 1, 0, 1]
    answers = {
        "VD/chart/3/0/0": "Yes, it is.",
        "VD/chart/3/0/1": "No",
        "VD/chart/3/1/0": "No, nothing is.",
        "VD/chart/3/1/1": "I cannot tell, yes or no",
        # Nobody can know without the figure: not to say is right.
        "VS/chart/3/0/0": "I do not know",
        "VS/chart/3/1/0": "not longer: no",
    }
    answered = answer_all(benchmark, items, lambda item: answers[item.id])
    assert [each.judged.score for each in answered] == [1, 1, 1, 0, 1, 1]
    columns = columns_of(benchmark, answered)
    assert columns["aAcc"].value == near(Fraction(500, 6))
    # Three figures; what is asked without one is about none.
    assert columns["fAcc"].value == near(Fraction(200, 3))
    assert columns["qAcc"].value == near(Fraction(200, 3))
    assert [column.questions for column in columns.values()] == [6, 3, 3]


def test_hallusion_bench_refuses_what_does_not_fit(tmp_path: Path):
    rows = hallusion_rows()
    write_hallusion(tmp_path, rows + rows[:1])
    with pytest.raises(LayerfuseError, match="same id 'VD/chart/3/0/0'"):
        BENCHMARKS["hallusionbench"].load(tmp_path)
    rows[0]["gt_answer"] = "2"
    write_hallusion(tmp_path, rows)
    with pytest.raises(LayerfuseError, match="answer '2' to a question about VD/chart/3/0; 0 for"):
        BENCHMARKS["hallusionbench"].load(tmp_path)
