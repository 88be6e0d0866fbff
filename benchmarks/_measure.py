"""What the benchmarks share: times in turns, fresh processes, and the shapes of real models.

A busy machine makes seconds worthless and ratios of neighbours usable: two things are timed one
after the other, a round gives one ratio, and the median of the rounds is reported beside the least
and the largest, which say how noisy it was. Times are those of one thread on the processor, which
do not count the waiting for a core that others use.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, Dinov2Config, LlamaConfig

from layerfuse import FusionVLM
from layerfuse.fusion import FUSIONS

Action = Callable[[], object]
IMAGE_ID = 7
GRID = 10
"""side of the grid of patches; small images with little text keep the proportions of real ones"""
TEXT, LABELLED = 24, 6
"""tokens of text beside an image in a sample, and how many of them are an answer"""
torch.set_num_threads(1)


@dataclass(frozen=True)
class Ratio:
    """Median over rounds, the least and the largest."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f} to {self.most:.2f})"


def ratio_of(ones: Sequence[float], others: Sequence[float]) -> Ratio:
    """Round by round, `ones` over `others`."""
    each = [one / other for one, other in zip(ones, others, strict=True)]
    return Ratio(statistics.median(each), min(each), max(each))


def times(actions: dict[str, Action], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each action in each round, the order turned round every round."""
    taken: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(rounds + warm_up):
        for name in list(actions)[:: 1 - 2 * (turn % 2)]:
            started = time.process_time()
            actions[name]()
            if turn >= warm_up:
                taken[name].append(time.process_time() - started)
    return taken


def ratio(one: Action, other: Action, rounds: int = 5) -> Ratio:
    """Time of `one` over that of `other`."""
    found = times({"one": one, "other": other}, rounds)
    return ratio_of(found["one"], found["other"])


def flops(action: Action) -> int:
    """Floating-point operations of the matrix products in `action`, its backward pass included."""
    with FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops()


def resident(field: str) -> float:
    """Resident size of this process in MB: `VmRSS` now, `VmHWM` at its peak (Linux; getrusage would
    count the parent's peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines)
    return int(found[field].split()[0]) / 1024


def fresh(*arguments: str) -> float:
    """The number that the running benchmark prints when started again with these arguments.

    Without the Makefile's settings of glibc, which keep freed memory and so hide what was in use.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    command = [sys.executable, sys.argv[0], *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return float(done.stdout)


def smollm2(blocks: int = 30) -> LlamaConfig:
    """SmolLM2-135M's shape."""
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=blocks,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )


def dinov2_small(grid: int = GRID) -> Dinov2Config:
    """DINOv2-S's shape."""
    return Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=14 * grid
    )


def clip_base() -> CLIPVisionConfig:
    """CLIP-B/16's shape."""
    return CLIPVisionConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        image_size=16 * GRID,
        patch_size=16,
    )


def samples(image_tokens: int = GRID * GRID, rows: int = 1) -> dict[str, Tensor]:
    """Rows of a short prompt, an image, a question and a labelled answer."""
    ids = torch.randint(8, 1000, (rows, image_tokens + TEXT))
    ids[:, 4 : 4 + image_tokens] = IMAGE_ID
    labels = torch.full_like(ids, -100)
    labels[:, -LABELLED:] = ids[:, -LABELLED:]
    return {"input_ids": ids, "labels": labels}


def strategy(name: str, grid: int = GRID) -> tuple[FusionVLM, dict[str, Any]]:
    """A strategy with its default options and example layers, for DINOv2-S and SmolLM2-135M, and
    its inputs without the text: features, as if cached, and a sentence's embedding if read."""
    vision = dinov2_small(grid)
    layers = FUSIONS[name][1].example(vision.num_hidden_layers)
    model = FusionVLM.compose(vision, smollm2(), layers, {"name": name}, image_token_id=IMAGE_ID)
    with torch.no_grad():
        given: dict[str, Any] = {
            "features": model.encode_images(torch.randn(1, 3, 14 * grid, 14 * grid))
        }
    if model.instruction.guided and not model.instruction.made_by_model:
        given["instruction"] = torch.randn(1, model.fusion.config.sentence_width)
    return model, given


def visual_tokens(model: FusionVLM, grid: int = GRID) -> int:
    """Number of tokens that replace an image."""
    layers = len(model.config.vision_layers)
    return model.fusion.num_tokens(model.fusion.config, (grid, grid), layers)


def training_step(model: nn.Module, trained: Sequence[nn.Parameter], **inputs: Any) -> Action:
    """Forward, backward and an AdamW step of `trained`; everything else is frozen."""
    model.train().requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def step() -> None:
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
