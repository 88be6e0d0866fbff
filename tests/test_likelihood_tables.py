"""Likelihoods of the right answers beside accuracies: in summaries, reports and tables."""

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from layerfuse.evaluate.averages import scores
from layerfuse.evaluate.evaluation import evaluate
from layerfuse.evaluate.records import AnswerRecord, FinishedRun, RunScores
from layerfuse.evaluate.score_table import Bootstrap
from layerfuse.recipe.data_source import Data
from layerfuse.recipe.evaluate_settings import Evaluation
from layerfuse.recipe.reader import load_recipe
from layerfuse.study.coordinate import train
from layerfuse.study.plan import run_names
from layerfuse.study.report import write_report
from layerfuse.study.summary import Summary, summarize
from tests.made_up_studies import finished_run, random_answers, random_study
from tests.studies import one_line, read_results, run_study, write_recipe


def with_likelihoods(answers: list[AnswerRecord], level: float) -> list[AnswerRecord]:
    """The answers with log-likelihoods around a level, those to family b one nat below it."""
    rng = np.random.default_rng(len(answers))
    measured: list[AnswerRecord] = []
    for answer in answers:
        value = level + rng.normal(0, 0.1)
        if answer.family == "b":
            value -= 1
        measured.append(replace(answer, log_likelihood=value))
    return measured


def runs_of(levels: dict[str, float]) -> list[FinishedRun]:
    """Two runs an arm, with equal accuracies and likelihoods around these levels."""
    runs: list[FinishedRun] = []
    for arm, level in levels.items():
        for seed in (0, 1):
            answers = with_likelihoods(random_answers(0.6, seed=3), level + 0.02 * seed)
            runs.append(finished_run(arm, seed, answers))
    return runs


def summary_of(runs: list[FinishedRun]) -> Summary:
    return summarize(runs, "base", Bootstrap(resamples=200, seed=0))


def test_arms_are_compared_by_the_likelihood_of_the_right_answers() -> None:
    """Families count the same, and an arm that is as accurate may find them likelier."""
    summary = summary_of(runs_of({"base": -1.0, "surer": -0.5}))

    base = summary.likelihoods["base"]
    surer = summary.likelihoods["surer"]
    # the mean of two families, a nat apart, and of two seeds
    assert base.mean == pytest.approx(-1.5 + 0.01, abs=0.05)
    assert base.difference is None
    assert base.interval is None
    # the same noise in both arms: only the levels differ
    assert surer.difference == pytest.approx(0.5)
    assert surer.interval is not None
    low, high = surer.interval
    assert low < 0.5 < high
    assert high - low < 0.5


def test_verdicts_rest_on_accuracy_alone() -> None:
    summary = summary_of(runs_of({"base": -1.0, "surer": -0.1}))

    for arm in summary.arms:
        if arm.versus_baseline is not None:
            assert arm.versus_baseline.difference == 0
            assert arm.versus_baseline.verdict == "tie"


def test_studies_of_older_versions_have_no_likelihoods() -> None:
    runs = runs_of({"base": -1.0, "surer": -0.5})
    # one answer of one run lacks it
    last = runs[-1]
    answers = [*last.answers[:-1], replace(last.answers[-1], log_likelihood=None)]

    summary = summary_of([*runs[:-1], FinishedRun(last.record, answers)])

    assert summary.likelihoods == {}
    assert "likelihoods" not in summary.to_json()


def test_the_scores_of_a_run_hold_its_mean_over_families() -> None:
    answers = with_likelihoods(random_answers(0.6, seed=3), -1.0)
    by_family: dict[str, list[float]] = {"a": [], "b": []}
    for answer in answers:
        assert answer.log_likelihood is not None
        by_family[answer.family].append(answer.log_likelihood)

    result = scores(answers)

    means = [np.mean(values) for values in by_family.values()]
    assert result.log_likelihood == pytest.approx(np.mean(means))
    assert RunScores.from_json(result.to_json()) == result
    assert scores(random_answers(0.6, seed=3)).log_likelihood is None


@pytest.fixture
def more_of_the_baseline(recipe: dict[str, Any], tmp_path: Path) -> Path:
    """A recipe of two arms of tiny models, whose baseline gets a second seed."""
    recipe["baseline_seeds"] = [3, 4]
    return write_recipe(tmp_path, recipe)


def test_a_study_measures_reports_and_prints_it(more_of_the_baseline: Path, tmp_path: Path) -> None:
    result = run_study(more_of_the_baseline, tmp_path / "study")

    assert result.exit_code == 0, result.output
    recorded = read_results(tmp_path / "study")
    for run in recorded:
        assert f"log-likelihood {run['scores']['log_likelihood']:.3f}" in one_line(result)
    summary = json.loads((tmp_path / "study" / "summary.json").read_text())
    page = (tmp_path / "study" / "report.html").read_text()
    assert "<span>Log-likelihood</span>" in page
    for likelihood in summary["likelihoods"].values():
        # With a true minus.
        assert f">\u2212{-likelihood['mean']:.3f}" in page
    # what the folder says of the runs can be read, and is what was done
    resolved = load_recipe(tmp_path / "study" / "recipe.yaml")
    assert run_names(resolved) == run_names(load_recipe(more_of_the_baseline))
    assert [(run["arm"], run["seed"]) for run in recorded] == [("one", 3), ("two", 0), ("one", 4)]


def test_a_report_without_it_has_no_column(tmp_path: Path) -> None:
    folder = random_study(tmp_path / "study", {"base": 0.5, "other": 0.7})
    (folder / "recipe.yaml").write_text("baseline: base")

    page = write_report(folder).read_text()

    assert "Log-likelihood" not in page


def test_the_test_of_one_model_prints_and_keeps_it(recipe: dict[str, Any], tmp_path: Path) -> None:
    trained = train(write_recipe(tmp_path, recipe), arm="one", output=tmp_path / "alone")
    evaluation = Evaluation(data=Data(path=str(tmp_path / "data.json")), max_new_tokens=2)
    terminal = StringIO()

    folder = evaluate(trained.model, evaluation, console=Console(file=terminal, width=200))

    mean = json.loads((folder / "scores.json").read_text())["mean"]
    assert mean["log_likelihood"] == pytest.approx(trained.record.scores.log_likelihood)
    assert f"{mean['log_likelihood']:.3f}" in terminal.getvalue()


def test_one_run_of_the_baseline_can_be_continued(
    more_of_the_baseline: Path, tmp_path: Path
) -> None:
    first = train(more_of_the_baseline, arm="one", output=tmp_path / "alone")
    again = train(more_of_the_baseline, arm="one", output=tmp_path / "alone")

    assert first.record.seed == 3
    assert again.record == first.record
