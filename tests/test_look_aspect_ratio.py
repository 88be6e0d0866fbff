"""Looking at pictures that are no squares, as a study with the same `image_aspect_ratio` does."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from layerfuse.look.probe_report import ProbeReport
from layerfuse.look.report_file import read_report
from layerfuse_cli.app import app
from tests.small_look import save_encoder_and_pictures
from tests.studies import one_line

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60)}
PICTURES = 40


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An encoder, and wide pictures of which only the left end shows the answer."""
    monkeypatch.setenv("LAYERFUSE_HOME", str(tmp_path / "home"))
    save_encoder_and_pictures(tmp_path)
    records: list[dict[str, Any]] = []
    for number in range(PICTURES):
        answer = list(COLOURS)[number % 2]
        image = Image.new("RGB", (120, 40), (number, 90, 120 - number))
        image.paste(COLOURS[answer], (0, 0, 36, 40))
        image.save(tmp_path / f"{number}.png")
        turns = [
            {"from": "human", "value": "<image>\nWhich colour?"},
            {"from": "gpt", "value": answer},
        ]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(records))
    return tmp_path


def look(folder: Path, verb: str, *options: str) -> Path:
    """Call a verb that looks at the pictures; everything is written into one folder."""
    arguments = [verb, str(folder / "encoder"), *options, "--output", str(folder / "look")]
    ended = CliRunner().invoke(app, arguments)
    assert ended.exit_code == 0, ended.output
    return folder / "look"


def best_accuracy(folder: Path) -> float:
    """Of the probes of single layers on mean tokens."""
    report = read_report(folder / "probe.json", ProbeReport.from_json)
    accuracies: list[float] = []
    for selection in report.mean.selections:
        for task in selection.tasks.values():
            accuracies.append(task.accuracy)
    return max(accuracies)


def test_a_probe_sees_what_the_crop_would_cut_off(folder: Path) -> None:
    data = ("--data", str(folder / "data.json"))

    cut = look(folder, "probe", *data, "--image-aspect-ratio", "crop")
    of_cut = best_accuracy(cut)
    whole = look(folder, "probe", *data, "--image-aspect-ratio", "square")

    # Twelve test pictures: what is cut off can only be guessed.
    assert of_cut < 0.9
    assert best_accuracy(whole) == 1.0
    assert json.loads((whole / "probe.json").read_text())["image_aspect_ratio"] == "square"


def test_similarity_depends_on_it(folder: Path) -> None:
    def measured(ratio: str) -> dict[str, Any]:
        images = str(folder / "data.json")
        written = look(folder, "similarity", images, "--image-aspect-ratio", ratio)
        report = json.loads((written / "similarity.json").read_text())
        assert report.pop("image_aspect_ratio") == ratio
        return report

    square = measured("square")

    assert measured("pad") != square
    assert measured("square") == square


def test_a_recommendation_measures_again_what_was_cut_otherwise(folder: Path) -> None:
    data = (str(folder / "images"), "--data", str(folder / "data.json"))
    look(folder, "recommend", *data, "--image-aspect-ratio", "square")
    before = (folder / "look" / "probe.json").read_bytes()

    look(folder, "recommend", *data, "--image-aspect-ratio", "square")
    assert (folder / "look" / "probe.json").read_bytes() == before
    look(folder, "recommend", *data)

    for name in ("probe.json", "similarity.json"):
        report = json.loads((folder / "look" / name).read_text())
        assert "image_aspect_ratio" not in report


def test_another_ratio_is_refused(folder: Path) -> None:
    arguments = ["probe", str(folder / "encoder"), "--image-aspect-ratio", "anyres"]
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 2
    assert "'pad', 'square', 'crop'" in one_line(refused)
