"""The main job: train and compare every arm of a recipe, then write the report."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from layerfuse.data.feature_store import digests_of
from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.clusters import connected_names
from layerfuse.evaluate.records import RunRecord, RunScores, write_records
from layerfuse.files import locked, write_text
from layerfuse.model.given_parts import given_parts
from layerfuse.model.pretrained import text_config_of
from layerfuse.recipe.arms import Arm
from layerfuse.recipe.reader import load_recipe
from layerfuse.recipe.schema import Recipe
from layerfuse.study.budgets import refuse_auto_steps, refuse_undecidable, runs_by_budget
from layerfuse.study.check import LEFT_OUT, CheckedSamples, leave_out, load_checked
from layerfuse.study.data_sizes import refuse_data_sizes, refuse_other_kind, study_sizes
from layerfuse.study.data_summary import (
    print_data_summary,
    summarize_data,
    write_data_summary,
)
from layerfuse.study.encode import encode_pictures, pictures_of, write_features
from layerfuse.study.execute import ENVIRONMENT, PROGRESS, Job, TimedRun, run_local, run_ray
from layerfuse.study.notices import say_at_once, say_left_out, say_shared, say_uncached
from layerfuse.study.plan import PlannedRun, first_run_names, run_names, runs, slug
from layerfuse.study.progress_table import LiveTable
from layerfuse.study.report import write_report
from layerfuse.study.side_by_side import MachineShare, shares
from layerfuse.study.surroundings import environment, recipe_text
from layerfuse.study.trained_files import MODEL
from layerfuse.study.training_status import write_blind_losses
from layerfuse.study.worker_pool import run_side_by_side

Engine = Literal["local", "ray"]


@dataclass(frozen=True)
class TrainedArm:
    """One arm, trained and tested on its own."""

    record: RunRecord
    model: Path
    """the model's folder"""


def study(
    recipe_path: str | Path,
    overrides: tuple[str, ...] = (),
    *,
    output: Path | None = None,
    engine: Engine = "local",
    modules: Sequence[str] = (),
    console: Console | None = None,
) -> Path:
    """Do the runs of a recipe that are not yet done, and write `report.html`.

    A run that is finished in the folder is not run again; a killed study continues. With
    `data_sizes` there is a study for each size, and a page that sets them side by side.

    Args:
        recipe_path: the recipe's file.
        overrides: `key.sub=value`.
        output: the study's folder. Default: `runs/<name>`.
        engine: on this machine, as many runs at once as the recipe's `resources.arms_at_once`
            says, or by Ray.
        modules: what processes of their own must import for user strategies.
        console: where progress is shown.

    Returns:
        The path of the report.

    Raises:
        LayerfuseError: before any training, for anything in the recipe, the data or the models that
            does not fit.
    """
    recipe = _load(recipe_path, overrides, console)
    folder = output or Path("runs") / recipe.name
    refuse_other_kind(recipe, folder)

    def one_study(of_one: Recipe, its_folder: Path) -> Path:
        _do(
            of_one,
            its_folder,
            engine=engine,
            modules=modules,
            console=console,
            needs_intervals=True,
        )
        return write_report(its_folder)

    if recipe.data_sizes is None:
        return one_study(recipe, folder)
    return study_sizes(recipe, folder, one_study, console or Console())


def train(
    recipe_path: str | Path,
    overrides: tuple[str, ...] = (),
    *,
    arm: str | None = None,
    seed: int | None = None,
    output: Path | None = None,
    modules: Sequence[str] = (),
    console: Console | None = None,
) -> TrainedArm:
    """Train and test one arm of a recipe with one seed, and keep the model; no report.

    Args:
        recipe_path: the recipe's file.
        overrides: `key.sub=value`.
        arm: the arm's name. May be left out where the recipe has only one.
        seed: of the run. Default: the arm's first.
        output: the run's folder. Default: `runs/<name>.<arm>.seed<seed>`.
        modules: what processes of their own must import for user strategies.
        console: where progress is shown.

    Returns:
        What it scored, and where the model is.

    Raises:
        LayerfuseError: the recipe has `data_sizes` or `steps: auto`, there is no such arm, the
            folder holds other runs, or the finished run's model was removed; or before any
            training, for anything in the recipe, the data or the models that does not fit.
    """
    recipe = _load(recipe_path, overrides, console)
    refuse_data_sizes(recipe)
    refuse_auto_steps(recipe)
    chosen = _choose_arm(recipe, arm)
    seeds = [seed] if seed is not None else (chosen.seeds or recipe.all_seeds)[:1]
    chosen = chosen.model_copy(update={"seeds": seeds})
    # A study of one run: it is checked, cached, continued and shared among processes as any other.
    of_one_run = recipe.model_copy(
        update={
            "arms": [chosen],
            "grid": None,
            "seeds": seeds,
            "auto_seeds": None,
            "baseline": chosen.label,
            # They are about other arms too.
            "claims": [],
            "keep_models": "all",
        }
    )
    folder = output or Path("runs") / f"{recipe.name}.{slug(chosen)}.seed{seeds[0]}"
    _refuse_other_runs(folder, of_one_run)
    (trained,) = train_and_keep(of_one_run, folder, modules=modules, console=console)
    return trained


def train_and_keep(
    recipe: Recipe,
    folder: Path,
    *,
    modules: Sequence[str] = (),
    console: Console | None = None,
) -> list[TrainedArm]:
    """Do the runs of a recipe that are not yet done, and keep every model; no report.

    Args:
        recipe: what to run; its `keep_models` must be `all`.
        folder: where; made if it is missing.
        modules: what processes of their own must import for user strategies.
        console: where progress is shown.

    Returns:
        Every run, in the order in which a study does them.

    Raises:
        LayerfuseError: a finished run's model was removed; or before any training, for anything in
            the recipe, the data or the models that does not fit.
    """
    records = _do(
        recipe,
        folder,
        engine="local",
        modules=modules,
        console=console,
        needs_intervals=False,
    )
    trained = []
    for record in records:
        model = folder / record.folder / MODEL
        if not model.is_dir():
            raise LayerfuseError(
                f"the run is finished, but its model is gone: delete {folder / record.folder} to "
                "train it again"
            )
        trained.append(TrainedArm(record, model))
    return trained


def _load(recipe_path: str | Path, overrides: Sequence[str], console: Console | None) -> Recipe:
    """The recipe, with the parts of the model that its arms start from."""
    recipe = _with_whole_llm_named(load_recipe(recipe_path, overrides))
    if recipe.start_from is None:
        return recipe
    parts = given_parts(recipe.start_from, (console or Console()).print)
    return recipe.starting_from(**asdict(parts))


def _with_whole_llm_named(recipe: Recipe) -> Recipe:
    """The recipe, without `llm.blocks` where these are all that the LLM has: no screening then."""
    blocks = recipe.llm.blocks
    if blocks is None or text_config_of(recipe.llm.model).num_hidden_layers != blocks:
        return recipe
    whole = recipe.llm.model_copy(update={"blocks": None})
    return recipe.model_copy(update={"llm": whole})


def _refuse_other_runs(folder: Path, of_one_run: Recipe) -> None:
    """Raise LayerfuseError for a folder whose results this one run would replace."""
    file = folder / "recipe.yaml"
    if not file.exists():
        return
    earlier = load_recipe(file)
    if run_names(earlier) != run_names(of_one_run):
        raise LayerfuseError(f"{folder} holds other runs: give another folder by --output")


def _choose_arm(recipe: Recipe, name: str | None) -> Arm:
    """The arm of this name, or the only one."""
    arms = {arm.label: arm for arm in recipe.all_arms()}
    names = ", ".join(repr(label) for label in arms)
    if name is None:
        if len(arms) > 1:
            raise LayerfuseError(f"the recipe has {len(arms)} arms; choose one by --arm: {names}")
        return next(iter(arms.values()))
    if name not in arms:
        raise LayerfuseError(f"the recipe has no arm {name!r}; valid: {names}")
    return arms[name]


def _do(
    recipe: Recipe,
    folder: Path,
    *,
    engine: Engine,
    modules: Sequence[str],
    console: Console | None,
    needs_intervals: bool,
) -> list[RunRecord]:
    """Do the runs of a recipe that are not yet done.

    Args:
        recipe: what to run.
        folder: where; made if it is missing.
        engine: what does the runs.
        modules: what processes of their own must import.
        console: where progress is shown; the terminal by default.
        needs_intervals: whether a test set with a single picture is refused.

    Returns:
        The records of all runs.
    """
    _check_surroundings(engine)
    # Loading reports and bars of every arm would tear the live table apart.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with LiveTable(first_run_names(recipe), console or Console()) as table:
        # Before the folder is made: a recipe that is refused leaves nothing behind.
        checked = load_checked(recipe, table.step)
        refuse_undecidable(recipe, checked.blind_losses, checked.usable.train)
        pictures = pictures_of(checked.usable.by_label().values())
        picture_digests = digests_of(pictures, table.step)
        if needs_intervals:
            _refuse_one_picture(checked, picture_digests)
        summaries = summarize_data(checked.usable, picture_digests, checked.tokens, recipe.subsets)
        print_data_summary(summaries, table.console)
        say_shared(summaries, table.console)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LayerfuseError(f"cannot make the folder {folder}: {error}") from error
        with locked(folder / ".lock", _refuse):
            write_data_summary(folder, summaries)
            write_blind_losses(folder, checked.blind_losses)
            return _do_locked(
                recipe,
                folder,
                checked,
                picture_digests,
                engine=engine,
                modules=modules,
                table=table,
            )


def _refuse_one_picture(checked: CheckedSamples, digests: Mapping[str, str]) -> None:
    """Raise LayerfuseError, before any training, for a test from which no interval could be made.

    Args:
        checked: the samples of the study.
        digests: of the pictures' bytes, by the picture's name.
    """
    shown = []
    for sample in checked.usable.test:
        of_sample = [digests[picture.name] for picture in sample.pictures]
        # Without a picture the sample stands for it.
        shown.append(of_sample or [sample.id])
    if len(set(connected_names(shown))) < 2:
        message = (
            f"the test set has one picture, by the bytes of its {len(shown)} samples' pictures: "
            "intervals over pictures need at least two. `layerfuse train` trains an arm without "
            "intervals"
        )
        bad = list(checked.bad.test.values())
        if bad:
            message += f". {len(bad)} bad samples are left out; the first: {bad[0].reason}"
        raise LayerfuseError(message)


def _refuse() -> None:
    raise LayerfuseError("another process is running a study in this folder")


def _do_locked(
    recipe: Recipe,
    folder: Path,
    checked: CheckedSamples,
    picture_digests: dict[str, str],
    *,
    engine: Engine,
    modules: Sequence[str],
    table: LiveTable,
) -> list[RunRecord]:
    """Do the runs that are not yet done, in a folder that no other process writes to.

    Args:
        recipe: of the study.
        folder: the study's, locked by this process.
        checked: the samples that passed the checks so far, and those that did not.
        picture_digests: of the pictures' bytes, by the picture's name.
        engine: what does the runs.
        modules: what processes of their own must import.
        table: shows the progress.

    Returns:
        The records of all runs.
    """
    samples_digest = checked.usable.digest(picture_digests)
    write_text(folder / "recipe.yaml", recipe_text(recipe))
    shown: set[str] = set()
    job = None
    records: list[RunRecord] = []
    wanted: list[PlannedRun] = []
    planned = runs(recipe, samples_digest)
    for next_runs in runs_by_budget(recipe, planned, folder, table.console):
        # Runs of an earlier budget are no results of the study, and none can be its best.
        _remove_models(recipe, folder, [run for run in wanted if run not in next_runs])
        wanted = next_runs
        table.add_runs([run.name for run in wanted])
        todo = _unfinished(folder, wanted, shown, table)
        shown.update(run.name for run in wanted)

        # By all runs, and not by those that are left: other numbers of threads round otherwise, and
        # a study that goes on would differ from one that was never stopped.
        divided = shares(
            recipe,
            checked.configs,
            checked.tokens,
            num_runs=len(wanted),
            modules=modules,
        )
        divided = divided[: max(1, len(todo))]
        surroundings = environment(recipe, samples_digest)
        if engine == "local":
            surroundings["arms at once"] = str(len(divided))
            surroundings["cpu threads"] = str(divided[0].threads)
        # It tells on what the runs were done: where none is left to do, it stays as it is.
        if todo or not (folder / ENVIRONMENT).exists():
            # Before the runs: processes of their own read it and the recipe.
            write_text(folder / ENVIRONMENT, json.dumps(surroundings, indent=1))
        if todo:
            # Once for all looks.
            if job is None:
                job = _prepare(
                    recipe,
                    folder,
                    checked,
                    picture_digests,
                    modules=modules,
                    table=table,
                )
            for finished in _finished_runs(job, todo, table, engine, divided):
                run = finished.run
                (folder / run.folder / PROGRESS).unlink(missing_ok=True)
                scores = _scores(folder, run)
                table.finish(run.name, scores.mean, finished.seconds, scores.log_likelihood)
                # After each run: a killed study keeps the results that it has.
                _collect(folder, wanted)
        records = _collect(folder, wanted)
    _keep_models(recipe, folder, wanted)
    return records


def _unfinished(
    folder: Path, wanted: list[PlannedRun], shown: set[str], table: LiveTable
) -> list[PlannedRun]:
    """The runs that are to be done; what the others scored is shown, if it is not yet."""
    todo = []
    for run in wanted:
        if run.result(folder) is None:
            todo.append(run)
        elif run.name not in shown:
            earlier = _scores(folder, run)
            table.finish(run.name, earlier.mean, None, earlier.log_likelihood)
    return todo


def _prepare(
    recipe: Recipe,
    folder: Path,
    checked: CheckedSamples,
    picture_digests: dict[str, str],
    *,
    modules: Sequence[str],
    table: LiveTable,
) -> Job:
    """Encode the pictures and leave out what cannot be used, before the first run that is to do.

    Args:
        recipe: of the study.
        folder: the study's.
        checked: the samples that passed the checks so far, and those that did not.
        picture_digests: of the pictures' bytes, by the picture's name.
        modules: what processes of their own must import.
        table: shows the progress.

    Returns:
        What all runs share.
    """
    samples = checked.usable
    # Decoding a whole picture finds faults that its header does not show.
    store, unreadable = encode_pictures(recipe, samples, picture_digests, table.step)
    usable = leave_out(recipe, samples, unreadable)
    left_out = checked.bad.union(unreadable)
    write_text(folder / LEFT_OUT, json.dumps(left_out.to_json(), indent=1))
    write_features(folder, usable, store)
    say_left_out(folder, left_out, table.console)
    say_uncached(recipe, usable.test_label, table.console)
    return Job(recipe, folder, modules, usable, store)


def _finished_runs(
    job: Job,
    todo: list[PlannedRun],
    table: LiveTable,
    engine: Engine,
    divided: Sequence[MachineShare],
) -> Iterator[TimedRun]:
    """Do these runs; each is given when it is done."""
    if engine == "ray":
        return run_ray(job, todo, table)
    if len(divided) > 1:
        say_at_once(divided, table.console)
    # The last run of several has one of their shares of the cores, which this process has all of.
    if len(divided) > 1 or divided[0].threads < torch.get_num_threads():
        return run_side_by_side(job, todo, table, divided)
    return run_local(job, todo, table)


def _check_surroundings(engine: Engine) -> None:
    """Raise LayerfuseError where no study can run."""
    # torchrun and accelerate set it: each of their processes would do the whole study.
    world_size = os.environ.get("WORLD_SIZE") or "1"
    try:
        launched = int(world_size)
    except ValueError as error:
        raise LayerfuseError(
            f"the environment variable WORLD_SIZE is {world_size!r}, which no launcher writes: "
            "unset it"
        ) from error
    if launched > 1:
        raise LayerfuseError(
            "use no launcher: a study starts processes with `resources.processes=N`"
        )
    if engine == "ray" and find_spec("ray") is None:
        raise LayerfuseError("--engine ray needs Ray: run pip install 'layerfuse[ray]'")


def _scores(folder: Path, run: PlannedRun) -> RunScores:
    """What a finished run scored."""
    result = run.result(folder)
    if result is None:
        raise RuntimeError(f"{run.name} left no result in {folder / run.folder}")
    return result.scores


def _collect(folder: Path, all_runs: list[PlannedRun]) -> list[RunRecord]:
    """Write the results of the finished runs to results.jsonl, and return them."""
    results = [run.result(folder) for run in all_runs]
    finished = [result for result in results if result is not None]
    write_records(folder / "results.jsonl", finished)
    return finished


def _keep_models(recipe: Recipe, folder: Path, all_runs: list[PlannedRun]) -> None:
    """With `keep_models: best`, only the run with the highest mean accuracy keeps its model."""
    best = None
    if recipe.keep_models == "best":
        best = max(all_runs, key=lambda run: _scores(folder, run).mean)
    # With `none` a run leaves its model behind only if it was killed at its very end.
    _remove_models(recipe, folder, [run for run in all_runs if run is not best])


def _remove_models(recipe: Recipe, folder: Path, all_runs: list[PlannedRun]) -> None:
    """Remove the models of runs, unless all models are to be kept."""
    if recipe.keep_models == "all":
        return
    for run in all_runs:
        shutil.rmtree(folder / run.folder / MODEL, ignore_errors=True)
