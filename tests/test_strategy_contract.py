"""What every registered strategy keeps: its calibration, initialisation, options and example."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from docs.generate import descriptions
from layerfuse.errors import LayerfuseError
from layerfuse.fusion import (
    FUSIONS,
    Fused,
    Fusion,
    Guidance,
    Shapes,
    StrategyConfig,
    register,
)
from layerfuse.fusion.blocks import Projector
from layerfuse.vision.features import Features
from layerfuse.vision.selection import select
from tests import naive, tiny
from tests.fusion_cases import (
    CASES,
    LLM_WIDTH,
    VISION_WIDTH,
    build,
    each_strategy,
    random_features,
    random_instruction,
    usual_layers,
)

each_with_a_naive_reference = pytest.mark.parametrize("name", naive.REFERENCES)


def projectors_of(fusion: nn.Module) -> list[Projector]:
    """All projectors, also those inside lists."""
    return [module for module in fusion.modules() if isinstance(module, Projector)]


@each_with_a_naive_reference
def test_calibration_standardises_the_layers(name: str) -> None:
    fusion = build(name, usual_layers(name), normalize="standardize", token_scale=10.0)
    features = random_features(fusion, images=40, grid=(2, 4))

    fusion.calibrate(features, embedding_std=0.03)

    zeros = torch.zeros(VISION_WIDTH).double()
    ones = torch.ones(VISION_WIDTH).double()
    for normalized in fusion.normalized(features, features.layers):
        # (B, N, Dv) -> (B · N, Dv)
        tokens = normalized.flatten(0, 1)
        torch.testing.assert_close(tokens.mean(dim=0), zeros, atol=1e-6, rtol=0)
        torch.testing.assert_close(tokens.std(dim=0), ones, atol=1e-5, rtol=0)


@each_with_a_naive_reference
def test_calibration_scales_the_tokens(name: str) -> None:
    """Every projector writes tokens of `token_scale` times the deviation of text embeddings."""
    fusion = build(name, usual_layers(name), normalize="standardize", token_scale=10.0)
    features = random_features(fusion, images=40, grid=(2, 4))

    fusion.calibrate(features, embedding_std=0.03)

    written: list[Tensor] = []

    def keep_output(module: nn.Module, inputs: Any, output: Tensor) -> None:
        written.append(output.detach())

    for projector in projectors_of(fusion):
        projector.register_forward_hook(keep_output)
    # a guided strategy is measured without text
    fusion(features, guidance="uniform")
    expected_number = 1
    if name.startswith("inject"):
        # the base layer, and two layers inside the LLM
        expected_number = 3
    assert len(written) == expected_number
    for output in written:
        assert float(output.std()) == pytest.approx(10.0 * 0.03, rel=1e-5)


@each_with_a_naive_reference
@torch.no_grad()
def test_published_defaults_have_no_extra_constants(name: str) -> None:
    """Without options, calibration changes nothing: the papers use raw features."""
    fusion = build(name, usual_layers(name))
    features = random_features(fusion, grid=(2, 4))
    instruction = random_instruction(fusion)

    before = fusion(features, instruction).tokens
    fusion.calibrate(features, embedding_std=0.03)
    after = fusion(features, instruction).tokens

    assert torch.equal(after, before)


@each_strategy
def test_every_option_is_described_where_it_is_declared(name: str) -> None:
    config, module = FUSIONS[name]
    assert descriptions(config).keys() == config.__dataclass_fields__.keys()
    assert module.kind
    assert module.paper
    assert module.summary


@each_strategy
def test_examples_fit_their_encoder(name: str) -> None:
    """The layers that `example` gives can be built, also for small encoders and odd depths."""
    config, module = FUSIONS[name]
    for depth, llm_depth in itertools.product((4, 12, 24, 27), (24, 32)):
        selection = select(module.example(depth), depth)
        shapes = Shapes(
            selection,
            vision_width=64,
            llm_width=64,
            llm_depth=llm_depth,
            llm_heads=4,
            llm_ffn=64,
        )
        with torch.device("meta"):
            module(config().resolve(selection), shapes)


def options_to_reset(name: str) -> list[dict[str, Any]]:
    """All options of the formula tests that fit any layers, or the defaults."""
    options: list[dict[str, Any]] = []
    for case in CASES:
        # a placement names blocks for the layers of its own case
        if case.name == name and "placement" not in case.options:
            options.append(case.options)
    if not options:
        # a strategy with formula tests elsewhere
        options.append({})
    return options


@each_strategy
def test_reset_sets_every_parameter(name: str) -> None:
    """What a model leaves on the meta device when it loads becomes a sound start: finite, closed
    gates, uniform weights."""
    config, module = FUSIONS[name]
    selection = select(module.example(8), 8)
    shapes = Shapes(
        selection,
        vision_width=64,
        llm_width=32,
        llm_depth=8,
        llm_heads=4,
        llm_ffn=48,
    )
    for options in options_to_reset(name):
        fusion = module(replace(config(), **options).resolve(selection), shapes)
        with torch.no_grad():
            for parameter in fusion.parameters():
                parameter.fill_(float("nan"))

        fusion.reset_parameters()

        for parameter_name, parameter in fusion.named_parameters():
            assert bool(parameter.isfinite().all()), parameter_name
            if parameter_name.endswith(("gate", "gates", "logits")):
                assert not parameter.any(), parameter_name


@each_strategy
def test_a_composed_model_starts_from_the_strategys_own_initialisation(name: str) -> None:
    """PyTorch's defaults in the projectors of every strategy alike, as in LLaVA, and not what
    transformers gives to a Linear."""
    model = tiny.model(name, open_gates=False)

    projectors = projectors_of(model.fusion)
    assert projectors
    for projector in projectors:
        layer = projector.linear_1
        weight = layer.weight.detach()
        # uniform in ± bound, whose standard deviation is bound / √3
        bound = 1 / math.sqrt(layer.in_features)
        assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.15)
        assert float(weight.abs().max()) <= bound
        # transformers would set it to zero
        assert bool(layer.bias.any())


class SumOfLayers(Fusion[StrategyConfig]):
    """The smallest strategy that a user can write."""

    kind = "external direct"
    paper = "none"

    def __init__(self, config: StrategyConfig, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        self.projector = Projector(shapes.vision_width, shapes.llm_width)

    def forward(
        self,
        features: Features,
        instruction: Tensor | None = None,
        guidance: Guidance = "instruction",
    ) -> Fused:
        layers = self.normalized(features, features.layers)
        total = torch.stack(layers).sum(dim=0)
        return Fused(self.projector(total))


def test_a_users_strategy_is_one_class() -> None:
    register("test_sum_of_layers", StrategyConfig)(SumOfLayers)
    try:
        fusion = build("test_sum_of_layers", [1, 2])
        fused = fusion(random_features(fusion))
        assert fused.tokens.shape == (2, 6, LLM_WIDTH)
        # what it has from the base class
        assert fusion.num_tokens(fusion.config, (2, 3), 2) == 6
        assert fusion.penalty(fused) is None
    finally:
        # the catalogue is shared by all tests
        FUSIONS.pop("test_sum_of_layers")


def test_a_users_strategy_cannot_take_the_name_of_another() -> None:
    with pytest.raises(LayerfuseError, match="already registered"):
        register("single", StrategyConfig)(SumOfLayers)
