"""Reading a recipe's file: inheritance, overrides, paths, and errors that name what is valid."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from layerfuse.errors import LayerfuseError
from layerfuse.files import read_yaml
from layerfuse.hardware import native_dtype
from layerfuse.recipe.packaged import find_recipe
from layerfuse.recipe.schema import Recipe

ALWAYS_PATHS = ("path", "images", "chat_template", "similarity")
"""keys whose text is a path"""
NAMES_OR_PATHS = ("encoder", "llm", "model", "start_from", "dataset", "accelerate")
"""keys whose text is a path if it begins with a dot, else a name"""
MODELS = ("encoder", "llm")
"""keys of a recipe that hold a model, as a mapping or as plain text"""


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply `extends:` and overrides, and validate it.

    Args:
        path: of a YAML file, or the name of a recipe that comes with layerfuse.
        overrides: each `key.sub=value`, where the value is YAML and an index of a list is a key.
            Paths in them are relative to the working directory.

    Returns:
        The recipe, with absolute paths and the `dtype` that `auto` stands for.

    Raises:
        LayerfuseError: naming the file and every problem, or the recipe that is missing.
    """
    raw = _read(find_recipe(path), [])
    for override in overrides:
        _apply(raw, override)
    # Those of the files are absolute already: these are what overrides brought in.
    _make_absolute(raw, Path.cwd())
    if isinstance(raw.get("start_from"), str):
        # until it is taken apart: see `Recipe.starting_from`
        for key in MODELS:
            model = raw.setdefault(key, {})
            if isinstance(model, dict):
                model.setdefault("model", raw["start_from"])
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        raise LayerfuseError(f"recipe {path}:\n{problems_of(error)}") from error
    if recipe.dtype != "auto":
        return recipe
    # Resolved here, once: it is part of what makes two runs the same.
    return recipe.model_copy(update={"dtype": native_dtype()})


def problems_of(error: ValidationError) -> str:
    """Say what pydantic found.

    Args:
        error: of a recipe or a part of one.

    Returns:
        One line per problem, each with the place in the recipe.
    """
    lines = []
    for problem in error.errors():
        place = ".".join(str(key) for key in problem["loc"])
        # What concerns the recipe as a whole has no key.
        if not place:
            place = "top level"
        # Pydantic's name for the class of an error tells a reader of recipes nothing.
        message = problem["msg"].removeprefix("Value error, ")
        lines.append(f"  {place}: {message}")
    return "\n".join(lines)


def _read(path: Path, extending: list[Path]) -> dict[str, Any]:
    """The content of a recipe's file and of those that it extends.

    Args:
        path: of the file.
        extending: the files that were read on the way here.
    """
    # Resolved, so that a file is known again however it is written.
    file = path.resolve()
    if file in extending:
        raise LayerfuseError(f"recipe {path} extends itself")
    try:
        raw = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise LayerfuseError(f"cannot read the recipe {path}: {error}") from error
    except yaml.YAMLError as error:
        raise LayerfuseError(f"recipe {path} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise LayerfuseError(f"recipe {path} must be a mapping of keys to values")
    raw = _unshared(raw)
    # Before the merge: each path is relative to the file that names it.
    _make_absolute(raw, file.parent)
    if "extends" not in raw:
        return raw
    base = raw.pop("extends")
    if not isinstance(base, str):
        raise LayerfuseError(f"recipe {path}: extends must name a file, not {base!r}")
    return _merge(_read(path.parent / base, [*extending, file]), raw)


def _unshared(node: Any) -> Any:
    """A copy in which every place has a node of its own.

    What YAML's aliases repeat (`*name`) is one node at several places, and an override of one of
    them would change them all.

    Args:
        node: a part of the recipe.
    """
    if isinstance(node, dict):
        return {key: _unshared(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_unshared(value) for value in node]
    return node


def _make_absolute(node: Any, folder: Path) -> None:
    """Make the paths below a node absolute, in place.

    Paths are data, images, chat templates and similarity files; and models, datasets and accelerate
    configs that begin with a dot (others are names).

    Args:
        node: a mapping or a list from YAML.
        folder: to which the paths are relative.
    """
    items: Iterable[tuple[Any, Any]] = enumerate(node)
    if isinstance(node, dict):
        items = node.items()
    for key, value in items:
        if isinstance(value, dict | list):
            # A user's own strategy may have options with such names that are no paths.
            if key != "fusion":
                _make_absolute(value, folder)
        elif isinstance(value, str):
            node[key] = _absolute(key, value, folder)


def _absolute(key: Any, value: str, folder: Path) -> str:
    """The text under a key, with an absolute path if it is or holds one."""
    if value.startswith("similarity:") and "@" in value:
        selection, file = value.split("@", 1)
        return f"{selection}@{folder / file}"
    is_path = key in ALWAYS_PATHS or (key in NAMES_OR_PATHS and value.startswith("."))
    if is_path:
        # A path that is absolute already stays as it is.
        return str(folder / value)
    return value


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Two mappings, of which the second wins; mappings in both are merged, lists are replaced."""
    merged = dict(base)
    for key, value in top.items():
        base_value = merged.get(key)
        if isinstance(value, dict) and isinstance(base_value, dict):
            merged[key] = _merge(base_value, value)
        else:
            merged[key] = value
    return merged


def _apply(raw: dict[str, Any], override: str) -> None:
    """Set one value of a recipe, in place.

    Args:
        raw: the recipe as read from YAML.
        override: `key.sub=value`; mappings that are missing on the way are made.
    """
    dotted_key, equals, text = override.partition("=")
    if not equals:
        raise LayerfuseError(f"an override is key.sub=value, not {override!r}")
    try:
        value = read_yaml(text)
    except yaml.YAMLError as error:
        raise LayerfuseError(f"override {override!r} is not valid YAML: {error}") from error
    *parents, last = dotted_key.split(".")
    node: Any = raw
    name = ""
    for key in parents:
        place = _place(node, key, name, override)
        if isinstance(node, dict):
            node.setdefault(place, {})
        # A model given as plain text means `model: <text>`, to which other keys can be added.
        if node is raw and key in MODELS and isinstance(node[place], str):
            node[place] = {"model": node[place]}
        node = node[place]
        name = key
    node[_place(node, last, name, override)] = value


def _place(node: Any, key: str, name: str, override: str) -> str | int:
    """The key or index by which an override goes on.

    Args:
        node: a part of the recipe.
        key: the part of the override's key that says where in the node.
        name: the part before it, which leads to the node.
        override: as it was written, for errors.
    """
    if isinstance(node, dict):
        return key
    if not isinstance(node, list):
        raise LayerfuseError(f"override {override!r}: {name!r} holds no keys")
    if not key.isdigit() or int(key) >= len(node):
        raise LayerfuseError(f"override {override!r}: {key!r} is no index of {len(node)} items")
    return int(key)
