"""Where selected layers enter the LLM, and where images stand in rows of text."""

import pytest
import torch

from layerfuse.errors import LayerfuseError
from layerfuse.fusion import Layout, Shapes
from layerfuse.fusion.injector import llm_blocks
from layerfuse.fusion.visual import spread
from layerfuse.vision.selection import LayerSpec, select
from tests import naive
from tests.fusion_cases import build, random_features, shapes_around

EVERY_BLOCK_OF_24 = tuple(range(24))


@pytest.mark.parametrize(
    ("depth", "llm_depth", "layers", "blocks"),
    [
        # the published numbers
        (24, 24, [3, 18, 23], (2, 17, 22)),
        (24, 32, [3, 18, 23], (3, 23, 29)),
        (24, 24, list(range(1, 13)), tuple(range(12))),
        (24, 24, "every:1", EVERY_BLOCK_OF_24),
        # before the first block and before the last one
        (24, 32, [1, 2], (0, 1)),
        (24, 32, [0], (0,)),
        (24, 32, [24], (31,)),
        # another encoder
        (12, 30, [2, 6, 12], (4, 14, 29)),
    ],
)
def test_proportional_placement(
    depth: int, llm_depth: int, layers: LayerSpec, blocks: tuple[int, ...]
) -> None:
    """int(k·L/24 − 1): for 24 blocks 3→2, 18→17, 23→22, for 32 blocks 3→3, 18→23, 23→29."""
    selection = select(layers, depth)
    shapes = Shapes(selection, vision_width=8, llm_width=6, llm_depth=llm_depth)

    assert llm_blocks("proportional", shapes) == blocks

    # the naive reference of `inject_add` and `inject_cross` says the same
    for index, layer in enumerate(selection.layers):
        block = naive.block_of(
            "proportional",
            index,
            layer,
            count=len(blocks),
            depth=depth,
            blocks=llm_depth,
        )
        assert block == blocks[index]


def test_other_placements() -> None:
    """`first` adds to the outputs of blocks 0, 1, 2, which are the inputs of 1, 2, 3."""
    shapes = shapes_around([1, 5, 8])
    assert llm_blocks("first", shapes) == (1, 2, 3)
    assert llm_blocks("last", shapes) == (9, 10, 11)
    assert llm_blocks((4, 4, 0), shapes) == (4, 4, 0)


def test_layers_placed_before_the_same_block_are_both_added() -> None:
    fusion = build("inject_add", [2, 6], placement=[4, 4])
    features = random_features(fusion)
    h_2, h_6 = features.select([2, 6])

    memory = fusion(features).memory

    assert list(memory) == [4]
    expected = fusion.projectors[0](h_2) + fusion.projectors[1](h_6)
    torch.testing.assert_close(memory[4], expected)


def test_place_puts_images_in_reading_order() -> None:
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    # three images of two tokens of one channel, numbered through
    memory = torch.arange(6.0).reshape(3, 2, 1)

    rows = spread(memory, mask)

    assert rows.squeeze(-1).tolist() == [[0, 0, 1, 0], [0, 0, 0, 0], [2, 3, 4, 5]]


# images of two tokens: two in the first row, none in the second, one in the third
TWO_NONE_ONE = torch.tensor(
    [
        [0, 1, 1, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
    ]
).bool()


def test_layout_names_row_and_place_of_each_image() -> None:
    layout = Layout.of(TWO_NONE_ONE, images=3, tokens_per_image=2)
    assert layout.row.tolist() == [0, 0, 2]
    assert layout.place.tolist() == [0, 1, 0]
    assert layout.most == 2


def test_layout_refuses_another_number_of_image_tokens() -> None:
    message = r"6 image tokens in the text, but 2 images of 2 tokens"
    with pytest.raises(LayerfuseError, match=message):
        Layout.of(TWO_NONE_ONE, images=2, tokens_per_image=2)


def test_layout_refuses_an_image_that_is_divided_between_rows() -> None:
    """The total is right, but no row holds whole images."""
    mask = torch.tensor([[1, 1, 1], [0, 1, 0]]).bool()
    with pytest.raises(LayerfuseError, match=r"by row: \[3, 1\]"):
        Layout.of(mask, images=2, tokens_per_image=2)
