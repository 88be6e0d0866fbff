"""Options and arguments that several verbs of the command line share."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Argument, Option

RecipeFile = Annotated[Path, Argument(help="A recipe: a YAML file, or a name such as quickstart")]
Overrides = Annotated[list[str] | None, Argument(help="Changes to the recipe: key.sub=value ...")]
Imports = Annotated[
    list[str] | None,
    Option("--import", help="A Python module that registers fusion strategies; repeatable."),
]
Encoder = Annotated[str, Argument(help="A local model, hub id or folder with an encoder.")]
Pictures = Annotated[
    str | None,
    Argument(
        help="A folder of images, a LLaVA JSON or a dataset. Default: generated and scikit-image's"
    ),
]
Output = Annotated[Path | None, Option(help="Results folder.", show_default="runs/look-<encoder>")]
Number = Annotated[Literal["float32", "bfloat16"], Option(help="Arithmetic of the encoder.")]
AspectRatio = Annotated[
    Literal["pad", "square", "crop"] | None,
    Option(
        help="What becomes of pictures that are no squares, as in a recipe.",
        show_default="as the encoder's files say",
    ),
]
Batch = Annotated[int, Option(help="Pictures encoded at once.", min=1)]
ModelFolder = Annotated[
    Path, Argument(help="Folder of a trained model, for example runs/<study>/arms/<arm>/model")
]
Tasks = Annotated[str | None, Option(help="Tasks, as count,shape. Default: all")]
ProbeData = Annotated[str | None, Option(help="LLaVA JSON with short answers. Default: scenes")]
ProbeTest = Annotated[str | None, Option(help="The same to test on. Default: 3/10 of the data")]


def is_given(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line, even with its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def import_strategies(modules: list[str] | None) -> None:
    """Import the user's modules, so that the strategies they register have names.

    Args:
        modules: names of modules, as given to `--import`.

    Raises:
        LayerfuseError: a name is none of a module; a module is missing or lacks a package.
    """
    if not modules:
        return
    from layerfuse.errors import LayerfuseError

    for name in modules:
        # Paths to files are the usual mistake, which Python reads as a relative import.
        if not all(part.isidentifier() for part in name.split(".")):
            raise LayerfuseError(
                f"--import {name!r} is no name of a module; write it as Python imports it: "
                "my_fusion for my_fusion.py in the working directory, package.module for one in a "
                "package"
            )
    # A module beside the recipe is found as it is by `python -m`.
    sys.path.insert(0, str(Path.cwd()))
    for name in modules:
        try:
            import_module(name)
        except ImportError as error:
            raise LayerfuseError(f"--import {name}: {error}") from error
