"""What a training step of each strategy costs beside `single`'s, as ratios within one run.

The step is that of the first stage, where a strategy weighs most: features are cached, the LLM is
frozen, the fusion trains with AdamW. SmolLM2-135M and DINOv2-S in shape, default options, example
layers, 100 patches with 24 tokens of text. Sentences are embedded beforehand.

`time / single` is the whole step; where other work shares the caches it cannot tell hundredths
apart. `by the fusion` can: 1 + what the fusion alone takes longer than `single`'s, forward and
backward, as a share of `single`'s step; it leaves out additional tokens (token_concat) and what is
added inside the LLM (inject_*). Limits are ratios of operations of matrix products as torch counts
them, of this step and, at LLaVA-1.5-7B's shape, of a forward pass of fusion and LLM.
"""

import statistics

import torch
from _measure import Action, flops, ratio_of, samples, strategy, times, training_step
from _measure import visual_tokens as count_tokens
from rich.console import Console
from rich.table import Table

from layerfuse.cost.flops import count, text_config, vision_config
from layerfuse.cost.flops import flops as forward_flops
from layerfuse.cost.fusions_table import KNOWN, rows
from layerfuse.fusion import FUSIONS
from layerfuse.model.config import configure

ROUNDS, FUSION_ROUNDS = 5, 15
DIRECT = 1.03
AIMS = {"deformable": 1.15, "inject_cross": 1.25}


def actions(name: str) -> tuple[Action, Action]:
    """The step, and forward and backward of the fusion alone."""
    model, inputs = strategy(name)
    text = samples(count_tokens(model))
    step = training_step(model, list(model.fusion.parameters()), **text, **inputs)
    width = model.config.text_config.hidden_size
    read = torch.randn(1, width) if model.instruction.made_by_model else inputs.get("instruction")

    def alone() -> None:
        visual = model.fuse(inputs["features"], read)
        parts = [visual.tokens, *visual.memory.values()]
        torch.stack([part.sum() for part in parts]).sum().backward()
        model.zero_grad()

    return step, alone


def at_7b() -> dict[str, float]:
    """Operations of each strategy's forward pass at LLaVA-1.5-7B's shape, over `single`'s."""
    vision, text = vision_config(KNOWN["clip-l-336"]), text_config(KNOWN["vicuna-7b"])
    model, _ = count(configure(vision, text, [-2], {"name": "single"}))
    cost = forward_flops(model, vision.image_size)
    base = cost["fusion"] + cost["llm"]
    found, _ = rows(vision, text)
    return {row.name: 1 + row.flops / base for row in found}


def aim(name: str) -> str:
    limit = DIRECT if "direct" in FUSIONS[name][1].kind else AIMS.get(name)
    return "" if limit is None else f"{limit:.2f}"


def main() -> None:
    made = {name: actions(name) for name in FUSIONS}
    steps = {name: step for name, (step, _) in made.items()}
    counted = {name: flops(step) for name, step in steps.items()}
    whole = times(steps, ROUNDS, warm_up=0)  # counting was the warm-up
    fusions = times({name: alone for name, (_, alone) in made.items()}, FUSION_ROUNDS)
    own = {name: statistics.median(taken) for name, taken in fusions.items()}
    base, large = statistics.median(whole["single"]), at_7b()
    columns = ("kind", "time / single", "aim, at most", "by the fusion", "limit", "limit at 7B")
    table = Table("strategy", *columns, box=None)
    for name in made:
        numbers = (1 + (own[name] - own["single"]) / base, counted[name] / counted["single"])
        shown = (f"{number:.3f}" for number in (*numbers, large[name]))
        measured = str(ratio_of(whole[name], whole["single"]))
        table.add_row(name, FUSIONS[name][1].kind, measured, aim(name), *shown)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
