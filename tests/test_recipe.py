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
STAGE: dict[str, Any] = {
    "data": {"path": "a.json", "images": "pictures"},
    "learning_rates": {"fusion": 1},
}
GOOD: dict[str, Any] = {
    "name": "tiny",
    "encoder": "some/encoder",
    "llm": "some/llm",
    "arms": [
        {"layers": [3], "fusion": {"name": "single"}},
        {
            "name": "both",
            "layers": "1,3",
            "fusion": {"name": "concat"},
            "seeds": [5],
        },
    ],
    "seeds": [0, 1],
    "stages": {"align": STAGE},
    "evaluate": {"data": {"scenes": {"count": 3}}},
}
"""A recipe without mistakes."""


CLAIM = {
    "claim": "Two layers beat one.",
    "source": "a paper, table 1",
    "better": ["both"],
    "than": ["single 3"],
    "limits": "of a made-up recipe",
}
"""A claim about its arms."""


def write(
    folder: Path,
    changes: dict[str, Any] | None = None,
    name: str = "r.yaml",
) -> Path:
    """Write the good recipe with some keys changed."""
    recipe = {**GOOD, **(changes or {})}
    file = folder / name
    file.write_text(yaml.safe_dump(recipe))
    return file


def align_stage(**changes: Any) -> dict[str, Any]:
    """What changes the one stage of the good recipe."""
    return {"stages": {"align": {**STAGE, **changes}}}


def first_key(recipe: Path, samples: str = "") -> str:
    """The key of the recipe's first run, by which a study knows what it ran already."""
    return runs(load_recipe(recipe), samples)[0].key


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid_and_says_how_to_run_it(path: Path) -> None:
    recipe = load_recipe(path)

    assert recipe.name == path.stem
    # The first line is the command that runs it
    header = path.read_text().splitlines()[0]
    assert header.startswith("# layerfuse ")
    assert f"recipes/{path.name}" in header


def test_paths_are_relative_to_the_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path))

    data = recipe.stages["align"].data
    assert data.path == str(tmp_path / "a.json")
    assert data.images == str(tmp_path / "pictures")


def test_models_that_begin_with_a_dot_are_relative_to_the_recipe(tmp_path: Path) -> None:
    """Others are names of a hub."""
    changes = {"encoder": "./enc", "llm": {"model": "../llm"}}

    recipe = load_recipe(write(tmp_path, changes))

    assert Path(recipe.encoder.model).resolve() == tmp_path / "enc"
    assert Path(recipe.llm.model).resolve() == tmp_path.parent / "llm"
    assert load_recipe(write(tmp_path)).encoder.model == "some/encoder"


def test_extends_keeps_what_it_does_not_change(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "sub").mkdir()
    top = tmp_path / "sub" / "top.yaml"
    top.write_text("extends: ../r.yaml\nname: top\nstages: {align: {steps: 7}}\n")

    recipe = load_recipe(top)

    assert recipe.name == "top"
    align = recipe.stages["align"]
    assert align.steps == 7
    # Relative to the recipe that names it, not to the one that extends that
    assert align.data.path == str(tmp_path / "a.json")


def test_overrides_change_values_at_any_depth(tmp_path: Path) -> None:
    overrides = ["stages.align.batch_size=64", "arms.0.layers=[2]", "seeds=[4]"]

    recipe = load_recipe(write(tmp_path), overrides)

    assert recipe.stages["align"].batch_size == 64
    assert recipe.arms[0].layers == [2]
    assert recipe.seeds == [4]


def test_an_override_changes_one_place_of_what_an_alias_repeats(tmp_path: Path) -> None:
    repeated = {"path": "a.json"}
    stage = {"data": repeated, "learning_rates": {"fusion": 1.0}}
    path = write(tmp_path, {"stages": {"align": stage}, "evaluate": {"data": repeated}})
    # YAML writes what is one object twice as an alias.
    assert "*id" in path.read_text()

    recipe = load_recipe(path, ["stages.align.data.limit=5"])

    assert recipe.stages["align"].data.limit == 5
    assert recipe.evaluate.data.limit is None


def test_arms_have_names_defaults_and_seeds(tmp_path: Path) -> None:
    changes = {
        "grid": {
            "layers": ["all", [2]],
            "fusion": [{"name": "concat", "normalize": "layernorm"}],
        },
        "fusion_defaults": {"normalize": "standardize"},
    }

    recipe = load_recipe(write(tmp_path, changes))

    arms = recipe.all_arms()
    assert [arm.label for arm in arms] == ["single 3", "both", "concat all", "concat 2"]
    # A default gives way to what an arm says itself
    assert [arm.fusion["normalize"] for arm in arms] == [
        "standardize",
        "standardize",
        "layernorm",
        "layernorm",
    ]
    # One arm has seeds of its own
    assert [arm.seeds for arm in arms] == [
        [0, 1],
        [5],
        [0, 1],
        [0, 1],
    ]
    assert recipe.baseline_name == "single 3"


def test_runs_go_seed_by_seed(tmp_path: Path) -> None:
    """After the first seed of all arms they can be compared."""
    planned = runs(load_recipe(write(tmp_path)), "")

    assert [(run.arm.label, run.seed) for run in planned] == [
        ("single 3", 0),
        ("both", 5),
        ("single 3", 1),
    ]
    assert len({run.folder for run in planned}) == 3


def planned_seeds(recipe: Path) -> dict[str, list[int]]:
    """The seeds of each arm's runs, in their order."""
    seeds: dict[str, list[int]] = {}
    for run in runs(load_recipe(recipe), ""):
        seeds.setdefault(run.arm.label, []).append(run.seed)
    return seeds


def test_the_baseline_can_have_more_seeds_than_the_others(tmp_path: Path) -> None:
    more = {"baseline_seeds": [0, 1, 2, 3]}

    assert planned_seeds(write(tmp_path, more)) == {"single 3": [0, 1, 2, 3], "both": [5]}


def test_the_baseline_may_be_any_arm_of_a_grid(tmp_path: Path) -> None:
    grid = {
        "arms": [],
        "grid": {"layers": [[2], [4]], "fusion": [{"name": "single"}]},
        "baseline": "single 4",
        "baseline_seeds": [7, 8, 9],
    }

    assert planned_seeds(write(tmp_path, grid)) == {"single 2": [0, 1], "single 4": [7, 8, 9]}


def test_two_lists_of_seeds_for_the_baseline_are_refused(tmp_path: Path) -> None:
    both = {"baseline": "both", "baseline_seeds": [0, 1]}

    with pytest.raises(LayerfuseError, match="keep one of the two"):
        load_recipe(write(tmp_path, both))


@pytest.mark.parametrize(
    ("seeds", "words"),
    [([1, 1], "seeds repeat"), ([], "at least 1 item"), ([-1], "from 0 on")],
)
def test_the_baselines_seeds_are_seeds(tmp_path: Path, seeds: list[int], words: str) -> None:
    with pytest.raises(LayerfuseError, match=words):
        load_recipe(write(tmp_path, {"baseline_seeds": seeds}))


def test_what_does_not_change_a_run_keeps_its_key(tmp_path: Path) -> None:
    """Else a study would train again when its description was corrected."""
    changes = {
        "description": "other",
        "statistics": {"resamples": 500},
        "baseline": "single 3",
        "baseline_seeds": [0, 1],
        "claims": [CLAIM],
    }
    plain = runs(load_recipe(write(tmp_path)), "")
    changed = runs(load_recipe(write(tmp_path, changes)), "")

    for changed_run, plain_run in zip(changed, plain, strict=True):
        assert changed_run.key == plain_run.key


def test_a_run_that_measures_less_is_another_run(tmp_path: Path) -> None:
    """Else the likelihoods would be missing where they are asked for later."""
    plain = first_key(write(tmp_path))
    data = {"scenes": {"count": 3}}
    without = {"evaluate": {"data": data, "log_likelihood": False}}
    measured = {"evaluate": {"data": data, "log_likelihood": True}}

    assert first_key(write(tmp_path, measured)) == plain
    assert first_key(write(tmp_path, without)) != plain


def test_another_number_type_is_another_run(tmp_path: Path) -> None:
    float32 = first_key(write(tmp_path, {"dtype": "float32"}))
    bfloat16 = first_key(write(tmp_path, {"dtype": "bfloat16"}))
    automatic = first_key(write(tmp_path))

    assert float32 != bfloat16
    # `auto` is the one that this machine computes fast
    assert automatic in (float32, bfloat16)


def test_another_template_is_another_run(tmp_path: Path) -> None:
    # What counts is the template's text, not its name
    template = tmp_path / "a.jinja"
    recipe = write(tmp_path, {"chat_template": "a.jinja"})
    template.write_text("[1]")
    before = first_key(recipe)

    template.write_text("[2]")

    assert first_key(recipe) != before


def test_other_samples_are_another_run(tmp_path: Path) -> None:
    before = first_key(write(tmp_path))
    with_number = align_stage(data={**STAGE["data"], "expected_samples": 7})

    assert first_key(write(tmp_path), "other samples") != before
    # The number that a reader is told changes no sample
    assert first_key(write(tmp_path, with_number)) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"encodr": "x"},
            r"encodr: unknown key; valid: name, description, start_from, encoder",
        ),
        (
            align_stage(lr=1),
            r"stages\.align: .*lr: unknown key; valid: d",
        ),
        (
            {"arms": [{"layer": 3, "fusion": {}}]},
            r"arms\.0: .*layer: unknown key; valid: name, layers",
        ),
        (
            {"arms": []},
            "a recipe needs arms or a grid",
        ),
        (
            {"arms": [GOOD["arms"][0], GOOD["arms"][0]]},
            "arms with the same name",
        ),
        (
            {"baseline": "none"},
            r"baseline 'none' is no arm; valid: \['single 3', 'both'\]",
        ),
        (
            align_stage(data={}),
            "exactly one of scenes, path, dataset",
        ),
        (
            align_stage(learning_rates={"lm": 1}),
            "'fusion', 'llm', 'vis",
        ),
        # It is a part of the fusion
        (
            align_stage(learning_rates={"projector": 1}),
            "learning_rates names projector, a part of the fusion, without fusion",
        ),
        # LoRA is a way to train the LLM
        (
            align_stage(lora={}),
            "learning_rates does not name llm",
        ),
        # Constants are measured on the encoder before it moves
        (
            {
                "fusion_defaults": {"normalize": "whiten"},
                **align_stage(learning_rates={"vision": 1e-5}),
            },
            "arm 'single 3' has normalize: whiten, .* stage 'align' trains vision",
        ),
        # 256 samples a step cannot be made of 48 at once
        (
            align_stage(device_batch_size=48),
            "is no multiple of device_bat",
        ),
        # It becomes the name of a folder
        (
            {"name": "a b"},
            "name: String should match pattern",
        ),
        # A run that comes twice would count as two
        (
            {"seeds": [1, 1]},
            "seeds repeat",
        ),
        (
            {"token_grid": [0, 4]},
            "token_grid.0: Input should be greater than 0",
        ),
        (
            align_stage(learning_rates={"fusion": -1}),
            "greater than 0",
        ),
        (
            {"dtype": "float16"},
            "'bfloat16' or 'float32'",
        ),
        (
            {"claims": [{**CLAIM, "better": ["three"]}]},
            r"is about \['three'\], which are no arms; valid: \['single 3', 'both'\]",
        ),
        (
            {"claims": [{**CLAIM, "better": ["both", "single 3"]}]},
            r"arms \['single 3'\] stand in better and in than",
        ),
        (
            {"claims": [{**CLAIM, "than": []}]},
            r"claims\.0\.than: List should have at least 1 item",
        ),
        (
            {"claims": [{**CLAIM, "than": ["single 3", "single 3"]}]},
            r"\['single 3'\] stand more than once",
        ),
        (
            {"claims": [{**CLAIM, "families": ["a"], "categories": ["b"]}]},
            "give families or categories, not both",
        ),
        (
            {"claims": [CLAIM, CLAIM]},
            "claim 'Two layers beat one.' stands more than once",
        ),
        (
            {"claims": [{**CLAIM, "over": "some"}]},
            r"claims\.0\.over: .*'mean' or 'each'",
        ),
    ],
)
def test_mistakes_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    recipe = write(tmp_path, changes)

    with pytest.raises(LayerfuseError, match=message):
        load_recipe(recipe)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("name", "an override is key.sub=value"),
        ("name=[", r"override 'name=\[' is not valid YAML"),
        ("llm={blocks: 1, blocks: 2}", "is not valid YAML: the key 'blocks' stands twice"),
        ("arms.5.layers=1", "'5' is no index of 2 items"),
        ("name.x=1", "'name' holds no keys"),
        ("stages.align.stepz=1", "stepz: unknown key"),
    ],
)
def test_bad_overrides(tmp_path: Path, override: str, message: str) -> None:
    recipe = write(tmp_path)

    with pytest.raises(LayerfuseError, match=message):
        load_recipe(recipe, [override])


def test_a_file_that_is_missing_or_a_folder(tmp_path: Path) -> None:
    with pytest.raises(LayerfuseError, match=r"none\.yaml"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(LayerfuseError, match=f"cannot read the recipe {tmp_path}: "):
        load_recipe(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "is not valid YAML"),
        ("a: {b: 1}\nb: 2\na: 3", r"not valid YAML: the key 'a' stands twice .*\n.*line 3"),
        ("a: [{b: 1, c: 2, b: 3}]", "the key 'b' stands twice"),
        ("[]", r"bad\.yaml must be a mapping"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(content)

    with pytest.raises(LayerfuseError, match=message):
        load_recipe(file)


def test_a_mistake_is_named_with_its_file(tmp_path: Path) -> None:
    recipe = write(tmp_path, {"encodr": "x"})

    with pytest.raises(LayerfuseError, match=r"(?s)recipe .*r\.yaml:.* encodr: unknown key"):
        load_recipe(recipe)


def test_a_recipe_that_extends_a_missing_one(tmp_path: Path) -> None:
    recipe = write(tmp_path, {"extends": "two.yaml"})

    with pytest.raises(LayerfuseError, match=r"cannot read the recipe .*two\.yaml"):
        load_recipe(recipe)


def test_a_recipe_that_extends_itself(tmp_path: Path) -> None:
    """By a detour, and by another spelling of its path: else this would never end."""
    one = write(tmp_path, {"extends": "two.yaml"}, "one.yaml")
    write(tmp_path, {"extends": "sub/../one.yaml"}, "two.yaml")
    (tmp_path / "sub").mkdir()

    with pytest.raises(LayerfuseError, match=r"recipe .*one\.yaml extends itself"):
        load_recipe(one)


def test_a_recipe_that_extends_a_list(tmp_path: Path) -> None:
    recipe = write(tmp_path, {"extends": ["one.yaml"]})

    with pytest.raises(LayerfuseError, match=r"extends must name a file, not \['one\.yaml'\]"):
        load_recipe(recipe)


def test_a_recipe_survives_writing_and_reading(tmp_path: Path) -> None:
    """The resolved recipe is written beside every result."""
    recipe = load_recipe(write(tmp_path))

    text = yaml.safe_dump(recipe.model_dump())

    assert Recipe.model_validate(yaml.safe_load(text)) == recipe
