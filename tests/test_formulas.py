"""Each strategy computes its formula: that of the naive references in tests/naive.py."""

from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from torch import Tensor

from layerfuse.errors import LayerfuseError
from layerfuse.fusion import FUSIONS, FixedWeights, Fused, Guidance, Layout
from tests import naive
from tests.fusion_cases import (
    CASES,
    GROUPS,
    LLM_HEADS,
    LLM_WIDTH,
    Case,
    build,
    each_case,
    random_features,
    random_instruction,
    randomize,
)

ELSEWHERE = {"deformable"}
"""strategies whose formula is tested in a file of their own: tests/test_deformable.py"""


def assert_close(tensor: Tensor, expected: np.ndarray[Any, Any], rel: float) -> None:
    """Equal to `rel` of the largest value, or of 1 where all are smaller."""
    assert tensor.shape == expected.shape
    tolerance = rel * max(1.0, float(np.abs(expected).max()))
    difference = np.abs(naive.array(tensor) - expected)
    assert float(difference.max()) <= tolerance


def assert_solves(fused: Fused, answer: naive.Answer, rel: float) -> None:
    """Tokens, memory of every block and weights are those of the answer."""
    assert_close(fused.tokens, answer.tokens, rel)
    assert fused.memory.keys() == answer.memory.keys()
    for block, memory in answer.memory.items():
        assert_close(fused.memory[block], memory, rel)
    if answer.weights is None:
        assert "weights" not in fused.notes
    else:
        assert_close(fused.notes["weights"], answer.weights, rel)


@each_case
@pytest.mark.parametrize("normalize", ["none", "layernorm", "standardize", "whiten"])
@torch.no_grad()
def test_formula(case: Case, normalize: str) -> None:
    """On square, narrow and wide grids, where rows and columns cannot be mixed up unseen."""
    fusion = case.build(normalize=normalize)
    num_layers = len(fusion.shapes.selection.layers)
    for grid in [(2, 2), (3, 1), (2, 5)]:
        randomize(fusion)
        features = random_features(fusion, grid=grid)
        instruction = random_instruction(fusion)

        fused = fusion(features, instruction)

        assert_solves(fused, naive.solve(fusion, features, instruction), rel=1e-9)
        # the processor writes as many image tokens as the fusion makes
        assert fused.tokens.shape[1] == fusion.num_tokens(fusion.config, grid, num_layers)


@each_case
@torch.no_grad()
def test_formula_in_single_precision(case: Case) -> None:
    """Nothing loses digits on the way, as a sum of many squares could."""
    fusion = case.build()
    randomize(fusion)
    features = random_features(fusion, grid=(3, 3))
    instruction = random_instruction(fusion)
    # before the weights are rounded to float32
    expected = naive.solve(fusion, features, instruction)

    fusion = fusion.float()
    if instruction is not None:
        instruction = instruction.float()
    fused = fusion(features.to(torch.float), instruction)

    assert_solves(fused, expected, rel=1e-5)


FIXED = FixedWeights(torch.tensor([0.1, 0.6, 0.3]))


@pytest.mark.parametrize("guidance", ["uniform", FIXED])
@pytest.mark.parametrize("name", ["text_routed", "instruction_weighted"])
@torch.no_grad()
def test_formula_without_instruction(name: str, guidance: Guidance) -> None:
    fusion = build(name, [1, 4, 8])
    randomize(fusion)
    features = random_features(fusion)

    with pytest.raises(LayerfuseError, match=r"got no instruction: .*guidance='uniform'"):
        fusion(features)
    fused = fusion(features, guidance=guidance)

    assert_solves(fused, naive.solve(fusion, features, guidance=guidance), rel=1e-9)


@pytest.mark.parametrize("summary", ["auto", "mean"])
@torch.no_grad()
def test_formula_without_cls_token(summary: str) -> None:
    """Where the encoder has none, the summary of a layer is its mean patch token."""
    fusion = build("instruction_weighted", GROUPS, has_cls=False, summary=summary)
    randomize(fusion)
    features = random_features(fusion, has_cls=False)
    instruction = random_instruction(fusion)

    fused = fusion(features, instruction)

    assert_solves(fused, naive.solve(fusion, features, instruction), rel=1e-9)


def test_every_strategy_is_in_the_formula_tests() -> None:
    names_of_cases = {case.name for case in CASES}
    assert names_of_cases == set(naive.REFERENCES)
    assert set(naive.REFERENCES) == set(FUSIONS) - ELSEWHERE


def choices(kind: Any) -> list[Any]:
    """The values of an option that has a few, from its annotation; empty for numbers and texts."""
    if kind is bool:
        return [False, True]
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    values: list[Any] = []
    # a union, such as Literal["first", "last"] | tuple[int, ...]
    for part in get_args(kind):
        if get_origin(part) is Literal:
            values.extend(get_args(part))
    return values


@pytest.mark.parametrize("name", naive.REFERENCES)
def test_every_value_of_every_option_is_in_the_formula_tests(name: str) -> None:
    config, _ = FUSIONS[name]
    cases = [case for case in CASES if case.name == name]
    for option, kind in get_type_hints(config).items():
        # a parameter of its own in `test_formula`
        if option == "normalize":
            continue
        default = getattr(config(), option)
        used = [case.options.get(option, default) for case in cases]
        for value in choices(kind):
            assert value in used, option


TOKENS_PER_IMAGE = 2
# two images, then no image, then an image at the start; 1 is an image token
ROWS = [
    [0, 1, 1, 0, 1, 1, 0],
    [0, 0, 0, 0, 0, 0, 0],
    [1, 1, 0, 0, 0, 0, 0],
]
IMAGES_OF_ROWS = [[0, 1], [], [2]]


def layout_of_rows() -> Layout:
    mask = torch.tensor(ROWS).bool()
    return Layout.of(mask, images=3, tokens_per_image=TOKENS_PER_IMAGE)


def mask_of(row: list[int]) -> list[bool]:
    return [value == 1 for value in row]


@pytest.mark.parametrize("case", [case for case in CASES if case.name == "inject_cross"], ids=str)
@torch.no_grad()
def test_cross_attention_formula(case: Case) -> None:
    """Against loops over positions, heads and keys, also where no image is seen."""
    fusion = case.build()
    randomize(fusion)
    features = random_features(fusion, images=3, grid=(1, TOKENS_PER_IMAGE))
    placed = fusion.place(fusion(features), layout_of_rows())
    hidden = torch.randn(3, 7, LLM_WIDTH, dtype=torch.double)

    weights = naive.weights_of(fusion)
    # by default the LLM's own number
    heads = fusion.config.heads or LLM_HEADS
    for block, memory in naive.solve(fusion, features).memory.items():
        added = fusion.addition(block, hidden, placed)
        # (rows, T, H), a row at a time, with the memory of its own images
        for row, images in enumerate(IMAGES_OF_ROWS):
            expected = naive.cross_addition(
                weights,
                block,
                naive.array(hidden[row]),
                heads=heads,
                images=[memory[image] for image in images],
                mask=mask_of(ROWS[row]),
            )
            difference = np.abs(naive.array(added[row]) - expected)
            assert difference.max() < 1e-9


def test_seen_images() -> None:
    """Image tokens see their image; text sees the images that have ended before it."""
    nothing = [False, False]
    first = [True, False]
    second = [False, True]
    both = [True, True]
    expected = [
        [nothing, first, first, first, second, second, both],
        [nothing] * 7,
        [first] * 7,
    ]

    assert layout_of_rows().seen_images().tolist() == expected


def test_the_naive_reference_sees_the_same_images() -> None:
    seen_images = layout_of_rows().seen_images().tolist()
    for row, seen_by_positions in zip(ROWS, seen_images, strict=True):
        images_by_position: list[set[int]] = []
        for seen in seen_by_positions:
            images_by_position.append({image for image in range(2) if seen[image]})
        assert images_by_position == naive.visible(mask_of(row), each=TOKENS_PER_IMAGE)
