"""`layerfuse recommend`: the ranking, ties, the recipe it writes, and saved measurements."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

from layerfuse.look import recommend as recommending
from layerfuse.look.probe_report import Probes
from layerfuse.look.recommendation import RankedSelection, Recommendation
from layerfuse.look.similarity_report import LayerScores
from layerfuse.look.tasks import SCENES
from layerfuse.recipe.reader import load_recipe
from layerfuse.study.check import check_arms
from tests import tiny
from tests.small_look import probed, save_encoder_and_pictures, use_few_scenes
from tests.test_recipe import GOOD


def scenes_file(home: Path, part: str) -> str:
    """The file of the training or test scenes that the first recommendation made."""
    count = SCENES["train"] if part == "train" else SCENES["test"]
    return f"{home}/scenes/{part}-{count}-0-8-all-v2/conversations.json"


def recommend(home: Path, output: Path, **changes: str) -> dict[str, Any]:
    """The recommendation for the tiny encoder; `train` and `test` stand for files of scenes."""
    settings: dict[str, Any] = {
        "images": f"{home}/images",
        "recipe": home / "recipe.yaml",
        "output": output,
        "console": Console(quiet=True),
    }
    for name, value in changes.items():
        if value in SCENES:
            value = scenes_file(home, value)
        settings[name] = value
    file = recommending.recommend(f"{home}/encoder", **settings)
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def first_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder, pictures, a recipe, and in `look` a first recommendation."""
    folder = tmp_path_factory.mktemp("home")
    save_encoder_and_pictures(folder)
    tiny.text_config().save_pretrained(folder / "llm")
    recipe = {**GOOD, "encoder": "./encoder", "llm": "./llm", "baseline": "both"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.MonkeyPatch.context() as patch:
        use_few_scenes(folder, patch)
        recommend(folder, folder / "look")
    return folder


@pytest.fixture
def home(first_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same folder, where few scenes are drawn if no data is given."""
    use_few_scenes(first_home, monkeypatch)
    return first_home


@pytest.fixture
def look(home: Path, tmp_path: Path) -> Path:
    """A copy of the first recommendation, to which a test may write."""
    return Path(shutil.copytree(home / "look", tmp_path / "look"))


def first_ranking(home: Path) -> list[dict[str, Any]]:
    """The ranking of the first recommendation, best first."""
    text = (home / "look" / "recommend.json").read_text()
    return json.loads(text)["ranking"]


def test_the_ranking_goes_from_best_to_worst(home: Path) -> None:
    ranking = first_ranking(home)

    scores = [selection["score"] for selection in ranking]
    assert scores == sorted(scores, reverse=True)
    # The first is nothing behind itself
    assert ranking[0]["behind"] == [0, 0]
    assert ranking[0]["tie"] is True
    # Single layers, and the representatives of two to four groups
    sizes = {len(selection["layers"]) for selection in ranking}
    assert sizes == {1, 2, 3, 4}


def test_recommended_arms_are_the_first_of_the_ranking(home: Path) -> None:
    ranking = first_ranking(home)

    recipe = load_recipe(home / "look" / "recommended.yaml")

    arms = [arm.layers for arm in recipe.all_arms()]
    assert arms == [selection["layers"] for selection in ranking[:6]]
    # The paths of the extended recipe still lead to its models
    assert Path(recipe.llm.model).resolve() == home / "llm"
    check_arms(recipe)


def test_the_grid_of_the_extended_recipe_does_not_stay(home: Path, tmp_path: Path) -> None:
    ranking = first_ranking(home)
    # Its first arm is the recommended one, its second reads all layers
    grid = {
        "layers": [ranking[0]["layers"], "all"],
        "fusion": [{"name": "concat"}],
    }
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump({**GOOD, "grid": grid}))
    recommendation = Recommendation(
        "some/encoder",
        [],
        [RankedSelection(**ranking[0])],
    )

    recommending.write_recommendation(tmp_path, recommendation, recipe, Console(quiet=True))

    recommended = load_recipe(tmp_path / "recommended.yaml")
    assert len(recommended.all_arms()) == 1


def failing(name: str) -> Callable[..., None]:
    """A measurement that fails the test by its name."""

    def measure(*_: object, **__: object) -> None:
        pytest.fail(name)

    return measure


@pytest.fixture
def no_measurement(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, a new measurement fails the test by the measurement's name."""

    def forbid() -> None:
        monkeypatch.setattr(recommending, "similarity", failing("similarity"))
        monkeypatch.setattr(recommending, "probe", failing("probe"))

    return forbid


@pytest.mark.parametrize(
    ("now", "tasks"),
    [
        ({}, 7),
        ({"tasks": "count"}, 1),
    ],
)
def test_measurements_that_fit_are_used(
    now: dict[str, str],
    tasks: int,
    home: Path,
    look: Path,
    no_measurement: Callable[[], None],
) -> None:
    no_measurement()

    assert len(recommend(home, look, **now)["tasks"]) == tasks


@pytest.mark.parametrize(
    ("earlier", "now", "measured"),
    [
        # Other pictures
        ({}, {"images": "test"}, "similarity"),
        ({}, {"data": "train"}, "probe"),
        # Probes of one task do not say which others there are
        ({"tasks": "count"}, {}, "probe"),
        # Without a test the training samples are divided
        ({"data": "train", "test": "test"}, {"data": "train"}, "probe"),
    ],
)
def test_measurements_that_do_not_fit_are_made_again(
    earlier: dict[str, str],
    now: dict[str, str],
    measured: str,
    home: Path,
    look: Path,
    no_measurement: Callable[[], None],
) -> None:
    if earlier:
        (look / "probe.json").unlink()
        recommend(home, look, **earlier)
    no_measurement()

    with pytest.raises(pytest.fail.Exception, match=measured):
        recommend(home, look, **now)


def test_probes_of_another_grid_are_made_again(
    home: Path, look: Path, no_measurement: Callable[[], None]
) -> None:
    file = look / "probe.json"
    report = json.loads(file.read_text())
    file.write_text(json.dumps({**report, "grid_side": 2}))
    no_measurement()

    with pytest.raises(pytest.fail.Exception, match="probe"):
        recommend(home, look)


def test_only_a_clear_difference_is_no_tie() -> None:
    first = "1" * 90 + "0" * 10
    # Right on 89 pictures, but on others
    close = "0" * 6 + "1" * 84 + "01" * 5
    worse = "01" * 50
    probes = Probes(
        "mean",
        [
            probed([3], t=worse),
            probed([1, 2], t=first),
            probed([2], t=close),
            probed([1], t=first),
        ],
    )
    scores = LayerScores(
        kept_tokens=1,
        entropy=np.array([0.0, 0.1, 0.2, 0.3]),
        dimension=np.arange(4.0),
    )

    ranking = recommending.rank(
        probes,
        [[1], [2], [3], [1, 2]],
        ["t"],
        scores=scores,
        groups=[[1, 2], [3]],
        seed=0,
    )

    best, equal, behind, clearly_worse = ranking
    # Of equals, the one with fewer layers comes first
    assert best.layers == [1]
    assert best.tie is True
    assert best.best_on == ["t"]
    assert equal.layers == [1, 2]
    assert equal.tie is True
    assert equal.best_on == ["t"]
    assert behind.layers == [2]
    assert behind.tie is True
    assert behind.best_on == []
    assert clearly_worse.layers == [3]
    assert clearly_worse.tie is False
    assert clearly_worse.best_on == []
    # 50 of 100 pictures instead of 90, as a share of the best
    expected = [-0.52 / 0.9, -0.28 / 0.9]
    assert clearly_worse.behind == pytest.approx(expected, abs=0.04)
    # The evidence for layer 2: the group that it stands for, and its scores
    assert behind.groups == [[1, 2]]
    assert behind.entropy == [0.2]
