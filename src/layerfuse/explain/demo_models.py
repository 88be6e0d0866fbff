"""The models of the web page: loaded once, called by the names of their arms."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers.utils import logging as transformers_logging

from layerfuse.data.scenes import FAMILIES
from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.answer import Answerer
from layerfuse.evaluate.load_answerer import load_answerer, model_settings
from layerfuse.evaluate.records import PREDICTIONS, AnswerRecord, read_records
from layerfuse.explain.demo_paths import without_paths
from layerfuse.progress import Progress, silent

MOST_MODELS = 4
"""that stand side by side"""
_RUN = re.compile(r"(?P<arm>.+)\.seed(?P<seed>\d+)\.[0-9a-f]{8}")
"""the folder of a run: `<arm>.seed<seed>.<hash>`"""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DemoModel:
    """A model that answers on the page.

    Attributes:
        name: how the page calls it; never a path.
        answerer: the model.
    """

    name: str
    answerer: Answerer


@dataclass(frozen=True)
class BrokenModel:
    """A model that could not be loaded, and has a column that says so.

    Attributes:
        name: as above.
        error: why not, for people.
    """

    name: str
    error: str


ShownModel = DemoModel | BrokenModel
"""what has a column on the page"""


def load_models(folders: Sequence[Path], progress: Progress = silent) -> list[ShownModel]:
    """Load the models of a page.

    Args:
        folders: of trained models, one to four.
        progress: told of every model.

    Returns:
        The models, whose names differ. One that is damaged has its error in place of itself.

    Raises:
        LayerfuseError: there are more than four, a folder holds no model, or none can be loaded.
    """
    if not 1 <= len(folders) <= MOST_MODELS:
        raise LayerfuseError(
            f"{len(folders)} models: the page shows one to {MOST_MODELS} side by side"
        )
    # One bar for each model's weights would cover that of the models.
    transformers_logging.disable_progress_bar()
    # All folders before the first is loaded, which may take minutes.
    for folder in folders:
        model_settings(folder)
    models: list[ShownModel] = []
    errors: list[LayerfuseError] = []
    for name, folder in zip(model_names(folders), folders, strict=True):
        progress("load", len(models), len(folders), name)
        try:
            models.append(DemoModel(name, load_answerer(folder)))
        except LayerfuseError as error:
            _log.warning("%s is not loaded: %s", name, error)
            errors.append(error)
            models.append(BrokenModel(name, without_paths(str(error))))
    if len(errors) == len(folders):
        raise errors[0]
    progress("load", len(models), len(folders))
    return models


def model_names(folders: Sequence[Path]) -> list[str]:
    """Call models by the arms that trained them.

    Args:
        folders: such as `runs/<study>/arms/<arm>/model`; others are called by their own names.

    Returns:
        A name each, no two alike: seeds are named where arms are alike, the study where seeds are
        alike too, then numbers.
    """
    arms = [_arm_of(folder) for folder in folders]
    seeded = [_seeded_arm_of(folder) for folder in folders]
    studied = [_of_study(folder, arm) for folder, arm in zip(folders, arms, strict=True)]
    complete = [_of_study(folder, name) for folder, name in zip(folders, seeded, strict=True)]
    names = []
    for place, numbered in enumerate(seeded):
        # Where nothing tells them apart, numbers do.
        name = f"{numbered} ({place + 1})"
        for way in (complete, studied, seeded, arms):
            if way.count(way[place]) == 1:
                name = way[place]
        names.append(name)
    return names


def _arm_of(folder: Path) -> str:
    """The arm of a model, or the name of its folder."""
    run = _run_folder(folder).name
    found = _RUN.fullmatch(run)
    return run if found is None else found["arm"]


def _seeded_arm_of(folder: Path) -> str:
    """The same with its seed, where it has one."""
    run = _run_folder(folder).name
    found = _RUN.fullmatch(run)
    return run if found is None else f"{found['arm']} · seed {found['seed']}"


def _of_study(folder: Path, name: str) -> str:
    """A name after that of the model's study, where it has one."""
    arms = _run_folder(folder).parent
    return f"{arms.parent.name}: {name}" if arms.name == "arms" else name


def trained_questions(folders: Sequence[Path]) -> dict[str, str]:
    """Find how the models of a page are used to be asked.

    Args:
        folders: of the models.

    Returns:
        The first test question of each family of scenes, from the first model whose study tested it
        on scenes; nothing where none did.
    """
    for folder in folders:
        answers = _run_folder(folder) / PREDICTIONS
        # A model that was copied elsewhere has none beside it.
        if not answers.is_file():
            continue
        asked: dict[str, str] = {}
        for record in read_records(answers, AnswerRecord):
            if record.family in FAMILIES:
                asked.setdefault(record.family, record.question)
        if asked:
            return asked
    return {}


def study_of(folders: Sequence[Path]) -> Path | None:
    """Find the study that trained all models of a page.

    Args:
        folders: of the models.

    Returns:
        The study's folder; None where they do not come from one study.
    """
    studies = set()
    for folder in folders:
        arms = _run_folder(folder).parent
        if arms.name != "arms":
            return None
        studies.add(arms.parent)
    if len(studies) != 1:
        return None
    return studies.pop()


def _run_folder(folder: Path) -> Path:
    """The folder that names a model: `model` inside a run's folder names nothing."""
    # Not resolved: a link's own name says more than what it points at.
    absolute = folder.absolute()
    if absolute.name == "model":
        return absolute.parent
    return absolute
