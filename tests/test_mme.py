"""MME: its tasks, its pictures, and the sums that its tool gives."""

from fractions import Fraction
from pathlib import Path

import pytest

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.benchmarks import Item
from layerfuse.evaluate.benchmarks.interface import notes_on_questions
from layerfuse.evaluate.benchmarks.mme import COGNITION, PERCEPTION, Mme, find_by_llava_id
from layerfuse.evaluate.benchmarks.official_pictures import check_pictures
from tests.made_up_benchmarks import answer_all, columns_of, near, write_png


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
            write_png(pictures / f"000{number}.{suffix}")
            texts.mkdir(parents=True, exist_ok=True)
            # Two spaces and an empty line at the end, as some files of the release have.
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
    # Wherever the release's archives put the tasks, the ids are the same.
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
    (note,) = notes_on_questions(Mme(), items)
    assert note.startswith("MME: 32 questions were found, and the published files have 2,374.")
    assert notes_on_questions(Mme(), items[:1] * 2374) == []


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
    # The picture is right, and yet the line is of another revision.
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
