"""The base layer looks up detail in the selected layers by deformable attention.

    F_ca = MSDA(query LN_q(h_base), value LN_f(h_a), LN_f(h_b), ...)    one level per layer
    F_sa = F_ca + γ_2 · MSDA(query LN_1(F_ca), value LN_1(F_ca))
    V    = P(h_base + γ_1 · F_sa)                   γ_1, γ_2 per channel, zero at first

Every patch of the base layer reads a few points near its own place, as many in each layer, with
weights that it computes itself; at first the result is exactly that of the base layer alone. The
fuser of MMFuser (2410.11829), published with layers 3, 8, 13 and 18 of CLIP-L; external modular
fusion (E_M) of "Multi-Layer Visual Feature Fusion in Multimodal LLMs" (2503.06063).
"""

import math
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from layerfuse.fusion.base import BaseLayerConfig, Fusion, Shapes, options, register
from layerfuse.fusion.blocks import OwnInit, Projector
from layerfuse.fusion.visual import Fused, Guidance
from layerfuse.vision.features import Features

Sizes = tuple[tuple[int, int], ...]
"""(rows, columns) of each level"""


@options
class DeformableConfig(BaseLayerConfig):
    """Options of `deformable`."""

    heads: PositiveInt | None = None
    """Number of attention heads, a divisor of the encoder's width. None gives heads of 64 channels:
    16 at the published width of 1024."""
    points: PositiveInt = 4
    """Number of points that each head samples in each layer."""


class DeformableAttention(OwnInit):
    """Multi-scale deformable attention (2010.04159): points and weights come from the query alone.

    `width` must be a multiple of `heads`. Offsets are in cells of each level.
    """

    def __init__(self, width: int, levels: int, heads: int, points: int) -> None:
        super().__init__()
        self.levels, self.heads, self.points = levels, heads, points
        self.value = nn.Linear(width, width)
        self.offset = nn.Linear(width, heads * levels * points * 2)
        self.weight = nn.Linear(width, heads * levels * points)
        self.output = nn.Linear(width, width)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform weights; point p of head m lies p + 1 cells from the query, in direction m."""
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)
        steps = direction.view(-1, 1, 1, 2) * torch.arange(1, self.points + 1).view(-1, 1)
        self.offset.bias.copy_(steps.expand(-1, self.levels, -1, -1).flatten())
        for tensor in (self.offset.weight, self.weight.weight, self.weight.bias):
            nn.init.zeros_(tensor)
        for linear in (self.value, self.output):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, query: Tensor, value: Tensor, reference: Tensor, shapes: Sizes) -> Tensor:
        """query (B, Nq, D), value (B, sum of rows · columns, D), reference (Nq, 2) or (B, Nq, 2)
        points (x, y) in [0, 1], shapes (rows, columns) per level -> (B, Nq, D)"""
        dtype = torch.promote_types(query.dtype, torch.float32)
        weights = self.weight(query).unflatten(-1, (self.heads, self.levels * self.points))
        weights = weights.softmax(dim=-1, dtype=dtype).unflatten(-1, (self.levels, self.points))
        offset = self.offset(query).unflatten(-1, (self.heads, self.levels, self.points, 2))
        sizes = torch.tensor([(c, r) for r, c in shapes], dtype=dtype, device=query.device)
        around = reference.to(dtype)[..., None, None, None, :]
        locations = around + offset.to(dtype) / sizes[:, None]
        value = self.value(value).unflatten(-1, (self.heads, -1))
        return self.output(deformable_attention(value, shapes, locations, weights))


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

    def forward(
        self,
        features: Features,
        instruction: Tensor | None = None,
        guidance: Guidance = "instruction",
    ) -> Fused:
        base = self.normalized(features, [self.config.base])[0]
        layers = self.normalized(features, self.shapes.selection.layers)
        values = self.norm_value(torch.cat(layers, dim=1))
        centers = cell_centers(features.grid, base)
        levels = (features.grid,) * len(layers)
        read = self.cross(self.norm_query(base), values, centers, levels)
        normed = self.norm_self(read)
        read = read + self.gamma_2 * self.self_attention(normed, normed, centers, levels[:1])
        return Fused(self.projector(base + self.gamma_1 * read))


def cell_centers(grid: tuple[int, int], like: Tensor) -> Tensor:
    """(rows · columns, 2) centres (x, y) in [0, 1] of a grid's cells in raster order."""
    rows, columns = grid
    dtype = torch.promote_types(like.dtype, torch.float32)
    y = (torch.arange(rows, dtype=dtype, device=like.device) + 0.5) / rows
    x = (torch.arange(columns, dtype=dtype, device=like.device) + 0.5) / columns
    return torch.stack([x.repeat(rows), y.repeat_interleave(columns)], dim=-1)


def deformable_attention(
    value: Tensor, shapes: Sizes, locations: Tensor, weights: Tensor
) -> Tensor:
    """Σ over levels and points of weight · bilinear(value of the level, location): equation 3 of
    Deformable DETR (2010.04159). A bilinear sample is four rows, so a query and head sum
    4 · levels · points rows, which `embedding_bag` does without storing what it gathers.

    value      (B, sum of rows · columns, heads, d), levels one after the other in raster order
    locations  (B, Nq, heads, levels, points, 2), (x, y) in [0, 1] from edge to edge of the image
    weights    (B, Nq, heads, levels, points)
    result     (B, Nq, heads · d) in the dtype of `value`; all arithmetic is at least float32

    Zero outside the image; cell centres at (column + 0.5) / columns (`align_corners=False`).
    """
    dtype = torch.promote_types(value.dtype, torch.float32)
    batch, queries = locations.shape[:2]
    rows, shares = _corners(shapes, locations.to(dtype), value.shape[1])
    amounts = (shares * weights.to(dtype).flatten(3).unsqueeze(3)).flatten(0, 2).flatten(1)
    summed = _weighted_rows(value.to(dtype).flatten(0, 2), rows.flatten(0, 2).flatten(1), amounts)
    return summed.view(batch, queries, -1).to(value.dtype)


def _corners(shapes: Sizes, locations: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The four cells around each location: rows of the (B · length · heads, d) table, and their
    bilinear shares, zero outside the image; both (B, Nq, heads, 4, levels · points)."""
    batch, _, heads, _, points, _ = locations.shape

    def per_point(values: list[int], dtype: torch.dtype) -> Tensor:
        levels = torch.tensor(values, dtype=dtype, device=locations.device)
        return levels.repeat_interleave(points)

    starts = [sum(r * c for r, c in shapes[:level]) for level in range(len(shapes))]
    columns = per_point([c * heads for _, c in shapes], torch.int32)
    image = torch.arange(batch, dtype=torch.int32, device=locations.device).view(-1, 1, 1, 1)
    head = torch.arange(heads, dtype=torch.int32, device=locations.device).view(-1, 1)
    first = (image * length + per_point(starts, torch.int32)) * heads + head
    x, y = locations.flatten(3, 4).unbind(-1)
    (left, in_left), (right, in_right) = _neighbours(x, per_point([c for _, c in shapes], x.dtype))
    (top, in_top), (bottom, in_bottom) = _neighbours(y, per_point([r for r, _ in shapes], y.dtype))
    left, right = left * heads + first, right * heads + first
    top, bottom = top * columns, bottom * columns
    rows = torch.stack([top + left, top + right, bottom + left, bottom + right], dim=3)
    above = [in_top * in_left, in_top * in_right]
    below = [in_bottom * in_left, in_bottom * in_right]
    return rows, torch.stack(above + below, dim=3)


def _neighbours(position: Tensor, size: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The two cells around `position` in [0, 1] along an axis of `size` cells, and their linear
    shares. Cells outside are moved inside with a share of zero."""
    position = position * size - 0.5
    low = position.floor()
    last = size.to(torch.int32) - 1
    found = []
    for cell, share in ((low, low + 1 - position), (low + 1, position - low)):
        inside = (cell >= 0) & (cell < size)
        index = torch.minimum(cell.detach().to(torch.int32).clamp_min(0), last)
        found.append((index, share * inside))
    return found


def _weighted_rows(table: Tensor, rows: Tensor, amounts: Tensor) -> Tensor:
    """out[i] = Σ_k amounts[i, k] · table[rows[i, k]]: (R, d), (n, K), (n, K) -> (n, d)"""
    summed = F.embedding_bag(rows, table.detach(), per_sample_weights=amounts, mode="sum")
    return _TableGradient.apply(summed, table, rows, amounts.detach())


class _TableGradient(torch.autograd.Function):
    """Passes `summed` on and gives `table` its gradient, which PyTorch has too but slower.

    That gradient, grad_table[r] = Σ over entries with rows[i, k] = r of amounts[i, k] · grad[i], is
    the same kind of sum once the entries are sorted by row.
    """

    @staticmethod
    def forward(ctx: Any, summed: Tensor, table: Tensor, rows: Tensor, amounts: Tensor) -> Tensor:
        ctx.save_for_backward(rows, amounts)
        ctx.size = table.shape[0]
        return summed.view_as(summed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, amounts = ctx.saved_tensors
        grad = grads[0].contiguous()
        if not ctx.needs_input_grad[1]:
            return grad, None, None, None
        ordered, order = rows.flatten().sort()
        numbers = torch.arange(ctx.size, dtype=rows.dtype, device=rows.device)
        of_table = F.embedding_bag(
            (order // rows.shape[1]).to(rows.dtype),
            grad,
            torch.searchsorted(ordered, numbers, out_int32=True),
            per_sample_weights=amounts.flatten()[order],
            mode="sum",
        )
        return grad, of_table, None, None
