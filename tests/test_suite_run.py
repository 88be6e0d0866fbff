"""`layerfuse eval --suite`: answers kept as they come, resumed, refused, averaged and printed."""

import errno
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock
from rich.console import Console
from typer.testing import CliRunner, Result

from layerfuse.cli import app
from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.answer import Answerer, load_answerer
from layerfuse.evaluate.answer_folder import AskedModel
from layerfuse.evaluate.asking import ask_benchmark
from layerfuse.evaluate.benchmarks import BENCHMARKS, Item
from layerfuse.evaluate.benchmarks.interface import JudgedItem
from layerfuse.evaluate.suite_run import (
    Availability,
    average_lines,
    evaluate_suite,
    fill,
    look_for,
)
from layerfuse.evaluate.suites import Prompt, load_suite
from tests import tiny
from tests.made_up_benchmarks import (
    column,
    suite_of,
    write_lines,
    write_mme,
    write_realmix,
    write_refcoco,
    write_scienceqa,
)
from tests.studies import one_line, read_lines

PROMPT = Prompt(text="{question}\n{options}", max_new_tokens=8)
MODEL = AskedModel("runs/model", "abc")
SUITE = suite_of(
    column("counting", "realmix", column="counting", category="numbers"),
    column("SQA", "scienceqa"),
    column("RefCOCO", "refcoco"),
    column("MM-Vet", "mm-vet"),
    column("OCRBench", "ocrbench", divide=10),
)
"""Three benchmarks that `benchmarks` writes, one that is not scored, and one without files."""


def save_model(folder: Path, seed: int = 1) -> Path:
    """Save a random model; that of the usual seed gives answers that differ and can be read."""
    vlm = tiny.model("concat", seed=seed)
    vlm.save_pretrained(folder)
    tiny.processor(vlm).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random model."""
    return save_model(tmp_path_factory.mktemp("models") / "model")


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


def run_eval(model: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["eval", str(model), *options])


def write_suite(folder: Path, **changes: Any) -> Path:
    """`SUITE` as a file."""
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump({**SUITE.model_dump(mode="json"), **changes}))
    return file


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


def no_note(items: list[Item], folder: Path) -> dict[str, Any]:
    (folder / "asked.json").unlink()
    return {}


def damaged_note(items: list[Item], folder: Path) -> dict[str, Any]:
    (folder / "asked.json").write_text('{"benchmark": ')
    return {}


def list_for_note(items: list[Item], folder: Path) -> dict[str, Any]:
    (folder / "asked.json").write_text("[]")
    return {}


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
        (other_model, "of another model, or of this one before it was trained again"),
        (other_question, "to other questions"),
        (fewer_questions, "to other questions"),
        (no_note, r"answers\.jsonl lies beside no asked\.json"),
        (damaged_note, r"cannot read .*asked\.json"),
        (list_for_note, r"asked\.json holds \[\]; a mapping is expected"),
        (line_twice, r"answers\.jsonl, line 7 answers 'q0/0' a second time"),
        (changed_line({"id": "q9/0"}), "line 2 answers 'q9/0', no question of realmix"),
        (
            changed_line({"output": 5}),
            "line 2 is no answer: output: Input should be a valid string",
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


def test_a_moved_model_and_moved_benchmarks_are_the_same(
    answerer: Answerer, benchmarks: Path, tmp_path: Path
) -> None:
    ask(answerer, items_of(benchmarks, "realmix"), tmp_path / "a")
    before = (tmp_path / "a" / "answers.jsonl").read_bytes()
    moved = benchmarks.rename(tmp_path / "moved")

    ask(answerer, items_of(moved, "realmix"), tmp_path / "a", model=AskedModel("other", "abc"))

    assert (tmp_path / "a" / "answers.jsonl").read_bytes() == before


def test_a_model_is_known_by_its_files(model: Path, tmp_path: Path) -> None:
    again = save_model(tmp_path / "again")
    other = save_model(tmp_path / "other", seed=2)

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


# Suites


def test_a_suite_asks_what_there_is_and_says_what_is_missing(
    model: Path, benchmarks: Path, tmp_path: Path
) -> None:
    (benchmarks / "ocrbench").mkdir()
    output = tmp_path / "out"
    suite = write_suite(tmp_path)
    options = ("--suite", str(suite), "--benchmarks", str(benchmarks), "--output", str(output))

    ended = run_eval(model, *options)

    assert ended.exit_code == 0, ended.output
    said = one_line(ended)
    assert "not available: mm-vet: layerfuse does not score it" in said
    # The folder is there, and empty.
    assert "not available: ocrbench: no files in" in said
    assert "expected: OCRBench.json, OCRBench_Images/" in said
    assert "No average: MM-Vet, OCRBench missing." in said
    assert f"answers and scores: {output}" in said
    # One bar: all questions of the suite, 6 and 4 and 3.
    assert said.count("(13)") == 1
    assert "suite mine (13)" in said
    scores = json.loads((output / "suite.json").read_text())
    assert scores["average"] is None
    assert scores["averaged"] == []
    assert [each["missing"] == "" for each in scores["columns"]] == [True] * 3 + [False] * 2
    assert [each["questions"] for each in scores["columns"]] == [3, 2, 3, 0, 0]
    for name, count in (("realmix", 6), ("scienceqa", 4), ("refcoco", 3)):
        assert len(read_lines(output / name / "answers.jsonl")) == count

    again = run_eval(model, *options, "--partial-average", "--batch-size", "1")

    assert again.exit_code == 0, again.output
    assert "Average over 3 of 5 columns (counting, SQA, RefCOCO): " in one_line(again)
    assert "Not comparable with the paper's." in one_line(again)


def test_answers_lie_in_the_models_folder_by_default(benchmarks: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    suite = suite_of(column("SQA", "scienceqa"))

    folder = evaluate_suite(model, suite, benchmarks=benchmarks, console=Console(quiet=True))

    assert folder == model / "suites" / "mine"
    scores = json.loads((folder / "suite.json").read_text())
    (answered,) = scores["columns"]
    assert scores["average"] == answered["value"] == answered["averaged"]
    # What it wrote is no part of the model.
    evaluate_suite(model, suite, benchmarks=benchmarks, console=Console(quiet=True))


def judged(benchmarks: Path, name: str, right: int) -> list[JudgedItem]:
    """The questions of a benchmark, of which the first are answered rightly."""
    benchmark = BENCHMARKS[name]
    answered: list[JudgedItem] = []
    for place, item in enumerate(items_of(benchmarks, name)):
        answer = item.answers[0] if place < right else "?"
        answered.append(JudgedItem(item, benchmark.judge(item, answer)))
    return answered


def test_averages_are_over_the_divided_columns(benchmarks: Path) -> None:
    """By hand: 2 of 3 counted rightly; both pictures of ScienceQA, halved."""
    suite = suite_of(
        column("counting", "realmix", column="counting"),
        column("SQA", "scienceqa", divide=2),
    )
    answered = {
        # Questions 0, 2 and 4 are about numbers: four right ones are two of them.
        "realmix": judged(benchmarks, "realmix", 4),
        "scienceqa": judged(benchmarks, "scienceqa", 3),
    }
    found = Availability([], {}, [])

    scores = fill(suite, "m", answered, found, partial_average=False)

    counting, science = scores.columns
    assert counting.value == pytest.approx(200 / 3)
    assert (counting.best, counting.questions) == (100, 3)
    assert (science.value, science.averaged, science.questions) == (100, 50, 2)
    assert scores.average == pytest.approx((200 / 3 + 50) / 2)
    assert scores.averaged == ["counting", "SQA"]
    assert average_lines(suite, scores) == ["Average over all 2 columns: 58.33"]


def test_no_average_is_over_fewer_columns_unless_it_is_asked_for(benchmarks: Path) -> None:
    suite = suite_of(column("SQA", "scienceqa"), column("MM-Vet", "mm-vet"))
    answered = {"scienceqa": judged(benchmarks, "scienceqa", 1)}
    found = Availability([], {"mm-vet": "layerfuse does not score it"}, [])

    scores = fill(suite, "m", answered, found, partial_average=False)
    partial = fill(suite, "m", answered, found, partial_average=True)

    assert (scores.average, scores.averaged) == (None, [])
    (line,) = average_lines(suite, scores)
    assert line.startswith("No average: MM-Vet missing.")
    assert (partial.average, partial.averaged) == (50, ["SQA"])
    (line,) = average_lines(suite, partial)
    assert line.startswith("Average over 1 of 2 columns (SQA): 50.00.")
    without = suite_of(column("SQA", "scienceqa"), average=None)
    scores = fill(without, "m", answered, found, partial_average=False)
    assert scores.average is None
    assert average_lines(without, scores) == []


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("realmix/images/3.png", r"real pictures: 1 of 6 pictures are missing, .*3\.png"),
        ("scienceqa/pid_splits.json", r"pid_splits\.json"),
        ("realmix/test.json", r"no .*test\.json; expected: test\.json, images/"),
    ],
)
def test_what_is_there_in_part_is_refused_before_the_model_is_loaded(
    benchmarks: Path, tmp_path: Path, file: str, message: str
) -> None:
    (benchmarks / file).unlink()
    with pytest.raises(LayerfuseError, match=message):
        # There is no model: it is not looked for.
        evaluate_suite(tmp_path / "none", SUITE, benchmarks=benchmarks)


def test_a_column_that_is_not_reported_is_refused_before_anything_is_asked(
    benchmarks: Path,
) -> None:
    misspelt = suite_of(column("counts", "realmix", column="count"))
    with pytest.raises(LayerfuseError, match="'counts': real pictures reports no 'count'; valid: "):
        look_for(misspelt, benchmarks)


def test_a_benchmark_without_a_prompt_is_refused(benchmarks: Path, tmp_path: Path) -> None:
    words = tmp_path / "words.yaml"
    words.write_text("gqa: {text: '{question}'}")
    suite = suite_of(column("SQA", "scienceqa")).model_copy(update={"prompts": str(words)})
    with pytest.raises(LayerfuseError, match=r"words\.yaml' have none for benchmark 'scienceqa'"):
        look_for(suite, benchmarks)


def test_a_suite_of_which_nothing_is_there_is_refused(tmp_path: Path) -> None:
    console = Console(file=io.StringIO())
    with pytest.raises(LayerfuseError, match=r"no benchmark of suite .* is at hand: .*--bench"):
        evaluate_suite(tmp_path, SUITE, benchmarks=tmp_path / "none", console=console)


def test_notes_of_benchmarks_stand_below_the_scores(tmp_path: Path) -> None:
    write_mme(tmp_path / "mme", 1)
    for task in (tmp_path / "mme").iterdir():
        (task / "0000.jpg").write_bytes(b"a picture")
    suite = suite_of(column("MME", "mme"))
    found = look_for(suite, tmp_path)
    assert found.notes == ["28 questions were found; the published MME has 2374"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --suite NAME, --data FILE"),
        (["--suite", "offline", "--data", "x.json"], "give --suite NAME, --data FILE"),
        (["--suite", "offline", "--split", "test"], "--split goes with --data alone"),
        (["--suite", "offline", "--limit", "5"], "--limit goes with --data"),
        (["--suite", "offline", "--column", "a=b"], "--column goes with --data alone"),
        (["--suite", "offline", "--ignore-column", "b"], "--ignore-column goes with --data alone"),
        (["--suite", "offline", "--literal-answers"], "--literal-answers goes with --data alone"),
        (["--suite", "offline", "--max-new-tokens", "5"], "--max-new-tokens goes with --data"),
        (["--suite", "offline", "--controls"], "--controls goes with --data alone"),
        (["--suite", "offline", "--seed", "0"], "--seed goes with --data alone"),
        (["--suite", "offline", "--benchmarks", "x"], "needs no files: leave --benchmarks out"),
        (["--suite", "igva", "--partial-average"], "no average: leave --partial-average out"),
        (["--data", "x.json", "--benchmarks", "x"], "--benchmarks goes with --suite"),
        (["--data", "x.json", "--partial-average"], "--partial-average goes with --suite alone"),
        (["--data", __file__, "--split", "test"], "--split is of a dataset"),
    ],
)
def test_options_that_would_change_nothing_are_refused(options: list[str], message: str) -> None:
    ended = run_eval(Path("no model"), *options)
    assert ended.exit_code == 2
    assert message in one_line(ended)


def test_a_folder_that_cannot_be_made_is_one_clear_error(
    model: Path, benchmarks: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    suite = suite_of(column("SQA", "scienceqa"))
    with pytest.raises(LayerfuseError, match=r"cannot write .*file/out/scienceqa/asked\.json"):
        evaluate_suite(
            model,
            suite,
            benchmarks=benchmarks,
            output=tmp_path / "file" / "out",
            console=Console(quiet=True),
        )


def test_closed_questions_are_also_answered_by_likelihood(
    model: Path, benchmarks: Path, tmp_path: Path
) -> None:
    """ScienceQA has options; where a box is right nothing can be chosen."""
    screen = io.StringIO()

    folder = evaluate_suite(
        model,
        suite_of(column("SQA", "scienceqa", column="accuracy"), column("RefCOCO", "refcoco")),
        benchmarks=benchmarks,
        output=tmp_path / "out",
        likelihood=True,
        console=Console(file=screen, width=120),
    )

    lines = read_lines(folder / "scienceqa" / "choices.jsonl")
    right = {
        item.id: item.answers[0] for item in BENCHMARKS["scienceqa"].load(benchmarks / "scienceqa")
    }
    for line in lines:
        likelihoods = line["log_likelihoods"]
        assert line["chosen"] == max(likelihoods, key=lambda letter: likelihoods[letter])
        assert line["score"] == float(line["chosen"] == right[line["id"]])
    assert len(lines) == len(right)
    scores = json.loads((folder / "suite.json").read_text())
    science, boxes = scores["by_likelihood"]
    assert science["value"] == pytest.approx(100 * sum(x["score"] for x in lines) / len(lines))
    assert boxes["value"] is None
    assert "open" in boxes["missing"]
    assert "by likelihood" in screen.getvalue()
    assert not (folder / "refcoco" / "choices.jsonl").exists()


def test_one_benchmark_prints_all_its_numbers(
    model: Path, benchmarks: Path, tmp_path: Path
) -> None:
    screen = io.StringIO()

    folder = evaluate_suite(
        model,
        load_suite("scienceqa"),
        benchmarks=benchmarks,
        output=tmp_path / "out",
        console=Console(file=screen, width=120),
    )

    columns = json.loads((folder / "scienceqa" / "scores.json").read_text())["columns"]
    assert {"image accuracy", "accuracy", "NAT"} <= {column["name"] for column in columns}
    for each in columns:
        assert each["name"] in screen.getvalue()
        assert f"{each['value']:.2f}" in screen.getvalue()
