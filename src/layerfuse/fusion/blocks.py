"""The building blocks that several strategies share."""

import hashlib
from collections.abc import Generator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerfuse.errors import LayerfuseError
from layerfuse.fusion.flat_projector import FlatProjector
from layerfuse.fusion.whitening import Whiten

Normalization = Literal["none", "layernorm", "standardize", "whiten"]
CALIBRATED = ("standardize", "whiten")
"""normalisations with constants that are measured before training"""
ProjectorKind = Literal["mlp", "linear"]
SEED_BYTES = 8
"""of a hash: as many as a seed of torch's generators holds"""


@contextmanager
def drawn_for(part: str, seed: int) -> Generator[None]:
    """Let a part's initialisation draw from a generator of its own.

    Parts of one name and shape then begin alike in all strategies, whatever else those draw.

    Args:
        part: path of the part, such as `projector.linear_1`.
        seed: of the whole model.

    Yields:
        Nothing. What is drawn on the CPU meanwhile depends on the part and the seed alone;
        afterwards torch's generator goes on as if nothing had been drawn.
    """
    # Python's own hash differs from process to process
    digest = hashlib.sha256(f"{seed}:{part}".encode()).digest()
    own_seed = int.from_bytes(digest[:SEED_BYTES], "big")
    # only the CPU's: `torch.manual_seed` would also set those of GPUs, which are not put back
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(own_seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


class OwnInit(nn.Module):
    """A part with an initialisation beyond that of its Linears and norms."""

    def reset_parameters(self) -> None:
        """Set what differs from PyTorch's defaults, after those were set: gates are closed."""
        # not recursive: Linears and norms inside have their defaults already
        for parameter in self.parameters(recurse=False):
            nn.init.zeros_(parameter)


class Projector(nn.Module):
    """Maps features to the LLM's width: one Linear, or Linear, GELU, Linear (LLaVA-1.5).

    `scale` is a stored constant, 1 unless calibrated (see `Fusion.calibrate`), so that it can be
    folded into the last Linear.

    Args:
        width: channels of a fused token.
        llm_width: channels of the LLM's embeddings.
        kind: `mlp`, or `linear` for one Linear.
    """

    def __init__(self, width: int, llm_width: int, kind: ProjectorKind = "mlp") -> None:
        super().__init__()
        # LLaVA-1.5's names, also where the second half is empty
        self.linear_1 = nn.Linear(width, llm_width)
        if kind == "mlp":
            self.act = nn.GELU()
            self.linear_2 = nn.Linear(llm_width, llm_width)
        else:
            self.act = nn.Identity()
            self.linear_2 = nn.Identity()
        self.scale = nn.Buffer(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., llm_width)"""
        hidden = self.act(self.linear_1(x))
        return self.linear_2(hidden) * self.scale

    @torch.no_grad()
    def begin_as(self, given: FlatProjector, parts: list[int]) -> None:
        """Take the weights of a given projector, and zeros for all other parts of the input.

        Args:
            given: the projector.
            parts: which part of the input each layer of `given` is.

        Raises:
            LayerfuseError: the given projector is of another kind or of other widths.
        """
        width = given.weight_1.shape[1] // len(given.layers)
        kind = "gelu" if isinstance(self.linear_2, nn.Linear) else "linear"
        if kind != given.activation:
            raise LayerfuseError(
                f"the given projector is {_kind(given.activation)}, that of the fusion "
                f"{_kind(kind)}: give it `projector: {'mlp' if kind == 'linear' else 'linear'}`"
            )
        if len(given.bias_2) != self.linear_1.out_features or self.linear_1.in_features % width:
            raise LayerfuseError(
                f"the given projector maps {width} channels a layer to {len(given.bias_2)}, that "
                f"of the fusion {self.linear_1.in_features} in all to {self.linear_1.out_features}"
            )
        weight_1 = given.weight_1
        bias_1 = given.bias_1
        if isinstance(self.linear_2, nn.Linear):
            self.linear_2.weight.copy_(given.weight_2)
            self.linear_2.bias.copy_(given.bias_2)
        else:
            weight_1 = given.weight_2 @ weight_1
            bias_1 = given.weight_2 @ bias_1 + given.bias_2
        self.linear_1.weight.zero_()
        self.linear_1.bias.copy_(bias_1)
        for place, part in enumerate(parts):
            reading = weight_1[:, place * width : (place + 1) * width]
            self.linear_1.weight[:, part * width : (part + 1) * width] = reading
        self.scale.fill_(1)


def _kind(activation: str) -> str:
    """What a projector with this activation is called in recipes and papers."""
    return "an MLP" if activation == "gelu" else "one Linear"


class Standardize(nn.Module):
    """Per-channel (x - mean) / std with stored statistics; the identity until calibrated."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # buffers: saved and moved with the model, but never trained
        self.mean = nn.Buffer(torch.zeros(width))
        self.std = nn.Buffer(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)"""
        return (x - self.mean) / self.std


def normalization(kind: Normalization, width: int) -> nn.Module:
    """The module that normalises one layer's patch tokens before they are fused.

    Args:
        kind: what `StrategyConfig.normalize` says.
        width: channels of a patch token.

    Returns:
        A module from (..., width) to (..., width).
    """
    if kind == "layernorm":
        return nn.LayerNorm(width)
    if kind == "standardize":
        return Standardize(width)
    if kind == "whiten":
        return Whiten(width)
    return nn.Identity()


def weighted(weights: Tensor, layers: list[Tensor]) -> Tensor:
    """Σ_k w_k · layer_k

    Args:
        weights: (B, n), or (1, n) where all images share them.
        layers: n layers of (B, N, D) patch tokens.

    Returns:
        (B, N, D)

    Raises:
        ValueError: if there are not as many weights as layers.
    """
    terms: list[Tensor] = []
    # (B, n) -> n times (B,); one weight scales all tokens and channels of its image
    for weight, layer in zip(weights.unbind(dim=1), layers, strict=True):
        terms.append(weight[:, None, None] * layer)
    return torch.stack(terms).sum(dim=0)


def _norm(width: int, norm: bool) -> nn.Module:
    """What normalises the hidden states before a gated part, if anything does."""
    if norm:
        return nn.RMSNorm(width, eps=1e-6)
    return nn.Identity()


class GatedCrossAttention(OwnInit):
    """tanh(gate) · CA(norm(hidden), memory), with a gate that starts at zero (Flamingo, I_M).

    Query, key, value and output are Linear without bias; no positions. Keys and values are made
    once per image by `keys_values`, not at every step of decoding.

    Args:
        width: channels of the hidden states and of the tokens; a multiple of `heads`.
        heads: number of attention heads.
        norm: whether the hidden states are normalised first.
    """

    def __init__(self, width: int, heads: int, *, norm: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.norm = _norm(width, norm)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        # one element and not a scalar, because FSDP2 shards no scalars
        self.gate = nn.Parameter(torch.zeros(1))

    def keys_values(self, tokens: Tensor) -> Tensor:
        """The memory that `forward` reads.

        Args:
            tokens: (B, N, D) visual tokens.

        Returns:
            (B, N, 2 D) keys and values.
        """
        # side by side in one tensor: a memory has one per LLM block
        keys = self.key(tokens)
        values = self.value(tokens)
        return torch.cat([keys, values], dim=-1)

    def forward(self, hidden: Tensor, memory: Tensor, seen: Tensor) -> Tensor:
        """What the hidden states read from the memory.

        Args:
            hidden: (rows, T, D)
            memory: (rows, M, 2 D), from `keys_values`.
            seen: (rows, T or 1, M) booleans, the memory that each position sees.

        Returns:
            (rows, T, D). Positions that see nothing get exactly zero.
        """
        query = self._split(self.query(self.norm(hidden)))
        # (rows, M, 2 D) -> twice (rows, M, D)
        keys, values = memory.chunk(2, dim=-1)
        key = self._split(keys)
        value = self._split(values)

        # softmax over nothing would not be a number: such positions look at all, then get zero
        sees_nothing = ~seen.any(dim=-1, keepdim=True)
        # (rows, T or 1, M) -> (rows, 1, T or 1, M), the same for all heads
        mask = (seen | sees_nothing).unsqueeze(1)
        # (rows, heads, T, D / heads); under autocast the hidden states may be wider than the keys
        mixed = F.scaled_dot_product_attention(query.to(key.dtype), key, value, attn_mask=mask)
        # (rows, heads, T, D / heads) -> (rows, T, D)
        mixed = mixed.transpose(1, 2).flatten(2)
        mixed = mixed.masked_fill(sees_nothing, 0)
        return self.output(mixed) * self.gate.tanh()

    def _split(self, x: Tensor) -> Tensor:
        """(rows, T, D) -> (rows, heads, T, D / heads)"""
        # the function and not the method, which torch leaves untyped
        by_head = torch.unflatten(x, -1, (self.heads, -1))
        return by_head.transpose(1, 2)


class GatedMLP(OwnInit):
    """tanh(gate) · SwiGLU(norm(hidden)), with a gate that starts at zero (I_M).

    Args:
        width: channels of the hidden states.
        inner: channels inside.
        norm: whether the hidden states are normalised first.
    """

    def __init__(self, width: int, inner: int, *, norm: bool = True) -> None:
        super().__init__()
        self.norm = _norm(width, norm)
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        # one element and not a scalar, because FSDP2 shards no scalars
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, hidden: Tensor) -> Tensor:
        """(rows, T, D) -> (rows, T, D)"""
        normed = self.norm(hidden)
        inner = F.silu(self.gate_proj(normed)) * self.up_proj(normed)
        return self.down_proj(inner) * self.gate.tanh()
