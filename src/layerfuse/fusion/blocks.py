"""What several strategies share: building blocks, and where images stand in rows of text."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Normalization = Literal["none", "layernorm", "standardize"]
ProjectorKind = Literal["mlp", "linear"]


class OwnInit(nn.Module):
    """A part with an initialisation beyond that of its Linears and norms."""

    def reset_parameters(self) -> None:
        """Set what differs from PyTorch's defaults, after those were set: gates are closed."""
        for own in self.parameters(recurse=False):
            nn.init.zeros_(own)


class Projector(nn.Module):
    """Maps features to the LLM's width: one Linear, or Linear, GELU, Linear (LLaVA-1.5).

    `scale` is a stored constant, 1 unless calibrated (see `Fusion.calibrate`), so that it can be
    folded into the last Linear.
    """

    def __init__(self, width: int, llm_width: int, kind: ProjectorKind = "mlp") -> None:
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


def weighted(weights: Tensor, layers: list[Tensor]) -> Tensor:
    """Σ_k w_k · layer_k: weights (B or 1, n), n layers of (B, N, D) -> (B, N, D)"""
    pairs = zip(weights.unbind(dim=1), layers, strict=True)
    return torch.stack([w[:, None, None] * x for w, x in pairs]).sum(dim=0)


class GatedCrossAttention(OwnInit):
    """tanh(gate) · CA(norm(hidden), memory), with a gate that starts at zero (Flamingo, I_M).

    Query, key, value and output are Linear without bias; no positions. Keys and values are made
    once per image by `keys_values`, not at every step of decoding.
    """

    def __init__(self, width: int, heads: int, *, norm: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.RMSNorm(width, eps=1e-6) if norm else nn.Identity()
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.gate = nn.Parameter(torch.zeros(1))  # FSDP2 shards no scalars

    def keys_values(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, 2 D)"""
        return torch.cat([self.key(tokens), self.value(tokens)], dim=-1)

    def forward(self, hidden: Tensor, memory: Tensor, seen: Tensor) -> Tensor:
        """hidden (rows, T, D), memory (rows, M, 2 D), seen (rows, T or 1, M) -> (rows, T, D).

        Positions that see nothing get exactly zero.
        """
        nothing = ~seen.any(dim=-1, keepdim=True)
        query = self._split(self.query(self.norm(hidden)))
        key, value = map(self._split, memory.chunk(2, dim=-1))
        mask = (seen | nothing).unsqueeze(1)  # softmax over nothing would not be a number
        mixed = F.scaled_dot_product_attention(query.to(key.dtype), key, value, attn_mask=mask)
        mixed = mixed.transpose(1, 2).flatten(2).masked_fill(nothing, 0)
        return self.output(mixed) * self.gate.tanh()

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class GatedMLP(OwnInit):
    """tanh(gate) · SwiGLU(norm(hidden)), with a gate that starts at zero (I_M)."""

    def __init__(self, width: int, inner: int, *, norm: bool = True) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6) if norm else nn.Identity()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.gate = nn.Parameter(torch.zeros(1))  # FSDP2 shards no scalars

    def forward(self, hidden: Tensor) -> Tensor:
        """(rows, T, D) -> (rows, T, D)"""
        x = self.norm(hidden)
        inner = F.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(inner) * self.gate.tanh()
