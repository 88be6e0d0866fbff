"""Recipes and chat templates that come with layerfuse, by name."""

from pathlib import Path

from layerfuse.errors import LayerfuseError

_PACKAGE = Path(__file__).parents[1]
# In a wheel the recipes are inside of the package, in a checkout beside its sources.
_FOLDERS = (_PACKAGE / "recipes", _PACKAGE.parents[1] / "recipes")


def find_recipe(recipe: str | Path) -> Path:
    """The file of a recipe.

    Args:
        recipe: a path, or the name of a recipe that comes with layerfuse, such as `quickstart`.

    Returns:
        The path; of a name, that of the file in the package.

    Raises:
        LayerfuseError: neither a file nor such a name; listing the names.
    """
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml") or path.exists() or len(path.parts) != 1:
        return path
    names: list[str] = []
    for folder in _FOLDERS:
        file = folder / f"{path}.yaml"
        if file.is_file():
            return file
        names += [other.stem for other in sorted(folder.glob("*.yaml"))]
    raise LayerfuseError(
        f"no recipe {str(recipe)!r}; give the path of a YAML file, or one of those that come with "
        f"layerfuse: {', '.join(names)}"
    )


def find_template(name: str) -> Path:
    """The file of a chat template that comes with layerfuse.

    Args:
        name: such as `vicuna_v1`.

    Raises:
        LayerfuseError: there is none of this name; listing those that there are.
    """
    names: list[str] = []
    for folder in _FOLDERS:
        file = folder / "templates" / f"{name}.jinja"
        if file.is_file():
            return file
        names += [other.stem for other in sorted((folder / "templates").glob("*.jinja"))]
    raise LayerfuseError(f"no chat template {name!r}; valid: {', '.join(names)}")
