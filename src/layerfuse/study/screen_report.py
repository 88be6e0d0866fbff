"""What a screening found, as typed values, as a file, and as a table in the terminal."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.averages import scores
from layerfuse.evaluate.records import AnswerRecord, RunRecord, read_records
from layerfuse.evaluate.score_table import Bootstrap, ScoreTable, TestedModel, family_of
from layerfuse.evaluate.significance import arm_score
from layerfuse.files import write_text
from layerfuse.look.recommendation import Correlation
from layerfuse.look.validation import MINIMUM, rank_correlation
from layerfuse.model.config import FusionConfig
from layerfuse.tables import Heading, print_fitted

SCREEN = "screen.json"
RESULTS = "results.jsonl"
"""Of a study: a line for each finished run."""


@dataclass(frozen=True)
class ArmFit:
    """How one arm was fitted to a teacher: the content of fit.json.

    Attributes:
        r2: share of the variance of the teacher's tokens that the arm explains on held-out training
            pictures.
        strength: of the ridge, as a multiple of the mean eigenvalue.
        seconds: of the fit.
    """

    r2: float
    strength: float
    seconds: float

    @classmethod
    def read(cls, file: Path) -> "ArmFit":
        """Read what `write` wrote.

        Args:
            file: fit.json of an arm and seed.

        Raises:
            LayerfuseError: the file is damaged.
        """
        try:
            return cls(**json.loads(file.read_text("utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise LayerfuseError(f"cannot read {file}: {error}; delete its folder") from error

    def write(self, file: Path) -> None:
        """Write the file, whole or not at all.

        Args:
            file: is replaced if it exists.
        """
        write_text(file, json.dumps(asdict(self)))


@dataclass(frozen=True)
class ScreenedRun:
    """One arm that was fitted to the teacher of one seed, and asked.

    Attributes:
        arm: the arm's name.
        seed: of its initialisation and of the teacher.
        fit: how well it was fitted; None for the teacher as it was trained.
        answers: in the order of the questions.
    """

    arm: str
    seed: int
    fit: ArmFit | None
    answers: list[AnswerRecord]


@dataclass(frozen=True)
class ScreenedArm:
    """What a screening says of one arm.

    Attributes:
        arm: its name.
        layers: the selected layers.
        fusion: the strategy's name and options.
        uniform: whether it is a guided strategy, judged with equal weights for all layers.
        accuracy: mean over the seeds, 0..1, each family of questions counting the same.
        interval: 95 % interval [low, high] over pictures and seeds, over pictures alone with one
            seed; None with a single picture.
        by_seed: accuracy by seed.
        r2: mean over the seeds of the share of the teacher's tokens that it explains on held-out
            training pictures; None for the teacher.
        strengths: of the ridge, by seed.
        seconds: of the fits, mean over the seeds; None for the teacher.
        trained: mean accuracy over the runs of a finished study; None where there is none.
    """

    arm: str
    layers: list[int]
    fusion: dict[str, Any]
    uniform: bool
    accuracy: float
    interval: list[float] | None
    by_seed: dict[int, float]
    r2: float | None
    strengths: dict[int, float]
    seconds: float | None
    trained: float | None


@dataclass(frozen=True)
class Screening:
    """The content of screen.json.

    Attributes:
        recipe: its name.
        teacher: the trained teacher itself.
        asked: what was asked: `validation`, or `evaluate` where there is none.
        questions: their number.
        pictures: number of different pictures that they are about.
        fitted_pictures: number of training pictures whose tokens were fitted.
        resamples: of the intervals, over pictures.
        arms: what could be judged, the best first.
        left_out: why the others could not be judged, by arm.
        study: whose runs are compared; None where no arm was trained.
        correlation: Spearman's, of the accuracy of the screening with that of training, over the
            arms but the teacher's own; None with fewer than four.
    """

    recipe: str
    teacher: ScreenedArm
    asked: str
    questions: int
    pictures: int
    fitted_pictures: int
    resamples: int
    arms: list[ScreenedArm]
    left_out: dict[str, str]
    study: str | None
    correlation: Correlation | None


def trained_accuracies(study: Path, configs: Mapping[str, FusionConfig]) -> dict[str, float]:
    """What a study's finished runs scored.

    Args:
        study: its folder, which need not exist.
        configs: of the arms by name. Runs of an arm with other layers or options do not count.

    Returns:
        Mean accuracy over the seeds, by arm.

    Raises:
        LayerfuseError: the file of the results is damaged.
    """
    if not (study / RESULTS).is_file():
        return {}
    accuracies: dict[str, list[float]] = {}
    for record in read_records(study / RESULTS, RunRecord):
        config = configs.get(record.arm)
        if config is None or record.layers != config.vision_layers:
            continue
        # As JSON, which has lists where options may be tuples.
        if json.dumps(record.fusion) == json.dumps(config.fusion):
            accuracies.setdefault(record.arm, []).append(record.scores.mean)
    return {arm: float(np.mean(of_arm)) for arm, of_arm in accuracies.items()}


def screened_arms(
    runs: Sequence[ScreenedRun],
    configs: Mapping[str, FusionConfig],
    trained: Mapping[str, float],
    bootstrap: Bootstrap,
) -> list[ScreenedArm]:
    """Score arms that answered the same questions.

    Args:
        runs: of all arms and seeds, each with its answers in the same order.
        configs: of the arms by name.
        trained: accuracy after training, by arm.
        bootstrap: how pictures are redrawn.

    Returns:
        The arms, the best first.
    """
    models = [TestedModel(run.arm, run.seed, run.answers) for run in runs]
    table = ScoreTable.from_models(models, bootstrap, family_of)
    arms = []
    for place, name in enumerate(table.arms):
        score = arm_score(table.mean, place)
        interval = None
        # One picture says nothing of others.
        if table.images > 1:
            interval = score.interval
        of_arm = [run for run in runs if run.arm == name]
        arms.append(
            _screened_arm(
                of_arm,
                configs[name],
                accuracy=score.score,
                interval=interval,
                trained=trained.get(name),
            )
        )
    return sorted(arms, key=attrgetter("accuracy"), reverse=True)


def _screened_arm(
    runs: Sequence[ScreenedRun],
    config: FusionConfig,
    *,
    accuracy: float,
    interval: list[float] | None,
    trained: float | None,
) -> ScreenedArm:
    """One arm from its runs."""
    by_seed = {}
    strengths = {}
    r2 = []
    seconds = []
    for run in runs:
        by_seed[run.seed] = scores(run.answers).mean
        if run.fit is not None:
            strengths[run.seed] = run.fit.strength
            r2.append(run.fit.r2)
            seconds.append(run.fit.seconds)
    fusion: dict[str, Any] = config.fusion or {}
    return ScreenedArm(
        arm=runs[0].arm,
        layers=config.vision_layers,
        fusion=fusion,
        uniform=config.strategy.module.reads != "nothing",
        accuracy=accuracy,
        interval=interval,
        by_seed=by_seed,
        r2=_mean(r2),
        strengths=strengths,
        seconds=_mean(seconds),
        trained=trained,
    )


def _mean(values: Sequence[float]) -> float | None:
    """The mean, None of nothing."""
    if not values:
        return None
    return float(np.mean(values))


def correlation_with_training(
    arms: Sequence[ScreenedArm], teacher: ScreenedArm
) -> Correlation | None:
    """How well the screening ranks what was trained.

    Args:
        arms: that were judged.
        teacher: the teacher. An arm of its layers and strategy is left out, whatever its name: it
            is fitted to tokens that its own layers made.

    Returns:
        Spearman's correlation; None with fewer than four arms that were screened and trained.
    """
    screened = []
    trained = []
    for arm in arms:
        is_teacher = arm.layers == teacher.layers and arm.fusion == teacher.fusion
        if arm.trained is not None and not is_teacher:
            screened.append(arm.accuracy)
            trained.append(arm.trained)
    return rank_correlation(screened, trained)


def write_screening(screening: Screening, folder: Path) -> Path:
    """Write screen.json.

    Args:
        screening: what was found.
        folder: of the screening.

    Returns:
        The file.
    """
    file = folder / SCREEN
    write_text(file, json.dumps(asdict(screening), indent=1) + "\n")
    return file


def print_screening(screening: Screening, console: Console) -> None:
    """Print a row for every arm that was judged, the teacher, and what the table cannot say.

    Args:
        screening: what was found.
        console: where to print.
    """
    headings = [
        Heading("arm"),
        Heading("accuracy", is_number=True),
        Heading("95 % interval", is_number=True),
        Heading("R²", is_number=True),
        Heading("seconds", is_number=True),
    ]
    any_trained = any(arm.trained is not None for arm in screening.arms)
    if any_trained:
        headings.append(Heading("trained", is_number=True))
    rows = []
    for arm in [screening.teacher, *screening.arms]:
        name = arm.arm
        if arm is screening.teacher:
            name += " (teacher)"
        if arm.uniform:
            name += " (equal weights)"
        cells = [name, *_cells(arm)]
        if any_trained:
            cells.append(_percent(arm.trained))
        rows.append(cells)
    seeds = ", ".join(str(seed) for seed in screening.teacher.by_seed)
    title = (
        f"fitted to the teacher's tokens, seeds {seeds}; {screening.questions} questions of "
        f"{screening.asked} about {screening.pictures} pictures"
    )
    print_fitted(console, headings, rows, title)
    for name, reason in screening.left_out.items():
        console.print(f"{name} is not judged: {reason}", soft_wrap=True, markup=False)
    _print_correlation(screening, console)


def _cells(arm: ScreenedArm) -> list[str]:
    """An arm's accuracy, interval, R² and seconds."""
    interval = "one picture"
    if arm.interval is not None:
        low, high = arm.interval
        interval = f"{100 * low:.1f} to {100 * high:.1f}"
    # What was trained was not fitted.
    r2 = "-"
    if arm.r2 is not None:
        r2 = f"{arm.r2:.3f}"
    seconds = "-"
    if arm.seconds is not None:
        seconds = f"{arm.seconds:.1f}"
    return [_percent(arm.accuracy), interval, r2, seconds]


def _percent(share: float | None) -> str:
    if share is None:
        return "-"
    return f"{100 * share:.1f} %"


def _print_correlation(screening: Screening, console: Console) -> None:
    """Say how well the screening ranks what a study trained."""
    if screening.study is None:
        return
    correlation = screening.correlation
    if correlation is None:
        console.print(
            f"rank correlation with training in {screening.study}: needs at least {MINIMUM} arms "
            "beside the teacher's that were screened and trained, with different scores",
            soft_wrap=True,
            markup=False,
        )
        return
    low, high = correlation.interval
    console.print(
        f"rank correlation with training in {screening.study}: {correlation.rho:.2f} "
        f"({low:.2f} to {high:.2f}), {correlation.n} arms without the teacher's",
        soft_wrap=True,
        markup=False,
    )
