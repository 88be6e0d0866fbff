"""The main job, end to end: on real local models, with every strategy, with and without cache."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock
from PIL import Image

from layerfuse.data.feature_store import digests_of
from layerfuse.fusion import FUSIONS
from layerfuse.recipe.reader import load_recipe
from layerfuse.study.check import leave_out, load_checked
from layerfuse.study.coordinate import study
from layerfuse.study.encode import (
    encode_pictures,
    pictures_of,
    read_features,
    write_features,
)
from tests.studies import (
    ask,
    ask_several_questions,
    cut_in_half,
    one_line,
    read_lines,
    read_results,
    run_study,
    save_sentence_encoder,
    times_of_results,
    write_recipe,
)

QUICKSTART = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
# The quickstart with two arms, a few steps and a few pictures.
SHRUNK = (
    "arms=[{name: last, layers: [12], fusion: {name: single}},"
    " {name: inject, layers: [4], fusion: {name: inject_add, base: 8}}]",
    "baseline=last",
    "seeds=[0]",
    "stages.finetune.data.scenes.count=16",
    "stages.finetune.steps=3",
    "stages.finetune.batch_size=4",
    "evaluate.data.scenes.count=8",
    "evaluate.validation.scenes.count=2",
)
# Each scene has a question of each of its five families.
QUESTIONS = 8 * 5
# 20 s on a quiet machine
LIMIT_SECONDS = 240


def check_quickstart_run(folder: Path, result: dict[str, Any]) -> None:
    """Check that the scores are those of the answers, and that training has learned."""
    answers = read_lines(folder / result["folder"] / "predictions.jsonl")
    ids = {answer["id"] for answer in answers}
    assert len(ids) == len(answers) == QUESTIONS

    scores = result["scores"]
    for shares in (scores["categories"], scores["families"]):
        assert all(0 <= share <= 1 for share in shares.values())
    # A mean of zero may only come from answers that are all wrong.
    points = sum(answer["score"] for answer in answers)
    assert (points == 0) == (scores["mean"] == 0)

    losses = dict(result["losses"]["finetune"])
    assert losses[3] < losses[1]


@pytest.mark.real
@pytest.mark.usefixtures("local_models")
def test_a_shrunken_quickstart_on_real_models(tmp_path: Path) -> None:
    started = time.perf_counter()
    folder = tmp_path / "study"

    report = study(QUICKSTART, SHRUNK, output=folder)

    results = read_results(folder)
    runs = [(result["arm"], result["layers"], result["kind"]) for result in results]
    assert runs == [
        ("last", [12], "baseline"),
        ("inject", [4], "internal direct"),
    ]
    for result in results:
        check_quickstart_run(folder, result)

    # The quickstart keeps the model of the best run alone, and no checkpoint of a finished one.
    models = list(folder.glob("arms/*/model"))
    assert len(models) == 1
    assert not list(folder.glob("arms/*/stages"))
    # Beside the arms: what guessing gives, what seeds do, and pictures inside of the page.
    html = report.read_text()
    for text in ("last", "inject", "chance", "seed", "data:image/png;base64"):
        assert text in html
    resolved = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert [arm["name"] for arm in resolved["arms"]] == ["last", "inject"]
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["torch"]

    # A second call finds all runs done: it writes the same report, and trains nothing.
    before = times_of_results(folder)
    again = study(QUICKSTART, SHRUNK, output=folder)
    assert times_of_results(folder) == before
    assert again.read_text() == html

    # Answers name the files of their pictures; those of drawn scenes are kept for this.
    first_answer = read_lines(folder / results[0]["folder"] / "predictions.jsonl")[0]
    asked = ask(models[0], first_answer["image"], "How many?")
    assert asked.exit_code == 0, asked.output
    assert time.perf_counter() - started < LIMIT_SECONDS


def test_two_commands_do_not_share_a_folder(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Two would write each other's results; the second one may have the folder after the first."""
    path = write_recipe(tmp_path, recipe)
    folder = tmp_path / "study"
    folder.mkdir()

    # As a command holds it that runs in another terminal.
    with FileLock(folder / ".lock"):
        refused = run_study(path, folder)

    assert refused.exit_code == 2
    assert "another process is running a study" in one_line(refused)
    study(path, output=folder)


def arms_of_all_strategies(sentence_encoder: Path) -> list[dict[str, Any]]:
    """One arm a strategy, with its example layers of an encoder of four blocks."""
    arms = []
    for name, (_, strategy) in FUSIONS.items():
        fusion: dict[str, Any] = {"name": name}
        if strategy.reads == "sentence":
            fusion["sentence_encoder"] = str(sentence_encoder)
            fusion["sentence_width"] = 16
        arms.append({"name": name, "layers": strategy.example(4), "fusion": fusion})
    return arms


def test_every_strategy_runs_in_one_study(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Trained in two stages, tested, saved and loaded; guided arms with their controls."""
    save_sentence_encoder(tmp_path / "sentences")
    recipe["arms"] = arms_of_all_strategies(tmp_path / "sentences")
    stage = recipe["stages"]["align"]
    rates = {"fusion": 1e-3, "llm": 1e-3}
    recipe["stages"] = {
        "align": {**stage, "prompt": "plain"},
        "finetune": {**stage, "learning_rates": rates},
    }
    recipe["keep_models"] = "all"
    ask_several_questions(tmp_path)
    folder = tmp_path / "study"

    page = study(write_recipe(tmp_path, recipe), output=folder).read_text()

    guided = []
    for name, (_, strategy) in FUSIONS.items():
        if strategy.reads != "nothing":
            guided.append(name)
    results = read_results(folder)
    assert [result["arm"] for result in results] == list(FUSIONS)
    for result in results:
        run = folder / result["folder"]
        answers = read_lines(run / "predictions.jsonl")
        # Only what has a guidance can be asked without it.
        is_guided = result["arm"] in guided
        assert all(("controls" in answer) == is_guided for answer in answers)
        asked = ask(run / "model", answers[0]["image"], "n?")
        assert asked.exit_code == 0, asked.output

    summary = json.loads((folder / "summary.json").read_text())
    compared = [(row["arm"], row["control"]) for row in summary["guidance"]]
    expected = []
    for name in guided:
        expected += [(name, "shuffled"), (name, "mean")]
    assert compared == expected
    assert "Does the guidance matter?" in page


def test_cached_and_uncached_features_give_the_same_results(
    recipe: dict[str, Any],
    tmp_path: Path,
) -> None:
    study(write_recipe(tmp_path, recipe), output=tmp_path / "cached")
    recipe["cache_features"] = False
    study(write_recipe(tmp_path, recipe), output=tmp_path / "direct")

    cached_results = read_results(tmp_path / "cached")
    direct_results = read_results(tmp_path / "direct")
    for cached, direct in zip(cached_results, direct_results, strict=True):
        curves = zip(cached["losses"]["align"], direct["losses"]["align"], strict=True)
        # The cache encodes in batches of another size, which rounds otherwise.
        for (_, cached_loss), (_, direct_loss) in curves:
            assert cached_loss == pytest.approx(direct_loss, abs=1e-5)


def test_another_process_reads_the_same_features(recipe: dict[str, Any], tmp_path: Path) -> None:
    """From what JSON tells it, behind a picture that is left out, also where it must repair."""
    bad_picture = tmp_path / "2.png"
    # Noise makes a large file, of which half still opens: only decoding its pixels fails.
    Image.effect_noise((40, 30), 60).convert("RGB").save(bad_picture)
    cut_in_half(bad_picture)
    recipe["on_bad_sample"] = "skip"
    loaded = load_recipe(write_recipe(tmp_path, recipe))
    samples = load_checked(loaded).usable
    digests = digests_of(pictures_of([samples.test]))
    store, unreadable = encode_pictures(loaded, samples, digests)
    assert store is not None
    usable = leave_out(loaded, samples, unreadable)
    write_features(tmp_path, usable, store)
    pictures = list(pictures_of([usable.test]))
    assert len(pictures) == 7
    expected = store.features(pictures)

    digest, other = read_features(tmp_path, loaded, usable)

    assert digest == usable.digest({})
    assert other is not None
    assert other.bad.keys() == store.bad.keys() == {str(bad_picture)}
    for damaged in (False, True):
        if damaged:
            # The last byte of a file belongs to a feature; its checksum no longer fits.
            for file in (tmp_path / "home").rglob("*.safetensors"):
                file.write_bytes(file.read_bytes()[:-1] + b"?")
            _, other = read_features(tmp_path, loaded, usable)
            assert other is not None
        features = other.features(pictures)
        assert features.layers == expected.layers
        assert features.grid == expected.grid
        tensors = features.patches + features.summary
        expected_tensors = expected.patches + expected.summary
        for tensor, expected_tensor in zip(tensors, expected_tensors, strict=True):
            assert torch.equal(tensor, expected_tensor)


def test_features_that_nothing_reads_are_not_handed_on(
    recipe: dict[str, Any],
    tmp_path: Path,
) -> None:
    """The file still holds the digest by which another process knows the samples."""
    recipe["cache_features"] = False
    loaded = load_recipe(write_recipe(tmp_path, recipe))
    samples = load_checked(loaded).usable

    write_features(tmp_path, samples, None)

    assert read_features(tmp_path, loaded, samples) == (samples.digest({}), None)
