"""Judge many selections of layers by one trained teacher, without training them.

For each arm the last Linear of its projector is fitted to the teacher's visual tokens; its other
weights stay as they are initialised and calibrated. Then the teacher's LLM answers questions by the
arm's tokens.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from layerfuse.data.feature_store import FeatureStore, digests_of
from layerfuse.data.lazy_records import Samples
from layerfuse.data.sample_sets import SampleSets, label_of_validation
from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.answer import Answerer
from layerfuse.evaluate.clusters import clusters_of
from layerfuse.evaluate.predict import predict
from layerfuse.evaluate.records import PREDICTIONS, AnswerRecord, read_records, write_records
from layerfuse.evaluate.score_table import Bootstrap
from layerfuse.files import locked, write_text
from layerfuse.hardware import DTYPES, device
from layerfuse.model.config import FusionConfig, configure, shapes
from layerfuse.model.vlm import FusionVLM
from layerfuse.progress import Progress, shown_progress
from layerfuse.recipe.reader import load_recipe
from layerfuse.recipe.schema import Arm, Recipe
from layerfuse.study.check import check_arms, leave_out, load_checked
from layerfuse.study.coordinate import environment, recipe_text
from layerfuse.study.encode import encode_pictures, pictures_of
from layerfuse.study.execute import ENVIRONMENT
from layerfuse.study.plan import PlannedRun, runs
from layerfuse.study.screen_report import (
    ArmFit,
    ScreenedRun,
    Screening,
    correlation_with_training,
    print_screening,
    screened_arms,
    trained_accuracies,
    write_screening,
)
from layerfuse.study.teacher import (
    ChosenTeacher,
    TrainedTeacher,
    choose_teacher,
    load_teacher,
    trained_teachers,
)
from layerfuse.train.arm import calibrate
from layerfuse.train.refit import LastLinear, why_not_fitted
from layerfuse.train.ridge import RegressionSums, RidgeFit, fit_ridge
from layerfuse.vision.encoder import Encoder, load_tower
from layerfuse.vision.picture import Picture

FIT = "fit.json"
"""How an arm was fitted, in its folder."""
LIMIT = 2000
"""Training pictures whose tokens are fitted, if there are more."""
BATCH = 40
"""Pictures whose tokens are fitted at once."""
HELD_OUT = 5
"""One of so many pictures is held out to choose the strength of the ridge."""


@dataclass(frozen=True)
class ScreenData:
    """What the arms of a screening are fitted to and asked.

    Attributes:
        recipe: of the study, its arms with the teacher's seeds.
        samples: without the bad ones.
        digest: of the samples, as the study's runs are named by it.
        store: the features of all pictures, with the layers of all arms and of the teacher.
        pictures: the different training pictures that are fitted.
        questions: the samples that are asked.
        asked: how tables call them.
    """

    recipe: Recipe
    samples: SampleSets
    digest: str
    store: FeatureStore
    pictures: list[Picture]
    questions: Samples
    asked: str


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
        LayerfuseError: the recipe trains its encoder, no arm can teach or be judged, the teacher is
            of another encoder, LLM or token grid; or for anything in the recipe, the data or the
            models that does not fit.
    """
    recipe = load_recipe(recipe_path, overrides)
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
    seeds = teacher.arm.seeds or recipe.seeds
    arms = [arm.model_copy(update={"seeds": seeds}) for arm in recipe.all_arms()]
    return recipe.model_copy(update={"arms": arms, "grid": None, "seeds": seeds})


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
    of_teacher = _config(data.recipe, teacher.arm, configs[0])
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


def _config(recipe: Recipe, arm: Arm, like: FusionConfig) -> FusionConfig:
    """The configuration of an arm with the encoder, the LLM and the image token of another."""
    return configure(
        like.vision_config,
        like.text_config,
        arm.layers,
        arm.fusion,
        token_grid=recipe.token_grid,
        image_token_id=like.image_token_id,
    )


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


class Lesson:
    """Fits arms to one trained teacher, and asks them; what is finished is read.

    Args:
        data: what is fitted and asked.
        chosen: who teaches.
        trained: its model.
        folder: of the screening.
    """

    def __init__(
        self, data: ScreenData, chosen: ChosenTeacher, trained: TrainedTeacher, folder: Path
    ) -> None:
        self.data = data
        self.chosen = chosen
        self.trained = trained
        self.folder = folder

    @cached_property
    def teacher(self) -> Answerer:
        """The teacher, loaded when it is first needed."""
        loaded = load_teacher(self.data.recipe, self.trained)
        return Answerer(loaded.model, loaded.processor, self.data.store)

    def of_teacher(self, run: PlannedRun, progress: Progress) -> ScreenedRun:
        """What the teacher answers itself.

        Args:
            run: of the study, whose key says what is asked and how.
            progress: is told of the questions.
        """
        place = f"teacher.seed{run.seed}.{self._key(run)}"
        file = self.folder / "arms" / place / PREDICTIONS
        name = self.chosen.name
        if file.is_file():
            answers = read_records(file, AnswerRecord)
        else:
            answers = self._ask(self.teacher, name, progress)
            write_records(file, answers)
        return ScreenedRun(name, self.trained.seed, None, answers)

    def of_arms(self, arm_runs: Sequence[PlannedRun], progress: Progress) -> list[ScreenedRun]:
        """Fit and ask arms.

        Args:
            arm_runs: each with the teacher's seed.
            progress: is told of the pictures and of the questions.
        """
        screened = []
        for run in arm_runs:
            folder = self.folder / f"{run.folder}.{self._key(run)}"
            # The last file that the folder gets.
            if not (folder / PREDICTIONS).is_file():
                self._fit_and_ask(run, folder, progress)
            answers = read_records(folder / PREDICTIONS, AnswerRecord)
            fit = ArmFit.read(folder / FIT)
            screened.append(ScreenedRun(run.arm.label, run.seed, fit, answers))
        return screened

    def _key(self, run: PlannedRun) -> str:
        """A digest of all that decides what is answered: the run, with its samples and questions,
        the teacher's weights, and the pictures whose tokens are fitted."""
        decisive = f"{run.key} {self.trained.digest} {len(self.data.pictures)}"
        return hashlib.sha256(decisive.encode()).hexdigest()[:8]

    def _fit_and_ask(self, run: PlannedRun, folder: Path, progress: Progress) -> None:
        started = time.perf_counter()
        teacher = self.teacher
        model = untrained_model(self.data.recipe, run, teacher)
        store = self.data.store.restrict(model.vision_tower.layers)
        first_stage = next(iter(self.data.samples.train.values()))
        calibrate(model, teacher.processor, first_stage, store)
        last = LastLinear.of(model.fusion)
        if last is None:
            raise RuntimeError(f"{run.name} has no last Linear")
        fit = fit_to_teacher(model, last, teacher, self.data, run.name, progress)
        last.set(fit)
        seconds = time.perf_counter() - started
        ArmFit(fit.r2, fit.strength, round(seconds, 2)).write(folder / FIT)
        # The prompts are the teacher's: it makes as many tokens of a picture.
        answerer = Answerer(model, teacher.processor, self.data.store)
        write_records(folder / PREDICTIONS, self._ask(answerer, run.name, progress))

    def _ask(self, answerer: Answerer, name: str, progress: Progress) -> list[AnswerRecord]:
        def asked(phase: str, done: int, total: int, note: str = "") -> None:
            progress(f"{name}: questions", done, total, note)

        # A router or an allocator that was not trained would weigh at random.
        without_controls = self.data.recipe.evaluate.model_copy(update={"controls": ()})
        return predict(
            answerer,
            self.data.questions,
            without_controls,
            asked,
            guidance="uniform",
        )


def untrained_model(recipe: Recipe, run: PlannedRun, teacher: Answerer) -> FusionVLM:
    """An arm as it is initialised, with the teacher's LLM.

    Args:
        recipe: of the study.
        run: the arm, and the seed of its initialisation.
        teacher: whose LLM is shared.

    Returns:
        The model in evaluation mode, on this process's device; not calibrated.
    """
    config = _config(recipe, run.arm, teacher.model.config)
    tower = load_tower(recipe.encoder.model, config.vision_config, DTYPES[recipe.dtype])
    encoder = Encoder(tower, config.taps, recipe.token_grid)
    set_seed(run.seed)
    # transformers types `to` for its own classes only
    model: Any = FusionVLM(config, encoder, teacher.model.language_model)
    return model.to(device()).eval()


@torch.no_grad()
def fit_to_teacher(
    model: FusionVLM,
    last: LastLinear,
    teacher: Answerer,
    data: ScreenData,
    name: str,
    progress: Progress,
) -> RidgeFit:
    """Fit an arm's last Linear to the teacher's tokens of the training pictures.

    Args:
        model: the arm, calibrated.
        last: its last Linear.
        teacher: the trained model.
        data: the pictures and their features.
        name: of the arm, for the progress.
        progress: is told of the pictures.

    Returns:
        The fit; the arm itself is left as it is.
    """
    store = data.store.restrict(model.vision_tower.layers)
    of_teacher = data.store.restrict(teacher.model.vision_tower.layers)
    fitted: RegressionSums | None = None
    held_out: RegressionSums | None = None
    for start in range(0, len(data.pictures), BATCH):
        batch = data.pictures[start : start + BATCH]
        targets = teacher.model.fuse(of_teacher.features(batch), guidance="uniform").tokens
        features = store.features(batch).to(device=model.device, dtype=model.fusion_dtype)
        inputs = last.watch(model.fusion, features).inputs
        # Every fifth picture, with all its tokens: the places of a picture are alike.
        place = torch.arange(start, start + len(batch), device=inputs.device)
        chooses = place % HELD_OUT == HELD_OUT - 1
        fitted = _with_tokens(fitted, inputs[~chooses], targets[~chooses])
        held_out = _with_tokens(held_out, inputs[chooses], targets[chooses])
        progress(f"{name}: fitting", start + len(batch), len(data.pictures))
    if fitted is None or held_out is None:
        raise RuntimeError(f"{len(data.pictures)} pictures are too few to hold some out")
    return fit_ridge(fitted, held_out)


def _with_tokens(
    sums: RegressionSums | None, inputs: torch.Tensor, targets: torch.Tensor
) -> RegressionSums | None:
    """Sums with the tokens (B, N, ·) of some more pictures, of which there may be none."""
    if len(inputs) == 0:
        return sums
    more = RegressionSums.of(inputs, targets)
    if sums is None:
        return more
    return sums.joined(more)


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
    of_teacher = {chosen.name: _config(recipe, chosen.arm, configs[0])}
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
        correlation=correlation_with_training(arms, chosen.name),
    )
