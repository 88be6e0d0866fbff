"""What two savings are worth, each as a ratio of two things timed in one run.

* logits at labelled positions only, against logits everywhere (a step with a frozen LLM);
* an encoder cut above layer k, against the whole encoder.
"""

import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from transformers import Dinov2Config, LlamaConfig

from layerfuse import Encoder, FusionVLM

ROUNDS = 5
IMAGE_ID = 7


def ratio(one: Callable[[], object], other: Callable[[], object]) -> float:
    """Median time of `one` over that of `other`, taken in turns after a warm-up."""
    times: dict[int, list[float]] = {0: [], 1: []}
    for turn in range(2 * (ROUNDS + 1)):
        started = time.perf_counter()
        (one, other)[turn % 2]()
        if turn > 1:
            times[turn % 2].append(time.perf_counter() - started)
    return statistics.median(times[0]) / statistics.median(times[1])


def logits_ratio() -> float:
    """SmolLM2-135M's shape, eight blocks of it, 8 rows of 64 tokens with 12 labels each."""
    text = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    vision = Dinov2Config(hidden_size=96, num_hidden_layers=2, num_attention_heads=3, image_size=56)
    model = FusionVLM.compose(vision, text, [2], {"name": "single"}, image_token_id=IMAGE_ID)
    model.requires_grad_(False)
    model.fusion.requires_grad_(True)
    ids = torch.randint(8, 1000, (8, 64))
    ids[:, :16] = IMAGE_ID
    labels = torch.full_like(ids, -100)
    labels[:, 40:52] = ids[:, 40:52]
    features = model.encode_images(torch.randn(8, 3, 56, 56))

    def step(sparse: bool) -> None:
        model.train(sparse)
        model(input_ids=ids, features=features, labels=labels).loss.backward()
        model.zero_grad()

    return ratio(lambda: step(True), lambda: step(False))


@torch.inference_mode()
def tower_ratio(layer: int, depth: int = 12) -> float:
    """DINOv2-S's shape, 4 images of 224 pixels."""
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=depth, num_attention_heads=6, image_size=224
    )
    whole, cut = (Encoder.from_config(config, [k], None).eval() for k in (depth, layer))
    pixels = torch.randn(4, 3, 224, 224)
    return ratio(lambda: cut(pixels), lambda: whole(pixels))


if __name__ == "__main__":
    table = Table("what", "ratio of times", "arithmetic alone", box=None)
    table.add_row("labelled logits / all logits", f"{logits_ratio():.2f}", "")
    for layer in (4, 8):
        table.add_row(
            f"encoder cut above layer {layer} of 12 / whole",
            f"{tower_ratio(layer):.2f}",
            f"{layer / 12:.2f}",
        )
    Console().print(table)
