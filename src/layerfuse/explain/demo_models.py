"""The models of the web page: loaded once, called by the names of their arms."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers.utils import logging as transformers_logging

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.answer import Answerer, load_answerer
from layerfuse.progress import Progress, silent

MOST_MODELS = 4
"""that stand side by side"""
_RUN = re.compile(r"(?P<arm>.+)\.seed(?P<seed>\d+)\.[0-9a-f]{8}")
"""the folder of a run: `<arm>.seed<seed>.<hash>`"""


@dataclass(frozen=True)
class DemoModel:
    """A model that answers on the page.

    Attributes:
        name: how the page calls it; never a path.
        answerer: the model.
    """

    name: str
    answerer: Answerer


def load_models(folders: Sequence[Path], progress: Progress = silent) -> list[DemoModel]:
    """Load the models of a page.

    Args:
        folders: of trained models, one to four.
        progress: told of every model.

    Returns:
        The models, whose names differ.

    Raises:
        LayerfuseError: there are more than four, or a folder holds no model.
    """
    if not 1 <= len(folders) <= MOST_MODELS:
        raise LayerfuseError(
            f"{len(folders)} models: the page shows one to {MOST_MODELS} side by side"
        )
    # One bar for each model's weights would cover that of the models.
    transformers_logging.disable_progress_bar()
    models = []
    for name, folder in zip(model_names(folders), folders, strict=True):
        progress("load", len(models), len(folders), name)
        models.append(DemoModel(name, load_answerer(folder)))
    progress("load", len(models), len(folders))
    return models


def model_names(folders: Sequence[Path]) -> list[str]:
    """Call models by the arms that trained them.

    Args:
        folders: such as `runs/<study>/arms/<arm>/model`; others are called by their own names.

    Returns:
        A name each, no two alike: seeds are named where arms are alike, then numbers.
    """
    runs = [_run_folder(folder).name for folder in folders]
    arms = []
    with_seeds = []
    for run in runs:
        parts = _RUN.fullmatch(run)
        arms.append(parts["arm"] if parts else run)
        with_seeds.append(f"{parts['arm']} · seed {parts['seed']}" if parts else run)
    names = []
    for place, arm in enumerate(arms):
        name = arm
        if arms.count(arm) > 1:
            name = with_seeds[place]
        if with_seeds.count(name) > 1 or (name == arm and arms.count(arm) > 1):
            name = f"{name} ({place + 1})"
        names.append(name)
    return names


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
