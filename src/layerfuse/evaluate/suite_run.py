"""Ask a model a whole suite, and print the table that its paper prints."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from rich.console import Console
from transformers.utils import logging as transformers_logging

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.answer import Answerer
from layerfuse.evaluate.answer_folder import AskedModel
from layerfuse.evaluate.asking import answer_folder, ask_benchmark
from layerfuse.evaluate.benchmarks import BENCHMARKS, Benchmark, Item
from layerfuse.evaluate.benchmarks.interface import JudgedItem, notes_on_questions
from layerfuse.evaluate.benchmarks.official_pictures import are_without_pictures, check_pictures
from layerfuse.evaluate.candidates import (
    MOST_CANDIDATES,
    choose,
    judged_choices,
    possible_answers,
)
from layerfuse.evaluate.load_answerer import load_answerer
from layerfuse.evaluate.redrawing import clusters_of_items
from layerfuse.evaluate.suite_scores import column_of, fill, print_columns, print_scores
from layerfuse.evaluate.suites import Prompt, Suite, load_prompts
from layerfuse.files import write_text
from layerfuse.hardware import joined_process
from layerfuse.progress import Progress, shown_progress
from layerfuse.vision.picture import Picture

SUITE = "suite.json"
SCORES = "scores.json"
"""All numbers of a benchmark, in the folder of its answers."""


@dataclass(frozen=True)
class AvailableBenchmark:
    """A benchmark of a suite whose questions are at hand.

    Attributes:
        name: of the benchmark.
        items: the questions that are asked.
        prompt: how they are put.
        possible: the answers of those that are closed, by `possible_answers` of all questions, also
            of those that a limit leaves out.
    """

    name: str
    items: list[Item]
    prompt: Prompt
    possible: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Availability:
    """Which benchmarks of a suite can be asked.

    Attributes:
        available: in the order of the suite.
        missing: by the names of the others, why not.
        notes: of those that are available.
    """

    available: list[AvailableBenchmark]
    missing: dict[str, str]
    notes: list[str]

    def pictures(self) -> Iterator[Picture]:
        """The pictures of all questions that can be asked, as often as they are asked about."""
        for available in self.available:
            for item in available.items:
                yield from item.pictures


def evaluate_suite(
    model: Path,
    suite: Suite,
    *,
    benchmarks: Path,
    output: Path | None = None,
    batch_size: int = 32,
    partial_average: bool = False,
    likelihood: bool = False,
    cached: bool = False,
    dtype: Literal["float32", "bfloat16"] | None = None,
    batch_invariant: bool = True,
    limit: int | None = None,
    console: Console | None = None,
) -> Path:
    """Ask a trained model the benchmarks of a suite that are at hand, and write what it scores.

    Args:
        model: its folder.
        suite: what is asked.
        benchmarks: the folder of the benchmarks, one folder for each, by its name.
        output: where answers and scores go. Default: `suites/NAME` in the model's folder, and
            `suites/NAME-first-LIMIT` with a limit.
        batch_size: questions that a process answers at once.
        partial_average: average what there is, where columns are missing.
        likelihood: also let the model choose among the possible answers of closed questions.
        cached: read the pictures' features from the cache, and keep there what it lacks.
        dtype: of the model's arithmetic; None is that in which it was saved.
        batch_invariant: ask again alone what is too close to call.
        limit: ask about so many questions of each benchmark, some of each of its groups; None asks
            all.
        console: where to print; the terminal by default.

    Returns:
        The folder that was written.

    Raises:
        LayerfuseError: no benchmark is at hand, the files of one are damaged, there is no model,
            the folder holds answers to something else or cannot be written, or a partial average
            of a suite without an average is asked for.
    """
    process = joined_process()
    if console is None:
        # Of several processes the first one speaks.
        console = Console(quiet=not process.is_first)
    # Before the model: files are checked in a moment, while a large model loads for minutes.
    if partial_average and suite.average is None:
        raise LayerfuseError(f"suite {suite.name!r} has no average: leave --partial-average out")
    found = look_for(suite, benchmarks, limit)
    _print_missing(found, suite, console)
    name = suite.name if limit is None else f"{suite.name}-first-{limit}"
    folder = output or model / "suites" / name
    # One bar is enough: that of the questions.
    transformers_logging.disable_progress_bar()
    run = _SuiteRun(
        suite,
        found,
        folder,
        AskedModel.of(model, dtype, batch_invariant=batch_invariant),
        batch_size,
        load_answerer(model, dtype, batch_invariant=batch_invariant),
    )
    with shown_progress(console) as progress:
        if cached:
            run.answerer = run.answerer.with_cached_features(found.pictures(), progress)
        answered = run.ask(progress)
        scores = fill(
            suite,
            str(model),
            answered,
            missing=found.missing,
            notes=found.notes,
            partial_average=partial_average,
        )
        if likelihood:
            chosen = run.choose(progress)
            by_likelihood = fill(suite, str(model), chosen, missing=found.missing, notes=[])
            notes = [*scores.notes, *open_questions(found.available)]
            scores = replace(scores, by_likelihood=by_likelihood.columns, notes=notes)
    if process.is_first:
        write_text(folder / SUITE, json.dumps(asdict(scores), indent=1) + "\n")
    print_scores(suite, scores, console)
    if len(answered) == 1 and len(suite.columns) == 1:
        [(name, judged)] = answered.items()
        print_columns(BENCHMARKS[name], judged, console)
    console.print(f"answers and scores: {folder}", markup=False, highlight=False, soft_wrap=True)
    return folder


def _print_missing(found: Availability, suite: Suite, console: Console) -> None:
    """Say which benchmarks are not at hand; raise LayerfuseError if none is."""
    for name, reason in found.missing.items():
        console.print(
            f"not available: {name}: {reason}", markup=False, highlight=False, soft_wrap=True
        )
    if not found.available:
        raise LayerfuseError(
            f"no benchmark of suite {suite.name!r} can be asked: give the folder of their files by "
            "--benchmarks"
        )


@dataclass
class _SuiteRun:
    """A model that is asked the benchmarks of a suite that are at hand."""

    suite: Suite
    found: Availability
    folder: Path
    model: AskedModel
    batch_size: int
    answerer: Answerer

    def ask(self, progress: Progress) -> dict[str, list[JudgedItem]]:
        """The judged answers to all benchmarks, by the benchmark."""
        answered: dict[str, list[JudgedItem]] = {}
        total = sum(len(available.items) for available in self.found.available)
        done = 0
        for available in self.found.available:
            answered[available.name] = ask_benchmark(
                self.answerer,
                BENCHMARKS[available.name],
                available.items,
                available.prompt,
                self.folder / available.name,
                model=self.model,
                batch_size=self.batch_size,
                progress=_of_suite(progress, f"suite {self.suite.name}", done, total),
            )
            if joined_process().is_first:
                _write_columns(self.folder / available.name, answered[available.name])
            done += len(available.items)
        return answered

    def choose(self, progress: Progress) -> dict[str, list[JudgedItem]]:
        """What the model finds likeliest, by the benchmark; those with open questions are left
        out: a score over their closed ones alone would be that of another benchmark."""
        closed: list[AvailableBenchmark] = []
        for available in self.found.available:
            if len(available.possible) == len(available.items):
                closed.append(available)
        chosen: dict[str, list[JudgedItem]] = {}
        total = sum(len(available.items) for available in closed)
        done = 0
        for available in closed:
            benchmark = BENCHMARKS[available.name]
            choices = choose(
                self.answerer,
                benchmark,
                available.items,
                available.prompt,
                available.possible,
                answer_folder(
                    self.folder / available.name,
                    benchmark,
                    available.items,
                    available.prompt,
                    self.model,
                ),
                batch_size=self.batch_size,
                progress=_of_suite(progress, f"likelihood {self.suite.name}", done, total),
            )
            chosen[available.name] = judged_choices(benchmark, available.items, choices)
            done += len(available.items)
        return chosen


def open_questions(available: Sequence[AvailableBenchmark]) -> list[str]:
    """Say which benchmarks are not answered by likelihood, and why.

    Args:
        available: the benchmarks that are at hand.

    Returns:
        A line for each that has open questions.
    """
    lines: list[str] = []
    for one in available:
        num_open = len(one.items) - len(one.possible)
        if num_open:
            lines.append(
                f"{BENCHMARKS[one.name].title}: not by likelihood, as {num_open:,} of "
                f"{len(one.items):,} questions are open: their group has more than "
                f"{MOST_CANDIDATES} different answers, or their right answer is no text"
            )
    return lines


def _write_columns(folder: Path, judged: Sequence[JudgedItem]) -> None:
    """Write all numbers of a benchmark into the folder of its answers, which has its name."""
    columns = [column.written() for column in BENCHMARKS[folder.name].columns(judged)]
    content = {"benchmark": folder.name, "columns": columns}
    write_text(folder / SCORES, json.dumps(content, indent=1) + "\n")


def needs_files(suite: Suite) -> bool:
    """Whether any benchmark of a suite has files; else there is no folder to look for them in.

    Args:
        suite: names the benchmarks.
    """
    for column in suite.columns:
        # What is not scored is not read either.
        if column.benchmark in BENCHMARKS and BENCHMARKS[column.benchmark].needs_files:
            return True
    return False


def _of_suite(progress: Progress, name: str, before: int, of_all: int) -> Progress:
    """Progress of one benchmark as that of the suite: one bar, whose time left is that of all.

    Args:
        progress: is told of the suite.
        name: what is done with the suite.
        before: questions of the benchmarks before this one.
        of_all: questions of all benchmarks.
    """

    def report(phase: str, done: int, total: int, note: str = "") -> None:
        progress(name, before + done, of_all, phase)

    return report


def look_for(suite: Suite, benchmarks: Path, limit: int | None = None) -> Availability:
    """Load the questions of a suite's benchmarks, to be asked.

    Args:
        suite: names them.
        benchmarks: their folder.
        limit: about how many of each; None is all.

    Returns:
        What can be asked, and why the rest cannot.

    Raises:
        LayerfuseError: the files of a benchmark are there and damaged, some of its pictures are
            missing, it has no prompt, or reports no such column.
    """
    prompts = load_prompts(suite.prompts)
    available: list[AvailableBenchmark] = []
    missing: dict[str, str] = {}
    notes: list[str] = []
    # Several columns may be of one benchmark, which is asked once.
    for name in dict.fromkeys(column.benchmark for column in suite.columns):
        if name not in BENCHMARKS:
            missing[name] = "layerfuse does not score it"
            continue
        known = BENCHMARKS[name]
        folder = benchmarks / name
        if known.needs_files and not _holds_files(folder):
            missing[name] = f"no files in {folder}; expected: {', '.join(known.expected)}"
            continue
        # Asking in words of our own would be another benchmark.
        if name not in prompts:
            raise LayerfuseError(f"prompts {suite.prompts!r} have none for benchmark {name!r}")
        items = known.load(folder)
        if are_without_pictures(items):
            missing[name] = (
                f"{folder} has none of its pictures, which asking needs; expected: "
                f"{', '.join(known.expected)}"
            )
            continue
        try:
            check_pictures(items)
        except LayerfuseError as error:
            raise LayerfuseError(f"{known.title}: {error}") from error
        notes += notes_on_questions(known, items)
        # Of all questions: the answers of a few would be a choice that the benchmark does not give.
        possible = possible_answers(items)
        if limit is not None:
            asked = some_of_each_group(known, items, limit)
            if len(asked) < len(items):
                notes.append(
                    f"{known.title}: {len(asked):,} of {len(items):,} questions were asked "
                    f"(--limit {limit}), so that no score is the benchmark's"
                )
            items = asked
        _check_columns(known, suite, items)
        form = prompts[name].boxes
        if form is not None:
            items = [known.with_box_form(item, form) for item in items]
        possible = {item.id: possible[item.id] for item in items if item.id in possible}
        available.append(AvailableBenchmark(name, items, prompts[name], possible))
    return Availability(available, missing, notes)


def some_of_each_group(known: Benchmark, items: Sequence[Item], limit: int) -> list[Item]:
    """Choose the first questions of each group in turn, for a quick look.

    Args:
        known: the benchmark.
        items: all its questions.
        limit: how many are wanted.

    Returns:
        At least so many, in their order, unless there are fewer, and at least one of each group:
        what is judged together and what is asked about one picture is chosen as a whole.
    """
    clusters: dict[int, list[Item]] = {}
    for item, number in zip(items, clusters_of_items(known, items), strict=True):
        clusters.setdefault(number, []).append(item)
    waiting: dict[str, list[list[Item]]] = {}
    for cluster in clusters.values():
        waiting.setdefault(cluster[0].group, []).append(cluster)
    chosen: set[str] = set()
    turn = 0
    while len(chosen) < min(limit, len(items)):
        for of_group in waiting.values():
            # Of the first turn every group has a share, however low the limit is.
            is_wanted = turn == 0 or len(chosen) < limit
            if is_wanted and turn < len(of_group):
                chosen.update(item.id for item in of_group[turn])
        turn += 1
    return [item for item in items if item.id in chosen]


def _holds_files(folder: Path) -> bool:
    """Whether a folder is there and not empty."""
    return folder.is_dir() and any(folder.iterdir())


def _check_columns(known: Benchmark, suite: Suite, items: list[Item]) -> None:
    """Refuse columns that a benchmark does not report, before anything is asked."""
    named = [column for column in suite.columns if column.benchmark == known.name]
    # The headline is always there; all else depends on the questions, such as their groups.
    if all(column.column is None for column in named):
        return
    unanswered = [JudgedItem(item, known.judge(item, "")) for item in items]
    for column in named:
        column_of(column, known.columns(unanswered))
