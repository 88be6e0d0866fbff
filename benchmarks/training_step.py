"""What a training step costs, each time as a ratio of two things timed in one run.

* `concat` against the stock LLaVA of transformers, which joins the same layers with the same
  projector: the same weights, one sample of 100 image tokens and 24 of text with 6 labels (the
  proportions of LLaVA's samples; four for the whole LLM), forward, backward and AdamW. Both compute
  the same loss, which is checked first. The stock model runs its whole tower and computes logits
  everywhere; what is saved is the tower above layer 9 of 12 and the head at unlabelled positions,
  and with cached features the whole tower. The models have the shapes of CLIP-B/16 and
  SmolLM2-135M: the larger the LLM beside its vocabulary and the encoder, the less there is to save,
  so the operations are counted for LLaVA-1.5-7B too, with layers 6, 12 and 18 of 24: nothing of
  that size is run;
* logits at labelled positions only, against logits everywhere (a step with a frozen LLM).

What a cut of the encoder saves by itself is in tower.py.

The limit is the ratio of floating-point operations of matrix products, as torch counts them.
"""

from typing import Any, cast

import torch
from _measure import (
    GRID,
    IMAGE_ID,
    LABELLED,
    TEXT,
    Action,
    Ratio,
    clip_base,
    flops,
    ratio,
    ratio_of,
    samples,
    smollm2,
    times,
    training_step,
)
from peft import LoraConfig, inject_adapter_in_model
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import Dinov2Config, LlavaConfig, LlavaForConditionalGeneration

from layerfuse import FusionVLM
from layerfuse.cost.flops import TEXT_TOKENS, count, text_config, vision_config
from layerfuse.cost.flops import flops as count_flops
from layerfuse.cost.fusions_table import KNOWN
from layerfuse.model.config import configure

LAYERS = [3, 6, 9]
ROUNDS = 3
AIM = 0.75
CASES = {"frozen": "frozen LLM", "lora": "LoRA", "full": "whole LLM"}


def stock() -> Any:
    config = LlavaConfig(
        vision_config=clip_base(),
        text_config=smollm2(),
        image_token_index=IMAGE_ID,
        vision_feature_layer=LAYERS,
        tie_word_embeddings=True,
    )
    return LlavaForConditionalGeneration(config)


def ours() -> FusionVLM:
    fusion = {"name": "concat"}
    return FusionVLM.compose(clip_base(), smollm2(), LAYERS, fusion, image_token_id=IMAGE_ID)


def same_weights(model: FusionVLM, other: Any) -> None:
    """Copy the stock model's weights; the blocks that the cut tower lacks are left out."""
    parts = other.model
    state = parts.vision_tower.state_dict()
    kept = model.vision_tower.tower.state_dict()
    model.vision_tower.tower.load_state_dict({name: state[name] for name in kept})
    projector = cast(nn.Module, model.fusion.projector)
    projector.load_state_dict(parts.multi_modal_projector.state_dict(), strict=False)  # no scale
    model.language_model.model.load_state_dict(parts.language_model.state_dict())


def inputs(rows: int = 1) -> tuple[torch.Tensor, dict[str, Any]]:
    """Pixels, and text with labels."""
    return torch.randn(rows, 3, 16 * GRID, 16 * GRID), samples(rows=rows)


def trained(model: Any, case: str) -> list[nn.Parameter]:
    """The parameters that train; LoRA's adapters, which change nothing at first, are made here."""
    if isinstance(model, FusionVLM):
        projector, decoder = model.fusion, model.get_decoder()
    else:
        projector, decoder = model.model.multi_modal_projector, model.model.language_model
    found = list(projector.parameters())
    if case == "full":
        found += decoder.parameters()
    if case == "lora":
        inject_adapter_in_model(LoraConfig(r=16, target_modules="all-linear"), decoder)
        found += [p for name, p in decoder.named_parameters() if "lora_" in name]
    return found


def against_stock(case: str) -> tuple[dict[str, Ratio], dict[str, float]]:
    """Time and floating-point operations of our step over those of the stock model's."""
    torch.manual_seed(0)
    other, model = stock(), ours()
    same_weights(model, other)
    pixels, text = inputs(4 if case == "full" else 1)
    with torch.no_grad():
        features = model.encode_images(pixels)
    images = {"pixels": {"pixel_values": pixels}, "cached features": {"features": features}}
    own = trained(model, case)
    steps = {kind: training_step(model, own, **text, **given) for kind, given in images.items()}
    pixels_and_text = {"pixel_values": pixels, "use_cache": False, **text}
    steps["stock"] = training_step(other, trained(other, case), **pixels_and_text)
    same_loss(model, other, **pixels_and_text)
    counted = {kind: flops(step) for kind, step in steps.items()}
    found = times(steps, ROUNDS, warm_up=0)  # counting was the warm-up
    return (
        {kind: ratio_of(found[kind], found["stock"]) for kind in images},
        {kind: counted[kind] / counted["stock"] for kind in images},
    )


def one_step(kind: str, case: str, rows: int = 2) -> None:
    """A step of `ours` or of `stock` alone, whose memory memory.py measures."""
    pixels, text = inputs(rows)
    model = {"ours": ours, "stock": stock}[kind]()
    given = {"pixel_values": pixels, "use_cache": False, **text}
    training_step(model, trained(model, case), **given)()


def same_loss(model: FusionVLM, other: Any, **given: Any) -> None:
    """Raises AssertionError if the losses differ."""
    with torch.no_grad():
        one, two = (float(m(**given).loss) for m in (model, other))
    if abs(one - two) > 1e-4:
        raise AssertionError(f"loss {one:.6f} here, {two:.6f} in the stock model")


def limit_at_7b(times_llm: int, cached: bool) -> float:
    """Our operations over the stock model's at LLaVA-1.5-7B's shape. Backward costs as much as
    forward through a frozen LLM (`times_llm` 2), twice as much if it trains (3)."""
    vision, text = vision_config(KNOWN["clip-l-336"]), text_config(KNOWN["vicuna-7b"])
    costs = [
        count_flops(count(configure(vision, text, layers, {"name": "concat"}))[0], 336)
        for layers in ([6, 12, 18], [6, 12, 24])
    ]
    cut, whole = (cost["vision"] for cost in costs)
    tokens = (336 // 14) ** 2 + TEXT_TOKENS
    unlabelled = tokens - TEXT_TOKENS * LABELLED // TEXT
    head = 2 * unlabelled * text.vocab_size * text.hidden_size
    trained = 3 * costs[0]["fusion"]
    stock = whole + trained + times_llm * costs[0]["llm"]
    return (stock - times_llm * head - (whole if cached else whole - cut)) / stock


def logits_ratio() -> Ratio:
    """SmolLM2-135M's shape, eight blocks of it, 8 rows of 64 tokens with 12 labels each."""
    vision = Dinov2Config(hidden_size=96, num_hidden_layers=2, num_attention_heads=3, image_size=56)
    model = FusionVLM.compose(vision, smollm2(8), [2], {"name": "single"}, image_token_id=IMAGE_ID)
    model.requires_grad_(False)
    model.fusion.requires_grad_(True)
    ids = torch.randint(8, 1000, (8, 64))
    ids[:, :16] = IMAGE_ID
    labels = torch.full_like(ids, -100)
    labels[:, 40:52] = ids[:, 40:52]
    features = model.encode_images(torch.randn(8, 3, 56, 56))

    def step(sparse: bool) -> Action:
        def run() -> None:
            model.train(sparse)
            model(input_ids=ids, features=features, labels=labels).loss.backward()
            model.zero_grad()

        return run

    return ratio(step(True), step(False))


def main() -> None:
    table = Table("what", "ratio of times", "limit", "aim, at most", box=None)
    for case, name in CASES.items():
        measured, limits = against_stock(case)
        for kind, found in measured.items():
            what = f"{kind} / stock LLaVA, {name}"
            table.add_row(what, str(found), f"{limits[kind]:.2f}", f"{AIM:.2f}")
    table.add_row("labelled logits / all logits", str(logits_ratio()))
    for name, passes in (("frozen LLM", 2), ("whole LLM", 3)):
        for kind, cached in (("pixels", False), ("cached features", True)):
            what = f"{kind} / stock LLaVA, {name}, at 7B"
            table.add_row(what, "not run", f"{limit_at_7b(passes, cached):.2f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
