"""A projection, not a measurement: LLaVA-1.5-7B on 8 A100, from operations and bytes.

Operations are counted by torch on the meta device. One number is taken from outside: the share of
the peak that training reaches, fitted to the published times of LLaVA-1.5-7B on 8 A100 (3.5 h and
10 h), whose own rows show how well one share describes both stages.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from layerfuse.cost.flops import TEXT_TOKENS, count, flops, text_config, vision_config
from layerfuse.cost.fusions_table import KNOWN
from layerfuse.fusion import FUSIONS
from layerfuse.model.config import configure

GPUS, PEAK, REACHED = 8, 312e12, 0.40
"""bfloat16 operations a second of an A100, and the share that training reaches"""
LINK = 300e9
"""bytes a second between the GPUs of a machine, each way"""
PIXELS, TOKENS = 336, 576


@dataclass(frozen=True)
class Stage:
    """One stage: samples, samples in a step, mean number of text tokens (assumed), passes."""

    name: str
    samples: int
    batch: int
    text: int
    llm: int
    """forward passes' worth of work in the LLM: forward, recomputation, gradients of activations,
    and of weights where they train"""
    published: float
    """hours on 8 A100"""


STAGES = (
    Stage("align", 558_128, 256, 32, 3, 3.5),
    Stage("finetune", 665_298, 128, 300, 4, 10.0),
)


def hours(stage: Stage, cost: Mapping[str, float], extra_tokens: int, cached: bool) -> float:
    """Time for the operations, at the share that training reaches."""
    per_token = cost["llm"] / (TOKENS + extra_tokens + TEXT_TOKENS)
    llm = stage.llm * per_token * (TOKENS + extra_tokens + stage.text)
    one = llm + 3 * cost["fusion"] + (0 if cached else cost["vision"])
    return stage.samples * one / (GPUS * PEAK * REACHED) / 3600


def row(name: str, layers: object) -> tuple[str, ...]:
    vision, text = vision_config(KNOWN["clip-l-336"]), text_config(KNOWN["vicuna-7b"])
    config = configure(vision, text, layers, {"name": name})  # pyright: ignore[reportArgumentType]
    model, _ = count(config)
    grid = model.vision_tower.grid(PIXELS, PIXELS)
    extra = model.fusion.num_tokens(model.fusion.config, grid, len(config.vision_layers)) - TOKENS
    cost = flops(model, PIXELS)
    cells = [f"{hours(s, cost, extra, cached):.1f}" for s in STAGES for cached in (False, True)]
    gigabytes = len(config.vision_layers) * TOKENS * vision.hidden_size * 2 * 558_128 / 1e9
    return name, ",".join(map(str, config.vision_layers)), *cells, f"{gigabytes:,.0f}"


if __name__ == "__main__":
    table = Table(box=None)
    heads = ("align, h", "cached", "finetune, h", "cached", "cache for align, GB")
    for head in ("strategy", "layers", *heads):
        table.add_column(head)
    table.add_row("published LLaVA-1.5", "23", "3.5", "", "10.0", "", "")
    for name in FUSIONS:
        table.add_row(*row(name, FUSIONS[name][1].example(24)))
    Console(width=110).print(table)
    weights = 6.74e9
    moved = weights * (2 + 2 + 4) * (GPUS - 1) / GPUS
    step = hours(STAGES[1], {"llm": 8.67e12, "fusion": 0, "vision": 0}, 0, True)
    step *= 3600 * STAGES[1].batch / STAGES[1].samples
    print(
        f"FSDP2, finetune: {16 * weights / GPUS / 1e9:.1f} GB a GPU for weights, gradients and "
        f"Adam; {moved / 1e9:.0f} GB over the links a step ({moved / LINK:.2f} s) against "
        f"{step:.1f} s of arithmetic"
    )
