"""The page of one answer: one file that needs nothing else, with what its script draws inside."""

import base64
import io
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from layerfuse.explain.answer_figures import most_attended
from layerfuse.explain.inspection import Inspection
from layerfuse.files import write_text
from layerfuse.pages.inlined_svg import inline
from layerfuse.pages.template import page_template
from layerfuse.plots import look

SHADES = 32
"""colours of the map from little to much; the script mixes neighbours"""
POINTS = 48
"""points of a patch on the page: those of largest weight"""
FRACTIONS = 8192
"""a share of the picture's side, in whole numbers of 16 bits that reach from -4 to 4"""


def write_page(inspection: Inspection, folder: Path) -> Path:
    """Write `inspect.html`, which shows the figures that are in the folder too.

    Args:
        inspection: what was seen.
        folder: of the inspection; its figures are drawn.

    Returns:
        The page.
    """
    drawing = inline(
        folder / "figures" / "contributions.svg",
        "How the log-probability of the answer changes when each layer is replaced; "
        "the table below has the numbers.",
    )
    html = page_template("layerfuse.explain", "inspect.html.j2").render(
        facts=inspection.facts,
        contributions_figure=drawing,
        weights=list(zip(inspection.facts.weighted, inspection.facts.weights, strict=True)),
        data=page_data(inspection),
    )
    page = folder / "inspect.html"
    write_text(page, html)
    return page


# Any: what JSON holds
def page_data(inspection: Inspection) -> dict[str, Any]:
    """Give what the page's script draws, in few bytes.

    Args:
        inspection: what was seen.

    Returns:
        Plain values; arrays are base64 of their bytes.
    """
    facts = inspection.facts
    picture = io.BytesIO()
    inspection.picture.save(picture, "PNG")
    shades = mpl.colormaps["magma"](np.linspace(0, 1, SHADES))[:, :3]
    level_colours = [look(level).color for level in range(len(facts.levels))]
    return {
        "picture": _base64(picture.getvalue()),
        "shades": (255 * shades).round().astype(int).tolist(),
        "grid": facts.grid,
        "comparedGrid": facts.compared_grid,
        "pieces": facts.pieces,
        "blocks": facts.blocks,
        "attention": _attention(inspection.attention),
        "attentionWithoutSinks": _attention(inspection.attention_without_sinks),
        "maps": facts.map_names,
        "layers": len(facts.layers),
        "shared": _bytes(inspection.shared_colours),
        "own": _bytes(inspection.own_colours),
        "norms": _norms(inspection.norms),
        "cosines": _bytes((inspection.cosines + 1) / 2),
        "start": most_attended(inspection),
        "levels": facts.levels,
        "levelColours": level_colours,
        "points": _points(inspection),
    }


def _base64(content: bytes) -> str:
    """Bytes as a page holds them."""
    return base64.b64encode(content).decode("ascii")


def _bytes(shares: np.ndarray) -> str:
    """Numbers in 0..1 in steps of 1/255."""
    return _base64((255 * shares.clip(0, 1)).round().astype(np.uint8).tobytes())


def _attention(attention: np.ndarray) -> dict[str, Any]:
    """Attention with the mean over blocks in front: each map in shares of its largest cell."""
    pieces, blocks = attention.shape[:2]
    if not pieces or not blocks:
        return {"cells": "", "largest": [], "total": []}
    with_mean = np.concatenate([attention.mean(axis=1, keepdims=True), attention], axis=1)
    # (pieces, 1 + blocks, cells)
    maps = with_mean.reshape(pieces, 1 + blocks, -1)
    largest = maps.max(axis=2)
    # Of what got no attention at all nothing is bright.
    shares = maps / np.maximum(largest, np.finfo(np.float32).tiny)[..., None]
    return {
        "cells": _bytes(shares),
        "largest": largest.tolist(),
        "total": maps.sum(axis=2).tolist(),
    }


def _norms(norms: np.ndarray) -> dict[str, Any]:
    """Norms of each map from its smallest to its largest."""
    smallest = norms.min(axis=(1, 2))
    largest = norms.max(axis=(1, 2))
    spread = np.maximum(largest - smallest, np.finfo(np.float32).tiny)
    shares = (norms - smallest[:, None, None]) / spread[:, None, None]
    return {
        "cells": _bytes(shares),
        "smallest": smallest.tolist(),
        "largest": largest.tolist(),
    }


def _points(inspection: Inspection) -> dict[str, Any]:
    """The heaviest points of each patch: x, y and weight in whole numbers, and the level."""
    weights = inspection.point_weights
    count = min(POINTS, weights.shape[1])
    heaviest = np.argsort(-weights, axis=1)[:, :count]
    places = np.take_along_axis(inspection.points, heaviest[..., None], axis=1)
    places = (FRACTIONS * places.clip(-3.9, 3.9)).round().astype("<i2")
    shown = np.take_along_axis(weights, heaviest, axis=1)
    # (cells, points): beyond the picture there is nothing to read
    inside = ((inspection.points >= 0) & (inspection.points <= 1)).all(axis=2)
    read = np.where(inside, weights, 0)
    # (levels, cells): of all points, those too that are not shown
    by_level: list[list[float]] = []
    for level in range(len(inspection.facts.levels)):
        by_level.append(read[:, inspection.point_levels == level].sum(axis=1).tolist())
    return {
        "count": count,
        "fractions": FRACTIONS,
        "places": _base64(places.tobytes()),
        "weights": _bytes(shown / max(float(weights.max(initial=0)), 1e-12)),
        "levels": _base64(inspection.point_levels[heaviest].astype(np.uint8).tobytes()),
        "byLevel": by_level,
    }
