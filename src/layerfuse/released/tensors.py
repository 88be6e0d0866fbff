"""The tensors of a released checkpoint: whole files or shards, safetensors or PyTorch's own."""

import json
import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors.torch
from torch import Tensor

from layerfuse.errors import LayerfuseError, short
from layerfuse.model.given_model import UNREADABLE, WEIGHTS, load_pytorch, overlap

SETTINGS = "config.json"
ADAPTER = "adapter_config.json"
_ADDED = ("mm_projector*.bin", "ucross.bin", "non_lora_trainables.bin")
"""files with what was trained beside an LLM that is elsewhere"""


@dataclass(frozen=True)
class Checkpoint:
    """A folder as a release's training wrote it.

    Attributes:
        folder: of the files.
        settings: the content of its config.json.
        tensors: by their names, without the prefixes of PEFT.
        files: that hold them, by the same names.
        is_whole: whether the LLM is among them; else it has to be given.
        has_adapter: whether a LoRA adapter of the LLM lies beside them.
        beside: names of files beside a whole model that hold a part of one; they are not read.
    """

    folder: Path
    settings: dict[str, Any]
    tensors: dict[str, Tensor]
    files: dict[str, Path]
    is_whole: bool
    has_adapter: bool
    beside: list[str]

    # Any: what stands in JSON
    def setting(self, name: str) -> Any:
        """A setting that must be there.

        Args:
            name: its key in config.json.

        Raises:
            LayerfuseError: it is not there.
        """
        if name not in self.settings:
            raise LayerfuseError(
                f"{self.folder / SETTINGS} has no {name!r}: it is not of a checkpoint of this kind"
            )
        return self.settings[name]


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint.

    Args:
        folder: with config.json beside the weights.

    Returns:
        All of its tensors, on the CPU.

    Raises:
        LayerfuseError: a file is missing, cut off, holds more than tensors, or two of them hold
            the same tensor.
    """
    settings = _read_settings(folder)
    has_adapter = (folder / ADAPTER).is_file()
    if not has_adapter:
        for pattern in WEIGHTS:
            files = sorted(folder.glob(pattern))
            if files:
                _check_index(folder, pattern, files)
                beside = [file.name for file in _added_files(folder)]
                return Checkpoint(folder, settings, *_read_files(files), True, False, beside)
    files = _added_files(folder)
    if not files:
        wanted = ", ".join((*WEIGHTS, *_ADDED))
        raise LayerfuseError(f"{folder} holds no weights; expected is one of {wanted}")
    return Checkpoint(folder, settings, *_read_files(files), False, has_adapter, [])


def _added_files(folder: Path) -> list[Path]:
    """The files of what was trained beside an LLM."""
    files: list[Path] = []
    for pattern in _ADDED:
        files += sorted(folder.glob(pattern))
    return files


def _read_settings(folder: Path) -> dict[str, Any]:
    """The content of config.json.

    Raises:
        LayerfuseError: it is not there, or is no mapping.
    """
    file = folder / SETTINGS
    if not file.is_file():
        raise LayerfuseError(
            f"{folder} holds no {SETTINGS}: give the folder of a released checkpoint"
        )
    try:
        settings: Any = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise LayerfuseError(f"cannot read {file}: {error}") from error
    if not isinstance(settings, dict):
        raise LayerfuseError(f"{file} holds {short(settings)}; a mapping is expected")
    return cast("dict[str, Any]", settings)


def _check_index(folder: Path, pattern: str, files: list[Path]) -> None:
    """Raise LayerfuseError if shards are missing that an index names."""
    there = {file.name for file in files}
    for file in files:
        # model-00001-of-00003: all three belong together, also without an index.
        numbered = re.search(r"-(\d+)-of-(\d+)\.", file.name)
        if numbered is not None:
            digits = len(numbered[1])
            for number in range(1, int(numbered[2]) + 1):
                other = f"-{number:0{digits}}-of-{numbered[2]}."
                name = file.name.replace(numbered[0], other)
                if name not in there:
                    raise LayerfuseError(f"{folder} lacks the shard {name}")
    for index in sorted(folder.glob(f"*{Path(pattern).suffix}.index.json")):
        try:
            named: dict[Any, Any] = dict(json.loads(index.read_text("utf-8"))["weight_map"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LayerfuseError(f"cannot read {index}: {error}") from error
        for name, shard in named.items():
            if not isinstance(shard, str):
                raise LayerfuseError(
                    f"cannot read {index}: {short(name)} is in {short(shard)}; the name of a file "
                    "is expected"
                )
        missing = sorted({*named.values()} - there)
        if missing:
            raise LayerfuseError(f"{index} names shards that are not there: {', '.join(missing)}")


def _read_files(files: Sequence[Path]) -> tuple[dict[str, Tensor], dict[str, Path]]:
    """The tensors of several files, and the files that hold them.

    Raises:
        LayerfuseError: a file cannot be read, two hold the same tensor, or none holds any.
    """
    tensors: dict[str, Tensor] = {}
    holds: dict[str, Path] = {}
    for file in files:
        for written, tensor in _read_file(file).items():
            name = _without_peft(written)
            if name in holds:
                raise overlap(holds[name], file, name)
            holds[name] = file
            tensors[name] = tensor
    if not tensors:
        raise LayerfuseError(
            f"{', '.join(map(str, files))}: no tensor is in there; was the checkpoint saved whole?"
        )
    return tensors, holds


def _read_file(file: Path) -> dict[str, Tensor]:
    """The tensors of one file; never is code of it run.

    Raises:
        LayerfuseError: it is cut off, or holds more than tensors.
    """
    if file.suffix == ".safetensors":
        # Any: safetensors leaves the type of paths open
        untyped: Any = safetensors.torch
        try:
            return untyped.load_file(file)
        except UNREADABLE as error:
            raise LayerfuseError(f"cannot read {file}; is it cut off? {error}") from error
    try:
        content: Any = load_pytorch(file)
    except pickle.UnpicklingError as error:
        raise LayerfuseError(
            f"{file} is cut off or no file of PyTorch (a Git LFS pointer?), or it holds more than "
            f"tensors, which could run code and is not loaded: {str(error).splitlines()[0]}"
        ) from error
    except UNREADABLE as error:
        first_line = (str(error).splitlines() or ["it ends too early"])[0]
        raise LayerfuseError(f"cannot read {file}; is it cut off? {first_line}") from error
    if not isinstance(content, dict):
        raise LayerfuseError(f"{file} holds {short(content)}; names with their tensors expected")
    tensors: dict[str, Tensor] = {}
    for name, tensor in cast("dict[Any, Any]", content).items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise LayerfuseError(
                f"{file} holds {short(tensor)} as {short(name)}; a tensor expected"
            )
        tensors[name] = tensor
    return tensors


def _without_peft(name: str) -> str:
    """The name of a tensor as the model itself calls it.

    Files beside an adapter have names such as `base_model.model.model.mm_projector.0.weight`.
    """
    return name.removeprefix("base_model.model.")
