"""Whether an exported folder works where layerfuse is not installed: another process tries it."""

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from layerfuse.errors import LayerfuseError
from layerfuse.export.equality import QUESTIONS, sample_picture
from layerfuse.model.chat_template import IMAGE_TOKEN
from layerfuse.model.processor import Processor
from layerfuse.model.vlm import FusionVLM

ASK_EXPORTED = """\
import sys
sys.modules["layerfuse"] = None
import safetensors.torch, torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder, picture, output, threads, *questions = sys.argv[1:]
# sums are added up in another order by another number of threads
torch.set_num_threads(int(threads))
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
tensors = {}
for number, question in enumerate(questions):
    with torch.no_grad():
        inputs = processor.inputs([[{"role": "user", "content": question}]], [Image.open(picture)])
        logits = model(**inputs).logits
    for name, tensor in {**inputs, "logits": logits}.items():
        tensors[f"{number} {name}"] = tensor.contiguous()
safetensors.torch.save_file(tensors, output)
"""
"""loads a folder where layerfuse cannot be imported, asks it, and writes inputs and logits"""


def check_elsewhere(model: FusionVLM, processor: Processor, folder: Path) -> float:
    """Ask an exported folder about a picture, in a process without layerfuse.

    Args:
        model: the trained model, on the CPU.
        processor: its processor.
        folder: the exported folder.

    Returns:
        The largest difference of two logits, which is 0.

    Raises:
        LayerfuseError: the folder cannot be loaded there, or makes other inputs or logits.
    """
    picture = sample_picture()
    questions = [IMAGE_TOKEN + question for question in QUESTIONS]
    exported = _answers_elsewhere(folder, questions)
    for number, question in enumerate(questions):
        inputs = dict(processor.inputs([[{"role": "user", "content": question}]], [picture]))
        for name, tensor in inputs.items():
            if not torch.equal(tensor, exported[f"{number} {name}"]):
                raise LayerfuseError(
                    f"the exported folder makes other {name} than this model was trained with. "
                    "Nothing was written"
                )
        with torch.no_grad():
            expected = model(**inputs).logits
        logits = exported[f"{number} logits"]
        if not torch.equal(expected, logits):
            raise LayerfuseError(
                f"the exported folder's logits differ by {_difference(expected, logits):.2g} from "
                "those of the trained model, although the code is the same. Nothing was written"
            )
    return 0.0


def _difference(expected: Tensor, logits: Tensor) -> float:
    """The largest difference of two logits that answers can have."""
    # where answers are a closed set, those of other tokens are minus infinity
    possible = expected.isfinite() & logits.isfinite()
    return float((logits - expected)[possible].abs().max())


def _answers_elsewhere(folder: Path, questions: list[str]) -> dict[str, Tensor]:
    """Inputs and logits of questions, as `<number of the question> <name>`.

    Raises:
        LayerfuseError: the process fails; with the last line that it says.
    """
    with TemporaryDirectory() as temporary:
        picture = Path(temporary) / "picture.png"
        output = Path(temporary) / "output.safetensors"
        sample_picture().save(picture)
        threads = str(torch.get_num_threads())
        command = [sys.executable, "-c", ASK_EXPORTED]
        command += [str(folder.resolve()), str(picture), str(output), threads, *questions]
        # The folder's code is copied into a cache, which is not to keep what is only tried.
        # Nothing is downloaded: what was needed for the model itself is here.
        environment = {**os.environ, "HF_MODULES_CACHE": temporary, "HF_HUB_OFFLINE": "1"}
        finished = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment
        )
        if finished.returncode != 0:
            said = finished.stderr.strip().splitlines()
            # a process that the system ends, as for lack of memory, says nothing
            reason = said[-1] if said else f"its process ended with {finished.returncode}"
            raise LayerfuseError(
                f"the exported folder cannot be used without layerfuse: {reason}. Nothing was "
                "written"
            )
        # Any: safetensors types the paths of its functions in part only
        tensor_files: Any = safetensors.torch
        return tensor_files.load_file(output)
