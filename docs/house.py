"""Draw the house: every room of the package on its floor, from the import contract and the code.
The command line, a package of its own, stands on top.

`docs/generate.py` writes the picture; a test fails when it is not what this would draw.
"""

import ast
import tomllib
from dataclasses import dataclass
from html import escape
from pathlib import Path
from textwrap import wrap

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src"
PACKAGE = "layerfuse"
COMMAND_LINE = "layerfuse_cli"

# Pixels of the picture, and characters of a line of modules in it.
WIDTH = 960
MARGIN = 12
LINE = 19
GAP = 8
CHARACTERS = 104


@dataclass(frozen=True)
class Room:
    """A package or module that stands on a floor of its own or shares one.

    Attributes:
        name: of the folder or file.
        purpose: the first sentence of its docstring.
        modules: the names of its modules; none for a single file.
    """

    name: str
    purpose: str
    modules: list[str]


def floors() -> list[list[Room]]:
    """The rooms of each floor, the highest first, as the import contract has them."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    layers: list[str] = []
    for contract in settings["tool"]["importlinter"]["contracts"]:
        if contract.get("containers") == [PACKAGE]:
            layers = contract["layers"]
    rooms_of_floors = [[_room(SOURCES, COMMAND_LINE)]]
    for layer in layers:
        names = [name.strip() for name in layer.split("|")]
        rooms_of_floors.append([_room(SOURCES / PACKAGE, name) for name in names])
    return rooms_of_floors


def _room(house: Path, name: str) -> Room:
    folder = house / name
    if not folder.is_dir():
        return Room(name, _purpose(house / f"{name}.py"), [])
    modules = [file.stem for file in sorted(folder.glob("*.py")) if file.stem != "__init__"]
    return Room(name, _purpose(folder / "__init__.py"), modules)


def _purpose(file: Path) -> str:
    """The first paragraph of a module's docstring."""
    docstring = ast.get_docstring(ast.parse(file.read_text("utf-8"))) or ""
    return " ".join(docstring.split("\n\n")[0].split())


def _lines(rooms: list[Room]) -> list[str]:
    """The text of a floor, as SVG spans."""
    lines = []
    for room in rooms:
        head = f'<tspan class="room">{escape(room.name)}</tspan>'
        lines.append(f'{head}<tspan dx="12" class="purpose">{escape(room.purpose)}</tspan>')
        for part in wrap(" · ".join(room.modules), CHARACTERS):
            lines.append(f'<tspan class="modules">{escape(part)}</tspan>')
    return lines


def _arrow(height: int) -> str:
    """What the order of the floors means, at the right side of the picture."""
    x = WIDTH - 36
    end = height - 2 * MARGIN
    return (
        f'<path d="M {x} {2 * MARGIN} V {end} m -6 -9 l 6 9 l 6 -9" fill="none" stroke="#9aa7b5"/>'
        f'<text x="{x - 12}" y="{2 * MARGIN + 4}" text-anchor="end" class="purpose">'
        "imports run down only</text>"
    )


def draw() -> str:
    """The picture, as SVG."""
    boxes = []
    top = MARGIN
    for rooms in floors():
        lines = _lines(rooms)
        height = LINE * len(lines) + 12
        boxes.append(
            f'<rect x="{MARGIN}" y="{top}" width="{WIDTH - 2 * MARGIN}" height="{height}"/>'
        )
        for number, line in enumerate(lines, start=1):
            boxes.append(f'<text x="{MARGIN + 12}" y="{top + LINE * number}">{line}</text>')
        top += height + GAP
    height = top - GAP + MARGIN
    style = (
        "rect { fill: #f5f7fa; stroke: #9aa7b5; } svg { background: white; } "
        "text { font: 14px sans-serif; fill: #1f2a37; } .room { font-weight: bold; } "
        ".purpose { fill: #4b5a6b; } .modules { font: 12.5px monospace; fill: #1d5fa8; }"
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
            'aria-label="The rooms of layerfuse, floor by floor; imports run down only">',
            f"<style>{style}</style>",
            f'<rect width="{WIDTH}" height="{height}" style="fill: white; stroke: none"/>',
            *boxes,
            _arrow(height),
            "</svg>\n",
        ]
    )
