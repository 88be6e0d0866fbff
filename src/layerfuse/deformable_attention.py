"""Multi-scale deformable attention in plain PyTorch (Deformable DETR, 2010.04159, equation 3).

Each query looks at a few learned points of every level instead of at all positions. Here the points
of all levels become one weighted sum of table rows per query and head: a bilinear sample is four
rows, so a query and head sum 4 · levels · points of them, which `embedding_bag` does in one pass
without storing what it gathers.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Sizes = tuple[tuple[int, int], ...]
"""(rows, columns) of each level"""


def deformable_attention(
    value: Tensor, shapes: Sizes, locations: Tensor, weights: Tensor
) -> Tensor:
    """Σ over levels and points of weight · bilinear(value of the level, location).

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
    summed = _WeightedRows.apply(
        value.to(dtype).flatten(0, 2), rows.flatten(0, 2).flatten(1), amounts
    )
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
    above, below = (
        (in_top * in_left, in_top * in_right),
        (in_bottom * in_left, in_bottom * in_right),
    )
    return rows, torch.stack([*above, *below], dim=3)


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


class _WeightedRows(torch.autograd.Function):
    """out[i] = Σ_k amounts[i, k] · table[rows[i, k]]: (R, d), (n, K), (n, K) -> (n, d).

    The gradient of the table is the same kind of sum with the roles of n and R exchanged, so it is
    another `embedding_bag` over the entries sorted by row. PyTorch's own gradient of
    `embedding_bag` is several times slower.
    """

    @staticmethod
    def forward(table: Tensor, rows: Tensor, amounts: Tensor) -> Tensor:
        return F.embedding_bag(rows, table, per_sample_weights=amounts, mode="sum")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        table, rows, amounts = ctx.saved_tensors
        grad = grad.contiguous()
        of_table = (
            _transposed(table.shape[0], rows, amounts, grad) if ctx.needs_input_grad[0] else None
        )
        of_amounts = _row_products(table, rows, grad) if ctx.needs_input_grad[2] else None
        return of_table, None, of_amounts


def _transposed(size: int, rows: Tensor, amounts: Tensor, grad: Tensor) -> Tensor:
    """out[r] = Σ over entries (i, k) with rows[i, k] = r of amounts[i, k] · grad[i]"""
    ordered, order = rows.flatten().sort()
    starts = torch.searchsorted(
        ordered, torch.arange(size, dtype=rows.dtype, device=rows.device), out_int32=True
    )
    source = (order // rows.shape[1]).to(rows.dtype)
    return F.embedding_bag(
        source, grad, starts, per_sample_weights=amounts.flatten()[order], mode="sum"
    )


def _row_products(table: Tensor, rows: Tensor, grad: Tensor) -> Tensor:
    """out[i, k] = grad[i] · table[rows[i, k]]"""
    entries, bags = rows.shape[1], rows.shape[0]
    starts = torch.arange(0, rows.numel(), entries, dtype=rows.dtype, device=rows.device)
    bag = torch.arange(bags, dtype=rows.dtype, device=rows.device).repeat_interleave(entries)
    products = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad, table, rows.flatten(), starts, bag, 0
    )
    return products.view_as(rows)


class DeformableAttention(nn.Module):
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
        offset = self.offset(query).unflatten(-1, (self.heads, self.levels, self.points, 2))
        weights = self.weight(query).unflatten(-1, (self.heads, self.levels * self.points))
        weights = weights.float().softmax(dim=-1).unflatten(-1, (self.levels, self.points))
        sizes = reference.new_tensor([(columns, rows) for rows, columns in shapes])
        locations = (
            reference[..., None, None, None, :] + offset.to(reference.dtype) / sizes[:, None]
        )
        value = self.value(value).unflatten(-1, (self.heads, -1))
        return self.output(deformable_attention(value, shapes, locations, weights))
