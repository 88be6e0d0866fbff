"""The summary of a made-up study: verdicts, ties, leaders, and what is wrong with its files."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

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
from layerfuse.study.findings import layer_sentence
from layerfuse.study.summary import summarize
from tests.made_up import run_record
from tests.made_up_studies import (
    answer_to,
    finished_run,
    random_answers,
    random_study,
    save_study,
)

COMMITTED = Path(__file__).parents[1] / "results"
COMMITTED_STUDIES = sorted(COMMITTED.glob("*/results.jsonl"))


def test_summary_of_a_clear_study(tmp_path: Path):
    """150 questions of family a, and 100 of family b: no picture whose number 3 divides has one."""
    folder = random_study(tmp_path, {"low": 0.3, "base": 0.6, "high": 0.95})

    summary = summarize(read_runs(folder), "base")

    assert [row.arm for row in summary.arms] == ["high", "base", "low"]
    high, base, low = summary.arms
    assert high.versus_baseline is not None
    assert high.versus_baseline.verdict == "better"
    assert low.versus_baseline is not None
    assert low.versus_baseline.verdict == "worse"
    assert base.versus_baseline is None
    assert [high.first, base.first, low.first] == [True, False, False]
    assert high.versus_chance.verdict == "better"
    assert low.versus_chance.verdict == "worse"
    assert high.mean.score == pytest.approx(np.mean(high.seed_means))
    # No question is novel.
    assert high.seen is None
    assert high.novel is None

    assert summary.images == 150
    assert summary.items == 250
    assert summary.runs == 6
    for row in summary.leaders:
        assert row.leader == "high"
        assert row.beyond_noise


def test_one_seed_an_arm_gives_scores_but_no_verdict(tmp_path: Path):
    """However clear these models differ: another seed may differ more."""
    right = random_answers(0.95, seed=1)
    wrong = random_answers(0.3, seed=2)
    runs = [finished_run("high", 0, right), finished_run("base", 0, wrong)]

    summary = summarize(read_runs(save_study(tmp_path, runs)), "base")

    high, base = summary.arms
    assert high.versus_baseline is not None
    assert high.versus_baseline.verdict == "unjudged"
    assert high.mean.covers == "pictures"
    assert [high.first, base.first] == [True, True]
    assert summary.resolvable is None
    assert not any(row.beyond_noise for row in summary.leaders)
    # What these models themselves do is known.
    assert high.versus_chance.verdict == "better"


def test_an_arm_of_one_seed_takes_no_verdict_from_the_others(tmp_path: Path):
    folder = random_study(tmp_path, {"base": 0.6, "high": 0.95})
    runs = [*read_runs(folder), finished_run("once", 0, random_answers(0.3, seed=9, pictures=150))]

    summary = summarize(read_runs(save_study(tmp_path, runs)), "base")

    verdicts = {}
    for arm in summary.arms:
        if arm.versus_baseline is not None:
            verdicts[arm.arm] = arm.versus_baseline.verdict
    assert verdicts == {"high": "better", "once": "unjudged"}


def test_a_summary_is_json_and_the_same_each_time(tmp_path: Path):
    folder = random_study(tmp_path, {"low": 0.3, "base": 0.6, "high": 0.95})

    summary = summarize(read_runs(folder), "base")

    content = summary.to_json()
    assert json.loads(json.dumps(content)) == content
    assert summary == summarize(read_runs(folder), "base")


def test_json_has_the_fields_that_readers_of_summary_json_know(tmp_path: Path):
    """Scores that a study does not have are left out, a comparison that it does not have is null.

    The tables of docs/ are made from summary.json.
    """
    folder = random_study(tmp_path, {"base": 0.6, "high": 0.95})

    content = summarize(read_runs(folder), "base").to_json()

    # In this order: a summary that is written again shows in a diff only what has changed.
    assert list(content) == [
        "baseline",
        "resamples",
        "runs",
        "items",
        "images",
        "families",
        "chance",
        "noise",
        "resolvable",
        "single_layer",
        "leaders",
        "arms",
        "guidance",
        "learning",
        "probes",
        "shown_by",
    ]
    assert list(content["chance"]) == ["mean", "families", "categories"]
    assert list(content["noise"]) == ["sd", "df", "spread", "spread_arm"]
    high, base = content["arms"]
    # No question is novel: `seen` and `novel` are not there.
    assert list(high) == [
        "arm",
        "layers",
        "depth",
        "fusion",
        "kind",
        "seeds",
        "parameters",
        "seconds",
        "mean",
        "seed_means",
        "families",
        "categories",
        "versus_chance",
        "versus_baseline",
        "first",
    ]
    assert list(high["families"]) == content["families"]
    assert list(high["mean"]) == ["score", "interval", "covers"]
    assert high["versus_baseline"]["verdict"] == "better"
    assert base["versus_baseline"] is None


@pytest.mark.parametrize(("families", "shown_by"), [(10, "families"), (11, "categories")])
def test_of_many_families_the_categories_are_shown(
    tmp_path: Path, families: int, shown_by: str
) -> None:
    """One of the layers answers everything, the other only what is counted."""
    runs = []
    for arm, seed in (("base", 0), ("base", 1), ("deep", 0), ("deep", 1)):
        answers = []
        for picture in range(12 * families):
            family = picture % families
            category = "counting" if family < 6 else "colour"
            right = arm == "deep" or (category == "counting" and picture % 7 != seed)
            answer = answer_to(
                picture,
                0,
                right=right,
                answer="xyz"[picture % 3],
                family=f"family {family:02d}",
            )
            answers.append(replace(answer, category=category))
        layers = (4,) if arm == "base" else (8,)
        runs.append(finished_run(arm, seed, answers, layers=layers))

    summary = summarize(runs, "base")

    assert summary.shown_by == shown_by
    assert len(summary.chance.families) == families
    assert list(summary.chance.categories) == ["colour", "counting"]
    shown = summary.chance.families if shown_by == "families" else summary.chance.categories
    assert [leader.family for leader in summary.leaders] == list(shown)
    # The commonest of three answers of a family, over the families of the category.
    assert summary.chance.categories["counting"] == pytest.approx(1 / 3, abs=0.1)
    deep, base = summary.arms
    if shown_by == "families":
        assert deep.over_categories is None
        assert "over_categories" not in deep.to_json()
        return
    assert "leads on colour" in layer_sentence(summary)
    # All right; of the other, what is counted, whatever its number of families.
    assert deep.over_categories is not None
    assert base.over_categories is not None
    assert deep.over_categories.mean.score == 1
    counting = base.categories["counting"].score
    assert base.over_categories.mean.score == pytest.approx(counting / 2)
    assert base.over_categories.versus_baseline is None
    assert deep.over_categories.versus_baseline is not None
    assert deep.over_categories.versus_baseline.difference == pytest.approx(1 - counting / 2)
    assert deep.over_categories.versus_baseline.verdict == "better"


def test_json_has_seen_and_held_out_scores_where_a_study_has_them(tmp_path: Path):
    answers = []
    for picture in range(20):
        # The first 15 pictures show what training holds; of these ten are answered rightly.
        answers.append(answer_to(picture, 0, right=picture < 10, novel=picture >= 15))
    folder = save_study(tmp_path, [finished_run("a", 0, answers)])

    arm = summarize(read_runs(folder), "a").to_json()["arms"][0]

    assert arm["seen"]["score"] == pytest.approx(10 / 15)
    assert arm["novel"]["score"] == 0.0


def runs_with(arm: str, right: list[bool]) -> list[FinishedRun]:
    """Two runs with one question a picture, answered so: no noise between seeds."""
    answers = []
    for picture, is_right in enumerate(right):
        answers.append(answer_to(picture, 0, right=is_right, answer="xyz"[picture % 3]))
    return [finished_run(arm, 0, answers), finished_run(arm, 1, answers)]


def test_a_baseline_that_the_leader_beats_is_not_tied_for_first(tmp_path: Path):
    """Against the baseline p = 0.02 is the largest of three; all pairs together are six."""
    # Arms c and d answer what the baseline does, and 8 or 9 pictures more: they differ little from
    # it, but surely. The leader loses 15 of the baseline's pictures and gains 30 others.
    base = [picture < 50 for picture in range(100)]
    c = [picture < 58 for picture in range(100)]
    d = [picture < 59 for picture in range(100)]
    lead = []
    for picture in range(100):
        changes = picture % 50 < 15 or picture >= 85
        lead.append(base[picture] != changes)
    runs = runs_with("base", base) + runs_with("c", c) + runs_with("d", d)
    runs += runs_with("lead", lead)

    summary = summarize(read_runs(save_study(tmp_path, runs)), "base")

    rows = {row.arm: row for row in summary.arms}
    assert rows["lead"].mean.score == pytest.approx(0.65)
    lead_minus_base = rows["lead"].versus_baseline
    assert lead_minus_base is not None
    assert lead_minus_base.verdict == "better"
    tied_for_first = {arm: row.first for arm, row in rows.items()}
    assert tied_for_first == {"lead": True, "c": True, "d": True, "base": False}


def test_equal_arms_are_tied_for_first_and_lead_nowhere(tmp_path: Path):
    folder = random_study(tmp_path, {"a": 0.6, "b": 0.6, "c": 0.6})

    summary = summarize(read_runs(folder), "a")

    assert [row.first for row in summary.arms] == [True] * 3
    assert not any(row.beyond_noise for row in summary.leaders)


def test_one_picture_decides_nothing(tmp_path: Path):
    """A family that only one picture asks about."""
    others = []
    for picture in range(6):
        answer = "xy"[picture % 2]
        others.append(answer_to(picture, 1, right=picture < 3, answer=answer, family="b"))
    right = answer_to(0, 0, right=True)
    wrong = answer_to(0, 0, right=False)
    runs = [finished_run("a", 0, [right, *others]), finished_run("b", 0, [wrong, *others])]

    summary = summarize(read_runs(save_study(tmp_path, runs)), "b")

    assert len(summary.leaders) == 2
    assert not any(row.beyond_noise for row in summary.leaders)


def test_seen_and_novel_use_the_families_that_have_both(tmp_path: Path):
    answers = []
    for picture in range(20):
        answers.append(answer_to(picture, 0, right=picture < 10, novel=picture >= 15))
        # Never novel: left out of both scores, which would otherwise be of different families.
        answers.append(answer_to(picture, 1, right=False, family="b"))
    folder = save_study(tmp_path, [finished_run("a", 0, answers)])

    row = summarize(read_runs(folder), "a").arms[0]

    assert row.seen is not None
    assert row.seen.score == pytest.approx(10 / 15)
    assert row.novel is not None
    assert row.novel.score == 0.0
    # The exact bound of five pictures without a right answer.
    _, high = row.novel.interval
    assert high == pytest.approx(1 - 0.025 ** (1 / 5))


def assert_refused(
    folder: Path,
    runs: list[FinishedRun],
    message: str,
    baseline: str = "a",
) -> None:
    """Check that a study of these runs gets no summary, and what is said instead."""
    save_study(folder, runs)
    with pytest.raises(LayerfuseError, match=message):
        summarize(read_runs(folder), baseline)


def test_a_baseline_that_is_no_arm_is_named(tmp_path: Path):
    runs = [finished_run("a", 0, random_answers(0.5, seed=0))]

    assert_refused(tmp_path / "study", runs, r"'deep'.*\['a'\]", baseline="deep")


def test_runs_with_other_questions_are_named(tmp_path: Path):
    """Comparisons are paired by question: with others, they would compare nothing."""
    answers = random_answers(0.5, seed=0)
    run = finished_run("a", 0, answers)

    # As after a test that was stopped.
    without_first = finished_run("b", 1, answers[1:])
    assert_refused(tmp_path / "fewer", [run, without_first], "arm 'b' seed 1.*1 missing")

    first_twice = finished_run("a", 1, [*answers, answers[0]])
    assert_refused(tmp_path / "twice", [run, first_twice], "1 answered twice")

    # As after the test's data were corrected between two runs.
    other_first = replace(answers[0], answer="other")
    changed = finished_run("b", 0, [other_first, *answers[1:]])
    assert_refused(tmp_path / "other", [run, changed], "1 changed.*t-000/0")


def test_too_few_answers_are_named(tmp_path: Path):
    one_answer = random_answers(0.5, seed=0)[:1]

    assert_refused(tmp_path / "one", [finished_run("a", 0, one_answer)], "at least two")
    assert_refused(tmp_path / "empty", [], "missing or empty")


def test_a_line_with_other_fields_is_named(tmp_path: Path):
    """Files of other versions are not half read."""
    run = finished_run("a", 0, random_answers(0.5, seed=0))
    folder = save_study(tmp_path, [run])
    predictions = folder / "arms/a.0" / PREDICTIONS
    first_line, *later_lines = predictions.read_text().splitlines(keepends=True)

    unknown_field = {**json.loads(first_line), "grade": 1}
    lines = [first_line, json.dumps(unknown_field) + "\n", *later_lines]
    predictions.write_text("".join(lines))
    with pytest.raises(LayerfuseError, match=r"predictions\.jsonl, line 2 holds grade"):
        summarize(read_runs(folder), "a")

    missing_field = json.loads(first_line)
    del missing_field["family"]
    lines = [json.dumps(missing_field) + "\n", *later_lines]
    predictions.write_text("".join(lines))
    with pytest.raises(LayerfuseError, match=r"predictions\.jsonl, line 1 lacks family"):
        summarize(read_runs(folder), "a")


def test_records_are_read_as_they_were_written(tmp_path: Path):
    guided = answer_to(0, 0, right=True, weights=[0.25, 0.75], controls={"shuffled": False})
    with_separator = answer_to(1, 0, right=False, family="b", answer="line\u2028separator")
    write_records(tmp_path / "answers", [guided, with_separator])
    assert read_records(tmp_path / "answers", AnswerRecord) == [guided, with_separator]

    record = run_record("a", 0, losses={"align": [(1, 2.5), (2, 1.25)]})
    write_records(tmp_path / "runs", [record])
    assert read_records(tmp_path / "runs", RunRecord) == [record]


def test_a_line_separator_in_an_answer_ends_no_record(tmp_path: Path):
    """To Python's splitlines U+2028 ends a line, to JSON it does not."""
    answer = answer_to(0, 0, right=True, answer="line\u2028separator")
    # As other writers of JSON leave it: ours would escape it.
    line = json.dumps(answer.to_json(), ensure_ascii=False)
    (tmp_path / "answers").write_text(line + "\n", encoding="utf-8")

    assert read_records(tmp_path / "answers", AnswerRecord) == [answer]


@pytest.mark.parametrize("file", COMMITTED_STUDIES, ids=lambda file: file.parent.name)
def test_committed_results_stay_readable(file: Path):
    """What finished studies wrote is read as it was written."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]

    written_again = []
    for record in read_records(file, RunRecord):
        text = json.dumps(record.to_json())
        written_again.append(json.loads(text))

    assert written_again == lines


def test_missing_torn_and_double_lines(tmp_path: Path):
    folder = random_study(tmp_path, {"a": 0.5})
    results = folder / "results.jsonl"
    whole = results.read_text()

    results.write_text(whole + whole)
    with pytest.raises(LayerfuseError, match="arm 'a' seed 0 twice"):
        summarize(read_runs(folder), "a")

    # As a full disk leaves it.
    results.write_text(whole[:-9])
    with pytest.raises(LayerfuseError, match="line 2 is not JSON"):
        summarize(read_runs(folder), "a")

    results.write_text(whole)
    (folder / "arms/a.1/predictions.jsonl").unlink()
    with pytest.raises(LayerfuseError, match=r"a\.1/predictions\.jsonl is missing"):
        summarize(read_runs(folder), "a")
