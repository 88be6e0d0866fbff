"""A study that is killed at random moments, or fills the disk, ends as an undisturbed one does; bad
samples are left out by name, or stop it."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from layerfuse.cli import app
from layerfuse.study.coordinate import study
from tests.test_study import comparable, lines, write

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(("seed", "rounds"), [(0, 3), pytest.param(1, 20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_started_again(
    recipe: dict[str, Any], tmp_path: Path, seed: int, rounds: int
) -> None:
    stage = {**recipe["stages"]["align"], "steps": 6, "checkpoint_steps": 2}
    rates = {"learning_rates": {"fusion": 1e-3, "llm": 1e-3}, "lora": {"r": 2}}
    recipe["stages"] = {"align": stage, "finetune": {**stage, **rates, "checkpoint_steps": 1}}
    recipe["keep_models"] = "all"
    command = [sys.executable, "-m", "tests.run_killed", str(write(tmp_path, recipe))]
    command += [str(tmp_path / "whole"), str(seed), str(rounds)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]
    ends = [line.split(maxsplit=2)[1] for line in done.stdout.splitlines()]
    assert ends[0] == "1"  # a full disk is an error
    assert ends.count("-9") > rounds
    whole = tmp_path / "whole"
    for folder in [tmp_path / "full", *tmp_path.glob("killed?"), *tmp_path.glob("killed??")]:
        assert comparable(whole / "results.jsonl") == comparable(folder / "results.jsonl")
        for result in lines(whole / "results.jsonl"):
            one, other = (study / result["folder"] for study in (whole, folder))
            predictions = [x / "predictions.jsonl" for x in (one, other)]
            assert predictions[0].read_bytes() == predictions[1].read_bytes()
            a, b = (load_file(x / "model" / "model.safetensors") for x in (one, other))
            assert all(torch.equal(a[name], b[name]) for name in a | b)
        assert not list(folder.rglob("*.tmp"))


@pytest.fixture
def damaged(recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A study whose eight samples hold five bad ones, each bad in its own way."""
    (tmp_path / "0.png").unlink()
    (tmp_path / "1.png").write_text("no picture")
    Image.effect_noise((40, 30), 60).convert("RGB").save(tmp_path / "2.png")
    whole = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(whole[: len(whole) // 2])
    records = json.loads((tmp_path / "data.json").read_text())
    records[3]["conversations"][0]["value"] = "<image> " + "long " * 3000
    records[4]["conversations"] = [{"from": "human", "value": "<image> n?"}]
    (tmp_path / "data.json").write_text(json.dumps(records))
    (tmp_path / "test.json").write_text(json.dumps(records[5:]))
    recipe["evaluate"]["data"] = {"path": "test.json"}
    recipe["stages"]["align"]["steps"] = 3
    return recipe


@pytest.mark.parametrize("cached", [True, False])
def test_bad_samples_are_left_out_by_name(
    damaged: dict[str, Any], tmp_path: Path, cached: bool
) -> None:
    settings = {**damaged, "on_bad_sample": "skip", "cache_features": cached}
    path = write(tmp_path, settings)
    found = CliRunner().invoke(app, ["study", str(path), "--output", str(tmp_path / "study")])
    assert found.exit_code == 0, found.output
    said = " ".join(found.output.split())
    assert "align: 5 bad samples are left out" in said
    left_out = json.loads((tmp_path / "study" / "left_out.json").read_text())
    reasons = dict(left_out["align"].values())
    expected = {
        "0": "no image file",
        "1": "cannot read the image",
        "2": "cannot read the image",
        "3": "no token is labelled",
        "4": "no answer to learn from",
    }
    assert sorted(reasons) == sorted(expected)
    assert all(text in reasons[name] for name, text in expected.items())
    for result in lines(tmp_path / "study" / "results.jsonl"):
        losses = [loss for _, loss in result["losses"]["align"]]
        assert len(losses) == 3
        assert all(math.isfinite(loss) and loss > 0 for loss in losses)


def test_bad_samples_stop_the_study_by_default(damaged: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path, damaged)
    found = CliRunner().invoke(app, ["study", str(path), "--output", str(tmp_path / "study")])
    assert found.exit_code == 2
    said = " ".join(found.output.split())
    assert "sample 0: no image file" in said
    assert "4 of 8 samples of align are bad" in said  # the fifth is found when it is decoded
    assert "`on_bad_sample: skip` leaves such samples out" in said
    assert not (tmp_path / "study").exists()


def test_no_usable_sample_is_an_error(damaged: dict[str, Any], tmp_path: Path) -> None:
    records = json.loads((tmp_path / "data.json").read_text())[:2]
    (tmp_path / "data.json").write_text(json.dumps(records))
    with pytest.raises(ValueError, match="no usable sample of align is left; the first: sample 0"):
        study(write(tmp_path, {**damaged, "on_bad_sample": "skip"}), output=tmp_path / "study")


def test_constants_are_measured_on_pictures_that_the_cache_lacks(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    """A first stage with random crops, a test on other pictures, a strategy with constants."""
    records = json.loads((tmp_path / "data.json").read_text())
    (tmp_path / "test.json").write_text(json.dumps(records[4:]))
    recipe["stages"]["align"] |= {"random_crop": 0.5, "data": {"path": "data.json", "limit": 4}}
    recipe["evaluate"]["data"] = {"path": "test.json"}
    recipe["arms"][1]["fusion"]["normalize"] = "standardize"
    study(write(tmp_path, recipe), output=tmp_path / "study")


@pytest.mark.parametrize("changes", [{"random_crop": 0.5}, {"learning_rates": {"vision": 1e-4}}])
def test_the_cache_is_off_where_it_would_be_wrong_and_says_so(
    recipe: dict[str, Any], tmp_path: Path, changes: dict[str, Any]
) -> None:
    recipe["stages"]["align"] |= changes
    path = write(tmp_path, recipe)
    found = CliRunner().invoke(app, ["study", str(path), "--output", str(tmp_path / "study")])
    assert found.exit_code == 0, found.output
    said = " ".join(found.output.split())
    assert "its pictures are encoded as they come, not from the cache" in said
    assert ("align crops pictures" in said) == ("random_crop" in changes)
    again = CliRunner().invoke(app, ["study", str(path), "--output", str(tmp_path / "again")])
    assert again.exit_code == 0
    assert comparable(tmp_path / "study" / "results.jsonl") == comparable(
        tmp_path / "again" / "results.jsonl"
    )


def test_an_unwritable_folder_is_one_clear_error(recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = write(tmp_path, recipe)
    output = str(tmp_path / "file" / "study")
    found = CliRunner().invoke(app, ["study", str(path), "--output", output])
    assert found.exit_code == 2
    assert "file/study" in "".join(found.output.split())
