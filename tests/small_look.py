"""A tiny encoder, a few pictures and scenes to look at, and made-up probes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel

from layerfuse.look.probe_report import ProbedSelection, TaskReading
from layerfuse.look.tasks import SCENES
from tests import tiny


def save_encoder_and_pictures(home: Path) -> None:
    """Write `encoder`, a random one of four blocks and 4 x 4 patches, and six `images`."""
    torch.manual_seed(0)
    AutoModel.from_config(tiny.vision_config("dinov2")).save_pretrained(home / "encoder")
    tiny.image_processor().save_pretrained(home / "encoder")
    (home / "images").mkdir()
    random = np.random.default_rng(0)
    pictures = random.integers(0, 255, (6, 6, 5, 3), np.uint8)
    for place, pixels in enumerate(pictures):
        picture = Image.fromarray(pixels).resize((40, 36))
        picture.save(home / "images" / f"{place}.png")


def use_few_scenes(home: Path, patch: pytest.MonkeyPatch) -> None:
    """Draw 60 training and 30 test scenes where no data is given, below `home`."""
    patch.setenv("LAYERFUSE_HOME", str(home))
    patch.setitem(SCENES, "train", 60)
    patch.setitem(SCENES, "test", 30)


def reading(hits: str) -> TaskReading:
    """What a probe read of a task, given a 1 or 0 for each picture."""
    return TaskReading(
        accuracy=hits.count("1") / len(hits),
        interval=[0.0, 0.9],
        hits=hits,
    )


def probed(layers: list[int], **hits: str) -> ProbedSelection:
    """What probes read of these layers, given by task a 1 or 0 for each picture."""
    tasks = {}
    for task, of_task in hits.items():
        tasks[task] = reading(of_task)
    return ProbedSelection(
        layers=layers,
        tasks=tasks,
        # No test of what is made of probes reads the mean over tasks
        mean=0.0,
        interval=[0.0, 0.0],
    )
