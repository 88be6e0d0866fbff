"""The base layer looks up detail in the selected layers by deformable attention.

    F_ca = MSDA(query LN_q(h_base), value LN_f(h_a), LN_f(h_b), ...)    one level per layer
    F_sa = F_ca + γ_2 · MSDA(query LN_1(F_ca), value LN_1(F_ca))
    V    = P(h_base + γ_1 · F_sa)                   γ_1, γ_2 per channel, zero at first

Every patch of the base layer reads a few points near its own place, as many in each layer, with
weights that it computes itself; at first the result is exactly that of the base layer alone. The
fuser of MMFuser (2410.11829), published with layers 3, 8, 13 and 18 of CLIP-L; external modular
fusion (E_M) of "Multi-Layer Visual Feature Fusion in Multimodal LLMs" (2503.06063).
"""

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from layerfuse.deformable_attention import DeformableAttention
from layerfuse.encoder import Features
from layerfuse.fusion.base import BaseLayerConfig, Fusion, Shapes, Visual, options, register
from layerfuse.layers import Projector


@options
class DeformableConfig(BaseLayerConfig):
    """Options of `deformable`."""

    heads: PositiveInt | None = None
    """Number of attention heads, a divisor of the encoder's width. None gives heads of 64 channels:
    16 at the published width of 1024."""
    points: PositiveInt = 4
    """Number of points that each head samples in each layer."""


@register("deformable", DeformableConfig)
class Deformable(Fusion):
    """Deformable cross-attention to the selected layers, then deformable self-attention."""

    kind = "external modular"
    paper = "MMFuser, E_M"
    published = (3, 8, 13, 18)

    def __init__(self, config: DeformableConfig, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        width, levels = shapes.vision_width, len(shapes.selection.layers)
        heads = config.heads or max(1, width // 64)
        if width % heads:
            valid = ", ".join(str(n) for n in range(1, width + 1) if width % n == 0)
            raise ValueError(f"heads {heads} does not divide the width {width}; valid: {valid}")
        self.norm_query = nn.LayerNorm(width, eps=1e-6)
        self.norm_value = nn.LayerNorm(width, eps=1e-6)
        self.norm_self = nn.LayerNorm(width, eps=1e-6)
        self.cross = DeformableAttention(width, levels, heads, config.points)
        self.self_attention = DeformableAttention(width, 1, heads, config.points)
        self.gamma_1 = nn.Parameter(torch.zeros(width))
        self.gamma_2 = nn.Parameter(torch.zeros(width))
        self.projector = Projector(width, shapes.llm_width)

    def forward(self, features: Features, instruction: Tensor | None = None) -> Visual:
        base = self.normalized(features, [self.config.base])[0]
        layers = self.normalized(features, self.shapes.selection.layers)
        values = self.norm_value(torch.cat(layers, dim=1))
        centers = cell_centers(features.grid, base)
        levels = (features.grid,) * len(layers)
        read = self.cross(self.norm_query(base), values, centers, levels)
        normed = self.norm_self(read)
        read = read + self.gamma_2 * self.self_attention(normed, normed, centers, levels[:1])
        return Visual(self.projector(base + self.gamma_1 * read))


def cell_centers(grid: tuple[int, int], like: Tensor) -> Tensor:
    """(rows · columns, 2) centres (x, y) in [0, 1] of the cells of a grid in raster order, on the
    device of `like`, in float32 or finer."""
    rows, columns = grid
    dtype = torch.promote_types(like.dtype, torch.float32)
    y = (torch.arange(rows, dtype=dtype, device=like.device) + 0.5) / rows
    x = (torch.arange(columns, dtype=dtype, device=like.device) + 0.5) / columns
    return torch.stack([x.repeat(rows), y.repeat_interleave(columns)], dim=-1)
