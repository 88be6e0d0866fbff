"""Deformable attention and the strategy built on it, against loops written from the formulas."""

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
from layerfuse.vision.selection import LayerSpec, select
from tests import naive_deformable

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


def move_parameters(module: nn.Module) -> None:
    """Move every parameter away from its start, where whole terms of the formula are zero."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


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


def build(width: int, layers: LayerSpec, **options: Any) -> Any:
    """The strategy for an encoder of 24 blocks with base layer 23, and an LLM of width 5."""
    selection = select(layers, 24)
    config = DeformableConfig(base=-2, **options).resolve(selection)
    shapes = Shapes(selection, vision_width=width, llm_width=5, llm_depth=24)
    return Deformable(config, shapes)


def random_features(fusion: Deformable, grid: tuple[int, int]) -> Features:
    """Features of two images in float64, with another mean in each layer."""
    torch.manual_seed(3)
    layers = fusion.config.taps(fusion.shapes.selection)
    tokens = grid[0] * grid[1]
    patches: list[Tensor] = []
    summary: list[Tensor] = []
    for layer in layers:
        noise = torch.randn(BATCH, tokens, fusion.shapes.vision_width, dtype=torch.double)
        patches.append(noise + layer)
        summary.append(patches[-1].mean(dim=1))
    return Features(layers, tuple(patches), tuple(summary), grid)


@torch.no_grad()
@pytest.mark.parametrize(
    ("grid", "layers"),
    [
        ((3, 3), [3, 8, 13]),
        ((2, 4), [18, 5]),
        ((5, 2), [23]),
    ],
)
def test_strategy_equals_its_formula(grid: tuple[int, int], layers: list[int]) -> None:
    fusion = build(6, layers, heads=2, points=2).double()
    move_parameters(fusion)
    features = random_features(fusion, grid)

    tokens = fusion(features).tokens

    expected = naive_deformable.deformable(fusion, features)
    torch.testing.assert_close(tokens, expected, atol=1e-10, rtol=0)


def test_published_size_on_the_meta_device() -> None:
    """MMFuser on CLIP-L/14-336: 5,190,592 parameters beside the projector, 576 tokens."""
    with torch.device("meta"):
        fusion = build(1024, [3, 8, 13, 18])
        layers = (3, 8, 13, 18, 23)
        patches = tuple(torch.empty(1, 576, 1024) for _ in layers)
        summary = tuple(torch.empty(1, 1024) for _ in layers)

    assert fusion.cross.heads == 16
    assert fusion.cross.points == 4
    parameters = sum(parameter.numel() for parameter in fusion.parameters())
    in_projector = sum(parameter.numel() for parameter in fusion.projector.parameters())
    assert parameters - in_projector == 5_190_592
    for norm in (fusion.norm_query, fusion.norm_value, fusion.norm_self):
        assert norm.eps == 1e-6
    features = Features(layers, patches, summary, grid=(24, 24))
    assert fusion(features).tokens.shape == (1, 576, 5)


def reset_from_the_meta_device() -> Any:
    """The strategy with its own initialisation written over random memory."""
    with torch.device("meta"):
        fusion = build(128, [3, 8, 13, 18])
    fusion = fusion.to_empty(device="cpu")
    # a stored constant, which no initialisation sets
    nn.init.ones_(fusion.projector.scale)
    move_parameters(fusion)
    fusion.reset_parameters()
    return fusion


def test_at_first_it_is_the_base_layer_and_only_gamma_1_learns() -> None:
    fusion = reset_from_the_meta_device()
    features = random_features(fusion, (4, 4)).to(torch.float32)

    tokens = fusion(features).tokens
    tokens.square().sum().backward()

    base = features.select([23])[0]
    assert torch.equal(tokens, fusion.projector(base))
    learning: list[str] = []
    for name, parameter in fusion.named_parameters():
        has_gradient = parameter.grad is not None and bool(parameter.grad.any())
        if has_gradient and "projector" not in name:
            learning.append(name)
    assert learning == ["gamma_1"]


def test_a_reset_draws_as_the_constructor_does() -> None:
    """The modules set their own weights after PyTorch's defaults, not before."""
    fusion = reset_from_the_meta_device()
    fresh = build(128, [3, 8, 13, 18]).state_dict()

    for name, tensor in fusion.state_dict().items():
        if not name.startswith("projector"):
            torch.testing.assert_close(tensor.std(), fresh[name].std(), atol=0.002, rtol=0.05)
            torch.testing.assert_close(tensor.mean(), fresh[name].mean(), atol=0.005, rtol=0)


@pytest.mark.parametrize(
    ("depth", "layers"),
    [
        (24, [3, 8, 13, 18]),
        (12, [2, 4, 6, 9]),
        (4, [1, 2, 3]),
        (1, [1]),
    ],
)
def test_example(depth: int, layers: list[int]) -> None:
    assert Deformable.example(depth) == layers


def test_heads_must_divide_the_width() -> None:
    # heads of 64 channels, but at least one
    assert build(24, [3]).cross.heads == 1
    message = r"heads 5 does not divide .* width 24; valid: 1, 2, 3, 4,"
    with pytest.raises(LayerfuseError, match=message):
        build(24, [3], heads=5)
    for option in ("heads", "points"):
        with pytest.raises(ValueError, match="greater than 0"):
            build(24, [3], **{option: 0})
