"""Compare the answers of several models: paired over pictures, beside published rows."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.asking import ANSWERS
from layerfuse.evaluate.benchmarks import BENCHMARKS, Benchmark, Column, Item
from layerfuse.evaluate.benchmarks.interface import (
    JudgedItem,
    notes_on_answers,
    notes_on_questions,
)
from layerfuse.evaluate.redrawing import Redrawn, TooFewPicturesError, Vector, redraw
from layerfuse.evaluate.run_answers import Run, judged_answers
from layerfuse.evaluate.significance import LEVEL, holm
from layerfuse.evaluate.suite_scores import UnreadAnswers, column_of, unread_answers
from layerfuse.evaluate.suites import Suite, SuiteColumn, suite_of
from layerfuse.progress import Progress, silent

AVERAGE = "average"
FEW_PICTURES = 20
"""Below this number an interval by redrawing is said to be too narrow."""
SIGNIFICANT = 0.05
"""Below this p a difference is marked."""


@dataclass(frozen=True)
class Difference:
    """How a model differs from the baseline in one column.

    Attributes:
        difference: in the column's own unit.
        interval: its 95 % interval [low, high] over pictures, each redrawn for both models.
        p: of no difference, two-sided, by the same resamples.
        p_holm: the same, corrected for the number of columns; an average is one number, and its p.
        better: questions of the column that the model alone answers rightly; None where the column
            is no mean of answers, or these are not all right or wrong.
        worse: those that the baseline alone answers rightly; None likewise.
        mcnemar: p of McNemar's exact test on these; None likewise.
    """

    difference: float
    interval: tuple[float, float]
    p: float
    p_holm: float
    better: int | None = None
    worse: int | None = None
    mcnemar: float | None = None

    @property
    def mark(self) -> str:
        """`+` or `-` where the difference is beyond noise, corrected for the number of columns, and
        McNemar's exact test, where there is one, agrees: resamples of few pictures that differ
        exaggerate."""
        # Rounded, as the product of a share and a number of columns may lie a hair below 0.05.
        if round(self.p_holm, 12) >= SIGNIFICANT:
            return ""
        if self.mcnemar is not None and self.mcnemar >= SIGNIFICANT:
            return ""
        return "+" if self.difference > 0 else "-"


@dataclass(frozen=True)
class Cell:
    """A model's number in one column.

    Attributes:
        value: on the benchmark's own scale.
        best: the highest value that it can have.
        averaged: what enters the average.
        questions: how many it is over.
        difference: to the baseline; None for the baseline.
    """

    value: float
    best: float
    averaged: float
    questions: int
    difference: Difference | None = None


@dataclass(frozen=True)
class ComparedRun:
    """One model of a comparison.

    Attributes:
        name: of the run.
        cells: by column; what it has no answers to is left out.
        average: over all columns; None where some are left out, or the suite has none.
        average_difference: of the average to that of the baseline; None likewise.
        unread: by benchmark, how many answers say nothing; only where there are such answers.
    """

    name: str
    cells: dict[str, Cell]
    average: float | None
    average_difference: Difference | None = None
    unread: dict[str, UnreadAnswers] = field(default_factory=dict[str, UnreadAnswers])


@dataclass(frozen=True)
class Comparison:
    """Several models on one suite.

    Attributes:
        suite: its name.
        columns: names, in the order of the suite.
        categories: the category of each column.
        baseline: name of the run that others are compared with.
        runs: the models.
        missing: by column, why all models or some have no number there.
        resamples: number of redrawn sets of pictures.
        seed: of the redrawing.
        notes: what a reader must know of the questions, and of how they were asked.
    """

    suite: str
    columns: list[str]
    categories: dict[str, str]
    baseline: str
    runs: list[ComparedRun]
    missing: dict[str, str]
    resamples: int
    seed: int
    notes: list[str]
    reported: dict[str, list[Column]] = field(default_factory=dict[str, list[Column]])
    """by run, all that the benchmark reports, where the suite is its headline alone"""


@dataclass(frozen=True)
class _ReadAnswers:
    """The answers of the runs to one benchmark."""

    benchmark: Benchmark
    items: list[Item]
    judged: dict[str, list[JudgedItem]]
    """by the name of the run; of those that have answers"""
    columns: dict[str, list[Column]]
    """what the benchmark reports of them, by the name of the run"""


@dataclass(frozen=True)
class _RedrawnColumns:
    """The numbers of all runs on redrawn pictures, as far as they are compared."""

    values: dict[str, dict[str, Vector]]
    """by run and column, (resamples,)"""
    pictures: dict[str, int]
    """that were redrawn, by column"""


def compare(
    runs: Sequence[Run],
    suite: Suite,
    benchmarks: Path,
    *,
    baseline: str | None = None,
    resamples: int = 1000,
    seed: int = 0,
    progress: Progress = silent,
) -> Comparison:
    """Score the answers of several runs anew, and compare them.

    Args:
        runs: at least one.
        suite: names the columns.
        benchmarks: the folder of the benchmarks.
        baseline: the run that others are compared with. Default: the first.
        resamples: number of redrawn sets of pictures.
        seed: of the redrawing.
        progress: is told of the resamples.

    Returns:
        The comparison.

    Raises:
        LayerfuseError: two runs have one name, the baseline is none of them, a run has no answers
            to the suite, a benchmark's files are damaged, or a file of answers cannot be scored.
    """
    names = [run.name for run in runs]
    chosen = _baseline(names, baseline)
    answered = _read(runs, suite, benchmarks)

    # All files of answers are read before anything is redrawn, which may take minutes.
    values = {name: _columns_of_run(suite, name, answered) for name in names}
    redrawn = _RedrawnColumns({name: {} for name in names}, {})
    notes = _notes(runs, answered)
    for benchmark, answers in answered.items():
        # Without the baseline, or with it alone, there is no difference.
        if chosen not in answers.judged or len(answers.judged) == 1:
            continue
        columns = [column for column in suite.columns if column.benchmark == benchmark]
        try:
            of_runs = redraw(
                columns,
                answers.benchmark,
                answers.judged,
                resamples=resamples,
                seed=seed,
                progress=progress,
            )
        except TooFewPicturesError as error:
            # The other benchmarks are compared.
            notes.append(str(error))
            continue
        notes += _notes_on_pictures(answers.benchmark, of_runs)
        for column in columns:
            redrawn.pictures[column.name] = of_runs.pictures
        for name, drawn in of_runs.values.items():
            redrawn.values[name].update(drawn)
    compared: list[ComparedRun] = []
    for name in names:
        cells = values[name]
        if name != chosen:
            cells = _with_differences(suite, cells, values[chosen], redrawn, name, chosen)
            cells = _with_mcnemar(suite, cells, answered, name, chosen)
        run = _compared_run(suite, name, cells, values[chosen], redrawn, chosen)
        compared.append(replace(run, unread=_unread(name, answered)))
    return Comparison(
        suite=suite.name,
        columns=[column.name for column in suite.columns],
        categories={column.name: column.category for column in suite.columns},
        baseline=chosen,
        runs=compared,
        missing=_missing(suite, names, answered),
        resamples=resamples,
        seed=seed,
        notes=notes,
        reported=_reported(suite, answered),
    )


def _reported(suite: Suite, answered: dict[str, _ReadAnswers]) -> dict[str, list[Column]]:
    """By run, all that a benchmark reports, if the suite is its headline alone."""
    alone = BENCHMARKS.get(suite.name)
    if alone is None or suite != suite_of(alone):
        return {}
    return answered[alone.name].columns


def _notes_on_pictures(benchmark: Benchmark, redrawn: Redrawn) -> list[str]:
    """What to know of differences over few pictures."""
    if redrawn.pictures == 1:
        return [
            f"{benchmark.title}: all questions hang together by their pictures, so that no "
            "difference can be told from chance"
        ]
    if redrawn.pictures < FEW_PICTURES:
        return [
            f"{benchmark.title}: over {redrawn.pictures} pictures alone; intervals of so few are "
            "too narrow"
        ]
    return []


def _baseline(names: Sequence[str], chosen: str | None) -> str:
    """The run that others are compared with.

    Raises:
        LayerfuseError: there are no runs, two have one name, or none has the baseline's.
    """
    if not names:
        raise LayerfuseError("there are no runs to compare")
    for name in names:
        if names.count(name) > 1:
            raise LayerfuseError(f"two runs are called {name!r}: name them by NAME=FOLDER")
    if chosen is not None and chosen not in names:
        raise LayerfuseError(f"the baseline {chosen!r} is no run; valid: {', '.join(names)}")
    return chosen or names[0]


def _read(runs: Sequence[Run], suite: Suite, benchmarks: Path) -> dict[str, _ReadAnswers]:
    """The judged answers by benchmark.

    Raises:
        LayerfuseError: a run has none to the suite, or files cannot be read.
    """
    answered: dict[str, _ReadAnswers] = {}
    scored = [column.benchmark for column in suite.columns if column.benchmark in BENCHMARKS]
    for name in dict.fromkeys(scored):
        files: dict[str, Path] = {}
        for run in runs:
            file = run.file_of(name)
            if file is not None:
                files[run.name] = file
        if not files:
            continue
        benchmark = BENCHMARKS[name]
        items = benchmark.load(benchmarks / name)
        judged: dict[str, list[JudgedItem]] = {}
        columns: dict[str, list[Column]] = {}
        for run, file in files.items():
            judged[run] = judged_answers(file, benchmark, items)
            columns[run] = benchmark.columns(judged[run])
        answered[name] = _ReadAnswers(benchmark, items, judged, columns)
    for run in runs:
        # The model's folder instead of that of its answers is the usual mistake.
        if not any(run.name in answers.judged for answers in answered.values()):
            raise LayerfuseError(
                f"{run.folder} has no answers to a benchmark of suite {suite.name!r}; expected is "
                f"one of {', '.join(dict.fromkeys(scored))}, as BENCHMARK/{ANSWERS} or "
                "BENCHMARK.jsonl"
            )
    return answered


def _missing(
    suite: Suite, names: Sequence[str], answered: dict[str, _ReadAnswers]
) -> dict[str, str]:
    """Why all runs or some have no number in a column, by the column."""
    missing: dict[str, str] = {}
    for column in suite.columns:
        if column.benchmark not in BENCHMARKS:
            missing[column.name] = "layerfuse does not score it"
        elif column.benchmark not in answered:
            missing[column.name] = "no run has answers to it"
        else:
            judged = answered[column.benchmark].judged
            lacking = [name for name in names if name not in judged]
            if lacking:
                missing[column.name] = f"no answers of {', '.join(lacking)}"
    return missing


def _notes(runs: Sequence[Run], answered: dict[str, _ReadAnswers]) -> list[str]:
    """What a reader must know of the questions, and of how they were asked."""
    notes: list[str] = []
    for name, answers in answered.items():
        notes += notes_on_questions(answers.benchmark, answers.items)
        for run_name, judged in answers.judged.items():
            for note in notes_on_answers(answers.benchmark, judged):
                notes.append(f"{run_name}: {note}")
        # By the prompt: the runs whose questions were put so.
        asked: dict[str, list[str]] = {}
        for run in runs:
            prompt = run.prompt_of(name)
            if prompt is not None and run.name in answers.judged:
                asked.setdefault(json.dumps(prompt, sort_keys=True), []).append(run.name)
        if len(asked) > 1:
            groups = "; ".join(", ".join(alike) for alike in asked.values())
            notes.append(
                f"{answers.benchmark.title}: not all runs were asked in the same way, so that what "
                f"differs may be the prompt. Asked alike: {groups}"
            )
    return notes


def _unread(run: str, answered: dict[str, _ReadAnswers]) -> dict[str, UnreadAnswers]:
    """How many answers of a run say nothing, by benchmark."""
    of_run: dict[str, list[JudgedItem]] = {}
    for benchmark, answers in answered.items():
        if run in answers.judged:
            of_run[benchmark] = answers.judged[run]
    return unread_answers(of_run)


def _columns_of_run(suite: Suite, run: str, answered: dict[str, _ReadAnswers]) -> dict[str, Cell]:
    """The cells of one run, without differences."""
    cells: dict[str, Cell] = {}
    for column in suite.columns:
        answers = answered.get(column.benchmark)
        if answers is None or run not in answers.judged:
            continue
        found = column_of(column, answers.columns[run])
        cells[column.name] = Cell(
            found.value, found.best, found.value / column.divide, found.questions
        )
    return cells


def _difference(observed: float, drawn: Vector, pictures: int) -> Difference:
    """A difference with its interval and p by redrawn differences; not corrected yet."""
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    # One is added: with so many resamples nothing less likely can be told.
    below = (1 + np.sum(drawn <= 0)) / (1 + len(drawn))
    above = (1 + np.sum(drawn >= 0)) / (1 + len(drawn))
    p = min(1.0, 2 * float(min(below, above)))
    # Were the models alike, each picture could as well have fallen the other way: of n pictures
    # all fall one way by chance with this p. Redrawing few cannot see that.
    p = max(p, 2.0 ** (1 - pictures))
    return Difference(observed, (float(low), float(high)), p, p)


def _with_differences(
    suite: Suite,
    cells: dict[str, Cell],
    of_baseline: dict[str, Cell],
    redrawn: _RedrawnColumns,
    run: str,
    baseline: str,
) -> dict[str, Cell]:
    """The cells of a run with their differences to the baseline, corrected for their number."""
    # What one of them was not asked is no comparison that the others are corrected for.
    drawn_of_run = redrawn.values[run]
    drawn_of_baseline = redrawn.values[baseline]
    shared = [name for name in cells if name in of_baseline and name in drawn_of_run]
    divided = {column.name: column.divide for column in suite.columns}
    differences: list[Difference] = []
    for name in shared:
        drawn = (drawn_of_run[name] - drawn_of_baseline[name]) * divided[name]
        observed = cells[name].value - of_baseline[name].value
        differences.append(_difference(observed, drawn, redrawn.pictures[name]))
    completed = dict(cells)
    corrected = holm([difference.p for difference in differences])
    for name, difference, p_holm in zip(shared, differences, corrected, strict=True):
        completed[name] = replace(cells[name], difference=replace(difference, p_holm=p_holm))
    return completed


def _with_mcnemar(
    suite: Suite,
    cells: dict[str, Cell],
    answered: dict[str, _ReadAnswers],
    run: str,
    baseline: str,
) -> dict[str, Cell]:
    """The cells with McNemar's test over the questions of each column."""
    completed = dict(cells)
    for column in suite.columns:
        cell = cells.get(column.name)
        if cell is None or cell.difference is None:
            continue
        answers = answered[column.benchmark]
        mine = _scores_of_mean(column, answers, run)
        others = _scores_of_mean(column, answers, baseline)
        # A soft score is neither right nor wrong.
        if not mine or not {*mine, *others} <= {0.0, 1.0}:
            continue
        pairs = list(zip(mine, others, strict=True))
        better = sum(own > other for own, other in pairs)
        worse = sum(own < other for own, other in pairs)
        difference = replace(
            cell.difference, better=better, worse=worse, mcnemar=mcnemar(better, worse)
        )
        completed[column.name] = replace(cell, difference=difference)
    return completed


def _scores_of_mean(column: SuiteColumn, answers: _ReadAnswers, run: str) -> list[float]:
    """The scores that a run's column is the mean of, in the order of the questions."""
    found = column_of(column, answers.columns[run])
    return [each.judged.score for each in found.mean_of]


def mcnemar(better: int, worse: int) -> float:
    """McNemar's exact test of two models on the same questions.

    Args:
        better: questions that only the first answers rightly.
        worse: questions that only the second answers rightly.

    Returns:
        Two-sided p of both being as likely; 1 where neither ever happens.
    """
    # scipy.stats takes half a second to import, and brings no types.
    from scipy import stats  # pyright: ignore[reportMissingTypeStubs]

    if better + worse == 0:
        return 1.0
    untyped: Any = stats
    return float(untyped.binomtest(better, better + worse, 0.5).pvalue)


def _compared_run(
    suite: Suite,
    name: str,
    cells: dict[str, Cell],
    of_baseline: dict[str, Cell],
    redrawn: _RedrawnColumns,
    baseline: str,
) -> ComparedRun:
    """A run with its average, where it has all columns."""
    columns = [column.name for column in suite.columns]
    # An average over fewer columns could not be told from one over all.
    if suite.average is None or not all(column in cells for column in columns):
        return ComparedRun(name, cells, None)
    average = sum(cells[column].averaged for column in columns) / len(columns)
    if name == baseline or not all(column in redrawn.values[name] for column in columns):
        return ComparedRun(name, cells, average)
    other = sum(of_baseline[column].averaged for column in columns) / len(columns)
    drawn_of_run = redrawn.values[name]
    drawn_of_baseline = redrawn.values[baseline]
    drawn = np.mean(
        [drawn_of_run[column] - drawn_of_baseline[column] for column in columns], axis=0
    )
    # Of the benchmark with the fewest: it alone may decide.
    fewest = min(redrawn.pictures[column] for column in columns)
    return ComparedRun(name, cells, average, _difference(average - other, drawn, fewest))
