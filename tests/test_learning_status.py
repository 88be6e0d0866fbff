"""Whether runs had learned what they could: the rule, its scale, and what it says of real runs."""

import json
from collections import Counter
from dataclasses import replace
from math import log
from pathlib import Path
from statistics import NormalDist

import pytest

from layerfuse.data.lazy_records import Samples
from layerfuse.data.sources import load
from layerfuse.evaluate.learning_status import (
    ACCURACY_GAIN,
    ArmLearning,
    RunLearning,
    blind_loss,
    gain_of_last_quarter,
    judge_arm,
    judge_learning,
    judge_run,
    not_trained_long_enough,
)
from layerfuse.evaluate.records import CurvePoint, RunRecord, read_records
from layerfuse.recipe.data_source import Data
from tests import tiny
from tests.made_up import run_record
from tests.studies import write_samples

RESULTS = Path(__file__).parent.parent / "results"
H0 = {"finetune": 1.0}


def run_with(
    late: float,
    end: float,
    accuracies: dict[float, float] | None = None,
) -> RunRecord:
    """A run of 100 steps whose loss is `late` up to step 90 and `end` after it.

    Args:
        late: so that, with an H0 of 1, I(0.7) is one less this.
        end: so that I(1) is one less this.
        accuracies: on validation questions, by the share of training.
    """
    curve = [(step, late if step <= 90 else end) for step in range(1, 101)]
    along = []
    for share, accuracy in (accuracies or {}).items():
        point = CurvePoint(
            share=share,
            stage="finetune",
            step=round(100 * share),
            samples=round(800 * share),
            accuracy=accuracy,
            families={},
            loss=1.0,
        )
        along.append(point)
    # The stage before is another task, whose losses say nothing.
    losses = {"align": [(1, 9.0)], "finetune": curve}
    return replace(run_record("a", 0, losses=losses), along=along)


@pytest.mark.parametrize(
    ("late", "end", "state"),
    [
        (1.0, 1.001, "failed"),
        (1.0, 0.999, "blind"),
        (0.95, 0.901, "blind"),
        # Has left the plateau, and is on its way.
        (0.95, 0.899, "still improving"),
        # Of what it knows in the end, it has learned 0.12 in the last three tenths.
        (0.5, 0.431, "still improving"),
        (0.5, 0.433, "flat"),
        (0.5, 0.5, "flat"),
        # It forgets: that is no learning.
        (0.4, 0.5, "flat"),
    ],
)
def test_the_loss_at_the_end_decides(late: float, end: float, state: str) -> None:
    verdict = judge_run(run_with(late, end), H0)

    assert verdict.state == state
    assert verdict.information == pytest.approx(1 - end)
    assert verdict.information_gain == pytest.approx(late - end)


def test_losses_are_averaged_over_tenths_of_the_steps() -> None:
    """From step 1 on: L(1) is of steps 91 to 100, L(0.7) of 61 to 70."""
    curve = [(step, step / 1000) for step in range(1, 101)]
    record = run_record("a", 0, losses={"finetune": curve})

    verdict = judge_run(record, H0)

    assert verdict.information == pytest.approx(1 - 0.0955)
    assert verdict.information_gain == pytest.approx(0.0655 - 0.0955)


@pytest.mark.parametrize(
    ("accuracies", "state"),
    [
        ({0.75: 0.80, 1.0: 0.819}, "flat"),
        ({0.75: 0.80, 1.0: 0.821}, "still improving"),
        # In half of the training twice as much may be gained.
        ({0.5: 0.80, 1.0: 0.839}, "flat"),
        ({0.5: 0.80, 1.0: 0.841}, "still improving"),
        # What is nearest to a quarter counts.
        ({0.5: 0.10, 0.7: 0.80, 0.9: 0.10, 1.0: 0.81}, "flat"),
        # Points that say nothing of the end leave it to the losses.
        ({0.25: 0.80, 0.75: 0.80}, "still improving"),
        ({0.25: 0.80, 1.0: 0.80}, "still improving"),
        ({0.95: 0.80, 1.0: 0.80}, "still improving"),
    ],
)
def test_validation_decides_where_it_was_measured(
    accuracies: dict[float, float],
    state: str,
) -> None:
    """The losses of this run say that it still improves."""
    assert judge_run(run_with(0.5, 0.4, accuracies), H0).state == state


def test_accuracy_is_compared_within_a_stage() -> None:
    """Before the last stage was its task, nobody had learned it."""
    run = run_with(0.5, 0.5, {0.75: 0.0, 1.0: 0.8})
    earlier, last = run.along

    assert judge_run(run, H0).state == "still improving"
    in_two_stages = replace(run, along=[replace(earlier, stage="align"), last])
    assert judge_run(in_two_stages, H0).state == "flat"


def test_validation_takes_no_blind_run_for_a_flat_one() -> None:
    run = run_with(1.0, 0.99, {0.75: 0.2, 1.0: 0.2})

    assert judge_run(run, H0).state == "blind"


def test_without_h0_and_validation_nothing_is_judged() -> None:
    unjudged = RunLearning("not judged", None, None, None)

    assert judge_run(run_with(0.5, 0.4), {"finetune": None}) == unjudged
    assert judge_run(run_with(0.5, 0.4), {}) == unjudged
    assert judge_run(run_record("a", 0), H0) == unjudged
    with_validation = run_with(0.5, 0.4, {0.75: 0.5, 1.0: 0.5})
    assert judge_run(with_validation, {}).state == "flat"


def verdicts(*ends: float) -> list[RunLearning]:
    """Runs whose losses do not move, with these at their ends."""
    return [judge_run(run_with(end, end), H0) for end in ends]


IMPROVING = judge_run(run_with(0.5, 0.4), H0)


def gained(*points: float) -> list[RunLearning]:
    """Runs that know much, with these gains on validation questions in their last quarters."""
    of_runs = []
    for gain in points:
        along = {0.75: 0.8, 1.0: 0.8 + gain / 100}
        of_runs.append(judge_run(run_with(0.1, 0.1, along), H0))
    return of_runs


@pytest.mark.parametrize(
    ("runs", "text", "settled"),
    [
        (verdicts(0.4, 0.5, 0.6), "flat", True),
        (verdicts(0.95, 0.95), "blind", False),
        # The means decide, of information (0.6 and 0.5) and of its gain (0.1 and 0).
        ([IMPROVING, *verdicts(0.5, 0.5)], "flat, 2 of 3 runs", True),
        ([IMPROVING, IMPROVING, IMPROVING, *verdicts(0.5)], "still improving, 3 of 4 runs", False),
        (gained(1.0, 1.9), "flat", True),
        # Two runs of three gain more than 2 points, but not the arm.
        (gained(2.2, 2.2, -1.0), "flat, 1 of 3 runs", True),
        (gained(4.0, 1.0), "still improving, +2.5 points in the last quarter", False),
        # One run without the measurement: its losses decide.
        ([*gained(4.0, 4.0), *verdicts(0.1)], "flat, 1 of 3 runs", True),
        (verdicts(0.95, 0.85, 0.2), "unstable, 2 of 3 runs left the plateau", False),
        (verdicts(1.2, 0.95), "failed, 1 of 2 runs", False),
        ([RunLearning("not judged", None, None, None)], "not judged", True),
    ],
)
def test_an_arm_is_what_its_runs_are_in_the_mean(
    runs: list[RunLearning],
    text: str,
    settled: bool,
) -> None:
    arm = judge_arm(runs)

    assert arm.text == text
    assert arm.settled == settled


FLAT = judge_arm(verdicts(0.5))
BLIND = judge_arm(verdicts(0.95))


@pytest.mark.parametrize(
    ("others", "says_nothing"),
    [
        ([FLAT, FLAT], False),
        ([FLAT, FLAT, BLIND], False),
        ([FLAT, BLIND, BLIND], True),
        ([BLIND, BLIND, BLIND], True),
    ],
)
def test_a_study_of_half_unsettled_arms_says_nothing(
    others: list[ArmLearning],
    says_nothing: bool,
) -> None:
    arms = {"base": FLAT}
    for number, arm in enumerate(others):
        arms[str(number)] = arm

    assert not_trained_long_enough(arms, "base") == says_nothing


def test_nothing_is_compared_with_an_unsettled_baseline() -> None:
    arms = {"base": BLIND, "a": FLAT, "b": FLAT, "c": FLAT}

    assert not_trained_long_enough(arms, "base")
    assert not not_trained_long_enough(arms, "a")


def test_a_study_of_which_nothing_is_known_is_reported_as_before() -> None:
    unjudged = judge_arm([RunLearning("not judged", None, None, None)])

    assert not not_trained_long_enough({"base": unjudged, "a": unjudged}, "base")
    assert not not_trained_long_enough({}, "base")


def samples_with(folder: Path, talks: list[list[tuple[str, str]]]) -> Samples:
    """Conversations of these questions and answers, without pictures."""
    records = []
    for number, talk in enumerate(talks):
        turns = []
        for question, answer in talk:
            turns.append({"from": "human", "value": question})
            turns.append({"from": "gpt", "value": answer})
        records.append({"id": str(number), "conversations": turns})
    write_samples(folder, records)
    return load(Data(path=str(folder / "data.json")))


def test_h0_is_the_surprise_of_answers_whose_frequencies_are_known(tmp_path: Path) -> None:
    """Against the definition, answer by answer."""
    processor = tiny.processor(tiny.model())
    talks = []
    for number in range(60):
        colour = ("colour?", "red" if number % 3 else "blue")
        count = ("count?", "1 2" if number % 2 else "3")
        talks.append([colour, count])
    samples = samples_with(tmp_path, talks)
    asked = [turn for talk in talks for turn in talk]
    pairs = Counter(asked)
    surprise = 0.0
    labels = 0
    for question, answer in asked:
        surprise -= log(pairs[question, answer] / 60)
        # Each answer has a token more: the one that ends it.
        labels += len(processor.tokenizer(answer, add_special_tokens=False).input_ids) + 1

    loss = blind_loss(samples, processor, "chat")

    assert loss == pytest.approx(surprise / labels)


def test_free_text_has_no_h0(tmp_path: Path) -> None:
    """One who has counted answers knows nothing of texts that come once."""
    talks = [[("what?", f"a {number}")] for number in range(40)]
    samples = samples_with(tmp_path, talks)

    assert blind_loss(samples, tiny.processor(tiny.model()), "chat") is None


@pytest.mark.parametrize("name", ["local-full", "local-selection", "local-strategies"])
def test_what_committed_results_say_follows_from_their_runs(name: str) -> None:
    """None of these 63 runs reached its plateau."""
    folder = RESULTS / name
    summary = json.loads((folder / "summary.json").read_text())
    blind_losses = json.loads((folder / "learning.json").read_text())["blind_loss"]

    arms = judge_learning(read_records(folder / "results.jsonl", RunRecord), blind_losses)

    committed = {}
    for arm, content in summary["learning"].items():
        committed[arm] = ArmLearning.from_json(content)
    assert committed == arms
    assert not_trained_long_enough(arms, summary["baseline"])
    assert summary["findings"]["headline"].startswith("Not trained long enough to say")
    for arm in arms.values():
        assert all(run.state != "flat" for run in arm.runs)


WHITENED = ("quickstart", "scenes-selection", "scenes-strategies")
"""Studies whose arms come to their plateau: elsewhere gains differ by how far arms have come."""


def pooled_deviation_of_gains() -> tuple[float, int]:
    """Between the seeds of an arm, in points, over the studies that the page names."""
    squares = 0.0
    degrees = 0
    num_arms = 0
    files = [RESULTS / name / "results.jsonl" for name in WHITENED]
    files += sorted(RESULTS.glob("training-length/*.jsonl"))
    for file in files:
        gains: dict[str, list[float]] = {}
        for record in read_records(file, RunRecord):
            gain = gain_of_last_quarter(record.along)
            if gain is not None:
                gains.setdefault(record.arm, []).append(100 * gain)
        for of_arm in gains.values():
            mean = sum(of_arm) / len(of_arm)
            squares += sum((gain - mean) ** 2 for gain in of_arm)
            degrees += len(of_arm) - 1
            num_arms += 1
    return (squares / degrees) ** 0.5, num_arms


def test_the_page_states_the_noise_of_gains_and_what_follows_from_it() -> None:
    """These results may be made again: the page must then be written again."""
    page = (RESULTS.parent / "docs" / "training-length.md").read_text("utf-8")
    deviation, num_arms = pooled_deviation_of_gains()

    assert f"by {deviation:.2f}\npoints" in page
    assert f"the {num_arms} arms of scenes" in page
    for runs, name in enumerate(("one run", "two runs", "three runs"), start=1):
        noise = NormalDist(0, round(deviation, 2) / runs**0.5)
        cells = []
        for gain in (0.5, 1.0, 1.5, 2.5, 3.0):
            improving = noise.cdf(gain - 100 * ACCURACY_GAIN)
            cells.append(f"{100 * improving:.0f} %")
        assert f"| {name} | {' | '.join(cells)} |" in page
