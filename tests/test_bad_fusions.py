"""A fusion that cannot be built is one clear error, before any weights are made."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
from transformers import AutoConfig, PreTrainedConfig

from layerfuse.errors import LayerfuseError
from layerfuse.fusion import InjectCross, InstructionWeighted, parse
from layerfuse.fusion.blocks import GatedMLP
from layerfuse.model.config import configure
from layerfuse.vision.selection import LayerSpec
from tests import tiny
from tests.fusion_cases import LLM_WIDTH, build, shapes_around


def llm_config(family: str = "llama", blocks: int = 6) -> PreTrainedConfig:
    """The config of a tiny LLM of width 32."""
    if family == "phi":
        # a family whose blocks only `pre` knows
        return AutoConfig.for_model(
            "phi",
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=blocks,
            num_attention_heads=4,
        )
    return tiny.text_config(family, num_hidden_layers=blocks)


@dataclass(frozen=True)
class Bad:
    """A fusion that cannot be built for an encoder of 4 blocks and 16 patches."""

    layers: Any
    fusion: Any
    """what a recipe says"""
    message: str
    """regular expression of the error"""
    encoder: str = "clip"
    llm: str = "llama"
    llm_blocks: int = 6
    token_grid: tuple[int, int] | None = None

    def __str__(self) -> str:
        return f"{self.layers} {self.fusion}"


# A misspelt option that is ignored would train the default.
NAMES_AND_OPTIONS = [
    Bad(
        layers=[2],
        fusion={"name": "conct"},
        message="unknown fusion strategy 'conct'; valid: concat, ",
    ),
    Bad(
        layers=[2],
        fusion={"name": "single", "heads": 2},
        message="heads: Unexpected.*valid options: norm",
    ),
    Bad(
        layers=[1],
        fusion="concat",
        message="a fusion is a mapping",
    ),
]
# YAML gives floats, texts and nothing where a list of numbers is meant.
LAYERS = [
    Bad(
        layers=[5],
        fusion={"name": "single"},
        message=r"layer 5 does not exist: the encoder has 4 blocks.*0\.\.4",
    ),
    Bad(
        layers=[2],
        fusion={"name": "group_mean", "base": -6},
        message="layer -6 does not exist",
    ),
    Bad(
        layers=[2, -3],
        fusion={"name": "concat"},
        message=r"layers \[2\] are selected more than once",
    ),
    Bad(
        layers="1-2|2-3",
        fusion={"name": "group_mean"},
        message=r"layers \[2\] are selected more than once",
    ),
    Bad(
        layers=[[1], []],
        fusion={"name": "group_mean"},
        message="no layer is selected",
    ),
    Bad(
        layers=[1.5],
        fusion={"name": "single"},
        message=r"layers must be integers, not 1\.5",
    ),
    Bad(
        layers=["1"],
        fusion={"name": "single"},
        message="layers must be integers, not '1'",
    ),
    Bad(
        layers=None,
        fusion={"name": "single"},
        message="layers must be integers, not None",
    ),
]
# With one layer a guided strategy has nothing to choose.
NUMBERS_OF_LAYERS = [
    Bad(
        layers=[1, 2],
        fusion={"name": "single"},
        message="takes exactly one layer",
    ),
    Bad(
        layers=[2],
        fusion={"name": "text_routed"},
        message="select at least two",
    ),
    Bad(
        layers="former",
        fusion={"name": "instruction_weighted"},
        message="select at least two",
    ),
]
# Blocks are 0-based. Cross-attention has one memory a block, so that no two layers can share one;
# `inject_add` sums them.
PLACEMENTS = [
    Bad(
        layers=[1, 2],
        fusion={"name": "inject_add", "placement": [3]},
        message="must name a block for each",
    ),
    Bad(
        layers=[1, 2],
        fusion={"name": "inject_add", "placement": [3, 6]},
        message=r"the LLM has 6 blocks, 0\.\.5",
    ),
    Bad(
        layers=[1, 2],
        fusion={"name": "inject_add", "placement": [-1, 2]},
        message=r"the LLM has 6 blocks, 0\.\.5",
    ),
    Bad(
        layers=[1, 2],
        fusion={"name": "inject_cross", "placement": [3, 6]},
        message=r"the LLM has 6 blocks, 0\.\.5",
    ),
    Bad(
        layers="1-4",
        fusion={"name": "inject_add", "placement": "first"},
        llm_blocks=4,
        message="the LLM has 4 blocks",
    ),
    Bad(
        layers="1-4",
        fusion={"name": "inject_add", "placement": "last"},
        llm_blocks=3,
        message="the LLM has 3 blocks",
    ),
    Bad(
        layers="1-4",
        fusion={"name": "inject_cross"},
        llm_blocks=3,
        message="would share LLM blocks",
    ),
    Bad(
        layers=[1, 2],
        fusion={"name": "inject_cross", "placement": [3, 3]},
        message=r"share LLM blocks \[3, 3\]",
    ),
]
# Positions other than `pre` hook the parts of a block, which families build differently.
CROSS_ATTENTION = [
    Bad(
        layers=[1, 2],
        fusion={"name": "inject_cross", "heads": 5},
        message="5 heads do not divide.*width 32",
    ),
    Bad(
        layers=[2],
        fusion={"name": "inject_cross", "position": "post"},
        llm="phi",
        message="types llama.*not 'phi'",
    ),
    Bad(
        layers=[2],
        fusion={"name": "inject_cross", "position": "parallel"},
        llm="phi",
        message="not 'phi'",
    ),
    Bad(
        layers=[2],
        fusion={"name": "inject_cross", "released_residual": True},
        llm="phi",
        message="not 'phi'",
    ),
    Bad(
        layers=[2],
        fusion={"name": "inject_cross", "released_residual": True},
        llm="gemma3",
        message="'released' is defined for LLMs of the types llama, .*, not 'gemma3_text'",
    ),
    Bad(
        layers=[2],
        fusion={"name": "inject_cross", "released_residual": True, "position": "post"},
        message="released_residual is defined for position 'pre' only",
    ),
    Bad(
        layers=[2],
        fusion={"name": "inject_cross", "position": "parallel", "mlp": True},
        message="no place for `mlp`",
    ),
]
# The encoder gives 4×4 tokens where nothing pools them.
SIZES = [
    Bad(
        layers=[1],
        fusion={"name": "single"},
        token_grid=(0, 2),
        message="both at least 1",
    ),
    Bad(
        layers=[1],
        fusion={"name": "single", "token_scale": float("inf")},
        message="token_scale",
    ),
    Bad(
        layers=[1, 2],
        fusion={"name": "instruction_weighted", "summary": "cls"},
        encoder="siglip",
        message="summary 'cls': this encoder has no CLS token",
    ),
    Bad(
        layers=[2],
        fusion={"name": "token_concat", "stride": 17},
        message="stride 17 is more than the 16 tokens",
    ),
    Bad(
        layers=[2],
        fusion={"name": "token_concat", "stride": 5},
        token_grid=(2, 2),
        message="stride 5 is more than the 4 tokens",
    ),
]
ALL_BAD = [
    *NAMES_AND_OPTIONS,
    *LAYERS,
    *NUMBERS_OF_LAYERS,
    *PLACEMENTS,
    *CROSS_ATTENTION,
    *SIZES,
]


@pytest.mark.parametrize("bad", ALL_BAD, ids=str)
def test_bad_specifications_are_one_clear_error_before_weights(bad: Bad) -> None:
    vision = tiny.vision_config(bad.encoder)
    llm = llm_config(bad.llm, bad.llm_blocks)

    with pytest.raises(LayerfuseError, match=bad.message) as caught:
        configure(vision, llm, bad.layers, bad.fusion, token_grid=bad.token_grid)

    # one line, but for the table of valid layer specifications
    message = str(caught.value).split("; valid layer spec")[0]
    assert "\n" not in message


@dataclass(frozen=True)
class Good:
    """A fusion just inside the limits that `ALL_BAD` exceeds."""

    layers: LayerSpec
    fusion: dict[str, Any]
    encoder: str = "clip"
    llm: str = "llama"

    def __str__(self) -> str:
        return f"{self.layers} {self.fusion}"


ALL_GOOD = [
    Good(layers=[0], fusion={"name": "single"}),
    Good(
        layers="1-4",
        fusion={"name": "inject_add", "placement": [5, 5, 0, 0]},
    ),
    Good(
        layers="0-4",
        fusion={"name": "inject_cross", "placement": "first"},
    ),
    Good(
        layers=[1, 2],
        fusion={"name": "inject_cross", "heads": 8, "position": "parallel"},
    ),
    Good(
        layers=[2],
        fusion={"name": "token_concat", "stride": 16},
    ),
    Good(
        layers=[2],
        fusion={"name": "inject_cross"},
        llm="phi",
    ),
    Good(
        layers=[2],
        fusion={"name": "inject_cross", "position": "post", "mlp": True},
        llm="gemma3",
    ),
    Good(
        layers=[1, 2],
        fusion={"name": "instruction_weighted", "summary": "mean"},
        encoder="siglip",
    ),
]


@pytest.mark.parametrize("good", ALL_GOOD, ids=str)
def test_the_limits_of_good_specifications(good: Good) -> None:
    vision = tiny.vision_config(good.encoder)
    llm = llm_config(good.llm)
    assert configure(vision, llm, good.layers, good.fusion).fusion is not None


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "conct"}, "unknown fusion strategy 'conct'; valid: concat, "),
        ({}, "a fusion needs a name"),
        (
            {"name": "concat", "bse": 3},
            "bse.*valid options: normalize, shrinkage, token_scale",
        ),
        ({"name": "concat", "projector": "conv"}, "projector: Input should be 'mlp' or 'linear'"),
        ({"name": "concat", "token_scale": 0}, "token_scale: Input should be greater than 0"),
        ({"name": "concat", "shrinkage": 0.5}, "shrinkage 0.5 belongs to normalize: whiten"),
        ({"name": "concat", "normalize": "batch"}, "normalize: Input should be 'none'"),
    ],
)
def test_bad_strategies(spec: dict[str, Any], message: str) -> None:
    """Also without an encoder, the strategy and its options are checked."""
    with pytest.raises(LayerfuseError, match=message):
        parse(spec)


def test_a_width_that_the_allocators_heads_do_not_divide() -> None:
    shapes = replace(shapes_around([1, 2]), vision_width=6)
    strategy = parse({"name": "instruction_weighted"})

    assert strategy.module is InstructionWeighted
    with pytest.raises(LayerfuseError, match="4 heads: they must divide width 6"):
        strategy.module(strategy.options.resolve(shapes.selection), shapes)


def test_inner_width_of_an_llm_that_does_not_tell() -> None:
    """Four times the LLM's width, as is usual."""
    fusion = build("inject_cross", [2], llm_ffn=None, mlp=True)

    assert isinstance(fusion, InjectCross)
    mlps = [module for module in fusion.modules() if isinstance(module, GatedMLP)]
    assert len(mlps) == 1
    assert mlps[0].up_proj.out_features == 4 * LLM_WIDTH
