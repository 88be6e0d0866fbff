"""Gated cross-attention inside a real LLM: which positions an image reaches, and which never."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from layerfuse.fusion import Layout
from tests import naive, tiny
from tests.cross_models import (
    BLOCKS,
    LENGTH,
    MIXED_ROWS,
    WIDTH,
    cross_model,
    each_variant,
    in_two_families,
    visual_of,
)
from tests.random_prompts import TOKENS_PER_IMAGE, positions_of, prompts_with_images_at


@dataclass(frozen=True)
class ImageOfMixedRows:
    """An image of `MIXED_ROWS`, whose rows have 60 tokens.

    Attributes:
        row: the row in which it stands.
        place: its place among the images of that row.
        start: the position of its first token.
        seen_from: the positions that may look at it: its own tokens and all text after them.
    """

    row: int
    place: int
    start: int
    seen_from: list[int]


IMAGES = [
    # its tokens and the text up to the second image, which ends at 46, and the text after that
    ImageOfMixedRows(row=0, place=0, start=5, seen_from=[*range(5, 30), *range(46, 60)]),
    ImageOfMixedRows(row=0, place=1, start=30, seen_from=[*range(30, 60)]),
    ImageOfMixedRows(row=2, place=0, start=44, seen_from=[*range(44, 60)]),
]
"""in reading order, as the pixels of a batch"""


def with_another_image(batch: dict[str, Tensor], image: int) -> dict[str, Tensor]:
    """The same batch with other pixels in one image."""
    pixels = batch["pixel_values"].clone()
    pixels[image] += torch.randn_like(pixels[image])
    return {**batch, "pixel_values": pixels}


@pytest.mark.parametrize("llm", ["llama", "gemma3"])
@pytest.mark.parametrize("variant", ["pre", "pre-mlp", "post", "parallel"])
@torch.no_grad()
def test_an_image_changes_itself_and_what_follows_it(variant: str, llm: str) -> None:
    """Never a position before it or another row."""
    model = cross_model(variant, llm)
    batch = prompts_with_images_at(MIXED_ROWS)
    before = model(**batch, use_cache=False).logits

    for index, image in enumerate(IMAGES):
        after = model(**with_another_image(batch, index), use_cache=False).logits
        # (rows, T)
        difference = (after - before).abs().amax(dim=-1)
        in_its_row = difference[image.row]
        end = image.start + TOKENS_PER_IMAGE
        assert float(in_its_row[: image.start].max()) < 1e-6
        assert float(in_its_row[image.start : end].min()) > 1e-4
        other_rows = [row for row in range(3) if row != image.row]
        assert float(difference[other_rows].max()) < 1e-6

    # the text after the second image, which ends at 46
    after = model(**with_another_image(batch, 1)).logits
    assert float((after - before)[0, 46:].abs().max()) > 1e-4


@each_variant
@torch.no_grad()
def test_cross_attention_sees_each_image_from_its_own_tokens_and_later_text(variant: str) -> None:
    """For the same hidden states, only those additions change whose position sees the image: the
    tokens of a second image do not look at the first one."""
    model = cross_model(variant)
    batch = prompts_with_images_at(MIXED_ROWS)
    hidden = torch.randn(3, LENGTH, WIDTH)
    visual = visual_of(model, batch)
    assert visual.seen is not None

    for index, image in enumerate(IMAGES):
        sees_image = torch.zeros(3, LENGTH, dtype=torch.bool)
        sees_image[image.row, image.seen_from] = True
        assert torch.equal(visual.seen[image.row, :, image.place], sees_image[image.row])

        visual_of_another = visual_of(model, with_another_image(batch, index))
        for block in BLOCKS:
            before = model.fusion.addition(block, hidden, visual)
            after = model.fusion.addition(block, hidden, visual_of_another)
            # bit for bit: no tolerance could hide a small leak
            has_changed = (before != after).any(dim=-1)
            assert torch.equal(has_changed, sees_image)


@each_variant
@torch.no_grad()
def test_what_sees_no_image_gets_exactly_nothing(variant: str) -> None:
    """Text before an image, and rows without one beside rows with several."""
    model = cross_model(variant)
    batch = prompts_with_images_at(MIXED_ROWS)
    visual = visual_of(model, batch)
    hidden = torch.randn(3, LENGTH, WIDTH)

    for block in BLOCKS:
        added = model.fusion.addition(block, hidden, visual)
        # exactly zero: a softmax over nothing must give neither NaN nor a mean
        assert not added[0, :5].any()
        assert not added[1].any()
        assert not added[2, :44].any()
        assert bool(added[0, 5:].any(dim=-1).all())


@in_two_families
@torch.no_grad()
def test_rows_alone_are_the_rows_of_a_left_padded_batch(variant: str, llm: str) -> None:
    """Several images in a row, rows of text alone; what neighbours have does not matter."""
    model = cross_model(variant, llm)
    batch = prompts_with_images_at([[3, 24], [], [40]])
    lengths = [60, 25, 41]
    for row, length in enumerate(lengths):
        padding = LENGTH - length
        batch["input_ids"][row, :padding] = 0
        batch["attention_mask"][row, :padding] = 0
    pixels_of_rows = [batch["pixel_values"][:2], None, batch["pixel_values"][2:]]

    # without padding a row starts at position 0, as its content does here
    position_ids = positions_of(batch["attention_mask"])
    together = model(**batch, position_ids=position_ids).logits

    for row, length in enumerate(lengths):
        alone = model(
            input_ids=batch["input_ids"][row : row + 1, -length:],
            pixel_values=pixels_of_rows[row],
        ).logits
        torch.testing.assert_close(together[row, -length:], alone[0], atol=3e-5, rtol=1e-4)


@each_variant
@torch.no_grad()
def test_another_number_of_rows_is_refused(variant: str) -> None:
    """Keys of one row must not be broadcast over two."""
    model = cross_model(variant)
    batch = prompts_with_images_at([[4]])
    visual = visual_of(model, batch)
    message = "the visual memory has 1 rows and the LLM's input 2"

    with pytest.raises(ValueError, match=message):
        model.fusion.addition(1, torch.randn(2, LENGTH, WIDTH), visual)

    # a step of decoding, for which the memory is arranged in another way
    last_token_twice = batch["input_ids"].repeat(2, 1)[:, -1:]
    with pytest.raises(ValueError, match=message):
        model(input_ids=last_token_twice, visual=visual.decoding())


@torch.no_grad()
def test_seen_images_of_a_prompt() -> None:
    """The table of the model is that of the rows walked token by token."""
    model = cross_model("pre")
    batch = prompts_with_images_at(MIXED_ROWS)
    is_image = batch["input_ids"] == tiny.IMAGE_ID
    layout = Layout.of(is_image, images=len(IMAGES), tokens_per_image=TOKENS_PER_IMAGE)

    # (rows, T, images of a row)
    seen = visual_of(model, batch).seen

    assert torch.equal(seen, layout.seen_images())
    for seen_of_row, image_mask in zip(seen, is_image.tolist(), strict=True):
        images_by_position: list[set[int]] = []
        for seen_of_position in seen_of_row:
            images_by_position.append(set(seen_of_position.nonzero().flatten().tolist()))
        assert images_by_position == naive.visible(image_mask, TOKENS_PER_IMAGE)
