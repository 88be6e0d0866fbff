"""Fit arms to one trained teacher and ask them, by the teacher's LLM."""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from layerfuse.data.feature_store import FeatureStore
from layerfuse.data.lazy_records import Samples
from layerfuse.data.sample_sets import SampleSets
from layerfuse.data.subset import draw_subsets
from layerfuse.evaluate.answer import Answerer
from layerfuse.evaluate.predict import predict
from layerfuse.evaluate.records import PREDICTIONS, AnswerRecord, read_records, write_records
from layerfuse.hardware import DTYPES, device
from layerfuse.model.config import FusionConfig, configure
from layerfuse.model.vlm import FusionVLM
from layerfuse.progress import Progress
from layerfuse.recipe.arms import Arm
from layerfuse.recipe.schema import Recipe
from layerfuse.study.plan import PlannedRun
from layerfuse.study.screen_report import ArmFit, ScreenedRun
from layerfuse.study.teacher import ChosenTeacher, TrainedTeacher, load_teacher
from layerfuse.train.arm import calibrate
from layerfuse.train.refit import LastLinear
from layerfuse.train.ridge import RegressionSums, RidgeFit, fit_ridge
from layerfuse.vision.encoder import Encoder, load_tower
from layerfuse.vision.picture import Picture

FIT = "fit.json"
"""How an arm was fitted, in its folder."""
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


def config_like(recipe: Recipe, arm: Arm, like: FusionConfig) -> FusionConfig:
    """The configuration of an arm with the encoder, the LLM and the image token of another model.

    Args:
        recipe: of the study.
        arm: its layers and its strategy.
        like: of the other model.
    """
    return configure(
        like.vision_config,
        like.text_config,
        arm.layers,
        arm.fusion,
        token_grid=recipe.token_grid,
        image_token_id=like.image_token_id,
    )


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
        # As a run of this seed measures its constants.
        drawn = draw_subsets(self.data.samples.train, self.data.recipe.subsets, run.seed)
        first_stage = next(iter(drawn.values()))
        calibrate(model, teacher.processor, first_stage, store)
        last = LastLinear.of(model.fusion)
        if last is None:
            raise RuntimeError(f"{run.name} has no last Linear")
        fit = fit_to_teacher(
            model,
            last,
            teacher,
            self.data,
            name=run.name,
            progress=progress,
        )
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
    config = config_like(recipe, run.arm, teacher.model.config)
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
    *,
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
