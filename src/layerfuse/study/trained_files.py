"""What a run has trained, on disk before the test begins: a stopped test costs the test alone."""

import json
from pathlib import Path

from layerfuse.evaluate.load_answerer import load_answerer
from layerfuse.files import write_text
from layerfuse.recipe.schema import Recipe
from layerfuse.train.arm import Trained
from layerfuse.train.stages import use_kernels

MODEL = "model"
"""The trained model's folder, in that of its run."""
STAGES = "stages"
"""Where a run keeps what only an interrupted run needs, in its folder."""
TRAINED = "trained.json"
"""What the training measured: the last file that it writes, into `STAGES`."""


def save_trained(trained: Trained, folder: Path) -> None:
    """Write a trained arm.

    Args:
        trained: the arm.
        folder: of the run; gets the model's folder.

    Raises:
        LayerfuseError: the disk is full.
    """
    trained.model.save_pretrained(folder / MODEL)
    trained.processor.save_pretrained(folder / MODEL)
    measured = {
        "losses": trained.losses,
        "seconds": trained.seconds,
        "parameters": trained.parameters,
    }
    # After the model: with this file it is complete.
    write_text(folder / STAGES / TRAINED, json.dumps(measured))


def is_trained(folder: Path) -> bool:
    """Whether a run has been trained, and not yet tested.

    Args:
        folder: of the run.
    """
    return (folder / STAGES / TRAINED).exists()


def read_trained(recipe: Recipe, folder: Path) -> Trained:
    """Read what `save_trained` wrote, onto this process's device.

    Args:
        recipe: of the study.
        folder: of the run.

    Raises:
        LayerfuseError: the model's files are damaged.
    """
    measured = json.loads((folder / STAGES / TRAINED).read_text("utf-8"))
    answerer = load_answerer(folder / MODEL)
    # It is tested by the kernels that trained it.
    use_kernels(answerer.model, recipe)
    losses = {}
    for name, curve in measured["losses"].items():
        losses[name] = [(step, loss) for step, loss in curve]
    return Trained(
        model=answerer.model,
        processor=answerer.processor,
        losses=losses,
        seconds=measured["seconds"],
        parameters=measured["parameters"],
    )
