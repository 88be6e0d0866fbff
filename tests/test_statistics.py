"""Statistics of a study: against naive loops, textbook values and small simulations."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate import score_table as tables
from layerfuse.evaluate import significance as st
from layerfuse.evaluate.records import (
    PREDICTIONS,
    AnswerRecord,
    FinishedRun,
    RunRecord,
    read_records,
    write_records,
)
from layerfuse.study.summary import summarize
from tests.made_up import answer_record, run_record

COMMITTED = Path(__file__).parents[1] / "results"


def item(
    picture: int, question: int, family: str, answer: str, right: bool, **more
) -> AnswerRecord:
    sample = f"t-{picture:03d}"
    return answer_record(
        f"{sample}/{question}",
        sample=sample,
        right=right,
        answer=answer,
        family=family,
        **more,
    )


def run(
    arm: str, seed: int, answers: list[AnswerRecord], layers: tuple[int, ...] = (3,)
) -> FinishedRun:
    return FinishedRun(run_record(arm, seed, layers=layers), answers)


def save(folder: Path, runs: list[FinishedRun]) -> Path:
    """A study's folder that holds these runs."""
    folder.mkdir(exist_ok=True)
    for one in runs:
        write_records(folder / one.record.folder / PREDICTIONS, one.answers)
    write_records(folder / "results.jsonl", [one.record for one in runs])
    return folder


def random_items(rate: float, seed: int, pictures: int = 60, **shift: float) -> list[AnswerRecord]:
    """Two families; family b is left out on every third picture, so that weights matter."""
    rng = np.random.default_rng(seed)
    kinds = [(p, q, f) for p in range(pictures) for q, f in enumerate("ab") if f == "a" or p % 3]
    return [
        item(p, q, f, "xyz"[p % 3], bool(rng.random() < rate + shift.get(f, 0)))
        for p, q, f in kinds
    ]


def naive_score(items: list[AnswerRecord], drawn: list[str]) -> float:
    """Macro mean over families of the share right, each picture as often as it is drawn."""
    shares = []
    for family in sorted({i.family for i in items}):
        hits = []
        for sample in drawn:
            hits += [i.score for i in items if i.sample == sample and i.family == family]
        if hits:
            shares.append(sum(hits) / len(hits))
    return sum(shares) / len(shares)


def test_scores_and_resamples_equal_loops():
    runs = [
        run("a", 0, random_items(0.5, 1)),
        run("a", 1, random_items(0.5, 2)),
        run("b", 0, random_items(0.8, 3)),
    ]
    table = tables.ScoreTable.from_runs(runs, tables.Bootstrap(5, 7), tables.family_of)
    weights = tables.picture_weights(60, tables.Bootstrap(5, 7))
    pictures = sorted({i.sample for i in runs[0].answers})
    assert table.mean.value[1] == pytest.approx(naive_score(runs[2].answers, pictures))
    for b in range(5):
        drawn = [s for s, w in zip(pictures, weights[b], strict=True) for _ in range(int(w))]
        each = [naive_score(r.answers, drawn) for r in runs]
        assert table.mean.samples[b, :2] == pytest.approx([(each[0] + each[1]) / 2, each[2]])


def test_bootstrap_is_over_pictures_not_questions():
    """With eight equal answers a picture, the standard error is that of the pictures alone."""
    rng = np.random.default_rng(0)
    right = rng.random(100) < 0.5
    items = [item(p, q, "a", "x", bool(right[p])) for p in range(100) for q in range(8)]
    samples = tables.ScoreTable.from_runs(
        [run("a", 0, items)], tables.Bootstrap(4000, 0), tables.family_of
    ).mean.samples[:, 0]
    assert samples.std() == pytest.approx(right.std() / 10, rel=0.05)


def test_questions_sharing_an_image_are_one_cluster():
    items = [item(p, 0, "a", "x", p % 2 == 0, image=f"{p // 2}.png") for p in range(20)]
    table = tables.ScoreTable.from_runs(
        [run("a", 0, items)], tables.Bootstrap(50, 0), tables.family_of
    )
    assert table.images == 10
    assert table.mean.samples[:, 0].std() == 0  # each image holds one right and one wrong answer


def test_chance_is_the_share_of_the_commonest_answer():
    answers = ["red", "red", "blue", "green"]
    items = [item(p, 0, "colour", a, True) for p, a in enumerate(answers)]
    items += [item(p, 1, "count", a, False) for p, a in enumerate("1122")]
    table = tables.ScoreTable.from_runs(
        [run("a", 0, items)], tables.Bootstrap(10, 0), tables.family_of
    )
    assert tables.commonest_answers(items) == {"colour": "red", "count": "1"}
    assert [scores.chance.score for scores in table.each] == [0.5, 0.5]


def test_interval_at_the_edge_is_exact():
    flat = np.ones(100)
    assert st.interval(1.0, flat, 30) == [pytest.approx(0.884297, abs=1e-6), 1.0]
    assert st.interval(0.0, flat * 0, 30) == [0.0, pytest.approx(0.115703, abs=1e-6)]
    assert st.interval(0.5, np.arange(1001.0), 30) == [25.0, 975.0]


@pytest.mark.parametrize("images", [1, 2, 30, 400])
@pytest.mark.parametrize("right", [False, True])
def test_interval_at_the_edge_is_that_of_clopper_and_pearson(images: int, right: bool):
    exact = stats.binomtest(images * right, images).proportion_ci(0.95, method="exact")
    low, high = st.interval(float(right), np.full(10, float(right)), images)
    assert (low, high) == (
        pytest.approx(exact.low, abs=1e-12),
        pytest.approx(exact.high, abs=1e-12),
    )


def test_holm_textbook_values():
    assert st.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert st.holm([0.9, 0.8]) == [1.0, 1.0]


def test_seed_noise_is_pooled():
    noise = st.seed_noise({"a": [0.5, 0.6], "b": [0.7, 0.7, 0.73], "c": [0.1]})
    assert noise is not None
    pooled = (np.var([0.5, 0.6], ddof=1) + 2 * np.var([0.7, 0.7, 0.73], ddof=1)) / 3
    assert (noise.sd, noise.df) == (pytest.approx(math.sqrt(pooled)), 3)
    assert (noise.spread, noise.spread_arm) == (pytest.approx(0.1), "a")
    assert st.seed_noise({"a": [0.5], "b": [0.7]}) is None


GUESS = st.Competitor(score=0.0, samples=np.zeros(1), runs=math.inf)
"""Guessing, where only arms are compared."""


def noise_of(sd: float, df: int) -> st.SeedNoise:
    """Noise between seeds of which only these two numbers matter."""
    return st.SeedNoise(sd=sd, df=df, spread=0.0, spread_arm="a")


def scores(difference: float, item_sd: float, noise: st.SeedNoise | None, runs=(2, 2)) -> st.Scores:
    """Two arms whose paired difference has exactly this item standard deviation."""
    spread = np.linspace(-1, 1, 2001)
    spread *= item_sd / spread.std(ddof=1)
    samples = np.stack([0.5 + difference + spread, np.full(2001, 0.5)], axis=1)
    value = np.array([0.5 + difference, 0.5])
    return st.Scores(value, samples, np.array(runs), GUESS, noise, 101)


def test_items_alone_give_a_plain_t_interval():
    found = st.contrast(scores(0.05, 0.02, None), 0, 1)
    half = 1.983972 * 0.02
    assert found.interval == pytest.approx([0.05 - half, 0.05 + half])
    assert found.p == found.item_p == pytest.approx(0.014047, abs=2e-5)


def test_seed_noise_widens_by_welch_satterthwaite():
    noise = noise_of(0.03, 4)
    found = st.contrast(scores(0.05, 0.02, noise, runs=(2, 3)), 0, 1)
    seeds = 0.03**2 * (1 / 2 + 1 / 3)
    df = (0.0004 + seeds) ** 2 / (0.0004**2 / 100 + seeds**2 / 4)
    assert found.df == pytest.approx(df)
    half = stats.t.ppf(0.975, df) * math.sqrt(0.0004 + seeds)
    assert found.interval == pytest.approx([0.05 - half, 0.05 + half])
    assert found.item_p < 0.05 < found.p


@pytest.mark.parametrize(
    ("difference", "noise", "verdict", "unresolved"),
    [
        (0.10, None, "better", False),
        (-0.10, None, "worse", False),
        (0.01, None, "tie", False),
        (0.042, None, "better", False),
        (0.037, None, "tie", False),  # t 2.1 and 1.85, 100 df
        (0.10, noise_of(0.2, 5), "tie", True),
        (0.01, noise_of(0.2, 5), "tie", False),
    ],
)
def test_verdicts(difference: float, noise: st.SeedNoise | None, verdict: str, unresolved: bool):
    (found,) = st.judge([st.contrast(scores(difference, 0.02, noise), 0, 1)])
    assert (found.verdict, found.unresolved) == (verdict, unresolved)


def test_holm_makes_a_tie_of_one_lucky_arm_in_many():
    lucky = st.contrast(scores(0.045, 0.02, None), 0, 1)
    others = [st.contrast(scores(0.0, 0.02, None), 0, 1) for _ in range(9)]
    assert st.judge([lucky])[0].verdict == "better"
    assert st.judge([lucky, *others])[0].verdict == "tie"


def test_equal_answers_tie_and_constant_difference_counts():
    assert st.contrast(scores(0.0, 0.0, None), 0, 1).p == 1.0
    assert st.contrast(scores(0.1, 0.0, None), 0, 1).p == 0.0


@pytest.mark.parametrize("seed_sd", [0.0, 0.05])
def test_coverage_of_the_difference(seed_sd: float):
    """Two equal arms, 40 pictures, 2 seeds of 4 arms: 0 lies in at least 95 of 100 intervals."""
    rng, covered, alone = np.random.default_rng(5), 0, 0
    for _ in range(200):
        level = rng.normal(0.6, 0.2, (40, 1, 1)) + rng.normal(0, 0.15, (40, 4, 1))
        each = level + rng.normal(0, seed_sd, (1, 4, 2)) + rng.normal(0, 0.1, (40, 4, 2))
        samples = tables.picture_weights(40, tables.Bootstrap(200, 0)) @ each.mean(2) / 40
        noise = st.seed_noise(dict(zip("abcd", each.mean(0).tolist(), strict=True)))
        runs = np.full(4, 2)
        found = st.contrast(st.Scores(each.mean((0, 2)), samples, runs, GUESS, noise, 40), 0, 1)
        covered += found.interval[0] <= 0 <= found.interval[1]
        alone += found.item_interval[0] <= 0 <= found.item_interval[1]
    assert 186 <= covered <= 200
    assert (alone < 170) == (seed_sd > 0)  # items alone miss what the seeds do


def study(folder: Path, **rates: float) -> Path:
    """One arm per rate, two seeds of close results."""
    return save(
        folder,
        [
            run(arm, s, random_items(rate, 10 * k + s, 150), (k,))
            for k, (arm, rate) in enumerate(rates.items())
            for s in (0, 1)
        ],
    )


def test_summary_of_a_clear_study(tmp_path: Path):
    summary = summarize(study(tmp_path, low=0.3, base=0.6, high=0.95), "base")
    rows = {row["arm"]: row for row in summary["arms"]}
    assert [row["arm"] for row in summary["arms"]] == ["high", "base", "low"]
    assert rows["high"]["versus_baseline"]["verdict"] == "better"
    assert rows["low"]["versus_baseline"]["verdict"] == "worse"
    assert rows["base"]["versus_baseline"] is None
    assert [rows[a]["first"] for a in ("high", "base", "low")] == [True, False, False]
    assert [rows[a]["versus_chance"]["verdict"] for a in ("high", "low")] == ["better", "worse"]
    assert rows["high"]["mean"]["score"] == pytest.approx(np.mean(rows["high"]["seed_means"]))
    assert (summary["images"], summary["items"], summary["runs"]) == (150, 250, 6)
    assert all(row["leader"] == "high" and row["beyond_noise"] for row in summary["leaders"])
    assert json.loads(json.dumps(summary)) == summary
    assert summary == summarize(tmp_path, "base")
    assert "seen" not in rows["high"]


def test_a_baseline_that_the_leader_beats_is_not_tied_for_first(tmp_path: Path):
    """Against the baseline p = 0.02 is the largest of three, against the leader the smallest."""
    base = [p < 50 for p in range(100)]
    arms = {
        "base": base,
        "c": [p < 58 for p in range(100)],
        "d": [p < 59 for p in range(100)],
        "lead": [(p < 50) != (p % 50 < 15 or p >= 85) for p in range(100)],
    }
    summary = summarize(
        save(
            tmp_path,
            [
                run(arm, 0, [item(p, 0, "a", "xyz"[p % 3], r) for p, r in enumerate(right)])
                for arm, right in arms.items()
            ],
        ),
        "base",
    )
    rows = {row["arm"]: row for row in summary["arms"]}
    assert rows["lead"]["mean"]["score"] == pytest.approx(0.65)
    assert rows["lead"]["versus_baseline"]["verdict"] == "better"
    assert [rows[a]["first"] for a in ("lead", "c", "d", "base")] == [True, True, True, False]


def test_equal_arms_are_tied_for_first_and_lead_nowhere(tmp_path: Path):
    summary = summarize(study(tmp_path, a=0.6, b=0.6, c=0.6), "a")
    assert [row["first"] for row in summary["arms"]] == [True] * 3
    assert not any(row["beyond_noise"] for row in summary["leaders"])


def test_one_picture_decides_nothing(tmp_path: Path):
    """A family that only one picture asks about."""
    rest = [item(p, 1, "b", "xy"[p % 2], p < 3) for p in range(6)]
    runs = [run(arm, 0, [item(0, 0, "a", "x", arm == "a"), *rest]) for arm in ("a", "b")]
    summary = summarize(save(tmp_path, runs), "b")
    assert len(summary["leaders"]) == 2
    assert not any(row["beyond_noise"] for row in summary["leaders"])


def test_seen_and_novel_use_the_families_that_have_both(tmp_path: Path):
    items = [item(p, 0, "a", "x", p < 10, novel=p >= 15) for p in range(20)]
    items += [item(p, 1, "b", "x", False) for p in range(20)]  # never novel: left out of both
    row = summarize(save(tmp_path, [run("a", 0, items)]), "a")["arms"][0]
    assert (row["seen"]["score"], row["novel"]["score"]) == (pytest.approx(10 / 15), 0.0)
    assert row["novel"]["interval"][1] == pytest.approx(1 - 0.025 ** (1 / 5))


def test_errors_name_what_is_wrong(tmp_path: Path):
    def failing(name: str, runs: list[FinishedRun], match: str, baseline: str = "a") -> None:
        with pytest.raises(LayerfuseError, match=match):
            summarize(save(tmp_path / name, runs), baseline)

    good = random_items(0.5, 0)
    failing("baseline", [run("a", 0, good)], r"'deep'.*\['a'\]", "deep")
    failing("fewer", [run("a", 0, good), run("b", 1, good[1:])], "arm 'b' seed 1.*1 missing")
    failing("twice", [run("a", 0, good), run("a", 1, [*good, good[0]])], "1 answered twice")
    other = [replace(good[0], answer="other"), *good[1:]]
    failing("other", [run("a", 0, good), run("b", 0, other)], "1 changed.*t-000/0")
    failing("one", [run("a", 0, good[:1])], "at least two")
    failing("empty", [], "missing or empty")


def test_a_line_with_other_fields_is_named(tmp_path: Path):
    """Files of other versions are not half read."""
    folder = save(tmp_path, [run("a", 0, random_items(0.5, 0))])
    predictions = folder / "arms/a.0" / PREDICTIONS
    first, *rest = predictions.read_text().splitlines(keepends=True)
    line = json.loads(first)
    predictions.write_text("".join([first, json.dumps({**line, "grade": 1}) + "\n", *rest]))
    with pytest.raises(LayerfuseError, match=r"predictions\.jsonl, line 2 holds grade"):
        summarize(folder, "a")
    del line["family"]
    predictions.write_text("".join([json.dumps(line) + "\n", *rest]))
    with pytest.raises(LayerfuseError, match=r"predictions\.jsonl, line 1 lacks family"):
        summarize(folder, "a")


def test_records_are_read_as_they_were_written(tmp_path: Path):
    guided = item(0, 0, "a", "x", True, weights=[0.25, 0.75], controls={"shuffled": False})
    plain = item(1, 0, "b", "line\u2028separator", False)
    write_records(tmp_path / "answers", [guided, plain])
    assert read_records(tmp_path / "answers", AnswerRecord) == [guided, plain]
    record = run_record("a", 0, losses={"align": [(1, 2.5), (2, 1.25)]})
    write_records(tmp_path / "runs", [record])
    assert read_records(tmp_path / "runs", RunRecord) == [record]


@pytest.mark.parametrize(
    "file", sorted(COMMITTED.glob("*/results.jsonl")), ids=lambda f: f.parent.name
)
def test_committed_results_stay_readable(file: Path):
    """What finished studies wrote is read as it was written."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    records = [json.loads(json.dumps(record.to_json())) for record in read_records(file, RunRecord)]
    assert records == lines


def test_missing_torn_and_double_lines(tmp_path: Path):
    folder = study(tmp_path, a=0.5)
    results = folder / "results.jsonl"
    whole = results.read_text()
    results.write_text(whole + whole)
    with pytest.raises(LayerfuseError, match="arm 'a' seed 0 twice"):
        summarize(folder, "a")
    results.write_text(whole[:-9])
    with pytest.raises(LayerfuseError, match="line 2 is not JSON"):
        summarize(folder, "a")
    results.write_text(whole)
    (folder / "arms/a.1/predictions.jsonl").unlink()
    with pytest.raises(LayerfuseError, match=r"a\.1/predictions\.jsonl is missing"):
        summarize(folder, "a")
