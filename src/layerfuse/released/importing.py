"""`layerfuse import`: a released checkpoint as a model of layerfuse, whole or not at all."""

import json
import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from layerfuse.errors import LayerfuseError, short
from layerfuse.files import refuse_filled, whole_folder
from layerfuse.model.chat_template import IMAGE_TOKEN
from layerfuse.model.config import configure
from layerfuse.model.given_model import add_layers, load_given, take_apart
from layerfuse.model.given_parts import load_given_processor, refuse_other_image_token
from layerfuse.model.pretrained import (
    add_image_token,
    load_image_processor,
    load_llm,
    load_tokenizer,
    text_config_of,
)
from layerfuse.model.processor import Processor
from layerfuse.model.vlm import FusionVLM
from layerfuse.recipe.packaged import find_template
from layerfuse.released.language_model import (
    LLM_NAMES,
    build_llm,
    config_of_llm,
    merge_adapter,
)
from layerfuse.released.layouts import LAYOUTS, Around, ReleasedLayout, reordered
from layerfuse.released.tensors import Checkpoint, read_checkpoint
from layerfuse.vision.encoder import Encoder, load_tower, load_vision_config
from layerfuse.vision.towers import patch_side

STOCK = "llava-hf"
"""the layout of transformers' own LLaVA"""
REPORT = "import.json"
"""what became of every tensor, in the folder of the imported model"""
TOWER = "model.vision_tower.vision_tower."
IGNORED = {
    "rotary_emb.inv_freq": "computed from the configuration",
    "embeddings.position_ids": "computed from the configuration",
    "model.image_newline": "read with tiles of pictures alone",
    "model.sentence_embedder.": "the sentence encoder is loaded from its own folder",
}
"""tensors without a place here, by the end or the beginning of their names, and why"""
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""in which weights are stored"""
PROMPTS = {"llama": "vicuna_v1"}
"""the chat templates of LLaVA-1.5, by the type of the LLM; they stand in its code"""


@dataclass(frozen=True)
class Imported:
    """What became of a checkpoint.

    Attributes:
        used: the names of its tensors that were loaded, by the part of the model.
        ignored: the names of those that were not, by the reason.
        layers: of the encoder that the model reads.
        fusion: its strategy, in recipe form.
        notes: what the user of the model must know.
    """

    used: dict[str, list[str]]
    ignored: dict[str, list[str]]
    layers: list[int]
    fusion: dict[str, Any]
    notes: list[str]


@dataclass(frozen=True)
class Elsewhere:
    """What the files of a checkpoint do not hold.

    Attributes:
        encoder: hub id or folder; None takes what the checkpoint names.
        base: hub id or folder of the LLM that a projector or an adapter belongs to.
        sentence_encoder: hub id, folder or local-model name; None takes what it names.
        chat_template: the text of a Jinja template; None takes the tokenizer's, or LLaVA's.
    """

    encoder: str | None = None
    base: str | None = None
    sentence_encoder: str | None = None
    chat_template: str | None = None


def import_checkpoint(
    checkpoint: str, layout: str, output: Path, elsewhere: Elsewhere | None = None
) -> Imported:
    """Write a released checkpoint as a model of layerfuse.

    Args:
        checkpoint: its folder; for transformers' own LLaVA a hub id too.
        layout: how its tensors are named: one of `LAYOUTS`, or `llava-hf`.
        output: a folder that is empty or not there.
        elsewhere: what its files do not hold.

    Returns:
        What became of every tensor.

    Raises:
        LayerfuseError: it cannot be read, does not fit, or a tensor is missing or has no place;
            nothing is written then.
    """
    elsewhere = elsewhere or Elsewhere()
    refuse_filled(output)
    if layout == STOCK:
        model, processor, imported = _from_stock(checkpoint, elsewhere)
    else:
        model, processor, imported = _from_release(Path(checkpoint), layout, elsewhere)
    with whole_folder(output) as unfinished:
        model.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
        (unfinished / REPORT).write_text(json.dumps(asdict(imported), indent=1) + "\n", "utf-8")
    return imported


def _from_stock(name: str, elsewhere: Elsewhere) -> tuple[FusionVLM, Processor, Imported]:
    """Transformers' own LLaVA, whose loader checks that it is whole."""
    for value, option in (
        (elsewhere.encoder, "--encoder"),
        (elsewhere.base, "--base"),
        (elsewhere.sentence_encoder, "--sentence-encoder"),
    ):
        if value is not None:
            raise LayerfuseError(f"a model of {STOCK} holds all its parts: leave {option} out")
    given = load_given(name, "auto")
    # Any: transformers' configs declare no common field
    config: Any = given.config
    if config.model_type == "llava_next":
        raise LayerfuseError(
            f"{name} is a LLaVA-NeXT, which cuts each picture into tiles beside the whole, and "
            "layerfuse reads a picture once: it would be another model. To train one from its "
            "parts, see `start_from` and `FusionVLM.from_vlm`"
        )
    projector = take_apart(given).projector
    layers = projector.layers
    fusion: dict[str, Any] = {"name": "single" if len(layers) == 1 else "concat"}
    if projector.activation == "linear":
        fusion["projector"] = "linear"
    model = add_layers(given, list(layers), fusion)
    # Any: transformers types `to` for its own classes only
    untyped: Any = model
    untyped.to(given.dtype)
    given_processor, template = load_given_processor(name)
    refuse_other_image_token(name, model.config.image_token_id, given_processor)
    processor = Processor(
        given_processor.image_processor,
        given_processor.tokenizer,
        patch_size=patch_side(model.config.vision_config),
        fusion=model.config.fusion,
        layers=len(layers),
        image_token=given_processor.image_token,
        chat_template=elsewhere.chat_template or template,
    )
    used = {"whole model": sorted(given.state_dict())}
    return model, processor, Imported(used, {}, list(layers), model.config.fusion, [])


def _from_release(
    folder: Path, layout: str, elsewhere: Elsewhere
) -> tuple[FusionVLM, Processor, Imported]:
    """A checkpoint of one of the releases."""
    if layout not in LAYOUTS:
        raise LayerfuseError(f"unknown layout {layout!r}; valid: {', '.join((*LAYOUTS, STOCK))}")
    checkpoint = read_checkpoint(folder)
    _check_settings(checkpoint)
    if checkpoint.is_whole and elsewhere.base is not None:
        raise LayerfuseError(f"{folder} holds an LLM of its own: leave --base out")
    if not checkpoint.is_whole and elsewhere.base is None:
        raise LayerfuseError(
            f"{folder} holds what was trained beside an LLM, and not the LLM: give that by --base"
        )
    encoder = elsewhere.encoder or str(checkpoint.setting("mm_vision_tower"))
    vision = _vision_config(encoder, elsewhere)
    if elsewhere.base is None:
        text = config_of_llm(checkpoint)
    else:
        text = text_config_of(elsewhere.base)
        _check_base(checkpoint, text, elsewhere.base)
    around = Around(vision, text, elsewhere.sentence_encoder)
    known = LAYOUTS[layout](checkpoint, around)
    if elsewhere.sentence_encoder is not None and "sentence_encoder" not in known.fusion:
        raise LayerfuseError("this checkpoint reads no sentences: leave --sentence-encoder out")
    sorted_names = _sort(checkpoint, known)
    _check_sentences(known)
    dtype = _dtype_of(checkpoint, sorted_names)

    tokenizer = load_tokenizer(elsewhere.base or str(folder))
    image_token_id = int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    if elsewhere.base is None:
        llm = build_llm(checkpoint, text, sorted_names.used["LLM"])
        dtype = llm.dtype
        add_image_token(llm, image_token_id)
    else:
        llm = load_llm(elsewhere.base, dtype, None, image_token_id)
    if checkpoint.has_adapter:
        llm, sorted_names.used["adapter"] = merge_adapter(llm, folder)
    config = configure(
        vision, llm.config, known.layers, known.fusion, image_token_id=image_token_id
    )
    config.text_config = llm.config
    own_tower = sorted_names.used.get("encoder", [])
    tower = _tower(checkpoint, own_tower, encoder, vision, max(config.taps), dtype)
    model = FusionVLM(config, Encoder(tower, config.taps), llm)
    _fill_fusion(model, known, checkpoint, sorted_names.used.get("fusion", []))
    # Any: transformers types `to` for its own classes only
    untyped: Any = model
    untyped.to(dtype)
    processor = Processor(
        load_image_processor(encoder, _aspect_ratio(checkpoint)),
        tokenizer,
        patch_size=patch_side(model.config.vision_config),
        fusion=model.config.fusion,
        layers=len(model.config.vision_layers),
        chat_template=elsewhere.chat_template or _chat_template(tokenizer, model),
    )
    imported = replace(sorted_names, layers=model.config.vision_layers, fusion=model.config.fusion)
    return model.eval(), processor, imported


def _check_settings(checkpoint: Checkpoint) -> None:
    """Raise LayerfuseError for what LLaVA's code can do and layerfuse does otherwise."""
    if checkpoint.settings.get("mm_use_im_start_end"):
        raise LayerfuseError(
            f"mm_use_im_start_end of {checkpoint.folder} puts learned tokens around pictures, for "
            "which there is no place here"
        )


def _vision_config(encoder: str, elsewhere: Elsewhere) -> PreTrainedConfig:
    """The config of the encoder.

    Raises:
        LayerfuseError: it cannot be found; saying how another one is given.
    """
    try:
        return load_vision_config(encoder)
    except LayerfuseError as error:
        if elsewhere.encoder is not None:
            raise
        raise LayerfuseError(
            f"the checkpoint names {encoder!r} as its encoder (mm_vision_tower): {error}. Give its "
            "hub id or folder by --encoder"
        ) from error


def _check_base(checkpoint: Checkpoint, text: PreTrainedConfig, base: str) -> None:
    """Raise LayerfuseError for an LLM of other sizes than the one that was trained with."""
    settings = text.to_dict()
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        written = checkpoint.settings.get(name)
        if written is not None and written != settings.get(name):
            raise LayerfuseError(
                f"{base} is not the LLM of {checkpoint.folder}: its {name} is "
                f"{settings.get(name)}, and was {written}"
            )


def _check_sentences(layout: ReleasedLayout) -> None:
    """Raise LayerfuseError for a sentence encoder on the machine that trained the model."""
    name = layout.fusion.get("sentence_encoder")
    if name is not None and Path(name).is_absolute() and not Path(name).exists():
        raise LayerfuseError(
            f"the checkpoint's sentence encoder is {name!r}, which is not there: give a hub id or "
            "a folder by --sentence-encoder"
        )


def _aspect_ratio(checkpoint: Checkpoint) -> Literal["pad"] | None:
    """What becomes of pictures that are no squares.

    Raises:
        LayerfuseError: they are cut into tiles.
    """
    written = checkpoint.settings.get("image_aspect_ratio")
    if written == "pad":
        return "pad"
    if written in (None, "square"):
        # LLaVA then does what the encoder's own image processor does
        return None
    raise LayerfuseError(
        f"image_aspect_ratio of {checkpoint.folder} is {short(written)}: pictures are cut into "
        "tiles, and layerfuse reads a picture once"
    )


def _chat_template(tokenizer: Any, model: FusionVLM) -> str | None:
    """The template that LLaVA's code trains this family of LLM with, where it is known.

    Args:
        tokenizer: the LLM's.
        model: of the LLM.
    """
    if tokenizer.chat_template is not None:
        return None
    name = PROMPTS.get(model.config.text_config.model_type)
    return None if name is None else find_template(name).read_text("utf-8")


def _sort(checkpoint: Checkpoint, layout: ReleasedLayout) -> Imported:
    """Say of each tensor where it belongs.

    Raises:
        LayerfuseError: some belong nowhere.
    """
    used: dict[str, list[str]] = {}
    ignored: dict[str, list[str]] = {}
    if checkpoint.beside:
        ignored["files beside a whole model, which holds what they do"] = checkpoint.beside
    strange: list[str] = []
    for name in sorted(checkpoint.tensors):
        reason = _reason_to_ignore(name)
        if reason is not None:
            ignored.setdefault(reason, []).append(name)
        elif name.startswith(tuple(layout.names)):
            used.setdefault("fusion", []).append(name)
        elif name.startswith(TOWER):
            used.setdefault("encoder", []).append(name)
        elif checkpoint.is_whole and name.startswith(LLM_NAMES) and ".ucross_" not in name:
            used.setdefault("LLM", []).append(name)
        else:
            strange.append(name)
    if strange:
        raise LayerfuseError(
            f"{len(strange)} tensors of {checkpoint.folder} have no place in this layout, such as "
            f"{', '.join(strange[:3])}. Is it a checkpoint of another release?"
        )
    return Imported(used, ignored, [], {}, list(layout.notes))


def _dtype_of(checkpoint: Checkpoint, imported: Imported) -> torch.dtype:
    """The dtype of the first of the tensors that are loaded.

    Raises:
        LayerfuseError: none is loaded, or one is of a dtype that no model computes in.
    """
    dtypes: list[torch.dtype] = []
    for names in imported.used.values():
        for name in names:
            dtype = checkpoint.tensors[name].dtype
            if dtype not in DTYPES:
                raise LayerfuseError(
                    f"{name} of {checkpoint.files[name]} is in {dtype}; valid: "
                    f"{', '.join(map(str, DTYPES))}. Give a checkpoint that is not quantized"
                )
            dtypes.append(dtype)
    if not dtypes:
        raise LayerfuseError(f"{checkpoint.folder} holds no weights that are loaded")
    return dtypes[0]


def _reason_to_ignore(name: str) -> str | None:
    """Why a tensor is not loaded; None for those that are."""
    for part, reason in IGNORED.items():
        if name.endswith(part) or (part.endswith(".") and name.startswith(part)):
            return reason
    return None


def _tower(
    checkpoint: Checkpoint,
    names: list[str],
    encoder: str,
    vision: PreTrainedConfig,
    deepest: int,
    dtype: torch.dtype,
) -> PreTrainedModel:
    """The vision tower: the checkpoint's own where it was saved too, else the pretrained one.

    Args:
        checkpoint: that may hold one.
        names: of its tensors that are the tower's.
        encoder: hub id or folder of the pretrained one.
        vision: its config.
        deepest: the deepest layer that is read.
        dtype: of the weights.

    Raises:
        LayerfuseError: it lacks a block below the deepest layer that is read, or has more than a
            tower of this kind.
    """
    own: dict[str, Tensor] = {}
    for name in names:
        own[name.removeprefix(TOWER)] = checkpoint.tensors[name].contiguous()
    if not own:
        return load_tower(encoder, vision, dtype)
    cut = deepcopy(vision)
    # Some releases delete blocks above the layers that they read, and what lies above them.
    cut.num_hidden_layers = max(deepest, _blocks_in(own))
    # Through a file, because transformers knows how older versions called these tensors.
    with TemporaryDirectory() as folder:
        # Any: transformers and safetensors do not annotate what they save
        untyped_config: Any = cut
        untyped_config.save_pretrained(folder)
        untyped_save: Any = safetensors.torch
        untyped_save.save_file(own, Path(folder) / "model.safetensors", {"format": "pt"})
        try:
            tower = load_tower(folder, cut, dtype)
        except LayerfuseError as error:
            # the folder is gone when this is read
            reason = str(error).replace(folder, str(checkpoint.folder))
            raise LayerfuseError(
                f"the encoder in {checkpoint.folder} is none as {encoder} describes: {reason}. "
                "Give the encoder that it was trained with by --encoder"
            ) from error
    known = {*tower.state_dict()}
    strange = [name for name in own if name.removeprefix("vision_model.") not in known]
    if strange:
        raise LayerfuseError(
            f"{len(strange)} tensors of {checkpoint.folder} have no place in its encoder "
            f"({vision.model_type}), such as {TOWER}{strange[0]}"
        )
    return tower


def _blocks_in(tensors: dict[str, Tensor]) -> int:
    """The number of blocks that tensors of a tower are of."""
    numbers = [0]
    for name in tensors:
        found = re.search(r"\blayers?\.(\d+)\.", name)
        if found is not None:
            numbers.append(int(found[1]) + 1)
    return max(numbers)


@torch.no_grad()
def _fill_fusion(
    model: FusionVLM, layout: ReleasedLayout, checkpoint: Checkpoint, names: list[str]
) -> None:
    """Give a fusion the weights of a checkpoint.

    Args:
        model: that holds the fusion.
        layout: what its tensors are called.
        checkpoint: that holds them.
        names: of its tensors that are the fusion's.

    Raises:
        LayerfuseError: weights are missing, or of other shapes.
    """
    waiting = dict(model.fusion.named_parameters())
    for name in names:
        tensor = checkpoint.tensors[name]
        ours = _name_here(name, layout.names)
        parameter = waiting.pop(ours, None)
        if parameter is None:
            raise LayerfuseError(
                f"{name} of {checkpoint.folder} would be {ours!r} of the fusion, which this "
                f"strategy ({model.config.fusion['name']}) has not"
            )
        if parameter.shape != tensor.shape:
            raise LayerfuseError(
                f"{name} of {checkpoint.folder} is {list(tensor.shape)}; with this encoder and LLM "
                f"it is {list(parameter.shape)}"
            )
        if ours == "projector.linear_1.weight" and layout.input_order:
            width = tensor.shape[1] // len(layout.input_order)
            tensor = tensor[:, reordered(layout.input_order, width)]
        parameter.copy_(tensor)
    if waiting:
        raise LayerfuseError(
            f"{checkpoint.folder} lacks {len(waiting)} weights of its fusion, such as "
            f"{_name_there(next(iter(waiting)), layout.names)}"
        )


def _name_here(name: str, names: dict[str, str]) -> str:
    """What a tensor of a checkpoint is called in the fusion."""
    theirs = next(theirs for theirs in names if name.startswith(theirs))
    return names[theirs] + name.removeprefix(theirs)


def _name_there(name: str, names: dict[str, str]) -> str:
    """What a tensor of the fusion is called in a checkpoint."""
    for theirs, ours in names.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def described(imported: Imported) -> Sequence[str]:
    """Lines for the terminal: what was loaded, and what was not.

    Args:
        imported: what became of a checkpoint.
    """
    layers = ", ".join(map(str, imported.layers))
    lines = [f"layers {layers}; {json.dumps(imported.fusion)}"]
    for part, names in imported.used.items():
        lines.append(f"used: {len(names):,} tensors of the {part}")
    for reason, names in imported.ignored.items():
        lines.append(f"ignored: {len(names):,} tensors, such as {names[0]} ({reason})")
    lines.append("missing: none")
    return [*lines, *imported.notes]
