"""Questions are redrawn with the pictures that they share, told apart by their bytes."""

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.clusters import clusters_of, connected_names
from layerfuse.evaluate.records import AnswerRecord, read_records
from layerfuse.study.coordinate import study, train
from tests.made_up import answer_record
from tests.studies import read_lines, read_samples, write_recipe, write_samples


def answer_about(id: str, *pictures: str) -> AnswerRecord:
    """An answer to a question about the pictures with these digests."""
    line = answer_record(id, sample=f"sample {id}", right=True, image=f"{id}.png").to_json()
    return AnswerRecord.from_json({**line, "pictures": list(pictures)})


def test_items_that_share_a_name_are_connected_over_others() -> None:
    shown = [["a"], ["b", "c"], ["d"], ["c", "e"], ["e", "d"]]

    names = connected_names(shown)

    assert names == ["a", "b", "b", "b", "b"]


def test_rows_with_the_same_picture_are_one_cluster() -> None:
    answers = [answer_about("0", "x"), answer_about("1", "x"), answer_about("2", "y")]

    first, second, other = clusters_of(answers)

    assert first == second != other


def test_records_of_older_versions_are_told_apart_by_file_and_sample() -> None:
    answers = [
        answer_record("0", sample="s", right=True, image="a.png"),
        answer_record("1", sample="t", right=True, image="a.png"),
        answer_record("2", sample="u", right=True),
    ]

    assert clusters_of(answers) == ["a.png", "a.png", "u"]


def save_rows(folder: Path) -> str:
    """The samples of `data.json` twice, one row each, in a saved dataset; its path."""
    rows: dict[str, list[Any]] = {"id": [], "image": [], "question": [], "answer": []}
    for sample in read_samples(folder) * 2:
        question, answer = sample["conversations"]
        rows["id"].append(str(len(rows["id"])))
        rows["image"].append({"bytes": (folder / sample["image"]).read_bytes(), "path": None})
        rows["question"].append(question["value"].replace("<image>", ""))
        rows["answer"].append(answer["value"])
    dataset = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    dataset.save_to_disk(folder / "set")
    return str(folder / "set")


def test_how_rows_are_stored_changes_no_interval(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Two rows of a dataset hold one picture; in JSON two samples name one file."""
    one_arm = {**recipe, "arms": recipe["arms"][:1]}
    doubled = []
    for number, sample in enumerate(read_samples(tmp_path) * 2):
        doubled.append({**sample, "id": str(number)})
    write_samples(tmp_path, doubled, "doubled.json")
    in_json = {**one_arm, "evaluate": {"data": {"path": "doubled.json"}, "max_new_tokens": 2}}
    in_rows = {**one_arm, "evaluate": {"data": {"dataset": save_rows(tmp_path)}}}
    in_rows["evaluate"]["max_new_tokens"] = 2

    study(write_recipe(tmp_path, in_json), output=tmp_path / "json")
    study(write_recipe(tmp_path, in_rows), output=tmp_path / "rows")

    of_json = json.loads((tmp_path / "json" / "summary.json").read_text())
    of_rows = json.loads((tmp_path / "rows" / "summary.json").read_text())
    num_pictures = len(read_samples(tmp_path))
    assert of_json["images"] == of_rows["images"] == num_pictures
    assert of_json["items"] == of_rows["items"] == 2 * num_pictures
    assert of_json["arms"][0]["mean"] == of_rows["arms"][0]["mean"]


def show_one_picture(folder: Path) -> None:
    """Let all files hold the same bytes: told apart by names, they would be several pictures."""
    for sample in read_samples(folder)[1:]:
        shutil.copy(folder / "0.png", folder / sample["image"])


def test_a_test_with_one_picture_is_refused_before_training(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    show_one_picture(tmp_path)

    def fail(*args: Any, **settings: Any) -> None:
        pytest.fail("training started")

    monkeypatch.setattr("layerfuse.study.execute.train_arm", fail)
    with pytest.raises(LayerfuseError, match=r"has one picture.*need at least two"):
        study(write_recipe(tmp_path, recipe), output=tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_an_arm_without_intervals_may_be_tested_on_one_picture(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    show_one_picture(tmp_path)

    trained = train(write_recipe(tmp_path, recipe), arm="one", output=tmp_path / "run")

    predictions = trained.model.parent / "predictions.jsonl"
    digests = {tuple(answer.pictures) for answer in read_records(predictions, AnswerRecord)}
    assert len(digests) == 1
    assert len(read_lines(predictions)) == len(read_samples(tmp_path))
