"""Each strategy computes its formula; each registered strategy keeps the contract."""

import itertools
import math
from dataclasses import replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from docs.generate import descriptions
from layerfuse.errors import LayerfuseError
from layerfuse.fusion import (
    FUSIONS,
    FixedWeights,
    Fused,
    Fusion,
    Guidance,
    InjectCross,
    InstructionWeighted,
    Layout,
    Shapes,
    StrategyConfig,
    parse,
    register,
)
from layerfuse.fusion.blocks import GatedMLP, Projector
from layerfuse.fusion.injector import llm_blocks
from layerfuse.fusion.visual import spread
from layerfuse.model.config import configure
from layerfuse.vision.features import Features
from layerfuse.vision.selection import select
from tests import naive, tiny

VISION, LLM, DEPTH, LLM_DEPTH, SENTENCE = 8, 6, 8, 12, 5
ELSEWHERE = {"deformable"}
"""strategies whose formula is tested in a file of their own: tests/test_deformable.py"""

GROUPS = "1-3|4-6"
FIXED = FixedWeights(torch.tensor([0.1, 0.6, 0.3]))
CASES: list[tuple[str, Any, dict[str, Any]]] = [
    ("single", [3], {}),
    ("single", [0], {"projector": "linear"}),
    ("concat", [5, 2, 8], {}),
    ("concat", [5, 2, 8], {"projector": "linear"}),
    ("concat", "0-2|5,3", {}),
    ("group_mean", GROUPS, {}),
    ("group_mean", "former", {"base": -1}),
    ("group_mean", [2, 7, 4], {"projector": "linear", "base": 4}),
    ("token_concat", [5, 2], {"stride": 1}),
    ("token_concat", [7, 2, 3], {"stride": 2, "base": 3}),
    ("token_concat", GROUPS, {"stride": 3}),
    ("weighted_sum", "every:1", {}),
    ("weighted_sum", "4,1|0,8|3", {"base": 1}),
    ("weighted_sum", GROUPS, {"beside": "concat"}),
    ("weighted_sum", [6, 3, 7], {"beside": "add", "base": 3}),
    ("text_routed", "every:1", {"hidden": 7}),
    ("text_routed", "1-3|8,4", {"hidden": 3, "base": 4, "entropy_weight": 0.1}),
    ("instruction_weighted", "1-2|3-4|5-6|7-8", {}),
    ("instruction_weighted", [3, 1], {"group_identity": True, "base": 5}),
    ("instruction_weighted", GROUPS, {"summary": "cls", "regularizer": "off"}),
    ("instruction_weighted", GROUPS, {"summary": "mean", "regularizer": "released"}),
    ("instruction_weighted", GROUPS, {"regularizer": "balance", "regularizer_weight": 1.0}),
    ("inject_add", [2, 6], {}),
    ("inject_add", [6, 2, 3], {"placement": "first", "gate": True}),
    ("inject_add", [2, 6], {"placement": "last", "base": 2}),
    ("inject_add", [2, 6, 8], {"placement": [4, 0, 4], "gate": True}),
    ("inject_cross", [2, 6], {}),
    ("inject_cross", [6, 2], {"placement": "first", "position": "post", "mlp": True, "heads": 1}),
    ("inject_cross", [6, 2], {"placement": "last", "position": "parallel", "heads": 2}),
    ("inject_cross", [6, 2], {"placement": [5, 1], "mlp": True, "heads": 6}),
    ("inject_cross", [6, 2], {"released_residual": True, "mlp": True, "base": 2}),
]
NORMALIZE = ["none", "layernorm", "standardize"]
each_case = pytest.mark.parametrize(("name", "layers", "options"), CASES)
each_strategy = pytest.mark.parametrize("name", list(FUSIONS))


def around(layers: Any, depth: int = DEPTH, **changes: Any) -> Shapes:
    selection = select(layers, depth)
    inside_llm = {"llm_heads": 3, "llm_ffn": 10, **changes}
    return Shapes(selection, VISION, LLM, LLM_DEPTH, **inside_llm)


def build(
    name: str, layers: Any, options: dict[str, Any], depth: int = DEPTH, **changes: Any
) -> Any:
    shapes = around(layers, depth, **changes)
    widths = {"sentence_width": SENTENCE} if name == "instruction_weighted" else {}
    strategy = parse({"name": name, **widths, **options})
    fusion = strategy.module(strategy.options.resolve(shapes.selection), shapes).double()
    fusion.reset_parameters()
    return fusion


def features(
    fusion: Fusion, images: int = 2, grid: tuple[int, int] = (2, 3), cls: bool = True
) -> Features:
    layers = fusion.config.taps(fusion.shapes.selection)
    shape = (images, grid[0] * grid[1], fusion.shapes.vision_width)
    patches = tuple((1 + k) * (torch.randn(shape, dtype=torch.double) + 1) for k in layers)
    summary = tuple(torch.randn_like(p[:, 0]) if cls else p.mean(dim=1) for p in patches)
    return Features(layers, patches, summary, grid)


def instruction(fusion: Fusion, images: int = 2) -> Tensor | None:
    widths = {"sentence": SENTENCE, "prompt": LLM}
    if fusion.reads == "nothing":
        return None
    return torch.randn(images, widths[fusion.reads], dtype=torch.double)


def randomize(fusion: Fusion) -> None:
    """Every weight random, so that none can be left out unseen."""
    with torch.no_grad():
        for parameter in fusion.parameters():
            fan = parameter.shape[-1] if parameter.ndim > 1 else 1
            parameter.copy_(torch.randn_like(parameter) / math.sqrt(fan))
        for buffer in fusion.buffers():
            buffer.copy_(torch.rand_like(buffer) + 0.5)


def assert_is(answer: naive.Answer, visual: Fused, rel: float) -> None:
    """Equal to `rel` of the largest value."""

    def close(tensor: Tensor, expected: np.ndarray) -> None:
        assert tensor.shape == expected.shape
        limit = rel * max(1.0, float(np.abs(expected).max()))
        assert float(np.abs(naive.array(tensor) - expected).max()) <= limit

    close(visual.tokens, answer.tokens)
    assert visual.memory.keys() == answer.memory.keys()
    for block, memory in answer.memory.items():
        close(visual.memory[block], memory)
    assert ("weights" in visual.notes) == (answer.weights is not None)
    if answer.weights is not None:
        close(visual.notes["weights"], answer.weights)


@each_case
@pytest.mark.parametrize("normalize", NORMALIZE)
@torch.no_grad()
def test_formula(name: str, layers: Any, options: dict[str, Any], normalize: str) -> None:
    fusion = build(name, layers, {**options, "normalize": normalize})
    for grid in [(2, 2), (3, 1), (2, 5)]:
        randomize(fusion)
        x, question = features(fusion, grid=grid), instruction(fusion)
        visual = fusion(x, question)
        assert_is(naive.solve(fusion, x, question), visual, rel=1e-9)
        count = len(fusion.shapes.selection.layers)
        assert visual.tokens.shape[1] == fusion.num_tokens(fusion.config, grid, count)


@each_case
@torch.no_grad()
def test_formula_in_single_precision(name: str, layers: Any, options: dict[str, Any]) -> None:
    fusion = build(name, layers, options)
    randomize(fusion)
    x, question = features(fusion, grid=(3, 3)), instruction(fusion)
    expected = naive.solve(fusion, x, question)
    visual = fusion.float()(x.to(torch.float), None if question is None else question.float())
    assert_is(expected, visual, rel=1e-5)


@pytest.mark.parametrize("guidance", ["uniform", FIXED])
@pytest.mark.parametrize("name", ["text_routed", "instruction_weighted"])
@torch.no_grad()
def test_formula_without_instruction(name: str, guidance: Any) -> None:
    fusion = build(name, [1, 4, 8], {})
    randomize(fusion)
    with pytest.raises(LayerfuseError, match=r"got no instruction: .*guidance='uniform'"):
        fusion(features(fusion))
    x = features(fusion)
    expected = naive.solve(fusion, x, guidance=guidance)
    assert_is(expected, fusion(x, guidance=guidance), rel=1e-9)


@pytest.mark.parametrize("summary", ["auto", "mean"])
@torch.no_grad()
def test_formula_without_cls_token(summary: str) -> None:
    """Where the encoder has none, the summary of a layer is its mean patch token."""
    fusion = build("instruction_weighted", GROUPS, {"summary": summary}, has_cls=False)
    randomize(fusion)
    x, question = features(fusion, cls=False), instruction(fusion)
    assert_is(naive.solve(fusion, x, question), fusion(x, question), rel=1e-9)


def test_every_strategy_is_in_the_formula_tests() -> None:
    assert {case[0] for case in CASES} == set(naive.REFERENCES)
    assert set(naive.REFERENCES) == set(FUSIONS) - ELSEWHERE


@pytest.mark.parametrize("name", naive.REFERENCES)
def test_every_value_of_every_option_is_in_the_formula_tests(name: str) -> None:
    config = FUSIONS[name][0]
    cases = [options for case, _, options in CASES if case == name]
    for option, kind in get_type_hints(config).items():
        kinds = [kind] if get_origin(kind) is Literal else get_args(kind)
        values = [v for k in kinds if get_origin(k) is Literal for v in get_args(k)]
        values = [False, True] if kind is bool else values
        used = [case.get(option, getattr(config(), option)) for case in cases]
        if option != "normalize":  # has a parameter of its own there
            assert all(value in used for value in values), option


ROWS = [[0, 1, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("case", [c for c in CASES if c[0] == "inject_cross"])
@torch.no_grad()
def test_cross_attention_formula(case: tuple[str, Any, dict[str, Any]]) -> None:
    """Against loops over positions, heads and keys, wherever an image is seen."""
    fusion = build(*case)
    randomize(fusion)
    x, mask = features(fusion, images=3, grid=(1, 2)), torch.tensor(ROWS).bool()
    expected = naive.solve(fusion, x)
    visual = fusion.place(fusion(x), Layout.of(mask, images=3, tokens_per_image=2))
    hidden = torch.randn(3, 7, LLM, dtype=torch.double)
    weights, heads = naive.weights_of(fusion), fusion.config.heads or 3
    images = [[0, 1], [], [2]]
    for block, memory in expected.memory.items():
        added = fusion.addition(block, hidden, visual)
        for row in range(3):
            seen_memory = [memory[i] for i in images[row]]
            state = naive.array(hidden[row])
            answer = naive.cross_addition(weights, block, heads, state, seen_memory, ROWS[row])  # type: ignore[arg-type]
            sees = visual.seen[row].any(dim=-1)
            difference = np.abs(naive.array(added[row]) - answer)[sees.numpy()]
            assert difference.size == 0 or difference.max() < 1e-9


def test_seen_images() -> None:
    """Image tokens see their image; text sees the images that have ended before it."""
    a, b = [True, False], [False, True]
    nothing, both = [False, False], [True, True]
    expected = [[nothing, a, a, a, b, b, both], [nothing] * 7, [a, a, a, a, a, a, a]]
    assert (
        Layout.of(torch.tensor(ROWS).bool(), images=3, tokens_per_image=2).seen_images().tolist()
        == expected
    )
    for row, answer in zip(ROWS, expected, strict=True):
        visible = naive.visible([bool(v) for v in row], each=2)
        assert [{i for i in range(2) if v[i]} for v in answer] == visible


@torch.no_grad()
def test_inject_add_closed_gates_are_the_base_alone() -> None:
    """As built, the gates are closed; then the tokens are `single`'s and nothing is added."""
    fusion = build("inject_add", [2, 6], {"gate": True, "base": 7})
    base = build("single", [7], {})
    base.projector.load_state_dict(fusion.projector.state_dict())
    x = features(fusion)
    visual = fusion(x)
    assert torch.equal(visual.tokens, base(x).tokens)
    assert all(not memory.any() for memory in visual.memory.values())
    fusion.gates.fill_(0.5)
    assert all(memory.any() for memory in fusion(x).memory.values())


def test_linear_concat_is_the_sum_of_linears() -> None:
    fusion = build("concat", [1, 4, 7], {"projector": "linear"})
    x = features(fusion)
    weights = fusion.projector.linear_1.weight.split(VISION, dim=1)
    summed = sum(h @ w.T for h, w in zip(x.select([1, 4, 7]), weights, strict=True))
    torch.testing.assert_close(fusion(x).tokens, summed + fusion.projector.linear_1.bias)


@torch.no_grad()
def test_mlp_concat_is_a_sum_of_linears_up_to_its_gelu() -> None:
    """The linear fusion of three layers is the MLP one without what follows its first Linear."""
    mlp = build("concat", [3, 18, 23], {}, depth=24)
    linear = build("concat", [3, 18, 23], {"projector": "linear"}, depth=24)
    linear.projector.linear_1.load_state_dict(mlp.projector.linear_1.state_dict())
    x = features(mlp)
    rest = mlp.projector.linear_2(nn.functional.gelu(linear(x).tokens))
    torch.testing.assert_close(mlp(x).tokens, rest)


def test_group_mean_of_single_layers_is_concat() -> None:
    grouped, plain = build("group_mean", [1, 4], {"base": 7}), build("concat", [1, 4, 7], {})
    grouped.load_state_dict(plain.state_dict())
    x = features(plain)
    assert torch.equal(grouped(x).tokens, plain(x).tokens)


def test_external_direct_double_is_triple() -> None:
    """E_D with h_3 and h_18 beside the base h_23 is E_D with h_3, h_18 and h_23."""
    double = build("group_mean", [3, 18], {}, depth=24)
    triple = build("concat", [3, 18, 23], {}, depth=24)
    assert double.config.base == 23
    double.load_state_dict(triple.state_dict())
    x = features(triple)
    assert torch.equal(double(x).tokens, triple(x).tokens)


def mean_taps(spec: str) -> tuple[list[tuple[int, ...]], int, tuple[int, ...]]:
    selection = select(spec, 24)
    config: Any = parse({"name": "group_mean"}).options.resolve(selection)
    return list(selection.groups), config.base, config.taps(selection)


def test_dense_connector_index_sets() -> None:
    """DCI: h_23 with mean(hs[0..11]) and mean(hs[12..23]); E_D `all`: {1..12} and {13..24}."""
    dci = [tuple(range(12)), tuple(range(12, 24))]
    assert mean_taps("0-11|12-23") == (dci, 23, tuple(range(24)))
    everything = [tuple(range(1, 13)), tuple(range(13, 25))]
    assert mean_taps("all") == (everything, 23, tuple(range(1, 25)))
    assert mean_taps("former") == (everything[:1], 23, (*range(1, 13), 23))


@pytest.mark.parametrize(("side", "count"), [(24, 720), (27, 911)])
def test_token_concat_counts(side: int, count: int) -> None:
    """STI: 576 + 72 + 72 tokens for CLIP, 729 + 91 + 91 for SigLIP."""
    fusion = build("token_concat", [7, 15], {}, depth=24)
    assert fusion.num_tokens(fusion.config, (side, side), 2) == count
    assert fusion(features(fusion, images=1, grid=(side, side))).tokens.shape == (1, count, LLM)


@torch.no_grad()
def test_instruction_weights_sum_to_one_and_follow_the_instruction() -> None:
    fusion = build("instruction_weighted", "1-2|3-4|5-6|7-8", {})
    randomize(fusion)
    x = features(fusion, images=5)
    weights = fusion(x, instruction(fusion, 5)).notes["weights"]
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(5).double())
    assert bool((weights > 0).all())
    assert not torch.allclose(weights, fusion(x, instruction(fusion, 5)).notes["weights"])


@pytest.mark.parametrize("identity", [False, True])
@torch.no_grad()
def test_allocator_does_not_know_the_order_of_groups(identity: bool) -> None:
    """As published, only the last Linear tells groups apart: permuting the groups changes nothing
    of the weights, and permuting its rows permutes them; `group_identity` tells them apart."""
    fusion = build("instruction_weighted", [1, 4, 6, 8], {"group_identity": identity})
    randomize(fusion)
    allocator = fusion.allocator
    groups, question = torch.randn(3, 4, VISION).double(), torch.randn(3, SENTENCE).double()
    order = torch.tensor([2, 0, 3, 1])
    before = allocator(question, groups)
    assert torch.allclose(allocator(question, groups[:, order]), before) != identity
    for tensor in (allocator.output.weight, allocator.output.bias):
        tensor.copy_(tensor[order].clone())
    if identity:
        allocator.identity.copy_(allocator.identity[order].clone())
    torch.testing.assert_close(allocator(question, groups[:, order]), before[:, order])


@torch.no_grad()
def test_uniform_instruction_weighting_is_the_mean_of_all_layers() -> None:
    """IGVA's first stage: h_23 beside the mean of h_1..h_24, and its static twin as built."""
    fusion = build("instruction_weighted", "1-6|7-12|13-18|19-24", {}, depth=24)
    twin = build("weighted_sum", "1-6|7-12|13-18|19-24", {"beside": "concat"}, depth=24)
    assert not twin.logits.any()
    twin.projector.load_state_dict(fusion.projector.state_dict())
    x = features(fusion)
    mean = torch.stack(x.select(range(1, 25))).mean(dim=0)
    expected = fusion.projector(torch.cat([*x.select([23]), mean], dim=-1))
    torch.testing.assert_close(fusion(x, guidance="uniform").tokens, expected)
    torch.testing.assert_close(twin(x).tokens, expected)


@torch.no_grad()
def test_uniform_routing_is_the_static_sum() -> None:
    fusion, twin = (
        build(name, "every:1", options)
        for name, options in (("text_routed", {}), ("weighted_sum", {"beside": "add"}))
    )
    randomize(fusion)
    for name in ("norm", "projector"):
        getattr(twin, name).load_state_dict(getattr(fusion, name).state_dict())
    x = features(fusion)
    torch.testing.assert_close(fusion(x, guidance="uniform").tokens, twin(x).tokens)


def entropy(weights: list[float]) -> float:
    return -sum(w * math.log(w) for w in weights if w > 0)


WEIGHTS = [[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4]]


def penalty(fusion: Fusion, weights: list[list[float]]) -> float | None:
    value = fusion.penalty(Fused(torch.zeros(1), notes={"weights": torch.tensor(weights)}))
    return None if value is None else float(value)


def regularized(kind: str) -> Fusion:
    options = {"regularizer": kind, "regularizer_weight": 0.02}
    return build("instruction_weighted", "1-2|3-4|5-6|7-8", options)


def test_regularizers_are_their_formulas() -> None:
    assert penalty(regularized("off"), WEIGHTS) is None
    mean_entropy = sum(map(entropy, WEIGHTS)) / 3
    assert penalty(regularized("entropy"), WEIGHTS) == pytest.approx(-0.02 * mean_entropy)
    twice = [naive.softmax(np.array(w)).tolist() for w in WEIGHTS]
    released = -0.02 * sum(map(entropy, twice)) / 3
    assert penalty(regularized("released"), WEIGHTS) == pytest.approx(released)
    mean = [sum(column) / 3 for column in zip(*WEIGHTS, strict=True)]
    assert penalty(regularized("balance"), WEIGHTS) == pytest.approx(-0.02 * entropy(mean))


def test_released_regularizer_is_nearly_constant() -> None:
    """It stays in [−1.3863, −1.2682]·λ; the meant one in [−1.3863, 0]·λ."""
    for kind, highest in (("released", -1.2682), ("entropy", 0.0)):
        fusion = regularized(kind)
        assert penalty(fusion, WEIGHTS[:1]) == pytest.approx(-1.3863 * 0.02, rel=1e-4)
        assert penalty(fusion, WEIGHTS[1:2]) == pytest.approx(highest * 0.02, rel=1e-4, abs=1e-9)
        draws = torch.distributions.Dirichlet(torch.full((4,), 0.3)).sample((200,)).tolist()
        values = [penalty(fusion, [w]) for w in draws]
        assert all(-1.38635 * 0.02 <= v <= highest * 0.02 * 0.9999 for v in values if v is not None)


def test_balance_lets_each_image_choose() -> None:
    """Images that each want one group, all groups alike, are at the optimum of `balance` only."""
    sharp = torch.eye(4).tolist()
    assert penalty(regularized("balance"), sharp) == pytest.approx(-0.02 * math.log(4))
    assert penalty(regularized("entropy"), sharp) == pytest.approx(0)


def test_router_spreads_the_batch_only_if_asked() -> None:
    assert penalty(build("text_routed", [1, 2, 3, 4], {}), WEIGHTS) is None
    fusion = build("text_routed", [1, 2, 3, 4], {"entropy_weight": 0.5})
    mean = [sum(column) / 3 for column in zip(*WEIGHTS, strict=True)]
    assert penalty(fusion, WEIGHTS) == pytest.approx(-0.5 * entropy(mean))


def parameters(
    name: str, layers: Any, options: dict[str, Any], llm_width: int, prefix: str = ""
) -> int:
    """Number of parameters below `prefix`, for CLIP-L and an LLM with 24 blocks."""
    selection = select(layers, 24)
    shapes = Shapes(selection, 1024, llm_width, 24, llm_heads=16, llm_ffn=5632)
    strategy = parse({"name": name, **options})
    with torch.device("meta"):
        fusion = strategy.module(strategy.options.resolve(selection), shapes)
    return sum(p.numel() for n, p in fusion.named_parameters() if n.startswith(prefix))


@pytest.mark.parametrize(
    ("name", "layers", "options", "width", "prefix", "millions"),
    [
        ("single", [-2], {}, 2048, "", 6.30),
        ("concat", [18, 23], {}, 2048, "", 8.39),
        ("concat", [3, 18, 23], {}, 2048, "", 10.49),
        ("group_mean", "former", {}, 2048, "", 8.39),
        ("group_mean", "all", {}, 2048, "", 10.49),
        ("single", [-2], {}, 4096, "", 20.98),
        ("group_mean", "0-11|12-23", {}, 4096, "", 29.37),
        ("inject_add", [3, 18, 23], {}, 2048, "projectors", 18.9),
        ("inject_add", "every:1", {}, 2048, "projectors.7.", 6.30),
        ("inject_cross", [3], {}, 2048, "attention", 16.8),
        ("inject_cross", [3], {"mlp": True}, 2048, "mlp", 34.6),
        ("inject_cross", [3], {"mlp": True}, 2048, "projectors", 6.30),
        ("instruction_weighted", "1-6|7-12|13-18|19-24", {}, 4096, "allocator", 27.05),
        ("instruction_weighted", "1-6|7-12|13-18|19-24", {}, 4096, "projector", 25.17),
        ("text_routed", "every:1", {}, 4096, "router", 2.11),
    ],
)
def test_published_parameter_counts(
    name: str, layers: Any, options: dict[str, Any], width: int, prefix: str, millions: float
) -> None:
    count = parameters(name, layers, options, width, prefix) / 1e6
    assert count == pytest.approx(millions, abs=0.05 if millions in (18.9, 16.8, 34.6) else 0.005)


def test_exact_parameter_counts() -> None:
    allocator = parameters("instruction_weighted", "1-6|7-12|13-18|19-24", {}, 4096, "allocator")
    assert allocator == 27_047_940
    each = [parameters("concat", list(range(1, m + 1)), {}, 2048) for m in (1, 2, 5)]
    assert [n - each[0] for n in each] == [0, 1024 * 2048, 4 * 1024 * 2048]  # (m − 1)·D·H
    gates_and_norms = 1 + 2048
    assert parameters("inject_cross", [3], {"mlp": True}, 2048, "attention") == (
        4 * 2048**2 + gates_and_norms
    )
    assert parameters("inject_cross", [3], {"mlp": True}, 2048, "mlp") == (
        3 * 2048 * 5632 + gates_and_norms
    )


@pytest.mark.parametrize(
    ("depth", "llm_depth", "layers", "blocks"),
    [
        (24, 24, [3, 18, 23], (2, 17, 22)),
        (24, 32, [3, 18, 23], (3, 23, 29)),
        (24, 24, list(range(1, 13)), tuple(range(12))),
        (24, 24, "every:1", tuple(range(24))),
        (24, 32, [1, 2], (0, 1)),
        (24, 32, [0], (0,)),
        (24, 32, [24], (31,)),
        (12, 30, [2, 6, 12], (4, 14, 29)),
    ],
)
def test_proportional_placement(
    depth: int, llm_depth: int, layers: Any, blocks: tuple[int, ...]
) -> None:
    """int(k·L/24 − 1): for 24 blocks 3→2, 18→17, 23→22, for 32 blocks 3→3, 18→23, 23→29."""
    shapes = Shapes(select(layers, depth), VISION, LLM, llm_depth)
    assert llm_blocks("proportional", shapes) == blocks
    for index, (k, block) in enumerate(zip(shapes.selection.layers, blocks, strict=True)):
        assert naive.block_of("proportional", index, k, len(blocks), depth, llm_depth) == block


def test_other_placements() -> None:
    """`first` adds to the outputs of blocks 0, 1, 2, which are the inputs of 1, 2, 3."""
    shapes = around([1, 5, 8])
    assert llm_blocks("first", shapes) == (1, 2, 3)
    assert llm_blocks("last", shapes) == (9, 10, 11)
    assert llm_blocks((4, 4, 0), shapes) == (4, 4, 0)


def test_layers_placed_before_the_same_block_are_both_added() -> None:
    fusion = build("inject_add", [2, 6], {"placement": [4, 4]})
    x = features(fusion)
    visual = fusion(x)
    parts = [p(h) for p, h in zip(fusion.projectors, x.select([2, 6]), strict=True)]
    assert list(visual.memory) == [4]
    torch.testing.assert_close(visual.memory[4], parts[0] + parts[1])


def test_place_puts_images_in_reading_order() -> None:
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    memory = torch.arange(6.0).reshape(3, 2, 1)
    expected = [[0, 0, 1, 0], [0, 0, 0, 0], [2, 3, 4, 5]]
    assert spread(memory, mask)[..., 0].tolist() == expected


def test_layout_names_row_and_place_of_each_image() -> None:
    layout = Layout.of(torch.tensor(ROWS).bool(), images=3, tokens_per_image=2)
    assert layout.row.tolist() == [0, 0, 2]
    assert layout.place.tolist() == [0, 1, 0]
    assert layout.most == 2
    with pytest.raises(
        LayerfuseError, match=r"6 image tokens in the text, but 2 images of 2 tokens"
    ):
        Layout.of(torch.tensor(ROWS).bool(), images=2, tokens_per_image=2)
    with pytest.raises(LayerfuseError, match=r"by row: \[3, 1\]"):
        Layout.of(torch.tensor([[1, 1, 1], [0, 1, 0]]).bool(), images=2, tokens_per_image=2)


@pytest.mark.parametrize("name", naive.REFERENCES)
def test_calibration_standardises_and_scales_the_tokens(name: str) -> None:
    options = {"normalize": "standardize", "token_scale": 10.0}
    fusion = build(name, [2] if name == "single" else [2, 6], options)
    x = features(fusion, images=40, grid=(2, 4))
    fusion.calibrate(x, embedding_std=0.03)
    for values in fusion.normalized(x, x.layers):
        flat = values.flatten(0, 1)
        zeros, ones = torch.zeros(VISION).double(), torch.ones(VISION).double()
        torch.testing.assert_close(flat.mean(dim=0), zeros, atol=1e-6, rtol=0)
        torch.testing.assert_close(flat.std(dim=0), ones, atol=1e-5, rtol=0)
    written: list[Any] = []
    for module in fusion.modules():
        if isinstance(module, Projector):
            module.register_forward_hook(lambda m, i, output: written.append(output.detach()))
    fusion(x, guidance="uniform")  # a guided strategy is measured without text
    assert len(written) == (3 if name.startswith("inject") else 1)
    for output in written:
        assert float(output.std()) == pytest.approx(0.3, rel=1e-5)


@pytest.mark.parametrize("name", naive.REFERENCES)
@torch.no_grad()
def test_published_defaults_have_no_extra_constants(name: str) -> None:
    """Without options, calibration changes nothing: the papers use raw features."""
    fusion = build(name, [2] if name == "single" else [2, 6], {})
    x, question = features(fusion, grid=(2, 4)), instruction(fusion)
    before = fusion(x, question).tokens
    fusion.calibrate(x, embedding_std=0.03)
    assert torch.equal(fusion(x, question).tokens, before)


@each_strategy
def test_every_option_is_described_where_it_is_declared(name: str) -> None:
    config, module = FUSIONS[name]
    assert descriptions(config).keys() == config.__dataclass_fields__.keys()
    assert module.kind
    assert module.paper


@each_strategy
def test_examples_fit_their_encoder(name: str) -> None:
    config, module = FUSIONS[name]
    for depth, llm_depth in itertools.product((4, 12, 24, 27), (24, 32)):
        selection = select(module.example(depth), depth)
        shapes = Shapes(selection, 64, 64, llm_depth, llm_heads=4, llm_ffn=64)
        with torch.device("meta"):
            module(config().resolve(selection), shapes)


@each_strategy
def test_reset_sets_every_parameter(name: str) -> None:
    """What a model leaves on the meta device when it loads becomes a sound start: finite, closed
    gates, uniform weights."""
    config, module = FUSIONS[name]
    selection = select(module.example(8), 8)
    shapes = Shapes(selection, 64, 32, 8, llm_heads=4, llm_ffn=48)
    options = [o for case, _, o in CASES if case == name and not o.get("placement")] or [{}]
    for chosen in options:
        fusion = module(replace(config(), **chosen).resolve(selection), shapes)
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
    fusion = tiny.model(name, open_gates=False).fusion
    projectors = [m for m in fusion.modules() if isinstance(m, Projector)]
    assert projectors
    for layer in (m.linear_1 for m in projectors):
        bound = 1 / math.sqrt(layer.in_features)
        assert float(layer.weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.15)
        assert float(layer.weight.detach().abs().max()) <= bound
        assert bool(layer.bias.any())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "conct"}, "unknown fusion strategy 'conct'; valid: concat, "),
        ({}, "a fusion needs a name"),
        ({"name": "concat", "bse": 3}, "bse.*valid options: normalize, token_scale, proj"),
        ({"name": "concat", "projector": "conv"}, "projector: Input should be 'mlp' or 'linear'"),
        ({"name": "concat", "token_scale": 0}, "token_scale: Input should be greater than 0"),
        ({"name": "concat", "normalize": "batch"}, "normalize: Input should be 'none'"),
    ],
)
def test_bad_strategies(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(LayerfuseError, match=message):
        parse(spec)


def phi() -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4}
    return AutoConfig.for_model("phi", **sizes, intermediate_size=48)


BAD: list[tuple[Any, Any, dict[str, Any], str]] = [
    ([2], {"name": "conct"}, {}, "unknown fusion strategy 'conct'; valid: concat, "),
    ([2], {"name": "single", "heads": 2}, {}, "heads: Unexpected.*valid options: norm"),
    ([5], {"name": "single"}, {}, r"layer 5 does not exist: the encoder has 4 blocks.*0\.\.4"),
    ([2], {"name": "group_mean", "base": -6}, {}, "layer -6 does not exist"),
    ([2, -3], {"name": "concat"}, {}, r"layers \[2\] are selected more than once"),
    ("1-2|2-3", {"name": "group_mean"}, {}, r"layers \[2\] are selected more than once"),
    ([[1], []], {"name": "group_mean"}, {}, "no layer is selected"),
    ([1, 2], {"name": "single"}, {}, "takes exactly one layer"),
    ([1, 2], {"name": "inject_add", "placement": [3]}, {}, "must name a block for each"),
    ([1, 2], {"name": "inject_add", "placement": [3, 6]}, {}, r"the LLM has 6 blocks, 0\.\.5"),
    ([1, 2], {"name": "inject_add", "placement": [-1, 2]}, {}, r"the LLM has 6 blocks, 0\.\.5"),
    ([1, 2], {"name": "inject_cross", "placement": [3, 6]}, {}, r"the LLM has 6 blocks, 0\.\.5"),
    ("1-4", {"name": "inject_add", "placement": "first"}, {"depth": 4}, "the LLM has 4 blocks"),
    ("1-4", {"name": "inject_add", "placement": "last"}, {"depth": 3}, "the LLM has 3 blocks"),
    ("1-4", {"name": "inject_cross"}, {"depth": 3}, "would share LLM blocks"),
    ([1, 2], {"name": "inject_cross", "placement": [3, 3]}, {}, r"share LLM blocks \[3, 3\]"),
    ([1, 2], {"name": "inject_cross", "heads": 5}, {}, "5 heads do not divide.*width 32"),
    ([2], {"name": "inject_cross", "position": "post"}, {"llm": phi()}, "types llama.*not 'phi'"),
    ([2], {"name": "inject_cross", "position": "parallel"}, {"llm": phi()}, "not 'phi'"),
    ([2], {"name": "inject_cross", "released_residual": True}, {"llm": phi()}, "not 'phi'"),
    (
        [2],
        {"name": "inject_cross", "released_residual": True},
        {"llm": tiny.text_config("gemma3")},
        "'released' is defined for LLMs of the types llama, .*, not 'gemma3_text'",
    ),
    (
        [2],
        {"name": "inject_cross", "released_residual": True, "position": "post"},
        {},
        "released_residual is defined for position 'pre' only",
    ),
    ([2], {"name": "inject_cross", "position": "parallel", "mlp": True}, {}, "no place for `mlp`"),
    ([2], {"name": "text_routed"}, {}, "select at least two"),
    ("former", {"name": "instruction_weighted"}, {}, "select at least two"),
    ([1.5], {"name": "single"}, {}, r"layers must be integers, not 1\.5"),
    (["1"], {"name": "single"}, {}, "layers must be integers, not '1'"),
    (None, {"name": "single"}, {}, "layers must be integers, not None"),
    ([1], "concat", {}, "a fusion is a mapping"),
    ([1], {"name": "single"}, {"token_grid": (0, 2)}, "both at least 1"),
    ([1], {"name": "single", "token_scale": float("inf")}, {}, "token_scale"),
    (
        [1, 2],
        {"name": "instruction_weighted", "summary": "cls"},
        {"encoder": "siglip"},
        "summary 'cls': this encoder has no CLS token",
    ),
    ([2], {"name": "token_concat", "stride": 17}, {}, "stride 17 is more than the 16 tokens"),
    (
        [2],
        {"name": "token_concat", "stride": 5},
        {"token_grid": (2, 2)},
        "stride 5 is more than the 4 tokens",
    ),
]


@pytest.mark.parametrize(("layers", "fusion", "around", "message"), BAD)
def test_bad_specifications_are_one_clear_error_before_weights(
    layers: Any, fusion: dict[str, Any], around: dict[str, Any], message: str
) -> None:
    text = around.get("llm") or tiny.text_config(num_hidden_layers=around.get("depth", 6))
    vision = tiny.vision_config(around.get("encoder", "clip"))
    with pytest.raises(LayerfuseError, match=message) as caught:
        configure(vision, text, layers, fusion, token_grid=around.get("token_grid"))
    assert "\n" not in str(caught.value).split("; valid layer spec")[0]


def test_the_limits_of_good_specifications() -> None:
    """What is just inside the limits above."""
    text, vision = tiny.text_config(), tiny.vision_config()
    good: list[tuple[Any, dict[str, Any]]] = [
        ([0], {"name": "single"}),
        ("1-4", {"name": "inject_add", "placement": [5, 5, 0, 0]}),
        ("0-4", {"name": "inject_cross", "placement": "first"}),
        ([1, 2], {"name": "inject_cross", "heads": 8, "position": "parallel"}),
        ([2], {"name": "token_concat", "stride": 16}),
    ]
    for layers, fusion in good:
        assert configure(vision, text, layers, fusion).fusion is not None
    configure(vision, phi(), [2], {"name": "inject_cross"})
    gemma = tiny.text_config("gemma3")
    configure(vision, gemma, [2], {"name": "inject_cross", "position": "post", "mlp": True})
    siglip = tiny.vision_config("siglip")
    configure(siglip, text, [1, 2], {"name": "instruction_weighted", "summary": "mean"})


def test_a_width_that_the_allocators_heads_do_not_divide() -> None:
    shapes = replace(around([1, 2]), vision_width=6)
    strategy = parse({"name": "instruction_weighted"})
    assert strategy.module is InstructionWeighted
    with pytest.raises(LayerfuseError, match="4 heads: they must divide width 6"):
        strategy.module(strategy.options.resolve(shapes.selection), shapes)


def test_inner_width_of_an_llm_that_does_not_tell() -> None:
    fusion = build("inject_cross", [2], {"mlp": True}, llm_ffn=None)
    assert isinstance(fusion, InjectCross)
    (mlp,) = (m for m in fusion.modules() if isinstance(m, GatedMLP))
    assert mlp.up_proj.out_features == 4 * LLM


def test_a_users_strategy_is_one_class() -> None:
    @register("test_last_two_sum", StrategyConfig)
    class Sum(Fusion):
        kind = "external direct"
        paper = "none"

        def __init__(self, config: Any, shapes: Shapes) -> None:
            super().__init__(config, shapes)
            self.projector = Projector(shapes.vision_width, shapes.llm_width)

        def forward(
            self,
            features: Features,
            instruction: Tensor | None = None,
            guidance: Guidance = "instruction",
        ) -> Fused:
            total: Tensor = sum(self.normalized(features, features.layers))  # type: ignore[assignment]
            return Fused(self.projector(total))

    try:
        fusion = build("test_last_two_sum", [1, 2], {})
        assert fusion(features(fusion)).tokens.shape == (2, 6, LLM)
        assert fusion.num_tokens(fusion.config, (2, 3), 2) == 6
        assert fusion.penalty(fusion(features(fusion))) is None
        with pytest.raises(LayerfuseError, match="already registered"):
            register("single", StrategyConfig)(Sum)
    finally:
        FUSIONS.pop("test_last_two_sum")
