"""Deformable attention's core against the one in transformers, on the same inputs in one run.

The published size: 4 images of 24×24 patches, 4 levels, 16 heads of 64 channels, 4 points, float32.
Times are medians of rounds in turns.
Memory is by how much the peak resident size (VmHWM of Linux) during one forward and backward lies
above what the process holds with imports, inputs and a first tiny call; each implementation runs in
a process of its own, so none reuses the other's memory.
"""

import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch
from _measure import fresh, ratio_of, resident, times
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers.models.deformable_detr.modeling_deformable_detr import (
    MultiScaleDeformableAttention,
)

from layerfuse.fusion.deformable import Sizes, deformable_attention

ROUNDS = 9
Core = Callable[[Tensor, Sizes, Tensor, Tensor], Tensor]


def theirs(value: Tensor, shapes: Sizes, locations: Tensor, weights: Tensor) -> Tensor:
    start = torch.zeros(len(shapes), dtype=torch.long)  # only their CUDA kernel reads it
    sizes = torch.tensor(shapes)
    core = MultiScaleDeformableAttention()
    return core(value, sizes, list(shapes), start, locations, weights, 64)


CORES: dict[str, Core] = {"layerfuse": deformable_attention, "transformers": theirs}


def problem(batch: int = 4, grid: int = 24) -> tuple[Sizes, list[Tensor], Tensor]:
    """Level sizes; value, locations about three cells from each query, weights; a gradient."""
    torch.manual_seed(0)
    levels, heads, points, d = 4, 16, 4, 64
    queries = grid * grid
    value = torch.randn(batch, levels * queries, heads, d)
    axis = (torch.arange(grid) + 0.5) / grid
    centers = torch.cartesian_prod(axis, axis).flip(-1).view(1, queries, 1, 1, 1, 2)
    locations = centers + torch.randn(batch, queries, heads, levels, points, 2) * 3 / grid
    weights = torch.randn(batch, queries, heads, levels * points).softmax(dim=-1)
    inputs = [value, locations, weights.unflatten(-1, (levels, points))]
    shapes = ((grid, grid),) * levels
    return shapes, [x.requires_grad_() for x in inputs], torch.randn(batch, queries, heads * d)


def step(name: str, shapes: Sizes, inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """Forward and backward: the output and the gradients of value, locations and weights."""
    value, locations, weights = inputs
    output = CORES[name](value, shapes, locations, weights)
    return [output.detach(), *torch.autograd.grad(output, inputs, upstream)]


@torch.no_grad()
def forward(name: str, shapes: Sizes, inputs: list[Tensor], _: Tensor) -> Tensor:
    value, locations, weights = inputs
    return CORES[name](value, shapes, locations, weights)


def check() -> float:
    """The largest difference between the two, relative to the largest entry of each tensor."""
    given = problem()
    ours, other = (step(name, *given) for name in CORES)
    pairs = zip(ours, other, strict=True)
    worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    if worst > 1e-5:
        raise AssertionError(f"the two differ by {worst:.1e}")
    return worst


def main() -> None:
    given = problem()
    rows: list[tuple[str, Callable[..., object], str]] = [
        ("forward and backward, ms", step, "0.40"),
        ("forward without gradient, ms", forward, "0.15"),
    ]
    table = Table("what", *CORES, "ratio", "aim, at most", box=None)
    for what, run, aim in rows:
        found = times({name: partial(run, name, *given) for name in CORES}, ROUNDS)
        ours, other = (found[name] for name in CORES)
        each = (f"{statistics.median(taken) * 1e3:.0f}" for taken in (ours, other))
        table.add_row(what, *each, str(ratio_of(ours, other)), aim)
    ours, other = (fresh(name) for name in CORES)
    memory = (f"{ours:.0f}", f"{other:.0f}", f"{ours / other:.2f}")
    table.add_row("peak memory of a step, MB", *memory, "0.50")
    console = Console()
    console.print(table)
    console.print(f"same outputs and gradients to {check():.0e} of the largest entry")


if __name__ == "__main__":
    if sys.argv[1:]:
        step(sys.argv[1], *problem(batch=1, grid=2))
        held = problem()
        before = resident("VmRSS")
        step(sys.argv[1], *held)
        print(resident("VmHWM") - before)
    else:
        main()
