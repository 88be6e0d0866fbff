"""Layer specifications resolve to the indices that the papers name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from layerfuse.errors import LayerfuseError
from layerfuse.look.grouping import all_groups
from layerfuse.recipe.reader import load_recipe
from layerfuse.study.plan import runs
from layerfuse.vision.layer_groups import groups_to_json
from layerfuse.vision.selection import resolve_layer, select
from tests.test_recipe import write


@pytest.mark.parametrize(
    ("spec", "depth", "groups"),
    [
        ("3,18,-2", 24, ((3,), (18,), (23,))),
        ([23, 7, 15], 24, ((23,), (7,), (15,))),
        (-1, 12, ((12,),)),
        (0, 12, ((0,),)),
        ("-1", 27, ((27,),)),
        ("former", 24, (tuple(range(1, 13)),)),
        ("latter", 24, (tuple(range(13, 25)),)),
        ("all", 24, (tuple(range(1, 13)), tuple(range(13, 25)))),
        ("all", 27, (tuple(range(1, 14)), tuple(range(14, 28)))),
        ("former", 26, (tuple(range(1, 14)),)),
        ("every:4", 12, ((4,), (8,), (12,))),
        ("every:4", 26, ((2,), (6,), (10,), (14,), (18,), (22,), (26,))),
        ("0-11|12-23", 24, (tuple(range(12)), tuple(range(12, 24)))),
        ("1-3", 12, ((1,), (2,), (3,))),
        ([[1, 2], [3, -1]], 4, ((1, 2), (3, 4))),
    ],
)
def test_specifications(spec: object, depth: int, groups: tuple[tuple[int, ...], ...]) -> None:
    selection = select(spec, depth)  # type: ignore[arg-type]
    assert selection.groups == groups
    assert selection.layers == tuple(k for group in groups for k in group)


def test_llava_names_of_clip_layers() -> None:
    """-1 -> 24, -2 -> 23, -7 -> 18, -12 -> 13, -17 -> 8, -22 -> 3."""
    names = {-1: 24, -2: 23, -7: 18, -12: 13, -17: 8, -22: 3, -25: 0}
    for name, layer in names.items():
        assert resolve_layer(name, 24) == layer


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("25", "layers are 0..24"),
        (-26, "-25..-1"),
        ("3,3", r"\[3\] are selected more than once"),
        ("3,-22", r"\[3\] are selected more than once"),
        ("middle", "cannot read 'middle'"),
        ("", "cannot read ''"),
        ("5-2", "cannot read '5-2'"),
        ("every:0", "cannot read"),
        ([], "no layer is selected"),
        ([[1], []], "no layer is selected"),
        ([True], "layers must be integers, not True"),
        ([3, "4"], "layers must be integers, not '4'"),
        ("similarity:3", "needs a file: similarity:3@FILE"),
        ("similarity:3@none.json", "no similarity file none.json"),
        ("similarity:3@other.json", "other.json is about an encoder of 12 blocks, not of 24"),
        ("similarity:25@f.json", r"f.json has groups for 1\.\.24, not for 25"),
        ("similarity:3@probe.json", "probe.json"),
        ("proportion:4/3:first", "the proportion 4/3 is not in 0..1"),
        ("proportion:0/3:last", "the proportion 0/3 is not in 0..1"),
        ("proportion:1/25:first", "no layer is selected"),
        ("proportion:1/0:last", "cannot read"),
    ],
)
def test_bad_specifications(
    spec: object, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    similar(tmp_path / "f.json", 24)
    similar(tmp_path / "other.json", 12)
    (tmp_path / "probe.json").write_text('{"depth": 24}')
    with pytest.raises(LayerfuseError, match=message):
        select(spec, 24)  # type: ignore[arg-type]


def similar(file: Path, depth: int, cuts: tuple[int, ...] = (4, 11)) -> Path:
    """A similarity file of layers that are alike between the cuts, and not at all across them."""
    layers = np.arange(1, depth + 1)
    block = np.searchsorted(cuts, layers, side="right")
    similarity = np.equal.outer(block, block) * 1.0
    groups = all_groups(similarity, layers.tolist())
    file.write_text(json.dumps({"depth": depth, "groups": groups_to_json(groups)}))
    return file


def span(first: int, last: int) -> tuple[int, ...]:
    return tuple(range(first, last + 1))


@pytest.mark.parametrize(
    ("depth", "half", "third", "start"),
    [(12, 6, 4, 4), (24, 12, 8, 4), (26, 13, 8, 2), (27, 13, 9, 3)],
)
def test_every_kind(depth: int, half: int, third: int, start: int, tmp_path: Path) -> None:
    file = similar(tmp_path / "similarity.json", depth)
    former, latter = span(1, half), span(half + 1, depth)
    table: dict[Any, list[tuple[int, ...]]] = {
        f"similarity:3@{file}": [(1,), (4,), (11,)],
        f"similarity:3:groups@{file}": [span(1, 3), span(4, 10), span(11, depth)],
        "proportion:1/2:first": [former],
        "proportion:1/2:last": [latter],
        "former": [former],
        "latter": [latter],
        "proportion:1/3:first": [span(1, third)],
        "proportion:2/3:last": [span(third + 1, depth)],
        "all": [former, latter],
        "every:4": [(k,) for k in range(start, depth + 1, 4)],
        "-1,3,-2": [(depth,), (3,), (depth - 1,)],
        (3, -depth): [(3,), (1,)],
    }
    for spec, groups in table.items():
        assert list(select(spec, depth).groups) == groups, spec
    # what is not in the first share is in the last
    for part in range(1, 7):
        first = select(f"proportion:{part}/7:first", depth)
        last = select(f"proportion:{7 - part}/7:last", depth)
        assert first.layers + last.layers == span(1, depth)


def arms(*specs: Any) -> dict[str, Any]:
    return {"arms": [{"layers": spec, "fusion": {"name": "concat"}} for spec in specs]}


def test_arms_by_similarity_read_the_file_of_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    similar(tmp_path / "sub" / "s.json", 12)
    other = similar(tmp_path / "o.json", 12, (2, 3))
    changes = arms("similarity:3", "similarity:2:groups", f"similarity:3@{other}", [3])
    changes["grid"] = {"layers": ["similarity:4"], "fusion": [{"name": "concat"}]}
    recipe = load_recipe(write(tmp_path, {**changes, "similarity": "sub/s.json"}))
    assert recipe.similarity == str(tmp_path / "sub" / "s.json")
    groups = [select(arm.layers, 12).groups for arm in recipe.all_arms()]
    assert [len(of_arm) for of_arm in groups] == [3, 2, 3, 1, 4]
    # the third arm names its own file
    assert groups[0] == ((1,), (4,), (11,))
    assert groups[2] == ((1,), (2,), (3,))
    assert recipe.all_arms()[0].label == "concat similarity:3"


@pytest.mark.parametrize("named_by", ["recipe", "arm"])
def test_other_groups_are_another_run(tmp_path: Path, named_by: str) -> None:
    file = similar(tmp_path / "s.json", 12)
    if named_by == "arm":
        named = arms(f"similarity:3@{file}")
    else:
        named = {**arms("similarity:3"), "similarity": "s.json"}
    path = write(tmp_path, named)
    first = runs(load_recipe(path), "")[0].key
    assert runs(load_recipe(path), "")[0].key == first
    similar(file, 12, (2, 3))
    assert runs(load_recipe(path), "")[0].key != first


def test_listed_layers_are_the_same_run_with_and_without_a_file(tmp_path: Path) -> None:
    """A finished study that gains an arm by similarity does not train its other arms again."""
    first = runs(load_recipe(write(tmp_path, arms([3]))), "")[0].key
    named = write(tmp_path, {**arms([3]), "similarity": "s.json"})
    # the file is not there yet
    assert runs(load_recipe(named), "")[0].key == first
    similar(tmp_path / "s.json", 12)
    assert runs(load_recipe(named), "")[0].key == first
