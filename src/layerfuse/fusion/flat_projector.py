"""Layers side by side, then Linear, activation, Linear: all that stock LLaVA knows of fusion."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class FlatProjector:
    """P(h_a ⊕ h_b ⊕ ...), with what a strategy does to its layers multiplied into the weights."""

    layers: tuple[int, ...]
    """the layers side by side, each once, ascending"""
    weight_1: Tensor
    """(D, layers · Dv)"""
    bias_1: Tensor
    """(D,)"""
    activation: Literal["gelu", "linear"]
    """between the two Linears; `linear` is none, with the identity as second Linear"""
    weight_2: Tensor
    """(D, D)"""
    bias_2: Tensor
    """(D,)"""
