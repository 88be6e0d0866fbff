"""The rows of a batch in several forward passes, so that none computes more than a device may."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from layerfuse.model.processor import IGNORED
from layerfuse.vision.features import Features

Batch = dict[str, Any]
"""Keyword arguments of the model, as `Collator` makes them. Any: their types differ."""


def split_rows(
    batch: Batch, rows_at_once: int, image_token_id: int, *, needs_picture: bool = False
) -> list[Batch]:
    """Batches of some of the rows each, whose losses and gradients add up to those of the whole,
    if each is given the number of labelled tokens of the whole.

    Args:
        batch: right-padded, as `Collator` makes it.
        rows_at_once: the most rows of a pass.
        image_token_id: of the token that visual tokens replace.
        needs_picture: whether a pass of text alone gets a picture of the batch behind its first
            row, masked and without labels, so that every process runs the same modules.

    Returns:
        Its rows in their order; the batch itself where it has no more rows.
    """
    rows = len(batch["input_ids"])
    if rows <= rows_at_once:
        return [batch]
    pictures = _pictures_of_rows(batch, image_token_id)
    passes: list[Batch] = []
    for first in range(0, rows, rows_at_once):
        chosen = slice(first, first + rows_at_once)
        part = _text_of(batch, chosen, image_token_id)
        shown = torch.cat(pictures[chosen])
        if len(shown) == 0 and needs_picture and _num_images(batch) > 0:
            _add_masked_picture(part, batch, image_token_id)
            shown = torch.zeros(1, dtype=torch.int64, device=shown.device)
        if len(shown) > 0:
            part.update(_images(batch, shown))
        passes.append(part)
    return passes


def with_waiting(passes: Sequence[Batch], number: int) -> list[Batch]:
    """As many passes as all processes do together: what is missing learns nothing.

    Args:
        passes: of this process.
        number: of the process that does the most.

    Returns:
        The passes, and the last one without labels as often as it takes.
    """
    last = passes[-1]
    waiting = {**last, "labels": torch.full_like(last["labels"], IGNORED)}
    return [*passes, *[waiting] * (number - len(passes))]


def _num_images(batch: Batch) -> int:
    """The images that are given; rows may share them."""
    features: Features | None = batch.get("features")
    if features is not None:
        return len(features.patches[0])
    if "pixel_values" in batch:
        return len(batch["pixel_values"])
    return 0


def _image_index(batch: Batch) -> Tensor:
    """Which of the images that are given each image in the text is, (images in the text)."""
    if "image_index" in batch:
        return batch["image_index"]
    return torch.arange(_num_images(batch), device=batch["input_ids"].device)


def _pictures_of_rows(batch: Batch, image_token_id: int) -> list[Tensor]:
    """What of `_image_index` belongs to each row."""
    index = _image_index(batch)
    tokens = (batch["input_ids"] == image_token_id).sum(dim=1)
    # Every picture of a batch has the same number of tokens.
    tokens_per_image = max(1, int(tokens.sum()) // max(1, len(index)))
    return list(index.split((tokens // tokens_per_image).tolist()))


def _text_of(batch: Batch, chosen: slice, image_token_id: int) -> dict[str, Any]:
    """Everything but the images of some rows, without the padding that only others need."""
    part: dict[str, Any] = {"guidance": batch["guidance"]}
    input_ids = batch["input_ids"][chosen]
    # A blank picture is masked, and no padding.
    is_used = batch["attention_mask"][chosen].bool() | (input_ids == image_token_id)
    length = int(is_used.any(dim=0).nonzero().max()) + 1
    for name in ("input_ids", "attention_mask", "labels"):
        part[name] = batch[name][chosen, :length]
    if "instruction" in batch:
        part["instruction"] = batch["instruction"][chosen]
    return part


def _images(batch: Batch, shown: Tensor) -> dict[str, Any]:
    """The images that some rows show, each once."""
    needed, image_index = shown.unique(return_inverse=True)
    images: dict[str, Any] = {"image_index": image_index}
    if "features" in batch:
        images["features"] = batch["features"].take(needed)
    else:
        images["pixel_values"] = batch["pixel_values"][needed]
    return images


def _add_masked_picture(part: dict[str, Any], batch: Batch, image_token_id: int) -> None:
    """Put the image tokens of a picture behind the first row, where nothing attends to them."""
    num_images = len(_image_index(batch))
    tokens = int((batch["input_ids"] == image_token_id).sum()) // num_images
    width = (0, tokens)
    input_ids = F.pad(part["input_ids"], width, value=0)
    input_ids[0, -tokens:] = image_token_id
    part["input_ids"] = input_ids
    part["attention_mask"] = F.pad(part["attention_mask"], width, value=0)
    part["labels"] = F.pad(part["labels"], width, value=IGNORED)
