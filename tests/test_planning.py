"""How small a difference a study can show."""

from pathlib import Path

import numpy as np
import pytest

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.planning import (
    ExpectedNoise,
    StudyDesign,
    noise_of_scores,
    planned,
    resolvable_difference,
    resolved_by,
)
from layerfuse.evaluate.significance import Competitor, Scores, contrast, judge
from layerfuse.recipe.reader import load_recipe

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
NOISE = ExpectedNoise(run=0.03, shared=0.0, item=0.45)


def resolvable(arms: int, seeds: int, pictures: int = 200, noise: ExpectedNoise = NOISE) -> float:
    """The difference that arms with the same seeds show."""
    design = StudyDesign([list(range(seeds))] * arms, pictures)
    difference = resolvable_difference(design, noise)
    assert difference is not None
    return difference


def test_more_seeds_and_pictures_and_fewer_arms_show_smaller_differences():
    assert resolvable(5, 5) < resolvable(5, 3) < resolvable(5, 2)
    assert resolvable(2, 3) < resolvable(5, 3) < resolvable(10, 3)
    assert resolvable(5, 3, pictures=2000) < resolvable(5, 3, pictures=100)


def test_what_seeds_do_to_all_arms_costs_little():
    shared = ExpectedNoise(run=0.03, shared=0.3, item=0.45)

    assert resolvable(5, 3, noise=shared) == pytest.approx(resolvable(5, 3), rel=0.25)


def study_of(rng: np.random.Generator, gain: float) -> Scores:
    """Two arms of four seeds with runs as `NOISE` expects, nothing else varying."""
    runs = rng.normal(0.5, 0.03, (2, 4))
    runs[1] += gain
    samples = np.tile(runs.mean(axis=1), (10, 1))
    guess = Competitor(score=0.0, samples=np.zeros(10))
    return Scores(runs.mean(axis=1), samples, runs, guess, noise=None, images=100)


def test_a_study_finds_it_in_four_of_five_cases():
    """Of 300 studies 240 are expected, with a standard deviation of 7."""
    noise = ExpectedNoise(run=0.03, shared=0.0, item=0.0)
    gain = resolvable(2, 4, pictures=100, noise=noise)
    rng = np.random.default_rng(3)

    found = 0
    for _ in range(300):
        (judged,) = judge([contrast(study_of(rng, gain), 1, 0)])
        found += judged.verdict == "better"

    assert 215 <= found <= 265


def test_a_finished_study_gives_its_own_noise():
    scores = study_of(np.random.default_rng(4), gain=0.1)

    noise = noise_of_scores(scores, reference=0)

    assert noise is not None
    assert noise.run == pytest.approx(np.sqrt(scores.runs.var(axis=1, ddof=1).mean()))
    assert noise.item == 0
    design = StudyDesign([[0, 1, 2, 3]] * 2, pictures=100)
    assert resolved_by(scores, reference=0) == resolvable_difference(design, noise)


@pytest.mark.parametrize("seeds", [[[0], [0, 1]], [[0, 1], [0]], [[0], [0]]])
def test_nothing_is_resolved_where_nothing_is_judged(seeds: list[list[int]]):
    assert resolvable_difference(StudyDesign(seeds, pictures=200), NOISE) is None


def planned_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What is said of the quickstart, with two seeds, in this folder."""
    monkeypatch.chdir(folder)
    return planned(load_recipe(QUICKSTART, ("seeds=[0,1]",)))


def test_a_recipe_is_planned_with_the_noise_of_its_last_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    by_default = planned_sentence(tmp_path, monkeypatch)
    summary = tmp_path / "runs" / load_recipe(QUICKSTART).name / "summary.json"
    summary.parent.mkdir(parents=True)
    summary.write_text('{"noise": {"sd": 0.111}}')
    measured = planned_sentence(tmp_path, monkeypatch)

    assert "runs of an arm differ by 3.0 points: a default" in by_default
    assert "runs of an arm differ by 11.1 points: runs" in measured
    summary.write_text("{}")
    with pytest.raises(LayerfuseError, match="not what a report writes"):
        planned_sentence(tmp_path, monkeypatch)
