"""The colours of all figures and pages.

Figures: Okabe and Ito's palette (2008), told apart with any common colour blindness. Text and axes
of a figure are a mid grey that is legible on white and on dark paper.

Pages: the same hues, darker on light paper and lighter on dark paper where they colour text, so
that every text has a contrast of at least 4.5 to 1 (WCAG AA).
"""

from dataclasses import dataclass

INK = "#767b84"
"""Text and axes of figures."""
FAINT = "#9aa0a8"
"""Grid, frame, and what is in the background of figures."""
PALETTE = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#8f7ee7",
    "#a8672e",
)


@dataclass(frozen=True)
class PageColors:
    """The colours of a page.

    Attributes:
        paper: behind everything.
        card: behind what is set apart.
        ink: text.
        soft: text beside the point.
        line: rules and frames.
        blue: links, the focus, and the shade of scores.
        good: text of what is better or right.
        bad: text of what is worse or wrong.
    """

    paper: str
    card: str
    ink: str
    soft: str
    line: str
    blue: str
    good: str
    bad: str


LIGHT = PageColors(
    paper="#fdfcfa",
    card="#ffffff",
    ink="#1d2127",
    soft="#5c636d",
    line="#e2dfd9",
    blue=PALETTE[0],
    good="#00734f",
    bad="#a84600",
)
DARK = PageColors(
    paper="#15171b",
    card="#1c1f24",
    ink="#e9e7e3",
    soft="#a6adb7",
    line="#343941",
    blue=PALETTE[5],
    good="#4fcaa5",
    bad="#f0965a",
)
PRINTED = PageColors(
    paper="#ffffff",
    card="#ffffff",
    ink="#111111",
    soft="#555555",
    line="#cccccc",
    blue=PALETTE[0],
    good="#00664b",
    bad="#973e00",
)
