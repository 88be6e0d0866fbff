"""What the page shows beside an answer, as plain values for JSON: attention, maps and shares."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from layerfuse.explain.contributions import Contribution
from layerfuse.explain.feature_maps import FeatureMap
from layerfuse.explain.trace import AnswerTrace


@dataclass(frozen=True)
class Word:
    """A word of an answer, with the spaces around it.

    Attributes:
        text: joined, the words are the answer.
        pieces: the places of its tokens.
    """

    text: str
    pieces: list[int]


def words_of(pieces: Sequence[str]) -> list[Word]:
    """Put the tokens of an answer together to words.

    Args:
        pieces: the text of each token.

    Returns:
        The words. A word begins with the spaces before it.
    """
    words: list[Word] = []
    for place, piece in enumerate(pieces):
        before = ""
        if words:
            before = words[-1].text
        # Spaces alone are no word yet.
        is_complete = bool(before.strip()) and (before[-1].isspace() or piece[:1].isspace())
        if not words or is_complete:
            words.append(Word(piece, [place]))
        else:
            words[-1] = Word(before + piece, [*words[-1].pieces, place])
    return words


def words_for_page(trace: AnswerTrace) -> dict[str, Any]:
    """The words of an answer with where each looked.

    Args:
        trace: of the answer.

    Returns:
        `grid`: rows and columns. `words`: for each its text, its `cells` (a byte a cell, row by
        row, 255 where most attention went; what sinks drew is left out) and the `share` of its
        attention that went to the picture. Both are None where the LLM shows no attention.
    """
    has_attention = trace.attention.shape[1] > 0
    # (pieces, blocks, rows, columns) -> (pieces, rows, columns)
    on_grid = trace.on_grid(without_sinks=True).mean(dim=1)
    shares = trace.attention.sum(dim=-1).mean(dim=1)
    words: list[dict[str, Any]] = []
    for word in words_of(trace.pieces):
        shown: dict[str, Any] = {"text": word.text, "cells": None, "share": None}
        if has_attention:
            shown["cells"] = _bytes(on_grid[word.pieces].mean(dim=0))
            shown["share"] = float(shares[word.pieces].mean())
        words.append(shown)
    return {"grid": list(trace.grid), "words": words}


def _bytes(cells: Tensor) -> str:
    """Cells as base64 of a byte each: 0 is nothing, 255 the most of them."""
    highest = cells.max().clamp_min(1e-12)
    levels = (255 * cells / highest).round().to(torch.uint8)
    return base64.b64encode(levels.numpy().tobytes()).decode("ascii")


def maps_for_page(maps: Sequence[FeatureMap]) -> list[dict[str, str]]:
    """The pictures of layers, and of what the fusion makes of them.

    Args:
        maps: of layers, in colours that they share, and of later steps in their own.

    Returns:
        Name and data address of each.
    """
    shown = []
    for one in maps:
        colours = one.own if one.shared is None else one.shared
        pixels = (255 * colours).round().to(torch.uint8).numpy()
        image = Image.fromarray(np.ascontiguousarray(pixels))
        shown.append({"name": one.name, "address": image_address(image, "PNG")})
    return shown


def image_address(image: Image.Image, form: str) -> str:
    """An image inside an address, so that the page fetches nothing for it.

    Args:
        image: RGB.
        form: `JPEG`, or `PNG`, which keeps every pixel.

    Returns:
        A `data:` address.
    """
    file = io.BytesIO()
    image.save(file, form, quality=90)
    encoded = base64.b64encode(file.getvalue()).decode("ascii")
    return f"data:image/{form.lower()};base64,{encoded}"


def weights_for_page(weights: Mapping[str, float]) -> list[dict[str, Any]]:
    """The weights that the strategy gives to layers for this picture and question, as bars.

    Args:
        weights: by what they are of.

    Returns:
        Name, value and written value of each bar.
    """
    bars: list[dict[str, Any]] = []
    for name, weight in weights.items():
        bars.append({"name": name, "value": weight, "written": f"{100 * weight:.0f} %"})
    return bars


def contributions_for_page(of_layers: Sequence[Contribution]) -> list[dict[str, Any]]:
    """What each layer gave to the answer, as bars.

    Args:
        of_layers: ascending.

    Returns:
        Name, value and written value of each bar: by how many nats the answer is less likely
        without the layer.
    """
    bars = []
    for one in of_layers:
        # The mean in its place, as zeros are nothing that a layer ever gives.
        lost = -one.by_mean.change
        written = f"{lost:+.2f}".replace("-", "−")
        if round(lost, 2) == 0:
            # What is written as nothing is drawn as nothing, and has no sign.
            lost, written = 0.0, "0.00"
        bars.append({"name": f"layer {one.layer}", "value": lost, "written": written})
    return bars
