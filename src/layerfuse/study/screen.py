"""Judge many selections of layers by one trained teacher, without training them.

For each arm the last Linear of its projector is fitted to the teacher's visual tokens; its other
weights stay as they are initialised and calibrated. Then the teacher's LLM answers questions by the
arm's tokens.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from layerfuse.data.feature_store import digests_of
from layerfuse.data.sample_sets import SampleSets, label_of_validation
from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.clusters import clusters_of
from layerfuse.evaluate.score_table import Bootstrap
from layerfuse.files import locked, write_text
from layerfuse.model.config import FusionConfig, shapes
from layerfuse.progress import Progress, shown_progress
from layerfuse.recipe.arms import Arm
from layerfuse.recipe.reader import load_recipe
from layerfuse.recipe.schema import Recipe
from layerfuse.study.budgets import refuse_auto_steps
from layerfuse.study.check import check_arms, leave_out, load_checked
from layerfuse.study.data_sizes import refuse_data_sizes
from layerfuse.study.encode import encode_pictures, pictures_of
from layerfuse.study.execute import ENVIRONMENT
from layerfuse.study.lesson import HELD_OUT, Lesson, ScreenData, config_like
from layerfuse.study.plan import PlannedRun, runs
from layerfuse.study.screen_report import (
    ScreenedRun,
    Screening,
    correlation_with_training,
    print_screening,
    screened_arms,
    trained_accuracies,
    write_screening,
)
from layerfuse.study.surroundings import environment, recipe_text
from layerfuse.study.teacher import (
    ChosenTeacher,
    TrainedTeacher,
    choose_teacher,
    trained_teachers,
)
from layerfuse.train.refit import why_not_fitted
from layerfuse.vision.picture import Picture

LIMIT = 2000
"""Training pictures whose tokens are fitted, if there are more."""


@dataclass(frozen=True)
class JudgedArms:
    """Which arms a fit can judge.

    Attributes:
        arms: those that it can.
        left_out: why it cannot judge the others, by arm.
    """

    arms: list[Arm]
    left_out: dict[str, str]


def screen(
    recipe_path: str | Path,
    overrides: tuple[str, ...] = (),
    *,
    teacher: str | None = None,
    study: Path | None = None,
    limit: int = LIMIT,
    output: Path | None = None,
    modules: Sequence[str] = (),
    console: Console | None = None,
) -> Path:
    """Train one arm of a recipe, and judge the others by it in seconds each.

    What is finished in the folder is not done again.

    Args:
        recipe_path: the recipe's file.
        overrides: `key.sub=value`.
        teacher: an arm of the recipe, or the folder of a trained model. None takes the arm that
            reads the most layers.
        study: a study of this recipe, whose trained teacher is used and whose results are compared.
            Default: `runs/<name>`.
        limit: training pictures whose tokens are fitted, at most.
        output: folder of the screening. Default: `screen` in the study's.
        modules: what processes of their own must import for user strategies.
        console: where to print; the terminal by default.

    Returns:
        The file that was written.

    Raises:
        LayerfuseError: the recipe has `data_sizes` or `steps: auto` or trains its encoder, no arm
            can teach or be judged, the teacher is of another encoder, LLM or token grid; or for
            anything in the recipe, the data or the models that does not fit.
    """
    recipe = load_recipe(recipe_path, overrides)
    refuse_data_sizes(recipe, "screen")
    refuse_auto_steps(recipe, "screen")
    _refuse_trained_encoder(recipe)
    console = console or Console()
    # Loading reports and bars of every model would tear the progress apart.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    study = study or Path("runs") / recipe.name
    folder = output or study / "screen"
    configs = check_arms(recipe)
    chosen = choose_teacher(recipe, configs, teacher)
    recipe = _with_seeds_of(recipe, chosen)
    # Before the folder is made: what is refused leaves nothing behind.
    with shown_progress(console) as progress:
        data = _prepare(recipe, chosen, limit, progress)
    judged = _judged_arms(data, chosen, configs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LayerfuseError(f"cannot make the folder {folder}: {error}") from error
    with locked(folder / ".lock", _refuse):
        screening = _screen_locked(
            data,
            chosen,
            configs,
            judged=judged,
            study=study,
            folder=folder,
            modules=modules,
            console=console,
        )
        file = write_screening(screening, folder)
    print_screening(screening, console)
    return file


def _screen_locked(
    data: ScreenData,
    chosen: ChosenTeacher,
    configs: Sequence[FusionConfig],
    *,
    judged: JudgedArms,
    study: Path,
    folder: Path,
    modules: Sequence[str],
    console: Console,
) -> Screening:
    """Train what is missing of the teacher, fit and ask what is missing of the arms, in a folder
    that no other process writes to."""
    recipe = data.recipe
    write_text(folder / "recipe.yaml", recipe_text(recipe))
    write_text(folder / ENVIRONMENT, json.dumps(environment(recipe, data.digest), indent=1))
    all_runs = runs(recipe, data.digest)
    teacher_runs = _runs_of_teacher(all_runs, chosen)
    teachers = trained_teachers(
        recipe,
        chosen,
        teacher_runs,
        study=study,
        folder=folder / "teacher",
        modules=modules,
        console=console,
    )
    taught = []
    fitted = []
    with shown_progress(console) as progress:
        for trained, run in zip(teachers, teacher_runs, strict=True):
            lesson = Lesson(data, chosen, trained, folder)
            taught.append(lesson.of_teacher(run, progress))
            fitted.extend(lesson.of_arms(_runs_of(all_runs, judged.arms, trained), progress))
    return _screening(
        data,
        chosen,
        configs,
        judged=judged,
        taught=taught,
        fitted=fitted,
        study=study,
    )


def _refuse() -> None:
    raise LayerfuseError("another process is screening in this folder")


def _refuse_trained_encoder(recipe: Recipe) -> None:
    """Raise LayerfuseError for a recipe whose arms have encoders of their own after training."""
    for name, stage in recipe.stages.items():
        if "vision" in stage.learning_rates:
            raise LayerfuseError(
                f"stage {name!r} trains vision: a teacher's encoder would be another than that of "
                "an arm which is not trained. Screening needs a frozen encoder: leave vision out "
                f"of stages.{name}.learning_rates"
            )


def _with_seeds_of(recipe: Recipe, teacher: ChosenTeacher) -> Recipe:
    """The recipe with the teacher's seeds for every arm."""
    seeds = teacher.arm.seeds or recipe.all_seeds
    # A study trains no fewer than these, and more of them only where it must.
    if recipe.seed_rule is not None:
        seeds = seeds[: recipe.seed_rule.first]
    arms = [arm.model_copy(update={"seeds": seeds}) for arm in recipe.all_arms()]
    return recipe.model_copy(
        update={"arms": arms, "grid": None, "seeds": seeds, "auto_seeds": None}
    )


def _prepare(recipe: Recipe, teacher: ChosenTeacher, limit: int, progress: Progress) -> ScreenData:
    """Load the samples and encode their pictures, as a study does."""
    checked = load_checked(recipe, progress)
    everything = checked.usable
    digests = digests_of(pictures_of(everything.by_label().values()), progress)
    arms = list(recipe.arms)
    if teacher.model is not None:
        arms.append(teacher.arm)
    stages = {}
    for name, stage in recipe.stages.items():
        # Fitted are whole pictures, also where a stage cuts random parts out of them.
        stages[name] = stage.model_copy(update={"random_crop": None})
    cached = recipe.model_copy(update={"cache_features": True, "arms": arms, "stages": stages})
    store, unreadable = encode_pictures(cached, everything, digests, progress)
    if store is None:
        raise RuntimeError("the features of a frozen encoder were not cached")
    samples = leave_out(recipe, everything, unreadable)
    questions = samples.validation
    asked = label_of_validation(samples.train)
    if questions is None:
        questions = samples.test
        asked = samples.test_label
    return ScreenData(
        recipe=recipe,
        samples=samples,
        digest=everything.digest(digests),
        store=store,
        pictures=_training_pictures(samples, digests, limit),
        questions=questions,
        asked=asked,
    )


def _training_pictures(samples: SampleSets, digests: dict[str, str], limit: int) -> list[Picture]:
    """The first different pictures of all stages.

    Raises:
        LayerfuseError: there are too few to hold any out.
    """
    # By the bytes: a stage may show the pictures of another one.
    pictures: dict[str, Picture] = {}
    for picture in pictures_of(samples.train.values()):
        if len(pictures) == limit:
            break
        pictures.setdefault(digests[picture.name], picture)
    if len(pictures) < HELD_OUT:
        raise LayerfuseError(
            f"screening fits the tokens of training pictures, and needs at least {HELD_OUT} of "
            f"them; there are {len(pictures)}"
        )
    return list(pictures.values())


def _judged_arms(
    data: ScreenData, teacher: ChosenTeacher, configs: Sequence[FusionConfig]
) -> JudgedArms:
    """Divide the arms, before anything is trained.

    Raises:
        LayerfuseError: no arm is left.
    """
    of_teacher = config_like(data.recipe, teacher.arm, configs[0])
    tokens = of_teacher.image_tokens.of_grid(data.store.grid)
    arms = []
    left_out = {}
    for arm, config in zip(data.recipe.arms, configs, strict=True):
        # As it is before training, without an LLM.
        fusion = config.strategy.build(
            shapes(config.selection, config.vision_config, config.text_config)
        )
        fusion.reset_parameters()
        features = data.store.restrict(config.taps).features(data.pictures[:1])
        reason = why_not_fitted(fusion, features.to(dtype=torch.float32), tokens)
        if reason is None:
            arms.append(arm)
        else:
            left_out[arm.label] = reason
    if not arms:
        reasons = "; ".join(f"{arm}: {reason}" for arm, reason in left_out.items())
        raise LayerfuseError(f"no arm of the recipe can be judged by a teacher: {reasons}")
    return JudgedArms(arms, left_out)


def _runs_of_teacher(all_runs: Sequence[PlannedRun], teacher: ChosenTeacher) -> list[PlannedRun]:
    """The runs of the teacher's arm; for a model that the user gave, those of any arm, of which
    only the seeds count."""
    label = teacher.arm.label
    if teacher.model is not None:
        label = all_runs[0].arm.label
    return [run for run in all_runs if run.arm.label == label]


def _runs_of(
    all_runs: Sequence[PlannedRun], arms: Sequence[Arm], teacher: TrainedTeacher
) -> list[PlannedRun]:
    """The runs of some arms that have the seed of a teacher."""
    labels = [arm.label for arm in arms]
    return [run for run in all_runs if run.seed == teacher.seed and run.arm.label in labels]


def _screening(
    data: ScreenData,
    chosen: ChosenTeacher,
    configs: Sequence[FusionConfig],
    *,
    judged: JudgedArms,
    taught: Sequence[ScreenedRun],
    fitted: Sequence[ScreenedRun],
    study: Path,
) -> Screening:
    """All that was found."""
    recipe = data.recipe
    by_name = {}
    for arm, config in zip(recipe.arms, configs, strict=True):
        by_name[arm.label] = config
    trained = trained_accuracies(study, by_name)
    bootstrap = Bootstrap(recipe.statistics.resamples, recipe.statistics.seed)
    of_teacher = {chosen.name: config_like(recipe, chosen.arm, configs[0])}
    (teacher,) = screened_arms(taught, of_teacher, trained, bootstrap)
    arms = screened_arms(fitted, by_name, trained, bootstrap)
    compared = None
    if any(arm.trained is not None for arm in arms):
        compared = str(study)
    return Screening(
        recipe=recipe.name,
        teacher=teacher,
        asked=data.asked,
        questions=len(taught[0].answers),
        pictures=len(set(clusters_of(taught[0].answers))),
        fitted_pictures=len(data.pictures),
        resamples=recipe.statistics.resamples,
        arms=arms,
        left_out=judged.left_out,
        study=compared,
        correlation=correlation_with_training(arms, teacher),
    )
