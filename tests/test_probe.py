"""Probes of layers: numbers on made-up features, the verb on a tiny encoder, a real profile."""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from layerfuse.errors import LayerfuseError
from layerfuse.hardware import DTYPES, native_dtype
from layerfuse.look import probe as probing
from layerfuse.look.figures import draw_probe
from layerfuse.look.pictures import find_pictures
from layerfuse.look.probe_report import Probes
from layerfuse.look.tasks import SCENES, Problem, Task, find_tasks
from layerfuse.model.pretrained import load_image_processor
from layerfuse.vision.encoder import load_encoder
from layerfuse.vision.picture import Picture
from layerfuse.vision.selection import select
from layerfuse_cli.app import app
from tests.small_look import (
    probed,
    reading,
    save_encoder_and_pictures,
    use_few_scenes,
)

TRAIN = 240
"""Made-up training pictures."""
TEST = 100
"""Made-up test pictures."""
CELLS = 4
"""Cells of made-up features."""


def made_up_problem(
    answers: Sequence[str | None],
    classes: list[str] | None = None,
) -> Problem:
    """One task, `t`, with an answer for each training and then each test picture."""
    if classes is None:
        classes = sorted({str(answer) for answer in answers})
    task = Task(
        "t",
        train=list(answers[:TRAIN]),
        test=list(answers[TRAIN:]),
        classes=classes,
    )
    return Problem(
        train=[Picture("")] * TRAIN,
        test=[Picture("")] * TEST,
        tasks=[task],
        left_out={},
    )


def noise(layers: int) -> np.ndarray:
    """Features (layers, pictures, cells, 3) that hold no answer."""
    random = np.random.default_rng(0)
    features = random.normal(size=(layers, TRAIN + TEST, CELLS, 3))
    return features.astype(np.float32)


def yes_or_no(values: np.ndarray) -> list[str]:
    """Whether each value is positive."""
    return np.where(values > 0, "yes", "no").tolist()


def wilson(hits: int, n: int) -> list[float]:
    """Wilson's 95 % interval of hits / n, as the textbooks write it."""
    z = 1.959963984540054
    share = hits / n
    centre = share + z**2 / (2 * n)
    variance = share * (1 - share) / n + z**2 / (4 * n**2)
    half = z * math.sqrt(variance)
    scale = 1 + z**2 / n
    return [(centre - half) / scale, (centre + half) / scale]


def test_a_layer_that_holds_the_answer_is_read_and_noise_is_not() -> None:
    """Two bits are four answers: layer 1 holds one, layer 2 the other, layer 3 both, 0 none."""
    random = np.random.default_rng(1)
    bits = random.integers(0, 2, (TRAIN + TEST, 2))
    features = 0.1 * noise(4)
    bits_of_layers = {1: [0], 2: [1], 3: [0, 1]}
    for layer, bits_held in bits_of_layers.items():
        # Each bit moves one channel of one cell
        features[layer, :, 2, bits_held] += bits[:, bits_held].T
    problem = made_up_problem([f"{first}{second}" for first, second in bits])

    selections = []
    for layers in ([0], [1], [2], [3], [2, 1]):
        selections.append(probing.probe_layers(problem, features, layers, seed=0))

    # Layers 0 to 3, and two of them side by side
    none, first_bit, second_bit, both, combined = [
        selection.tasks["t"].accuracy for selection in selections
    ]
    assert none == pytest.approx(0.25, abs=0.12)
    # Half of the answers are left, and one of two is right by chance
    assert first_bit == pytest.approx(0.5, abs=0.12)
    assert second_bit == pytest.approx(0.5, abs=0.12)
    assert both > 0.97
    assert combined > 0.97
    assert selections[4].name == "2+1"
    assert selections[4].layers == [2, 1]
    assert selections[4].mean == combined


def test_grid_features_see_where_and_the_mean_does_not() -> None:
    random = np.random.default_rng(2)
    bright_cells = random.integers(0, CELLS, TRAIN + TEST)
    features = 0.1 * noise(1)
    features[0, np.arange(TRAIN + TEST), bright_cells, 2] += 5
    problem = made_up_problem([str(cell) for cell in bright_cells])
    averaged = features.mean(axis=2, keepdims=True)

    by_cell = probing.probe_layers(problem, features, [0], seed=0)
    by_mean = probing.probe_layers(problem, averaged, [0], seed=0)

    assert by_cell.mean > 0.97
    assert by_mean.mean == pytest.approx(0.25, abs=0.15)


def classify(task: Task, features: np.ndarray) -> np.ndarray:
    """Which test answers are right, given the features (pictures, D) of all pictures."""
    return probing.classify(task, features[:TRAIN], features[TRAIN:])


@pytest.mark.parametrize("factor", [1e-4, 1e4])
def test_the_scale_of_a_channel_does_not_matter(factor: float) -> None:
    """Channels of encoders differ by thousands; a penalty on raw ones would drop the small."""
    features = noise(1)[0, :, 0]
    (task,) = made_up_problem(yes_or_no(features[:, 0])).tasks
    scaled = features.copy()
    scaled[:, 0] *= factor

    plain_hits = classify(task, features)
    scaled_hits = classify(task, scaled)

    assert (scaled_hits == plain_hits).all()
    assert plain_hits.mean() > 0.9


def test_rare_answers_are_wrong_and_pictures_that_were_not_asked_do_not_count() -> None:
    features = noise(1)[:, :, :1]
    channel = features[0, :, 0, 0]
    answers: list[str | None] = list(yes_or_no(channel))
    # Every other training picture has no question
    for k in range(0, TRAIN, 2):
        answers[k] = None
    answers[TRAIN : TRAIN + 4] = ["odd", "odd", None, None]
    problem = made_up_problem(answers, classes=["no", "yes"])

    selection = probing.probe_layers(problem, features, [0], seed=0)

    read = selection.tasks["t"]
    assert read.hits.startswith("00--")
    right = read.hits.count("1")
    assert right > 80
    assert read.accuracy == right / (TEST - 2)
    interval = wilson(right, TEST - 2)
    assert read.interval == pytest.approx(interval, abs=1e-9)


def test_the_interval_is_wilsons_at_its_ends_too() -> None:
    none_of_seven = probing.wilson_interval(np.zeros(7))
    all_of_150 = probing.wilson_interval(np.ones(150))

    assert none_of_seven == pytest.approx(wilson(0, 7), abs=1e-9)
    assert all_of_150 == pytest.approx(wilson(150, 150), abs=1e-9)


def accuracy_of_draw(hits: str, counts: np.ndarray) -> float:
    """The share of right answers among pictures that were drawn `counts` times."""
    right = 0
    asked = 0
    for hit, count in zip(hits, counts, strict=True):
        if hit == "-":
            continue
        asked += count
        if hit == "1":
            right += count
    if asked == 0:
        return 0
    return right / asked


def test_bootstrap_equals_loops_over_drawn_pictures() -> None:
    first = "1-01101"
    second = "0110-1-"
    random = np.random.default_rng(5)
    expected = []
    draws_of_pictures = random.multinomial(7, [1 / 7] * 7, size=1000)
    for counts in draws_of_pictures:
        # Both tasks are asked about the same drawn pictures
        total = accuracy_of_draw(first, counts) + accuracy_of_draw(second, counts)
        expected.append(total / 2)

    readings = {"a": reading(first), "b": reading(second)}
    draws = probing.bootstrap(readings, ["a", "b"], seed=5)

    assert draws == pytest.approx(np.array(expected))


def test_relative_is_to_the_best_single_layer_and_a_task_that_none_reads_is_drawn(
    tmp_path: Path,
) -> None:
    probes = Probes(
        "mean",
        [
            probed([0], t="1000", u="00"),
            probed([1], t="1100", u="00"),
            probed([0, 1], t="1110", u="00"),
        ],
    )

    relative_t = []
    relative_u = []
    for selection in probes.selections:
        relative = probes.relative(selection)
        relative_t.append(relative["t"])
        relative_u.append(relative["u"])
    # A combination may exceed the best single layer
    assert relative_t == [0.5, 1, 1.5]
    assert relative_u == [0, 0, 0]
    draw_probe(probes, tmp_path / "figure")


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 12, 27])
def test_default_combinations_fit_every_depth(depth: int, tmp_path: Path) -> None:
    for spec in probing.default_combinations(depth, tmp_path):
        assert select(spec, depth)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny encoder and pictures."""
    folder = tmp_path_factory.mktemp("home")
    save_encoder_and_pictures(folder)
    return folder


@pytest.fixture
def home(saved: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same folder, where few scenes are drawn if no data is given."""
    use_few_scenes(saved, monkeypatch)
    return saved


@pytest.mark.parametrize("grid", [1, 2, 3, 4])
def test_pooled_cells_average_to_the_mean_patch_token(home: Path, grid: int) -> None:
    encoder = load_encoder(str(home / "encoder"))
    processor = load_image_processor(str(home / "encoder"))
    pictures = find_pictures(str(home / "images"))

    pooled = probing.pooled(encoder, processor, pictures, grid=grid, batch_size=4)

    images = [picture.open() for picture in pictures]
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        patches = torch.stack(encoder(pixels).patches)
    # (L, pictures, 16, D) -> (L, pictures, rows, columns, D)
    maps = patches.unflatten(2, (4, 4)).numpy()
    assert pooled.shape[2] == 1 + grid**2
    # Float16 has three digits
    mean = maps.mean((2, 3))
    assert pooled[:, :, 0] == pytest.approx(mean, abs=2e-3)
    if grid == 2:
        # Cells go row by row: the second is at the top right
        top_right = maps[:, :, :2, 2:].mean((2, 3))
        assert pooled[:, :, 2] == pytest.approx(top_right, abs=2e-3)


def test_probe_writes_what_it_measured(home: Path, tmp_path: Path) -> None:
    encoder = str(home / "encoder")
    folder = tmp_path / "look"

    ended = CliRunner().invoke(
        app,
        [
            "probe",
            encoder,
            "--tasks",
            "colour,count",
            "--layers",
            "1,3",
            "--grid",
            "2",
            "--output",
            str(folder),
        ],
    )

    assert ended.exit_code == 0, ended.output
    report = json.loads((folder / "probe.json").read_text())
    assert list(report["tasks"]) == ["colour", "count"]
    # Else one kind of features was probed twice
    assert report["mean"] != report["grid"]
    for kind in probing.FEATURES:
        names = [row["name"] for row in report[kind]]
        assert names == ["0", "1", "2", "3", "4", "1+3"]
        assert (folder / f"probe-{kind}.png").exists()
        assert (folder / f"probe-{kind}.svg").exists()
        for row in report[kind]:
            for cell in row["tasks"].values():
                right = cell["hits"].count("1")
                assert len(cell["hits"]) == 30
                assert cell["accuracy"] == right / 30
                interval = wilson(right, 30)
                assert cell["interval"] == pytest.approx(interval, abs=1e-9)


def test_a_probe_of_an_unknown_task_writes_nothing(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "none"

    with pytest.raises(LayerfuseError, match="no task"):
        probing.probe(str(home / "encoder"), tasks="tint", output=folder)

    assert not folder.exists()


def test_a_probe_without_scikit_learn_says_how_to_install_it(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "none"
    monkeypatch.setitem(sys.modules, "sklearn", None)

    with pytest.raises(LayerfuseError, match=r"pip install 'layerfuse\[look\]'"):
        probing.probe(str(home / "encoder"), output=folder)

    assert not folder.exists()


def first_pictures(problem: Problem, train: int, test: int) -> Problem:
    """The same tasks over the first training and test pictures."""
    tasks = []
    for task in problem.tasks:
        train_answers = task.train[:train]
        test_answers = task.test[:test]
        tasks.append(replace(task, train=train_answers, test=test_answers))
    return Problem(
        train=problem.train[:train],
        test=problem.test[:test],
        tasks=tasks,
        left_out=problem.left_out,
    )


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
    probes = probing.probe_selections(problem, features, "mean", layers, seed=0)

    score = {}
    best = {}
    for task in problem.tasks:
        accuracies = []
        for selection in probes.selections:
            accuracies.append(selection.tasks[task.name].accuracy)
        score[task.name] = np.array(accuracies)
        best[task.name] = max(accuracies)

    # The embedding of patches reads no pattern, two blocks do
    texture = score["texture"]
    assert texture[0] < 0.5 < 0.95 <= texture[2]

    # Colour is there early and partly lost at the end
    colour = score["colour"]
    assert colour[1:7].max() > best["colour"] - 0.03
    assert colour[1:7].max() > colour[12] + 0.06

    # What is where, and of which shape, is read best after two thirds of the depth
    for task in ("position", "shape"):
        late = score[task][[8, 9]]
        early = score[task][[2, 4]]
        assert late.min() > early.max() + 0.15
    assert score["position"][12] < best["position"] - 0.04

    # Letters come last
    letter = score["letter"]
    assert letter[9:].max() > letter[:9].max() + 0.06

    # The middle counts nearly as well as the best layer
    count = score["count"]
    assert count[4:11].max() > best["count"] - 0.04
    assert count[4:11].max() > count[0] + 0.1

    detail = score["detail"]
    early_or_last = [*range(7), 12]
    assert detail[7:12].max() > detail[early_or_last].max() + 0.05
