"""The code of one model as modules beside each other, for programs that lack layerfuse.

What is written is layerfuse's own source. Of every module only the definitions that the model
reaches are kept, and their imports name the module beside them: `layerfuse.fusion.base` becomes
`fusion_base`.
"""

import ast
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "layerfuse"
SOURCES = Path(__file__).parents[1]
LEFT_OUT = ("compose", "from_vlm")
"""methods that make new models of pretrained parts, which a trained one does not need"""
REPLACED = {
    # Local models are layerfuse's own, and the code that makes them of wheels is long.
    "layerfuse.local_models.registry.resolve": '''\
def resolve(name: str) -> str:
    """What a model is loaded by: its folder or hub id, as it is."""
    return name
''',
}
"""what the exported code has in the place of a definition"""
HEADER = "# Part of layerfuse (Apache-2.0), as `layerfuse export` wrote it for this model.\n"


@dataclass(frozen=True)
class Definition:
    """A name that a module of layerfuse defines, or that it imports from where it is defined."""

    module: str
    """such as `layerfuse.fusion.base`"""
    name: str

    @property
    def replacement(self) -> str | None:
        """What stands in its place in the exported code, if it is not exported itself."""
        return REPLACED.get(f"{self.module}.{self.name}")


def flat_name(module: str) -> str:
    """The name of the flat module of a module of layerfuse.

    Args:
        module: such as `layerfuse.fusion.base`.
    """
    return module.removeprefix(f"{PACKAGE}.").replace(".", "_")


def flat_modules(roots: list[Definition], registered: Definition) -> dict[str, str]:
    """The modules that some classes need.

    Args:
        roots: the classes.
        registered: a strategy, which the catalogue of strategies imports so that it is known.

    Returns:
        The text of each module by its file name.
    """
    sources = _Sources()
    kept: dict[str, set[str]] = {}
    waiting = [*roots, registered]
    while waiting:
        wanted = sources.origin(waiting.pop())
        names = kept.setdefault(wanted.module, set())
        if wanted.name in names:
            continue
        names.add(wanted.name)
        if wanted.replacement is None:
            waiting.extend(sources.module(wanted.module).needs(wanted.name))

    catalogue = f"{PACKAGE}.fusion"
    texts: dict[str, str] = {}
    for name, definitions in sorted(kept.items()):
        imported: list[Definition] = []
        if name == catalogue:
            imported = [registered]
        text = _text(sources, sources.module(name), definitions, imported)
        texts[f"{flat_name(name)}.py"] = text
    return texts


class _SourceModule:
    """One module of layerfuse, as lines and as a tree.

    Args:
        name: such as `layerfuse.fusion.base`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        path = SOURCES.joinpath(*name.split(".")[1:])
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        text = file.read_text("utf-8")
        self.lines = text.splitlines()
        self.tree = ast.parse(text)
        self.places: dict[str, int] = {}
        """of the statement in the tree that defines each name"""
        self.imports: dict[str, Definition] = {}
        """what each name is that comes from another module of layerfuse"""
        for place, node in enumerate(self.tree.body):
            for defined in _defined_by(node):
                self.places[defined] = place
            self.imports.update(_own_imports(node))

    def needs(self, name: str) -> list[Definition]:
        """What one definition of the module reads of layerfuse.

        Args:
            name: of the definition.
        """
        node = _without_left_out(self.tree.body[self.places[name]])
        needed: list[Definition] = []
        for read in _names_in(node):
            if read in self.places:
                needed.append(Definition(self.name, read))
            elif read in self.imports:
                needed.append(self.imports[read])
        for inner in ast.walk(node):
            needed.extend(_own_imports(inner).values())
        return needed


class _Sources:
    """The modules of layerfuse, read when they are asked for."""

    def __init__(self) -> None:
        self._modules: dict[str, _SourceModule] = {}

    def module(self, name: str) -> _SourceModule:
        """One module."""
        if name not in self._modules:
            self._modules[name] = _SourceModule(name)
        return self._modules[name]

    def origin(self, wanted: Definition) -> Definition:
        """Where a name is defined that a module may only pass on."""
        module = self.module(wanted.module)
        if wanted.name in module.places:
            return wanted
        return self.origin(module.imports[wanted.name])


def _defined_by(node: ast.stmt) -> list[str]:
    """The names that a statement of a module defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign):
        targets = [node.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _own_imports(node: ast.AST) -> dict[str, Definition]:
    """What a node imports of layerfuse, by the names that it gives."""
    imports: dict[str, Definition] = {}
    if isinstance(node, ast.ImportFrom) and _is_own(node):
        for alias in node.names:
            imports[alias.asname or alias.name] = Definition(str(node.module), alias.name)
    return imports


def _is_own(node: ast.ImportFrom) -> bool:
    """Whether an import is of layerfuse."""
    module = node.module or ""
    return module.split(".")[0] == PACKAGE


def _without_left_out(node: ast.stmt) -> ast.stmt:
    """A statement without the methods that are not exported."""
    if not isinstance(node, ast.ClassDef):
        return node
    body: list[ast.stmt] = []
    for part in node.body:
        if not (isinstance(part, ast.FunctionDef) and part.name in LEFT_OUT):
            body.append(part)
    filtered = copy(node)
    filtered.body = body
    return filtered


def _names_in(node: ast.AST) -> Iterator[str]:
    """The names that a node reads."""
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            yield part.id


def _text(
    sources: _Sources, module: _SourceModule, names: set[str], imported: list[Definition]
) -> str:
    """The flat module: its docstring, the imports that are read, the definitions that are kept."""
    replacements: list[str] = []
    exported: set[str] = set()
    for name in sorted(names):
        replacement = Definition(module.name, name).replacement
        if replacement is None:
            exported.add(name)
        else:
            replacements.append(f"\n{replacement}")
    if not exported:
        # the docstring is of what is not exported
        return "\n".join([HEADER, *replacements])

    places = sorted({module.places[name] for name in exported})
    read: set[str] = set()
    for place in places:
        read.update(_names_in(_without_left_out(module.tree.body[place])))

    parts: list[str] = [HEADER]
    documentation = ast.get_docstring(module.tree, clean=False)
    if documentation is not None:
        parts.append(f'"""{documentation}"""\n')
    lines = _foreign_imports(module, read)
    own: list[Definition] = []
    for name, definition in module.imports.items():
        if name in read:
            own.append(sources.origin(definition))
    lines += _relative_imports(own)
    if imported:
        lines += ["", "# registered by its import", *_relative_imports(imported)]
    parts.append("\n".join(lines) + "\n")
    for place in places:
        parts.append("\n" + _statement_text(sources, module, place) + "\n")
    return "\n".join([*parts, *replacements])


def _foreign_imports(module: _SourceModule, read: set[str]) -> list[str]:
    """The import lines of other packages, for the names that are read."""
    lines: list[str] = []
    for node in module.tree.body:
        if isinstance(node, ast.ImportFrom) and not _is_own(node):
            aliases = [alias for alias in node.names if (alias.asname or alias.name) in read]
            if node.module == "__future__":
                aliases = node.names
            if aliases:
                lines.append(ast.unparse(ast.ImportFrom(node.module, aliases, node.level)))
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if (alias.asname or alias.name).split(".")[0] in read:
                    lines.append(ast.unparse(ast.Import([alias])))
    return lines


def _relative_imports(definitions: list[Definition], indent: str = "") -> list[str]:
    """Import lines for definitions, one for each flat module."""
    by_module: dict[str, set[str]] = {}
    for definition in definitions:
        by_module.setdefault(flat_name(definition.module), set()).add(definition.name)
    lines: list[str] = []
    for name, names in sorted(by_module.items()):
        lines.append(f"{indent}from .{name} import {', '.join(sorted(names))}")
    return lines


def _statement_text(sources: _Sources, module: _SourceModule, place: int) -> str:
    """The lines of a statement, with the comment before it and the docstring behind it."""
    node = module.tree.body[place]
    first = _first_line(module, node)
    last = node.end_lineno or node.lineno
    if place + 1 < len(module.tree.body):
        behind = module.tree.body[place + 1]
        if isinstance(node, ast.Assign | ast.AnnAssign) and _is_text(behind):
            last = behind.end_lineno or behind.lineno

    left_out: set[int] = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.FunctionDef) and inner.name in LEFT_OUT:
            end = inner.end_lineno or inner.lineno
            # with the empty line behind it
            left_out.update(range(_first_line(module, inner), end + 2))
    # imports inside of functions, which the kept lines hold as well
    imports: dict[int, list[str]] = {}
    for inner in ast.walk(node):
        if isinstance(inner, ast.ImportFrom) and _is_own(inner) and inner.lineno not in left_out:
            origins = [sources.origin(wanted) for wanted in _own_imports(inner).values()]
            imports[inner.lineno] = _relative_imports(origins, " " * inner.col_offset)
            left_out.update(range(inner.lineno, (inner.end_lineno or inner.lineno) + 1))
    lines: list[str] = []
    for number in range(first, last + 1):
        if number in imports:
            lines.extend(imports[number])
        elif number not in left_out:
            lines.append(module.lines[number - 1])
    return "\n".join(lines).rstrip()


def _first_line(module: _SourceModule, node: ast.stmt) -> int:
    """The number of a statement's first line, with its decorators and the comments before it."""
    first = node.lineno
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        for decorator in node.decorator_list:
            first = min(first, decorator.lineno)
    while first > 1 and module.lines[first - 2].lstrip().startswith("#"):
        first -= 1
    return first


def _is_text(node: ast.stmt) -> bool:
    """Whether a statement is a text alone, which documents the one before it."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
