"""`layerfuse guidance`: how the weights of a guided model vary, what they say about the kind of a
question, and what becomes of the answers without the guidance."""

import json
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from layerfuse.data.sample import Sample
from layerfuse.data.scenes import FAMILIES
from layerfuse.data.scenes import sample as draw_scenes
from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.answer import Answerer
from layerfuse.evaluate.evaluation import data_of, evaluate
from layerfuse.evaluate.predict import shuffled
from layerfuse.evaluate.questions import Question
from layerfuse.evaluate.significance import ArmScore, JudgedContrast
from layerfuse.explain.guidance import guidance
from layerfuse.explain.guidance_figures import weight_maps
from layerfuse.explain.guidance_measures import crossed_spread, kind_information
from layerfuse.explain.guidance_report import (
    ControlEffect,
    CrossedSpread,
    GuidanceReport,
    KindInformation,
    KindWeights,
)
from layerfuse.explain.guidance_words import guidance_sentences
from layerfuse.explain.redraw import redraw
from layerfuse.recipe.evaluate_settings import Evaluation
from layerfuse.vision.picture import Picture
from layerfuse_cli.app import app
from tests import tiny
from tests.made_up_benchmarks import write_picture
from tests.studies import read_lines

QUIET = Console(quiet=True)
WORDS = {
    "General": ("What colour?", "What is shown?", "Which thing?"),
    "Chart&OCR": ("Which letter?", "What does it say?", "Read the card."),
}
PICTURES = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random model that is guided by the question, and markedly so."""
    vlm = tiny.model("text_routed", seed=1)
    with torch.no_grad():
        for parameter in vlm.fusion.get_submodule("router").parameters():
            parameter.mul_(12)
    folder = tmp_path_factory.mktemp("models") / "model"
    vlm.save_pretrained(folder)
    tiny.processor(vlm).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures with a question of each of two categories in each of three wordings."""
    folder = tmp_path_factory.mktemp("data")
    records: list[dict[str, Any]] = []
    for number in range(PICTURES):
        write_picture(folder / f"{number}.png", 60 * number)
        turns: list[dict[str, str]] = []
        categories: list[str] = []
        for category, wordings in WORDS.items():
            for words in wordings:
                marker = "<image>\n" if not turns else ""
                turns.append({"from": "human", "value": f"{marker}{words}"})
                turns.append({"from": "gpt", "value": f"answer {number}"})
                categories.append(category)
        records.append(
            {
                "id": str(number),
                "image": f"{number}.png",
                "conversations": turns,
                "categories": categories,
            }
        )
    file = folder / "mine.json"
    file.write_text(json.dumps(records))
    return file


def evaluation_of(data: Path) -> Evaluation:
    return Evaluation(data=data_of(str(data), "test"), batch_size=5, max_new_tokens=3)


@pytest.fixture(scope="module")
def measured(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished analysis."""
    folder = tmp_path_factory.mktemp("out")
    guidance(model, evaluation_of(data), output=folder, resamples=200, console=QUIET)
    return folder


def report_in(folder: Path) -> GuidanceReport:
    return GuidanceReport.from_json(json.loads((folder / "guidance.json").read_text()))


# What weights say about the kind of a question


def naive_bits(bins: list[int], kinds: list[str]) -> float:
    """Σ p(b, k) log2 (p(b, k) / p(b) p(k)) over what comes up."""
    count = len(bins)
    total = 0.0
    for (number, kind), together in Counter(zip(bins, kinds, strict=True)).items():
        apart = bins.count(number) * kinds.count(kind) / count
        total += together / count * math.log2(together / apart)
    return total


def test_information_is_the_plug_in_estimate() -> None:
    rng = np.random.default_rng(3)
    weights = rng.dirichlet([1, 1, 1, 1], size=60)
    kinds = [str(kind) for kind in rng.integers(3, size=60)]

    most_weighted, _ = kind_information(weights, kinds, range(60))

    assert most_weighted.bits == pytest.approx(
        naive_bits(weights.argmax(axis=1).tolist(), kinds), abs=1e-6
    )
    assert most_weighted.bins == 4
    expected = -sum(c / 60 * math.log2(c / 60) for c in Counter(kinds).values())
    assert most_weighted.entropy == pytest.approx(expected, abs=1e-6)


def test_weights_that_follow_the_kind_say_all_of_it() -> None:
    of_kind = {"a": [0.7, 0.2, 0.1], "b": [0.6, 0.1, 0.3], "c": [0.2, 0.7, 0.1]}
    kinds = list(of_kind) * 20
    weights = np.array([of_kind[kind] for kind in kinds])

    most_weighted, clusters = kind_information(weights, kinds, range(60))

    assert clusters.bits == pytest.approx(math.log2(3), abs=1e-6)
    assert clusters.is_more_than_shuffled
    # `a` and `b` weigh the same layer most
    assert most_weighted.bits < clusters.bits


def test_the_bias_of_a_small_sample_is_not_read_as_information() -> None:
    """Weights at random: the estimate is far above zero, and so are those of shuffled kinds."""
    rng = np.random.default_rng(0)
    weights = rng.dirichlet([1] * 6, size=24)
    kinds = [str(number % 6) for number in range(24)]

    for row in kind_information(weights, kinds, range(24)):
        assert row.bits > 0.3
        assert row.shuffled == pytest.approx(row.bits, abs=0.25)
        assert not row.is_more_than_shuffled
        assert row.p > 0.05


WORDINGS_OF_KINDS = [3, 3, 4, 5, 60]


def unequally_asked(rng: np.random.Generator, share_of_kind: float) -> list[KindInformation]:
    """Each kind has 100 questions, in few wordings or in many; weights are random for each wording,
    and in part for each kind."""
    kinds = np.repeat(range(5), WORDINGS_OF_KINDS)
    of_wording = rng.dirichlet([5] * 4, size=len(kinds))
    of_kind = rng.dirichlet([5] * 4, size=5)[kinds]
    of_wording = (1 - share_of_kind) * of_wording + share_of_kind * of_kind
    asked: list[int] = []
    for kind in range(5):
        asked.extend(rng.choice(np.flatnonzero(kinds == kind), 100).tolist())
    return kind_information(of_wording[asked], kinds[asked].astype(str).tolist(), asked)


def test_a_kind_of_many_wordings_raises_no_alarm() -> None:
    """Most wordings are of one kind, most questions are not."""
    rng = np.random.default_rng(0)
    false_alarms = np.zeros(2)
    for _ in range(20):
        rows = unequally_asked(rng, 0.0)
        assert rows[0].is_testable
        false_alarms += [row.is_more_than_shuffled for row in rows]
    # Of an error rate of 5 %, five of twenty or more have a probability of 0.3 %.
    assert max(false_alarms) <= 4


def test_a_kind_of_many_wordings_hides_no_other() -> None:
    rng = np.random.default_rng(0)
    seen = [unequally_asked(rng, 0.8)[1].is_more_than_shuffled for _ in range(6)]
    assert sum(seen) >= 5


def test_stray_questions_give_a_kind_no_wording() -> None:
    """Eight kinds of one wording each; one question in fifty has the wording of another kind."""
    rng = np.random.default_rng(0)
    wordings = np.arange(8).repeat(50)
    kinds = wordings.copy()
    kinds[::50] = (kinds[::50] + 1) % 8
    weights = rng.dirichlet([5] * 4, size=8)[wordings]

    for row in kind_information(weights, kinds.astype(str).tolist(), wordings.tolist()):
        assert row.wordings == {str(kind): 1 for kind in range(8)}
        assert row.partitions == 1
        assert not row.is_testable
        assert not row.is_more_than_shuffled


def test_a_kind_of_two_wordings_cannot_be_tested() -> None:
    """There are ways enough to deal the wordings, and yet too few of one kind."""
    kinds = ["a"] * 2 + ["b"] * 5 + ["c"] * 5
    weights = np.eye(3)[[0] * 2 + [1] * 5 + [2] * 5]
    for row in kind_information(weights, kinds, range(12)):
        assert row.partitions == math.comb(12, 2) * math.comb(10, 5) // 2
        assert row.scarce_kinds == ["a"]
        assert not row.is_more_than_shuffled


def test_wordings_that_ask_for_every_kind_say_nothing_of_it() -> None:
    """All wordings ask for all kinds in equal shares: no shuffling changes that."""
    rng = np.random.default_rng(0)
    wordings = np.repeat(range(12), 30)
    kinds = np.tile(["a", "b", "c"], 120).tolist()
    weights = rng.dirichlet([1] * 4, size=12)[wordings]

    for row in kind_information(weights, kinds, wordings.tolist()):
        assert (row.bits, row.shuffled_high) == (0, 0)
        assert not row.is_more_than_shuffled


def random_per_wording(rng: np.random.Generator, by_kind: bool) -> list[KindInformation]:
    """Weights at random for each of eight wordings of each of four kinds; or with one for each
    kind as well. Twenty questions have each wording."""
    kinds = [str(wording // 8) for wording in range(32)]
    of_wording = rng.dirichlet([1] * 5, size=32)
    if by_kind:
        of_kind = rng.dirichlet([1] * 5, size=4)
        of_wording = 0.2 * of_wording + 0.8 * np.repeat(of_kind, 8, axis=0)
    wordings = list(range(32)) * 20
    return kind_information(of_wording[wordings], [kinds[one] for one in wordings], wordings)


def test_weights_that_follow_the_wording_alone_say_nothing_of_the_kind() -> None:
    """640 questions look like much evidence, and are 32 wordings."""
    rng = np.random.default_rng(0)
    false_alarms = 0
    for _ in range(20):
        false_alarms += any(row.is_more_than_shuffled for row in random_per_wording(rng, False))
    # 5 % of each of two estimates: four of twenty or more have a probability of 12 % at most.
    assert false_alarms <= 4


def test_weights_that_follow_the_kind_are_seen_over_wordings() -> None:
    rng = np.random.default_rng(0)
    seen = [random_per_wording(rng, True)[1].is_more_than_shuffled for _ in range(6)]
    assert sum(seen) >= 5


def test_one_wording_a_kind_cannot_be_tested() -> None:
    kinds = list("abcde") * 40
    weights = np.eye(5)[[int(ord(kind) - ord("a")) for kind in kinds]]
    for row in kind_information(weights, kinds, [ord(kind) for kind in kinds]):
        assert row.partitions == 1
        assert row.bits == pytest.approx(math.log2(5), abs=1e-6)
        assert not row.is_testable
        assert not row.is_more_than_shuffled


def test_equal_weights_say_nothing() -> None:
    weights = np.full((10, 4), 0.25)

    for row in kind_information(weights, ["a", "b"] * 5, range(10)):
        assert (row.bits, row.bins, row.shuffled) == (0.0, 1, 0.0)
        assert not row.is_more_than_shuffled


# What moves the weights


def test_components_of_weights_that_add_up() -> None:
    """w = a(instruction) + b(picture): no rest, and the variances of both."""
    rng = np.random.default_rng(1)
    of_instruction = rng.normal(size=(7, 1, 3))
    of_picture = 0.1 * rng.normal(size=(1, 5, 3))

    crossed = crossed_spread(of_instruction + of_picture)

    expected_instruction = of_instruction[:, 0].var(axis=0, ddof=1).sum()
    expected_picture = of_picture[0].var(axis=0, ddof=1).sum()
    assert crossed.instruction == pytest.approx(expected_instruction)
    assert crossed.picture == pytest.approx(expected_picture)
    assert crossed.rest == pytest.approx(0, abs=1e-12)
    assert crossed.over_instructions == pytest.approx(
        of_instruction[:, 0].std(axis=0, ddof=1).mean()
    )


def test_components_are_unbiased() -> None:
    """Averaged over many draws: an instruction's share is not what the rest makes of it."""
    rng = np.random.default_rng(2)
    found = []
    for _ in range(400):
        instruction = 2 * rng.normal(size=(6, 1, 1))
        rest = 3 * rng.normal(size=(6, 4, 1))
        crossed = crossed_spread(instruction + rest)
        found.append([crossed.instruction, crossed.picture, crossed.rest])

    instruction, picture, rest = np.mean(found, axis=0)
    assert instruction == pytest.approx(4, abs=0.8)
    assert picture == pytest.approx(0, abs=0.3)
    assert rest == pytest.approx(9, abs=0.5)


@pytest.mark.parametrize("strategy", ["instruction_weighted", "text_routed"])
def test_crossed_weights_are_those_of_each_pair(strategy: str, tmp_path: Path) -> None:
    vlm = tiny.model(strategy)
    answerer = Answerer(vlm, tiny.processor(vlm))
    width = 768 if strategy == "instruction_weighted" else vlm.config.text_config.hidden_size
    instruction = torch.randn(3, width)
    pictures: list[Picture] = []
    for number in range(2):
        write_picture(tmp_path / f"{number}.png", 200 * number)
        pictures.append(Picture(str(tmp_path / f"{number}.png")))

    crossed = answerer.crossed_weights(pictures, instruction, batch_size=2)

    assert crossed.shape[:2] == (3, 2)
    for place, picture in enumerate(pictures):
        sample = Sample("asked", (picture,), ())
        asked = [Question("asked", sample, (), "", "all", "all")] * 3
        expected = torch.tensor(answerer.layer_weights(asked, instruction))
        torch.testing.assert_close(crossed[:, place], expected)


# Another question's instruction


def test_the_other_instruction_is_of_another_kind() -> None:
    instruction = torch.arange(6.0).unsqueeze(-1)
    kinds = ["a", "a", "a", "b", "b", "b"]

    for seed in range(5):
        other = shuffled(instruction, seed, kinds).flatten().tolist()
        assert all(number >= 3 for number in other[:3])
        assert all(number < 3 for number in other[3:])


def test_without_another_kind_it_is_worded_otherwise() -> None:
    instruction = torch.tensor([0.0, 0, 1, 1]).unsqueeze(-1)

    other = shuffled(instruction, kinds=["a"] * 4)

    assert other.flatten().tolist() == [1, 1, 0, 0]


# The verb


def test_all_is_in_one_folder(measured: Path) -> None:
    names = {file.name for file in measured.iterdir()}

    assert {"guidance.json", "predictions.jsonl"} <= names
    for figure in ("guidance", "controls"):
        assert {f"{figure}.png", f"{figure}.svg"} <= names
    report = report_in(measured)
    assert report.questions == PICTURES * 6
    assert (report.pictures, report.wordings) == (PICTURES, 6)
    assert report.kind == "category"
    assert report.choices == ["1", "2", "3", "4"]
    assert set(report.categories) == set(WORDS)
    assert list(report.controls) == ["other_category", "mean"]


def test_weights_are_means_over_the_questions_of_a_category(measured: Path) -> None:
    report = report_in(measured)
    of_category = []
    for line in read_lines(measured / "predictions.jsonl"):
        if line["category"] == "General":
            of_category.append(line["weights"])

    general = report.categories["General"]
    assert general.questions == PICTURES * 3
    assert general.mean == pytest.approx(np.mean(of_category, axis=0), abs=1e-4)
    assert general.spread == pytest.approx(np.std(of_category, axis=0), abs=1e-4)
    assert sum(report.overall.mean) == pytest.approx(1, abs=1e-3)


def test_a_router_that_reads_text_alone_is_moved_by_no_picture(measured: Path) -> None:
    crossed = report_in(measured).crossed

    assert crossed is not None
    assert (crossed.instructions, crossed.pictures) == (6, PICTURES)
    assert crossed.over_instructions > 0.001
    assert crossed.over_pictures == pytest.approx(0, abs=1e-6)
    assert crossed.shares() == pytest.approx([1, 0, 0], abs=1e-4)


def test_scores_are_those_of_eval(model: Path, data: Path, measured: Path, tmp_path: Path) -> None:
    settings = evaluation_of(data).model_copy(update={"log_likelihood": False})
    folder = evaluate(model, settings, output=tmp_path, resamples=200, console=QUIET)
    scores = json.loads((folder / "scores.json").read_text())

    report = report_in(measured)
    assert report.guided.score == scores["mean"]["score"]
    assert report.guided.interval == scores["mean"]["interval"]
    mean = report.controls["mean"]
    assert mean.score.score == scores["controls"]["mean"]["score"]
    assert mean.difference.difference == pytest.approx(report.guided.score - mean.score.score)


def test_a_second_run_asks_nothing_and_writes_the_same(
    model: Path, data: Path, measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (measured / "guidance.json").read_text()

    def refuse(self: Answerer, *_: Any, **options: Any) -> list[str]:
        raise AssertionError("a question is asked again")

    monkeypatch.setattr(Answerer, "answer", refuse)
    guidance(model, evaluation_of(data), output=measured, resamples=200, console=QUIET)

    assert (measured / "guidance.json").read_text() == before


def test_the_file_holds_all_that_figures_need(measured: Path, tmp_path: Path) -> None:
    report = report_in(measured)
    assert GuidanceReport.from_json(report.to_json()) == report

    for file in redraw(measured, tmp_path):
        for suffix in (".png", ".svg"):
            again = file.with_suffix(suffix)
            assert again.read_bytes() == (measured / again.name).read_bytes()


def test_the_snippet_of_the_page_runs(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parent.parent / "docs" / "guidance.md").read_text("utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)

    exec(snippet, {"folder": measured})

    printed = capsys.readouterr().out
    assert "k-means" in printed
    assert "other_category: " in printed


def test_a_model_without_guidance_is_refused(data: Path, tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model", "concat")

    run = CliRunner().invoke(app, ["guidance", str(folder), str(data)])

    assert run.exit_code == 2
    assert "fuses by 'concat'" in run.stderr
    assert "instruction_weighted, text_routed" in run.stderr
    assert not (folder / "guidance").exists()


def test_data_without_pictures_are_refused(model: Path, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "so"}]
    file = tmp_path / "text.json"
    file.write_text(json.dumps([{"id": "0", "conversations": turns}]))

    with pytest.raises(LayerfuseError, match="shows no picture"):
        guidance(model, evaluation_of(file), output=tmp_path / "out", console=QUIET)


# What follows


def contrast_of(difference: float, verdict: str) -> JudgedContrast:
    interval = [difference - 0.01, difference + 0.01]
    return JudgedContrast(
        difference=difference,
        interval=interval,
        item_interval=interval,
        error=0.005,
        df=9.0,
        p=1.0,
        item_p=1.0,
        covers="pictures",
        measured=True,
        p_holm=1.0,
        verdict=verdict,
        unresolved=False,
    )


def made_up(bits: float, difference: float, verdict: str) -> GuidanceReport:
    """A report with one estimate and one control."""
    weights = KindWeights(50, [0.4, 0.6], [0.02, 0.02])
    information = KindInformation(
        estimator="k-means",
        bins=2,
        bits=bits,
        entropy=1.0,
        shuffled=0.05,
        shuffled_high=0.1,
        p=0.01,
        permutations=1000,
        wordings={"a": 15, "b": 15},
        partitions=9999,
    )
    effect = ControlEffect(ArmScore(0.6, [0.5, 0.7]), contrast_of(difference, verdict), {})
    return GuidanceReport(
        model="model",
        data={},
        strategy="text_routed",
        choices=["1", "2"],
        kind="category",
        questions=100,
        pictures=50,
        wordings=30,
        guided=ArmScore(0.6, [0.5, 0.7]),
        chance=0.2,
        overall=weights,
        categories={"a": weights, "b": weights},
        families={"all": weights},
        crossed=CrossedSpread(30, 16, 0.02, 0.01, 3.0, 1.0, 0.0),
        information=[information],
        controls={"other_category": effect},
        resamples=200,
        seed=0,
    )


def test_weights_that_differ_and_answers_that_do_not_need_them() -> None:
    sentences = " ".join(guidance_sentences(made_up(0.31, 0.002, "tie")))

    assert "75.0 % lies between instructions, 25.0 % between pictures" in sentences
    assert "weights differ by category (k-means, 2 bins): 0.31 bits of 1.00" in sentences
    assert "shuffled over wordings 0.05" in sentences
    assert "do not get measurably worse with the instruction of another kind" in sentences
    assert "−0.2 points (−1.2 to +0.8)" in sentences
    assert "no evidence that the guidance helps" in sentences


@pytest.mark.parametrize(
    ("bits", "verdict", "conclusion"),
    [
        (0.31, "better", "is used by the answers"),
        (0.08, "better", "something else in the question than its category"),
        (0.08, "tie", "nothing shows that the guidance does anything"),
    ],
)
def test_conclusions(bits: float, verdict: str, conclusion: str) -> None:
    assert conclusion in guidance_sentences(made_up(bits, 0.03, verdict))[-1]


def test_a_model_that_guesses_shows_nothing() -> None:
    report = replace(made_up(0.31, 0.0, "tie"), chance=0.55)

    assert "cannot show in what it answers" in guidance_sentences(report)[-1]


@pytest.mark.parametrize(
    ("wordings", "partitions", "reason"),
    [
        ({"a": 1, "b": 29}, 30, "a has fewer than 3 wordings"),
        ({"a": 2, "b": 2}, 3, "a and b have fewer than 3 wordings"),
        ({"a": 3, "b": 3}, 10, "6 wordings are too few for 2 categories"),
    ],
)
@pytest.mark.parametrize(
    ("verdict", "conclusion"),
    [
        ("better", "So the guidance helps, by the wording of a question or by its category."),
        ("tie", "So nothing shows that the guidance does anything."),
    ],
)
def test_where_wording_and_kind_are_one_there_is_no_verdict(
    wordings: dict[str, int], partitions: int, reason: str, verdict: str, conclusion: str
) -> None:
    report = made_up(0.31, 0.03, verdict)
    information = [
        replace(row, wordings=wordings, partitions=partitions) for row in report.information
    ]

    sentences = guidance_sentences(replace(report, information=information))

    assert "By k-means (2 bins) 0.31 bits of 1.00." in sentences
    said = "Wording and category cannot be told apart, so that weights may follow either"
    assert f"{said}: {reason}." in sentences
    assert "differ by category" not in " ".join(sentences)
    assert sentences[-1] == conclusion


@pytest.mark.parametrize("kind", ["category", "family"])
def test_of_drawn_scenes_wording_and_kind_cannot_be_told_apart(kind: str) -> None:
    """Whatever the weights: some kinds are asked for in one wording or two."""
    rng = np.random.default_rng(0)
    texts: list[str] = []
    kinds: list[str] = []
    for scene in draw_scenes(20, "test"):
        for name, family in FAMILIES.items():
            texts.append(scene.ask(name, rng)[0])
            kinds.append(family.category if kind == "category" else name)
    _, wordings = np.unique(texts, return_inverse=True)
    weights = np.eye(len(set(kinds)))[np.unique(kinds, return_inverse=True)[1]]

    for row in kind_information(weights, kinds, wordings.tolist()):
        assert not row.is_testable
        assert not row.is_more_than_shuffled


def test_maps_hold_families_beside_categories() -> None:
    weights = KindWeights(50, [0.5, 0.5], [0.02, 0.02])
    report = replace(
        made_up(0.3, 0.0, "tie"), families={"a": weights, "count": weights, "letter": weights}
    )

    whole, difference = weight_maps(report)

    # A family that is called as a category is
    assert difference.kinds == ["a", "b", "a (family)", "count", "letter"]
    assert whole.kinds == ["all questions", *difference.kinds]
    assert difference.rules == [2]
    assert whole.rules == [1, 3]
    assert difference.values[2] == pytest.approx([10, -10])
