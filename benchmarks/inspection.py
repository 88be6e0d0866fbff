"""Seconds of `layerfuse inspect` beside those of the answer alone, in one process.

DINOv2-S and SmolLM2-135M with their pretrained weights (`layerfuse models pull`) and an untrained
fusion, as the local recipes have them (16 visual tokens, two blocks) and whole (256, all thirty);
an answer of eight tokens. An untrained fusion is the worst case: most replaced layers change the
answer, and each new one is generated. The bar is three times the answer alone and 2 s, for figures
and a page. Times are the middle of three, of all cores; imports and the loading of the model are
left out.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image
from rich.console import Console
from rich.table import Table

from layerfuse import Answerer, FusionVLM
from layerfuse.explain.contributions import stored_means
from layerfuse.explain.inspection import inspect_reading, save
from layerfuse.explain.reading import read
from layerfuse.explain.redraw import redraw
from layerfuse.look.pictures import photographs
from layerfuse.model.pretrained import compose_processor

NEW, ROUNDS = 8, 3
ENCODER, LLM = "dinov2-small", "smollm2-135m-instruct"
QUESTION = "What is in the picture?"
FACTOR, SECONDS = 3.0, 2.0
"""the bar: so many times the answer alone, and so many seconds"""
STRATEGIES = {"concat": [4, 8, 12], "deformable": [2, 4, 6, 9]}
SIZES: dict[str, dict[str, Any]] = {
    "local recipes": {"token_grid": (4, 4), "llm_blocks": 2},
    "whole": {},
}


def middle_seconds(action: Callable[[], object]) -> float:
    """The middle of the times of an action, after one that warms up."""
    action()
    seconds: list[float] = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def measure(strategy: str, size: dict[str, Any]) -> tuple[float, float]:
    """Seconds of the answer alone, and of its inspection."""
    model = FusionVLM.compose(
        encoder=ENCODER,
        llm=LLM,
        layers=STRATEGIES[strategy],
        fusion={"name": strategy},
        **size,
    ).eval()
    processor = compose_processor(ENCODER, LLM, model.config, chat_template=None, image_token=None)
    # No answer ends early.
    model.generation_config.min_new_tokens = NEW
    answerer = Answerer(model, processor)
    with Image.open(photographs()[0].name) as opened:
        picture = opened.convert("RGB")

    def answer() -> str:
        return answerer.ask([picture], QUESTION, NEW)

    with tempfile.TemporaryDirectory() as folder:

        def inspection() -> list[Path]:
            reading = read(answerer, picture, QUESTION)
            means = stored_means(answerer, reading)
            seen = inspect_reading(answerer, reading, means, name="model", max_new_tokens=NEW)
            save(seen, Path(folder))
            return redraw(Path(folder))

        return middle_seconds(answer), middle_seconds(inspection)


def main() -> None:
    """Print the table."""
    table = Table("models", "strategy", "answer alone, s", "inspect, s", "allowed, s", "met")
    for name, size in SIZES.items():
        for strategy in STRATEGIES:
            answer, inspection = measure(strategy, size)
            allowed = FACTOR * answer + SECONDS
            table.add_row(
                name,
                strategy,
                f"{answer:.2f}",
                f"{inspection:.2f}",
                f"{allowed:.2f}",
                "yes" if inspection <= allowed else "no",
            )
    Console().print(table)


if __name__ == "__main__":
    main()
