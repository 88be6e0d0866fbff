"""A study on damaged data: bad samples are left out by name, or stop it; the cache knows when it
would be wrong."""

import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from layerfuse.study.coordinate import study
from tests.studies import (
    comparable_results,
    cut_in_half,
    one_line,
    read_left_out,
    read_results,
    read_samples,
    run_study,
    write_recipe,
    write_samples,
)


@pytest.fixture
def damaged(recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A study whose eight samples hold five bad ones, each bad in its own way."""
    (tmp_path / "0.png").unlink()
    (tmp_path / "1.png").write_text("no picture")
    # Noise makes a large file, of which half still opens: only decoding its pixels fails.
    Image.effect_noise((40, 30), 60).convert("RGB").save(tmp_path / "2.png")
    cut_in_half(tmp_path / "2.png")
    samples = read_samples(tmp_path)
    # Longer than `max_length`: the answer at its end is cut off.
    samples[3]["conversations"][0]["value"] = "<image> " + "long " * 3000
    samples[4]["conversations"] = [{"from": "human", "value": "<image> n?"}]
    write_samples(tmp_path, samples)

    # The test's samples are good: what is bad is so in the one stage.
    write_samples(tmp_path, samples[5:], "test.json")
    recipe["evaluate"]["data"] = {"path": "test.json"}
    recipe["stages"]["align"]["steps"] = 3
    return recipe


@pytest.mark.parametrize("cached", [True, False])
def test_bad_samples_are_left_out_by_name(
    damaged: dict[str, Any],
    tmp_path: Path,
    cached: bool,
) -> None:
    damaged["on_bad_sample"] = "skip"
    damaged["cache_features"] = cached
    path = write_recipe(tmp_path, damaged)

    command = run_study(path, tmp_path / "study")

    assert command.exit_code == 0, command.output
    assert "align: 5 bad samples are left out" in one_line(command)
    left_out = read_left_out(tmp_path / "study")["align"]
    reasons = dict(left_out.values())
    expected_reasons = {
        "0": "no image file",
        "1": "cannot read the image",
        "2": "cannot read the image",
        "3": "no token is labelled",
        "4": "no answer to learn from",
    }
    assert sorted(reasons) == sorted(expected_reasons)
    for sample_id, text in expected_reasons.items():
        assert text in reasons[sample_id]

    for result in read_results(tmp_path / "study"):
        losses = [loss for _, loss in result["losses"]["align"]]
        assert len(losses) == 3
        for loss in losses:
            assert math.isfinite(loss)
            assert loss > 0


def test_bad_samples_stop_the_study_by_default(damaged: dict[str, Any], tmp_path: Path) -> None:
    path = write_recipe(tmp_path, damaged)

    command = run_study(path, tmp_path / "study")

    assert command.exit_code == 2
    message = one_line(command)
    assert "sample 0: no image file" in message
    # The fifth would be found when it is decoded, which takes time: what is quick to see comes
    # first.
    assert "4 of 8 samples of align are bad" in message
    assert "`on_bad_sample: skip` leaves such samples out" in message
    assert not (tmp_path / "study").exists()


def test_no_usable_sample_is_an_error(damaged: dict[str, Any], tmp_path: Path) -> None:
    damaged["on_bad_sample"] = "skip"
    only_bad_samples = read_samples(tmp_path)[:2]
    write_samples(tmp_path, only_bad_samples)

    with pytest.raises(ValueError, match="no usable sample of align is left; the first: sample 0"):
        study(write_recipe(tmp_path, damaged), output=tmp_path / "study")


def test_constants_are_measured_on_pictures_that_the_cache_lacks(
    recipe: dict[str, Any],
    tmp_path: Path,
) -> None:
    """A first stage with random crops, a test on other pictures, a strategy with constants.

    The constants of `standardize` come from the stage's pictures, but the cache holds the test's
    alone: to look for the first in the second would be an error.
    """
    samples = read_samples(tmp_path)
    write_samples(tmp_path, samples[4:], "test.json")
    recipe["evaluate"]["data"] = {"path": "test.json"}
    align = recipe["stages"]["align"]
    align["data"] = {"path": "data.json", "limit": 4}
    align["random_crop"] = 0.5
    recipe["arms"][1]["fusion"]["normalize"] = "standardize"

    study(write_recipe(tmp_path, recipe), output=tmp_path / "study")

    assert len(read_results(tmp_path / "study")) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"random_crop": 0.5},
        {"learning_rates": {"vision": 1e-4}},
    ],
)
def test_the_cache_is_off_where_it_would_be_wrong_and_says_so(
    recipe: dict[str, Any],
    tmp_path: Path,
    changes: dict[str, Any],
) -> None:
    recipe["stages"]["align"].update(changes)
    path = write_recipe(tmp_path, recipe)

    first = run_study(path, tmp_path / "study")

    assert first.exit_code == 0, first.output
    message = one_line(first)
    assert "its pictures are encoded as they come, not from the cache" in message
    crops = "random_crop" in changes
    assert ("align crops pictures" in message) == crops

    # Without the cache too, a study is the same each time: its crops are drawn from its seed.
    second = run_study(path, tmp_path / "again")
    assert second.exit_code == 0
    assert comparable_results(tmp_path / "study") == comparable_results(tmp_path / "again")


def test_an_unwritable_folder_is_one_clear_error(recipe: dict[str, Any], tmp_path: Path) -> None:
    """A file stands where a folder should be made."""
    (tmp_path / "file").write_text("")
    path = write_recipe(tmp_path, recipe)

    command = run_study(path, tmp_path / "file" / "study")

    assert command.exit_code == 2
    # A narrow terminal breaks a long path anywhere.
    assert "file/study" in "".join(command.output.split())
