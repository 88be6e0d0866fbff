"""Figures as parts of a page."""

import re
from html import escape
from pathlib import Path

from layerfuse.palette import INK

TYPEFACE = re.compile(r"font-family: [^;\"]+; ")
"""Of a text, as matplotlib writes it."""


def inline(file: Path, alt: str) -> str:
    """Make an SVG file part of a page.

    Args:
        file: the figure, as `layerfuse.plots.figure` writes it.
        alt: what the figure shows, for those who cannot see it.

    Returns:
        Its element alone, with ids of its own, in the page's typeface and the grey of its text,
        scaling to its box.
    """
    name = file.stem
    text = file.read_text("utf-8")
    text = text[text.index("<svg") :]
    # The page decides colour and typeface, so that text is legible in light and dark mode.
    text = text.replace(INK, "currentColor")
    text = TYPEFACE.sub("", text)
    # Figures on one page must not share ids.
    for before in ('id="', 'href="#', "url(#"):
        text = text.replace(before, f"{before}{name}-")
    head, body = text.split(">", 1)
    box = head.split('viewBox="')[1].split('"')[0]
    return (
        f'<svg viewBox="{box}" role="img" aria-label="{escape(alt)}" '
        f'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">{body}'
    )
