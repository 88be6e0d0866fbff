"""What each layer makes of a picture, before and after fusion, as maps over its grid."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from layerfuse.evaluate.answer import Answerer
from layerfuse.explain.reading import EncodedPrompt
from layerfuse.fusion import Deformable

COLOURS = 3
"""principal components that become red, green and blue"""
SPREAD = (0.02, 0.98)
"""the quantiles of a component that become the darkest and the brightest colour"""
MOST_CELLS = 16
"""rows and columns of the grid on which patches are compared with each other, at most"""


@dataclass(frozen=True)
class FeatureMap:
    """One vector a cell of the picture's grid.

    Attributes:
        name: what it is, such as `layer 4`.
        vectors: (rows · columns, D), as they come, in float32 on the CPU.
        grid: (rows, columns)
        shared: (rows, columns, 3) colours in 0..1 by the components of all layers together; None
            where the vectors are no layer's.
        own: (rows, columns, 3) colours by its own components.
        norms: (rows, columns)
    """

    name: str
    vectors: Tensor
    grid: tuple[int, int]
    shared: Tensor | None
    own: Tensor
    norms: Tensor

    def cosines(self) -> Tensor:
        """Compare every cell with every other.

        Returns:
            (cells, cells) cosines, on a grid of at most `MOST_CELLS` rows and columns: larger ones
            are averaged to it.
        """
        rows, columns = self.compared_grid
        maps = self.vectors.mT.unflatten(-1, self.grid)
        pooled = F.adaptive_avg_pool2d(maps, (rows, columns)).flatten(1).mT
        directions = F.normalize(pooled, dim=-1)
        return directions @ directions.mT

    @property
    def compared_grid(self) -> tuple[int, int]:
        """(rows, columns) of `cosines`."""
        return min(self.grid[0], MOST_CELLS), min(self.grid[1], MOST_CELLS)


@torch.inference_mode()
def feature_maps(answerer: Answerer, reading: EncodedPrompt) -> list[FeatureMap]:
    """Map what each layer and the fusion make of a picture.

    Args:
        answerer: the model.
        reading: the picture.

    Returns:
        The layers, ascending, then what the strategy makes of them: of `deformable` the mean over
        layers of what it reads, its query and its output before the projector (Fig. 5 of MMFuser,
        2410.11829); then the visual tokens, and for internal strategies what goes into each block.
    """
    grid = reading.grid
    layers: dict[str, Tensor] = {}
    for layer, patches in zip(reading.features.layers, reading.features.patches, strict=True):
        layers[f"layer {layer}"] = patches[0].float().cpu()
    fused: dict[str, Tensor] = {}
    fusion: Any = answerer.model.fusion
    if isinstance(fusion, Deformable):
        looked_up = fusion.look_up(reading.features.to(answerer.model.fusion_dtype))
        # (levels · N, D) -> (levels, N, D)
        values = looked_up.values[0].unflatten(0, (-1, grid[0] * grid[1]))
        fused["what is read (mean of layers)"] = values.mean(dim=0).float().cpu()
        fused["query"] = looked_up.query[0].float().cpu()
        fused["output"] = looked_up.output[0].float().cpu()
    # A cell is the mean of the visual tokens that stand for it: (cells, N') @ (N', D)
    of_cells = reading.cover.mT / reading.cover.sum(dim=0)[:, None]
    fused["visual tokens"] = of_cells @ reading.fused.tokens[0].float().cpu()
    for block, memory in reading.fused.memory.items():
        fused[f"for LLM block {block}"] = memory[0].float().cpu()

    shared = _shared_colours(list(layers.values()))
    maps: list[FeatureMap] = []
    for (name, vectors), colours in zip(layers.items(), shared, strict=True):
        maps.append(_map(name, vectors, grid, colours))
    for name, vectors in fused.items():
        maps.append(_map(name, vectors, grid, None))
    return maps


def _map(name: str, vectors: Tensor, grid: tuple[int, int], shared: Tensor | None) -> FeatureMap:
    """A feature map with its own colours and norms."""
    if shared is not None:
        shared = shared.unflatten(0, grid)
    own = colours_of(vectors - vectors.mean(dim=0))
    norms = vectors.norm(dim=-1)
    return FeatureMap(name, vectors, grid, shared, own.unflatten(0, grid), norms.unflatten(0, grid))


def _shared_colours(layers: list[Tensor]) -> list[Tensor]:
    """The colours of all layers by one basis: n times (N, D) -> n times (N, 3)."""
    alike: list[Tensor] = []
    for vectors in layers:
        centred = vectors - vectors.mean(dim=0)
        # Layers differ in their norms by orders of magnitude: the largest would decide alone.
        alike.append(centred / centred.square().mean().sqrt().clamp_min(1e-12))
    colours = colours_of(torch.cat(alike))
    return list(colours.split([len(vectors) for vectors in layers]))


def colours_of(vectors: Tensor) -> Tensor:
    """Colours by the first principal components.

    Args:
        vectors: (N, D) without their mean.

    Returns:
        (N, 3) in 0..1. Components that the vectors lack are grey.
    """
    # Any: torch does not type what `svd` returns
    linalg: Any = torch.linalg
    _, singular, directions = linalg.svd(vectors, full_matrices=False)
    count = min(COLOURS, int((singular > 1e-6 * singular.max()).sum()))
    directions = directions[:count]
    # The sign of a component is arbitrary: its largest entry becomes positive.
    largest = directions.abs().argmax(dim=1, keepdim=True)
    directions = directions * directions.gather(1, largest).sign()
    scores = vectors @ directions.mT
    low, high = torch.quantile(scores, torch.tensor(SPREAD), dim=0)
    bright = (scores - low) / (high - low).clamp_min(1e-12)
    grey = torch.full((len(vectors), COLOURS - count), 0.5)
    return torch.cat([bright.clamp(0, 1), grey], dim=1)
