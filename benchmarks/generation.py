"""Tokens per second of greedy generation against the bare LLM, as ratios within one run.

The bare LLM has the same shape and a prefix of as many text tokens. Each generation makes the same
number of new tokens, one of a strategy next to one of the bare LLM; the moments at which they come
separate decoding from the prompt. `whole` starts from cached features; the encoder, about the same
for all, is not in it. SmolLM2-135M and DINOv2-S in shape, default options, example layers.
"""

import time
from typing import Any

import torch
from _measure import ratio_of, samples, smollm2, strategy, visual_tokens
from rich.console import Console
from rich.table import Table
from transformers import LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList

from layerfuse.fusion import FUSIONS

NEW, ROUNDS = 12, 4
AIM, AIM_OF = 0.95, {"inject_cross": 0.85}


class Clock(StoppingCriteria):
    """Notes when each token is ready and stops nothing."""

    def __init__(self) -> None:
        self.moments = [time.process_time()]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.moments.append(time.process_time())
        return torch.zeros(len(input_ids), dtype=torch.bool)


@torch.inference_mode()
def generate(model: Any, ids: torch.Tensor, **inputs: Any) -> tuple[float, float]:
    """Tokens per second while decoding, and of the whole."""
    clock = Clock()
    made = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([clock]),
        **inputs,
    )
    if made.shape[1] - ids.shape[1] != NEW:
        raise AssertionError(f"{made.shape[1] - ids.shape[1]} new tokens instead of {NEW}")
    start, first, *_, last = clock.moments
    return (NEW - 1) / (last - first), NEW / (last - start)


def measure() -> dict[str, tuple[list[float], list[float]]]:
    """Per strategy, speed over the bare LLM's in each round: decoding, and whole."""
    bare = LlamaForCausalLM(smollm2()).eval()
    models = {name: strategy(name) for name in FUSIONS}
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in models}
    for turn in range(ROUNDS + 1):
        for name, (model, inputs) in models.items():
            ids = samples(visual_tokens(model))["input_ids"]
            pair = [(model.eval(), ids, inputs), (bare, torch.randint(8, 1000, ids.shape), {})]
            speeds = [generate(m, x, **given) for m, x, given in pair[:: 1 - 2 * (turn % 2)]]
            ours, reference = speeds[:: 1 - 2 * (turn % 2)]
            if turn:
                for i in range(2):
                    found[name][i].append(ours[i] / reference[i])
    return found


def main() -> None:
    found = measure()
    table = Table("strategy", "decoding / bare", "whole / bare", "aim, at least", box=None)
    for name, (decoding, whole) in found.items():
        ones = [1.0] * ROUNDS
        aim = f"{AIM_OF.get(name, AIM):.2f}"
        table.add_row(name, str(ratio_of(decoding, ones)), str(ratio_of(whole, ones)), aim)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
