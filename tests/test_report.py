"""The report of a small made-up study: what it says, that it is escaped, whole and repeatable."""

import base64
import io
import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.axes import Axes
from PIL import Image

from layerfuse import plots
from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.records import (
    PREDICTIONS,
    AnswerRecord,
    FinishedRun,
    RunRecord,
    read_records,
    read_runs,
    write_records,
)
from layerfuse.study.findings import state_findings
from layerfuse.study.report import write_report
from layerfuse.study.report_examples import choose, thumbnail
from layerfuse.study.summary import summarize
from tests.made_up import answer_record
from tests.made_up_reports import EVIL, FAMILIES, guide, make_study
from tests.made_up_studies import finished_run


def words(page: Path) -> str:
    """The page's text without style and markup."""
    text = re.sub(
        r"<style>.*?</style>|<script>.*?</script>|<svg.*?</svg>|<[^>]+>",
        " ",
        page.read_text(),
        flags=re.DOTALL,
    )
    return re.sub(r"\s+", " ", text)


def read_summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def answers_of(folder: Path, arm: str) -> list[AnswerRecord]:
    """The answers of all seeds of an arm."""
    answers = []
    for path in folder.glob(f"arms/{arm}*/{PREDICTIONS}"):
        answers += read_records(path, AnswerRecord)
    return answers


def test_controls_are_paired_with_the_guided_answers(tmp_path: Path) -> None:
    """An arm that its instruction lifts, and one whose answers never change."""
    folder = make_study(tmp_path / "study", {"base": 0.5, "helped": 0.9, "same": 0.7})
    guide(folder, "helped", helped=True)
    guide(folder, "same", helped=False)

    text = words(write_report(folder))

    helped, same = read_summary(folder)["guidance"]
    mean_gains = []
    for family in FAMILIES:
        gains = []
        for answer in answers_of(folder, "helped"):
            if answer.family == family:
                gains.append(answer.score - answer.controls["shuffled"].score)
        mean_gains.append(np.mean(gains))
    assert helped["difference"]["difference"] == pytest.approx(np.mean(mean_gains))
    assert helped["difference"]["verdict"] == "better"
    # The weights are 0.5 and 0.6 by turns.
    assert helped["spread"] == pytest.approx(0.05)
    assert helped["weights"] == {"colour": [0.5, 0.5], "count": [0.6, 0.4]}
    assert same["difference"]["difference"] == 0
    assert same["difference"]["verdict"] == "tie"
    assert same["spread"] == 0
    assert "helped against itself with the instruction of another question gains +" in text
    assert "same against itself" in text


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a study of two arms and two seeds."""
    folder = tmp_path_factory.mktemp("study") / "one"
    return write_report(make_study(folder, {"deepest": 0.5, "concat-4-8": 0.95}))


def test_contents_in_order(page: Path):
    text = words(page)

    parts = [
        "tiny-study",
        "concat-4-8 beats the baseline deepest by",
        "Results",
        "chance",
        "Scores",
        "By family of questions",
        "Seen and held-out",
        "Along training",
        "Training loss",
        "Examples",
        "colour: arms disagree",
        "Training cost",
        "0.06 M",
        "How to read this",
        "Recipe",
        "Environment",
    ]
    assert text.index(parts[0]) < text.index(parts[1])
    place = text.index(parts[1])
    # Short names such as "Scores" stand in sentences too: each part is looked for behind the one
    # before, and missing there it raises ValueError.
    for part in parts[2:]:
        place = text.index(part, place)
    assert "4 runs of 2 arms, each on 80 questions about 40 pictures" in text


def test_numbers_are_those_of_the_summary(page: Path):
    text = words(page)
    summary = read_summary(page.parent)

    expected = summarize(read_runs(page.parent), "deepest")
    findings = state_findings(expected)
    # Without a guided arm there is nothing to say of guidance.
    assert findings.guidance == ""
    assert summary == {**expected.to_json(), "findings": asdict(findings)}
    for arm in summary["arms"]:
        assert f"{100 * arm['mean']['score']:.1f}" in text
        for cell in arm["families"].values():
            assert f"{100 * cell['score']:.1f}" in text


def test_figures_are_given_the_numbers_of_the_summary(page: Path, monkeypatch: pytest.MonkeyPatch):
    """A bar that is not at its arm's score would be seen by nobody."""
    given = []
    plot_scores = plots.plot_scores

    def plot_and_keep(data: plots.StudyResult, axes: Axes) -> Axes:
        given.append(data)
        return plot_scores(data, axes)

    monkeypatch.setattr(plots, "plot_scores", plot_and_keep)

    # Over what is there: two calls give the same bytes.
    write_report(page.parent)

    [data] = given
    summary = read_summary(page.parent)
    assert data.baseline == summary["baseline"]
    assert data.chance == summary["chance"]["mean"]
    assert data.family_chance == summary["chance"]["families"]
    # Rows are in order of score, looks in order of the study: there the baseline is first.
    assert [(arm.arm, arm.index) for arm in data.arms] == [("concat-4-8", 1), ("deepest", 0)]
    # What the figure gets and what the file holds are the same numbers, not rounded ones.
    for drawn, arm in zip(data.arms, summary["arms"], strict=True):
        assert drawn.mean.score == arm["mean"]["score"]
        assert drawn.mean.interval == arm["mean"]["interval"]
        assert drawn.seed_means == arm["seed_means"]
        for family, share in drawn.families.items():
            assert share.score == arm["families"][family]["score"]
            assert share.interval == arm["families"][family]["interval"]
        assert list(drawn.families) == summary["families"]


def test_answers_and_environment_are_escaped(page: Path):
    html = page.read_text()
    assert EVIL not in html
    # The page's own.
    assert html.count("<script") == 1
    assert "&lt;script&gt;alert(&#39;red&#39;)&lt;/script&gt;" in html
    assert "<b>fast</b>" not in html
    assert "&lt;b&gt;fast&lt;/b&gt;" in html


def test_page_needs_nothing_else(page: Path):
    """It can be mailed: pictures and figures are in it, and nothing is fetched."""
    html = page.read_text()
    # Every source is in the page itself, every link a place of it.
    assert not re.search(r'(?:src|href)="(?!data:image/(?:png|jpeg);base64,|#)', html)
    assert "url(http" not in html
    assert "@import" not in html
    # Losses, validation, scores and families; each card of an example has a picture.
    assert html.count("<svg ") == 4
    pictures = len(re.findall("<img [^>]*data:image/", html))
    assert pictures == html.count("<article") >= 3


def test_ids_are_unique_and_every_reference_has_one(page: Path):
    """Figures of one page share it: a clip path of one must not cut another."""
    html = page.read_text()
    ids = re.findall(r'\bid="([^"]+)"', html)
    links = re.findall(r'href="#([^"]+)"', html)
    clip_paths = re.findall(r"url\(#([^)]+)\)", html)
    assert len(ids) == len(set(ids))
    assert links + clip_paths
    assert set(links + clip_paths) <= set(ids)


def contents(folder: Path) -> dict[Path, bytes]:
    """All files under a folder."""
    files = {}
    for path in folder.rglob("*"):
        if path.is_file():
            files[path] = path.read_bytes()
    return files


def test_two_calls_give_the_same_bytes(page: Path):
    """Figures too, of which matplotlib makes others each time if it is not told not to."""
    folder = page.parent
    figures = {path.name for path in (folder / "figures").iterdir()}
    assert figures == {
        "along.png",
        "along.svg",
        "losses.png",
        "losses.svg",
        "scores.png",
        "scores.svg",
        "families.png",
        "families.svg",
    }
    before = contents(folder)

    write_report(folder)

    assert contents(folder) == before


def test_examples_follow_the_stated_rule(page: Path):
    """The first card is of the first question of colour on which the arms disagree."""
    deepest_answers = read_records(page.parent / "arms/deepest.0" / PREDICTIONS, AnswerRecord)
    concat_answers = read_records(page.parent / "arms/concat-4-8.0" / PREDICTIONS, AnswerRecord)
    disagreements = []
    for deepest, concat in zip(deepest_answers, concat_answers, strict=True):
        if deepest.family == "colour" and deepest.score != concat.score:
            disagreements.append(deepest)

    card = re.search(r"<article.*?</article>", page.read_text(), re.DOTALL)

    assert card is not None
    expected_marks = ["✗", "✓"]
    if disagreements[0].score == 1:
        expected_marks = ["✓", "✗"]
    assert re.findall(r">([✓✗])<", card.group()) == expected_marks


def run_on_three_pictures(arm: str, seed: int, right: list[bool]) -> FinishedRun:
    """A run with six answers: to a question of family a and one of b about each picture."""
    answers = []
    for question, is_right in enumerate(right):
        family = "ab"[question % 2]
        sample = str(question // 2)
        answers.append(answer_record(str(question), sample=sample, family=family, right=is_right))
    return finished_run(arm, seed, answers)


def test_examples_show_each_picture_once():
    runs = [
        run_on_three_pictures("x", 0, [True] * 6),
        # Examples are of the first seed.
        run_on_three_pictures("x", 1, [False] * 6),
        run_on_three_pictures("y", 0, [False, False, False, False, True, True]),
    ]

    examples = choose(runs)

    # Question 1 would be the first of family b, but its picture is that of question 0.
    assert [example.question.id for example in examples] == ["0", "3", "4"]
    assert [example.why for example in examples] == [
        "a: arms disagree",
        "b: arms disagree",
        "all right",
    ]
    for example in examples:
        # One answer an arm, in the order of the study.
        assert [answer.arm for answer in example.answers] == ["x", "y"]


def test_single_seed_says_that_seed_noise_is_unknown(tmp_path: Path):
    folder = make_study(tmp_path / "study", {"deepest": 0.5, "concat": 0.9}, seeds=1)

    text = words(write_report(folder))

    headline = read_summary(folder)["findings"]["headline"]
    assert headline.startswith("No verdict on concat and deepest")
    assert headline in text
    assert text.count("one seed an arm: scores only, no verdict") >= 4
    assert "pooled over all arms" not in text


def test_equal_arms_are_called_a_tie(tmp_path: Path):
    folder = make_study(tmp_path / "study", {"deepest": 0.7, "a": 0.7, "b": 0.7})

    headline = state_findings(summarize(read_runs(folder), "deepest")).headline

    start = "All 3 arms tie: no difference to the baseline deepest is beyond noise"
    assert headline.startswith(start)


def test_claims_stand_near_the_verdicts(tmp_path: Path):
    folder = make_study(tmp_path / "study", {"deepest": 0.5, "concat-4-8": 0.95}, seeds=3)
    stated = {
        "claim": "Two layers beat <one>.",
        "source": "a paper",
        "better": ["concat-4-8"],
        "than": ["deepest"],
        "over": "each",
        "families": ["colour"],
        "limits": "small",
    }
    waiting = {**stated, "claim": "Later.", "better": ["waiting"]}
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["claims"] = [stated, waiting]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    text = words(write_report(folder))

    holding, unjudged = read_summary(folder)["claims"]
    assert {key: holding[key] for key in stated} == stated
    assert holding["verdict"] == "holds"
    assert holding["p_holm"] == holding["p"] < 0.05
    place = text.index("Claims What the recipe stated before anything was trained.")
    assert text.index("Results") < place < text.index("Scores")
    # Escaped, as all that a recipe says.
    claim = text.index("Two layers beat &lt;one&gt;.", place)
    assert text.index(f"holds +{100 * holding['difference']:.1f}", claim)
    assert text.index("to deepest colour a paper small", claim)
    assert unjudged["difference"] is None
    assert text.index("no verdict: no result yet of waiting", claim)


def test_a_claim_that_is_none_gets_no_report(tmp_path: Path):
    folder = make_study(tmp_path / "study", {"deepest": 0.5, "concat-4-8": 0.95})
    with (folder / "recipe.yaml").open("a") as file:
        file.write("claims: [{claim: x}]\n")

    with pytest.raises(LayerfuseError, match=r"claims\.0:\n  source: Field required"):
        write_report(folder)


def test_unfinished_studies(tmp_path: Path):
    """Of three arms one run is there; what else is missing takes nothing from the page."""
    folder = make_study(tmp_path / "study", {"deepest": 0.7, "a": 0.9, "b": 0.9})
    results = folder / "results.jsonl"
    first_run = results.read_text().splitlines(keepends=True)[0]
    results.write_text(first_run)
    (folder / "environment.json").unlink()
    # The first examples are of this picture.
    (folder / "images/0.png").unlink()

    text = words(write_report(folder))

    assert "Only the baseline deepest has finished: there is nothing to compare yet." in text
    assert "Unfinished: a, b have no result yet." in text
    assert "all right · picture not stored" in text or "all wrong · picture not stored" in text


def test_a_study_without_baseline_gets_no_report(tmp_path: Path):
    folder = make_study(tmp_path / "study", {"deepest": 0.7, "a": 0.9})
    (folder / "recipe.yaml").write_text("name: x\n")

    with pytest.raises(LayerfuseError, match="names no baseline"):
        write_report(folder)


def test_a_report_of_many_runs_and_photos_stays_small(tmp_path: Path) -> None:
    """It can be mailed: 18 runs of 5,000 steps, and pictures that no format makes small."""
    rates = {f"arm {number}": 0.4 + 0.1 * number for number in range(6)}
    families = tuple(f"family {number}" for number in range(10))
    folder = make_study(tmp_path / "study", rates, seeds=3, families=families)
    rng = np.random.default_rng(0)
    for picture in (folder / "images").iterdir():
        Image.fromarray(rng.integers(256, size=(300, 400, 3), dtype=np.uint8)).save(picture)
    steps = range(1, 5001)
    records = []
    for record in read_records(folder / "results.jsonl", RunRecord):
        noise = np.exp(rng.normal(size=len(steps)))
        curve = [(step, float(factor / step)) for step, factor in zip(steps, noise, strict=True)]
        records.append(replace(record, losses={"finetune": curve}))
    write_records(folder / "results.jsonl", records)

    page = write_report(folder)

    assert page.read_text().count("<article") >= 10
    assert page.stat().st_size < 3e6


def test_a_page_shows_a_photo_as_the_model_saw_it(tmp_path: Path) -> None:
    """Cameras store a photo as their sensor lies, and in EXIF how it must be turned."""
    orientation = 0x0112
    quarter_turn = 6
    exif = Image.Exif()
    exif[orientation] = quarter_turn
    Image.new("RGB", (40, 20), "red").save(tmp_path / "turned.png", exif=exif)

    shown = thumbnail(tmp_path, "turned.png")

    assert shown is not None
    # data:image/...;base64,...
    encoded = shown.split(",")[1]
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as picture:
        assert picture.size == (20, 40)
