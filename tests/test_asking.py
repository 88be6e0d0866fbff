"""Answers to a benchmark: kept as they come, continued, and refused where they answer another."""

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from PIL import Image

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.answer import Answerer
from layerfuse.evaluate.answer_folder import AskedModel, digest_of_pictures
from layerfuse.evaluate.asking import ask_benchmark
from layerfuse.evaluate.benchmarks import BENCHMARKS, Item
from layerfuse.evaluate.benchmarks.interface import JudgedItem
from layerfuse.evaluate.benchmarks.official_pictures import picture_from_bytes
from layerfuse.evaluate.boxes import BoxForm
from layerfuse.evaluate.load_answerer import load_answerer
from layerfuse.evaluate.suites import Prompt
from layerfuse.vision.picture import Picture
from tests import tiny
from tests.made_up_benchmarks import (
    write_lines,
    write_realmix,
    write_refcoco,
    write_scienceqa,
)
from tests.studies import read_lines

PROMPT = Prompt(text="{question}\n{options}", max_new_tokens=8)
MODEL = AskedModel("runs/model", "abc")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random model."""
    return tiny.save_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def answerer(model: Path) -> Answerer:
    return load_answerer(model)


@pytest.fixture
def benchmarks(tmp_path: Path) -> Path:
    """A folder with three benchmarks."""
    folder = tmp_path / "benchmarks"
    write_realmix(folder / "realmix")
    write_scienceqa(folder / "scienceqa")
    write_refcoco(folder / "refcoco")
    return folder


def items_of(benchmarks: Path, name: str) -> list[Item]:
    return BENCHMARKS[name].load(benchmarks / name)


def ask(answerer: Answerer, items: list[Item], folder: Path, **options: Any) -> list[JudgedItem]:
    """Ask the questions of `realmix`, two at once."""
    prompt = options.pop("prompt", PROMPT)
    options = {"model": MODEL, "batch_size": 2, **options}
    return ask_benchmark(answerer, BENCHMARKS["realmix"], items, prompt, folder, **options)


def without_seconds(folder: Path) -> list[dict[str, Any]]:
    """The lines of a folder of answers but for what no two runs share."""
    lines = read_lines(folder / "answers.jsonl")
    for line in lines:
        assert line.pop("seconds") > 0
    return lines


# Answers


def test_each_answer_is_a_line_with_all_that_is_known(
    answerer: Answerer, benchmarks: Path, tmp_path: Path
) -> None:
    items = items_of(benchmarks, "realmix")
    seen: list[tuple[int, int]] = []

    def watch(phase: str, done: int, total: int, note: str = "") -> None:
        # The lines are there while it runs.
        lines = (tmp_path / "a" / "answers.jsonl").exists() and without_seconds(tmp_path / "a")
        seen.append((done, len(lines or [])))

    answered = ask(answerer, items, tmp_path / "a", progress=watch)

    assert seen == [(0, 0), (2, 2), (4, 4), (6, 6)]
    lines = without_seconds(tmp_path / "a")
    assert len({line["output"] for line in lines}) > 1
    for item, line, each in zip(items, lines, answered, strict=True):
        assert line == {
            "id": item.id,
            "prompt": PROMPT.ask(item),
            "output": line["output"],
            "parsed": each.judged.parsed,
            "score": each.judged.score,
        }
        assert BENCHMARKS["realmix"].judge(item, line["output"]) == each.judged


@pytest.mark.parametrize(
    ("strategy", "name"),
    [("concat", "realmix"), ("concat", "scienceqa"), ("text_routed", "scienceqa")],
)
def test_answers_are_those_of_any_batch_and_any_order(
    benchmarks: Path, tmp_path: Path, strategy: str, name: str
) -> None:
    """Prompts of different lengths, padded on the left; half of ScienceQA's have no picture."""
    items = items_of(benchmarks, name)
    vlm = tiny.model(strategy, seed=3)
    answerer = Answerer(vlm, tiny.processor(vlm))

    def outputs(batch_size: int, ordered: list[Item]) -> dict[str, str]:
        folder = tmp_path / f"{batch_size} {ordered[0].id.replace('/', ' ')}"
        asked = (answerer, BENCHMARKS[name], ordered, PROMPT, folder)
        ask_benchmark(*asked, model=MODEL, batch_size=batch_size)
        return {line["id"]: line["output"] for line in without_seconds(folder)}

    alone = outputs(1, items)
    assert len(set(alone.values())) > 1
    assert outputs(5, items) == alone
    assert outputs(3, items[::-1]) == alone


def test_boxes_are_asked_for_although_no_text_is_right(
    answerer: Answerer, benchmarks: Path, tmp_path: Path
) -> None:
    items = items_of(benchmarks, "refcoco")
    asked = (answerer, BENCHMARKS["refcoco"], items, PROMPT, tmp_path / "a")
    assert len(ask_benchmark(*asked, model=MODEL)) == 3


@pytest.mark.parametrize("batch_size", [1, 5])
def test_answers_stop_at_the_texts_of_the_prompt(
    answerer: Answerer, benchmarks: Path, tmp_path: Path, batch_size: int
) -> None:
    items = items_of(benchmarks, "realmix")
    ask(answerer, items, tmp_path / "whole")
    whole = [line["output"] for line in without_seconds(tmp_path / "whole")]
    # What some answers say first, some later, and some never.
    (stop,) = {text[1] for text in whole if text.startswith("W")} - {"W"}
    expected = [text.partition(stop)[0] for text in whole]
    assert len({len(text) for text in expected}) == 3

    prompt = PROMPT.model_copy(update={"stop": (stop, "never said")})
    ask(answerer, items, tmp_path / "stopped", prompt=prompt, batch_size=batch_size)

    assert [line["output"] for line in without_seconds(tmp_path / "stopped")] == expected


# Resuming


def test_a_killed_run_goes_on_and_equals_one_that_was_not(
    answerer: Answerer, benchmarks: Path, tmp_path: Path
) -> None:
    items = items_of(benchmarks, "realmix")
    whole = ask(answerer, items, tmp_path / "whole")
    expected = without_seconds(tmp_path / "whole")

    def kill(phase: str, done: int, total: int, note: str = "") -> None:
        if done == 4:
            raise KeyboardInterrupt

    killed = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        ask(answerer, items, killed, progress=kill)
    kept = (killed / "answers.jsonl").read_bytes()
    assert len(kept.splitlines()) == 4

    assert ask(answerer, items, killed, batch_size=5) == whole
    assert without_seconds(killed) == expected
    # What was answered is not asked again: its seconds are those of before.
    assert (killed / "answers.jsonl").read_bytes().startswith(kept)


@pytest.mark.parametrize("left", [0, 1, 200, -1, -20])
def test_a_line_that_was_cut_off_is_asked_again(
    answerer: Answerer, benchmarks: Path, tmp_path: Path, left: int
) -> None:
    items = items_of(benchmarks, "realmix")
    ask(answerer, items, tmp_path / "a")
    expected = without_seconds(tmp_path / "a")
    file = tmp_path / "a" / "answers.jsonl"
    file.write_bytes(file.read_bytes()[:left])

    ask(answerer, items, tmp_path / "a")

    assert without_seconds(tmp_path / "a") == expected


def test_a_finished_run_asks_nothing(answerer: Answerer, benchmarks: Path, tmp_path: Path) -> None:
    """Its answers may hold separators of lines that are none of JSON lines."""
    items = items_of(benchmarks, "realmix")
    ask(answerer, items, tmp_path / "a")
    file = tmp_path / "a" / "answers.jsonl"
    lines = read_lines(file)
    lines[0]["output"] = "0\u2028\x85"
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    file.write_text(text, encoding="utf-8")
    before = file.read_bytes()

    answered = ask(answerer, items, tmp_path / "a")

    assert file.read_bytes() == before
    # Judged anew, whatever the line says of its score.
    assert lines[0]["score"] == 0
    assert answered[0].judged.score == 1


# What a folder refuses


def other_prompt(items: list[Item], folder: Path) -> dict[str, Any]:
    return {"prompt": Prompt(text="{question}", max_new_tokens=8)}


def longer_answers(items: list[Item], folder: Path) -> dict[str, Any]:
    return {"prompt": PROMPT.model_copy(update={"max_new_tokens": 9})}


def other_model(items: list[Item], folder: Path) -> dict[str, Any]:
    return {"model": AskedModel(MODEL.folder, "def")}


def other_question(items: list[Item], folder: Path) -> dict[str, Any]:
    """The same id and another question in the middle."""
    item = items[2]
    items[2] = Item(item.id, item.pictures, "how many?", item.answers, item.group)
    return {}


def fewer_questions(items: list[Item], folder: Path) -> dict[str, Any]:
    del items[3]
    return {}


def other_picture(items: list[Item], folder: Path) -> dict[str, Any]:
    """Another picture under the name of the third."""
    Image.new("RGB", (64, 48), "orange").save(items[2].pictures[0].name)
    return {}


def no_note(items: list[Item], folder: Path) -> dict[str, Any]:
    (folder / "asked.json").unlink()
    return {}


def damaged_note(items: list[Item], folder: Path) -> dict[str, Any]:
    (folder / "asked.json").write_text('{"benchmark": ')
    return {}


def list_for_note(items: list[Item], folder: Path) -> dict[str, Any]:
    (folder / "asked.json").write_text("[]")
    return {}


def test_answers_of_before_pictures_were_written_down_are_continued(
    answerer: Answerer, benchmarks: Path, tmp_path: Path
) -> None:
    items = items_of(benchmarks, "realmix")
    ask(answerer, items, tmp_path / "a")
    before = (tmp_path / "a" / "answers.jsonl").read_bytes()
    note = tmp_path / "a" / "asked.json"
    asked = json.loads(note.read_text())
    del asked["pictures"]
    note.write_text(json.dumps(asked))

    ask(answerer, items, tmp_path / "a")

    assert (tmp_path / "a" / "answers.jsonl").read_bytes() == before


def line_twice(items: list[Item], folder: Path) -> dict[str, Any]:
    lines = read_lines(folder / "answers.jsonl")
    write_lines(folder / "answers.jsonl", [*lines, lines[0]])
    return {}


def changed_line(changes: dict[str, Any]) -> Callable[[list[Item], Path], dict[str, Any]]:
    """Changes the second line."""

    def change(items: list[Item], folder: Path) -> dict[str, Any]:
        lines = read_lines(folder / "answers.jsonl")
        lines[1].update(changes)
        write_lines(folder / "answers.jsonl", lines)
        return {}

    return change


def broken_bytes(items: list[Item], folder: Path) -> dict[str, Any]:
    file = folder / "answers.jsonl"
    file.write_bytes(b"\xff" + file.read_bytes())
    return {}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (other_prompt, "holds answers to another prompt. Remove the folder, or give another"),
        (longer_answers, "holds answers to another prompt"),
        (other_model, "of another model, of this one before it was trained again"),
        (other_question, "to other questions"),
        (fewer_questions, "to other questions"),
        (other_picture, "to the same questions about other pictures"),
        (no_note, r"answers\.jsonl lies beside no asked\.json"),
        (damaged_note, r"cannot read .*asked\.json"),
        (list_for_note, r"asked\.json holds \[\]; a mapping is expected"),
        (line_twice, r"answers\.jsonl, line 7 answers 'q0/0' a second time"),
        (changed_line({"id": "q9/0"}), "line 2 answers 'q9/0', no question of realmix"),
        (
            changed_line({"output": 5}),
            "line 2 is no answer: output: Input should be a valid string",
        ),
        (
            changed_line({"score": "1"}),
            "line 2 is no answer: score: Input should be a valid number",
        ),
        (changed_line({"more": 5}), "line 2 is no answer: more: Unexpected keyword argument"),
        (broken_bytes, r"cannot read .*answers\.jsonl"),
    ],
)
def test_answers_of_another_run_are_not_continued(
    answerer: Answerer,
    benchmarks: Path,
    tmp_path: Path,
    spoil: Callable[[list[Item], Path], dict[str, Any]],
    message: str,
) -> None:
    items = items_of(benchmarks, "realmix")
    ask(answerer, items, tmp_path / "a")
    options = spoil(items, tmp_path / "a")
    with pytest.raises(LayerfuseError, match=message):
        ask(answerer, items, tmp_path / "a", **options)


def test_pictures_are_known_by_their_bytes_and_files_by_how_many(tmp_path: Path) -> None:
    names = ("a/1.png", "b/2.png")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    files = [Picture(str(tmp_path / name)) for name in names]
    digest = digest_of_pictures([("x", files), ("y", files[:1])])

    # In whatever order and folder.
    (tmp_path / "a").rename(tmp_path / "c")
    moved = Picture(str(tmp_path / "c" / "1.png"))
    assert digest_of_pictures([("y", [moved]), ("x", [moved, files[1]])]) == digest
    (tmp_path / "c" / "1.png").write_bytes(b"longer than before")
    assert digest_of_pictures([("x", [moved, files[1]]), ("y", [moved])]) != digest

    def of_cells(first: bytes, second: bytes) -> str:
        cells = [picture_from_bytes("row 1", first), picture_from_bytes("row 2", second)]
        return digest_of_pictures([("x", cells[:1]), ("y", cells[1:])])

    assert of_cells(b"red", b"tan") == of_cells(b"red", b"tan")
    assert of_cells(b"red", b"tan") != of_cells(b"tan", b"red")
    with pytest.raises(LayerfuseError, match=r"cannot read the image .*gone\.png"):
        digest_of_pictures([("x", [Picture(str(tmp_path / "gone.png"))])])


def test_pictures_that_change_places_are_others(tmp_path: Path) -> None:
    """ScienceQA's are all called `image.png`."""
    names = ("1/image.png", "2/image.png")
    for name in names:
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"longer" if name == names[0] else b"short")
    asked = [(name, [Picture(str(tmp_path / name))]) for name in names]
    digest = digest_of_pictures(asked)

    (tmp_path / names[0]).rename(tmp_path / "0.png")
    (tmp_path / names[1]).rename(tmp_path / names[0])
    (tmp_path / "0.png").rename(tmp_path / names[1])

    assert digest_of_pictures(asked) != digest


def test_a_moved_model_and_moved_benchmarks_are_the_same(
    answerer: Answerer, benchmarks: Path, tmp_path: Path
) -> None:
    ask(answerer, items_of(benchmarks, "realmix"), tmp_path / "a")
    before = (tmp_path / "a" / "answers.jsonl").read_bytes()
    moved = benchmarks.rename(tmp_path / "moved")

    ask(answerer, items_of(moved, "realmix"), tmp_path / "a", model=AskedModel("other", "abc"))

    assert (tmp_path / "a" / "answers.jsonl").read_bytes() == before


def test_only_what_a_prompt_says_is_compared_with_earlier_runs(
    answerer: Answerer, benchmarks: Path, tmp_path: Path
) -> None:
    """Answers from before prompts had a form of boxes are continued, others are refused."""
    items = items_of(benchmarks, "realmix")
    ask(answerer, items, tmp_path / "a")
    asked = json.loads((tmp_path / "a" / "asked.json").read_text())
    assert asked["prompt"] == {"text": PROMPT.text, "max_new_tokens": 8, "stop": []}
    boxed = PROMPT.model_copy(update={"boxes": BoxForm(scale="pixels")})
    with pytest.raises(LayerfuseError, match="holds answers to another prompt"):
        ask(answerer, items, tmp_path / "a", prompt=boxed)


def test_a_model_is_known_by_its_files(model: Path, tmp_path: Path) -> None:
    again = tiny.save_model(tmp_path / "again")
    other = tiny.save_model(tmp_path / "other", seed=2)

    digest = AskedModel.of(model).digest
    assert AskedModel.of(again).digest == digest
    assert AskedModel.of(other).digest != digest
    (again / "suites").mkdir()
    (again / "notes.txt").write_text("none of the model's files")
    assert AskedModel.of(again).digest == digest
    with pytest.raises(LayerfuseError, match=r"cannot read the model in .*gone"):
        AskedModel.of(tmp_path / "gone")


def test_two_processes_do_not_write_one_file(
    answerer: Answerer, benchmarks: Path, tmp_path: Path
) -> None:
    items = items_of(benchmarks, "realmix")
    ask(answerer, items, tmp_path / "a")
    with (
        FileLock(tmp_path / "a" / ".lock"),
        pytest.raises(LayerfuseError, match="another process is writing the answers in"),
    ):
        ask(answerer, items, tmp_path / "a")


def test_a_full_disk_is_one_clear_error(
    answerer: Answerer, benchmarks: Path, tmp_path: Path
) -> None:
    (tmp_path / "a").mkdir()
    # A device that is always full.
    (tmp_path / "a" / "answers.jsonl").symlink_to("/dev/full")
    with pytest.raises(LayerfuseError, match=r"cannot write .*answers\.jsonl") as caught:
        ask(answerer, items_of(benchmarks, "realmix"), tmp_path / "a")
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
