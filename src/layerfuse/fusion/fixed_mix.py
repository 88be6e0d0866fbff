"""Strategies that are a projector of layers side by side in other words, and fold into one.

A strategy whose projector reads fixed sums of layers folds into a `FlatProjector`. With parts j,
weights a of layers k in them, and norms that are affine, n_k(h) = h A_k + c_k,

    W · (⊕_j Σ_k a_jk n_k(h_k)) + b = Σ_k M_k A_kᵀ h_k + (b + Σ_k M_k c_k),   M_k = Σ_j a_jk W_j

where W_j are the columns of W that read part j.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layerfuse.errors import LayerfuseError
from layerfuse.fusion.base import Fusion, Options
from layerfuse.fusion.blocks import Projector, Standardize
from layerfuse.fusion.flat_projector import FlatProjector
from layerfuse.fusion.whitening import Whiten

Part = dict[int, float]
"""a part of what a projector reads: the weight of each layer in a sum"""


class FixedMix(Fusion[Options]):
    """A strategy whose projector reads fixed sums of layers, and which therefore folds.

    A subclass implements `parts`.
    """

    projector: Projector

    def parts(self) -> list[Part]:
        """What the projector reads, in the order of its columns.

        Raises:
            LayerfuseError: if the options make it more than fixed sums.
        """
        raise NotImplementedError


def flat_projector(fusion: Fusion[Options]) -> FlatProjector:
    """What a trained strategy is in stock LLaVA, in float64.

    Args:
        fusion: the strategy with its weights.

    Raises:
        LayerfuseError: if it is more than a projector of fixed sums of layers; with the reason.
    """
    name = type(fusion).__name__
    if not isinstance(fusion, FixedMix):
        raise LayerfuseError(
            f"{name} ({fusion.kind}) is more than a projector of layers side by side, which is all "
            "that stock LLaVA knows"
        )
    width = fusion.shapes.vision_width
    projector = fusion.projector
    first = projector.linear_1.weight.detach().double()
    bias = projector.linear_1.bias.detach().double()

    # M_k: what reads each layer, over all parts in which it stands
    columns: dict[int, Tensor] = {}
    for place, part in enumerate(fusion.parts()):
        reading = first[:, place * width : (place + 1) * width]
        for layer, weight in part.items():
            columns[layer] = columns.get(layer, 0) + weight * reading

    layers = tuple(sorted(columns))
    folded: list[Tensor] = []
    for layer in layers:
        norm = as_affine(fusion.norms[str(layer)], width, first.device)
        # rows of A are channels before the norm: h A, read by M, is h (A Mᵀ)
        folded.append(columns[layer] @ norm.matrix.T)
        bias = bias + columns[layer] @ norm.offset

    scale = projector.scale.double()
    weight_1 = torch.cat(folded, dim=1)
    if isinstance(projector.linear_2, nn.Linear):
        weight_2 = projector.linear_2.weight.detach().double() * scale
        bias_2 = projector.linear_2.bias.detach().double() * scale
        return FlatProjector(layers, weight_1, bias, "gelu", weight_2, bias_2)
    return FlatProjector(
        layers,
        weight_1 * scale,
        bias * scale,
        "linear",
        weight_2=torch.eye(len(bias), dtype=torch.float64, device=bias.device),
        bias_2=torch.zeros_like(bias),
    )


@dataclass(frozen=True)
class Affine:
    """h -> h A + c"""

    matrix: Tensor
    """A, (Dv, Dv)"""
    offset: Tensor
    """c, (Dv,)"""


def as_affine(norm: nn.Module, width: int, device: torch.device) -> Affine:
    """What a layer's norm does, as an affine map in float64.

    Args:
        norm: of one layer, as `normalization` makes it.
        width: channels of a patch token.
        device: where the map is wanted.

    Raises:
        LayerfuseError: for a norm that depends on each token.
    """
    if isinstance(norm, Standardize):
        inverse = 1 / norm.std.double()
        return Affine(torch.diag(inverse), -norm.mean.double() * inverse)
    if isinstance(norm, Whiten):
        matrix = norm.matrix.double()
        return Affine(matrix, -norm.mean.double() @ matrix)
    if isinstance(norm, nn.Identity):
        return Affine(
            torch.eye(width, dtype=torch.float64, device=device),
            torch.zeros(width, dtype=torch.float64, device=device),
        )
    raise LayerfuseError(
        "normalize: layernorm divides every token by its own spread, which no matrix does"
    )
