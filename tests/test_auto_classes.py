"""`import layerfuse` alone makes its models known to transformers."""

import json
import subprocess
import sys
from pathlib import Path

import layerfuse
from tests import tiny

READ_BY_TRANSFORMERS = """
import json, sys
import layerfuse
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

folder = sys.argv[1]
classes = [AutoConfig, AutoModelForImageTextToText, AutoProcessor]
print(json.dumps([type(each.from_pretrained(folder)).__name__ for each in classes]))
"""


def test_nothing_else_is_imported_to_read_a_model(tmp_path: Path) -> None:
    """In a process of its own: the one of the tests has imported every part of layerfuse."""
    folder = tiny.save_model(tmp_path / "model")
    command = [sys.executable, "-c", READ_BY_TRANSFORMERS, str(folder)]

    finished = subprocess.run(command, capture_output=True, text=True, check=False)

    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout) == ["FusionConfig", "FusionVLM", "Processor"]


def test_every_public_name_is_there() -> None:
    for name in layerfuse.__all__:
        assert name in vars(layerfuse)
