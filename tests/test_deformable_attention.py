"""Deformable attention: equal to loops over its formula, and to that of transformers."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.deformable_detr.modeling_deformable_detr import (
    MultiScaleDeformableAttention,
)

from layerfuse.fusion.deformable import (
    DeformableAttention,
    Sizes,
    cell_centers,
    deformable_attention,
)
from tests import naive_deformable
from tests.fusion_cases import move_parameters

BATCH = 2
QUERIES = 5
CHANNELS_OF_HEAD = 4


@dataclass(frozen=True)
class Core:
    """The size of a problem of the sampling core."""

    shapes: Sizes
    """(rows, columns) of each level"""
    heads: int
    points: int


TWO_EQUAL_LEVELS = Core(((3, 3), (3, 3)), heads=2, points=2)
THREE_UNLIKE_LEVELS = Core(((2, 5), (4, 1), (1, 1)), heads=3, points=2)
ONE_POINT = Core(((4, 3),), heads=1, points=1)
each_core = pytest.mark.parametrize(
    "size",
    [TWO_EQUAL_LEVELS, THREE_UNLIKE_LEVELS, ONE_POINT],
)


@dataclass
class CoreInputs:
    """Random inputs of the core, all leaves that want gradients."""

    value: Tensor
    """(B, cells of all levels, heads, d)"""
    locations: Tensor
    """(B, Nq, heads, levels, points, 2), in [-0.3, 1.3]: some lie outside the image"""
    weights: Tensor
    """(B, Nq, heads, levels, points)"""

    def all(self) -> list[Tensor]:
        return [self.value, self.locations, self.weights]


def core_inputs(size: Core, dtype: torch.dtype = torch.double) -> CoreInputs:
    """Random inputs of a core of that size."""
    torch.manual_seed(0)
    cells = 0
    for rows, columns in size.shapes:
        cells += rows * columns
    levels = len(size.shapes)
    value = torch.randn(BATCH, cells, size.heads, CHANNELS_OF_HEAD)
    shares = torch.rand(BATCH, QUERIES, size.heads, levels, size.points, 2)
    locations = shares * 1.6 - 0.3
    weights = torch.rand(locations.shape[:-1])
    return CoreInputs(
        value=value.to(dtype).requires_grad_(),
        locations=locations.to(dtype).requires_grad_(),
        weights=weights.to(dtype).requires_grad_(),
    )


def gradients(compute: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of all inputs."""
    output = compute(*inputs)
    # another weight for every element, so that none can stand for another
    upstream = torch.linspace(-1, 1, output.numel(), dtype=output.dtype)
    from_inputs = torch.autograd.grad(output, inputs, upstream.view_as(output))
    return [output, *from_inputs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_core
def test_core_equals_transformers(size: Core, dtype: torch.dtype) -> None:
    """Output and all gradients are those of Deformable DETR."""
    inputs = core_inputs(size, dtype)
    reference_module = MultiScaleDeformableAttention()
    shapes = size.shapes
    shapes_as_tensor = torch.tensor(shapes)

    def reference(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        # neither its starts of levels nor its step of im2col is read without CUDA
        return reference_module(
            value,
            shapes_as_tensor,
            shapes,
            None,
            locations,
            weights,
            64,
        )

    def core(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return deformable_attention(value, shapes, locations, weights)

    expected = gradients(reference, inputs.all())
    actual = gradients(core, inputs.all())

    for actual_tensor, expected_tensor in zip(actual, expected, strict=True):
        largest = float(expected_tensor.detach().abs().max())
        tolerance = 1e-6 * max(1, largest)
        torch.testing.assert_close(actual_tensor, expected_tensor, atol=tolerance, rtol=0)


@each_core
def test_core_equals_a_loop(size: Core) -> None:
    inputs = core_inputs(size)

    def core(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return deformable_attention(value, size.shapes, locations, weights)

    # its own backward pass against numeric derivatives, which want float64
    assert torch.autograd.gradcheck(core, inputs.all(), fast_mode=True)
    value = inputs.value.detach()
    locations = inputs.locations.detach()
    weights = inputs.weights.detach()
    expected = naive_deformable.core(value, size.shapes, locations, weights)
    torch.testing.assert_close(core(value, locations, weights), expected)


def test_core_used_twice_and_checkpointed() -> None:
    """Its own backward pass adds up where a tensor is used twice, and may be recomputed."""
    size = THREE_UNLIKE_LEVELS
    inputs = core_inputs(size).all()

    def twice(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        once = deformable_attention(value, size.shapes, locations, weights)
        # other cells and values than the first time
        mirrored = 1 - locations
        return once + deformable_attention(value.tanh(), size.shapes, mirrored, weights)

    def twice_recomputed(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        # Any: checkpoint returns what the function returns, in no type
        output: Any = checkpoint(twice, value, locations, weights, use_reentrant=False)
        return output

    stored = gradients(twice, inputs)
    recomputed = gradients(twice_recomputed, inputs)

    for recomputed_tensor, stored_tensor in zip(recomputed, stored, strict=True):
        assert torch.equal(recomputed_tensor, stored_tensor)
    assert torch.autograd.gradcheck(twice, inputs, fast_mode=True)


QUERY_GRID = (3, 4)
WIDTH = 8
EQUAL_LEVELS: Sizes = ((3, 4), (3, 4))
UNLIKE_LEVELS: Sizes = ((3, 4), (2, 2))


@dataclass
class ModuleInputs:
    """Random inputs of the attention module, with a query on every cell of `QUERY_GRID`."""

    query: Tensor
    """(B, 12, 8)"""
    value: Tensor
    """(B, cells of all levels, 8)"""
    reference: Tensor
    """(12, 2) the centres of the queries' cells"""


def module_inputs(levels: Sizes = EQUAL_LEVELS) -> ModuleInputs:
    torch.manual_seed(1)
    cells = 0
    for rows, columns in levels:
        cells += rows * columns
    query = torch.randn(BATCH, QUERY_GRID[0] * QUERY_GRID[1], WIDTH)
    value = torch.randn(BATCH, cells, WIDTH)
    return ModuleInputs(query, value, reference=cell_centers(QUERY_GRID, query))


def moved_attention() -> DeformableAttention:
    """Attention over two levels whose points and weights follow the query."""
    attention = DeformableAttention(WIDTH, levels=2, heads=2, points=2)
    move_parameters(attention)
    return attention


def test_head_directions() -> None:
    """At first, point p of head m lies p + 1 cells away in direction θ = 2πm/M, in every level."""
    heads, levels, points = 8, 2, 3
    attention = DeformableAttention(16, levels=levels, heads=heads, points=points)

    offsets = attention.offset.bias.view(heads, levels, points, 2)
    for head in range(heads):
        angle = 2 * math.pi * head / heads
        x = math.cos(angle)
        y = math.sin(angle)
        for level in range(levels):
            for point in range(points):
                scale = (point + 1) / max(abs(x), abs(y))
                expected = torch.tensor([x * scale, y * scale])
                torch.testing.assert_close(offsets[head, level, point], expected)

    # points and weights do not follow the query yet
    assert not attention.offset.weight.any()
    assert not attention.weight.weight.any()
    assert not attention.weight.bias.any()
    # Xavier: uniform in ± √(6 / (16 + 16))
    bound = math.sqrt(6 / 32)
    for linear in (attention.value, attention.output):
        assert not linear.bias.any()
        largest = float(linear.weight.detach().abs().max())
        assert 0.9 < largest / bound <= 1


def test_reference_points_may_differ_between_images() -> None:
    """A batch of references (B, Nq, 2) gives each image what it gets alone."""
    attention = moved_attention()
    inputs = module_inputs()
    # the queries of the second image look from the opposite cells
    references = torch.stack([inputs.reference, inputs.reference.flip(0)])

    together = attention(inputs.query, inputs.value, references, EQUAL_LEVELS)

    for image in range(BATCH):
        query = inputs.query[image : image + 1]
        value = inputs.value[image : image + 1]
        one_image = attention(query, value, references[image], EQUAL_LEVELS)
        torch.testing.assert_close(together[image : image + 1], one_image)


def test_the_module_in_bfloat16_is_near_to_float32() -> None:
    attention = moved_attention().bfloat16()
    inputs = module_inputs()
    query = inputs.query.bfloat16()
    value = inputs.value.bfloat16()
    # the same rounded points for both, so that only the arithmetic differs
    reference = inputs.reference.bfloat16().float()

    low = attention(query, value, reference, EQUAL_LEVELS)
    # the backward pass must accept these dtypes too
    low.float().square().sum().backward()
    full = attention.float()(query.float(), value.float(), reference, EQUAL_LEVELS)

    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), full, atol=0.03, rtol=0.03)


def test_bfloat16_samples_in_float32() -> None:
    """Only the value and the result are rounded: no arithmetic happens in bfloat16."""
    size = THREE_UNLIKE_LEVELS
    inputs = core_inputs(size, torch.float32)
    rounded = inputs.value.detach().bfloat16()
    locations = inputs.locations.detach()
    weights = inputs.weights.detach()

    low = deformable_attention(rounded, size.shapes, locations, weights)

    exact = deformable_attention(rounded.float(), size.shapes, locations, weights)
    assert torch.equal(low, exact.bfloat16())


class AttentionOnUnlikeLevels(nn.Module):
    """Attention with its shapes inside: compilers and exporters take tensors alone."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = moved_attention()

    def forward(self, query: Tensor, value: Tensor, reference: Tensor) -> Tensor:
        return self.attention(query, value, reference, UNLIKE_LEVELS)


# dynamo itself instantiates the autograd function, and warns of that
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
def test_compiles_to_one_graph() -> None:
    module = AttentionOnUnlikeLevels()
    # one graph: a break would be an error here; the eager backend needs no C++ compiler
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    inputs = module_inputs(UNLIKE_LEVELS)
    query = inputs.query.requires_grad_()
    value = inputs.value.requires_grad_()
    reference = inputs.reference.requires_grad_()

    def eagerly(query: Tensor, value: Tensor) -> Tensor:
        return module(query, value, reference)

    def as_graph(query: Tensor, value: Tensor) -> Tensor:
        return compiled(query, value, reference)

    expected = gradients(eagerly, [query, value])
    actual = gradients(as_graph, [query, value])

    for traced, eager in zip(actual, expected, strict=True):
        torch.testing.assert_close(traced, eager)


def test_exports() -> None:
    """The exported program takes any number of images."""
    module = AttentionOnUnlikeLevels()
    inputs = module_inputs(UNLIKE_LEVELS)
    # the reference points are those of all images
    images = torch.export.Dim("images", min=2, max=64)

    exported = torch.export.export(
        module,
        (inputs.query, inputs.value, inputs.reference),
        dynamic_shapes=({0: images}, {0: images}, None),
    )

    # twice as many images as were exported
    query = torch.cat([inputs.query, inputs.query + 1])
    value = torch.cat([inputs.value, inputs.value + 1])
    expected = module(query, value, inputs.reference)
    actual = exported.module()(query, value, inputs.reference)
    torch.testing.assert_close(actual, expected)
