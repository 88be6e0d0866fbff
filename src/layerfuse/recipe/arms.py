"""The arms of a recipe, their layers and their seeds."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from layerfuse.recipe.strict import Strict

Layers = int | str | list[int] | list[list[int]]


def _valid_seeds(seeds: list[int]) -> list[int]:
    # Two runs of one seed are the same run: as two they would make intervals too narrow.
    if len(set(seeds)) < len(seeds):
        raise ValueError("seeds repeat; each run needs a seed of its own")
    if min(seeds, default=0) < 0:
        raise ValueError("a seed is a number from 0 on")
    return seeds


def _valid_recipe_seeds(seeds: list[int] | str) -> list[int] | str:
    if isinstance(seeds, str):
        return seeds
    if not seeds:
        raise ValueError("no seed is given; write at least one, such as [0], or auto")
    return _valid_seeds(seeds)


Seeds = Annotated[list[int], AfterValidator(_valid_seeds)]
RecipeSeeds = Annotated[list[int] | Literal["auto"], AfterValidator(_valid_recipe_seeds)]


class Arm(Strict):
    """One way to use the layers: a layer selection and a fusion strategy."""

    name: str | None = None
    """How the report calls it. Default: strategy and layers."""
    layers: Layers
    """Layer selection: `"3,18,-2"`, `[3, 18, 23]`, `former`, `latter`, `all`, `every:4`,
    `proportion:1/3:first`, `last:12:-2` (twelve that end with -2), `relative:24:3,18,23` (at the
    depth that these have in an encoder of 24 blocks), `similarity:3`, groups as `"1-6|7-12"` or
    `similarity:3:groups`. Index 0 is the embedding output, k the output of block k, -1 the last
    block."""
    fusion: dict[str, Any]
    """Strategy `name` and its options (see the strategies' pages)."""
    seeds: Seeds | None = None
    """Seeds of this arm. Default: the recipe's."""

    @property
    def label(self) -> str:
        """How the report calls the arm."""
        return self.name or f"{self.fusion.get('name')} {_layers_text(self.layers)}"


class Grid(Strict):
    """Arms as a product: every layer selection with every fusion."""

    layers: list[Layers] = Field(min_length=1)
    """Layer selections."""
    fusion: list[dict[str, Any]] = Field(min_length=1)
    """Fusion strategies."""


def _layers_text(layers: Layers) -> str:
    """A layer selection as one would write it in one line: `3,18|23`."""
    if isinstance(layers, int | str):
        return str(layers)
    parts = []
    for part in layers:
        if isinstance(part, int):
            parts.append(str(part))
        else:
            parts.append(",".join(map(str, part)))
    return "|".join(parts)
