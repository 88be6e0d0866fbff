"""lmms-eval asks models of layerfuse: the plug-in, `layerfuse eval --lmms`, and layerfuse's tasks.

They need lmms-eval, for which `make test-lmms` builds an environment.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from layerfuse.data.sample import Sample
from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.answer import Answerer
from layerfuse.evaluate.likelihood import answer_likelihoods
from layerfuse.evaluate.lmms_run import OWN_TASKS, evaluate_lmms
from layerfuse.evaluate.load_answerer import load_answerer
from layerfuse.evaluate.questions import Question, with_all_pictures
from layerfuse.model.chat_template import literal
from layerfuse.vision.picture import Picture
from layerfuse_cli.app import app
from tests import tiny
from tests.lmms.local_tasks import (
    COLOURS,
    LONGEST,
    OPTIONS,
    PICTURES,
    ROUNDS,
    drawn,
    question,
    write_tasks,
)
from tests.studies import read_lines

# Any: lmms-eval has no types, and is not installed where they are checked
lmms_eval: Any = pytest.importorskip("lmms_eval", reason="make test-lmms")

# lmms-eval and what it imports warn of much.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Datasets are read anew in each test, and nothing is left behind in the user's folders."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The folder of a tiny model with its processor."""
    folder = tmp_path / "model"
    vlm = tiny.model("concat")
    vlm.save_pretrained(folder)
    tiny.processor(vlm).save_pretrained(folder)
    return folder


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """The folder of the tiny tasks."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    write_tasks(folder)
    return folder


def run(model: Any, name: str, tasks: Path, *, simple: bool, batch_size: int = 2) -> list[Any]:
    """Have lmms-eval ask one task.

    Args:
        model: a folder, or an object of the plug-in.
        name: of the task.
        tasks: the folder of the tasks.
        simple: whether the simple class is asked.
        batch_size: requests at once.

    Returns:
        What lmms-eval keeps of each question, in order.
    """
    # Not above: these are imported in seconds, also where no test of this file is to run.
    from lmms_eval.evaluator import (  # pyright: ignore[reportMissingImports]
        simple_evaluate,
    )
    from lmms_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    manager = TaskManager(include_path=str(tasks), include_defaults=False, model_name="layerfuse")
    is_folder = isinstance(model, Path)
    results = simple_evaluate(
        model="layerfuse" if is_folder else model,
        model_args=f"pretrained={model}" if is_folder else None,
        tasks=[name],
        batch_size=batch_size,
        task_manager=manager,
        force_simple=simple,
        verbosity="WARNING",
    )
    return results["samples"][name]


def named_question(number: int, messages: Sequence[dict[str, str]], answer: str = "") -> Question:
    """A question about the pictures of one of the tiny tasks, as layerfuse itself asks it."""
    pictures: list[Picture] = []
    for place, image in enumerate(drawn(number)):
        file = Path(f"{number}-{place}.png")
        image.save(file)
        pictures.append(Picture(str(file)))
    sample = Sample(str(number), tuple(pictures), tuple(messages))
    return Question(str(number), sample, tuple(messages), answer, "all", "all")


def of_text(number: int, text: str, answer: str = "") -> Question:
    """The question as a text behind its pictures."""
    words = with_all_pictures(literal(text), PICTURES[number])
    return named_question(number, [{"role": "user", "content": words}], answer)


@pytest.fixture
def asked_alone(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What layerfuse's own Answerer says to the tiny questions, one by one."""
    monkeypatch.chdir(tmp_path)
    answerer = load_answerer(model)
    answers: list[str] = []
    for number in range(len(PICTURES)):
        asked = [of_text(number, question(number))]
        answers += answerer.answer(asked, max_new_tokens=LONGEST, batch_size=1)
    return answers


def test_lmms_eval_finds_the_model() -> None:
    from lmms_eval.models import (  # pyright: ignore[reportMissingImports]
        get_model,
        get_model_manifest,
    )

    manifest = get_model_manifest("layerfuse")

    assert manifest.simple_class_path == "layerfuse.evaluate.lmms.SimpleModel"
    assert manifest.chat_class_path == "layerfuse.evaluate.lmms.ChatModel"
    assert get_model("layerfuse", force_simple=True).is_simple
    assert not get_model("layerfuse").is_simple


@pytest.mark.parametrize("simple", [True, False], ids=["simple", "chat"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_answers_are_those_of_the_answerer(
    model: Path, tasks: Path, asked_alone: list[str], simple: bool, batch_size: int
) -> None:
    """One picture, none and several, in batches and alone; `<image>` in words is no picture."""
    samples = run(model, "tiny_text", tasks, simple=simple, batch_size=batch_size)

    assert [sample["filtered_resps"] for sample in samples] == [[text] for text in asked_alone]
    # Else equality would mean little.
    assert len(set(asked_alone)) > 2


@pytest.mark.parametrize("simple", [True, False], ids=["simple", "chat"])
def test_answers_are_those_of_eval(model: Path, tasks: Path, tmp_path: Path, simple: bool) -> None:
    records: list[dict[str, Any]] = []
    for number in range(len(PICTURES)):
        # What LLaVA's files can say: one picture, in front of words without `<image>`.
        if PICTURES[number] != 1 or "<image>" in question(number):
            continue
        drawn(number)[0].save(tmp_path / f"{number}.png")
        turns = [
            {"from": "human", "value": f"<image>\n{question(number)}"},
            {"from": "gpt", "value": "yes"},
        ]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    data = tmp_path / "data.json"
    data.write_text(json.dumps(records))

    samples = run(model, "tiny_text", tasks, simple=simple)
    arguments = ["eval", str(model), "--data", str(data), "--max-new-tokens", str(LONGEST)]
    ended = CliRunner().invoke(app, arguments)

    assert ended.exit_code == 0, ended.output
    by_eval = read_lines(model / "evaluation" / "data" / "predictions.jsonl")
    assert len(by_eval) == 2
    for record, answer in zip(records, by_eval, strict=True):
        sample = samples[int(record["id"])]
        assert sample["filtered_resps"] == [answer["prediction"]]


def test_stop_texts_end_answers(model: Path, asked_alone: list[str], tmp_path: Path) -> None:
    longest = max(asked_alone, key=len)
    stop = longest[2]
    folder = tmp_path / "stopped"
    folder.mkdir()
    write_tasks(folder, until=json.dumps([stop]))

    samples = run(model, "tiny_text", folder, simple=True)

    said = [sample["filtered_resps"][0] for sample in samples]
    assert said == [text.partition(stop)[0].strip() for text in asked_alone]
    assert said != asked_alone


def test_messages_show_pictures_where_they_stand(
    model: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected: list[str] = []
    for number in range(len(PICTURES)):
        content = "Look:" + "<image> and " * PICTURES[number] + literal(question(number))
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": content},
        ]
        asked = [named_question(number, messages)]
        expected += load_answerer(model).answer(asked, max_new_tokens=LONGEST)

    samples = run(model, "tiny_messages", tasks, simple=False)

    assert [sample["filtered_resps"][0] for sample in samples] == expected


@pytest.mark.parametrize("batch_size", [1, 4])
def test_least_loss_is_chosen(
    model: Path,
    tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
) -> None:
    """lmms-eval takes the option with the least value, so losses are given, as by its models."""
    monkeypatch.chdir(tmp_path)
    answerer = load_answerer(model)

    samples = run(model, "tiny_options", tasks, simple=True, batch_size=batch_size)

    assert len(samples) == len(PICTURES)
    for number, sample in enumerate(samples):
        asked = [of_text(number, question(number), option) for option in OPTIONS]
        likelihoods = answer_likelihoods(answerer, asked, batch_size=1)
        losses = [loss for loss, _ in sample["filtered_resps"]]
        assert losses == pytest.approx([-likelihood.mean for likelihood in likelihoods], abs=1e-5)
        assert min(losses) > 0
        best = losses.index(min(losses))
        assert sample["acc"] == float(best == sample["target"])
        # Not total log-probabilities, of which the shortest option would have the highest.
        assert losses[0] != pytest.approx(-likelihoods[0].total)


@pytest.mark.parametrize("simple", [True, False], ids=["simple", "chat"])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_each_round_is_asked(
    model: Path,
    tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    simple: bool,
    batch_size: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    answerer = load_answerer(model)

    samples = run(model, "tiny_rounds", tasks, simple=simple, batch_size=batch_size)

    for number, sample in enumerate(samples):
        answers = answerer.answer([of_text(number, question(number))], max_new_tokens=LONGEST)
        for place in range(1, ROUNDS[number]):
            text = f"You said {answers[-1]!r} in round {place}. And now?"
            pictures = drawn(number)[:1]
            answers.append(answerer.ask(pictures, text, max_new_tokens=LONGEST))
        assert sample["filtered_resps"] == [answers]
        assert len(answers) == ROUNDS[number]


@pytest.mark.parametrize("simple", [True, False], ids=["simple", "chat"])
def test_rounds_without_end_stop_the_run(model: Path, tasks: Path, simple: bool) -> None:
    with pytest.raises(LayerfuseError, match="did not end"):
        run(model, "tiny_endless", tasks, simple=simple, batch_size=5)


class BrokenAnswerer(Answerer):
    """An Answerer whose model fails."""

    def answer(self, *arguments: Any, **options: Any) -> list[str]:
        """Fail as a model without memory does."""
        raise RuntimeError("out of memory")


@pytest.mark.parametrize("simple", [True, False], ids=["simple", "chat"])
@pytest.mark.parametrize("name", ["tiny_text", "tiny_rounds"])
def test_an_error_of_the_model_stops_the_run(tasks: Path, simple: bool, name: str) -> None:
    from layerfuse.evaluate.lmms import ChatModel, SimpleModel

    vlm = tiny.model("concat")
    broken = BrokenAnswerer(vlm, tiny.processor(vlm))
    model_class = SimpleModel if simple else ChatModel

    with pytest.raises(RuntimeError, match="out of memory"):
        run(model_class("no folder", answerer=broken), name, tasks, simple=simple)


@pytest.mark.parametrize("simple", [True, False], ids=["simple", "chat"])
def test_a_picture_that_is_missing_stops_the_run(model: Path, tasks: Path, simple: bool) -> None:
    with pytest.raises(LayerfuseError, match="no such folder"):
        run(model, "tiny_missing", tasks, simple=simple)


def test_options_of_the_model_are_checked(model: Path) -> None:
    from layerfuse.evaluate.lmms import SimpleModel

    with pytest.raises(LayerfuseError, match="batch_size is 'auto'"):
        SimpleModel(model, batch_size="auto")
    with pytest.raises(LayerfuseError, match="no model in"):
        SimpleModel(model / "nowhere")


def eval_lmms(model: Path, *options: str) -> Any:
    """Run `layerfuse eval`."""
    return CliRunner().invoke(app, ["eval", str(model), *options])


def test_eval_writes_results_and_answers(
    model: Path, tasks: Path, tmp_path: Path, asked_alone: list[str]
) -> None:
    """Tasks that generate and tasks that compare likelihoods run in one go."""
    output = tmp_path / "output"

    ended = eval_lmms(
        model,
        *("--lmms", "tiny_text,tiny_opt*", "--lmms-include", str(tasks)),
        *("--output", str(output), "--batch-size", "2", "--limit", "4"),
    )

    assert ended.exit_code == 0, ended.output
    results = json.loads((output / "results.json").read_text())
    assert results["lmms_eval"] == "0.7.3"
    assert results["results"]["tiny_text"]["said,none"] == 1.0
    samples = read_lines(output / "samples" / "tiny_options.jsonl")
    accuracy = sum(sample["acc"] for sample in samples) / 4
    assert results["results"]["tiny_options"]["acc,none"] == accuracy
    answers = read_lines(output / "samples" / "tiny_text.jsonl")
    assert [answer["filtered_resps"] for answer in answers] == [[text] for text in asked_alone[:4]]
    backends = [config["model_backend"].rpartition(".")[2] for config in results["config"]]
    assert backends == ["ChatModel (chat)", "SimpleModel (simple)"]
    assert f"{accuracy:.4f}" in ended.output


def test_eval_says_what_is_wrong(model: Path, tasks: Path) -> None:
    include = ("--lmms-include", str(tasks))
    text = (tasks / "tiny_text.yaml").read_text()
    text = text.replace("functions.words", "needs.words").replace("tiny_text", "tiny_needs")
    (tasks / "tiny_needs.yaml").write_text(text)
    (tasks / "needs.py").write_text("import no_such_package\n")

    unknown = eval_lmms(model, "--lmms", "tiny_text,tinny", *include)
    no_folder = eval_lmms(model, "--lmms", "tiny_text", "--lmms-include", str(tasks / "none"))
    missing = eval_lmms(model, "--lmms", "tiny_missing", *include)
    needs = eval_lmms(model, "--lmms", "tiny_needs", *include)

    assert unknown.exit_code == 2
    assert "no task 'tinny'" in unknown.output
    assert no_folder.exit_code == 2
    assert "no folder" in no_folder.output
    assert missing.exit_code == 2
    assert "no such folder" in missing.output
    assert needs.exit_code == 2
    assert "No module named 'no_such_package'" in needs.output


def test_a_name_that_lmms_eval_has_is_refused(model: Path, tasks: Path) -> None:
    """lmms-eval would take its own task without a word."""
    text = (tasks / "tiny_text.yaml").read_text()
    (tasks / "mme.yaml").write_text(text.replace("tiny_text", "mme"))
    # Alone, the tasks of the folder are all that is read.
    alone = eval_lmms(model, "--lmms", "mme", "--lmms-include", str(tasks))
    beside = eval_lmms(model, "--lmms", "mme,pope", "--lmms-include", str(tasks))

    assert alone.exit_code == 0, alone.output
    assert beside.exit_code == 2
    assert "another name" in beside.output


def test_a_plugin_that_fails_is_named(model: Path, tasks: Path, tmp_path: Path) -> None:
    """lmms-eval warns of it alone, and knows none of those after it."""
    broken = tmp_path / "packages" / "broken-1.0.dist-info"
    broken.mkdir(parents=True)
    (broken / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (broken / "entry_points.txt").write_text("[lmms_eval.models]\nbroken = broken_plugin:models\n")
    (broken.parent / "broken_plugin.py").write_text("raise KeyError('the reason')\n")
    environment = {**os.environ, "PYTHONPATH": str(broken.parent)}

    command = [sys.executable, "-m", "layerfuse_cli.app", "eval", str(model), "--lmms", "tiny_text"]
    ended = subprocess.run(
        [*command, "--lmms-include", str(tasks)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )

    assert ended.returncode == 2
    assert "the plug-in 'broken'" in ended.stderr
    assert "the reason" in ended.stderr


def test_two_processes_share_the_questions(model: Path, tasks: Path, tmp_path: Path) -> None:
    """Each has a whole model, and answers every second question."""
    include = ("--lmms-include", str(tasks))
    alone = tmp_path / "alone"
    shared = tmp_path / "shared"
    names = "tiny_text,tiny_options,tiny_rounds"
    evaluate_lmms(model, names.split(","), include=tasks, output=alone)

    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--standalone", "-m", "layerfuse_cli.app", "eval", str(model)]
    ended = subprocess.run(
        [*command, "--lmms", names, *include, "--output", str(shared)],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert ended.returncode == 0, ended.stderr
    for name in names.split(","):
        by_one = read_lines(alone / "samples" / f"{name}.jsonl")
        by_two = read_lines(shared / "samples" / f"{name}.jsonl")
        assert len(by_two) == len(by_one) == len(PICTURES)
        for one, two in zip(by_one, by_two, strict=True):
            assert one["doc_id"] == two["doc_id"]
            if name == "tiny_options":
                # Losses of other batches differ in their last digits.
                assert one["acc"] == two["acc"]
            else:
                assert one["filtered_resps"] == two["filtered_resps"]


def write_picture(file: Path) -> None:
    """Write a picture, in a folder that is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), COLOURS[0]).save(file)


@pytest.fixture
def benchmarks(tmp_path: Path) -> Path:
    """The files of OCR-VQA, TallyQA and VSR as their authors publish them, with few questions."""
    folder = tmp_path / "benchmarks"
    write_picture(folder / "ocrvqa" / "images" / "0760321.jpg")
    book = {
        "imageURL": "http://ecx.images-amazon.com/images/I/51a.jpg",
        "questions": ["Who wrote this book?", "What is the title?"],
        "answers": ["Ann Author", "A Title"],
        "title": "A Title",
        "authorName": "Ann Author",
        "genre": "Travel",
        "split": 3,
    }
    books = {"0760321": book, "0760322": {**book, "split": 1}}
    (folder / "ocrvqa" / "dataset.json").write_text(json.dumps(books))

    write_picture(folder / "tallyqa" / "images" / "VG_100K_2" / "1.jpg")
    counted = []
    for number, is_simple in enumerate([True, False, True]):
        row = {
            "image": "VG_100K_2/1.jpg",
            "image_id": 1,
            "question": f"How many dogs are there beside the {number + 2} cats?",
            "question_id": 7,
            "answer": number,
            "issimple": is_simple,
            "data_source": "amt",
        }
        counted.append(row)
    (folder / "tallyqa" / "test.json").write_text(json.dumps(counted))

    write_picture(folder / "vsr" / "images" / "000000085637.jpg")
    for split, size in (("random", 2), ("zeroshot", 3)):
        lines: list[str] = []
        for label in range(size):
            row = {
                "image": "000000085637.jpg",
                "image_link": "http://images.cocodataset.org/train2017/000000085637.jpg",
                "caption": "The cat is under the table.",
                "label": label % 2,
                "relation": "under",
            }
            lines.append(json.dumps(row) + "\n")
        file = folder / "vsr" / "splits" / split / "test.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text("".join(lines))
    return folder


def test_layerfuses_own_tasks_are_asked(model: Path, benchmarks: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"

    ended = eval_lmms(
        model,
        *("--lmms", "ocrvqa,tallyqa,vsr", "--benchmarks", str(benchmarks)),
        *("--output", str(output)),
    )

    assert ended.exit_code == 0, ended.output
    results = json.loads((output / "results.json").read_text())
    sizes = {name: size["effective"] for name, size in results["n-samples"].items()}
    assert sizes == {"ocrvqa": 2, "tallyqa": 3, "vsr_random": 2, "vsr_zeroshot": 3}
    assert {"accuracy,none", "accuracy_simple,none", "accuracy_complex,none"} <= set(
        results["results"]["tallyqa"]
    )
    books = read_lines(output / "samples" / "ocrvqa.jsonl")
    assert [book["target"] for book in books] == ["Ann Author", "A Title"]
    asked = "Answer the question using a single word or phrase."
    assert books[0]["arguments"][0] == f"Who wrote this book?\n{asked}"
    statements = read_lines(output / "samples" / "vsr_zeroshot.jsonl")
    assert [statement["target"] for statement in statements] == ["no", "yes", "no"]
    words = "Is this statement about the picture true? The cat is under the table."
    assert statements[0]["arguments"][0] == f"{words} Please answer yes or no."


def test_damaged_files_of_own_tasks_are_named(model: Path, benchmarks: Path) -> None:
    (benchmarks / "tallyqa" / "images" / "VG_100K_2" / "1.jpg").unlink()

    ended = eval_lmms(model, "--lmms", "tallyqa", "--benchmarks", str(benchmarks))

    assert ended.exit_code == 2
    assert "1 of 1 pictures are missing" in ended.output


def test_own_tasks_have_names_that_lmms_eval_lacks() -> None:
    from lmms_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    theirs = set(TaskManager().all_tasks)
    ours = set(TaskManager(include_path=str(OWN_TASKS), include_defaults=False).all_tasks)

    assert ours == {"ocrvqa", "tallyqa", "vsr", "vsr_random", "vsr_zeroshot"}
    assert not ours & theirs
