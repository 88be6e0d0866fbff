"""Peak memory of a training step, each case in a fresh process that builds the model and takes one.

VmHWM of Linux with everything in it: interpreter, libraries (about 0.4 GB), weights. Strategies as
in strategies.py at 256 patches, with cached features, a frozen LLM and AdamW for the fusion;
`concat` and the stock LLaVA as in training_step.py, from pixels.
"""

import sys

from _measure import fresh, resident, samples, strategy, training_step, visual_tokens
from rich.console import Console
from rich.table import Table
from training_step import CASES, one_step

from layerfuse.fusion import FUSIONS

PATCHES = 16  # along a side


def strategy_step(name: str) -> None:
    model, inputs = strategy(name, PATCHES)
    text = samples(visual_tokens(model, PATCHES))
    training_step(model, list(model.fusion.parameters()), **text, **inputs)()


def main() -> None:
    table = Table("step", "peak, MB", "ratio", "to", box=None)
    base = fresh("single")
    table.add_row("single", f"{base:.0f}", "1.00", "single")
    for name in FUSIONS:
        if name != "single":
            peak = fresh(name)
            table.add_row(name, f"{peak:.0f}", f"{peak / base:.2f}", "single")
    for case, title in CASES.items():
        other, own = fresh("stock", case), fresh("ours", case)
        table.add_row(f"stock LLaVA, {title}", f"{other:.0f}")
        table.add_row(f"concat, {title}", f"{own:.0f}", f"{own / other:.2f}", "stock LLaVA")
    Console(width=100).print(table)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        if len(sys.argv) == 3:
            one_step(sys.argv[1], sys.argv[2])
        else:
            strategy_step(sys.argv[1])
        print(resident("VmHWM"))
