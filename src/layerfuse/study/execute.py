"""Do the runs of a study: in this process, in several that train together, or many at once by Ray.

`python -m layerfuse.study.execute STUDY RUN [--module MODULE ...]` is one process of a run.
"""

import argparse
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from layerfuse.data.feature_store import FeatureStore
from layerfuse.data.sample_sets import SampleSets, label_of_validation
from layerfuse.data.subset import draw_subsets
from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.answer import Answerer
from layerfuse.evaluate.averages import scores
from layerfuse.evaluate.learning_curve import (
    CURVE,
    CurveRecorder,
    ValidationQuestions,
    read_curve,
)
from layerfuse.evaluate.predict import predict
from layerfuse.evaluate.records import (
    PREDICTIONS,
    AnswerRecord,
    CurvePoint,
    RunRecord,
    write_records,
)
from layerfuse.files import write_text
from layerfuse.paths import home
from layerfuse.progress import Progress, silent
from layerfuse.recipe.reader import load_recipe
from layerfuse.recipe.schema import Recipe
from layerfuse.study.check import load_remembered
from layerfuse.study.encode import read_features
from layerfuse.study.plan import RESULT, PlannedRun, runs
from layerfuse.study.progress_table import LiveTable
from layerfuse.study.trained_files import MODEL, STAGES, is_trained, read_trained, save_trained
from layerfuse.train.along import AlongTraining, moments_of
from layerfuse.train.arm import Trained, train_arm
from layerfuse.train.closed_answers import ClosedAnswers

ENVIRONMENT = "environment.json"
PROGRESS = "progress"
LOG = "log.txt"
USER_ERROR = "error.txt"
"""Where a process of its own writes the message of an error that the user can mend."""
POLL_SECONDS = 2.0
PROGRESS_SECONDS = 1.0
"""A process of its own writes its progress at most this often."""
OTHER_FILES = "this process has other data files or another layerfuse"
LOG_LINES = 12
"""Lines of a failed process's log that the error shows."""
PR_SET_PDEATHSIG = 1
"""Of Linux's prctl: the signal that a process gets when its parent dies."""


@dataclass(frozen=True)
class TimedRun:
    """A run that was done."""

    run: PlannedRun
    seconds: float
    """that it took"""


class RunFailures:
    """The failures of runs that are done at once: the other runs go on, and then they are raised.

    Args:
        num_runs: that are to be done.
    """

    def __init__(self, num_runs: int) -> None:
        self.num_runs = num_runs
        self.messages: list[str] = []
        self.bugs: list[BaseException] = []

    def add(self, run: PlannedRun, error: BaseException) -> None:
        """Keep the failure of a run.

        Args:
            run: it failed.
            error: a LayerfuseError if the user can mend it.
        """
        self.messages.append(f"{run.name}: {error}")
        if not isinstance(error, LayerfuseError):
            self.bugs.append(error)

    def raise_any(self) -> None:
        """Raise the failures, if there are any.

        Raises:
            LayerfuseError: with the first failure, if the user can mend all of them.
            RuntimeError: with the first failure that the user cannot mend as its cause.
        """
        if not self.messages:
            return
        count = f"{len(self.messages)} of {self.num_runs} runs failed"
        if self.bugs:
            raise RuntimeError(f"{count}. {self.messages[0]}") from self.bugs[0]
        raise LayerfuseError(f"{count}. {self.messages[0]}")


@dataclass(frozen=True)
class Job:
    """A study at work: what all its runs share."""

    recipe: Recipe
    study: Path
    modules: Sequence[str]
    """what processes of their own must import for user strategies"""
    samples: SampleSets
    store: FeatureStore | None
    """None if no stage and not the test reads the cache"""

    @cached_property
    def closed_answers(self) -> ClosedAnswers:
        """The answers of all training, which a process finds once for its runs."""
        return ClosedAnswers(self.recipe, self.samples.train)


@dataclass(frozen=True)
class ProcessArguments:
    """What one process of a run is told on its command line."""

    study: Path
    """the study's folder, absolute"""
    run_folder: str
    """relative to the study's"""
    modules: tuple[str, ...] = ()
    """what to import for user strategies"""

    def to_command_line(self) -> list[str]:
        """The arguments as `from_command_line` reads them."""
        command_line = [str(self.study), self.run_folder]
        for module in self.modules:
            command_line.append(f"--module={module}")
        return command_line

    @classmethod
    def from_command_line(cls, command_line: Sequence[str] | None = None) -> "ProcessArguments":
        """Read the arguments.

        Args:
            command_line: without the program's name; None reads that of this process.
        """
        parser = argparse.ArgumentParser(description="Do one run of a study, or a process of it.")
        parser.add_argument("study", type=Path)
        parser.add_argument("run_folder")
        parser.add_argument("--module", dest="modules", action="append", default=[])
        arguments = parser.parse_args(command_line)
        return cls(arguments.study, arguments.run_folder, tuple(arguments.modules))


def run_arm(job: Job, run: PlannedRun, progress: Progress = silent) -> None:
    """Train and test one arm; the result is the last file that its folder gets.

    What is trained is on disk before the test: a run that was stopped in its test goes straight
    to it. Of several processes that train together, the first tests.

    Args:
        job: the study.
        run: one of its runs.
        progress: is told of the steps of each stage and of the test's questions.
    """
    recipe = run.recipe(job.recipe)
    folder = job.study / run.folder
    folder.mkdir(parents=True, exist_ok=True)
    curve_file = folder / STAGES / CURVE
    trained = _trained_before(recipe, folder)
    if trained is None:
        # Every process trains; the model that comes back is whole in each of them.
        trained = train_arm(
            recipe,
            run.arm,
            run.seed,
            samples=job.samples.train,
            store=job.store,
            folder=folder,
            progress=progress,
            along=_along_training(job, run, curve_file, progress),
            closed_answers=job.closed_answers,
        )
        if PartialState().is_main_process:
            save_trained(trained, folder)
    # Answers are few and short: one process is done with them before others could share them.
    if not PartialState().is_main_process:
        return
    started = time.perf_counter()
    test_label = job.samples.test_label

    def tested(phase: str, done: int, total: int, note: str = "") -> None:
        # Under the test's own label: a stage may have the name of the phase.
        progress(test_label, done, total, note)

    store = None
    if recipe.test_reads_cache():
        store = job.store
    answerer = Answerer(trained.model, trained.processor, store)
    answers = predict(answerer, job.samples.test, recipe.evaluate, tested)
    seconds = {**trained.seconds, test_label: round(time.perf_counter() - started, 2)}
    write_records(folder / PREDICTIONS, answers)
    record = _record(run, trained, answers, seconds, read_curve(curve_file))
    write_text(folder / RESULT, json.dumps(record.to_json()))
    # A finished run is never continued: its checkpoints are only in the way.
    shutil.rmtree(folder / STAGES, ignore_errors=True)
    # With `best` the models of all runs are kept until the last run is done.
    if recipe.keep_models == "none":
        shutil.rmtree(folder / MODEL, ignore_errors=True)


def _trained_before(recipe: Recipe, folder: Path) -> Trained | None:
    """What an interrupted run has trained, None if it still has to train."""
    was_trained = is_trained(folder)
    # All processes look before any trains, tests and removes what they look for.
    PartialState().wait_for_everyone()
    if not was_trained:
        return None
    return read_trained(recipe, folder)


def _record(
    run: PlannedRun,
    trained: Trained,
    answers: list[AnswerRecord],
    seconds: dict[str, float],
    along: list[CurvePoint],
) -> RunRecord:
    config = trained.model.config
    return RunRecord(
        arm=run.arm.label,
        seed=run.seed,
        layers=config.vision_layers,
        depth=config.vision_config.num_hidden_layers,
        fusion=config.fusion,
        kind=trained.model.fusion.kind,
        folder=run.folder,
        scores=scores(answers),
        losses=trained.losses,
        parameters=trained.parameters,
        seconds=seconds,
        along=along,
    )


def _along_training(
    job: Job, run: PlannedRun, curve_file: Path, progress: Progress
) -> AlongTraining | None:
    """What a run is asked while it trains; None without validation data."""
    recipe = run.recipe(job.recipe)
    samples = job.samples.validation
    if samples is None:
        return None
    label = label_of_validation(job.samples.train)

    def answered(phase: str, done: int, total: int, note: str = "") -> None:
        # Under a label of its own: a stage may have the name of the phase.
        progress(label, done, total, note)

    store = None
    if recipe.test_reads_cache():
        store = job.store
    last_stage = list(recipe.stages.values())[-1]
    validation = ValidationQuestions(samples, recipe.evaluate, last_stage.guided_by, store)
    recorder = CurveRecorder(validation, curve_file, answered)
    trained_on = draw_subsets(job.samples.train, recipe.subsets, run.seed)
    moments = moments_of(recipe, trained_on, recipe.evaluate.shares)
    return AlongTraining(moments, recorder.measure)


@dataclass(frozen=True)
class OpenedStudy:
    """A study that another process has prepared, as this one sees it."""

    job: Job
    runs: dict[str, PlannedRun]
    """by their folders, relative to the study's"""

    def run_of(self, folder: str) -> PlannedRun:
        """The run that has this folder.

        Raises:
            LayerfuseError: there is none, since this process reads other files.
        """
        if folder not in self.runs:
            raise LayerfuseError(f"{folder}: {OTHER_FILES}")
        return self.runs[folder]


def open_study(study: Path, modules: Sequence[str]) -> OpenedStudy:
    """Read what another process has prepared.

    Args:
        study: the study's folder.
        modules: what to import for user strategies.

    Raises:
        LayerfuseError: this process's recipe, data or layerfuse differ from those of the study.
    """
    # `python -m` of the command that started this process found modules there too.
    sys.path.insert(0, str(Path.cwd()))
    for module in modules:
        import_module(module)
    recipe = load_recipe(study / "recipe.yaml")
    environment = json.loads((study / ENVIRONMENT).read_text("utf-8"))
    runs_by_folder = {run.folder: run for run in runs(recipe, environment["samples"])}
    samples = load_remembered(recipe, study)
    samples_of_study, store = read_features(study, recipe, samples)
    # A run's name holds all that decides it, but for the files as this process reads them.
    if samples.digest({}) != samples_of_study:
        raise LayerfuseError(f"{study}: {OTHER_FILES}")
    return OpenedStudy(Job(recipe, study, modules, samples, store), runs_by_folder)


def run_one(study: Path, folder: str, modules: Sequence[str]) -> None:
    """Do one run of a study that another process has prepared.

    Args:
        study: the study's folder.
        folder: the run's, relative to it.
        modules: what to import for user strategies.

    Raises:
        LayerfuseError: this process's recipe, data or layerfuse differ from those of the study.
    """
    opened = open_study(study, modules)
    last_written = 0.0

    def write_progress(phase: str, done: int, total: int, note: str = "") -> None:
        nonlocal last_written
        # Steps of tiny models take milliseconds; the file may lie on a network.
        is_due = time.monotonic() - last_written > PROGRESS_SECONDS
        if is_due and PartialState().is_main_process:
            last_written = time.monotonic()
            write_text(study / folder / PROGRESS, f"{phase} {done}/{total} {note}")

    run_arm(opened.job, opened.run_of(folder), write_progress)


def launch(recipe: Recipe, study: Path, folder: str, modules: Sequence[str]) -> None:
    """Do a run in several processes, as the recipe's `resources` say.

    Args:
        recipe: of the study.
        study: its folder, absolute.
        folder: the run's, relative to it.
        modules: what to import for user strategies.

    Raises:
        LayerfuseError: one of the processes met something that the user can mend.
        RuntimeError: one of them failed otherwise; with the end of the log, which holds its
            traceback.
    """
    arguments = ProcessArguments(study, folder, tuple(modules))
    command = [
        sys.executable,
        "-m",
        *_launcher(recipe),
        "-m",
        "layerfuse.study.execute",
        *arguments.to_command_line(),
    ]
    # Several processes write at once: their words would tear the live table apart.
    log = study / folder / LOG
    log.parent.mkdir(parents=True, exist_ok=True)
    user_error = log.with_name(USER_ERROR)
    # Of an earlier try, whose error may be mended by now.
    user_error.unlink(missing_ok=True)
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(command, stdout=file, stderr=file, preexec_fn=die_with_parent)
    if done.returncode:
        if user_error.exists():
            raise LayerfuseError(user_error.read_text("utf-8"))
        tail = "\n".join(last_words(log))
        raise RuntimeError(f"the processes of {folder} failed; the end of {log}:\n{tail}")


def _launcher(recipe: Recipe) -> list[str]:
    """The module that starts a run's processes, and its options."""
    resources = recipe.resources
    if resources.accelerate is None and not torch.cuda.is_available():
        # Without GPUs accelerate's launcher would need MPI to start several processes.
        return [
            "torch.distributed.run",
            f"--nproc-per-node={resources.processes}",
            "--rdzv-backend=c10d",
            "--rdzv-endpoint=localhost:0",
        ]
    sharing = "--multi_gpu"
    if resources.accelerate is not None:
        config = Path(__file__).parent / "accelerate" / f"{resources.accelerate}.yaml"
        if not config.exists():
            config = Path(resources.accelerate)
        sharing = f"--config_file={config}"
    return [
        "accelerate.commands.launch",
        f"--num_processes={resources.processes}",
        "--main_process_port=0",
        sharing,
    ]


def last_words(log: Path) -> list[str]:
    """The last lines of a failed run's log, without those of the launcher if there are others."""
    lines = log.read_text("utf-8", errors="replace").splitlines()
    of_processes = [line for line in lines if line.startswith("[rank")]
    return (of_processes or lines)[-LOG_LINES:]


def die_with_parent() -> None:
    """Ask the kernel (Linux) to kill this process with its parent: no orphan trains on."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def run_local(job: Job, todo: list[PlannedRun], table: LiveTable) -> Iterator[TimedRun]:
    """One run after another, in this process, or in those that `resources.processes` asks for.

    Args:
        job: the study.
        todo: the runs to do.
        table: shows the progress.

    Yields:
        Every run as soon as it is done.
    """
    for run in todo:
        started = time.perf_counter()
        if job.recipe.resources.processes == 1:
            run_arm(job, run, partial(table.step, run=run.name))
        else:
            launch(job.recipe, job.study.resolve(), run.folder, job.modules)
        yield TimedRun(run, time.perf_counter() - started)


def run_ray(job: Job, todo: list[PlannedRun], table: LiveTable) -> Iterator[TimedRun]:
    """As many runs at once as the resources allow, on the cluster of $RAY_ADDRESS or here.

    All machines must see the study's folder and the cache. A run whose worker died starts again
    from its last checkpoint.

    Args:
        job: the study.
        todo: the runs to do.
        table: shows the progress.

    Yields:
        Every run as soon as it is done.

    Raises:
        LayerfuseError: with the first failure, when all other runs are done, if the user can mend
            all of them.
        RuntimeError: as the cause of the first failure that the user cannot mend.
    """
    ray: Any = import_module("ray")
    resources = job.recipe.resources
    # Ray prints what workers print, line by line with a prefix: the table shows their progress.
    ray.init(runtime_env={"env_vars": _environment_of_workers()}, log_to_driver=False)
    gpus = resources.gpus
    # Known only now: the cluster may have GPUs that this machine lacks.
    if gpus is None:
        has_gpus = ray.cluster_resources().get("GPU")
        gpus = float(resources.processes) if has_gpus else 0.0
    task = ray.remote(
        num_cpus=resources.cpus,
        num_gpus=gpus,
        max_retries=resources.retries,
    )(_in_worker)
    failures = RunFailures(len(todo))
    try:
        study = str(job.study.resolve())
        waiting = {}
        for run in todo:
            reference = task.remote(study, run.folder, list(job.modules))
            waiting[reference] = run
        # In the order in which they finish, so that every result is kept at once.
        while waiting:
            done, _ = ray.wait(list(waiting), timeout=POLL_SECONDS)
            for run in waiting.values():
                table.note(run.name, _written_progress(job, run))
            for reference in done:
                run = waiting.pop(reference)
                try:
                    seconds = ray.get(reference)
                except ray.exceptions.RayError as error:
                    cause = error
                    if isinstance(error, ray.exceptions.RayTaskError):
                        cause = error.cause
                    if isinstance(cause, LayerfuseError):
                        failures.add(run, cause)
                    else:
                        failures.add(run, error)
                    continue
                yield TimedRun(run, seconds)
    finally:
        ray.shutdown()
    failures.raise_any()


def _environment_of_workers() -> dict[str, str]:
    """The environment variables of Ray's workers, which run in folders of their own."""
    # The layerfuse of this process, which the workers' own environment may lack.
    source = str(Path(__file__).parents[2])
    path = [source, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {
        "LAYERFUSE_HOME": str(home().resolve()),
        "PYTHONPATH": os.pathsep.join(path),
    }


def _written_progress(job: Job, run: PlannedRun) -> str:
    """What a run in another process last wrote of its progress."""
    file = job.study / run.folder / PROGRESS
    if not file.exists():
        return "waiting"
    return file.read_text("utf-8")


def _in_worker(study: str, folder: str, modules: list[str]) -> float:
    """Do a run in a worker of Ray. Returns the seconds that it took."""
    started = time.perf_counter()
    recipe = load_recipe(Path(study) / "recipe.yaml")
    if recipe.resources.processes == 1:
        # Ray counts cores but does not bind them: torch would take all of the machine's.
        torch.set_num_threads(recipe.resources.cpus)
        run_one(Path(study), folder, modules)
    else:
        launch(recipe, Path(study), folder, modules)
    return time.perf_counter() - started


def main() -> None:
    """Be one process of a run."""
    arguments = ProcessArguments.from_command_line()
    die_with_parent()
    PartialState()  # joins the other processes and takes this one's GPU
    try:
        run_one(arguments.study, arguments.run_folder, arguments.modules)
    except LayerfuseError as error:
        # The process that started this one shows the message alone, without a traceback.
        write_text(arguments.study / arguments.run_folder / USER_ERROR, str(error))
        raise
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
