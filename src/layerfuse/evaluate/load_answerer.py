"""Load a trained model from its folder, ready to be asked."""

import json
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers.utils import logging as transformers_logging

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.answer import Answerer
from layerfuse.hardware import DTYPES, device
from layerfuse.model.config import FusionConfig
from layerfuse.model.precision import cast
from layerfuse.model.pretrained import load_image_processor
from layerfuse.model.processor import Processor
from layerfuse.model.vlm import FusionVLM
from layerfuse.vision.picture import Picture

NEEDED_SETTINGS = ("vision_config", "text_config", "vision_groups", "fusion")
"""What the config.json of every saved model holds."""
DAMAGE = (
    OSError,
    SafetensorError,
    UnpicklingError,
    StrictDataclassError,
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
)
"""What transformers raises for files that are cut off, empty or of another shape."""


def model_settings(folder: Path) -> dict[str, Any]:
    """Read the settings of the model in a folder, and nothing of its weights.

    Args:
        folder: that of a trained model.

    Returns:
        The content of its config.json.

    Raises:
        LayerfuseError: if the folder holds no model, or one of another type.
    """
    file = folder / "config.json"
    valid = "give a folder such as runs/<study>/arms/<arm>/model"
    if not file.is_file():
        raise LayerfuseError(f"no model in {folder}: {valid}")
    try:
        settings = json.loads(file.read_text("utf-8"))
        model_type = settings.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise LayerfuseError(f"cannot read {file}: {error}") from error
    # transformers would make a model of another type's settings and random weights.
    if model_type != FusionConfig.model_type:
        raise LayerfuseError(
            f"{folder} holds a model of type {model_type!r}, none of layerfuse's: {valid}"
        )
    # transformers would fill in what is missing, and make a model of some other encoder and LLM.
    missing = [key for key in NEEDED_SETTINGS if not settings.get(key)]
    if missing:
        raise LayerfuseError(
            f"{file} is damaged: it lacks {', '.join(missing)}. Copy the model's folder again"
        )
    return settings


def load_answerer(
    folder: Path, dtype: str | None = None, *, batch_invariant: bool = True
) -> Answerer:
    """Load the model in a folder, on this process's device.

    Args:
        folder: that of a trained model.
        dtype: of its arithmetic, `float32` or `bfloat16`; None is that in which it was saved.
        batch_invariant: whether its answers do not depend on the batch.

    Returns:
        The model, ready to be asked.

    Raises:
        LayerfuseError: if the folder holds no model, one of another type, or damaged files.
    """
    model_settings(folder)
    # The processor first: it is read in a moment, while a large model loads for minutes.
    processor = _load_processor(folder)
    model = _load_model(folder)
    if dtype is not None:
        cast(model, DTYPES[dtype])
    return Answerer(model.to(device()).eval(), processor, batch_invariant=batch_invariant)


# Any: transformers types what it loads for its own classes only
def _load_model(folder: Path) -> Any:
    """The model in a folder.

    Raises:
        LayerfuseError: its files are damaged.
    """
    model_class: Any = FusionVLM
    try:
        model, report = model_class.from_pretrained(folder, output_loading_info=True)
    except LayerfuseError:
        raise
    except (*DAMAGE, RuntimeError) as error:
        raise _damaged("model", folder, error) from error
    # transformers draws weights that a file lacks at random, and only says so.
    missing = sorted(report["missing_keys"])
    if missing:
        raise LayerfuseError(
            f"cannot read the model in {folder}: {len(missing)} weights are missing, such as "
            f"{missing[0]}. Copy the folder again, or train the arm again"
        )
    return model


# Any: transformers types what it loads for its own classes only
def _load_processor(folder: Path) -> Any:
    """The processor of the model in a folder.

    Raises:
        LayerfuseError: its files are damaged.
    """
    tokenizer_file = folder / "tokenizer.json"
    # transformers would try to convert tokenizers of other libraries, and ask for their packages.
    if not tokenizer_file.is_file():
        raise LayerfuseError(
            f"cannot read the model in {folder}: it lacks tokenizer.json. Copy the folder again"
        )
    try:
        Tokenizer.from_file(str(tokenizer_file))
    # The library is written in Rust and raises Exception itself, no class of its own.
    except Exception as error:
        raise _damaged("tokenizer.json", folder, error) from error
    processor_class: Any = Processor
    try:
        processor = processor_class.from_pretrained(folder)
        # In its version for PIL images, as in training: by itself, transformers takes torchvision's
        # where that is installed, which resizes otherwise.
        processor.image_processor = load_image_processor(str(folder.absolute()))
    except LayerfuseError:
        raise
    except DAMAGE as error:
        raise _damaged("processor", folder, error) from error
    return processor


def _damaged(part: str, folder: Path, error: Exception) -> LayerfuseError:
    """The message for a part of a saved model that cannot be read."""
    return LayerfuseError(
        f"cannot read the model in {folder}: its {part} is damaged or missing "
        f"({type(error).__name__}: {error}). Copy the folder again, or train the arm again"
    )


def ask_model(folder: Path, image: Path, question: str, max_new_tokens: int) -> str:
    """Ask the model in a folder one question about one picture.

    Args:
        folder: that of a trained model.
        image: a picture's file.
        question: what to ask.
        max_new_tokens: longest answer, in tokens.

    Returns:
        The answer.

    Raises:
        LayerfuseError: the picture cannot be read, or the folder holds no model.
    """
    # The picture first: it is looked at in a moment, while a large model loads for minutes.
    fault = Picture(str(image)).fault(whole=True)
    if fault is not None:
        raise LayerfuseError(fault)
    # The answer is all that is asked for.
    transformers_logging.disable_progress_bar()
    return load_answerer(folder).ask([image], question, max_new_tokens)
