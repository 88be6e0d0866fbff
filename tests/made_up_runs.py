"""Whole studies whose runs are made up, for tests of which runs a study does."""

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.averages import scores
from layerfuse.evaluate.records import (
    PREDICTIONS,
    CurvePoint,
    FinishedRun,
    RunRecord,
    write_records,
)
from layerfuse.files import write_text
from layerfuse.study import execute, report
from layerfuse.study.coordinate import study
from layerfuse.study.execute import Job
from layerfuse.study.plan import RESULT, PlannedRun
from layerfuse.study.summary import Summary
from layerfuse.study.trained_files import MODEL
from tests.made_up import run_record
from tests.made_up_studies import random_answers
from tests.studies import read_results

PICTURES = 60


class MadeUpRuns:
    """Stands for the training and the test of every run.

    Args:
        rates: share of right answers by arm.
        flat_from: by arm, the least steps of stage `align` with which it learns what it can; none
            for studies that choose no steps.
    """

    def __init__(self, rates: dict[str, float], flat_from: dict[str, int] | None = None) -> None:
        self.rates = rates
        self.flat_from = flat_from
        self.done: list[str] = []
        self.allowed = 10**6
        """runs until the study is stopped"""

    def __call__(self, job: Job, run: PlannedRun, progress: Any = None) -> None:
        """Leave what a run leaves."""
        if len(self.done) == self.allowed:
            raise LayerfuseError("stopped")
        self.done.append(run.name)
        arm = run.arm.label
        # By arm, seed and steps alone: a run that is done again gives the same answers.
        answers = random_answers(
            self.rates[arm],
            seed=100 * list(self.rates).index(arm) + run.seed + 1000 * (run.steps or 0),
            pictures=PICTURES,
        )
        record = run_record(arm, run.seed, scores=scores(answers))
        record = replace(record, folder=run.folder)
        if self.flat_from is not None:
            steps = run.recipe(job.recipe).stages["align"].fixed_steps or 0
            is_flat = steps >= self.flat_from[arm]
            record = learned(record, steps, is_flat, bool(job.recipe.evaluate.shares))
        folder = job.study / run.folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MODEL).mkdir()
        write_records(folder / PREDICTIONS, answers)
        write_text(folder / RESULT, json.dumps(record.to_json()))

    def stop_and_continue(self, path: Path, folder: Path, after: int) -> None:
        """Stop a study after so many runs, and do it again; `done` names the runs of both.

        Args:
            path: of the recipe.
            folder: of the study.
            after: runs.
        """
        self.done = []
        self.allowed = after
        with pytest.raises(LayerfuseError, match="stopped"):
            run_study(path, folder)
        self.allowed = 10**6
        run_study(path, folder)


def learned(record: RunRecord, steps: int, is_flat: bool, validated: bool) -> RunRecord:
    """The record with the training of a run that is flat at its end, or still improving.

    Args:
        record: of the run.
        steps: of stage `align`.
        is_flat: whether more steps would change nothing.
        validated: whether it answered validation questions; else its losses alone say it.
    """
    losses = []
    for step in range(1, steps + 1):
        # Of answers that are one bit, shared with the token that ends them: 0.35 is guessing.
        losses.append((step, 0.05 if is_flat else 0.35 * (1 - step / steps)))
    along = []
    if validated:
        end = 0.4 + 0.01 * record.seed + 0.001 * steps
        for share, accuracy in ((0.75, end if is_flat else end - 0.1), (1.0, end)):
            step = round(share * steps)
            along.append(CurvePoint(share, "align", step, 4 * step, accuracy, {"a": accuracy}, 1.0))
    return replace(record, losses={"align": losses}, along=along)


def made_up_runs(
    monkeypatch: pytest.MonkeyPatch,
    rates: dict[str, float],
    flat_from: dict[str, int] | None = None,
) -> MadeUpRuns:
    """Make up all runs from now on, and draw no figures of them: most of a report's time."""
    made_up = MadeUpRuns(rates, flat_from)
    monkeypatch.setattr(execute, "run_arm", made_up)
    monkeypatch.setattr(report, "draw", no_figures)
    return made_up


def no_figures(
    summary: Summary, runs: list[FinishedRun], folder: Path, batch_sizes: Mapping[str, int]
) -> list[str]:
    """Stands for the drawing of a report's figures."""
    return []


def run_study(path: Path, folder: Path) -> str:
    """Run a study. Returns what it says."""
    screen = io.StringIO()
    study(path, output=folder, console=Console(file=screen, width=400))
    return screen.getvalue()


def seeds_by_arm(folder: Path) -> dict[str, list[int]]:
    """The seeds of a study's finished runs."""
    seeds: dict[str, list[int]] = {}
    for result in read_results(folder):
        seeds.setdefault(result["arm"], []).append(result["seed"])
    return seeds


def read_summary(folder: Path) -> dict[str, Any]:
    """What a study found, as numbers and sentences."""
    return json.loads((folder / "summary.json").read_text())
