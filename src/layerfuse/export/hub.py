"""A trained model with the code of its strategy: for transformers without layerfuse."""

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import safetensors.torch
import torch

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.answer import Answerer
from layerfuse.export.equality import QUESTIONS, sample_picture
from layerfuse.export.flat_modules import PACKAGE, Definition, flat_modules, flat_name
from layerfuse.export.model_card import model_card
from layerfuse.files import whole_folder
from layerfuse.model.chat_template import IMAGE_TOKEN
from layerfuse.model.config import FusionConfig
from layerfuse.model.processor import Processor
from layerfuse.model.vlm import FusionVLM

CLASSES = {
    "AutoConfig": FusionConfig,
    "AutoModelForImageTextToText": FusionVLM,
    "AutoProcessor": Processor,
}
"""by the automatic class of transformers that loads it; the configuration comes first"""
READ_ELSEWHERE = """\
import json, sys
sys.modules["layerfuse"] = None
import safetensors.torch, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, inputs_file, output_file = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules"), type(model)
assert type(processor).__module__.startswith("transformers_modules"), type(processor)
inputs = safetensors.torch.load_file(inputs_file)
with torch.no_grad():
    logits = model(**inputs).logits
safetensors.torch.save_file({"logits": logits.contiguous()}, output_file)
"""
"""loads a folder where layerfuse cannot be imported, and asks it what it is given"""


def export_hub(model: Path, answerer: Answerer, output: Path) -> float:
    """Write a folder that brings its own code.

    Args:
        model: folder of the trained model.
        answerer: the trained model and its processor.
        output: a folder that is empty or not there.

    Returns:
        The largest difference of two logits to the trained model's, which is 0.

    Raises:
        LayerfuseError: the strategy is not layerfuse's own, or the folder does not load elsewhere
            with the same logits; nothing is written then.
    """
    # on the CPU, where another process computes the same
    # Any: transformers types `to` for its own classes only
    trained: Any = answerer.model.cpu()
    processor: Any = answerer.processor
    strategy = trained.config.strategy
    if strategy.module.__module__.split(".")[0] != PACKAGE:
        raise LayerfuseError(
            f"{strategy.name} is no strategy of layerfuse ({strategy.module.__module__}): its code "
            "cannot be written beside the model. Ship it as a package, whose import registers it"
        )
    code = flat_modules(
        [Definition(part.__module__, part.__name__) for part in CLASSES.values()],
        registered=Definition(strategy.module.__module__, strategy.module.__name__),
    )
    card = model_card(model, trained.config, strategy.module, name=output.name, needs_code=True)
    with whole_folder(output) as unfinished:
        trained.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
        for name, text in code.items():
            (unfinished / name).write_text(text, "utf-8")
        for name in ("config.json", "processor_config.json"):
            _add_auto_map(unfinished / name)
        (unfinished / "README.md").write_text(card, "utf-8")
        return _difference_elsewhere(trained, processor, unfinished)


def _add_auto_map(file: Path) -> None:
    """Say in a settings file which class of the folder's code reads it."""
    auto_map: dict[str, str] = {}
    for auto, part in CLASSES.items():
        auto_map[auto] = f"{flat_name(part.__module__)}.{part.__name__}"
    settings = json.loads(file.read_text("utf-8"))
    settings["auto_map"] = auto_map
    file.write_text(json.dumps(settings, indent=2) + "\n", "utf-8")


def _difference_elsewhere(model: FusionVLM, processor: Processor, folder: Path) -> float:
    """Ask the folder what the trained model is asked, in a process without layerfuse.

    Returns:
        The largest difference of two logits.

    Raises:
        LayerfuseError: it cannot be loaded there, or differs.
    """
    question = IMAGE_TOKEN + QUESTIONS[0]
    inputs = processor.inputs([[{"role": "user", "content": question}]], [sample_picture()])
    tensors = {name: value.contiguous() for name, value in inputs.items()}
    tensors["pixel_values"] = tensors["pixel_values"].to(model.dtype)
    with torch.no_grad():
        expected = model(**tensors).logits

    # Any: safetensors leaves the type of paths open
    files: Any = safetensors.torch
    with TemporaryDirectory() as temporary:
        inputs_file = Path(temporary) / "inputs.safetensors"
        output_file = Path(temporary) / "output.safetensors"
        files.save_file(tensors, inputs_file)
        # the folder's code is copied into a cache, which is not to keep what is only tried
        environment = {**os.environ, "HF_MODULES_CACHE": temporary, "HF_HUB_OFFLINE": "1"}
        finished = subprocess.run(
            [
                sys.executable,
                "-c",
                READ_ELSEWHERE,
                str(folder.resolve()),
                str(inputs_file),
                str(output_file),
            ],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        if finished.returncode != 0:
            last_line = finished.stderr.strip().splitlines()[-1]
            raise LayerfuseError(
                f"the exported folder cannot be loaded without layerfuse: {last_line}. Nothing was "
                "written"
            )
        logits = files.load_file(output_file)["logits"]
    # where answers are closed, all other logits are minus infinity in both
    finite = expected.isfinite()
    difference = float((logits - expected)[finite].abs().max())
    if difference != 0 or not torch.equal(finite, logits.isfinite()):
        raise LayerfuseError(
            f"the exported folder's logits differ by {difference:.2g} from those of the trained "
            "model. Nothing was written"
        )
    return difference
