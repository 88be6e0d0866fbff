"""Building blocks that several strategies share."""

from typing import Literal

import torch
from torch import Tensor, nn

Normalization = Literal["none", "layernorm", "standardize"]


class Projector(nn.Module):
    """Maps features to the LLM's width: one Linear, or Linear, GELU, Linear (LLaVA-1.5).

    `scale` is a stored constant, 1 unless calibrated (see `Fusion.calibrate`), so that it can be
    folded into the last Linear.
    """

    def __init__(self, width: int, llm_width: int, kind: Literal["mlp", "linear"] = "mlp") -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, llm_width)
        self.act = nn.GELU() if kind == "mlp" else nn.Identity()
        self.linear_2 = nn.Linear(llm_width, llm_width) if kind == "mlp" else nn.Identity()
        self.scale = nn.Buffer(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., llm_width)"""
        return self.linear_2(self.act(self.linear_1(x))) * self.scale


class Standardize(nn.Module):
    """Per-channel (x - mean) / std with stored statistics; the identity until calibrated."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mean = nn.Buffer(torch.zeros(width))
        self.std = nn.Buffer(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)"""
        return (x - self.mean) / self.std


def normalization(kind: Normalization, width: int) -> nn.Module:
    """The module that normalises one layer's patch tokens before they are fused."""
    if kind == "layernorm":
        return nn.LayerNorm(width)
    return Standardize(width) if kind == "standardize" else nn.Identity()
