"""Each strategy computes its formula; each registered strategy keeps the contract."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerfuse.encoder import Features
from layerfuse.fusion import (
    FUSIONS,
    Fusion,
    Shapes,
    StrategyConfig,
    descriptions,
    parse,
    register,
)
from layerfuse.fusion.base import Visual, place
from layerfuse.fusion.inject_add import llm_blocks
from layerfuse.layers import Projector
from layerfuse.selection import select
from tests import tiny

VISION, LLM, DEPTH, LLM_DEPTH = 6, 5, 8, 12
CASES: list[tuple[str, Any, dict[str, Any]]] = [
    ("single", [3], {}),
    ("single", [3], {"projector": "linear"}),
    ("concat", [5, 2, 8], {}),
    ("concat", [5, 2, 8], {"projector": "linear", "normalize": "standardize"}),
    ("group_mean", "1-3|4-6", {}),
    ("group_mean", "former", {"base": -1, "normalize": "layernorm"}),
    ("inject_add", [2, 6], {}),
    ("inject_add", [2, 6], {"placement": "first", "normalize": "standardize"}),
]


def build(name: str, layers: Any, options: dict[str, Any], depth: int = DEPTH) -> Fusion:
    selection = select(layers, depth)
    config, module = parse({"name": name, **options})
    return module(config.resolve(selection), Shapes(selection, VISION, LLM, LLM_DEPTH)).double()


def features(fusion: Fusion, images: int = 2, grid: tuple[int, int] = (2, 3)) -> Features:
    layers = fusion.config.taps(fusion.shapes.selection)
    shape = (images, grid[0] * grid[1], VISION)
    scales = [1.0 + k for k in layers]
    patches = tuple(s * torch.randn(shape, dtype=torch.double) + s for s in scales)
    summary = tuple(p.mean(dim=1) for p in patches)
    return Features(layers, patches, summary, grid)


def randomize(fusion: Fusion) -> None:
    with torch.no_grad():
        for tensor in [*fusion.parameters(), *fusion.buffers()]:
            tensor.copy_(torch.rand_like(tensor) + 0.5)


def naive_projector(p: Projector, x: list[float]) -> list[float]:
    """One token, written out: Linear, exact GELU, Linear."""

    def linear(layer: nn.Module, x: list[float]) -> list[float]:
        if isinstance(layer, nn.Identity):
            return x
        weight, bias = layer.get_parameter("weight").tolist(), layer.get_parameter("bias").tolist()
        rows = zip(weight, bias, strict=True)
        return [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in rows]

    hidden = linear(p.linear_1, x)
    if isinstance(p.linear_2, nn.Linear):
        hidden = [0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in hidden]
    return [v * float(p.scale) for v in linear(p.linear_2, hidden)]


def naive_normalize(fusion: Fusion, layer: int, x: list[float]) -> list[float]:
    norm = fusion.norms[str(layer)]
    kind = fusion.config.normalize
    if kind == "none":
        return x
    if kind == "standardize":
        mean, std = norm.get_buffer("mean").tolist(), norm.get_buffer("std").tolist()
        return [(v - m) / s for v, m, s in zip(x, mean, std, strict=True)]
    center = sum(x) / len(x)
    spread = math.sqrt(sum((v - center) ** 2 for v in x) / len(x) + 1e-5)
    weight, bias = norm.get_parameter("weight").tolist(), norm.get_parameter("bias").tolist()
    return [(v - center) / spread * w + b for v, w, b in zip(x, weight, bias, strict=True)]


def naive(fusion: Fusion, features: Features, image: int, token: int) -> dict[str, list[float]]:
    """What the strategy's formula gives for one token of one image, in plain floats."""

    def h(layer: int) -> list[float]:
        x = features.patches[features.layers.index(layer)][image, token].tolist()
        return naive_normalize(fusion, layer, x)

    chosen, config = fusion.shapes.selection, fusion.config
    name = next(n for n in FUSIONS.names() if FUSIONS[n][1] is type(fusion))
    main = fusion.get_submodule("projector")
    assert isinstance(main, Projector)
    if name in ("single", "concat"):
        return {"tokens": naive_projector(main, [v for k in chosen.layers for v in h(k)])}
    if name == "group_mean":
        parts: list[float] = []
        for group in chosen.groups:
            vectors = [h(k) for k in group]
            parts += [sum(column) / len(group) for column in zip(*vectors, strict=True)]
        return {"tokens": naive_projector(main, parts + h(config.base))}
    assert name == "inject_add"
    found = {"tokens": naive_projector(main, h(config.base))}
    for i, (k, block) in enumerate(zip(chosen.layers, fusion.blocks, strict=True)):  # type: ignore[arg-type]
        own = fusion.get_submodule(f"projectors.{i}")
        assert isinstance(own, Projector)
        found[f"memory {block}"] = naive_projector(own, h(k))
    return found


@pytest.mark.parametrize(("name", "layers", "options"), CASES)
@pytest.mark.parametrize("grid", [(2, 2), (3, 1), (2, 5)])
def test_formula(name: str, layers: Any, options: dict[str, Any], grid: tuple[int, int]) -> None:
    fusion = build(name, layers, options)
    randomize(fusion)
    x = features(fusion, grid=grid)
    visual = fusion(x)
    for image in range(2):
        for token in range(grid[0] * grid[1]):
            expected = naive(fusion, x, image, token)
            found = {"tokens": visual.tokens[image, token].tolist()}
            found |= {f"memory {b}": m[image, token].tolist() for b, m in visual.memory.items()}
            assert found.keys() == expected.keys()
            for key, values in expected.items():
                assert found[key] == pytest.approx(values, abs=1e-9), key


def test_every_strategy_is_in_the_formula_test_and_in_the_model_tests() -> None:
    assert {case[0] for case in CASES} == set(FUSIONS.names()) == set(tiny.STRATEGIES)


def test_linear_concat_is_the_sum_of_linears() -> None:
    fusion = build("concat", [1, 4, 7], {"projector": "linear"})
    x = features(fusion)
    projector = fusion.get_submodule("projector")
    assert isinstance(projector, Projector)
    weights = projector.linear_1.weight.split(VISION, dim=1)
    summed = sum(h @ w.T for h, w in zip(x.select([1, 4, 7]), weights, strict=True))
    torch.testing.assert_close(fusion(x).tokens, summed + projector.linear_1.bias)


def test_group_mean_of_single_layers_is_concat() -> None:
    grouped, plain = build("group_mean", [1, 4], {"base": 7}), build("concat", [1, 4, 7], {})
    grouped.load_state_dict(plain.state_dict())
    x = features(plain)
    assert torch.equal(grouped(x).tokens, plain(x).tokens)


@pytest.mark.parametrize(
    ("depth", "llm_depth", "layers", "blocks"),
    [
        (24, 24, [3, 18, 23], (2, 17, 22)),
        (24, 32, [3, 18, 23], (3, 23, 29)),
        (24, 32, [1, 2], (0, 1)),
        (12, 30, [2, 6, 12], (4, 14, 29)),
    ],
)
def test_proportional_placement(
    depth: int, llm_depth: int, layers: list[int], blocks: tuple[int, ...]
) -> None:
    """int(k·L/24 − 1): for 24 blocks 3→2, 18→17, 23→22, for 32 blocks 3→3, 18→23, 23→29."""
    shapes = Shapes(select(layers, depth), VISION, LLM, llm_depth)
    assert llm_blocks("proportional", shapes) == blocks


def test_other_placements() -> None:
    shapes = Shapes(select([1, 5, 8], DEPTH), VISION, LLM, LLM_DEPTH)
    assert llm_blocks("first", shapes) == (0, 1, 2)
    assert llm_blocks("last", shapes) == (9, 10, 11)
    assert llm_blocks((4, 4, 0), shapes) == (4, 4, 0)


def test_layers_placed_before_the_same_block_are_both_added() -> None:
    fusion = build("inject_add", [2, 6], {"placement": [4, 4]})
    x = features(fusion)
    visual = fusion(x)
    projectors = fusion.get_submodule("projectors")
    parts = [p(h) for p, h in zip(projectors.children(), x.select([2, 6]), strict=True)]
    assert list(visual.memory) == [4]
    torch.testing.assert_close(visual.memory[4], parts[0] + parts[1])


def test_place_puts_images_in_reading_order() -> None:
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    memory = torch.arange(6.0).reshape(3, 2, 1)
    expected = [[0, 0, 1, 0], [0, 0, 0, 0], [2, 3, 4, 5]]
    assert place(memory, mask)[..., 0].tolist() == expected


def test_dense_connector_index_sets() -> None:
    """DCI: h_23 with mean(hs[0..11]) and mean(hs[12..23]); E_D `all`: {1..12} and {13..24}."""
    selection = select("0-11|12-23", 24)
    config = parse({"name": "group_mean"})[0].resolve(selection)
    assert config.taps(selection) == tuple(range(24))
    everything = select("all", 24)
    config = parse({"name": "group_mean"})[0].resolve(everything)
    assert config.taps(everything) == tuple(range(1, 25))


def test_calibration_standardises_and_scales_the_tokens() -> None:
    options = {"normalize": "standardize", "token_scale": 10.0}
    fusion = build("inject_add", [2, 6], options)
    x = features(fusion, images=40)
    fusion.calibrate(x, embedding_std=0.03)
    for values in fusion.normalized(x, [2, 6, 7]):
        flat = values.flatten(0, 1)
        torch.testing.assert_close(
            flat.mean(dim=0), torch.zeros(VISION).double(), atol=1e-6, rtol=0
        )
        torch.testing.assert_close(flat.std(dim=0), torch.ones(VISION).double(), atol=1e-5, rtol=0)
    visual = fusion(x)
    for written in (visual.tokens, *visual.memory.values()):
        assert float(written.detach().std()) == pytest.approx(0.3, rel=1e-5)


def test_published_defaults_have_no_extra_constants() -> None:
    """Without options, calibration changes nothing: the papers use raw features."""
    fusion = build("concat", [2, 6], {})
    x = features(fusion)
    before = fusion(x).tokens
    fusion.calibrate(x, embedding_std=0.03)
    assert torch.equal(fusion(x).tokens, before)


@pytest.mark.parametrize("name", FUSIONS.names())
def test_every_option_is_described_where_it_is_declared(name: str) -> None:
    config, module = FUSIONS[name]
    assert descriptions(config).keys() == config.__dataclass_fields__.keys()
    assert module.kind
    assert module.paper


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "conct"}, "unknown fusion strategy 'conct'; valid: concat, group_mean"),
        ({}, "a fusion needs a name"),
        ({"name": "concat", "bse": 3}, "bse.*valid options: normalize, token_scale, proj"),
        ({"name": "concat", "projector": "conv"}, "projector: Input should be 'mlp' or 'linear'"),
    ],
)
def test_bad_strategies(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(spec)


@pytest.mark.parametrize(
    ("name", "layers", "options", "message"),
    [
        ("single", [1, 2], {}, "takes exactly one layer"),
        ("group_mean", [1, 2], {"base": 9}, "layer 9 does not exist"),
        ("inject_add", [1, 2], {"placement": [3]}, "must name a block for each"),
        ("inject_add", [1, 2], {"placement": [3, 12]}, r"the LLM has 12 blocks, 0\.\.11"),
        ("inject_add", "every:1", {"placement": "last", "base": 3}, None),
    ],
)
def test_bad_options(name: str, layers: Any, options: dict[str, Any], message: str | None) -> None:
    if message is None:
        build(name, layers, options)
        return
    with pytest.raises(ValueError, match=message):
        build(name, layers, options)


def test_more_layers_than_blocks() -> None:
    with pytest.raises(ValueError, match="the LLM has 12 blocks"):
        build("inject_add", "1-14", {"placement": "first"}, depth=24)


def test_a_users_strategy_is_one_class() -> None:
    @register("test_last_two_sum", StrategyConfig)
    class Sum(Fusion):
        kind = "external direct"
        paper = "none"

        def __init__(self, config: Any, shapes: Shapes) -> None:
            super().__init__(config, shapes)
            self.projector = Projector(shapes.vision_width, shapes.llm_width)

        def forward(self, features: Features) -> Visual:
            total: Tensor = sum(self.normalized(features, features.layers))  # type: ignore[assignment]
            return Visual(self.projector(total))

    try:
        fusion = build("test_last_two_sum", [1, 2], {})
        assert fusion(features(fusion)).tokens.shape == (2, 6, LLM)
        with pytest.raises(ValueError, match="already registered"):
            register("single", StrategyConfig)(Sum)
    finally:
        FUSIONS._pairs.pop("test_last_two_sum")
