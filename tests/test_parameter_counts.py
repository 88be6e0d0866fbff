"""The strategies have as many parameters as their papers' code, for CLIP-L (24 blocks, width 1024).

The counts are those of the released code, in millions; LLMs of width 2048 are MobileLLaMA-1.4B, of
width 4096 Vicuna-7B.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from layerfuse.fusion import Shapes, parse
from layerfuse.vision.selection import LayerSpec, select

MOBILE_LLAMA = 2048
MOBILE_LLAMA_FFN = 5632
VICUNA = 4096
IGVA_GROUPS = "1-6|7-12|13-18|19-24"


def count(
    name: str,
    layers: LayerSpec,
    llm_width: int,
    below: str = "",
    **options: Any,
) -> int:
    """Number of a fusion's parameters whose names begin with `below`."""
    selection = select(layers, 24)
    shapes = Shapes(
        selection,
        vision_width=1024,
        llm_width=llm_width,
        llm_depth=24,
        llm_heads=16,
        llm_ffn=MOBILE_LLAMA_FFN,
    )
    strategy = parse({"name": name, **options})
    resolved = strategy.options.resolve(selection)
    # sizes without memory, of which the largest would take 0.6 GB
    with torch.device("meta"):
        fusion = strategy.module(resolved, shapes)
    total = 0
    for parameter_name, parameter in fusion.named_parameters():
        if parameter_name.startswith(below):
            total += parameter.numel()
    return total


@dataclass(frozen=True)
class Published:
    """What a paper's code counts."""

    name: str
    layers: LayerSpec
    llm_width: int
    millions: float
    below: str = ""
    """the part that is counted; empty for all"""
    options: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 0.005
    """in millions: half of the last digit that is published"""

    def __str__(self) -> str:
        return f"{self.name} {self.layers} {self.below} {self.millions}"


# LLaVA-1.5's MLP behind m layers or group means side by side, which have no parameters.
EXTERNAL = [
    Published("single", [-2], MOBILE_LLAMA, 6.30),
    Published("single", [-2], VICUNA, 20.98),
    Published("concat", [18, 23], MOBILE_LLAMA, 8.39),
    Published("concat", [3, 18, 23], MOBILE_LLAMA, 10.49),
    Published("group_mean", "former", MOBILE_LLAMA, 8.39),
    Published("group_mean", "all", MOBILE_LLAMA, 10.49),
    Published("group_mean", "0-11|12-23", VICUNA, 29.37),
]
# Every layer has a projector of its own, and with cross-attention four matrices and an MLP.
INTERNAL = [
    Published(
        "inject_add",
        [3, 18, 23],
        MOBILE_LLAMA,
        18.9,
        below="projectors",
        tolerance=0.05,
    ),
    Published("inject_add", "every:1", MOBILE_LLAMA, 6.30, below="projectors.7."),
    Published(
        "inject_cross",
        [3],
        MOBILE_LLAMA,
        16.8,
        below="attention",
        tolerance=0.05,
    ),
    Published(
        "inject_cross",
        [3],
        MOBILE_LLAMA,
        34.6,
        below="mlp",
        options={"mlp": True},
        tolerance=0.05,
    ),
    Published(
        "inject_cross",
        [3],
        MOBILE_LLAMA,
        6.30,
        below="projectors",
        options={"mlp": True},
    ),
]
# What turns an instruction into weights, and the projector behind h_base and the mix.
GUIDED = [
    Published("instruction_weighted", IGVA_GROUPS, VICUNA, 27.05, below="allocator"),
    Published("instruction_weighted", IGVA_GROUPS, VICUNA, 25.17, below="projector"),
    Published("text_routed", "every:1", VICUNA, 2.11, below="router"),
]


@pytest.mark.parametrize("published", [*EXTERNAL, *INTERNAL, *GUIDED], ids=str)
def test_published_parameter_counts(published: Published) -> None:
    parameters = count(
        published.name,
        published.layers,
        published.llm_width,
        published.below,
        **published.options,
    )
    assert parameters / 1e6 == pytest.approx(published.millions, abs=published.tolerance)


def test_exact_size_of_the_allocator() -> None:
    parameters = count("instruction_weighted", IGVA_GROUPS, VICUNA, below="allocator")
    assert parameters == 27_047_940


@pytest.mark.parametrize("layers", [[1], [1, 2], [1, 2, 3, 4, 5]])
def test_another_layer_in_concat_costs_one_matrix(layers: list[int]) -> None:
    """(m − 1)·D·H more than one layer."""
    one_layer = count("concat", [1], MOBILE_LLAMA)
    more = count("concat", layers, MOBILE_LLAMA) - one_layer
    assert more == (len(layers) - 1) * 1024 * MOBILE_LLAMA


def test_exact_size_of_cross_attention_and_its_mlp() -> None:
    """Four square matrices without bias; three of a SwiGLU; a norm and a gate each."""
    gate_and_norm = 1 + MOBILE_LLAMA
    attention = count("inject_cross", [3], MOBILE_LLAMA, below="attention", mlp=True)
    mlp = count("inject_cross", [3], MOBILE_LLAMA, below="mlp", mlp=True)
    assert attention == 4 * MOBILE_LLAMA**2 + gate_and_norm
    assert mlp == 3 * MOBILE_LLAMA * MOBILE_LLAMA_FFN + gate_and_norm
