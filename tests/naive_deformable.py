"""Multi-scale deformable attention (MSDA) and the fuser of MMFuser, as loops over their formulas.

Axes: B images, Nq queries, M heads of d channels, Λ levels, P points of each head in each level.
"""

import torch
from torch import Tensor

from layerfuse.fusion.deformable import Deformable, DeformableAttention, Sizes
from layerfuse.vision.features import Features

Field = list[list[Tensor]]
"""one level of one head: rows of cells, each cell (d)"""


def bilinear(field: Field, x: float, y: float) -> Tensor:
    """The value (d) at a point in [0, 1], zero outside: `align_corners=False`.

    The centre of cell (row, column) lies at ((column + 0.5) / columns, (row + 0.5) / rows), and a
    cell counts by how near it is: linearly, from 1 at its centre to 0 at the next one's.
    """
    rows = len(field)
    columns = len(field[0])
    sample = torch.zeros_like(field[0][0])
    for row in range(rows):
        for column in range(columns):
            distance_x = abs(x * columns - 0.5 - column)
            distance_y = abs(y * rows - 0.5 - row)
            share = max(0.0, 1 - distance_x) * max(0.0, 1 - distance_y)
            sample = sample + share * field[row][column]
    return sample


def fields_of_levels(cells: Tensor, shapes: Sizes) -> list[Field]:
    """The levels of one head: (cells of all levels, d), in raster order, as rows of cells."""
    fields: list[Field] = []
    index = 0
    for rows, columns in shapes:
        field: Field = []
        for _ in range(rows):
            field.append(list(cells[index : index + columns]))
            index += columns
        fields.append(field)
    return fields


def core(value: Tensor, shapes: Sizes, locations: Tensor, weights: Tensor) -> Tensor:
    """head output = Σ_{λ,p} A · bilinear(value_λ, point), heads side by side.

    Args:
        value: (B, cells of all levels, M, d)
        shapes: (rows, columns) of each level.
        locations: (B, Nq, M, Λ, P, 2) points (x, y) in [0, 1].
        weights: (B, Nq, M, Λ, P), A of the formula.

    Returns:
        (B, Nq, M · d)
    """
    batch, queries, heads, levels, points = weights.shape
    result = torch.zeros(batch, queries, heads, value.shape[-1], dtype=torch.double)
    for b in range(batch):
        for m in range(heads):
            fields = fields_of_levels(value[b, :, m], shapes)
            for q in range(queries):
                for level in range(levels):
                    for p in range(points):
                        x, y = locations[b, q, m, level, p].tolist()
                        sample = bilinear(fields[level], x, y)
                        result[b, q, m] += weights[b, q, m, level, p] * sample
    return result.flatten(2)


def attention(module: DeformableAttention, query: Tensor, value: Tensor, shapes: Sizes) -> Tensor:
    """MSDA_Λ of queries that lie on the cells of `shapes[0]`, with the weights of `module`.

    Args:
        module: holds W_v, W_o (offsets), W_a (attention) and W_out.
        query: (B, Nq, M · d)
        value: (B, cells of all levels, M · d)
        shapes: (rows, columns) of each level.

    Returns:
        (B, Nq, M · d)
    """
    batch, queries, width = query.shape
    heads = module.heads
    levels = module.levels
    points = module.points

    # Δ = W_o·q + b_o, in cells of each level
    offset = module.offset(query).view(batch, queries, heads, levels, points, 2)

    # A = softmax over the Λ·P axis of W_a·q + b_a
    powers = module.weight(query).view(batch, queries, heads, levels * points).exp()
    weights = powers / powers.sum(dim=-1, keepdim=True)
    weights = weights.view(batch, queries, heads, levels, points)

    # sampling point = r + Δ / (columns, rows); r is the centre of the query's own cell
    rows_of_queries, columns_of_queries = shapes[0]
    locations = torch.empty_like(offset)
    for q in range(queries):
        r_x = (q % columns_of_queries + 0.5) / columns_of_queries
        r_y = (q // columns_of_queries + 0.5) / rows_of_queries
        for level, (rows, columns) in enumerate(shapes):
            locations[:, q, :, level, :, 0] = r_x + offset[:, q, :, level, :, 0] / columns
            locations[:, q, :, level, :, 1] = r_y + offset[:, q, :, level, :, 1] / rows

    # value = W_v·x + b_v reshaped to heads; at the end W_out
    value_by_head = module.value(value).view(batch, -1, heads, width // heads)
    return module.output(core(value_by_head, shapes, locations, weights))


def deformable(fusion: Deformable, features: Features) -> Tensor:
    """The tokens (B, N, H) of `deformable`, in the steps of MMFuser (2410.11829)."""
    layers = fusion.shapes.selection.layers
    grid = features.grid
    f = features.select([fusion.config.base])[0]

    # X: the levels along the token axis, (B, Λ · N, Dv)
    x = torch.cat(features.select(layers), dim=1)
    # F_ca = MSDA_Λ(q = LN_q(F), value = LN_f(X))
    shapes = (grid,) * len(layers)
    f_ca = attention(fusion.cross, fusion.norm_query(f), fusion.norm_value(x), shapes)
    # F_sa' = MSDA_1(q = LN_1(F_ca), value = LN_1(F_ca))
    normed = fusion.norm_self(f_ca)
    f_sa_own = attention(fusion.self_attention, normed, normed, (grid,))
    # F_sa = F_ca + γ2 ⊙ F_sa'
    f_sa = f_ca + fusion.gamma_2 * f_sa_own
    # out = F + γ1 ⊙ F_sa, then P
    return fusion.projector(f + fusion.gamma_1 * f_sa)
