"""Deformable attention and the strategy built on it, against loops written from the formulas."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.deformable_detr.modeling_deformable_detr import (
    MultiScaleDeformableAttention,
)

from layerfuse.errors import LayerfuseError
from layerfuse.fusion.base import Shapes
from layerfuse.fusion.deformable import (
    Deformable,
    DeformableAttention,
    DeformableConfig,
    Sizes,
    cell_centers,
    deformable_attention,
)
from layerfuse.vision.features import Features
from layerfuse.vision.selection import select

# sizes, heads, points
CORES: list[tuple[Sizes, int, int]] = [
    (((3, 3), (3, 3)), 2, 2),
    (((2, 5), (4, 1), (1, 1)), 3, 2),
    (((4, 3),), 1, 1),
]


def core_inputs(
    shapes: Sizes, heads: int, points: int, dtype: torch.dtype = torch.double
) -> list[Tensor]:
    """Value, locations (some outside the image) and weights."""
    torch.manual_seed(0)
    value = torch.randn(2, sum(r * c for r, c in shapes), heads, 4)
    locations = torch.rand(2, 5, heads, len(shapes), points, 2) * 1.6 - 0.3
    weights = torch.rand(locations.shape[:-1])
    return [x.to(dtype).requires_grad_() for x in (value, locations, weights)]


def naive_bilinear(field: list[list[Tensor]], x: float, y: float) -> Tensor:
    """Sample (rows, columns, d) at a point in [0, 1], zero outside."""
    rows, columns = len(field), len(field[0])
    sample = torch.zeros_like(field[0][0])
    for i in range(rows):
        for j in range(columns):
            share_x = max(0.0, 1 - abs(x * columns - 0.5 - j))
            share_y = max(0.0, 1 - abs(y * rows - 0.5 - i))
            sample = sample + share_x * share_y * field[i][j]
    return sample


def naive_core(value: Tensor, shapes: Sizes, locations: Tensor, weights: Tensor) -> Tensor:
    batch, queries, heads, levels, points = weights.shape
    result = torch.zeros(batch, queries, heads, value.shape[-1], dtype=torch.double)
    for b in range(batch):
        for m in range(heads):
            fields, start = [], 0
            for rows, columns in shapes:
                cells = list(value[b, start : start + rows * columns, m])
                fields.append([cells[i * columns : (i + 1) * columns] for i in range(rows)])
                start += rows * columns
            for q in range(queries):
                for k in range(levels):
                    for p in range(points):
                        x, y = locations[b, q, m, k, p].tolist()
                        sample = naive_bilinear(fields[k], x, y)
                        result[b, q, m] += weights[b, q, m, k, p] * sample
    return result.flatten(2)


def gradients(compute: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of all inputs."""
    output = compute(*inputs)
    upstream = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output, *torch.autograd.grad(output, inputs, upstream)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("shapes", "heads", "points"), CORES)
def test_core_equals_transformers(
    shapes: Sizes, heads: int, points: int, dtype: torch.dtype
) -> None:
    inputs = core_inputs(shapes, heads, points, dtype)
    theirs = MultiScaleDeformableAttention()
    tensor = torch.tensor(shapes)
    expected = gradients(lambda v, x, w: theirs(v, tensor, shapes, None, x, w, 64), inputs)
    actual = gradients(lambda v, x, w: deformable_attention(v, shapes, x, w), inputs)
    for ours, reference in zip(actual, expected, strict=True):
        largest = float(reference.detach().abs().max())
        torch.testing.assert_close(ours, reference, atol=1e-6 * max(1, largest), rtol=0)


@pytest.mark.parametrize(("shapes", "heads", "points"), CORES)
def test_core_equals_a_loop(shapes: Sizes, heads: int, points: int) -> None:
    def core(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return deformable_attention(value, shapes, locations, weights)

    inputs = core_inputs(shapes, heads, points)
    assert torch.autograd.gradcheck(core, inputs, fast_mode=True)
    value, locations, weights = (x.detach() for x in inputs)
    expected = naive_core(value, shapes, locations, weights)
    torch.testing.assert_close(core(value, locations, weights), expected)


def test_core_used_twice_and_checkpointed() -> None:
    shapes, inputs = CORES[1][0], core_inputs(*CORES[1])

    def twice(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        once = deformable_attention(value, shapes, locations, weights)
        return once + deformable_attention(value.tanh(), shapes, 1 - locations, weights)

    plain = gradients(twice, inputs)
    saved = gradients(lambda *x: checkpoint(twice, *x, use_reentrant=False), inputs)  # type: ignore[arg-type]
    for recomputed, stored in zip(saved, plain, strict=True):
        assert torch.equal(recomputed, stored)
    assert torch.autograd.gradcheck(twice, inputs, fast_mode=True)


def module_inputs(levels: Sizes = ((3, 4), (3, 4))) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    cells = sum(rows * columns for rows, columns in levels)
    query = torch.randn(2, 12, 8)
    value = torch.randn(2, cells, 8)
    return query, value, cell_centers((3, 4), query)


def randomized(module: nn.Module) -> nn.Module:
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def test_head_directions() -> None:
    attention = DeformableAttention(16, levels=2, heads=8, points=3)
    bias = attention.offset.bias.view(8, 2, 3, 2)
    for m, k, p in itertools.product(range(8), range(2), range(3)):
        angle = 2 * math.pi * m / 8
        x, y = math.cos(angle), math.sin(angle)
        scale = (p + 1) / max(abs(x), abs(y))
        torch.testing.assert_close(bias[m, k, p], torch.tensor([x * scale, y * scale]))
    for zero in (attention.offset.weight, attention.weight.weight, attention.weight.bias):
        assert not zero.any()
    for linear in (attention.value, attention.output):
        assert not linear.bias.any()
        assert 0.9 < float(linear.weight.detach().abs().max()) / math.sqrt(6 / 32) <= 1


def test_reference_points_may_differ_between_images() -> None:
    attention = randomized(DeformableAttention(8, levels=2, heads=2, points=2))
    query, value, reference = module_inputs()
    levels = ((3, 4), (3, 4))
    references = torch.stack([reference, reference.flip(0)])
    together = attention(query, value, references, levels)
    for i in range(2):
        one_image = attention(query[i : i + 1], value[i : i + 1], references[i], levels)
        torch.testing.assert_close(together[i : i + 1], one_image)


def test_bfloat16_samples_in_float32() -> None:
    attention = randomized(DeformableAttention(8, levels=2, heads=2, points=2)).bfloat16()
    query, value, reference = (x.bfloat16() for x in module_inputs())
    reference, levels = reference.float(), ((3, 4), (3, 4))
    low = attention(query, value, reference, levels)
    low.float().square().sum().backward()
    full = attention.float()(query.float(), value.float(), reference, levels)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), full, atol=0.03, rtol=0.03)
    shapes = CORES[1][0]
    v, x, w = (t.detach() for t in core_inputs(*CORES[1], torch.float32))
    exact = deformable_attention(v.bfloat16().float(), shapes, x, w)
    assert torch.equal(deformable_attention(v.bfloat16(), shapes, x, w), exact.bfloat16())


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = randomized(DeformableAttention(8, levels=2, heads=2, points=2))

    def forward(self, query: Tensor, value: Tensor, reference: Tensor) -> Tensor:
        return self.attention(query, value, reference, ((3, 4), (2, 2)))


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
def test_compiles_to_one_graph() -> None:  # dynamo itself instantiates it
    module = Wrapped()
    *inputs, reference = (x.requires_grad_() for x in module_inputs(((3, 4), (2, 2))))
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    expected = gradients(lambda q, v: module(q, v, reference), inputs)
    actual = gradients(lambda q, v: compiled(q, v, reference), inputs)
    for traced, eager in zip(actual, expected, strict=True):
        torch.testing.assert_close(traced, eager)


def test_exports() -> None:
    module, inputs = Wrapped(), module_inputs(((3, 4), (2, 2)))
    images = torch.export.Dim("images", min=2, max=64)
    dynamic = ({0: images}, {0: images}, None)
    program = torch.export.export(module, inputs, dynamic_shapes=dynamic).module()
    # twice as many images as were exported
    query, value, reference = inputs
    queries = torch.cat([query, query + 1])
    values = torch.cat([value, value + 1])
    expected = module(queries, values, reference)
    torch.testing.assert_close(program(queries, values, reference), expected)


def build(width: int, layers: Any, depth: int = 24, base: int = -2, **options: Any) -> Any:
    selection = select(layers, depth)
    config = DeformableConfig(base=base, **options).resolve(selection)
    return Deformable(config, Shapes(selection, width, 5, 24))


def features(fusion: Any, grid: tuple[int, int]) -> Features:
    torch.manual_seed(3)
    layers = fusion.config.taps(fusion.shapes.selection)
    shape = (2, grid[0] * grid[1], fusion.shapes.vision_width)
    patches = tuple(torch.randn(shape, dtype=torch.double) + k for k in layers)
    return Features(layers, patches, tuple(x.mean(dim=1) for x in patches), grid)


def naive_attention(
    attention: DeformableAttention, query: Tensor, value: Tensor, shapes: Sizes
) -> Tensor:
    """Spec of multi-scale deformable attention for queries on the cells of `shapes[0]`."""
    heads, levels, points = attention.heads, attention.levels, attention.points
    (rows, columns), batch = shapes[0], query.shape[0]
    offset = attention.offset(query).view(batch, -1, heads, levels, points, 2)
    weights = attention.weight(query).view(batch, -1, heads, levels * points).exp()
    weights = (weights / weights.sum(dim=-1, keepdim=True)).view(offset.shape[:-1])
    locations = torch.empty_like(offset)
    for q in range(rows * columns):
        center = (q % columns + 0.5) / columns, (q // columns + 0.5) / rows
        for k, (r, c) in enumerate(shapes):
            locations[:, q, :, k, :, 0] = center[0] + offset[:, q, :, k, :, 0] / c
            locations[:, q, :, k, :, 1] = center[1] + offset[:, q, :, k, :, 1] / r
    split = attention.value(value).view(batch, -1, heads, query.shape[-1] // heads)
    return attention.output(naive_core(split, shapes, locations, weights))


@torch.no_grad()
@pytest.mark.parametrize(
    ("grid", "layers"), [((3, 3), [3, 8, 13]), ((2, 4), [18, 5]), ((5, 2), [23])]
)
def test_strategy_equals_its_formula(grid: tuple[int, int], layers: list[int]) -> None:
    fusion = build(6, layers, heads=2, points=2).double()
    randomized(fusion)
    x = features(fusion, grid)
    base = x.select([23])[0]
    values = fusion.norm_value(torch.cat(x.select(layers), dim=1))
    read = naive_attention(fusion.cross, fusion.norm_query(base), values, (grid,) * len(layers))
    normed = fusion.norm_self(read)
    again = naive_attention(fusion.self_attention, normed, normed, (grid,))
    expected = fusion.projector(base + fusion.gamma_1 * (read + fusion.gamma_2 * again))
    torch.testing.assert_close(fusion(x).tokens, expected, atol=1e-10, rtol=0)


def test_published_size_on_the_meta_device() -> None:
    with torch.device("meta"):
        fusion = build(1024, [3, 8, 13, 18])
        patches = tuple(torch.empty(1, 576, 1024) for _ in range(5))
    assert (fusion.cross.heads, fusion.cross.points) == (16, 4)
    outside = sum(p.numel() for p in fusion.projector.parameters())
    assert sum(p.numel() for p in fusion.parameters()) - outside == 5_190_592
    norms = (fusion.norm_query, fusion.norm_value, fusion.norm_self)
    assert {norm.eps for norm in norms} == {1e-6}
    x = Features((3, 8, 13, 18, 23), patches, tuple(p[:, 0] for p in patches), (24, 24))
    assert fusion(x).tokens.shape == (1, 576, 5)


def test_at_first_it_is_the_base_layer_and_only_gamma_1_learns() -> None:
    with torch.device("meta"):
        fusion = build(128, [3, 8, 13, 18])
    fusion = fusion.to_empty(device="cpu")
    nn.init.ones_(fusion.projector.scale)
    randomized(fusion)
    fusion.reset_parameters()
    x = features(fusion, (4, 4)).to(torch.float32)
    tokens = fusion(x).tokens
    assert torch.equal(tokens, fusion.projector(x.select([23])[0]))
    tokens.square().sum().backward()
    inner = [(n, p.grad) for n, p in fusion.named_parameters() if "projector" not in n]
    assert [n for n, grad in inner if grad is not None and grad.any()] == ["gamma_1"]
    fresh = build(128, [3, 8, 13, 18]).state_dict()
    for name, tensor in fusion.state_dict().items():
        if not name.startswith("projector"):
            torch.testing.assert_close(tensor.std(), fresh[name].std(), atol=0.002, rtol=0.05)
            torch.testing.assert_close(tensor.mean(), fresh[name].mean(), atol=0.005, rtol=0)


@pytest.mark.parametrize(
    ("depth", "layers"), [(24, [3, 8, 13, 18]), (12, [2, 4, 6, 9]), (4, [1, 2, 3]), (1, [1])]
)
def test_example(depth: int, layers: list[int]) -> None:
    assert Deformable.example(depth) == layers


def test_heads_must_divide_the_width() -> None:
    assert build(24, [3]).cross.heads == 1
    with pytest.raises(
        LayerfuseError, match=r"heads 5 does not divide .* width 24; valid: 1, 2, 3, 4,"
    ):
        build(24, [3], heads=5)
    for option in ({"heads": 0}, {"points": 0}):
        with pytest.raises(ValueError, match="greater than 0"):
            build(24, [3], **option)
