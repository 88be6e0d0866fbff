"""Random rows of token ids with images in them, as the inputs of tiny models."""

from typing import Any

import torch
from torch import Tensor

from layerfuse import FusionVLM
from tests import tiny

TOKENS_PER_IMAGE = 16
"""of strategies that keep the number of patches, 4 × 4"""


def prompts(model: FusionVLM, images_per_row: list[int], length: int = 60) -> dict[str, Tensor]:
    """Rows with as many images each as the model's strategy replaces tokens for, and what it reads.

    Args:
        model: the inputs are made for its strategy.
        images_per_row: number of images in each row.
        length: number of tokens T in each row.

    Returns:
        input_ids and attention_mask (rows, T), pixel_values (B, 3, 32, 32) if there are images,
        and instruction (rows, E) for strategies that read a sentence.
    """
    tokens_per_image = model.fusion.num_tokens(
        model.fusion.config,
        (4, 4),
        len(model.config.vision_layers),
    )
    # The first four ids are special tokens, the image token among them.
    ids = torch.randint(4, 300, (len(images_per_row), length))
    for row, images in enumerate(images_per_row):
        for image in range(images):
            # Every row starts elsewhere and has text between images: a mistake in one row's
            # positions cannot be hidden by another row.
            start = 2 + row + image * (tokens_per_image + 3)
            ids[row, start : start + tokens_per_image] = tiny.IMAGE_ID

    pixels = torch.randn(sum(images_per_row), 3, tiny.SIZE, tiny.SIZE)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.fusion.reads == "sentence":
        inputs["instruction"] = torch.randn(len(ids), model.fusion.config.sentence_width)
    if len(pixels):
        inputs["pixel_values"] = pixels
    return inputs


def prompts_with_images_at(starts: list[list[int]], length: int = 60) -> dict[str, Tensor]:
    """Rows whose images of 16 tokens start at given places.

    Args:
        starts: for each row, the position of the first token of each of its images.
        length: number of tokens T in each row.

    Returns:
        input_ids and attention_mask (rows, T), and pixel_values (B, 3, 32, 32) if there are images.
    """
    ids = torch.randint(4, 300, (len(starts), length))
    images = 0
    for row, starts_of_row in enumerate(starts):
        for start in starts_of_row:
            ids[row, start : start + TOKENS_PER_IMAGE] = tiny.IMAGE_ID
            images += 1

    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if images:
        inputs["pixel_values"] = torch.randn(images, 3, tiny.SIZE, tiny.SIZE)
    return inputs


def visual_inputs_of_row(
    batch: dict[str, Tensor], row: int, pixels: Tensor | None
) -> dict[str, Any]:
    """What the model gets beside the ids of one row: its pixels (images, 3, 32, 32) and its
    instruction (1, E), where there are any."""
    inputs: dict[str, Any] = {}
    if pixels is not None:
        inputs["pixel_values"] = pixels
    if "instruction" in batch:
        inputs["instruction"] = batch["instruction"][row : row + 1]
    return inputs


def positions_of(attention_mask: Tensor) -> Tensor:
    """(rows, T): the position of every token, counted from its row's first unpadded one."""
    positions = attention_mask.cumsum(dim=1) - 1
    # The padding before it would be at -1.
    return positions.clamp_min(0)
