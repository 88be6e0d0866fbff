"""The one style of all figures, and the files that they are saved in.

Colours are those of `layerfuse.palette`; beyond its eight, markers, line styles and hatches change,
so that no two arms look alike up to 24 arms. Figures have no background, so that they can stand on
white and on dark paper.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from layerfuse.errors import LayerfuseError
from layerfuse.palette import FAINT, INK, PALETTE

MARKERS = ("o", "s", "D")
LINES = ("-", "--", ":")
HATCHES = ("", "////", "....")
DASHED = (0, (4, 3))
"""Dashes of 4 line widths with gaps of 3."""

# Any: matplotlib names the keys in a literal type of its own
RC: dict[Any, Any] = {
    # A page in dark mode must show through
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.edgecolor": FAINT,
    "grid.color": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "font.family": "sans-serif",
    "font.size": 10,
    "legend.fontsize": 9,
    # A dollar sign in the name of an arm is no formula
    "text.parse_math": False,
    # As text it can be read aloud, searched and shown in a page's own typeface; matplotlib centres
    # it by anchors, so that another typeface stays in its place
    "svg.fonttype": "none",
    # Ids of an SVG are random otherwise, and equal data would give different files
    "svg.hashsalt": "layerfuse",
    "lines.solid_capstyle": "round",
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.7,
}
"""The style, as matplotlib's settings."""


@contextmanager
def figure(stem: Path, width: float, height: float) -> Iterator[Figure]:
    """Make a figure that is saved when the context ends; equal data give equal files.

    Args:
        stem: path without the suffix; its folder is made.
        width: in inches.
        height: in inches.

    Yields:
        The figure, empty.

    Raises:
        LayerfuseError: a file cannot be written.
    """
    with mpl.rc_context(RC):
        drawing = Figure(figsize=(width, height), layout="constrained")
        yield drawing
        png = stem.with_suffix(".png")
        svg = stem.with_suffix(".svg")
        try:
            stem.parent.mkdir(parents=True, exist_ok=True)
            # Versions and dates in the files would make equal figures differ
            drawing.savefig(png, dpi=160, metadata={"Software": None})
            # Laid out now: both files alike, and not computed twice.
            drawing.set_layout_engine(None)
            drawing.savefig(svg, metadata={"Date": None, "Creator": None})
        except OSError as error:
            raise LayerfuseError(f"the figure {stem} cannot be written: {error}") from error


@dataclass(frozen=True)
class Look:
    """How the marks of an arm look, in matplotlib's terms."""

    color: str
    marker: str
    line_style: str
    hatch: str


def look(index: int) -> Look:
    """Give the look of an arm.

    Args:
        index: place of the arm in its study.

    Returns:
        Its colour, marker, line style and hatch.
    """
    # Colours come round first, so that up to eight arms differ by colour alone
    turn = index // len(PALETTE) % len(MARKERS)
    return Look(
        color=PALETTE[index % len(PALETTE)],
        marker=MARKERS[turn],
        line_style=LINES[turn],
        hatch=HATCHES[turn],
    )
