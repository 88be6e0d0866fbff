"""Figures look as they did: each is drawn from fixed data and compared with a committed picture.

Where one was meant to change, `python -m tests.figure_cases` draws the pictures again.
"""

import ast
import inspect
from pathlib import Path

import pytest
from matplotlib.testing.compare import compare_images

from layerfuse import plots
from layerfuse.look import figures
from tests import figure_cases
from tests.figure_cases import FIGURES, FOLDER, draw

TOLERANCE = 1.5
"""Root mean square over all pixels, of 255; a line of one grey pixel across a figure is 3."""


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_looks_as_it_did(name: str, tmp_path: Path) -> None:
    drawn = draw(name, tmp_path)
    # The difference is written beside the first of both: away from the committed ones.
    committed = tmp_path / f"{name}-committed.png"
    committed.write_bytes((FOLDER / f"{name}.png").read_bytes())

    difference = compare_images(str(committed), str(drawn), TOLERANCE)

    assert difference is None, f"{difference}\nif meant: python -m tests.figure_cases"


def test_every_plot_has_a_picture() -> None:
    """A new plot gets one."""
    called = set()
    for node in ast.walk(ast.parse(inspect.getsource(figure_cases))):
        if isinstance(node, ast.Attribute) and node.attr.startswith("plot_"):
            called.add(ast.unparse(node))
    for module, name in ((plots, "plots"), (figures, "figures")):
        for function in vars(module):
            if function.startswith("plot_"):
                assert f"{name}.{function}" in called
    assert {file.stem for file in FOLDER.glob("*.png")} == set(FIGURES)


def test_pictures_are_small() -> None:
    for file in FOLDER.glob("*.png"):
        assert file.stat().st_size <= 30_000, file
