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
from typing import Any, NamedTuple

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from layerfuse.errors import LayerfuseError
from layerfuse.fusion.base import BaseLayerConfig, Fusion, Shapes, options, register
from layerfuse.fusion.blocks import OwnInit, Projector
from layerfuse.fusion.flat_projector import FlatProjector
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


class SamplingPoints(NamedTuple):
    """The points that queries read."""

    locations: Tensor
    """(B, Nq, heads, levels, points, 2), (x, y) in shares of the image; outside [0, 1] lies nothing
    to read"""
    weights: Tensor
    """(B, Nq, heads, levels, points), those of a head summing to one over all levels"""


class LookUp(NamedTuple):
    """What the base layer looked up in the selected layers."""

    query: Tensor
    """(B, N, Dv), the normalised base layer"""
    values: Tensor
    """(B, levels · N, Dv), the normalised selected layers one after the other"""
    output: Tensor
    """(B, N, Dv), the base layer with what it read, before the projector"""


class DeformableAttention(OwnInit):
    """Multi-scale deformable attention (2010.04159): points and weights come from the query alone.

    Offsets are in cells of each level.

    Args:
        width: channels of queries and values, a multiple of `heads`.
        levels: number of grids that the values lie on.
        heads: number of attention heads.
        points: number of points that each head samples in each level.
    """

    def __init__(self, width: int, levels: int, heads: int, points: int) -> None:
        super().__init__()
        self.levels = levels
        self.heads = heads
        self.points = points
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
        # scaled to the border of a square, so that the first points are the neighbouring cells
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)
        distance = torch.arange(1, self.points + 1).view(-1, 1)
        steps = direction.view(-1, 1, 1, 2) * distance
        self.offset.bias.copy_(steps.expand(-1, self.levels, -1, -1).flatten())

        # at first every query looks at the same points, with equal weights
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.weight.weight)
        nn.init.zeros_(self.weight.bias)
        for linear in (self.value, self.output):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def sampling_points(self, query: Tensor, reference: Tensor, shapes: Sizes) -> "SamplingPoints":
        """Where each query looks, and how much it takes from there.

        Args:
            query: (B, Nq, D)
            reference: (Nq, 2) or (B, Nq, 2) points (x, y) in [0, 1].
            shapes: (rows, columns) per level.
        """
        # bfloat16 could not tell neighbouring places of a large grid apart
        dtype = torch.promote_types(query.dtype, torch.float32)

        # the weights of one head sum to one over the points of all levels together
        logits = self.weight(query).unflatten(-1, (self.heads, self.levels * self.points))
        weights = logits.softmax(dim=-1, dtype=dtype)
        weights = weights.unflatten(-1, (self.levels, self.points))

        # offsets are in cells, locations in shares of the image
        offset = self.offset(query).unflatten(-1, (self.heads, self.levels, self.points, 2))
        cells = [(columns, rows) for rows, columns in shapes]
        sizes = torch.tensor(cells, dtype=dtype, device=query.device)
        around = reference.to(dtype)[..., None, None, None, :]
        return SamplingPoints(around + offset.to(dtype) / sizes[:, None], weights)

    def forward(self, query: Tensor, value: Tensor, reference: Tensor, shapes: Sizes) -> Tensor:
        """Read the values around each query's reference point.

        Args:
            query: (B, Nq, D)
            value: (B, sum of rows · columns, D), levels one after the other in raster order.
            reference: (Nq, 2) or (B, Nq, 2) points (x, y) in [0, 1].
            shapes: (rows, columns) per level.

        Returns:
            (B, Nq, D)
        """
        locations, weights = self.sampling_points(query, reference, shapes)
        heads_of_value = self.value(value).unflatten(-1, (self.heads, -1))
        return self.output(deformable_attention(heads_of_value, shapes, locations, weights))


@register("deformable", DeformableConfig)
class Deformable(Fusion[DeformableConfig]):
    """Deformable cross-attention to the selected layers, then deformable self-attention."""

    kind = "external modular"
    paper = "MMFuser, E_M"
    summary = "a deep layer looks up detail in shallow ones by deformable attention"
    published = (3, 8, 13, 18)

    def __init__(self, config: DeformableConfig, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        width = shapes.vision_width
        levels = len(shapes.selection.layers)
        heads = config.heads
        if heads is None:
            # 64 channels a head, as published; tiny encoders have one head
            heads = max(1, width // 64)
        if width % heads:
            divisors = [str(number) for number in range(1, width + 1) if width % number == 0]
            raise LayerfuseError(
                f"heads {heads} does not divide the width {width}; valid: {', '.join(divisors)}"
            )
        self.norm_query = nn.LayerNorm(width, eps=1e-6)
        self.norm_value = nn.LayerNorm(width, eps=1e-6)
        self.norm_self = nn.LayerNorm(width, eps=1e-6)
        self.cross = DeformableAttention(width, levels, heads, config.points)
        self.self_attention = DeformableAttention(width, 1, heads, config.points)
        # zero: training starts at the base layer alone
        self.gamma_1 = nn.Parameter(torch.zeros(width))
        self.gamma_2 = nn.Parameter(torch.zeros(width))
        self.projector = Projector(width, shapes.llm_width)

    def forward(
        self,
        features: Features,
        instruction: Tensor | None = None,
        guidance: Guidance = "instruction",
    ) -> Fused:
        return Fused(self.projector(self.look_up(features).output))

    def look_up(self, features: Features) -> LookUp:
        """What every patch of the base layer reads in the selected layers.

        Args:
            features: the features of B images.
        """
        base = self.normalized(features, [self.config.base])[0]
        layers = self.normalized(features, self.shapes.selection.layers)
        centers = cell_centers(features.grid, base)

        # F_ca: every patch of the base layer reads the selected layers, one level each
        query = self.norm_query(base)
        values = self.norm_value(torch.cat(layers, dim=1))
        levels = (features.grid,) * len(layers)
        read = self.cross(query, values, centers, levels)

        # F_sa: then what was read looks around in itself
        normed = self.norm_self(read)
        around = self.self_attention(normed, normed, centers, (features.grid,))
        read = read + self.gamma_2 * around
        return LookUp(query, values, base + self.gamma_1 * read)

    def sampling_points(self, features: Features) -> SamplingPoints:
        """Where in the selected layers each patch of the base layer looks.

        Args:
            features: the features of B images.

        Returns:
            One level a selected layer, in their order.
        """
        base = self.normalized(features, [self.config.base])[0]
        levels = (features.grid,) * len(self.shapes.selection.layers)
        centers = cell_centers(features.grid, base)
        return self.cross.sampling_points(self.norm_query(base), centers, levels)

    def openings(self) -> dict[str, float]:
        # per channel: their mean size
        return {
            "γ1, what is read": float(self.gamma_1.detach().abs().mean()),
            "γ2, what looks around in it": float(self.gamma_2.detach().abs().mean()),
        }

    def begin_as(self, given: FlatProjector) -> None:
        # γ_1 is zero
        self.begin_projector(self.projector, given, {self.config.base: 0})


def cell_centers(grid: tuple[int, int], like: Tensor) -> Tensor:
    """The centres of a grid's cells.

    Args:
        grid: (rows, columns)
        like: a tensor on the device of the result, and of its dtype if that is float32 or more.

    Returns:
        (rows · columns, 2) centres (x, y) in [0, 1], in raster order, at least in float32.
    """
    rows, columns = grid
    # half a cell of a grid of 37 cells is not a bfloat16 number
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

    Zero outside the image; cell centres at (column + 0.5) / columns (`align_corners=False`).

    Args:
        value: (B, sum of rows · columns, heads, d), levels one after the other in raster order.
        shapes: (rows, columns) per level.
        locations: (B, Nq, heads, levels, points, 2), (x, y) in [0, 1] from edge to edge of the
            image.
        weights: (B, Nq, heads, levels, points)

    Returns:
        (B, Nq, heads · d) in the dtype of `value`; all arithmetic is at least float32.
    """
    dtype = torch.promote_types(value.dtype, torch.float32)
    batch, queries = locations.shape[:2]
    corners = _corners(shapes, locations.to(dtype), length=value.shape[1])

    # (B, Nq, heads, 4, levels · points) -> one sum per query and head
    point_weights = weights.to(dtype).flatten(3).unsqueeze(3)
    amounts = (corners.shares * point_weights).flatten(0, 2).flatten(1)
    rows = corners.rows.flatten(0, 2).flatten(1)
    table = value.to(dtype).flatten(0, 2)
    summed = _weighted_rows(table, rows, amounts)
    return summed.view(batch, queries, -1).to(value.dtype)


def _index_dtype() -> torch.dtype:
    """The type of rows: 32 bits are half the memory, and other runtimes know 64 bits alone."""
    return torch.int64 if torch.compiler.is_exporting() else torch.int32


class _Corners(NamedTuple):
    """The four cells around each location; both are (B, Nq, heads, 4, levels · points)."""

    rows: Tensor
    """integer rows of the (B · length · heads, d) table of values"""
    shares: Tensor
    """bilinear shares, zero outside the image"""


def _corners(shapes: Sizes, locations: Tensor, *, length: int) -> _Corners:
    """Find the four cells around each location, in a table of `length` cells an image."""
    batch, _, heads, _, points, _ = locations.shape
    device = locations.device

    level_rows: list[int] = []
    level_columns: list[int] = []
    level_starts: list[int] = []
    start = 0
    for rows, columns in shapes:
        level_rows.append(rows)
        level_columns.append(columns)
        level_starts.append(start)
        start += rows * columns

    # one entry per level and point, in the order of flattened locations
    def per_point(of_levels: list[int], dtype: torch.dtype) -> Tensor:
        tensor = torch.tensor(of_levels, dtype=dtype, device=device)
        return tensor.repeat_interleave(points)

    # the table's row of each level's first cell, for this image and this head
    image = torch.arange(batch, dtype=_index_dtype(), device=device).view(-1, 1, 1, 1)
    head = torch.arange(heads, dtype=_index_dtype(), device=device).view(-1, 1)
    first = (image * length + per_point(level_starts, _index_dtype())) * heads + head

    # (B, Nq, heads, levels, points, 2) -> twice (B, Nq, heads, levels · points)
    x, y = locations.flatten(3, 4).unbind(-1)
    left, right = _neighbours(x, per_point(level_columns, x.dtype))
    top, bottom = _neighbours(y, per_point(level_rows, y.dtype))

    # neighbouring cells lie `heads` rows of the table apart, and lines of cells a whole line
    line = per_point([columns * heads for columns in level_columns], _index_dtype())
    at_left = left.cell * heads + first
    at_right = right.cell * heads + first
    at_top = top.cell * line
    at_bottom = bottom.cell * line
    table_rows = [
        at_top + at_left,
        at_top + at_right,
        at_bottom + at_left,
        at_bottom + at_right,
    ]
    shares = [
        top.share * left.share,
        top.share * right.share,
        bottom.share * left.share,
        bottom.share * right.share,
    ]
    return _Corners(torch.stack(table_rows, dim=3), torch.stack(shares, dim=3))


class _Neighbour(NamedTuple):
    """A cell beside each location, along one axis."""

    cell: Tensor
    """integer index, moved inside the image"""
    share: Tensor
    """linear share, zero if the cell was outside"""


def _neighbours(position: Tensor, size: Tensor) -> tuple[_Neighbour, _Neighbour]:
    """The cells before and after `position` in [0, 1] along an axis of `size` cells."""
    # the centre of cell i lies at i
    position = position * size - 0.5
    low = position.floor()
    high = low + 1
    before = _neighbour(low, high - position, size)
    after = _neighbour(high, position - low, size)
    return before, after


def _neighbour(cell: Tensor, share: Tensor, size: Tensor) -> _Neighbour:
    """The cell itself inside an axis of `size` cells, else one inside with a share of zero."""
    inside = (cell >= 0) & (cell < size)
    last = size.to(_index_dtype()) - 1
    # every row that is looked up must exist, whatever its share
    index = torch.minimum(cell.detach().to(_index_dtype()).clamp_min(0), last)
    return _Neighbour(index, share * inside)


def _weighted_rows(table: Tensor, rows: Tensor, amounts: Tensor) -> Tensor:
    """out[i] = Σ_k amounts[i, k] · table[rows[i, k]]: (R, d), (n, K), (n, K) -> (n, d)"""
    # detached: PyTorch gives the gradient of the amounts, _TableGradient that of the table
    summed = F.embedding_bag(rows, table.detach(), per_sample_weights=amounts, mode="sum")
    # Any: torch does not type what `apply` takes and gives
    table_gradient: Any = _TableGradient
    return table_gradient.apply(summed, table, rows, amounts.detach())


class _TableGradient(torch.autograd.Function):
    """Passes `summed` on and gives `table` its gradient, which PyTorch has too but slower.

    That gradient, grad_table[r] = Σ over entries with rows[i, k] = r of amounts[i, k] · grad[i], is
    the same kind of sum once the entries are sorted by row.
    """

    # Any: PyTorch lets functions keep what they like in their context
    @staticmethod
    def forward(ctx: Any, summed: Tensor, table: Tensor, rows: Tensor, amounts: Tensor) -> Tensor:
        ctx.save_for_backward(rows, amounts)
        ctx.size = table.shape[0]
        return summed.view_as(summed)

    # twice differentiated it would lack what the amounts contribute: refused, not left out
    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        rows, amounts = ctx.saved_tensors
        grad = grads[0].contiguous()
        if not ctx.needs_input_grad[1]:
            return grad, None, None, None

        # sorted by row, the entries of one row of the table are one bag
        ordered, order = rows.flatten().sort()
        table_rows = torch.arange(ctx.size, dtype=rows.dtype, device=rows.device)
        bag_starts = torch.searchsorted(ordered, table_rows, out_int32=True)
        # entry i · K + k of the flattened table belongs to query i
        queries = (order // rows.shape[1]).to(rows.dtype)
        of_table = F.embedding_bag(
            queries,
            grad,
            bag_starts,
            per_sample_weights=amounts.flatten()[order],
            mode="sum",
        )
        return grad, of_table, None, None
