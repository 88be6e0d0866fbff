"""Eight arms in one study against eight studies of one arm each, start-up and encoding included.

The separate ones do what separate trainings do: start Python, load the models, and encode every
picture at every step. Two of the eight are measured, as they differ only in their layers. The
pictures have 224 pixels (256 patches), as the local DINOv2 processes them, and the 518 of its
training (1,369 patches). Processor seconds of all processes; needs the local models.

Then one run on all cores against one run on each core: seconds of training and test a run, start-up
left out, as the runs themselves measure them.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from layerfuse.local_models.registry import folder, pull

ARMS = [[12], [8], [6], [3, 8], [4, 12], [6, 10], [2, 6, 10], [4, 8, 12]]
MEASURED = (3, 7)
"""of the arms, those that are also run by themselves"""
PICTURES, BATCH = 24, 8
CORES = len(os.sched_getaffinity(0))
STEPS = 12
"""of a run that is timed"""


def recipe(encoder: Path, arms: list[list[int]], cached: bool) -> dict[str, object]:
    """An alignment of one epoch, the LLM frozen, and a small test."""
    train = {"scenes": {"count": PICTURES, "questions": 1}}
    test = {"scenes": {"count": BATCH, "questions": 1, "split": "test"}}
    stage = {"data": train, "learning_rates": {"fusion": 1e-3}, "batch_size": BATCH}
    fusion = {1: "single", 2: "concat", 3: "concat"}
    return {
        "name": "bench",
        "encoder": str(encoder),
        "llm": str(folder("smollm2-135m-instruct")),
        "token_grid": [4, 4],
        "dtype": "float32",
        "cache_features": cached,
        "arms": [{"layers": k, "fusion": {"name": fusion[len(k)]}} for k in arms],
        "stages": {"align": stage},
        "evaluate": {"data": test, "max_new_tokens": 4},
        "keep_models": "none",
        "resources": {"arms_at_once": 1},
    }


def seconds_a_run(work: Path, arms_at_once: int) -> float:
    """Wall-clock seconds per run of a study with as many runs as cores, all cores busy.

    Args:
        work: where the study's folder is made.
        arms_at_once: runs side by side; they share the cores.
    """
    settings: dict[str, Any] = recipe(folder("dinov2-small"), ARMS[:1], cached=True)
    settings["stages"]["align"]["steps"] = STEPS
    settings["seeds"] = list(range(CORES))
    settings["resources"] = {"arms_at_once": arms_at_once}
    name = f"at_once{arms_at_once}"
    file = work / f"{name}.yaml"
    file.write_text(yaml.safe_dump(settings))
    subprocess.run(
        [sys.executable, "-m", "layerfuse", "study", str(file), "--output", str(work / name)],
        env={**os.environ, "OMP_NUM_THREADS": str(CORES), "LAYERFUSE_HOME": str(work / "home")},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    total = 0.0
    for line in (work / name / "results.jsonl").read_text().splitlines():
        total += sum(json.loads(line)["seconds"].values())
    # Runs side by side pass their time together.
    return total / CORES / arms_at_once


def seconds(work: Path, name: str, settings: dict[str, object]) -> float:
    """Processor seconds of `layerfuse study` on a recipe, in a process of its own."""
    file = work / f"{name}.yaml"
    file.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "layerfuse", "study", str(file)]
    environment = {**os.environ, "LAYERFUSE_HOME": str(work / "home"), "OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [*command, "--output", str(work / name)],
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def encoder_at(work: Path, pixels: int) -> Path:
    """The local DINOv2 with an image processor that makes so many pixels."""
    copy = work / f"encoder{pixels}"
    shutil.copytree(folder("dinov2-small"), copy)
    file = copy / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    settings |= {"size": {"shortest_edge": pixels}}
    settings |= {"crop_size": {"height": pixels, "width": pixels}}
    file.write_text(json.dumps(settings))
    return copy


if __name__ == "__main__":
    for model in ("dinov2-small", "smollm2-135m-instruct"):
        pull(model)
    table = Table("pixels", "study of 8 arms / 8 studies", "aim, at most", box=None)
    for pixels in (224, 518):
        with tempfile.TemporaryDirectory() as name:
            work = Path(name)
            encoder = encoder_at(work, pixels)
            alone = [
                seconds(work, f"alone{k}", recipe(encoder, [ARMS[k]], False)) for k in MEASURED
            ]
            together = seconds(work, "together", recipe(encoder, ARMS, True))
        apart = len(ARMS) * sum(alone) / len(alone)
        table.add_row(str(pixels), f"{together / apart:.2f}", "0.35")
    Console().print(table)
    with tempfile.TemporaryDirectory() as name:
        alone = seconds_a_run(Path(name), 1)
        at_once = seconds_a_run(Path(name), CORES)
    Console().print(
        f"a run on each of {CORES} cores / a run on all of them: {at_once / alone:.2f} "
        f"({at_once:.1f} s / {alone:.1f} s a run)"
    )
