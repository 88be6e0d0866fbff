"""Reading a recipe's file: inheritance, overrides, paths, and errors that name what is valid."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from layerfuse.hardware import native_dtype
from layerfuse.recipe.schema import Recipe

_PATHS = ("path", "images", "chat_template", "similarity")
_NAMES = ("encoder", "llm", "model", "dataset", "accelerate")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply `extends:` and `key.sub=value` overrides, and validate it.

    Paths in it become absolute. Raises ValueError that names the file and every problem, and
    FileNotFoundError if the recipe or a file that it extends is missing.
    """
    raw = _read(Path(path))
    for override in overrides:
        key, found, value = override.partition("=")
        if not found:
            raise ValueError(f"an override is key.sub=value, not {override!r}")
        _set(raw, key.split("."), yaml.safe_load(value), override)
    _make_absolute(raw, Path.cwd())  # what overrides brought in
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ValueError(f"recipe {path}:\n" + "\n".join(lines)) from error
    native = recipe.dtype if recipe.dtype != "auto" else native_dtype()
    return recipe.model_copy(update={"dtype": native})


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {path} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"recipe {path} must be a mapping of keys to values")
    _make_absolute(raw, path.parent.resolve())
    if "extends" in raw:
        raw = _merge(_read(path.parent / raw.pop("extends")), raw)
    return raw


def _make_absolute(node: Any, folder: Path) -> None:
    """Paths are relative to the file that names them: data, images, chat templates, similarity
    files; models, datasets and accelerate configs that begin with a dot (others are names)."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
        if isinstance(value, dict | list) and key != "fusion":
            _make_absolute(value, folder)
        elif isinstance(value, str) and value.startswith("similarity:") and "@" in value:
            spec, file = value.split("@", 1)
            node[key] = f"{spec}@{folder / file}"
        elif isinstance(value, str) and (key in _PATHS or (key in _NAMES and value[:1] == ".")):
            node[key] = str(folder / value)


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _set(node: Any, keys: list[str], value: Any, override: str) -> None:
    for depth, key in enumerate(keys):
        place: Any = key
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                raise ValueError(f"override {override!r}: {key!r} is no index of {len(node)} items")
            place = int(key)
        elif not isinstance(node, dict):
            raise ValueError(f"override {override!r}: {keys[depth - 1]!r} holds no keys")
        if depth == len(keys) - 1:
            node[place] = value
        node = node[place] if isinstance(node, list) else node.setdefault(place, {})
