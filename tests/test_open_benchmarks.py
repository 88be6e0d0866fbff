"""Benchmarks with open answers: small folders in the layouts of their downloads."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.benchmarks import BENCHMARKS, Column, Item
from layerfuse.evaluate.benchmarks.grounding import caption_words, written_box
from layerfuse.evaluate.benchmarks.interface import JudgedItem
from layerfuse.evaluate.benchmarks.official_pictures import check_pictures
from layerfuse.evaluate.boxes import BoxForm


def write_json(file: Path, value: Any) -> None:
    """Write a file of JSON, and its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


def write_lines(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a file of JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_pictures(folder: Path, *names: str) -> None:
    """Write small pictures."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2), "red").save(folder / name)


def about(value: float) -> Any:
    """A value, up to the rounding of sums of floats."""
    return pytest.approx(value, rel=1e-12)


def score(name: str, items: Sequence[Item], answers: Sequence[str]) -> list[float]:
    """What each answer scores."""
    judged = [BENCHMARKS[name].judge(item, said) for item, said in zip(items, answers, strict=True)]
    return [each.score for each in judged]


def columns(name: str, items: Sequence[Item], answers: Sequence[str]) -> list[Column]:
    """What a benchmark reports of some answers."""
    answered: list[JudgedItem] = []
    for item, said in zip(items, answers, strict=True):
        answered.append(JudgedItem(item, BENCHMARKS[name].judge(item, said)))
    found = BENCHMARKS[name].columns(answered)
    assert BENCHMARKS[name].headline in [column.name for column in found]
    return found


def people(*counted: tuple[str, int]) -> list[dict[str, Any]]:
    """Answers of people as VQA's files have them."""
    answers: list[dict[str, Any]] = []
    for answer, times in counted:
        for _ in range(times):
            given = {"answer": answer, "answer_confidence": "yes", "answer_id": len(answers) + 1}
            answers.append(given)
    return answers


def write_vqa(
    folder: Path, questions: str, annotations: str, kind: str, values: tuple[str, str]
) -> None:
    """Write two questions in the format of visualqa.org."""
    asked = [
        {"image_id": 42, "question": "What is it?", "question_id": 42000},
        {"image_id": 73, "question": "How many cats?", "question_id": 73001},
    ]
    given = [
        {"question_id": 73001, "image_id": 73, "answers": people(("2", 9), ("3", 1))},
        {"question_id": 42000, "image_id": 42, "answers": people(("dog", 2), ("cat", 8))},
    ]
    given[0][kind] = values[1]
    given[1][kind] = values[0]
    write_json(folder / questions, {"info": {}, "questions": asked})
    write_json(folder / annotations, {"info": {}, "annotations": given})
    write_pictures(
        folder, "val2014/COCO_val2014_000000000042.jpg", "val2014/COCO_val2014_000000000073.jpg"
    )


def write_vqav2(folder: Path) -> None:
    """Write two questions of VQAv2."""
    write_vqa(
        folder,
        "v2_OpenEnded_mscoco_val2014_questions.json",
        "v2_mscoco_val2014_annotations.json",
        "answer_type",
        ("other", "number"),
    )


def test_vqav2_scores_by_the_people_who_agree(tmp_path: Path) -> None:
    write_vqav2(tmp_path)

    items = BENCHMARKS["vqav2"].load(tmp_path)

    assert [item.id for item in items] == ["42000", "73001"]
    assert items[0].pictures[0].name.endswith("val2014/COCO_val2014_000000000042.jpg")
    assert items[1].question == "How many cats?"
    # Two of ten say dog: leaving one of the two out gives 1/3, leaving out another gives 2/3.
    assert score("vqav2", items, ["A dog.", "two"]) == pytest.approx([0.6, 1.0])
    assert columns("vqav2", items, ["A dog.", "two"]) == [
        Column("accuracy", about(80.0), 100.0, 2),
        Column("other", about(60.0), 100.0, 1),
        Column("number", 100.0, 100.0, 1),
    ]


def test_answers_are_written_as_for_the_test_servers(tmp_path: Path) -> None:
    """LLaVA writes a capital small before the server sees it, which compares what ten people agree
    on as it is; lmms-eval does so with the answers to OK-VQA as well."""
    write_vqav2(tmp_path)
    (asked, _) = BENCHMARKS["vqav2"].load(tmp_path)

    def scored(name: str, said: str, agreed: str) -> float:
        item = replace(asked, answers=(agreed,) * 10)
        return BENCHMARKS[name].judge(item, said).score

    for name in ("vqav2", "okvqa", "vizwiz"):
        assert scored(name, "Yes.", "yes") == 1.0
        assert scored(name, "The dog", "dog") == 1.0
        assert scored(name, "", "yes") == 0.0
    # What people agree on stays as it is, and no answer is written so.
    assert scored("vqav2", "a dog", "a dog") == 0.0
    assert scored("okvqa", "a dog", "a dog") == 1.0
    assert scored("vizwiz", "a dog", "a dog") == 0.0
    # The contractions of the first rules are straight, those of VizWiz's own curly.
    assert scored("vizwiz", "dont know", "don't know") == 1.0


def test_okvqa_is_grouped_by_knowledge(tmp_path: Path) -> None:
    write_vqa(
        tmp_path,
        "OpenEnded_mscoco_val2014_questions.json",
        "mscoco_val2014_annotations.json",
        "question_type",
        ("eight", "other"),
    )

    items = BENCHMARKS["okvqa"].load(tmp_path)

    assert columns("okvqa", items, ["cat", "3"]) == [
        Column("accuracy", about(65.0), 100.0, 2),
        Column("Plants and Animals", 100.0, 100.0, 1),
        # Nine of the ten left out leave one who says 3: 0.9 / 3.
        Column("Other", about(30.0), 100.0, 1),
    ]


def test_vqa_of_another_benchmark_or_split_is_refused(tmp_path: Path) -> None:
    write_vqav2(tmp_path)
    annotations = tmp_path / "v2_mscoco_val2014_annotations.json"
    content = json.loads(annotations.read_text())
    content["annotations"][1]["answer_type"] = "poem"
    write_json(annotations, content)

    with pytest.raises(LayerfuseError, match="'poem' as 'answer_type' in row 2; valid: yes/no"):
        BENCHMARKS["vqav2"].load(tmp_path)
    content["annotations"][1]["answer_type"] = "other"
    content["annotations"].append(content["annotations"][0])
    write_json(annotations, content)
    with pytest.raises(LayerfuseError, match=r"annotates question .* download the file again"):
        BENCHMARKS["vqav2"].load(tmp_path)
    del content["annotations"][-1]
    del content["annotations"][1]
    write_json(annotations, content)
    with pytest.raises(LayerfuseError, match=r"no answers to the question 42000 .* same split"):
        BENCHMARKS["vqav2"].load(tmp_path)
    write_json(annotations, [{"question": "what?"}])
    with pytest.raises(LayerfuseError, match="a list of 1; a mapping with a list under 'annotat"):
        BENCHMARKS["vqav2"].load(tmp_path)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ("yes", "no list of answers in row 1, but 'yes'"),
        ([], "no list of answers in row 1"),
        (["yes"], "has 'yes' among the answers in row 1; a mapping with 'answer'"),
    ],
)
def test_answers_of_another_shape_are_refused(tmp_path: Path, answers: Any, message: str) -> None:
    row = {"image": "a.jpg", "question": "what?", "answer_type": "other", "answers": answers}
    write_json(tmp_path / "val.json", [row])

    with pytest.raises(LayerfuseError, match=message):
        BENCHMARKS["vizwiz"].load(tmp_path)


def test_vizwiz_takes_unanswerable_as_an_answer(tmp_path: Path) -> None:
    rows = [
        {
            "image": "VizWiz_val_00000000.jpg",
            "question": "What is this?",
            "answers": people(("unanswerable", 8), ("soup", 2)),
            "answer_type": "unanswerable",
            "answerable": 0,
        },
        {
            "image": "VizWiz_val_00000001.jpg",
            "question": "Is it on?",
            "answers": people(("yes", 10)),
            "answer_type": "yes/no",
            "answerable": 1,
        },
    ]
    write_json(tmp_path / "val.json", rows)
    write_pictures(tmp_path / "val", "VizWiz_val_00000000.jpg", "VizWiz_val_00000001.jpg")

    items = BENCHMARKS["vizwiz"].load(tmp_path)

    assert [item.id for item in items] == ["VizWiz_val_00000000", "VizWiz_val_00000001"]
    assert columns("vizwiz", items, ["Unanswerable\n", "no"]) == [
        Column("accuracy", 50.0, 100.0, 2),
        Column("unanswerable", 100.0, 100.0, 1),
        Column("yes/no", 0.0, 100.0, 1),
    ]


def write_textvqa(folder: Path, answers: list[str]) -> None:
    """Write one question of TextVQA."""
    row = {
        "question_id": 34602,
        "image_id": "003a8ae2ef43b901",
        "question": "What is the brand?",
        "answers": answers,
        "set_name": "val",
    }
    write_json(folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": [row]})
    write_pictures(folder, "train_images/003a8ae2ef43b901.jpg")


def test_textvqa_has_the_words_in_the_picture_beside_the_question(tmp_path: Path) -> None:
    write_textvqa(tmp_path, ["Dakota"] * 4 + ["dakota digital"] * 6)

    (bare,) = BENCHMARKS["textvqa"].load(tmp_path)
    text = "what is the brand?\nReference OCR token: DAKOTA, DIGITAL\nAnswer briefly."
    lines = [{"question_id": "003a8ae2ef43b901", "image": "003a8ae2ef43b901.jpg", "text": text}]
    write_lines(tmp_path / "llava_textvqa_val_v051_ocr.jsonl", lines)
    (item,) = BENCHMARKS["textvqa"].load(tmp_path)

    assert (bare.id, bare.question, bare.context) == ("34602", "What is the brand?", "")
    assert (item.question, item.context) == ("What is the brand?", "DAKOTA, DIGITAL")
    # Without that file a prompt with the words asks without them, which the table says.
    without = "no question has words that were read in its picture"
    assert any(without in note for note in BENCHMARKS["textvqa"].notes([bare]))
    assert not any(without in note for note in BENCHMARKS["textvqa"].notes([item]))
    # Leaving out one of the four who say dakota leaves three, which is enough.
    assert columns("textvqa", [item], ["dakota"]) == [Column("accuracy", 100.0, 100.0, 1)]


def test_words_of_another_version_of_textvqa_are_refused(tmp_path: Path) -> None:
    write_textvqa(tmp_path, ["dakota"] * 10)
    file = tmp_path / "llava_textvqa_val_v051_ocr.jsonl"

    write_lines(file, [{"question_id": "1", "text": "who?\nReference OCR token: A\nAnswer."}])
    with pytest.raises(LayerfuseError, match=r"no line for the question 'What is the brand\?'"):
        BENCHMARKS["textvqa"].load(tmp_path)
    write_lines(file, [{"question_id": "1", "text": "who?\nAnswer."}])
    with pytest.raises(LayerfuseError, match="in row 1; a question and a line with 'Reference"):
        BENCHMARKS["textvqa"].load(tmp_path)
    file.unlink()
    write_textvqa(tmp_path, ["dakota"] * 9)
    with pytest.raises(LayerfuseError, match="9 answers in row 1; those of 10 people"):
        BENCHMARKS["textvqa"].load(tmp_path)


def test_questions_that_fewer_than_ten_people_answered_are_noted(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    for number, counted in enumerate((("yes", 10), ("yes", 9), ("yes", 1))):
        row = {
            "image": f"{number}.jpg",
            "question": "Is it on?",
            "answers": people(counted),
            "answer_type": "yes/no",
        }
        rows.append(row)
    write_json(tmp_path / "val.json", rows)
    benchmark = BENCHMARKS["vizwiz"]

    items = benchmark.load(tmp_path)

    (note,) = benchmark.notes(items)
    assert note.startswith("2 of 3 questions have the answers of fewer than 10")
    assert benchmark.notes(items[:1]) == []


@pytest.mark.parametrize(
    "prompt",
    [
        "What is the BRAND?\nReference OCR token: DAKOTA\nAnswer the question using a word.",
        "Reference OCR token: DAKOTA\nwhat is the brand?\nAnswer the question using a word.",
        "What is the brand?\nAnswer the question using a word.",
    ],
)
def test_llavas_answers_to_textvqa_are_known_by_picture_and_prompt(
    tmp_path: Path, prompt: str
) -> None:
    write_textvqa(tmp_path, ["dakota"] * 10)
    benchmark = BENCHMARKS["textvqa"]
    items = benchmark.load(tmp_path)
    line = {"question_id": "003a8ae2ef43b901", "prompt": prompt, "text": "dakota"}

    assert benchmark.id_in(line, items) == "34602"
    # Those of layerfuse, and of tools with the question's own id.
    assert benchmark.id_in({"id": "34602", "prompt": prompt}, items) == "34602"
    assert benchmark.id_in({"question_id": 34602, "prompt": prompt}, items) == "34602"
    assert benchmark.id_in({"question_id": 34602}, items) == "34602"
    for changes in ({"question_id": "003a8ae2ef43b902"}, {"prompt": "Who is it?\nAnswer."}):
        with pytest.raises(LayerfuseError, match=r"TextVQA does not ask '.*' about a picture"):
            benchmark.id_in({**line, **changes}, items)


def write_gqa(folder: Path) -> None:
    """Write three questions of GQA."""
    questions: dict[str, Any] = {}
    for id, answer, structure in (
        ("201307251", "no", "verify"),
        ("201640614", "carpet", "query"),
        ("202225914", "left", "choose"),
    ):
        questions[id] = {
            "question": "Is it overcast?",
            "imageId": "n161313",
            "answer": answer,
            "types": {"structural": structure, "semantic": "global", "detailed": "weather"},
        }
    write_json(folder / "testdev_balanced_questions.json", questions)
    write_pictures(folder, "images/n161313.jpg")


def test_gqa_tells_open_questions_from_binary_ones(tmp_path: Path) -> None:
    write_gqa(tmp_path)

    items = BENCHMARKS["gqa"].load(tmp_path)

    assert [item.id for item in items] == ["201307251", "201640614", "202225914"]
    assert columns("gqa", items, [" No.", "a carpet", "Left"]) == [
        Column("accuracy", about(200 / 3), 100.0, 3),
        Column("binary", 100.0, 100.0, 2),
        Column("open", 0.0, 100.0, 1),
    ]


def write_docvqa(folder: Path) -> None:
    """Write a question of DocVQA, in the layout of its first download."""
    row = {
        "questionId": 49153,
        "question": "What is the date?",
        "image": "documents/xnbl0037_1.png",
        "answers": ["1/8/93", "January 8"],
        "data_split": "val",
    }
    write_json(folder / "val_v1.0.json", {"dataset_name": "docvqa", "data": [row]})
    write_pictures(folder, "documents/xnbl0037_1.png")


def test_docvqa_is_read_from_either_download(tmp_path: Path) -> None:
    write_docvqa(tmp_path)

    (item,) = BENCHMARKS["docvqa"].load(tmp_path)
    (tmp_path / "spdocvqa_qas").mkdir()
    (tmp_path / "val_v1.0.json").rename(tmp_path / "spdocvqa_qas" / "val_v1.0_withQT.json")
    (tmp_path / "documents").rename(tmp_path / "spdocvqa_images")
    (same,) = BENCHMARKS["docvqa"].load(tmp_path)

    assert item.id == same.id == "49153"
    assert same.pictures[0].name.endswith("spdocvqa_images/xnbl0037_1.png")
    # One of nine characters is wrong, and four of six.
    assert score("docvqa", [item, item], ["January 9", "7.9.93"]) == pytest.approx([8 / 9, 0.0])
    # The competition's script divides by the length of what was sent, with its spaces.
    assert score("docvqa", [item], [" January 9 "]) == pytest.approx([10 / 11])
    assert columns("docvqa", [item], ["January 9"]) == [
        Column("anls", about(100 * 8 / 9), 100.0, 1)
    ]


def test_infovqa_is_read(tmp_path: Path) -> None:
    row = {
        "questionId": 98313,
        "question": "Which network?",
        "image_local_name": "38573.jpeg",
        "answers": ["facebook"],
    }
    file = tmp_path / "infographicsVQA_val_v1.0_withQT.json"
    write_json(file, {"dataset_name": "infographicVQA", "data": [row]})
    write_pictures(tmp_path, "infographicsvqa_images/38573.jpeg")

    (item,) = BENCHMARKS["infovqa"].load(tmp_path)

    assert (item.id, item.answers) == ("98313", ("facebook",))
    assert columns("infovqa", [item], ["Facebook"]) == [Column("anls", 100.0, 100.0, 1)]


def write_chartqa(folder: Path) -> None:
    """Write two questions of one half of ChartQA and one of the other."""
    human = [
        {"imgname": "41699.png", "query": "How many bars?", "label": "14"},
        {"imgname": "41699.png", "query": "Is it rising?", "label": "Yes"},
    ]
    augmented = [{"imgname": "two_col_1.png", "query": "What was the value?", "label": "100"}]
    write_json(folder / "test/test_human.json", human)
    write_json(folder / "test/test_augmented.json", augmented)
    write_pictures(folder, "test/png/41699.png", "test/png/two_col_1.png")


def test_chartqas_halves_weigh_the_same(tmp_path: Path) -> None:
    write_chartqa(tmp_path)

    items = BENCHMARKS["chartqa"].load(tmp_path)

    assert [item.id for item in items] == ["human-1", "human-2", "augmented-1"]
    # 105 is 5 % above 100, 14.8 more than 5 % above 14.
    assert columns("chartqa", items, ["14.8", "yes", "105"]) == [
        Column("average", 75.0, 100.0, 3),
        Column("human", 50.0, 100.0, 2),
        Column("augmented", 100.0, 100.0, 1),
    ]


OCR_ROWS = [
    ("IIIT5K", "Regular Text Recognition", "CENTRE"),
    ("svt", "Regular Text Recognition", "under"),
    ("WordArt", "Artistic Text Recognition", "love"),
    ("docVQA", "Doc-oriented VQA", ["1/8/93", "8 January"]),
    ("HME100k", "Handwritten Mathematical Expression Recognition", "x _ { 1 } = B\n"),
]


def write_ocrbench(folder: Path) -> None:
    """Write five questions of OCRBench, which share an id as some do."""
    rows: list[dict[str, Any]] = []
    for dataset, kind, answers in OCR_ROWS:
        row = {
            "dataset_name": dataset,
            "id": 211,
            "image_path": f"{dataset}/1.png",
            "question": "what is written in the image?",
            "answers": answers,
            "type": kind,
        }
        rows.append(row)
        write_pictures(folder / "OCRBench_Images", f"{dataset}/1.png")
    write_json(folder / "OCRBench.json", rows)


def test_ocrbench_counts_what_is_right(tmp_path: Path) -> None:
    write_ocrbench(tmp_path)

    items = BENCHMARKS["ocrbench"].load(tmp_path)

    assert [item.id for item in items][:2] == ["1-IIIT5K", "2-svt"]
    answers = ["It says Centre.", "over", "LOVE", "on 8 january", "$x_{1}=B$"]
    assert columns("ocrbench", items, answers) == [
        Column("score", 4.0, 5.0, 5),
        Column("Text Recognition", 2.0, 3.0, 3),
        Column("Regular Text Recognition", 1.0, 2.0, 2),
        Column("Artistic Text Recognition", 1.0, 1.0, 1),
        Column("Doc-oriented VQA", 1.0, 1.0, 1),
        Column("Handwritten Mathematical Expression Recognition", 1.0, 1.0, 1),
    ]
    # Formulas are in the case in which they are written.
    assert score("ocrbench", [items[4]], ["x_{1}=b"]) == [0.0]


def test_another_number_of_questions_of_ocrbench_is_noted(tmp_path: Path) -> None:
    write_ocrbench(tmp_path)
    benchmark = BENCHMARKS["ocrbench"]
    (first, *_) = benchmark.load(tmp_path)

    (note,) = benchmark.notes(benchmark.load(tmp_path))

    assert "5 questions were found (3, 0, 1, 0, 1 of these types)" in note
    assert "1,000: 300 Text Recognition, 200 Scene Text-centric VQA, 200 Doc-oriented VQA, " in note
    published = {
        "Irregular Text Recognition": 300,
        "Scene Text-centric VQA": 200,
        "Doc-oriented VQA": 200,
        "Key Information Extraction": 200,
        "Handwritten Mathematical Expression Recognition": 100,
    }
    items: list[Item] = []
    for kind, count in published.items():
        items += [replace(first, group=kind)] * count
    assert benchmark.notes(items) == []
    # A thousand of other types are no OCRBench either.
    assert len(benchmark.notes([*items[1:], items[-1]])) == 1


def test_an_unknown_type_of_ocrbench_is_refused(tmp_path: Path) -> None:
    write_ocrbench(tmp_path)
    file = tmp_path / "OCRBench.json"
    file.write_text(file.read_text().replace("Doc-oriented VQA", "Poems"))

    with pytest.raises(LayerfuseError, match="'Poems' as 'type' in row 4; valid: Regular Text"):
        BENCHMARKS["ocrbench"].load(tmp_path)


def referring(**changes: Any) -> dict[str, Any]:
    """A sentence about a box in a picture of 100 x 50 pixels."""
    row = {
        "image": "train2014/a.jpg",
        "sentence": "the red cup",
        "bbox": [10.0, 5.0, 20.0, 20.0],
        "width": 100,
        "height": 50,
        "split": "val",
    }
    return {**row, **changes}


def write_refcoco(folder: Path, *rows: dict[str, Any], name: str = "refcoco") -> None:
    """Write sentences in the format that is read."""
    write_lines(folder / f"{name}.jsonl", rows)
    write_pictures(folder, "train2014/a.jpg")


def test_refcoco_reads_boxes_in_the_padded_picture(tmp_path: Path) -> None:
    write_refcoco(tmp_path, referring(), referring(split="testA"), referring(split="testA", id="5"))

    items = BENCHMARKS["refcoco"].load(tmp_path)

    assert [item.id for item in items] == ["val-1", "testA-2", "5"]
    assert items[0].boxes == ((10.0, 5.0, 30.0, 25.0),)
    assert items[0].size == (100, 50)
    # Padding puts 25 rows above the picture.
    exact = "[0.10, 0.30, 0.30, 0.50]"
    # Half as high: the boxes share half of their union, which is enough; a little less is not.
    half = "[0.10, 0.30, 0.30, 0.40]"
    less = "[0.10, 0.30, 0.30, 0.39]"
    assert BENCHMARKS["refcoco"].judge(items[0], exact).parsed == "[10.0, 5.0, 30.0, 25.0]"
    assert BENCHMARKS["refcoco"].judge(items[0], "no idea").parsed is None
    assert score("refcoco", [items[0]] * 3, [exact, less, "no idea"]) == [1.0, 0.0, 0.0]
    form = BoxForm(scale="thousand", padded=False)
    unpadded = BENCHMARKS["refcoco"].with_box_form(items[0], form)
    answers = ["(100,100),(300,500)", "(100,100),(300,300)", "(100,100),(300,299)"]
    assert score("refcoco", [unpadded] * 3, answers) == [1.0, 1.0, 0.0]
    assert columns("refcoco", items, [exact, less, half.replace("0.40", "0.41")]) == [
        Column("average", 75.0, 100.0, 3),
        Column("val", 100.0, 100.0, 1),
        Column("testA", 50.0, 100.0, 2),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bbox": [1, 2, 3]}, "as 'bbox' in row 1; four numbers are expected: left, top, width"),
        ({"bbox": [1, 2, 3, "4"]}, "as 'bbox' in row 1; four numbers"),
        ({"bbox": [10, 5, 95, 25]}, "not within its picture of 100 x 50 .* a corner"),
        ({"bbox": [10, 5, 0, 25]}, "not within its picture"),
        ({"width": 0}, "has 0 as 'width' in row 1; a picture's side"),
        ({"split": "test"}, "'test' as 'split' in row 1; valid: val, testA, testB"),
    ],
)
def test_bad_boxes_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_refcoco(tmp_path, referring(**changes))

    with pytest.raises(LayerfuseError, match=message):
        BENCHMARKS["refcoco"].load(tmp_path)


def test_the_other_refcocos_have_files_and_splits_of_their_own(tmp_path: Path) -> None:
    write_refcoco(tmp_path, referring(split="testB"), name="refcoco+")
    write_refcoco(tmp_path, referring(split="test"), name="refcocog")

    items = BENCHMARKS["refcoco+"].load(tmp_path)
    assert items[0].group == "testB"
    # an average over fewer splits than there are says so
    assert BENCHMARKS["refcoco+"].notes(items) == [
        "no reference of val, testA; the average is over testB alone",
        "testB has 1 sentences, and the published one 4,889",
    ]
    assert BENCHMARKS["refcocog"].load(tmp_path)[0].group == "test"


def test_captions_are_asked_by_box_with_all_sentences(tmp_path: Path) -> None:
    rows = (
        referring(sentence="The red cup."),
        referring(sentence="a cup on the left"),
        referring(sentence="a plate", bbox=[0, 0, 100, 50]),
    )
    write_refcoco(tmp_path, *rows, name="refcocog")

    items = BENCHMARKS["refcocog-captions"].load(tmp_path)

    assert [item.question for item in items] == [
        "[0.1, 0.3, 0.3, 0.5]",
        "[0.0, 0.25, 1.0, 0.75]",
    ]
    assert items[0].answers == ("The red cup.", "a cup on the left")
    assert score("refcocog-captions", items, ["the red cup", "a dish"]) == [1.0, 0.0]
    form = BoxForm(scale="pixels", padded=False)
    told = BENCHMARKS["refcocog-captions"].with_box_form(items[0], form)
    assert (told.question, told.id) == ("[10, 5, 30, 25]", items[0].id)


@pytest.mark.parametrize("name", ["refcoco", "refcoco+"])
def test_captions_of_every_split_are_scored(name: str, tmp_path: Path) -> None:
    splits = ("val", "testA", "testB")
    rows = [referring(split=split, sentence=f"the {split} cup") for split in splits]
    write_refcoco(tmp_path, *rows, name=name)

    items = BENCHMARKS[f"{name}-captions"].load(tmp_path)

    assert [item.group for item in items] == list(splits)
    pytest.importorskip("pycocoevalcap.cider.cider")
    reported = columns(f"{name}-captions", items, ["a cup"] * 3)
    assert {column.name for column in reported} == {"average", *splits}


def test_boxes_in_another_scale_are_counted_and_noted(tmp_path: Path) -> None:
    write_refcoco(tmp_path, referring(), referring(), referring(), referring())
    benchmark = BENCHMARKS["refcoco"]
    items = benchmark.load(tmp_path)
    # The second is in pixels, the third a little beyond the picture, the last none.
    said = ["[0.1, 0.3, 0.3, 0.5]", "[10, 30, 30, 50]", "[0.1, 0.3, 1.1, 0.5]", "10, 30"]

    in_pixels = BoxForm(scale="pixels")
    answered: list[JudgedItem] = []
    said_so: list[JudgedItem] = []
    for item, answer in zip(items, said, strict=True):
        answered.append(JudgedItem(item, benchmark.judge(item, answer)))
        told = benchmark.with_box_form(item, in_pixels)
        said_so.append(JudgedItem(told, benchmark.judge(told, answer)))

    (note,) = benchmark.notes_on_answers(answered)
    assert note.startswith("1 of 4 answers are boxes with a number above 2, and were read")
    assert "boxes.yaml" in note
    assert benchmark.notes_on_answers(answered[:1]) == []
    assert benchmark.notes_on_answers(said_so) == []


def test_a_benchmark_without_boxes_has_no_form_of_them() -> None:
    with pytest.raises(LayerfuseError, match=r"GQA .* has no boxes whose form could be said"):
        BENCHMARKS["gqa"].with_box_form(Item("1", (), "what?", ("a",)), BoxForm())


def test_a_box_is_written_in_each_scale() -> None:
    box = (10.0, 5.0, 30.0, 25.0)

    unpadded_thousand = BoxForm(scale="thousand", padded=False)
    assert written_box(box, unpadded_thousand, (100, 50)) == "[100, 100, 300, 500]"
    assert written_box(box, BoxForm(scale="thousand"), (100, 50)) == "[100, 300, 300, 500]"
    assert written_box(box, BoxForm(scale="pixels"), (100, 50)) == "[10, 30, 30, 50]"
    # Without zeros at the end, as the boxes that LLaVA-1.5 is trained on; COCO's boxes may reach
    # over the edge by rounding.
    beyond = (-0.2, 5.0, 33.3, 25.0)
    assert written_box(beyond, BoxForm(padded=False), (100, 50)) == "[0.0, 0.1, 0.33, 0.5]"


def test_words_of_captions_are_without_punctuation() -> None:
    assert caption_words('A man\'s "T-shirt", blue.') == ["a", "man's", "t", "shirt", "blue"]


def test_cider_without_its_library_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider", None)
    write_refcoco(tmp_path, referring(), name="refcocog")
    items = BENCHMARKS["refcocog-captions"].load(tmp_path)

    with pytest.raises(LayerfuseError, match=r"layerfuse\[captions"):
        columns("refcocog-captions", items, ["a cup"])


def test_cider_is_highest_for_captions_that_equal_their_reference(tmp_path: Path) -> None:
    pytest.importorskip("pycocoevalcap.cider.cider")
    rows = (
        referring(sentence="the small red cup"),
        referring(sentence="a plate with some food", bbox=[0, 0, 100, 50]),
    )
    write_refcoco(tmp_path, *rows, name="refcocog")
    items = BENCHMARKS["refcocog-captions"].load(tmp_path)

    # No word is in both references, so each has the same weight.
    exact = columns("refcocog-captions", items, ["The small, red cup.", "a plate with some food"])
    half = columns("refcocog-captions", items, ["The small, red cup.", ""])

    assert exact[0] == Column("average", about(1000.0), 1000.0, 2)
    assert half[1] == Column("val", about(500.0), 1000.0, 2)


def write_all(folder: Path) -> None:
    """Write small folders of the benchmarks that the tests below spoil."""
    write_vqav2(folder / "vqav2")
    write_textvqa(folder / "textvqa", ["dakota"] * 10)
    write_gqa(folder / "gqa")
    write_docvqa(folder / "docvqa")
    write_chartqa(folder / "chartqa")
    write_ocrbench(folder / "ocrbench")
    (folder / "refcoco").mkdir()
    write_refcoco(folder / "refcoco", referring())


QUESTIONS = {
    "vqav2": "v2_OpenEnded_mscoco_val2014_questions.json",
    "textvqa": "TextVQA_0.5.1_val.json",
    "gqa": "testdev_balanced_questions.json",
    "docvqa": "val_v1.0.json",
    "chartqa": "test/test_human.json",
    "ocrbench": "OCRBench.json",
    "refcoco": "refcoco.jsonl",
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_each_bad_file_is_one_clear_error(tmp_path: Path, name: str) -> None:
    write_all(tmp_path)
    folder = tmp_path / name
    file = folder / QUESTIONS[name]
    content = file.read_bytes()

    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(LayerfuseError, match=r"is not valid JSON .* cut off\?"):
        BENCHMARKS[name].load(folder)
    file.write_text('[{"instruction": "of another benchmark"}]')
    with pytest.raises(LayerfuseError, match="Is it the file of another benchmark"):
        BENCHMARKS[name].load(folder)
    file.unlink()
    with pytest.raises(LayerfuseError, match=r"there is (no file|none of) .* is expected"):
        BENCHMARKS[name].load(folder)
    file.write_bytes(content)
    pictures = [*folder.rglob("*.jpg"), *folder.rglob("*.png")]
    pictures[0].unlink()
    # Answers are scored without pictures, and asking looks for them.
    items = BENCHMARKS[name].load(folder)
    with pytest.raises(LayerfuseError, match=r"1 of \d pictures are missing, the first is .*/"):
        check_pictures(items)


def test_repeated_ids_are_refused(tmp_path: Path) -> None:
    write_docvqa(tmp_path)
    file = tmp_path / "val_v1.0.json"
    content = json.loads(file.read_text())
    content["data"] *= 2
    write_json(file, content)

    with pytest.raises(LayerfuseError, match="questions 1 and 2 have the same id '49153'"):
        BENCHMARKS["docvqa"].load(tmp_path)


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_each_benchmark_says_what_it_is(name: str) -> None:
    benchmark = BENCHMARKS[name]

    for text in (benchmark.title, benchmark.licence, benchmark.headline, *benchmark.expected):
        assert text == text.strip()
        assert text
