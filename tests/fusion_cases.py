"""Small fusions of every strategy, with random weights and random inputs.

Everything is in float64, so that tests can tell a wrong formula from rounding.
"""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerfuse.fusion import FUSIONS, Fusion, Shapes, parse
from layerfuse.vision.features import Features
from layerfuse.vision.selection import LayerSpec, select

VISION_WIDTH = 8
LLM_WIDTH = 6
DEPTH = 8
"""blocks of the encoder"""
LLM_DEPTH = 12
LLM_HEADS = 3
SENTENCE_WIDTH = 5


def shapes_around(
    layers: LayerSpec,
    *,
    depth: int = DEPTH,
    has_cls: bool = True,
    llm_ffn: int | None = 10,
) -> Shapes:
    """The surroundings of a small fusion of these layers."""
    return Shapes(
        select(layers, depth),
        vision_width=VISION_WIDTH,
        llm_width=LLM_WIDTH,
        llm_depth=LLM_DEPTH,
        llm_heads=LLM_HEADS,
        llm_ffn=llm_ffn,
        has_cls=has_cls,
    )


# Any: each strategy has submodules of its own
def build(
    name: str,
    layers: LayerSpec,
    *,
    depth: int = DEPTH,
    has_cls: bool = True,
    llm_ffn: int | None = 10,
    **options: Any,
) -> Any:
    """A small fusion with the strategy's own initialisation.

    Args:
        name: of the strategy.
        layers: that it fuses.
        depth: of the encoder.
        has_cls: whether the encoder has a CLS token.
        llm_ffn: width inside the LLM's MLP; None where its config names none.
        options: of the strategy.
    """
    shapes = shapes_around(layers, depth=depth, has_cls=has_cls, llm_ffn=llm_ffn)
    spec: dict[str, Any] = {"name": name, **options}
    if name == "instruction_weighted":
        spec["sentence_width"] = SENTENCE_WIDTH
    strategy = parse(spec)
    resolved = strategy.options.resolve(shapes.selection)
    fusion = strategy.module(resolved, shapes).double()
    fusion.reset_parameters()
    return fusion


@dataclass(frozen=True)
class Case:
    """A strategy with layers and options."""

    name: str
    layers: LayerSpec
    options: dict[str, Any]

    def build(self, **more_options: Any) -> Any:
        return build(self.name, self.layers, **self.options, **more_options)

    def __str__(self) -> str:
        return f"{self.name} {self.layers} {self.options}"


def case(name: str, layers: LayerSpec, **options: Any) -> Case:
    return Case(name, layers, options)


GROUPS = "1-3|4-6"
# every strategy with every value of every option that has a few: a test checks that
CASES = [
    case("single", [3]),
    case("single", [0], projector="linear"),
    # layers out of order, and layers that are named as groups
    case("concat", [5, 2, 8]),
    case("concat", [5, 2, 8], projector="linear"),
    case("concat", "0-2|5,3"),
    # the base layer beside the selected ones, and itself selected
    case("group_mean", GROUPS),
    case("group_mean", "former", base=-1),
    case("group_mean", [2, 7, 4], projector="linear", base=4),
    # strips that divide the tokens, and strips that leave a rest
    case("token_concat", [5, 2], stride=1),
    case("token_concat", [7, 2, 3], stride=2, base=3),
    case("token_concat", GROUPS, stride=3),
    # single layers, and groups of unlike size
    case("weighted_sum", "every:1"),
    case("weighted_sum", "4,1|0,8|3", base=1),
    case("weighted_sum", GROUPS, beside="concat"),
    case("weighted_sum", [6, 3, 7], beside="add", base=3),
    case("text_routed", "every:1", hidden=7),
    case("text_routed", "1-3|8,4", hidden=3, base=4, entropy_weight=0.1),
    case("instruction_weighted", "1-2|3-4|5-6|7-8"),
    # what guides the rows of a batch does not change what is made of a row
    case("instruction_weighted", [3, 1], group_identity=True, base=5, questions="average"),
    case("instruction_weighted", GROUPS, summary="cls", regularizer="off"),
    case("instruction_weighted", GROUPS, summary="mean", regularizer="released"),
    case("instruction_weighted", GROUPS, regularizer="balance", regularizer_weight=1.0),
    # blocks in the order of the layers, in another one, and shared
    case("inject_add", [2, 6]),
    case("inject_add", [6, 2, 3], placement="first", gate=True),
    case("inject_add", [2, 6], placement="last", base=2),
    case("inject_add", [2, 6, 8], placement=[4, 0, 4], gate=True),
    # heads: the LLM's own number, one, and one per channel
    case("inject_cross", [2, 6]),
    case("inject_cross", [6, 2], placement="first", position="post", mlp=True, heads=1),
    case("inject_cross", [6, 2], placement="last", position="parallel", heads=2),
    case("inject_cross", [6, 2], placement=[5, 1], mlp=True, heads=6),
    case("inject_cross", [6, 2], released_residual=True, mlp=True, base=2),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_strategy = pytest.mark.parametrize("name", list(FUSIONS))


def usual_layers(name: str) -> list[int]:
    """Two layers, or the one that `single` takes."""
    if name == "single":
        return [2]
    return [2, 6]


def random_features(
    fusion: Fusion,
    *,
    images: int = 2,
    grid: tuple[int, int] = (2, 3),
    has_cls: bool = True,
) -> Features:
    """The layers that a fusion reads, each of another mean and another scale.

    Without CLS token the summary of a layer is its mean patch token, as the encoder makes it.
    """
    layers = fusion.config.taps(fusion.shapes.selection)
    tokens = grid[0] * grid[1]
    patches: list[Tensor] = []
    summary: list[Tensor] = []
    for layer in layers:
        noise = torch.randn(images, tokens, fusion.shapes.vision_width, dtype=torch.double)
        patches.append((1 + layer) * (noise + 1))
    for of_layer in patches:
        if has_cls:
            summary.append(torch.randn_like(of_layer[:, 0]))
        else:
            summary.append(of_layer.mean(dim=1))
    return Features(layers, tuple(patches), tuple(summary), grid)


def random_instruction(fusion: Fusion, images: int = 2) -> Tensor | None:
    """(B, E) of what the fusion reads; None where it reads nothing."""
    if fusion.reads == "nothing":
        return None
    width = LLM_WIDTH
    if fusion.reads == "sentence":
        width = SENTENCE_WIDTH
    return torch.randn(images, width, dtype=torch.double)


def randomize(fusion: Fusion) -> None:
    """Every weight random, so that none can be left out unseen."""
    with torch.no_grad():
        for parameter in fusion.parameters():
            # outputs of about the size of their inputs, whatever the width
            fan_in = 1
            if parameter.ndim > 1:
                fan_in = parameter.shape[-1]
            parameter.copy_(torch.randn_like(parameter) / math.sqrt(fan_in))
        for buffer in fusion.buffers():
            # scales and standard deviations: above zero
            buffer.copy_(torch.rand_like(buffer) + 0.5)


def move_parameters(module: nn.Module) -> None:
    """Move every parameter away from its start, where whole terms of the formula are zero."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
