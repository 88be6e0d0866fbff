"""The report of a small made-up study: what it says, that it is escaped, whole and repeatable."""

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from layerfuse import plots
from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.records import (
    PREDICTIONS,
    AnswerRecord,
    ControlRecord,
    FinishedRun,
    read_records,
    write_records,
)
from layerfuse.study.findings import findings
from layerfuse.study.report import choose, thumbnail, write_report
from layerfuse.study.summary import summarize
from tests.made_up import answer_record, run_record

EVIL = "<script>alert('red')</script>"


def make_study(folder: Path, rates: dict[str, float], seeds: int = 2, pictures: int = 40) -> Path:
    """Arms with these rates of right answers on two families; the first one is the baseline."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    for p in range(pictures):
        Image.new("RGB", (8, 8), (6 * p, 90, 120)).save(folder / f"images/{p}.png")
    answers = [str(rng.choice(["blue", "green", EVIL])) for _ in range(2 * pictures)]
    hard = rng.random(2 * pictures)
    curve = [(step, 3 / (1 + step)) for step in range(20)]
    records = []
    for arm, rate in rates.items():
        for seed in range(seeds):
            rows = []
            for k, answer in enumerate(answers):
                right = bool(hard[k] < rate) != bool(rng.random() < 0.04)
                rows.append(
                    answer_record(
                        f"t-{k // 2:03d}/{k % 2}",
                        sample=f"t-{k // 2:03d}",
                        image=f"images/{k // 2}.png",
                        answer=answer,
                        right=right,
                        family=("colour", "count")[k % 2],
                        novel=k % 8 < 2,
                    )
                )
            record = run_record(
                arm,
                seed,
                layers=(4, 8) if "concat" in arm else (12,),
                fusion="concat",
                losses={"align": curve, "finetune": curve},
            )
            write_records(folder / record.folder / PREDICTIONS, rows)
            records.append(record)
    write_records(folder / "results.jsonl", records)
    names = "".join(f"- name: {arm}\n" for arm in rates)
    (folder / "recipe.yaml").write_text(
        f"name: tiny-study\nbaseline: {next(iter(rates))}\narms:\n{names}"
    )
    (folder / "environment.json").write_text('{"python": "3.11", "cpu": "<b>fast</b>"}')
    return folder


def words(page: Path) -> str:
    """The page's text without style and markup."""
    text = re.sub(r"<style>.*?</style>|<svg.*?</svg>|<[^>]+>", " ", page.read_text(), flags=re.S)
    return re.sub(r"\s+", " ", text)


def test_controls_are_paired_with_the_guided_answers(tmp_path: Path) -> None:
    """An arm that its instruction lifts, and one whose answers never change."""
    folder = make_study(tmp_path / "study", {"base": 0.5, "helped": 0.9, "same": 0.7})
    for path in folder.glob("arms/*/predictions.jsonl"):
        if path.parent.name.startswith("base"):
            continue
        is_helped = path.parent.name.startswith("helped")
        rows = []
        for k, row in enumerate(read_records(path, AnswerRecord)):
            control = row.score
            weights = [0.5, 0.5]
            if is_helped:
                weights = [0.5 + 0.1 * (k % 2), 0.5 - 0.1 * (k % 2)]
                if k % 3 == 0:
                    control = 0.0
            rows.append(
                replace(row, weights=weights, controls={"shuffled": ControlRecord("", control)})
            )
        write_records(path, rows)
    text = words(write_report(folder))
    helped, same = json.loads((folder / "summary.json").read_text())["guidance"]
    items: list[AnswerRecord] = []
    for path in folder.glob("arms/helped*/predictions.jsonl"):
        items += read_records(path, AnswerRecord)
    lost = []
    for family in ("colour", "count"):
        own = [i for i in items if i.family == family]
        lost.append(np.mean([i.score - i.controls["shuffled"].score for i in own]))
    assert helped["difference"]["difference"] == pytest.approx(np.mean(lost))
    assert helped["difference"]["verdict"] == "better"
    assert helped["spread"] == pytest.approx(0.05)
    assert helped["weights"] == {"colour": [0.5, 0.5], "count": [0.6, 0.4]}
    assert (same["difference"]["difference"], same["difference"]["verdict"]) == (0, "tie")
    assert same["spread"] == 0
    assert "helped against itself with the instruction of another question gains +" in text
    assert "same against itself" in text


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
        "Training loss",
        "Examples",
        "colour: arms disagree",
        "Training cost",
        "0.06 M",
        "How to read this",
        "Recipe",
        "Environment",
    ]
    places = [text.index(part) for part in parts[:2]]
    for part in parts[2:]:
        places.append(text.index(part, places[-1]))
    assert places == sorted(places)
    assert "4 runs of 2 arms, each on 80 questions about 40 pictures" in text


def test_numbers_are_those_of_the_summary(page: Path):
    summary = json.loads((page.parent / "summary.json").read_text())
    text, again = words(page), summarize(page.parent, "deepest")
    again |= {"guidance": [], "findings": {**findings(again), "guidance": ""}}
    assert summary == again
    for arm in summary["arms"]:
        assert f"{100 * arm['mean']['score']:.1f}" in text
        for cell in arm["families"].values():
            assert f"{100 * cell['score']:.1f}" in text


def test_answers_and_environment_are_escaped(page: Path):
    html = page.read_text()
    assert "<script" not in html
    assert "&lt;script&gt;alert(&#39;red&#39;)&lt;/script&gt;" in html
    assert "<b>fast</b>" not in html
    assert "&lt;b&gt;fast&lt;/b&gt;" in html


def test_page_needs_nothing_else(page: Path):
    html = page.read_text()
    assert not re.search(r'(?:src|href)="(?!data:image/png;base64,|#)', html)
    assert "url(http" not in html
    assert "@import" not in html
    assert html.count("<svg ") == 3
    assert html.count("data:image/png;base64,") == html.count("<article") >= 3
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', html))
    used = {a or b for a, b in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', html)}
    assert used <= set(ids)


def test_two_calls_give_the_same_bytes(page: Path):
    files = [p for p in page.parent.rglob("*") if p.is_file()]
    before = {p: p.read_bytes() for p in files}
    assert {p.name for p in files if p.parent.name == "figures"} == {
        f"{name}.{kind}" for name in ("losses", "scores", "families") for kind in ("png", "svg")
    }
    write_report(page.parent)
    assert {p: p.read_bytes() for p in page.parent.rglob("*") if p.is_file()} == before


def test_examples_follow_the_stated_rule(page: Path):
    rows = read_records(page.parent / "arms/deepest.0" / PREDICTIONS, AnswerRecord)
    other = read_records(page.parent / "arms/concat-4-8.0" / PREDICTIONS, AnswerRecord)
    pairs = zip(rows, other, strict=True)
    first = next(a for a, b in pairs if a.family == "colour" and a.score != b.score)
    card = re.search(r"<article.*?</article>", page.read_text(), re.S)
    assert card is not None
    marks = re.findall(r">([✓✗])<", card.group())
    assert marks == (["✓", "✗"] if first.score else ["✗", "✓"])


def test_examples_show_each_picture_once():
    def finished(arm: str, seed: int, right: list[bool]) -> FinishedRun:
        answers = []
        for k, is_right in enumerate(right):
            family = "ab"[k % 2]
            answers.append(answer_record(str(k), sample=str(k // 2), family=family, right=is_right))
        return FinishedRun(run_record(arm, seed), answers)

    runs = [
        finished("x", 0, [True, True, True, True, True, True]),
        finished("x", 1, [False] * 6),
        finished("y", 0, [False, False, False, False, True, True]),
    ]
    shown = []
    for example in choose(runs):
        arms = [answer.arm for answer in example.answers]
        shown.append((example.why, example.question.id, arms))
    assert shown == [
        ("a: arms disagree", "0", ["x", "y"]),
        ("b: arms disagree", "3", ["x", "y"]),
        ("all right", "4", ["x", "y"]),
    ]


def test_single_seed_says_that_seed_noise_is_unknown(tmp_path: Path):
    text = words(write_report(make_study(tmp_path / "s", {"deepest": 0.5, "concat": 0.9}, 1)))
    headline = json.loads((tmp_path / "s/summary.json").read_text())["findings"]["headline"]
    assert headline.endswith("(items only; seed noise not measured).")
    assert headline in text
    assert text.count("items only; seed noise not measured") >= 4
    assert "pooled over all arms" not in text


def test_equal_arms_are_called_a_tie(tmp_path: Path):
    folder = make_study(tmp_path / "s", {"deepest": 0.7, "a": 0.7, "b": 0.7})
    found = findings(summarize(folder, "deepest"))["headline"]
    assert found.startswith("All 3 arms tie: no difference to the baseline deepest is beyond noise")


def test_unfinished_studies(tmp_path: Path):
    folder = make_study(tmp_path / "s", {"deepest": 0.7, "a": 0.9, "b": 0.9})
    results = folder / "results.jsonl"
    results.write_text("".join(results.read_text().splitlines(keepends=True)[:1]))
    (folder / "environment.json").unlink()
    (folder / "images/0.png").unlink()
    text = words(write_report(folder))
    assert "Only the baseline deepest has finished: there is nothing to compare yet." in text
    assert "Unfinished: a, b have no result yet." in text
    assert "all right · picture not stored" in text or "all wrong · picture not stored" in text
    (folder / "recipe.yaml").write_text("name: x\n")
    with pytest.raises(LayerfuseError, match="names no baseline"):
        write_report(folder)


def summary_of(verdicts: dict[str, str], noise: bool = True, above: bool = True, **change) -> dict:
    """A summary with these verdicts against the baseline `base`, in order of score."""
    sizes = {"better": 0.05, "worse": -0.05, "tie": 0.01, "open": 0.03, "better+": 0.02}
    arms = []
    for name, verdict in verdicts.items():
        size = sizes.get(verdict, 0)
        found = {
            "difference": size,
            "interval": [size - 0.02, size + 0.02],
            "verdict": {"open": "tie", "better+": "better"}.get(verdict, verdict),
            "unresolved": verdict == "open",
        }
        arms.append(
            {
                "arm": name,
                "mean": {"score": 0.6 + size, "interval": [0.5, 0.7]},
                "first": verdict == "better",
                "layers": [1],
                "versus_chance": {"verdict": "better" if above else "tie"},
                "versus_baseline": found if verdict else None,
            }
        )
    seeds = {"sd": 0.02, "df": 3, "spread": 0.03, "spread_arm": "base"}
    return {
        "arms": arms,
        "baseline": "base",
        "noise": seeds if noise else None,
        "leaders": [],
        "single_layer": [],
        "chance": {"mean": 0.4},
        **change,
    }


@pytest.mark.parametrize(
    ("verdicts", "sentence"),
    [
        (
            {"a": "better", "b": "tie", "base": ""},
            "a beats the baseline base by 5.0 points (95 % interval 3.0 to 7.0).",
        ),
        (
            {"a": "better", "b": "better", "base": "", "c": "worse"},
            "a and b beat the baseline base; a and b are tied for first; c is worse.",
        ),
        (
            {"a": "better", "b": "better+", "base": ""},
            "a and b beat the baseline base; a leads, "
            "with +5.0 points (95 % interval +3.0 to +7.0).",
        ),
        (
            {"a": "tie", "base": ""},
            "a and the baseline base tie: +1.0 points (95 % interval −1.0 to +3.0).",
        ),
        (
            {"a": "open", "base": ""},
            "Not resolved: a differs from the baseline base by +3.0 points "
            "(95 % interval +1.0 to +5.0), too little for the noise between seeds.",
        ),
        (
            {"base": "", "a": "worse", "b": "worse"},
            "The baseline base is best: a and b are all worse.",
        ),
        (
            {"base": "", "a": "worse"},
            "The baseline base is best: a is worse by 5.0 points (95 % interval 3.0 to 7.0).",
        ),
        (
            {"b": "tie", "base": "", "a": "worse"},
            "No arm beats the baseline base: a is worse, b ties with it.",
        ),
        ({"base": ""}, "Only the baseline base has finished: there is nothing to compare yet."),
    ],
)
def test_headlines(verdicts: dict[str, str], sentence: str):
    assert findings(summary_of(verdicts))["headline"] == sentence


def test_nothing_is_claimed_for_arms_at_chance():
    found = findings(summary_of({"a": "better", "base": ""}, above=False))
    assert found["headline"].startswith("No arm is measurably above chance")
    assert "Not measurably above that: a and base." in found["learning"]


def test_layer_sentence():
    row = {"family": "colour", "leader": "a", "beyond_noise": True}
    other = {"family": "count", "leader": "b", "beyond_noise": False}
    told = findings(
        summary_of({"a": "tie", "base": ""}, single_layer=["a", "base"], leaders=[row, other])
    )["layers"]
    assert told == (
        "Of the 2 single-layer arms, a leads on colour beyond noise; elsewhere "
        "(1 of 2 families) the order is noise."
    )
    told = findings(
        summary_of(
            {"a": "tie", "base": ""}, noise=False, single_layer=["a", "base"], leaders=[other]
        )
    )["layers"]
    assert told == (
        "Among 2 single-layer arms none leads in a family beyond noise "
        "(items only; seed noise not measured)."
    )


def test_up_to_24_arms_look_different():
    looks = [plots.look(i) for i in range(24)]
    assert len(set(looks)) == 24


def test_smooth_is_a_centred_mean():
    assert plots.smooth([0, 3, 6, 3], 3).tolist() == [1.5, 3, 4, 4.5]


def test_plots_draw_what_they_are_given():
    ax = Figure().subplots()
    arm = plots.ArmResult("a", 0, plots.Share(0.5, [0.4, 0.6]), [0.45, 0.55], families={})
    result = plots.StudyResult([arm], baseline="a", chance=0.25, family_chance={})
    assert plots.plot_scores(result, ax) is ax
    drawn = [np.asarray(line.get_xdata()).tolist() for line in ax.lines]
    assert [40.0, 60.0] in drawn
    assert any(np.allclose(x, [45, 55]) for x in drawn if len(x) == 2)
    assert [25.0, 25.0] in drawn
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a (baseline)"]


def test_a_page_shows_a_photo_as_the_model_saw_it(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20), "red").save(tmp_path / "turned.png", exif=exif)
    shown = thumbnail(tmp_path, "turned.png")
    assert shown is not None
    with Image.open(io.BytesIO(base64.b64decode(shown.split(",")[1]))) as picture:
        assert picture.size == (20, 40)
