"""From a layer specification to layer indices and groups.

A layer index is a position in `hidden_states`: 0 is the embedding output, k the output of block k.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LayerSpec = int | str | Sequence[int] | Sequence[Sequence[int]]

SYNTAX = """\
valid layer specifications for an encoder of L blocks (indices 0..L, negatives count from the end):
  3,18,-2       a list of layers; each layer is a group of its own
  0-11|12-23    groups of layers, ranges are inclusive
  former        1..L/2 as one group;  latter: L/2+1..L as one group
  all           1..L as the two groups former and latter
  every:4       each 4th layer, counted back from L
  proportion:1/3:first   the first third of 1..L as one group; last: what 2/3:first leaves
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
        return tuple(layer for group in self.groups for layer in group)


def resolve_layer(layer: int, depth: int) -> int:
    """A non-negative index for `layer`; -1 is the last block, as in `hidden_states[-1]`.

    Raises ValueError if the layer does not exist in an encoder with `depth` blocks.
    """
    resolved = layer + depth + 1 if layer < 0 else layer
    if not 0 <= resolved <= depth:
        raise ValueError(
            f"layer {layer} does not exist: the encoder has {depth} blocks, so layers are "
            f"0..{depth} (or -{depth + 1}..-1)"
        )
    return resolved


def select(spec: LayerSpec, depth: int) -> Selection:
    """Resolve a layer specification against an encoder with `depth` blocks.

    Accepts the string syntax above, one integer, a list of integers, or a list of groups.
    Raises ValueError for unknown syntax, layers out of range and repeated layers.
    """
    groups = _parse(spec.strip(), depth) if isinstance(spec, str) else _listed(spec)
    resolved = tuple(tuple(resolve_layer(k, depth) for k in group) for group in groups)
    if not resolved or not all(resolved):
        raise ValueError(f"no layer is selected by {spec!r}; {SYNTAX}")
    selection = Selection(resolved, depth)
    repeated = sorted({k for k in selection.layers if selection.layers.count(k) > 1})
    if repeated:
        raise ValueError(f"layers {repeated} are selected more than once by {spec!r}")
    return selection


def _listed(spec: Any) -> list[list[int]]:
    """Groups from a list of layers or of lists of layers."""
    items = list(spec) if isinstance(spec, Sequence) else [spec]
    groups = [list(x) if isinstance(x, list | tuple) else [x] for x in items]
    wrong = [k for group in groups for k in group if type(k) is not int]
    if wrong:
        raise ValueError(f"layers must be integers, not {wrong[0]!r} in {spec!r}; {SYNTAX}")
    return groups


def _parse(spec: str, depth: int) -> list[list[int]]:
    former, latter = list(range(1, depth // 2 + 1)), list(range(depth // 2 + 1, depth + 1))
    named = {"former": [former], "latter": [latter], "all": [former, latter]}
    if spec in named:
        return [group for group in named[spec] if group]
    if match := re.fullmatch(r"every:([1-9]\d*)", spec):
        return [[k] for k in range(depth, 0, -int(match[1]))][::-1]
    if match := re.fullmatch(r"proportion:(\d+)/([1-9]\d*):(first|last)", spec):
        return [_share(int(match[1]), int(match[2]), match[3] == "first", depth)]
    if match := re.fullmatch(r"similarity:([1-9]\d*)(:groups)?(@(.+))?", spec):
        if match[4] is None:
            raise ValueError(f"{spec!r} needs a file: {spec}@FILE, or the recipe's `similarity`")
        return _similar(Path(match[4]), match[1], match[2] is not None, depth)
    groups: list[list[int]] = []
    for part in spec.split("|"):
        layers = [k for item in part.split(",") for k in _parse_item(item.strip(), spec, depth)]
        groups += [layers] if "|" in spec else [[k] for k in layers]
    return groups


def _share(part: int, whole: int, first: bool, depth: int) -> list[int]:
    """The first or last part/whole of layers 1..depth; complementary shares do not overlap."""
    if not 0 < part <= whole:
        raise ValueError(f"the proportion {part}/{whole} is not in 0..1; {SYNTAX}")
    if first:
        return list(range(1, depth * part // whole + 1))
    return list(range(depth * (whole - part) // whole + 1, depth + 1))


def _similar(file: Path, count: str, groups: bool, depth: int) -> list[list[int]]:
    """Representatives or groups saved in a similarity file of an encoder with `depth` blocks."""
    if not file.is_file():
        raise ValueError(f"no similarity file {file}; `layerfuse similarity ENCODER` writes one")
    saved = json.loads(file.read_text("utf-8"))
    if not isinstance(saved, dict) or not {"depth", "groups"} <= set(saved):
        raise ValueError(f"{file} is no file of `layerfuse similarity`")
    if saved["depth"] != depth:
        raise ValueError(f"{file} is about an encoder of {saved['depth']} blocks, not of {depth}")
    if count not in saved["groups"]:
        raise ValueError(f"{file} has groups for 1..{len(saved['groups'])}, not for {count}")
    found = saved["groups"][count]
    return found["groups"] if groups else [[layer] for layer in found["representatives"]]


def _parse_item(item: str, spec: str, depth: int) -> list[int]:
    if re.fullmatch(r"-?\d+", item):
        return [int(item)]
    if match := re.fullmatch(r"(\d+)-(\d+)", item):
        first, last = int(match[1]), resolve_layer(int(match[2]), depth)
        if first <= last:
            return list(range(first, last + 1))
    raise ValueError(f"cannot read {item!r} in the layer specification {spec!r}; {SYNTAX}")
