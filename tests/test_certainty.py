"""How sure a study is, in plain words: every word is backed by the verdicts and noise it has."""

from dataclasses import replace

import pytest

from layerfuse.evaluate.learning_status import ArmLearning, RunLearning, RunState
from layerfuse.evaluate.records import FinishedRun
from layerfuse.study.certainty import covered_by_intervals, how_sure
from layerfuse.study.summary import Summary, summarize
from tests.made_up_studies import finished_run, random_answers


def runs_of(rates: dict[str, float], seeds: int) -> list[FinishedRun]:
    """An arm for each rate of right answers; its seeds differ by chance."""
    runs = []
    for place, (arm, rate) in enumerate(rates.items()):
        for seed in range(seeds):
            answers = random_answers(rate, seed=100 * place + seed, pictures=150)
            runs.append(finished_run(arm, seed, answers))
    return runs


def answers_of(summary: Summary) -> list[str]:
    return [point.answer for point in how_sure(summary)]


@pytest.fixture(scope="module")
def judged() -> Summary:
    """A baseline, an arm that is far better and one that is as good."""
    return summarize(runs_of({"base": 0.5, "high": 0.95, "same": 0.52}, seeds=3), "base")


def with_states(summary: Summary, states: dict[str, RunState]) -> Summary:
    """The same study, whose arms had learned so much."""
    learning = {}
    for arm, state in states.items():
        learning[arm] = ArmLearning(state, 1, [RunLearning(state, 0.5, 0.0, None)])
    return replace(summary, learning=learning)


def test_resolved_differences_are_those_with_a_verdict(judged: Summary) -> None:
    resolved, smallest, evidence, _ = answers_of(judged)

    high, *_ = judged.arms
    assert high.versus_baseline is not None
    difference = 100 * high.versus_baseline.difference
    assert resolved == (
        f"1 of 2 to the baseline base: high (+{difference:.1f}) better. 1 ties with it, so that "
        "which is better stays open: same."
    )
    assert judged.resolvable is not None
    assert smallest.startswith(f"One of {100 * judged.resolvable:.1f} points to the baseline")
    assert smallest.endswith(f"The largest that was measured is {difference:.1f}.")
    assert judged.noise is not None
    assert evidence == (
        f"3 seeds an arm; 150 pictures with {judged.items} questions. Another seed moves an arm by "
        f"{100 * judged.noise.sd:.1f} points (one sd)."
    )


@pytest.mark.parametrize(
    ("states", "said"),
    [
        # What an arm has won it keeps; a tie it may still win.
        (
            {"base": "flat", "high": "still improving", "same": "still improving"},
            " better. More training might change what was measured of same.",
        ),
        # Beside a baseline that may rise, no lead is safe.
        (
            {"base": "still improving", "high": "flat", "same": "flat"},
            "0 of 2 to the baseline base. More training might change what was measured of high and "
            "same.",
        ),
    ],
)
def test_what_more_training_might_change_is_not_called_resolved(
    states: dict[str, RunState], said: str, judged: Summary
) -> None:
    resolved, *_ = answers_of(with_states(judged, states))
    assert resolved.endswith(said)


def test_one_seed_resolves_nothing() -> None:
    resolved, smallest, evidence, _ = answers_of(
        summarize(runs_of({"base": 0.5, "high": 0.95}, seeds=1), "base")
    )

    assert resolved.startswith("None can be called")
    assert smallest.startswith("Not known")
    assert evidence.startswith("1 seed an arm; ")


def test_a_lone_baseline_is_compared_with_nothing() -> None:
    resolved, *_ = answers_of(summarize(runs_of({"base": 0.5}, seeds=2), "base"))

    assert resolved == "Nothing is compared yet: only the baseline base has finished."


@pytest.mark.parametrize(
    ("states", "said"),
    [
        (
            {"base": "flat", "high": "flat", "same": "blind"},
            "2 of 3 arms had learned what they could. Not yet: same.",
        ),
        (
            {"base": "still improving", "high": "flat", "same": "flat"},
            "2 of 3 arms had learned what they could. Not yet: base. What is beyond noise may then "
            "be who learned faster, not who can do more.",
        ),
        (
            {"base": "flat", "high": "flat", "same": "not judged"},
            "2 of 2 arms had learned what they could. Of 1 more it is not known.",
        ),
        (
            {"base": "not judged"},
            "Not known: that needs short answers that repeat, or validation questions that are "
            "asked along training.",
        ),
    ],
)
def test_arms_that_were_still_improving_are_named(
    states: dict[str, RunState], said: str, judged: Summary
) -> None:
    *_, reached = answers_of(with_states(judged, states))
    assert reached == said


def test_captions_say_what_the_intervals_of_the_arms_are_over() -> None:
    both = runs_of({"base": 0.5, "high": 0.9}, seeds=3)
    one_seed = [run for run in both if run.record.seed == 0]
    mixed = both[:4]

    assert covered_by_intervals(summarize(both, "base")) == "over pictures and seeds"
    assert covered_by_intervals(summarize(one_seed, "base")) == (
        "over pictures alone, since every arm has one seed"
    )
    assert covered_by_intervals(summarize(mixed, "base")) == (
        "over pictures and seeds (over pictures alone for high, with one seed)"
    )


def test_the_interval_of_a_mean_includes_the_noise_of_seeds() -> None:
    """Six runs whose scores differ, and six copies of one run: what differs is the seeds."""
    noisy = runs_of({"base": 0.5}, seeds=1)
    steady = runs_of({"base": 0.5}, seeds=1)
    for seed in range(1, 6):
        rate = 0.5 + (-1) ** seed * 0.2
        noisy.append(finished_run("base", seed, random_answers(rate, seed=seed, pictures=150)))
        steady.append(finished_run("base", seed, steady[0].answers))

    [wide] = summarize(noisy, "base").arms
    [narrow] = summarize(steady, "base").arms

    assert wide.mean.covers == narrow.mean.covers == "pictures and seeds"
    width = wide.mean.interval[1] - wide.mean.interval[0]
    assert width > 1.5 * (narrow.mean.interval[1] - narrow.mean.interval[0])
