"""The tensors of a released checkpoint: whole files or shards, safetensors or PyTorch's own."""

import json
import pickle
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from layerfuse.errors import LayerfuseError, short

SETTINGS = "config.json"
ADAPTER = "adapter_config.json"
_WHOLE_MODEL = ("model*.safetensors", "pytorch_model*.bin")
"""files of a whole model, in the order in which they are looked for"""
_ADDED = ("mm_projector*.bin", "ucross.bin", "non_lora_trainables.bin")
"""files with what was trained beside an LLM that is elsewhere"""


@dataclass(frozen=True)
class Checkpoint:
    """A folder as a release's training wrote it.

    Attributes:
        folder: of the files.
        settings: the content of its config.json.
        tensors: by their names, without the prefixes of PEFT.
        is_whole: whether the LLM is among them; else it has to be given.
        has_adapter: whether a LoRA adapter of the LLM lies beside them.
    """

    folder: Path
    settings: dict[str, Any]
    tensors: dict[str, Tensor]
    is_whole: bool
    has_adapter: bool

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
        for pattern in _WHOLE_MODEL:
            files = sorted(folder.glob(pattern))
            if files:
                _check_index(folder, pattern, files)
                return Checkpoint(folder, settings, _read_files(files), True, False)
    files = []
    for pattern in _ADDED:
        files += sorted(folder.glob(pattern))
    if not files:
        wanted = ", ".join((*_WHOLE_MODEL, *_ADDED))
        raise LayerfuseError(f"{folder} holds no weights; expected is one of {wanted}")
    tensors: dict[str, Tensor] = {}
    for name, tensor in _read_files(files).items():
        tensors[_without_peft(name)] = tensor
    return Checkpoint(folder, settings, tensors, False, has_adapter)


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
    suffix = ".safetensors" if pattern.endswith(".safetensors") else ".bin"
    for index in sorted(folder.glob(f"*{suffix}.index.json")):
        try:
            named: Any = json.loads(index.read_text("utf-8"))["weight_map"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LayerfuseError(f"cannot read {index}: {error}") from error
        there = {file.name for file in files}
        missing = sorted({*named.values()} - there)
        if missing:
            raise LayerfuseError(f"{index} names shards that are not there: {', '.join(missing)}")


def _read_files(files: Iterable[Path]) -> dict[str, Tensor]:
    """The tensors of several files.

    Raises:
        LayerfuseError: a file cannot be read, or two hold the same tensor.
    """
    tensors: dict[str, Tensor] = {}
    holds: dict[str, Path] = {}
    for file in files:
        for name, tensor in _read_file(file).items():
            if name in holds:
                raise LayerfuseError(
                    f"{holds[name].name} and {file.name} both hold {name!r}: the shards overlap, "
                    "perhaps those of two models in one folder"
                )
            holds[name] = file
            tensors[name] = tensor
    return tensors


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
        except (OSError, SafetensorError) as error:
            raise LayerfuseError(f"cannot read {file}; is it cut off? {error}") from error
    try:
        # Files of old versions of PyTorch are no archives, and cannot be mapped into memory.
        content: Any = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except pickle.UnpicklingError as error:
        raise LayerfuseError(
            f"{file} holds more than tensors, and is not loaded, since that could run code: "
            f"{str(error).splitlines()[0]}"
        ) from error
    except (OSError, RuntimeError, EOFError) as error:
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
