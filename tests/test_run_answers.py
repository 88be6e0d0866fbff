"""Files of answers, of layerfuse and of other tools: read as they are, or refused."""

import datetime
import json
from pathlib import Path
from typing import Any

import openpyxl
import pytest

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.asking import digest_of_questions
from layerfuse.evaluate.benchmarks import BENCHMARKS, Item
from layerfuse.evaluate.run_answers import Run, judged_answers
from layerfuse.evaluate.suites import Prompt
from tests.compared import run_of
from tests.made_up_benchmarks import (
    write_answers,
    write_lines,
    write_mme,
    write_realmix,
    write_refcoco,
)


def mme_items(tmp_path: Path) -> list[Item]:
    write_mme(tmp_path / "mme", 1)
    return BENCHMARKS["mme"].load(tmp_path / "mme")


ANSWER = '{"id": "q0/0", "answer": "0"}\n'
OTHERS = '{"id": "q1/0", "answer": "1"}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "answers.jsonl holds no answers"),
        ("\n \n", "answers.jsonl holds no answers"),
        (ANSWER, "answers 1 of the 2 questions of real pictures; the first .* is 'q1/0'"),
        (ANSWER + OTHERS + ANSWER, "line 3 answers 'q0/0' a second time"),
        (
            ANSWER + '\n{"id": "q7/0", "answer": "1"}',
            "line 3 answers 'q7/0', no question of real pictures, whose ids are such as 'q0/0'",
        ),
        ('{"id": "count/0001.jpg/1", "answer": "Yes"}', "no question of real pictures"),
        ('{"id": null, "answer": "Yes"}', "line 1 answers 'None', no question"),
        (ANSWER + '{"id": "q1/0", "answer": "1', "line 2 is no JSON, or cut off"),
        (
            ANSWER + '{"id": "q1/0", "answer": "1", "answer": "2"}',
            "line 2 is no JSON, .*the key 'answer' stands twice",
        ),
        (ANSWER + '{"id": "q1/0", "answer": 1}', "line 2: the answer 1 is no text"),
        (ANSWER + '{"id": "q1/0", "answer": null}', "line 2: the answer None is no text"),
        (ANSWER + '{"id": "q1/0", "answer": NaN}', "line 2: the answer nan is no text"),
        (ANSWER + '{"id": "q1/0", "answer": ["1"]}', r"line 2: the answer \['1'\] is no text"),
        (ANSWER + '{"id": "q1/0"}', "line 2 holds no answer; expected one of answer, output, "),
        (ANSWER + "{}", "line 2 holds no answer; .*found: nothing"),
        (ANSWER + '{"answer": "1"}', "line 2: a line names no question: expected id or"),
        (ANSWER + '["q1/0", "1"]', "line 2 holds .*; expected: an object"),
        (ANSWER + '"1"', "line 2 holds '1'; expected: an object"),
        ("[" * 100_000, "line 1 is no JSON, or cut off"),
        # What is right beside what was said: which is which cannot be known.
        (
            ANSWER + '{"id": "q1/0", "answer": "1", "prediction": "5"}',
            "line 2 holds answer and prediction, and which of them the model said is not known",
        ),
    ],
)
def test_each_bad_file_of_answers_is_one_clear_error(
    tmp_path: Path, text: str, message: str
) -> None:
    write_realmix(tmp_path / "realmix", 2, pictures=False)
    benchmark = BENCHMARKS["realmix"]
    file = tmp_path / "answers.jsonl"
    file.write_text(text)
    with pytest.raises(LayerfuseError, match=message) as caught:
        judged_answers(file, benchmark, benchmark.load(tmp_path / "realmix"))
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff\xfe{}", "UTF-16"), (b'{"id": "\xe4"}', "not UTF-8"), (None, "cannot read")],
)
def test_files_that_are_no_text_are_refused(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    file = tmp_path / "answers.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(LayerfuseError, match=message):
        judged_answers(file, BENCHMARKS["mme"], mme_items(tmp_path))


@pytest.mark.parametrize("key", ["answer", "output", "text", "prediction"])
@pytest.mark.parametrize("id_key", ["id", "question_id"])
def test_answers_of_other_tools_are_read(tmp_path: Path, key: str, id_key: str) -> None:
    """With a byte order mark, empty lines, and separators of lines within an answer."""
    write_realmix(tmp_path / "realmix", 2, pictures=False)
    benchmark = BENCHMARKS["realmix"]
    lines = [
        {id_key: "q1/0", key: "1\u2028", "model_id": "m"},
        {id_key: "q0/0", key: "5", "prompt": "which one?"},
    ]
    text = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    file = tmp_path / "answers.jsonl"
    file.write_text("\ufeff" + text, encoding="utf-8")

    judged = judged_answers(file, benchmark, benchmark.load(tmp_path / "realmix"))

    assert [each.item.id for each in judged] == ["q0/0", "q1/0"]
    assert [each.judged.score for each in judged] == [0, 1]


def test_llavas_file_of_mme_is_read(tmp_path: Path) -> None:
    items = mme_items(tmp_path)
    lines: list[dict[str, str]] = []
    for item in items:
        prompt = f"{item.question}\nAnswer the question using a single word or phrase."
        lines.append({"question_id": item.together, "prompt": prompt, "text": "Yes"})
    write_lines(tmp_path / "mme.jsonl", lines)

    judged = judged_answers(tmp_path / "mme.jsonl", BENCHMARKS["mme"], items)

    assert [each.judged.score for each in judged] == [1, 0] * 14


def test_what_is_sent_to_a_server_is_read(tmp_path: Path) -> None:
    """An Excel file with the question and what is right beside the prediction, one left empty."""
    write_realmix(tmp_path / "realmix", 3, pictures=False)
    benchmark = BENCHMARKS["realmix"]
    # Any: openpyxl brings no types.
    book: Any = openpyxl.Workbook()
    head = ("index", "question", "answer", "prediction")
    rows = [("q2/0", "which?", "0", 2), ("q0/0", "which?", "0", None), ("q1/0", "?", "0", "1")]
    for cells in (head, *rows):
        book.active.append(cells)
    folder = tmp_path / "run"
    folder.mkdir()
    book.save(folder / "realmix.xlsx")
    file = folder / "realmix.xlsx"
    assert Run("run", folder).file_of("realmix") == file

    judged = judged_answers(file, benchmark, benchmark.load(tmp_path / "realmix"))

    assert [each.judged.score for each in judged] == [0, 1, 1]


@pytest.mark.parametrize(
    ("index", "prediction", "message"),
    [
        ("q0/0", True, "has True as 'prediction' in row 2; a text is expected"),
        ("q0/0", datetime.date(2024, 5, 1), "has datetime.* as 'prediction' in row 2"),
        (False, "0", "has False as 'index' in row 2"),
        ("q0/0", "=1", "has the formula '=1' as 'prediction'"),
    ],
)
def test_cells_of_excel_that_are_no_answers_are_refused(
    tmp_path: Path, index: Any, prediction: Any, message: str
) -> None:
    write_realmix(tmp_path / "realmix", 1, pictures=False)
    benchmark = BENCHMARKS["realmix"]
    book: Any = openpyxl.Workbook()
    for cells in (("index", "prediction"), (index, prediction)):
        book.active.append(cells)
    file = tmp_path / "realmix.xlsx"
    book.save(file)

    with pytest.raises(LayerfuseError, match=message):
        judged_answers(file, benchmark, benchmark.load(tmp_path / "realmix"))


def write_asked(folder: Path, name: str, items: list[Item], prompt: Prompt) -> None:
    """Write down how the questions of a benchmark were asked, as `eval` does."""
    asked = {
        "benchmark": name,
        "prompt": prompt.model_dump(mode="json", exclude_none=True),
        "questions": digest_of_questions(items, prompt),
    }
    (folder / "asked.json").write_text(json.dumps(asked))


def test_answers_to_what_was_asked_otherwise_are_refused(tmp_path: Path) -> None:
    """The files of a benchmark may be of another revision than those that were asked."""
    write_realmix(tmp_path / "realmix", 2, pictures=False)
    benchmark = BENCHMARKS["realmix"]
    items = benchmark.load(tmp_path / "realmix")
    file = tmp_path / "run" / "realmix" / "answers.jsonl"
    write_answers(file, {"q0/0": "0", "q1/0": "1"})
    write_asked(file.parent, "realmix", items, Prompt(text="Say: {question}"))

    assert [each.judged.score for each in judged_answers(file, benchmark, items)] == [1, 1]
    # Moved questions are the same ones.
    moved = (tmp_path / "realmix").rename(tmp_path / "moved")
    assert len(judged_answers(file, benchmark, benchmark.load(moved))) == 2
    test_file = moved / "test.json"
    test_file.write_text(test_file.read_text().replace("which one", "which"))
    with pytest.raises(
        LayerfuseError, match=r"asked\.json says .* to other questions than those of"
    ):
        judged_answers(file, benchmark, benchmark.load(moved))
    test_file.write_text(test_file.read_text().replace("which", "which one"))
    test_file.write_text(test_file.read_text().replace("images/0.png", "images/7.png"))
    with pytest.raises(LayerfuseError, match="or to the same about pictures of other names"):
        judged_answers(file, benchmark, benchmark.load(moved))
    test_file.write_text(test_file.read_text().replace("images/7.png", "images/0.png"))
    write_answers(file, {"q0/0": "0"})
    write_asked(file.parent, "realmix", items[:1], Prompt(text="Say: {question}"))
    with pytest.raises(LayerfuseError, match=r"or to a part of them \(`layerfuse eval --limit`\)"):
        judged_answers(file, benchmark, benchmark.load(moved))


def test_answers_to_another_benchmark_are_refused(tmp_path: Path) -> None:
    """Benchmarks with ids of one form, such as numbers, may be taken for each other."""
    write_realmix(tmp_path / "realmix", 1, pictures=False)
    items = BENCHMARKS["realmix"].load(tmp_path / "realmix")
    file = tmp_path / "run" / "realmix" / "answers.jsonl"
    write_answers(file, {"q0/0": "0"})
    write_asked(file.parent, "mmstar", items, Prompt(text="{question}"))

    with pytest.raises(LayerfuseError, match="to another benchmark, 'mmstar', and not to realmix"):
        judged_answers(file, BENCHMARKS["realmix"], items)
    (file.parent / "asked.json").write_text('{"prompt": {"text": "what?"}}')
    with pytest.raises(LayerfuseError, match=r"asked\.json, prompt:\n.*must hold {question}"):
        judged_answers(file, BENCHMARKS["realmix"], items)


BOX = "[250, 167, 750, 833]"
"""That of `write_refcoco`, 10, 5, 30, 25 of 40 x 30 pixels, in thousandths without padding."""


def refcoco_scores(file: Path, items: list[Item]) -> list[float]:
    answers = judged_answers(file, BENCHMARKS["refcoco"], items)
    return [each.judged.score for each in answers]


def test_another_tools_boxes_are_read_as_a_file_of_its_folder_says(tmp_path: Path) -> None:
    write_refcoco(tmp_path / "refcoco")
    items = BENCHMARKS["refcoco"].load(tmp_path / "refcoco")
    file = tmp_path / "run" / "refcoco.jsonl"
    write_answers(file, {item.id: BOX for item in items})
    nested = tmp_path / "run" / "refcoco" / "answers.jsonl"
    write_answers(nested, {item.id: BOX for item in items})

    assert refcoco_scores(file, items) == [0, 0, 0]
    said = tmp_path / "run" / "boxes.yaml"
    said.write_text("{scale: thousand, padded: false}")
    assert refcoco_scores(file, items) == [1, 1, 1]
    assert refcoco_scores(nested, items) == [1, 1, 1]
    # Benchmarks without boxes do not ask for it.
    write_realmix(tmp_path / "realmix", 1, pictures=False)
    write_answers(tmp_path / "run" / "realmix.jsonl", {"q0/0": "0"})
    real = BENCHMARKS["realmix"]
    assert judged_answers(tmp_path / "run" / "realmix.jsonl", real, real.load(tmp_path / "realmix"))
    for text, message in (
        ("{scale: percent}", r"boxes\.yaml:\n.*'unit', 'pixels' or 'thousand'"),
        ("{pad: true}", "pad: unknown key; valid: scale, padded"),
        ("- scale", r"boxes\.yaml:\n"),
        ("", r"boxes\.yaml:\n"),
        ("{scale", "cannot read"),
    ):
        said.write_text(text)
        with pytest.raises(LayerfuseError, match=message):
            refcoco_scores(file, items)


def test_boxes_of_our_own_answers_are_read_as_they_were_asked_for(tmp_path: Path) -> None:
    write_refcoco(tmp_path / "refcoco")
    items = BENCHMARKS["refcoco"].load(tmp_path / "refcoco")
    file = tmp_path / "run" / "refcoco" / "answers.jsonl"
    write_answers(file, {item.id: BOX for item in items})
    prompt = {"text": "{question}", "boxes": {"scale": "thousand", "padded": False}}
    write_asked(file.parent, "refcoco", items, Prompt.model_validate(prompt))

    assert refcoco_scores(file, items) == [1, 1, 1]
    # What the prompt said counts, and no file about the answers of other tools.
    (tmp_path / "run" / "boxes.yaml").write_text("{scale: pixels}")
    assert refcoco_scores(file, items) == [1, 1, 1]


def test_boxes_that_a_question_tells_are_told_in_the_prompts_form(tmp_path: Path) -> None:
    write_refcoco(tmp_path / "refcoco")
    row = (tmp_path / "refcoco" / "refcoco.jsonl").read_text().split("\n")[0]
    (tmp_path / "refcoco" / "refcocog.jsonl").write_text(row)
    captions = BENCHMARKS["refcocog-captions"]
    items = captions.load(tmp_path / "refcoco")
    prompt = Prompt.model_validate({"text": "{question}", "boxes": {"scale": "pixels"}})
    assert prompt.boxes is not None
    told = [captions.with_box_form(item, prompt.boxes) for item in items]
    file = tmp_path / "run" / "refcocog-captions" / "answers.jsonl"
    write_answers(file, {"val-1": "the cup of val"})
    write_asked(file.parent, "refcocog-captions", told, prompt)

    (judged,) = judged_answers(file, captions, items)

    assert (judged.judged.score, judged.item.question) == (1, "[10, 10, 30, 30]")


def test_runs_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("lr=0.1", "b"):
        Path(name).mkdir()
    assert Run.parse("lr=0.1") == Run("lr=0.1", Path("lr=0.1"))
    assert Run.parse("low=lr=0.1") == Run("low", Path("lr=0.1"))
    assert Run.parse("b/../b/").name == "b"
    with pytest.raises(LayerfuseError, match="no folder c: give one that `layerfuse eval --suite`"):
        Run.parse("a=c")
    with pytest.raises(LayerfuseError, match="names no run: write NAME=FOLDER, with a name of one"):
        Run.parse("two\nlines=b")
    with pytest.raises(LayerfuseError, match="'=b' names no run"):
        Run.parse("=b")


def test_two_files_of_answers_to_one_benchmark_are_refused(tmp_path: Path) -> None:
    run = run_of(tmp_path, "a", "realmix", {"q0/0": "0"})
    assert run.file_of("realmix") == tmp_path / "a" / "realmix.jsonl"
    assert run.file_of("gqa") is None
    write_answers(tmp_path / "a" / "realmix" / "answers.jsonl", {"q0/0": "0"})
    with pytest.raises(LayerfuseError, match="answer realmix: remove one"):
        run.file_of("realmix")
