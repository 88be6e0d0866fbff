"""Groups of similar layers: `layerfuse similarity` writes them, selections of layers read them."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from layerfuse.errors import LayerfuseError


@dataclass(frozen=True)
class LayerGroups:
    """The best contiguous groups for one count of groups.

    Attributes:
        groups: the layers of each group, ascending.
        representatives: the layer of each group that is most similar to its group.
        silhouette: mean silhouette width, -1..1; None where it is undefined.
    """

    groups: list[list[int]]
    representatives: list[int]
    silhouette: float | None


def groups_to_json(groups_by_count: dict[int, LayerGroups]) -> dict[str, Any]:
    """Give groups as they stand in `similarity.json`.

    Args:
        groups_by_count: the groups for each count.

    Returns:
        Plain values; the keys of a JSON object are text.
    """
    saved: dict[str, Any] = {}
    for count, groups in groups_by_count.items():
        # JSON would turn the keys into text by itself, but a comparison with a file read would fail
        saved[str(count)] = asdict(groups)
    return saved


def groups_from_json(saved: dict[str, Any]) -> dict[int, LayerGroups]:
    """Read what `groups_to_json` gave.

    Args:
        saved: plain values.

    Returns:
        The groups for each count.

    Raises:
        LayerfuseError: these are no groups.
    """
    groups_by_count: dict[int, LayerGroups] = {}
    try:
        for count, groups in saved.items():
            layers_of_groups = [_layers(group) for group in groups["groups"]]
            representatives = _layers(groups["representatives"])
            if not len(layers_of_groups) == len(representatives) == int(count):
                raise ValueError("as many groups and representatives as the key says")
            groups_by_count[int(count)] = LayerGroups(
                groups=layers_of_groups,
                representatives=representatives,
                # Selections do not need it, so a file may lack it
                silhouette=groups.get("silhouette"),
            )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise LayerfuseError("these are no groups of layers") from error
    return groups_by_count


def _layers(saved: Any) -> list[int]:
    """Layers as JSON holds them.

    Raises:
        TypeError: these are none.
    """
    if not isinstance(saved, list) or not saved:
        raise TypeError("layers are a list of at least one")
    layers: list[int] = []
    for layer in cast(list[Any], saved):
        # bool: True is an int for Python, but no layer
        if not isinstance(layer, int) or isinstance(layer, bool):
            raise TypeError("a layer is a whole number")
        layers.append(layer)
    return layers


def read_layer_groups(file: Path, depth: int) -> dict[int, LayerGroups]:
    """Read the groups of a file of `layerfuse similarity`.

    Args:
        file: `similarity.json`.
        depth: blocks of the encoder that the groups must be about.

    Returns:
        The groups for each count.

    Raises:
        LayerfuseError: the file is missing, holds something else, or is about another encoder.
    """
    if not file.is_file():
        raise LayerfuseError(
            f"no similarity file {file}; `layerfuse similarity ENCODER` writes one"
        )
    try:
        saved = json.loads(file.read_text("utf-8"))
    # ValueError: not UTF-8, or no JSON; a study that was killed while writing leaves half a file
    except (OSError, ValueError) as error:
        raise LayerfuseError(
            f"cannot read {file}: {error}; `layerfuse similarity ENCODER` writes it again"
        ) from error
    if not isinstance(saved, dict) or "depth" not in saved or "groups" not in saved:
        raise LayerfuseError(f"{file} is no file of `layerfuse similarity`")
    content = cast(dict[str, Any], saved)
    # Layers belong to a depth: indices of another encoder would be silently wrong
    if content["depth"] != depth:
        raise LayerfuseError(
            f"{file} is about an encoder of {content['depth']} blocks, not of {depth}"
        )
    try:
        return groups_from_json(content["groups"])
    except LayerfuseError as error:
        raise LayerfuseError(f"{file} is no file of `layerfuse similarity`: {error}") from error
