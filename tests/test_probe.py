"""Probes of layers, recommendations, and whether cheap criteria predict what trained.

Numbers on made-up features, verbs on a tiny random encoder, the depth profile on a real one.
"""

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from transformers import AutoModel
from typer.testing import CliRunner

from layerfuse.cli import app
from layerfuse.data.picture import Picture
from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.records import RunScores, write_records
from layerfuse.hardware import DTYPES, native_dtype
from layerfuse.look import probe as probing
from layerfuse.look import recommend as recommending
from layerfuse.look.probe_report import ProbedSelection, Probes, TaskReading
from layerfuse.look.recommendation import RankedSelection, Recommendation
from layerfuse.look.similarity_report import LayerScores
from layerfuse.look.tasks import SCENES, Problem, Task, find_tasks
from layerfuse.look.validation import rank_correlation, validate
from layerfuse.model.pretrained import load_image_processor
from layerfuse.recipe.reader import load_recipe
from layerfuse.study.check import check_arms
from layerfuse.vision.encoder import load_encoder
from layerfuse.vision.selection import select
from tests import tiny
from tests.made_up import run_record
from tests.test_recipe import GOOD

KINDS: dict[str, Any] = {  # question and answer about picture k
    "size": lambda k: ("How big?", ("Small.", "big", "big")[k % 3]),
    "wide": lambda k: (f"Is it {k % 8}?", "ny"[k % 2]),
    "named": lambda k: (f"Do you see {k % 9}?", "ny"[k % 2]),
    "same": lambda k: ("Which planet?", "earth"),
    "rare": lambda k: ("What kind?", "odd" if k < 4 else ("cat", "dog")[k % 2]),
    "untested": lambda k: ("New?", "ny"[k % 2]),
}


def talks(file: Path, count: int, kinds: list[str], tags: bool = True) -> str:
    """A LLaVA JSON that asks all these kinds of questions about each picture."""
    records = []
    for k in range(count):
        said = [text for kind in kinds for text in KINDS[kind](k)]
        turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]
        record = {"image": f"{k}.png", "conversations": turns}
        records.append({**record, "families": kinds} if tags else record)
    file.write_text(json.dumps(records))
    return str(file)


def test_families_with_few_wordings_and_common_answers_are_tasks(tmp_path: Path) -> None:
    data = talks(tmp_path / "train.json", 36, list(KINDS))
    test = talks(tmp_path / "test.json", 12, list(KINDS)[:-1])
    problem = find_tasks(data, test)
    found = {task.name: task for task in problem.tasks}
    classes = {"rare": ["cat", "dog"], "size": ["big", "small"], "wide": ["n", "y"]}
    assert {name: task.classes for name, task in found.items()} == classes
    assert found["rare"].test[3:6] == ["odd", "cat", "dog"]
    assert found["size"].chance == 8 / 12
    assert Task("t", ["a", "b", "a"], ["b", "b", "a", "c", None], []).chance == 1 / 4
    assert problem.left_out["named"] == "9 different questions"
    assert problem.left_out["same"] == "1 answers with 5 training pictures"
    assert [t.name for t in find_tasks(data, test, ["size"]).tasks] == ["size"]
    plain = find_tasks(talks(tmp_path / "plain.json", 36, ["size", "same"], tags=False), None)
    assert [t.name for t in plain.tasks] == ["how big?"]
    assert set(plain.left_out) == {"which planet?"}
    assert "2 answers" not in problem.left_out["untested"]  # it has two; the test asks for none


def test_an_unknown_task_is_named_with_all_valid_ones(tmp_path: Path) -> None:
    data = talks(tmp_path / "d.json", 36, ["named", "size", "wide"])
    message = r"no task \['tint'\]; tasks: \['size', 'wide'\], left out: .*'named': '9 differ"
    with pytest.raises(LayerfuseError, match=message):
        find_tasks(data, None, ["size", "tint"])


def test_one_file_is_split_by_picture(tmp_path: Path) -> None:
    data = Path(talks(tmp_path / "d.json", 40, ["size"]))
    data.write_text(json.dumps([*json.loads(data.read_text())] * 2))  # pictures come twice
    drawn = []
    for seed in (3, 3, 4):
        problem = find_tasks(str(data), None, seed=seed)
        train, test = ({p.name for p in part} for part in (problem.train, problem.test))
        assert (len(problem.train), len(problem.test), len(train | test)) == (28, 12, 40)
        drawn.append(test)
    assert drawn[0] == drawn[1] != drawn[2]


TRAIN, TEST, CELLS = 240, 100, 4


def made_up(answers: list[Any], classes: list[str] | None = None) -> Problem:
    task = Task("t", answers[:TRAIN], answers[TRAIN:], classes or sorted(set(answers)))
    return Problem([Picture("")] * TRAIN, [Picture("")] * TEST, [task], {})


def noise(layers: int) -> np.ndarray:
    size = (layers, TRAIN + TEST, CELLS, 3)
    return np.random.default_rng(0).normal(size=size).astype(np.float32)


def test_a_layer_that_holds_the_answer_is_read_and_noise_is_not() -> None:
    """Two bits are four answers: layer 1 holds one, layer 2 the other, layer 3 both, 0 none."""
    bits = np.random.default_rng(1).integers(0, 2, (TRAIN + TEST, 2))
    features = 0.1 * noise(4)
    for layer, held in ((1, [0]), (2, [1]), (3, [0, 1])):
        features[layer, :, 2, held] += bits[:, held].T
    problem = made_up([f"{a}{b}" for a, b in bits])
    rows = [probing.probe_layers(problem, features, k, 0) for k in ([0], [1], [2], [3], [2, 1])]
    score = [row.tasks["t"].accuracy for row in rows]
    assert score[0] == pytest.approx(0.25, abs=0.12)
    assert score[1:3] == pytest.approx([0.5, 0.5], abs=0.12)
    assert min(score[3:]) > 0.97
    assert (rows[4].name, rows[4].layers, rows[4].mean) == ("2+1", [2, 1], score[4])


def test_grid_features_see_where_and_the_mean_does_not() -> None:
    where = np.random.default_rng(2).integers(0, CELLS, TRAIN + TEST)
    features = 0.1 * noise(1)
    features[0, np.arange(len(where)), where, 2] += 5  # a bright cell
    problem = made_up([str(k) for k in where])
    assert probing.probe_layers(problem, features, [0], 0).mean > 0.97
    mean = probing.probe_layers(problem, features.mean(axis=2, keepdims=True), [0], 0).mean
    assert mean == pytest.approx(0.25, abs=0.15)


@pytest.mark.parametrize("factor", [1e-4, 1e4])
def test_the_scale_of_a_channel_does_not_matter(factor: float) -> None:
    x = noise(1)[0, :, 0]
    (task,) = made_up(["yes" if v > 0 else "no" for v in x[:, 0]]).tasks
    plain = probing.classify(task, x[:TRAIN], x[TRAIN:])
    x[:, 0] *= factor
    assert (probing.classify(task, x[:TRAIN], x[TRAIN:]) == plain).all()
    assert plain.mean() > 0.9


def wilson(hits: int, n: int) -> Any:
    z, p = 1.959963984540054, hits / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    ends = [(p + z * z / (2 * n) + sign * half) / (1 + z * z / n) for sign in (-1, 1)]
    return pytest.approx(ends, abs=1e-9)


def test_rare_answers_are_wrong_and_pictures_that_were_not_asked_do_not_count() -> None:
    x = noise(1)[:, :, :1]
    answers: list[Any] = ["yes" if v > 0 else "no" for v in x[0, :, 0, 0]]
    answers[:TRAIN:2], answers[TRAIN : TRAIN + 4] = [None] * 120, ["odd", "odd", None, None]
    cell = probing.probe_layers(made_up(answers, ["no", "yes"]), x, [0], 0).tasks["t"]
    assert cell.hits.startswith("00--")
    ones = cell.hits.count("1")
    assert ones > 80
    assert (cell.accuracy, cell.interval) == (ones / (TEST - 2), wilson(ones, TEST - 2))
    assert probing.wilson_interval(np.zeros(7)) == wilson(0, 7)
    assert probing.wilson_interval(np.ones(150)) == wilson(150, 150)


def reading(hits: str) -> TaskReading:
    """What a probe read that was right at every 1."""
    return TaskReading(hits.count("1") / len(hits), [0.0, 0.9], hits)


def test_bootstrap_equals_loops_over_drawn_pictures() -> None:
    cells = {task: reading(hits) for task, hits in (("a", "1-01101"), ("b", "0110-1-"))}
    expected = []
    for counts in np.random.default_rng(5).multinomial(7, [1 / 7] * 7, size=1000):
        means = []
        for cell in cells.values():
            drawn = "".join(c * n for c, n in zip(cell.hits, counts, strict=True) if c != "-")
            means.append(drawn.count("1") / len(drawn) if drawn else 0)
        expected.append(sum(means) / 2)
    assert probing.bootstrap(cells, ["a", "b"], 5) == pytest.approx(np.array(expected))


def row(layers: list[int], **hits: str) -> ProbedSelection:
    return ProbedSelection(layers, {t: reading(h) for t, h in hits.items()}, 0.0, [0.0, 0.0])


def test_relative_is_to_the_best_single_layer_and_a_task_that_none_reads_is_drawn(
    tmp_path: Path,
) -> None:
    rows = [row([0], t="1000", u="00"), row([1], t="1100", u="00"), row([0, 1], t="1110", u="00")]
    probes = Probes("mean", rows)
    cells = [share for r in rows for share in probes.relative(r).values()]
    assert cells == [0.5, 0, 1, 0, 1.5, 0]
    probing.draw_probe(probes, tmp_path / "figure")


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 12, 27])
def test_default_combinations_fit_every_depth(depth: int, tmp_path: Path) -> None:
    assert all(select(k, depth) for k in probing.default_combinations(depth, tmp_path))


def use(home: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("LAYERFUSE_HOME", str(home))
    patch.setitem(SCENES, "train", 60)
    patch.setitem(SCENES, "test", 30)


def look(home: Path, output: Path, **changes: str) -> dict[str, Any]:
    """Recommend for the tiny encoder; `train` and `test` stand for files of scenes."""
    scenes = {k: f"{home}/scenes/{k}-{n}-0-8-all-v2/conversations.json" for k, n in SCENES.items()}
    given: Any = {"images": f"{home}/images", "recipe": home / "recipe.yaml", "output": output}
    given |= {name: scenes.get(value, value) for name, value in changes.items()}
    file = recommending.recommend(f"{home}/encoder", console=Console(quiet=True), **given)
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder of four blocks, pictures, a recipe, and in `look` a first recommendation."""
    torch.manual_seed(0)
    home = tmp_path_factory.mktemp("home")
    AutoModel.from_config(tiny.vision_config("dinov2")).save_pretrained(home / "encoder")
    tiny.image_processor().save_pretrained(home / "encoder")
    tiny.text_config().save_pretrained(home / "llm")
    (home / "images").mkdir()
    for k, pixels in enumerate(np.random.default_rng(0).integers(0, 255, (6, 6, 5, 3), np.uint8)):
        Image.fromarray(pixels).resize((40, 36)).save(home / "images" / f"{k}.png")
    recipe = {**GOOD, "encoder": "./encoder", "llm": "./llm", "baseline": "both"}
    (home / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.MonkeyPatch.context() as patch:
        use(home, patch)
        look(home, home / "look")
    return home


@pytest.fixture
def home(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    use(made, monkeypatch)
    return made


@pytest.mark.parametrize("grid", [1, 2, 3, 4])
def test_pooled_cells_average_to_the_mean_patch_token(home: Path, grid: int) -> None:
    encoder, processor = (f(str(home / "encoder")) for f in (load_encoder, load_image_processor))
    pictures = [Picture(str(p)) for p in sorted((home / "images").iterdir())]
    found = probing.pooled(encoder, processor, pictures, grid=grid, batch_size=4)
    pixels = processor([p.open() for p in pictures], return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        maps = torch.stack(encoder(pixels).patches).unflatten(2, (4, 4)).numpy()
    assert found.shape[2] == 1 + grid**2
    assert found[:, :, 0] == pytest.approx(maps.mean((2, 3)), abs=2e-3)
    if grid == 2:
        assert found[:, :, 2] == pytest.approx(maps[:, :, :2, 2:].mean((2, 3)), abs=2e-3)


def test_probe_writes_what_it_measured(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, folder = str(home / "encoder"), tmp_path / "look"
    command = ["probe", encoder, "--tasks", "colour,count", "--layers", "1,3", "--grid", "2"]
    found = CliRunner().invoke(app, [*command, "--output", str(folder)])
    assert found.exit_code == 0, found.output
    report = json.loads((folder / "probe.json").read_text())
    assert list(report["tasks"]) == ["colour", "count"]
    assert report["mean"] != report["grid"]
    for kind in probing.FEATURES:
        assert [r["name"] for r in report[kind]] == ["0", "1", "2", "3", "4", "1+3"]
        assert all((folder / f"probe-{kind}{end}").exists() for end in (".png", ".svg"))
        for cell in (cell for r in report[kind] for cell in r["tasks"].values()):
            ones = cell["hits"].count("1")
            assert (len(cell["hits"]), cell["accuracy"]) == (30, ones / 30)
            assert cell["interval"] == wilson(ones, 30)
    with pytest.raises(LayerfuseError, match="no task"):
        probing.probe(encoder, tasks="tint", output=tmp_path / "none")
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(LayerfuseError, match=r"pip install 'layerfuse\[look\]'"):
        probing.probe(encoder, output=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_recommended_arms_are_the_first_of_the_ranking(home: Path, tmp_path: Path) -> None:
    ranking = json.loads((home / "look" / "recommend.json").read_text())["ranking"]
    scores = [row["score"] for row in ranking]
    assert scores == sorted(scores, reverse=True)
    assert (ranking[0]["behind"], ranking[0]["tie"]) == ([0, 0], True)
    assert {len(row["layers"]) for row in ranking} == {1, 2, 3, 4}
    recipe = load_recipe(home / "look" / "recommended.yaml")
    assert [arm.layers for arm in recipe.all_arms()] == [row["layers"] for row in ranking[:6]]
    assert Path(recipe.llm.model).resolve() == home / "llm"
    check_arms(recipe)
    grid = {"grid": {"layers": [ranking[0]["layers"], "all"], "fusion": [{"name": "concat"}]}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({**GOOD, **grid}))
    report = Recommendation("some/encoder", [], [RankedSelection(**ranking[0])])
    recommending.write_recommendation(tmp_path, report, tmp_path / "r.yaml", Console(quiet=True))
    assert len(load_recipe(tmp_path / "recommended.yaml").all_arms()) == 1  # none of the grid


@pytest.mark.parametrize(
    ("earlier", "now", "measured"),
    [
        ({}, {}, ""),
        ({}, {"tasks": "count"}, ""),
        ({}, {"images": "test"}, "similarity"),
        ({}, {"data": "train"}, "probe"),
        ({"tasks": "count"}, {}, "probe"),
        ({"data": "train", "test": "test"}, {"data": "train"}, "probe"),
    ],
)
def test_measurements_are_used_where_they_fit_and_made_where_not(
    earlier: Any, now: Any, measured: str, home: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    folder = Path(shutil.copytree(home / "look", tmp_path / "look"))
    if earlier:
        (folder / "probe.json").unlink()
        look(home, folder, **earlier)
    for name in ("similarity", "probe"):
        monkeypatch.setattr(recommending, name, lambda *_, name=name, **__: pytest.fail(name))
    if measured:
        with pytest.raises(pytest.fail.Exception, match=measured):
            look(home, folder, **now)
    else:
        assert len(look(home, folder, **now)["tasks"]) == (1 if now else 7)


def test_probes_of_another_grid_are_made_again(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(home / "look", tmp_path / "look"))
    report = json.loads((folder / "probe.json").read_text())
    (folder / "probe.json").write_text(json.dumps({**report, "grid_side": 2}))
    monkeypatch.setattr(recommending, "probe", lambda *_, **__: pytest.fail("probe"))
    with pytest.raises(pytest.fail.Exception, match="probe"):
        look(home, folder)


def test_only_a_clear_difference_is_no_tie() -> None:
    first, close, worse = "1" * 90 + "0" * 10, "0" * 6 + "1" * 84 + "01" * 5, "01" * 50
    rows = [row([3], t=worse), row([1, 2], t=first), row([2], t=close), row([1], t=first)]
    found = recommending.rank(
        Probes("mean", rows),
        [[1], [2], [3], [1, 2]],
        ["t"],
        scores=LayerScores(1, np.array([0.0, 0.1, 0.2, 0.3]), np.arange(4.0)),
        groups=[[1, 2], [3]],
        seed=0,
    )
    assert [(r.layers, r.tie, r.best_on) for r in found] == [
        ([1], True, ["t"]),
        ([1, 2], True, ["t"]),
        ([2], True, []),
        ([3], False, []),
    ]
    assert found[3].behind == pytest.approx([-0.52 / 0.9, -0.28 / 0.9], abs=0.04)
    assert (found[2].groups, found[2].entropy) == ([[1, 2]], [0.2])


def ranks(values: list[float]) -> list[float]:
    return [np.mean([k for k, v in enumerate(sorted(values)) if v == x]).item() for x in values]


def test_rank_correlation_with_its_interval() -> None:
    found: Any = rank_correlation([0, 1, 2, 3, 4], [1, 0, 3, 2, 4])
    assert vars(found) == {  # 1 - 6 · 4 / (5 · 24); tanh(atanh 0.8 ± 1.96 √((1 + 0.32) / 2))
        "rho": pytest.approx(0.8),
        "interval": pytest.approx([-0.45716, 0.99084], abs=1e-4),
        "n": 5,
    }
    x, y = [1, 1, 2, 3, 3, 3, 5.0], [4, 2, 2, 6, 7, 6, 1.0]
    tied: Any = rank_correlation(x, y)
    assert tied.rho == pytest.approx(np.corrcoef(ranks(x), ranks(y))[0, 1])
    for sign in (1, -1):
        one: Any = rank_correlation([1, 2, 3, 4], [2 * sign, 3 * sign, 5 * sign, 9 * sign])
        assert one.rho == pytest.approx(sign)
        assert all(0 < abs(end) < 1 for end in one.interval)
    assert rank_correlation([1, 2, 3], [1, 2, 3]) is None
    assert rank_correlation([1, 2, 3, 4], [5, 5, 5, 5]) is None


RISING = [0.1, 0.2, 0.4, 0.5, 0.8, 0.9]
CHEAP = LayerScores(1, np.arange(6) / 9, 9.0 - np.arange(6))
ROWS = [row([k], t="1" * k + "0" * (6 - k)) for k in range(6)]
PROBED: Any = {"mean": Probes("mean", ROWS), "grid": Probes("grid", ROWS), "tasks": ["t", "u"]}


def trained(folder: Path, *seeds: list[float], family: str = "t", layers: str = "012345") -> Path:
    """A study's folder: the accuracy of an arm per layer, for each seed."""
    records = []
    for seed, values in enumerate(seeds):
        for k, (layer, accuracy) in enumerate(zip(layers, values, strict=False)):
            scores = RunScores(accuracy, {family: accuracy}, {})
            records.append(run_record(f"{k}", seed, layers=(int(layer),), scores=scores))
    write_records(folder / "results.jsonl", records)
    return folder


@pytest.mark.parametrize("sign", [1, -1])
def test_criteria_that_order_the_arms_as_training_does(sign: int, tmp_path: Path) -> None:
    rising = RISING[::sign]
    report = validate(trained(tmp_path, rising), CHEAP, **PROBED)
    for scope in report.correlations.values():
        rho = {name: cell and round(cell.rho, 9) for name, cell in scope.items()}
        assert (rho.pop("intrinsic dimension"), rho.pop("number of layers")) == (-sign, None)
        names = ("probes, mean tokens", "probes, grid", "matrix entropy", "depth")
        assert rho == dict.fromkeys(names, sign)
    assert (report.families, report.between_seeds) == (["t"], None)
    assert vars(report.within_families["t"])["rho"] == pytest.approx(sign)
    again = validate(trained(tmp_path, RISING, rising), CHEAP, **PROBED)
    assert again.between_seeds == pytest.approx(sign)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "012"}, "holds 3 selections"),
        ({"layers": "012012"}, r"arms '0' and '3' of .* share \(0,\)"),
        ({"family": "v"}, r"no family of .* was probed; probed: \['t', 'u'\]"),
        ({"layers": "012349"}, "9"),  # a deeper encoder's
    ],
)
def test_studies_that_do_not_fit(options: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(LayerfuseError, match=message):
        validate(trained(tmp_path, RISING, **options), CHEAP, **PROBED)


def first_pictures(problem: Problem, train: int, test: int) -> Problem:
    """The same tasks over the first training and test pictures."""
    tasks = []
    for task in problem.tasks:
        tasks.append(replace(task, train=task.train[:train], test=task.test[:test]))
    return Problem(problem.train[:train], problem.test[:test], tasks, problem.left_out)


@pytest.mark.real
@pytest.mark.usefixtures("local_models")
def test_depth_profile_of_a_real_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """dinov2-small: pattern and colour early, shape and place in the middle, letters late."""
    monkeypatch.setitem(SCENES, "train", 240)
    monkeypatch.setitem(SCENES, "test", 120)
    # Two thirds of these scenes are enough to see it
    problem = first_pictures(find_tasks(None, None), train=160, test=80)
    # On a busy machine threads wait for each other
    torch.set_num_threads(1)
    # Where bfloat16 is emulated it takes minutes
    encoder = load_encoder("dinov2-small", DTYPES[native_dtype()])
    processor = load_image_processor("dinov2-small")
    # 12 x 12 patches cost half of 16 x 16 and have the same profile
    processor.size = {"shortest_edge": 192}
    processor.crop_size = {"height": 168, "width": 168}
    pictures = [*problem.train, *problem.test]
    features = probing.pooled(encoder, processor, pictures, grid=1, batch_size=8)
    layers = [[layer] for layer in range(13)]
    rows = probing.probe_selections(problem, features, "mean", layers, seed=0).selections
    score = {}
    for task in problem.tasks:
        accuracies = [row.tasks[task.name].accuracy for row in rows]
        score[task.name] = np.array(accuracies)
    best = {name: values.max() for name, values in score.items()}
    assert score["texture"][0] < 0.5 < 0.95 <= score["texture"][2]
    assert score["colour"][1:7].max() > max(best["colour"] - 0.03, score["colour"][12] + 0.06)
    for task in ("position", "shape"):
        assert score[task][[8, 9]].min() > score[task][[2, 4]].max() + 0.15
    assert score["position"][12] < best["position"] - 0.04
    assert score["letter"][9:].max() > score["letter"][:9].max() + 0.06
    assert score["count"][4:11].max() > max(best["count"] - 0.04, score["count"][0] + 0.1)
    assert score["detail"][7:12].max() > score["detail"][[*range(7), 12]].max() + 0.05
