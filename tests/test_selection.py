"""Layer specifications resolve to the indices that the papers name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from layerfuse.errors import LayerfuseError
from layerfuse.look.grouping import all_groups
from layerfuse.recipe.reader import load_recipe
from layerfuse.study.plan import runs
from layerfuse.vision.layer_groups import groups_to_json
from layerfuse.vision.selection import LayerSpec, resolve_layer, select

Groups = tuple[tuple[int, ...], ...]


def span(first: int, last: int) -> tuple[int, ...]:
    """The layers from `first` to `last`, both included."""
    return tuple(range(first, last + 1))


def one_group_each(*layers: int) -> Groups:
    """Each layer as a group of its own."""
    return tuple((layer,) for layer in layers)


@pytest.mark.parametrize(
    ("spec", "depth", "groups"),
    [
        # layers one by one, in the order in which they are named
        ("3,18,-2", 24, one_group_each(3, 18, 23)),
        ([23, 7, 15], 24, one_group_each(23, 7, 15)),
        (-1, 12, one_group_each(12)),
        (0, 12, one_group_each(0)),
        ("-1", 27, one_group_each(27)),
        ("1-3", 12, one_group_each(1, 2, 3)),
        # the sets of 2503.06063; the middle one of an odd number of blocks is in the latter half
        ("former", 24, (span(1, 12),)),
        ("latter", 24, (span(13, 24),)),
        ("all", 24, (span(1, 12), span(13, 24))),
        ("all", 27, (span(1, 13), span(14, 27))),
        ("former", 26, (span(1, 13),)),
        # counted back from the last block, which always is one of them
        ("every:4", 12, one_group_each(4, 8, 12)),
        ("every:4", 26, one_group_each(2, 6, 10, 14, 18, 22, 26)),
        # the released sets of SigLIP-SO400M, whose last of 27 blocks is not used
        ("relative:24:3,18,23", 27, one_group_each(3, 20, 25)),
        ("last:12:-2", 27, (span(15, 26),)),
        # of CLIP-L the layers themselves
        ("relative:24:3,18,23", 24, one_group_each(3, 18, 23)),
        ("last:12", 24, (span(13, 24),)),
        ("last:3:7", 12, (span(5, 7),)),
        ("last:12", 12, (span(1, 12),)),
        # groups
        ("0-11|12-23", 24, (span(0, 11), span(12, 23))),
        ([[1, 2], [3, -1]], 4, ((1, 2), (3, 4))),
    ],
)
def test_specifications(spec: LayerSpec, depth: int, groups: Groups) -> None:
    selection = select(spec, depth)

    assert selection.groups == groups
    layers: list[int] = []
    for group in groups:
        layers.extend(group)
    assert selection.layers == tuple(layers)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        (-1, 24),
        (-2, 23),
        (-7, 18),
        (-12, 13),
        (-17, 8),
        (-22, 3),
        # the embeddings
        (-25, 0),
    ],
)
def test_llava_names_of_clip_layers(name: int, layer: int) -> None:
    """A negative name counts `hidden_states` from its end: 25 of them for 24 blocks."""
    assert resolve_layer(name, 24) == layer


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        # layers that do not exist, or exist twice
        ("25", "layers are 0..24"),
        (-26, "-25..-1"),
        ("3,3", r"\[3\] are selected more than once"),
        ("3,-22", r"\[3\] are selected more than once"),
        # no specification
        ("middle", "cannot read 'middle'"),
        ("", "cannot read ''"),
        ("5-2", "cannot read '5-2'"),
        ("every:0", "cannot read"),
        ([], "no layer is selected"),
        ([[1], []], "no layer is selected"),
        ([True], "layers must be integers, not True"),
        ([3, "4"], "layers must be integers, not '4'"),
        # shares that are none, or hold no layer
        ("proportion:4/3:first", "the proportion 4/3 is not in 0..1"),
        ("proportion:0/3:last", "the proportion 0/3 is not in 0..1"),
        ("proportion:1/25:first", "no layer is selected"),
        ("proportion:1/0:last", "cannot read"),
        ("last:0", "cannot read"),
        ("last:12:11", "up to layer 11 there are 11 layers of 1..24, not 12"),
        ("last:2:25", "layers are 0..24"),
        ("relative:24:25", "layer 25 does not exist in an encoder of 24 blocks"),
        ("relative:24:-2", "cannot read"),
        # at the same depth in a shallower encoder
        ("relative:48:6,7", r"\[3\] are selected more than once"),
    ],
)
def test_bad_specifications(spec: Any, message: str) -> None:
    with pytest.raises(LayerfuseError, match=message):
        select(spec, 24)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("similarity:3", "needs a file: similarity:3@FILE"),
        ("similarity:3@none.json", "no similarity file none.json"),
        ("similarity:3@other.json", "other.json is about an encoder of 12 blocks, not of 24"),
        ("similarity:25@f.json", r"f.json has groups for 1\.\.24, not for 25"),
        ("similarity:3@probe.json", "probe.json"),
    ],
)
def test_bad_similarity_files(
    spec: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_similarity(tmp_path / "f.json", depth=24)
    write_similarity(tmp_path / "other.json", depth=12)
    # a file of another kind
    (tmp_path / "probe.json").write_text('{"depth": 24}')

    with pytest.raises(LayerfuseError, match=message):
        select(spec, 24)


def write_similarity(file: Path, depth: int, first_layers: tuple[int, int] = (4, 11)) -> None:
    """Write a similarity file of three blocks of layers.

    Layers of a block are exactly alike, those of different blocks not at all. The first block
    begins at layer 1, the others at `first_layers`.
    """
    layers = np.arange(1, depth + 1)
    block_of_layer = np.searchsorted(first_layers, layers, side="right")
    # (depth, depth)
    same_block = np.equal.outer(block_of_layer, block_of_layer)
    groups = all_groups(same_block.astype(float), layers.tolist())
    file.write_text(json.dumps({"depth": depth, "groups": groups_to_json(groups)}))


@pytest.mark.parametrize(
    ("depth", "half", "third", "start"),
    [
        (12, 6, 4, 4),
        (24, 12, 8, 4),
        (26, 13, 8, 2),
        (27, 13, 9, 3),
    ],
)
def test_every_kind(depth: int, half: int, third: int, start: int, tmp_path: Path) -> None:
    """Every kind of specification, on encoders whose depth thirds and halves do not divide."""
    file = tmp_path / "similarity.json"
    write_similarity(file, depth)
    former = span(1, half)
    latter = span(half + 1, depth)
    every_fourth = range(start, depth + 1, 4)
    expected: dict[Any, Groups] = {
        f"similarity:3@{file}": one_group_each(1, 4, 11),
        f"similarity:3:groups@{file}": (span(1, 3), span(4, 10), span(11, depth)),
        "proportion:1/2:first": (former,),
        "proportion:1/2:last": (latter,),
        "former": (former,),
        "latter": (latter,),
        "proportion:1/3:first": (span(1, third),),
        "proportion:2/3:last": (span(third + 1, depth),),
        "all": (former, latter),
        "every:4": one_group_each(*every_fourth),
        "-1,3,-2": one_group_each(depth, 3, depth - 1),
        (3, -depth): one_group_each(3, 1),
    }

    for spec, groups in expected.items():
        assert select(spec, depth).groups == groups, spec


@pytest.mark.parametrize("depth", [12, 24, 26, 27])
def test_a_first_share_and_the_last_share_that_it_leaves_are_all_layers(depth: int) -> None:
    for part in range(1, 7):
        first = select(f"proportion:{part}/7:first", depth)
        last = select(f"proportion:{7 - part}/7:last", depth)
        assert first.layers + last.layers == span(1, depth)


def write_recipe(folder: Path, specs: list[Any], **changes: Any) -> Path:
    """Write a recipe with an arm `concat` for each layer specification.

    Nothing that it names must exist but the files of similarities: it is read and not run.
    """
    arms: list[dict[str, Any]] = []
    for spec in specs:
        arms.append({"layers": spec, "fusion": {"name": "concat"}})
    recipe: dict[str, Any] = {
        "name": "tiny",
        "encoder": "some/encoder",
        "llm": "some/llm",
        "arms": arms,
        "stages": {
            "align": {
                "data": {"path": "a.json"},
                "learning_rates": {"fusion": 1},
            },
        },
        "evaluate": {"data": {"scenes": {"count": 3}}},
    }
    recipe.update(changes)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def first_key(recipe_file: Path) -> str:
    """What names the first run of a recipe: a run of the same key is not trained again."""
    recipe = load_recipe(recipe_file)
    return runs(recipe, "")[0].key


def test_arms_by_similarity_read_the_file_of_the_recipe(tmp_path: Path) -> None:
    """All but the third arm, which names a file of its own."""
    (tmp_path / "sub").mkdir()
    file_of_recipe = tmp_path / "sub" / "s.json"
    file_of_arm = tmp_path / "o.json"
    write_similarity(file_of_recipe, 12)
    write_similarity(file_of_arm, 12, first_layers=(2, 3))

    recipe_file = write_recipe(
        tmp_path,
        ["similarity:3", "similarity:2:groups", f"similarity:3@{file_of_arm}", [3]],
        grid={"layers": ["similarity:4"], "fusion": [{"name": "concat"}]},
        similarity="sub/s.json",
    )
    recipe = load_recipe(recipe_file)

    # a path in a recipe is relative to the recipe
    assert recipe.similarity == str(file_of_recipe)
    groups_of_arms = [select(arm.layers, 12).groups for arm in recipe.all_arms()]
    assert [len(groups) for groups in groups_of_arms] == [3, 2, 3, 1, 4]
    assert groups_of_arms[0] == one_group_each(1, 4, 11)
    assert groups_of_arms[2] == one_group_each(1, 2, 3)
    # the label does not name the file
    assert recipe.all_arms()[0].label == "concat similarity:3"


@pytest.mark.parametrize("named_by", ["recipe", "arm"])
def test_other_groups_are_another_run(tmp_path: Path, named_by: str) -> None:
    """A file that is written anew must not leave a finished run of other layers in use."""
    file = tmp_path / "s.json"
    write_similarity(file, 12)
    if named_by == "arm":
        recipe_file = write_recipe(tmp_path, [f"similarity:3@{file}"])
    else:
        recipe_file = write_recipe(tmp_path, ["similarity:3"], similarity="s.json")

    before = first_key(recipe_file)
    assert first_key(recipe_file) == before
    write_similarity(file, 12, first_layers=(2, 3))
    assert first_key(recipe_file) != before


def test_listed_layers_are_the_same_run_with_and_without_a_file(tmp_path: Path) -> None:
    """A finished study that gains an arm by similarity does not train its other arms again."""
    without_file = first_key(write_recipe(tmp_path, [[3]]))

    recipe_file = write_recipe(tmp_path, [[3]], similarity="s.json")
    # the file is not there yet
    assert first_key(recipe_file) == without_file
    write_similarity(tmp_path / "s.json", 12)
    assert first_key(recipe_file) == without_file
