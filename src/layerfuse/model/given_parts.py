"""A given model in a folder of its parts, from which recipes compose their arms."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from transformers import AutoProcessor, CLIPImageProcessorPil

from layerfuse.errors import LayerfuseError
from layerfuse.files import locked, whole_folder, write_text
from layerfuse.fusion.flat_projector import FlatProjector
from layerfuse.model.chat_template import IMAGE_TOKEN
from layerfuse.model.given_model import load_given, take_apart
from layerfuse.model.given_template import given_template
from layerfuse.model.pretrained import processed_size
from layerfuse.model.processor import Processor
from layerfuse.paths import home

FACTS = "given.json"
"""What stands beside the weights of a projector; the last file that a folder of parts gets."""
PROJECTOR = "projector.safetensors"


@dataclass(frozen=True)
class GivenParts:
    """Where the parts of a given model are."""

    encoder: str
    """folder of the encoder and its image processor"""
    llm: str
    """folder of the LLM and its tokenizer, with the model's chat template"""
    image_token: str | None
    """the tokenizer's token for pictures, if it is not `<image>`"""
    token_grid: tuple[int, int] | None
    """(rows, columns) to which the model pools patches"""
    closed_answers: bool
    """whether its answers are a closed set"""


def given_parts(given: str, say: Callable[[str], None]) -> GivenParts:
    """Take a model apart, once: the parts stay in the cache folder.

    Args:
        given: folder or hub id of a stock LLaVA, LLaVA-NeXT or a `FusionVLM`.
        say: is told before weights are read and written, which takes a while.

    Raises:
        LayerfuseError: if it cannot be read or taken apart; with the reason.
    """
    folder = home() / "given" / _digest(given)
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.with_name(folder.name + ".lock")
    with locked(lock, lambda: say(f"waiting for another process that takes {given} apart")):
        if not (folder / FACTS).is_file():
            say(f"taking {given} apart into {folder}")
            _write_parts(given, folder)
    facts = json.loads((folder / FACTS).read_text("utf-8"))
    token = facts["image_token"]
    return GivenParts(
        encoder=str(folder / "encoder"),
        llm=str(folder / "llm"),
        image_token=None if token == IMAGE_TOKEN else token,
        token_grid=tuple(facts["token_grid"]) if facts["token_grid"] else None,
        # Folders that earlier versions wrote do not say.
        closed_answers=facts.get("closed_answers", False),
    )


def read_given_projector(encoder: str) -> FlatProjector:
    """The projector of a model that was taken apart.

    Args:
        encoder: folder of its encoder, as `given_parts` says.
    """
    folder = Path(encoder).parent
    facts = json.loads((folder / FACTS).read_text("utf-8"))
    # Any: safetensors leaves the type of paths open
    tensors: Any = safetensors.torch
    weights = tensors.load_file(folder / PROJECTOR)
    return FlatProjector(
        tuple(facts["layers"]),
        weights["weight_1"],
        weights["bias_1"],
        facts["activation"],
        weights["weight_2"],
        weights["bias_2"],
    )


def _digest(given: str) -> str:
    """A name for the parts of a model: that of its folder's files as they are now."""
    facts: list[Any] = [given]
    folder = Path(given)
    if folder.is_dir():
        facts = [str(folder.resolve())]
        for file in sorted(folder.iterdir()):
            status = file.stat()
            facts.append([file.name, status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _write_parts(given: str, folder: Path) -> None:
    """Write the parts of a model into a new folder."""
    # "auto": as they are stored; a recipe's `dtype` is applied when arms are composed
    model = load_given(given, "auto")
    parts = take_apart(model)
    processor, template = load_given_processor(given)
    refuse_other_image_token(given, parts.image_token_id, processor)
    # Any: transformers types what saves by no class that says what it takes
    encoder_parts: list[Any] = [parts.tower, parts.vision_config, processor.image_processor]
    language_model: Any = parts.language_model
    with whole_folder(folder) as unfinished:
        for part in encoder_parts:
            part.save_pretrained(unfinished / "encoder")
        language_model.save_pretrained(unfinished / "llm")
        tokenizer = processor.tokenizer
        tokenizer.chat_template = template
        tokenizer.save_pretrained(unfinished / "llm")
        projector = parts.projector
        weights = {
            "weight_1": projector.weight_1,
            "bias_1": projector.bias_1,
            "weight_2": projector.weight_2,
            "bias_2": projector.bias_2,
        }
        copies = {name: weight.float().contiguous() for name, weight in weights.items()}
        # Any: safetensors leaves the type of paths open
        tensors: Any = safetensors.torch
        tensors.save_file(copies, unfinished / PROJECTOR)
        facts = {
            "given": given,
            "layers": projector.layers,
            "activation": projector.activation,
            "image_token": processor.image_token,
            "token_grid": parts.token_grid,
            "closed_answers": parts.answer_tokens is not None,
        }
        write_text(unfinished / FACTS, json.dumps(facts, indent=1))


# Any: processors of transformers share no type that says what they have
def load_given_processor(given: str) -> tuple[Any, str | None]:
    """The processor of a given model.

    Args:
        given: folder or hub id of a stock LLaVA, LLaVA-NeXT or a `FusionVLM`.

    Returns:
        The processor, which reads a picture once, and the chat template for messages that are
        texts; None where none can be made.

    Raises:
        LayerfuseError: there is none, or its pictures are of several sizes.
    """
    auto_processor: Any = AutoProcessor
    try:
        processor = auto_processor.from_pretrained(given, backend="pil")
    except (OSError, ValueError) as error:
        raise LayerfuseError(f"cannot read the processor of {given}: {error}") from error
    settings = processor.image_processor.to_dict()
    if "image_grid_pinpoints" in settings:
        processor.image_processor = _at_base_resolution(settings)
    processed_size(given, processor.image_processor)
    if isinstance(processor, Processor):
        return processor, processor.chat.template
    return processor, given_template(processor)


# Any: processors of transformers share no type that says what they have
def refuse_other_image_token(given: str, image_token_id: int, processor: Any) -> None:
    """Refuse a model whose tokenizer marks pictures by another token than it reads them at.

    Args:
        given: folder or hub id of the model.
        image_token_id: of the model.
        processor: of the same folder, as `load_given_processor` gives it.

    Raises:
        LayerfuseError: the two differ.
    """
    token = processor.image_token
    token_id = processor.tokenizer.convert_tokens_to_ids(token)
    if token_id != image_token_id:
        raise LayerfuseError(
            f"image_token_index of {given} is {image_token_id}, and the id of {token!r} in its "
            f"tokenizer {token_id}: set both to the token that it was trained with"
        )


def _at_base_resolution(settings: dict[str, Any]) -> Any:
    """The image processor of LLaVA-NeXT without its tiles: the whole picture, stretched to the size
    of the encoder, which is the first of the pictures that it makes of one.

    Args:
        settings: of the any-resolution image processor.
    """
    size = settings["size"]
    side = size.get("shortest_edge") or size["height"]
    image_processor_class: Any = CLIPImageProcessorPil
    return image_processor_class(
        size={"height": side, "width": side},
        resample=settings["resample"],
        do_center_crop=False,
        rescale_factor=settings["rescale_factor"],
        image_mean=settings["image_mean"],
        image_std=settings["image_std"],
    )
