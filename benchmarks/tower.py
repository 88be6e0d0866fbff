"""The encoder's cost against the depth of the deepest selected layer, as ratios to the whole.

DINOv2-S's shape, 4 images of 224 pixels, no gradient. k / L is what the blocks alone would cost;
the embedding of patches, which every cut keeps, stands beside it in the counted operations.
"""

import torch
from _measure import dinov2_small, flops, ratio_of, times
from rich.console import Console
from rich.table import Table

from layerfuse import Encoder

DEPTH, ROUNDS = 12, 7


@torch.inference_mode()
def main() -> None:
    pixels = torch.randn(4, 3, 224, 224)
    cuts = {k: Encoder.from_config(dinov2_small(16), [k], None).eval() for k in range(2, 13, 2)}
    runs = {str(k): lambda cut=cut: cut(pixels) for k, cut in cuts.items()}
    found, whole = times(runs, ROUNDS), flops(runs[str(DEPTH)])
    table = Table("deepest layer", "time / whole", "operations / whole", "k / L", box=None)
    for k in cuts:
        measured = str(ratio_of(found[str(k)], found[str(DEPTH)]))
        counted = flops(runs[str(k)]) / whole
        table.add_row(str(k), measured, f"{counted:.2f}", f"{k / DEPTH:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
