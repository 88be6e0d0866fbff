"""The strategy `deformable`: equal to MMFuser's formula, and at first exactly the base layer."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerfuse.errors import LayerfuseError
from layerfuse.fusion import Deformable, Shapes
from layerfuse.fusion.deformable import DeformableConfig
from layerfuse.vision.features import Features
from layerfuse.vision.selection import LayerSpec, select
from tests import naive_deformable
from tests.fusion_cases import move_parameters

BATCH = 2


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
    # away from the start, where γ1 = γ2 = 0 hide both attentions
    move_parameters(fusion)
    features = random_features(fusion, grid)

    tokens = fusion(features).tokens

    expected = naive_deformable.deformable(fusion, features)
    torch.testing.assert_close(tokens, expected, atol=1e-10, rtol=0)


def test_published_size_on_the_meta_device() -> None:
    """MMFuser on CLIP-L/14-336: 5,190,592 parameters beside the projector, 576 tokens."""
    # shapes alone, which take neither memory nor time
    with torch.device("meta"):
        fusion = build(1024, [3, 8, 13, 18])
        layers = (3, 8, 13, 18, 23)
        patches = tuple(torch.empty(1, 576, 1024) for _ in layers)
        summary = tuple(torch.empty(1, 1024) for _ in layers)

    # heads of 64 channels
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
    # exactly: zero times whatever was read is added
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
    # other draws of the same distribution: only their mean and deviation agree

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
