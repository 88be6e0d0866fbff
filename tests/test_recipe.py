"""Recipes: inheritance, overrides, paths, arms, and one clear error for each mistake."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from layerfuse.errors import LayerfuseError
from layerfuse.recipe.reader import load_recipe
from layerfuse.recipe.schema import Recipe
from layerfuse.study.plan import runs

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
GOOD: dict[str, Any] = {
    "name": "tiny",
    "encoder": "some/encoder",
    "llm": "some/llm",
    "arms": [
        {"layers": [3], "fusion": {"name": "single"}},
        {"name": "both", "layers": "1,3", "fusion": {"name": "concat"}, "seeds": [5]},
    ],
    "seeds": [0, 1],
    "stages": {
        "align": {"data": {"path": "a.json", "images": "pictures"}, "learning_rates": {"fusion": 1}}
    },
    "evaluate": {"data": {"scenes": {"count": 3}}},
}


def write(folder: Path, changes: dict[str, Any] | None = None, name: str = "r.yaml") -> Path:
    (folder / name).write_text(yaml.safe_dump({**GOOD, **(changes or {})}))
    return folder / name


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_shipped_recipe_is_valid_and_says_how_to_run_it(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    header = path.read_text().splitlines()[0]
    assert header.startswith("# layerfuse ")
    assert f"recipes/{path.name}" in header


def test_paths_are_relative_to_the_recipe(tmp_path: Path) -> None:
    data = load_recipe(write(tmp_path)).stages["align"].data
    assert data.path == str(tmp_path / "a.json")
    assert data.images == str(tmp_path / "pictures")


def test_extends_and_overrides(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "sub").mkdir()
    top = tmp_path / "sub" / "top.yaml"
    top.write_text("extends: ../r.yaml\nname: top\nstages: {align: {steps: 7}}\n")
    recipe = load_recipe(top, ["stages.align.batch_size=64", "arms.0.layers=[2]", "seeds=[4]"])
    assert (recipe.name, recipe.stages["align"].steps) == ("top", 7)
    assert recipe.stages["align"].batch_size == 64
    assert recipe.stages["align"].data.path == str(tmp_path / "a.json")
    assert recipe.arms[0].layers == [2]
    assert recipe.seeds == [4]


def test_arms_have_names_defaults_and_seeds(tmp_path: Path) -> None:
    grid = {"layers": ["all", [2]], "fusion": [{"name": "concat", "normalize": "layernorm"}]}
    changes = {"grid": grid, "fusion_defaults": {"normalize": "standardize"}}
    recipe = load_recipe(write(tmp_path, changes))
    arms = recipe.all_arms()
    assert [a.label for a in arms] == ["single 3", "both", "concat all", "concat 2"]
    normalizations = [a.fusion["normalize"] for a in arms]
    assert normalizations == ["standardize", "standardize", "layernorm", "layernorm"]
    assert [a.seeds for a in arms] == [[0, 1], [5], [0, 1], [0, 1]]
    assert recipe.baseline_name == "single 3"


def test_runs_go_seed_by_seed_and_keys_follow_what_matters(tmp_path: Path) -> None:
    first = runs(load_recipe(write(tmp_path)), "")
    assert [(r.arm.label, r.seed) for r in first] == [("single 3", 0), ("both", 5), ("single 3", 1)]
    assert len({r.folder for r in first}) == 3
    same = {"description": "other", "statistics": {"resamples": 500}, "baseline": "both"}
    assert [r.key for r in runs(load_recipe(write(tmp_path, same)), "")] == [r.key for r in first]
    keys = {
        runs(load_recipe(write(tmp_path, {"dtype": d})), "")[0].key for d in ("float32", "bfloat16")
    }
    assert len(keys) == 2
    assert first[0].key in keys  # `auto` is one of them


def test_other_samples_or_another_template_are_another_run(tmp_path: Path) -> None:
    (tmp_path / "a.jinja").write_text("[1]")
    templated = write(tmp_path, {"chat_template": "a.jinja"})
    one = runs(load_recipe(templated), "")[0].key
    (tmp_path / "a.jinja").write_text("[2]")
    assert runs(load_recipe(templated), "")[0].key != one
    first = runs(load_recipe(write(tmp_path)), "")[0].key
    shown = {"stages": {"align": {**STAGE, "data": {**STAGE["data"], "expected_samples": 7}}}}
    assert runs(load_recipe(write(tmp_path, shown)), "")[0].key == first
    assert runs(load_recipe(write(tmp_path)), "other samples")[0].key != first


def test_models_that_begin_with_a_dot_are_relative_to_the_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, {"encoder": "./enc", "llm": {"model": "../llm"}}))
    assert Path(recipe.encoder.model).resolve() == tmp_path / "enc"
    assert Path(recipe.llm.model).resolve() == tmp_path.parent / "llm"
    assert load_recipe(write(tmp_path)).encoder.model == "some/encoder"


STAGE = GOOD["stages"]["align"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encodr": "x"}, r"encodr: unknown key; valid: name, description, encoder"),
        (
            {"stages": {"align": {**STAGE, "lr": 1}}},
            r"stages\.align: .*lr: unknown key; valid: d",
        ),
        (
            {"arms": [{"layer": 3, "fusion": {}}]},
            r"arms\.0: .*layer: unknown key; valid: name, layers",
        ),
        ({"arms": []}, "a recipe needs arms or a grid"),
        ({"arms": [GOOD["arms"][0]] * 2}, "arms with the same name"),
        ({"baseline": "none"}, r"baseline 'none' is no arm; valid: \['single 3', 'both'\]"),
        ({"stages": {"align": {**STAGE, "data": {}}}}, "exactly one of scenes, path, dataset"),
        ({"stages": {"align": {**STAGE, "learning_rates": {"lm": 1}}}}, "'fusion', 'llm' or 'vis"),
        ({"stages": {"align": {**STAGE, "lora": {}}}}, "learning_rates does not name llm"),
        ({"stages": {"align": {**STAGE, "device_batch_size": 48}}}, "is no multiple of device_bat"),
        ({"name": "a b"}, "name: String should match pattern"),
        ({"seeds": [1, 1]}, "seeds repeat"),
        ({"token_grid": [0, 4]}, "token_grid.0: Input should be greater than 0"),
        ({"stages": {"align": {**STAGE, "learning_rates": {"fusion": -1}}}}, "greater than 0"),
        ({"dtype": "float16"}, "'bfloat16' or 'float32'"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LayerfuseError, match=message):
        load_recipe(write(tmp_path, changes))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("name", "an override is key.sub=value"),
        ("name=[", r"override 'name=\[' is not valid YAML"),
        ("arms.5.layers=1", "'5' is no index of 2 items"),
        ("name.x=1", "'name' holds no keys"),
        ("stages.align.stepz=1", "stepz: unknown key"),
    ],
)
def test_bad_overrides(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(LayerfuseError, match=message):
        load_recipe(write(tmp_path), [override])


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(LayerfuseError, match=r"none\.yaml"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(LayerfuseError, match="is not valid YAML"):
        load_recipe(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("[]")
    with pytest.raises(LayerfuseError, match=r"list\.yaml must be a mapping"):
        load_recipe(tmp_path / "list.yaml")
    with pytest.raises(LayerfuseError, match=f"cannot read the recipe {tmp_path}: "):
        load_recipe(tmp_path)
    with pytest.raises(LayerfuseError, match=r"(?s)recipe .*r\.yaml:.* encodr: unknown key"):
        load_recipe(write(tmp_path, {"encodr": "x"}))


def test_a_bad_extends_is_named(tmp_path: Path) -> None:
    one = write(tmp_path, {"extends": "two.yaml"}, "one.yaml")
    with pytest.raises(LayerfuseError, match=r"cannot read the recipe .*two\.yaml"):
        load_recipe(one)
    write(tmp_path, {"extends": "sub/../one.yaml"}, "two.yaml")
    (tmp_path / "sub").mkdir()
    with pytest.raises(LayerfuseError, match=r"recipe .*one\.yaml extends itself"):
        load_recipe(one)
    with pytest.raises(LayerfuseError, match=r"extends must name a file, not \['one\.yaml'\]"):
        load_recipe(write(tmp_path, {"extends": ["one.yaml"]}))


def test_a_recipe_survives_writing_and_reading(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path))
    assert Recipe.model_validate(yaml.safe_load(yaml.safe_dump(recipe.model_dump()))) == recipe
