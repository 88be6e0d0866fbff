"""What a look at all layers costs beyond the encoder's forward pass, as ratios within one run.

DINOv2-S at 224 pixels with its real weights, the default pictures, batches of 16. `pass`: all-pairs
cosine and biased and debiased CKA, over tokens and over pictures, of all 13 layers. pytorch-cka's
loader path gives CKA over pictures alone.
"""

import sys
from collections.abc import Callable

import numpy as np
import torch
from _measure import fresh, ratio_of, resident, times
from cka import compute_cka
from rich.console import Console
from rich.table import Table

from layerfuse.hardware import DTYPES, native_dtype
from layerfuse.look.accumulate import LayerStatistics, alignment
from layerfuse.look.pictures import find_pictures
from layerfuse.look.similarity_report import LayerSimilarity
from layerfuse.model.pretrained import load_image_processor
from layerfuse.vision.encoder import Encoder, load_encoder

ENCODER, BATCH, PICTURES, ROUNDS = "dinov2-small", 16, 64, 8


def pixel_batches(dtype: torch.dtype) -> list[torch.Tensor]:
    processor = load_image_processor(ENCODER)
    images = [picture.open() for picture in find_pictures(None)[:PICTURES]]
    pixels = processor(images, return_tensors="pt")["pixel_values"].to(dtype)
    return list(pixels.split(BATCH))


@torch.inference_mode()
def bare(encoder: Encoder, batches: list[torch.Tensor]) -> None:
    """The tower alone: only its last layer is read."""
    last = Encoder(encoder.tower, encoder.layers[-1:])
    for pixels in batches:
        last(pixels)


@torch.inference_mode()
def look(encoder: Encoder, batches: list[torch.Tensor]) -> LayerSimilarity:
    found = LayerStatistics(sum(map(len, batches)))
    for pixels in batches:
        found.add([encoder(pixels)], [""] * len(pixels))
    return found.result()


def other(encoder: Encoder, batches: list[torch.Tensor]) -> None:
    data = torch.utils.data.TensorDataset(torch.cat(batches))
    tower, loader = encoder.tower, torch.utils.data.DataLoader(data, BATCH)
    layers = ["embeddings", *[f"encoder.layer.{k}" for k in range(encoder.layers[-1])]]
    compute_cka(tower, tower, loader, layers=layers, progress=False)


@torch.inference_mode()
def all_tokens(encoder: Encoder, batches: list[torch.Tensor]) -> np.ndarray:
    """Debiased CKA over every patch token as one block, in the space of the features."""
    parts = [encoder(pixels).patches for pixels in batches]
    layers = [torch.cat([p.flatten(0, 1) for p in x]).float() for x in zip(*parts, strict=True)]
    layers = [x - x.mean(dim=0) for x in layers]
    n, own = len(layers[0]), torch.stack([x.square().sum(dim=1) for x in layers]).double()
    trace = torch.tensor([[(x.T @ y).double().square().sum() for y in layers] for x in layers])
    both, total = own @ own.T, own.sum(dim=1)
    found = trace - both + total.outer(total) / ((n - 1) * (n - 2)) - 2 * both / (n - 2)
    return alignment((found / (n * (n - 3))).numpy(), (total / n).numpy())


def compare(dtype: str, table: Table) -> LayerSimilarity:
    encoder, batches = load_encoder(ENCODER, DTYPES[dtype]), pixel_batches(DTYPES[dtype])
    actions: dict[str, Callable[[], object]] = {
        "bare forward": lambda: bare(encoder, batches),
        "pass": lambda: look(encoder, batches),
    }
    if dtype == "float32":
        actions["pytorch-cka"] = lambda: other(encoder, batches)
    native = dtype in ("float32", native_dtype())  # else emulated, many times slower
    found = times(actions, ROUNDS if native else 1)
    for one, two in (
        ("pass", "bare forward"),
        ("pytorch-cka", "bare forward"),
        ("pass", "pytorch-cka"),
    ):
        if {one, two} <= set(found):
            table.add_row(f"time, {dtype}: {one} / {two}", str(ratio_of(found[one], found[two])))
    alone, whole = (fresh(what, dtype) for what in ("bare", "look"))
    table.add_row(f"peak memory, {dtype}: pass / bare forward", f"{whole / alone:.2f}")
    return look(encoder, batches)


def main() -> None:
    table = Table("what", "value", box=None)
    exact, rough = compare("float32", table), compare("bfloat16", table)
    encoder, batches = load_encoder(ENCODER), pixel_batches(torch.float32)
    error = np.abs(exact.cka_tokens - all_tokens(encoder, batches))
    table.add_row("token CKA, drawn against all tokens: largest error", f"{error.max():.3f}")
    table.add_row("the same, mean error", f"{error.mean():.3f}")
    for name in ("cosine", "cosine_centred", "cka_tokens", "cka_images"):
        change = np.abs(exact.matrix(name) - rough.matrix(name)).max()
        table.add_row(f"{name}: largest change by bfloat16", f"{change:.4f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        what, name = sys.argv[1:]  # noise for pictures, whose decoding would be the peak
        noise = [torch.randn(BATCH, 3, 224, 224, dtype=DTYPES[name])] * (PICTURES // BATCH)
        {"bare": bare, "look": look}[what](load_encoder(ENCODER, DTYPES[name]), noise)
        print(resident("VmHWM"))
