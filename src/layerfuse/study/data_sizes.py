"""The axis of data sizes: one whole study for each number of training samples."""

from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from layerfuse.errors import LayerfuseError
from layerfuse.recipe.schema import Recipe
from layerfuse.study.data_sizes_report import DATA_SIZES, folder_of_size, write_sizes_report

OneStudy = Callable[[Recipe, Path], Path]
"""does the study of a recipe in a folder, continues what was begun, and gives its report"""


def study_sizes(recipe: Recipe, folder: Path, one_study: OneStudy, console: Console) -> Path:
    """Do a study for each of a recipe's `data_sizes`, and set them side by side.

    Args:
        recipe: has `data_sizes`.
        folder: each size has a folder in it.
        one_study: does one.
        console: where to say which size is next.

    Returns:
        The path of the page that names all sizes.

    Raises:
        LayerfuseError: before any training, for anything in the recipe, the data or the models that
            does not fit.
    """
    sizes = recipe.data_sizes or []
    finished: list[int] = []
    # The largest first: what is refused at any size is refused at it, before anything is trained.
    for size in reversed(sizes):
        console.print(f"data size {size:,} ({len(finished) + 1} of {len(sizes)})", highlight=False)
        one_study(recipe.of_size(size), folder / folder_of_size(size))
        finished.insert(0, size)
        # After each size: a killed study keeps the page that it has.
        write_sizes_report(recipe, folder, finished)
    return folder / "report.html"


def refuse_data_sizes(recipe: Recipe) -> None:
    """Refuse a recipe over data sizes where one size alone has a meaning.

    Args:
        recipe: any.

    Raises:
        LayerfuseError: the recipe has `data_sizes`.
    """
    if recipe.data_sizes is not None:
        raise LayerfuseError(
            "the recipe has data_sizes, and `layerfuse train` trains on one size of the data: "
            f"choose it by data_sizes=null stages.{recipe.last_stage}.data.subset="
            f"{recipe.data_sizes[-1]}"
        )


def refuse_other_kind(recipe: Recipe, folder: Path) -> None:
    """Refuse a folder whose page a study would replace by one of another kind.

    Args:
        recipe: of the study.
        folder: where it is to be done.

    Raises:
        LayerfuseError: the folder holds a study with `data_sizes` and the recipe has none, or the
            other way round.
    """
    if recipe.data_sizes is None and (folder / DATA_SIZES).exists():
        raise LayerfuseError(
            f"{folder} holds a study over data_sizes, and the recipe has none: give another folder "
            "by --output"
        )
    if recipe.data_sizes is not None and (folder / "recipe.yaml").exists():
        raise LayerfuseError(
            f"{folder} holds a study without data_sizes, whose report would be replaced: give "
            "another folder by --output"
        )
