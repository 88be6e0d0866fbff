"""From a layer specification to layer indices and groups.

A layer index is a position in `hidden_states`: 0 is the embedding output, k the output of block k.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from layerfuse.errors import LayerfuseError
from layerfuse.vision.layer_groups import read_layer_groups

LayerSpec = int | str | Sequence[int] | Sequence[Sequence[int]]

SYNTAX = """\
valid layer specifications for an encoder of L blocks (indices 0..L, negatives count from the end):
  3,18,-2       a list of layers; each layer is a group of its own
  0-11|12-23    groups of layers, ranges are inclusive
  former        1..L/2 as one group;  latter: L/2+1..L as one group
  all           1..L as the two groups former and latter
  every:4       each 4th layer, counted back from L
  proportion:1/3:first   the first third of 1..L as one group; last: what 2/3:first leaves
  last:12       the last 12 layers as one group;  last:12:-2: the 12 that end with layer -2
  relative:24:3,18,23    the layers at the depth that 3, 18 and 23 have in an encoder of 24 blocks,
                         rounded down: 3, 20 and 25 of 27
  similarity:3@FILE      one representative of each of three groups of similar layers, read from a
                         file of `layerfuse similarity`; similarity:3:groups@FILE: the groups"""


@dataclass(frozen=True)
class Selection:
    """Resolved layers of an encoder.

    `groups` partition `layers` (both in the order in which they were asked for); `depth` is the
    encoder's full number of blocks.
    """

    groups: tuple[tuple[int, ...], ...]
    depth: int

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers of all groups, one group after the other."""
        layers: list[int] = []
        for group in self.groups:
            layers.extend(group)
        return tuple(layers)


def resolve_layer(layer: int, depth: int) -> int:
    """A non-negative index for `layer`; -1 is the last block, as in `hidden_states[-1]`.

    Args:
        layer: an index into `hidden_states`, negative to count from the end.
        depth: number of blocks of the encoder.

    Returns:
        The index in 0..depth.

    Raises:
        LayerfuseError: if the layer does not exist in such an encoder.
    """
    resolved = layer
    if layer < 0:
        # depth blocks and the embeddings are depth + 1 hidden states
        resolved = layer + depth + 1
    if not 0 <= resolved <= depth:
        raise LayerfuseError(
            f"layer {layer} does not exist: the encoder has {depth} blocks, so layers are "
            f"0..{depth} (or -{depth + 1}..-1)"
        )
    return resolved


def select(spec: LayerSpec, depth: int) -> Selection:
    """Resolve a layer specification against an encoder with `depth` blocks.

    Args:
        spec: the string syntax of `SYNTAX`, one integer, a list of integers, or a list of groups.
        depth: number of blocks of the encoder.

    Returns:
        The groups in the order asked for, with non-negative indices.

    Raises:
        LayerfuseError: for unknown syntax, layers out of range and repeated layers, and for a
            similarity file that is missing or of another encoder.
    """
    groups = _parse(spec.strip(), depth) if isinstance(spec, str) else _listed(spec)

    resolved: list[tuple[int, ...]] = []
    for group in groups:
        resolved.append(tuple(resolve_layer(layer, depth) for layer in group))
    if not resolved or not all(resolved):
        raise LayerfuseError(f"no layer is selected by {spec!r}; {SYNTAX}")

    # names of one layer, such as 3 and -22, are compared after they are resolved
    selection = Selection(tuple(resolved), depth)
    seen: set[int] = set()
    repeated: set[int] = set()
    for layer in selection.layers:
        if layer in seen:
            repeated.add(layer)
        seen.add(layer)
    if repeated:
        raise LayerfuseError(f"layers {sorted(repeated)} are selected more than once by {spec!r}")
    return selection


def _listed(spec: int | Sequence[int] | Sequence[Sequence[int]]) -> list[list[int]]:
    """Groups from a list of layers or of lists of layers."""
    # what a YAML file holds may be anything, whatever the annotation promises
    items: list[object] = [spec]
    if isinstance(spec, Sequence):
        items = list(spec)

    groups: list[list[int]] = []
    for item in items:
        members: list[object] = [item]
        if isinstance(item, list | tuple):
            members = list(cast(Sequence[object], item))
        groups.append([_integer(member, spec) for member in members])
    return groups


def _integer(member: object, spec: object) -> int:
    """The member itself, if it is an integer."""
    # no isinstance: YAML's true and false are integers to Python, but no layers
    if type(member) is not int:
        raise LayerfuseError(f"layers must be integers, not {member!r} in {spec!r}; {SYNTAX}")
    return member


def _parse(spec: str, depth: int) -> list[list[int]]:
    """Groups of the string syntax; indices may still be negative or out of range."""
    if spec in ("former", "latter", "all"):
        return _halves(spec, depth)

    every = re.fullmatch(r"every:([1-9]\d*)", spec)
    if every is not None:
        # counted back from the last block, so that it is always among them
        step = int(every[1])
        return [[layer] for layer in sorted(range(depth, 0, -step))]

    proportion = re.fullmatch(r"proportion:(\d+)/([1-9]\d*):(first|last)", spec)
    if proportion is not None:
        part = int(proportion[1])
        whole = int(proportion[2])
        return [_share(part, whole, proportion[3] == "first", depth)]

    last = re.fullmatch(r"last:([1-9]\d*)(:(-?\d+))?", spec)
    if last is not None:
        return [_layers_up_to(int(last[3] or -1), int(last[1]), depth)]

    relative = re.fullmatch(r"relative:([1-9]\d*):(\d+(,\d+)*)", spec)
    if relative is not None:
        layers = [int(layer) for layer in relative[2].split(",")]
        return _at_same_depths(layers, int(relative[1]), depth)

    similarity = re.fullmatch(r"similarity:([1-9]\d*)(:groups)?(@(.+))?", spec)
    if similarity is not None:
        if similarity[4] is None:
            raise LayerfuseError(
                f"{spec!r} needs a file: {spec}@FILE, or the recipe's `similarity`"
            )
        file = Path(similarity[4])
        return _similar(file, int(similarity[1]), similarity[2] is not None, depth)

    return _parse_groups(spec, depth)


def _halves(name: str, depth: int) -> list[list[int]]:
    """The groups `former`, `latter` or `all` (both) of layers 1..depth."""
    middle = depth // 2
    former = list(range(1, middle + 1))
    latter = list(range(middle + 1, depth + 1))
    if name == "former":
        halves = [former]
    elif name == "latter":
        halves = [latter]
    else:
        halves = [former, latter]
    # an encoder of one block has no former half
    return [half for half in halves if half]


def _share(part: int, whole: int, first: bool, depth: int) -> list[int]:
    """The first or last part/whole of layers 1..depth; complementary shares do not overlap."""
    if not 0 < part <= whole:
        raise LayerfuseError(f"the proportion {part}/{whole} is not in 0..1; {SYNTAX}")
    if first:
        end = depth * part // whole
        return list(range(1, end + 1))
    # rounded as the first (whole - part)/whole is, so that this starts where that ends
    end = depth * (whole - part) // whole
    return list(range(end + 1, depth + 1))


def _layers_up_to(end: int, count: int, depth: int) -> list[int]:
    """So many layers, of which `end` is the last."""
    last = resolve_layer(end, depth)
    if count > last:
        raise LayerfuseError(
            f"up to layer {last} there are {last} layers of 1..{depth}, not {count}"
        )
    return list(range(last - count + 1, last + 1))


def _at_same_depths(layers: list[int], other_depth: int, depth: int) -> list[list[int]]:
    """Layers of an encoder with `other_depth` blocks, as layers of one with `depth` blocks."""
    if max(layers) > other_depth:
        raise LayerfuseError(
            f"layer {max(layers)} does not exist in an encoder of {other_depth} blocks; {SYNTAX}"
        )
    return [[layer * depth // other_depth] for layer in layers]


def _similar(file: Path, count: int, as_groups: bool, depth: int) -> list[list[int]]:
    """Representatives or groups saved in a similarity file of an encoder with `depth` blocks."""
    groups_by_count = read_layer_groups(file, depth)
    if count not in groups_by_count:
        raise LayerfuseError(f"{file} has groups for 1..{len(groups_by_count)}, not for {count}")
    chosen = groups_by_count[count]
    if as_groups:
        return chosen.groups
    return [[layer] for layer in chosen.representatives]


def _parse_groups(spec: str, depth: int) -> list[list[int]]:
    """Groups of layers and ranges, divided by bars; without a bar each layer is its own group."""
    groups: list[list[int]] = []
    for part in spec.split("|"):
        layers: list[int] = []
        for item in part.split(","):
            layers.extend(_parse_item(item.strip(), spec, depth))
        if "|" in spec:
            groups.append(layers)
        else:
            groups.extend([layer] for layer in layers)
    return groups


def _parse_item(item: str, spec: str, depth: int) -> list[int]:
    """The layers of one integer, or of one inclusive range such as 0-11."""
    if re.fullmatch(r"-?\d+", item):
        return [int(item)]
    bounds = re.fullmatch(r"(\d+)-(\d+)", item)
    if bounds is not None:
        first = int(bounds[1])
        # a range past the encoder's end is refused before it is spelled out
        last = resolve_layer(int(bounds[2]), depth)
        if first <= last:
            return list(range(first, last + 1))
    raise LayerfuseError(f"cannot read {item!r} in the layer specification {spec!r}; {SYNTAX}")
