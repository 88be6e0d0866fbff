"""`layerfuse eval` reads data as recipes do: columns by name, ignored ones, literal answers."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.evaluation import data_of
from layerfuse.recipe.data_source import Data
from layerfuse_cli.app import app
from tests import tiny
from tests.studies import read_lines, read_samples, write_samples


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The folder of a tiny model with its processor."""
    folder = tmp_path / "model"
    vlm = tiny.model("concat")
    vlm.save_pretrained(folder)
    tiny.processor(vlm).save_pretrained(folder)
    return folder


def run_eval(model: Path, data: Path, *options: str) -> Result:
    """Test the model on two samples with short answers."""
    limits = ["--limit", "2", "--max-new-tokens", "2"]
    return CliRunner().invoke(app, ["eval", str(model), "--data", str(data), *limits, *options])


def rename_images(folder: Path) -> None:
    """Call the pictures of `data.json` as other tools do, and add maps of depths."""
    samples = read_samples(folder)
    for sample in samples:
        sample["img"] = sample.pop("image")
        sample["depth"] = "depth.png"
    write_samples(folder, samples)


@pytest.mark.usefixtures("recipe")
def test_columns_are_named_and_ignored(model: Path, tmp_path: Path) -> None:
    """What the error recommends can be written on this command line."""
    rename_images(tmp_path)
    data = tmp_path / "data.json"

    refused = run_eval(model, data)
    ended = run_eval(model, data, "--column", "image=img", "--ignore-column", "depth")

    assert refused.exit_code == 2
    assert ended.exit_code == 0, ended.output
    answers = read_lines(model / "evaluation" / "data" / "predictions.jsonl")
    assert len(answers) == 2
    scores = json.loads((model / "evaluation" / "data" / "scores.json").read_text())
    assert scores["data"]["columns"] == {"image": "img"}
    assert scores["data"]["ignore_columns"] == ["depth"]


@pytest.mark.usefixtures("recipe")
def test_answers_are_literal(model: Path, tmp_path: Path) -> None:
    samples = read_samples(tmp_path)
    for sample in samples:
        sample["conversations"][1]["value"] = "an <image> tag"
    write_samples(tmp_path, samples)
    data = tmp_path / "data.json"

    refused = run_eval(model, data)
    ended = run_eval(model, data, "--literal-answers")

    assert refused.exit_code == 2
    assert ended.exit_code == 0, ended.output


def test_options_are_those_of_a_recipe(tmp_path: Path) -> None:
    data = data_of(
        str(tmp_path),
        "test",
        columns=["image=imgs", "id=u=id"],
        ignore_columns=["depth", "video"],
        literal_answers=True,
    )

    assert data == Data(
        path=str(tmp_path),
        split="test",
        columns={"image": "imgs", "id": "u=id"},
        ignore_columns=["depth", "video"],
        literal_answers=True,
    )


def test_without_options_the_data_are_those_of_before(tmp_path: Path) -> None:
    """Else scores.json would change."""
    assert data_of(str(tmp_path), "test") == Data(path=str(tmp_path), split="test")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": ["imgs"]}, "--column 'imgs': write what is read .* --column image=imgs"),
        ({"columns": ["=imgs"]}, "--column '=imgs': write what is read"),
        ({"columns": ["image="]}, "--column 'image=': write what is read"),
        ({"columns": ["picture=imgs"]}, "'picture' is no column that is read; valid: id, image"),
        ({"columns": ["image=a", "image=b"]}, "--column 'image=b': image is a already"),
        (
            {"columns": ["image=a"], "ignore_columns": ["a"]},
            "^'a' stands more than once in columns and ignore_columns$",
        ),
    ],
)
def test_options_that_name_no_columns(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(LayerfuseError, match=message):
        data_of(str(tmp_path), "test", **options)
