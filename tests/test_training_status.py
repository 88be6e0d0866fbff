"""What a study keeps of how far training went, and what its report makes of it."""

import json
from math import log
from pathlib import Path
from typing import Any

import pytest

from layerfuse.evaluate.learning_status import ArmLearning, RunLearning, RunState
from layerfuse.look.probe_report import ProbedSelection, Probes, TaskReading
from layerfuse.study.coordinate import study
from layerfuse.study.training_status import (
    ProbeComparison,
    compare_with_probe,
    read_blind_losses,
    read_probes,
    training_sentence,
)
from tests.studies import read_samples, write_recipe, write_samples

RESULTS = Path(__file__).parent.parent / "results"


def test_a_study_knows_the_loss_of_guessing_and_reports_by_it(
    recipe: dict[str, Any],
    tmp_path: Path,
) -> None:
    """Two answers, equally often: a bit, shared with the token that ends an answer."""
    write_samples(tmp_path, 3 * read_samples(tmp_path))
    folder = tmp_path / "study"

    page = study(write_recipe(tmp_path, recipe), output=folder)

    assert read_blind_losses(folder)["align"] == pytest.approx(log(2) / 2)
    summary = json.loads((folder / "summary.json").read_text())
    # Two steps from random weights: worse than one who guesses.
    assert summary["learning"]["one"]["state"] == "failed"
    assert summary["learning"]["one"]["runs"][0]["information"] < 0
    assert summary["findings"]["headline"].startswith("Not trained long enough to say: 2 of 2")
    html = page.read_text()
    assert html.count('<span class="worse">failed</span>') == 2


def test_studies_of_before_have_no_file() -> None:
    assert read_blind_losses(Path("nowhere")) == {}
    assert read_probes(Path("nowhere")) == []


def learning_with(state: RunState, gain: float | None) -> ArmLearning:
    """An arm of one run that gained so much in its last quarter."""
    return ArmLearning(state, 1, [RunLearning(state, None, None, gain)])


def test_arms_that_still_improved_are_named_together() -> None:
    arms = {
        "a": learning_with("still improving", 0.05),
        "b": learning_with("flat", 0.01),
        "c": learning_with("still improving", 0.021),
        "d": learning_with("blind", None),
    }

    assert training_sentence(arms, {}) == (
        "When training stopped, arms had not learned what they could: still improving, +2.1 to "
        "+5.0 points in the last quarter (a, c); blind (d)."
    )
    del arms["a"]
    assert "still improving, +2.1 points in the last quarter (c)" in training_sentence(arms, {})


def probes_reading(kind: str, layers: list[int], **accuracies: float) -> Probes:
    """Probes of one selection of layers."""
    tasks = {}
    for task, accuracy in accuracies.items():
        tasks[task] = TaskReading(accuracy, [0.0, 1.0], "")
    return Probes(kind, [ProbedSelection(layers, tasks, mean=0.0, interval=[0.0, 1.0])])


def test_an_arm_is_compared_with_the_better_probe_on_the_families_of_both() -> None:
    mean = probes_reading("mean", [3, 5], colour=0.9, count=0.1, letter=1.0)
    grid = probes_reading("grid", [3, 5], colour=0.8, count=0.6)
    families = {"colour": 0.7, "count": 0.65, "presence": 0.0}

    comparison = compare_with_probe([3, 5], families, [mean, grid])

    assert comparison is not None
    assert comparison.trained == pytest.approx(0.675)
    assert comparison.probe == pytest.approx(0.7)
    assert comparison.families == ["colour", "count"]
    assert not comparison.is_below
    assert compare_with_probe([3], families, [mean, grid]) is None
    assert compare_with_probe([3, 5], {"presence": 0.5}, [mean, grid]) is None


@pytest.mark.parametrize(("trained", "is_below"), [(0.769, True), (0.771, False), (0.9, False)])
def test_three_points_below_the_probe_are_too_few(trained: float, is_below: bool) -> None:
    assert ProbeComparison(trained, 0.8, ["colour"]).is_below == is_below


def test_probes_beside_committed_results_are_read() -> None:
    """Files of earlier versions too."""
    probes = read_probes(RESULTS / "local-selection")

    comparison = compare_with_probe([12], {"colour": 0.5}, probes)

    assert [kind.kind for kind in probes] == ["mean", "grid"]
    assert comparison is not None
    assert comparison.is_below
