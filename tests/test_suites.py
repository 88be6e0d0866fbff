"""Suites, prompts and published rows: the files that come with layerfuse, and one's own."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from typer.testing import CliRunner

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.benchmarks import BENCHMARKS, Item
from layerfuse.evaluate.benchmarks.mme import COGNITION, PERCEPTION
from layerfuse.evaluate.benchmarks.ocrbench import TYPES
from layerfuse.evaluate.boxes import BoxForm
from layerfuse.evaluate.published import published_tables
from layerfuse.evaluate.suite_run import look_for
from layerfuse.evaluate.suites import Prompt, load_prompts, load_suite, suite_names
from layerfuse_cli.app import app
from tests.made_up_benchmarks import column, suite_of, write_realmix, write_refcoco
from tests.studies import one_line

PROMPTS = ("llava-1.5", "llava-1.5-no-ocr")
NOT_SCORED = {
    *("activitynet", "llava-bench", "mathvista", "mm-vet", "mmmu", "msrvtt", "msvd"),
    *("charxiv", "hrbench-4k", "hrbench-8k", "naturalbench", "vstar"),
}
"""Benchmarks of papers that suites and published rows name and layerfuse does not score."""
COLUMNS = {
    "mme": {"perception", "cognition", *PERCEPTION, *COGNITION},
    "ocrbench": {"score", "Text Recognition", *TYPES},
    "refcoco": {"average", "val", "testA", "testB"},
    "refcoco+": {"average", "val", "testA", "testB"},
    "refcocog": {"average", "val", "test"},
    "refcocog-captions": {"average", "val", "test"},
    "cvbench": {"accuracy", "2D", "3D"},
    "scienceqa": {"accuracy", "image accuracy"},
}
"""What these benchmarks report, of what papers print."""


def test_there_are_the_suites_of_the_papers_and_those_of_layerfuse() -> None:
    assert suite_names() == [
        *("fusion-study", "igva", "layer-selection", "mmfuser", "offline", "real"),
    ]


@pytest.mark.parametrize("name", suite_names())
def test_each_suite_can_be_asked(name: str) -> None:
    suite = load_suite(name)
    prompts = load_prompts(suite.prompts)

    assert suite.name == name
    for each in suite.columns:
        # What is asked has a prompt, what has none is known not to be scored.
        assert (each.benchmark in prompts) == (each.benchmark in BENCHMARKS)
        if each.benchmark not in BENCHMARKS:
            assert each.benchmark in NOT_SCORED
        if each.benchmark in COLUMNS and each.column is not None:
            assert each.column in COLUMNS[each.benchmark]


@pytest.mark.parametrize("name", PROMPTS)
def test_each_benchmark_has_a_prompt_and_each_prompt_a_benchmark(name: str) -> None:
    assert set(load_prompts(name)) == set(BENCHMARKS)


def test_published_rows_name_benchmarks_and_columns_that_there_are() -> None:
    rows = 0
    for table in published_tables():
        for row in table.rows:
            rows += 1
            for key in row.scores:
                benchmark, _, named = key.partition("/")
                assert benchmark in BENCHMARKS or benchmark in NOT_SCORED, (table.paper, key)
                if named and benchmark in COLUMNS:
                    assert named in COLUMNS[benchmark], (table.paper, key)
    assert rows > 50


def test_the_published_average_of_the_fusion_study_is_that_of_its_suite() -> None:
    """The notes give 48.51 for the first row: the columns are divided as the paper divides them."""
    suite = load_suite("fusion-study")
    (table,) = [table for table in published_tables() if table.table.startswith("Results with")]
    scores = table.rows[0].scores
    values: list[float] = []
    for each in suite.columns:
        key = each.benchmark if each.column is None else f"{each.benchmark}/{each.column}"
        values.append(scores[key] / each.divide)
    assert sum(values) / len(values) == pytest.approx(48.51, abs=0.006)


ITEM = Item(
    id="1",
    pictures=(),
    question="What is {question} in {braces}?",
    answers=("A",),
    options=("a {context}", "b"),
    context="",
)


@pytest.mark.parametrize(
    ("text", "context", "expected"),
    [
        ("{question}", "", "What is {question} in {braces}?"),
        # A line of an empty context would say that there is one.
        ("Context: {context}\n{question}", "", "What is {question} in {braces}?"),
        ("Context: {context}\n{question}", "a hint", "Context: a hint\n{Q}"),
        ("{question}\n{options}\nAnswer.", "", "{Q}\nA. a {context}\nB. b\nAnswer."),
        ("{context}\n{question}", "two {options}\nlines", "two {options}\nlines\n{Q}"),
        # A line with words beside an empty field stays where another field is filled.
        ("Q: {question} {context}", "", "Q: {Q} "),
        ("Look.\n\n{question}", "", "Look.\n\n{Q}"),
    ],
)
def test_prompts_fill_their_fields_once(text: str, context: str, expected: str) -> None:
    item = Item(ITEM.id, (), ITEM.question, (), options=ITEM.options, context=context)
    assert Prompt(text=text).ask(item) == expected.replace("{Q}", ITEM.question)


def test_options_are_left_out_where_there_are_none() -> None:
    closing_line = "Please answer directly with a single word or number."
    open_question = Item("1", (), "How many?", ("2",), context=closing_line)
    choice = load_prompts("llava-1.5")["realworldqa"].ask(open_question)
    assert choice == f"How many?\n{closing_line}"


@pytest.mark.parametrize("name", PROMPTS)
def test_ocr_tokens_are_asked_for_with_one_set_of_prompts_alone(name: str) -> None:
    item = Item("1", (), "What?", ("a",), context="EXIT 5")
    asked = load_prompts(name)["textvqa"].ask(item)
    assert ("Reference OCR token: EXIT 5" in asked) == (name == "llava-1.5")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"text": "what?"}, "must hold {question}"),
        ({"text": "{question} {hint}"}, "a brace that nothing fills"),
        ({"text": "{question} {"}, "a brace that nothing fills"),
        ({"text": "{question}", "stop": [""]}, "at least 1 character"),
        ({"text": "{question}", "max_new_tokens": 0}, "greater than 0"),
        ({"text": "{question}", "tokens": 5}, "unknown key; valid: text"),
        ({"text": "{question}", "boxes": {"scale": "percent"}}, "'unit', 'pixels' or 'thousand'"),
        ({"text": "{question}", "boxes": {"pad": False}}, "unknown key; valid: scale, padded"),
    ],
)
def test_prompts_that_cannot_be_asked_are_refused(
    tmp_path: Path, content: dict[str, Any], message: str
) -> None:
    file = tmp_path / "prompts.yaml"
    file.write_text(yaml.safe_dump({"gqa": content}))
    with pytest.raises(LayerfuseError, match=r"prompts\.yaml, gqa:\n(.|\n)*" + message):
        load_prompts(str(file))


SUITE = {
    "name": "own",
    "title": "one's own",
    "source": "nowhere",
    "columns": [{"name": "GQA", "benchmark": "gqa"}],
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": []}, "at least 1 item"),
        ({"columns": [SUITE["columns"][0], SUITE["columns"][0]]}, "two columns are called 'GQA'"),
        ({"columns": [{**SUITE["columns"][0], "divide": 0}]}, "greater than 0"),
        ({"average": "median"}, "'mean'"),
        # Answers would go to another folder.
        ({"name": "../other"}, "name: .*pattern"),
        ({"name": ".."}, "name: .*pattern"),
        ({"promts": "x"}, "promts: unknown key"),
    ],
)
def test_suites_that_are_none_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump({**SUITE, **changes}))
    with pytest.raises(LayerfuseError, match=r"own\.yaml:\n(.|\n)*" + message):
        load_suite(str(file))


def test_names_that_are_none_say_what_is_valid(tmp_path: Path) -> None:
    with pytest.raises(LayerfuseError, match="no suite 'mmfusr'; valid: fusion-study, igva"):
        load_suite("mmfusr")
    with pytest.raises(LayerfuseError, match=r"no suite '.*gone\.yaml'"):
        load_suite(str(tmp_path / "gone.yaml"))
    with pytest.raises(LayerfuseError, match=r"no prompts 'llava'; valid: llava-1\.5, llava-1"):
        load_prompts("llava")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(LayerfuseError, match="holds no mapping"):
        load_suite(str(tmp_path / "list.yaml"))
    (tmp_path / "cut.yaml").write_text("name: [a")
    with pytest.raises(LayerfuseError, match="cannot read"):
        load_prompts(str(tmp_path / "cut.yaml"))


def test_prompts_of_ones_own_lie_beside_the_suite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({**SUITE, "prompts": "words.yaml"}))
    (tmp_path / "words.yaml").write_text("gqa: {text: 'Say: {question}'}")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)

    prompts = load_prompts(load_suite("../own.yaml").prompts)

    assert prompts["gqa"].ask(Item("1", (), "what?", ())) == "Say: what?"


def test_questions_are_asked_with_the_boxes_that_their_prompt_says(tmp_path: Path) -> None:
    write_refcoco(tmp_path / "refcoco")
    words = {"text": "{question}", "boxes": {"scale": "thousand", "padded": False}}
    (tmp_path / "words.yaml").write_text(yaml.safe_dump({"refcoco": words, "mme": words}))
    suite = suite_of(column("REC", "refcoco"))

    (usual,) = look_for(suite, tmp_path).available
    suite = suite.model_copy(update={"prompts": str(tmp_path / "words.yaml")})
    (other,) = look_for(suite, tmp_path).available

    assert usual.items[0].box_form == BoxForm()
    assert other.items[0].box_form == BoxForm(scale="thousand", padded=False)
    # The box of 10, 5, 30, 25 in a picture of 40 x 30 pixels.
    said = "[250, 167, 750, 833]"
    assert BENCHMARKS["refcoco"].judge(other.items[0], said).score == 1
    assert BENCHMARKS["refcoco"].judge(usual.items[0], said).score == 0


def test_boxes_of_a_benchmark_that_has_none_are_refused(tmp_path: Path) -> None:
    write_realmix(tmp_path / "realmix", 1)
    words = {"text": "{question}", "boxes": {"scale": "pixels"}}
    (tmp_path / "words.yaml").write_text(yaml.safe_dump({"realmix": words}))
    suite = suite_of(column("real", "realmix"))

    with pytest.raises(LayerfuseError, match="real pictures has no boxes whose form could be said"):
        look_for(
            suite.model_copy(update={"prompts": str(tmp_path / "words.yaml")}),
            tmp_path,
        )


def test_a_suite_is_plain_data() -> None:
    suite = suite_of(column("GQA", "gqa"), column("MME", "mme", divide=20))
    assert [each.divide for each in suite.columns] == [1, 20]
    with pytest.raises(ValidationError, match="frozen"):
        suite.name = "other"


def test_suites_and_benchmarks_are_listed() -> None:
    suites = CliRunner().invoke(app, ["list", "suites"])
    benchmarks = CliRunner().invoke(app, ["list", "benchmarks"])

    assert suites.exit_code == 0, suites.output
    for name in suite_names():
        assert name in suites.output
    assert "MM-Vet (not scored here)" in one_line(suites)
    assert benchmarks.exit_code == 0, benchmarks.output
    for name, benchmark in BENCHMARKS.items():
        assert name in benchmarks.output
        assert benchmark.licence in one_line(benchmarks)


def test_a_benchmark_is_a_suite_of_its_headline() -> None:
    suite = load_suite("pope")

    assert [column.benchmark for column in suite.columns] == ["pope"]
    assert suite.columns[0].name == "F1"
    assert suite.average is None
