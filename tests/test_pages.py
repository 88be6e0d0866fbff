"""What all pages share: legible colours, drawings with names of their own, strict templates."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from layerfuse import palette, plots
from layerfuse.pages.inlined_svg import inline
from layerfuse.pages.template import page_template
from layerfuse.pages.written_numbers import joined


def luminance(color: str) -> float:
    """Relative luminance of #rrggbb, as WCAG 2 defines it."""
    channels = []
    for place in (1, 3, 5):
        share = int(color[place : place + 2], 16) / 255
        channels.append(share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4)
    red, green, blue = channels
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(first: str, second: str) -> float:
    """Between 1 (equal) and 21 (black on white)."""
    darker, lighter = sorted((luminance(first), luminance(second)))
    return (lighter + 0.05) / (darker + 0.05)


def test_contrast_is_that_of_the_standard() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    # An example of the standard's own.
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)


@pytest.mark.parametrize("colors", [palette.LIGHT, palette.DARK, palette.PRINTED])
@pytest.mark.parametrize("text", ["ink", "soft", "blue", "good", "bad"])
def test_every_text_is_legible(colors: palette.PageColors, text: str) -> None:
    """AA: 4.5 to 1, on paper and on cards."""
    for behind in (colors.paper, colors.card):
        assert contrast(asdict(colors)[text], behind) >= 4.5


def test_axes_of_figures_are_legible_on_light_and_on_dark() -> None:
    """Large marks need 3 to 1; pages give the text of figures their own colour."""
    for colors in (palette.LIGHT, palette.DARK):
        assert contrast(palette.INK, colors.paper) >= 3


def drawing(folder: Path, name: str) -> Path:
    """A figure with text and a clipped line."""
    with plots.figure(folder / name, 3, 2) as figure:
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=palette.PALETTE[0])
        axes.set_xlabel("layer <b>")
    return folder / f"{name}.svg"


def test_drawings_of_a_page_have_their_own_ids_and_its_typeface(tmp_path: Path) -> None:
    html = ""
    for name in ("one", "two"):
        html += inline(drawing(tmp_path, name), f'{name}: 4 > 3 & "so on"')

    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids)) > 0
    assert set(re.findall(r"url\(#([^)]+)\)", html)) <= set(ids)
    assert html.count('role="img" aria-label="one: 4 &gt; 3 &amp; &quot;so on&quot;"') == 1
    # Words stay words, which can be found and read aloud, in the page's letters and grey.
    assert ">layer &lt;b&gt;</text>" in html
    assert "font-family" not in html
    assert palette.INK not in html
    assert "<?xml" not in html


def test_what_a_template_is_not_given_is_an_error() -> None:
    """An empty place would be seen by nobody."""
    with pytest.raises(UndefinedError, match="recipe"):
        page_template("layerfuse.study", "report.html.j2").render()


@pytest.mark.parametrize(
    ("numbers", "written"),
    [
        ([12], "12"),
        ([4, 8, 12], "4, 8, 12"),
        ([1, 2], "1, 2"),
        ([1, 2, 3, 8, 9, 10, 11], "1–3, 8–11"),
        ([], ""),
    ],
)
def test_numbers_in_a_row_are_written_as_a_range(numbers: list[int], written: str) -> None:
    assert joined(numbers) == written
