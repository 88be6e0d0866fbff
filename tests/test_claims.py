"""Claims that a recipe states: against a naive reference, in simulated studies, and in words."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from layerfuse.evaluate.claims import JudgedClaim, compare_groups, judge_claims
from layerfuse.evaluate.records import AnswerRecord, FinishedRun
from layerfuse.evaluate.score_table import (
    Bootstrap,
    RunLayout,
    ScoreTable,
    arm_scores,
    family_of,
    picture_weights,
)
from layerfuse.evaluate.significance import Numbers, contrast
from layerfuse.recipe.evaluate_settings import Claim
from layerfuse.study.summary import summarize
from tests.made_up_studies import finished_run, random_answers

BOOTSTRAP = Bootstrap(resamples=60, seed=3)
PICTURES = 40


def claim_of(better: list[str], than: list[str], **more: Any) -> Claim:
    """A claim about these arms."""
    text = f"{better} beat {than}"
    return Claim(claim=text, source="nobody", better=better, than=than, limits="made up", **more)


def runs_of(seeds: dict[str, list[int]], rates: dict[str, float]) -> list[FinishedRun]:
    """Runs of arms that answer this share right; the seeds of all answers differ."""
    runs = []
    for place, (arm, seeds_of_arm) in enumerate(seeds.items()):
        for seed in seeds_of_arm:
            answers = random_answers(rates[arm], seed=100 * place + seed, pictures=PICTURES)
            runs.append(finished_run(arm, seed, answers))
    return runs


def naive_score(answers: Sequence[AnswerRecord], families: str, weights: Numbers) -> float:
    """Macro mean over families, each picture as often as it is drawn."""
    means = []
    for family in families:
        right = 0.0
        asked = 0.0
        for answer in answers:
            if answer.family == family:
                times = weights[int(answer.sample.removeprefix("t-"))]
                right += times * answer.score
                asked += times
        means.append(right / asked)
    return sum(means) / len(means)


def naive_group(
    runs: list[FinishedRun], names: list[str], families: str, weights: Numbers
) -> dict[int, float]:
    """The mean over the arms by seed, where all of them have the seed."""
    scores: dict[int, list[float]] = {}
    for run in runs:
        if run.record.arm in names:
            score = naive_score(run.answers, families, weights)
            scores.setdefault(run.record.seed, []).append(score)
    means = {}
    for seed, of_seed in sorted(scores.items()):
        if len(of_seed) == len(names):
            means[seed] = sum(of_seed) / len(of_seed)
    return means


def naive_noise(table: dict[str, dict[int, float]]) -> dict[str, Any]:
    """The variances of the statistics page, line by line, of arms with two seeds or more."""
    arms = len(table)
    shared_seeds = set.intersection(*[set(scores) for scores in table.values()])
    seeds = len(shared_seeds)
    arm_means = {}
    seed_means = dict.fromkeys(shared_seeds, 0.0)
    for arm, scores in table.items():
        arm_means[arm] = sum(scores[seed] for seed in shared_seeds) / seeds
        for seed in shared_seeds:
            seed_means[seed] += scores[seed] / arms
    grand = sum(arm_means.values()) / arms
    seed_line = 0.0
    for seed in shared_seeds:
        seed_line += arms * (seed_means[seed] - grand) ** 2 / (seeds - 1)
    residuals: dict[str, dict[int, float]] = {}
    residual_line = 0.0
    for arm, scores in table.items():
        residuals[arm] = {}
        for seed in shared_seeds:
            residual = scores[seed] - arm_means[arm] - seed_means[seed] + grand
            residuals[arm][seed] = residual
            residual_line += residual**2 / ((arms - 1) * (seeds - 1))
    if seed_line > residual_line:
        return {
            "blocks": True,
            "left": residuals,
            "v": residual_line,
            "df": (arms - 1) * (seeds - 1),
            "shared": (seed_line - residual_line) / arms,
            "shared_df": seeds - 1,
        }
    left: dict[str, dict[int, float]] = {}
    squares = 0.0
    df = 0
    for arm, scores in table.items():
        mean = sum(scores.values()) / len(scores)
        left[arm] = {seed: score - mean for seed, score in scores.items()}
        squares += sum(value**2 for value in left[arm].values())
        df += len(scores) - 1
    return {
        "blocks": False,
        "left": left,
        "v": squares / df,
        "df": df,
        "shared": 0.0,
        "shared_df": 1,
    }


def naive_group_variance(noise: dict[str, Any], names: list[str]) -> float:
    """The variance of a group's run: of independent arms, or its own if that is larger."""
    arms = len(noise["left"])
    size = len(names)

    def guard(runs: int) -> float:
        return (1 + (0.35 + 0.9 / arms) / (runs - 1) ** 1.5) ** 2

    independent = 0.0
    for name in names:
        left = noise["left"][name].values()
        own = sum(value**2 for value in left) / (len(left) - 1)
        if noise["blocks"]:
            own *= arms / (arms - 1)
        independent += guard(len(left)) * max(noise["v"], own) / size**2
    if size == arms:
        return independent
    seeds = set.intersection(*[set(noise["left"][name]) for name in names])
    together = []
    for seed in seeds:
        together.append(sum(noise["left"][name][seed] for name in names) / size)
    centre = sum(together) / len(together)
    observed = sum((value - centre) ** 2 for value in together) / (len(together) - 1)
    if noise["blocks"]:
        observed *= arms / (arms - size)
    return max(independent, guard(len(together)) * observed)


def naive_comparison(
    runs: list[FinishedRun], better: list[str], than: list[str], families: str
) -> tuple[float, list[float], float]:
    """Difference, interval and p value, by loops."""
    once = np.ones(PICTURES)
    table: dict[str, dict[int, float]] = {}
    for name in dict.fromkeys(run.record.arm for run in runs):
        scores = naive_group(runs, [name], families, once)
        if len(scores) > 1:
            table[name] = scores
    noise = naive_noise(table)
    first = naive_group(runs, better, families, once)
    second = naive_group(runs, than, families, once)
    difference = sum(first.values()) / len(first) - sum(second.values()) / len(second)

    # Every third picture has no question of family b, and is then not drawn.
    shown = [picture for picture in range(PICTURES) if "a" in families or picture % 3]
    pictures = len(shown)
    redrawn = []
    for drawn in picture_weights(pictures, BOOTSTRAP):
        weights = np.zeros(PICTURES)
        weights[shown] = drawn
        a = naive_group(runs, better, families, weights).values()
        b = naive_group(runs, than, families, weights).values()
        redrawn.append(sum(a) / len(a) - sum(b) / len(b))
    left = 0.0
    for seed in set(first) | set(second):
        in_first = 1 / len(first) if seed in first else 0.0
        in_second = 1 / len(second) if seed in second else 0.0
        left += (in_first - in_second) ** 2
    parts = [
        (float(np.var(redrawn, ddof=1)), pictures - 1),
        (naive_group_variance(noise, better) / len(first), noise["df"]),
        (naive_group_variance(noise, than) / len(second), noise["df"]),
        (noise["shared"] * left, noise["shared_df"]),
    ]
    variance = sum(part for part, _ in parts)
    df = variance**2 / sum(part**2 / df_of_part for part, df_of_part in parts)
    error = math.sqrt(variance)
    half = float(stats.t.ppf(0.975, df)) * error
    p = 2 * float(stats.t.sf(abs(difference) / error, df))
    return difference, [difference - half, difference + half], p


EQUAL_SEEDS = {name: [0, 1, 2] for name in "pqrstu"}
# Only seeds 1 and 2 are those of all arms of a group with q.
UNEQUAL_SEEDS = {**EQUAL_SEEDS, "q": [1, 2, 3, 4]}
RATES = {"p": 0.5, "q": 0.55, "r": 0.7, "s": 0.6, "t": 0.65, "u": 0.4}


def with_moved_seeds(runs: list[FinishedRun], arms: str, seed: int) -> list[FinishedRun]:
    """Make the runs of a seed of these arms answer every fourth question rightly."""
    moved = []
    for run in runs:
        answers = list(run.answers)
        if run.record.arm in arms and run.record.seed == seed:
            answers[::4] = [replace(answer, score=1.0) for answer in answers[::4]]
        moved.append(FinishedRun(run.record, answers))
    return moved


@pytest.mark.parametrize("seeds", [EQUAL_SEEDS, UNEQUAL_SEEDS], ids=["equal", "unequal"])
# A seed that moves all arms makes blocks, one that moves a group makes it noisier than its arms.
@pytest.mark.parametrize("moved", ["", "pqrstu", "pq"], ids=["none", "all", "group"])
@pytest.mark.parametrize("families", ["ab", "b"])
def test_groups_are_compared_as_loops_compare_them(
    seeds: dict[str, list[int]], moved: str, families: str
):
    runs = with_moved_seeds(runs_of(seeds, RATES), moved, seed=2)
    claim = claim_of(["p", "q"], ["r", "s", "t"], families=list(families))

    (judged,) = judge_claims([claim], runs, BOOTSTRAP)

    difference, interval, p = naive_comparison(runs, ["p", "q"], ["r", "s", "t"], families)
    assert judged.difference == pytest.approx(difference)
    assert judged.interval == pytest.approx(interval)
    assert judged.p == pytest.approx(p)
    assert judged.better_seeds == ([0, 1, 2] if seeds is EQUAL_SEEDS else [1, 2])
    assert judged.than_seeds == [0, 1, 2]
    assert judged.covers == "pictures and seeds"


def test_two_arms_are_compared_as_the_study_compares_them():
    runs = runs_of(EQUAL_SEEDS, RATES)
    table = ScoreTable.from_runs(runs, BOOTSTRAP, family_of)

    test = compare_groups(claim_of(["r"], ["u"]), table)

    expected = contrast(table.mean, table.arms.index("r"), table.arms.index("u"))
    assert test.contrast.difference == pytest.approx(expected.difference)
    assert test.contrast.interval == pytest.approx(expected.interval)
    assert test.contrast.p == pytest.approx(expected.p)
    assert test.contrast.df == pytest.approx(expected.df)


def test_categories_are_averaged_as_families_are():
    runs = runs_of(EQUAL_SEEDS, RATES)
    renamed = []
    for run in runs:
        answers = [replace(answer, category=f"{answer.family}-like") for answer in run.answers]
        renamed.append(FinishedRun(run.record, answers))
    by_family = claim_of(["p"], ["r"], families=["b"])
    by_category = claim_of(["p"], ["r"], categories=["b-like"])

    first, second = judge_claims([by_family, by_category], renamed, BOOTSTRAP)

    assert first.difference == second.difference
    assert first.p == second.p


def test_to_beat_each_is_to_beat_the_strongest():
    """All are beaten: the largest p value. One scores higher: its own, times their number."""
    runs = runs_of(EQUAL_SEEDS, RATES)
    singles: dict[str, JudgedClaim] = {}
    for name in "pqsu":
        (singles[name],) = judge_claims([claim_of(["t"], [name])], runs, BOOTSTRAP)
    (against_best,) = judge_claims([claim_of(["p"], ["r"])], runs, BOOTSTRAP)

    (beats,) = judge_claims([claim_of(["t"], list("pqsu"), over="each")], runs, BOOTSTRAP)
    (beaten,) = judge_claims([claim_of(["p"], list("qru"), over="each")], runs, BOOTSTRAP)

    differences = {name: single.difference or 0.0 for name, single in singles.items()}
    strongest = min(differences, key=differences.__getitem__)
    assert differences[strongest] > 0
    assert beats.strongest == strongest
    assert beats.difference == differences[strongest]
    assert beats.interval == singles[strongest].interval
    assert beats.p == max(single.p or 0.0 for single in singles.values())
    assert beaten.strongest == "r"
    assert against_best.p is not None
    assert beaten.p == pytest.approx(min(1.0, 3 * against_best.p))


def test_the_largest_p_value_counts_not_that_of_the_strongest():
    """In points: b is close behind a and known well, c is further behind and known badly."""
    runs = np.array([[90.0, 90.1, 89.9], [85.1, 84.9, 85.0], [64.0, 104.0, 84.0]])
    rng = np.random.default_rng(0)
    rates = np.repeat(rng.normal(0, 0.1, (101, 3)), 3, axis=1) + runs.ravel()
    table = table_of_rates(rates, "abc", seeds=3, pictures=200)

    test = compare_groups(claim_of(["a"], ["b", "c"], over="each"), table)

    of_b = compare_groups(claim_of(["a"], ["b"]), table)
    of_c = compare_groups(claim_of(["a"], ["c"]), table)
    assert test.strongest == "b"
    assert of_b.p < of_c.p
    assert test.p == of_c.p


def test_verdicts_are_corrected_for_all_claims():
    runs = runs_of(EQUAL_SEEDS, {**RATES, "r": 0.95, "u": 0.15})
    claims = [
        claim_of(["r"], ["u"]),
        claim_of(["u"], ["r"]),
        claim_of(["u"], ["p", "q", "r", "s", "t"], over="each"),
        claim_of(["p"], ["q"]),
    ]

    judged = judge_claims(claims, runs, BOOTSTRAP)

    verdicts = [row.verdict for row in judged]
    assert verdicts == ["holds", "the opposite", "the opposite", "not resolved"]
    assert judged[2].in_words == "the opposite: r is better"
    by_p = sorted(judged, key=lambda row: row.p or 0.0)
    assert by_p[0].p is not None
    assert by_p[0].p_holm == pytest.approx(4 * by_p[0].p)
    assert [JudgedClaim.from_json(row.to_json()) for row in judged] == judged


def test_what_cannot_be_judged_says_why_and_costs_the_others_nothing():
    runs = runs_of({**EQUAL_SEEDS, "u": [0]}, RATES)
    claims = [
        claim_of(["p"], ["r"]),
        claim_of(["p", "u"], ["r"]),
        claim_of(["p"], ["waiting"]),
        claim_of(["q"], ["r"], families=["reading"]),
        claim_of(["r"], ["u", "q"], over="each"),
    ]

    judged = judge_claims(claims, runs, BOOTSTRAP)

    assert judged[0].p_holm == judged[0].p
    for row, reason in zip(
        judged[1:],
        [
            "fewer than two seeds that the arms share",
            "no result yet of waiting",
            "the test asks nothing of reading",
            "fewer than two seeds that the arms share",
        ],
        strict=True,
    ):
        assert row.verdict == "unjudged"
        assert row.in_words == f"no verdict: {reason}"
    # What has been trained is shown all the same.
    assert judged[1].difference is not None
    assert judged[1].covers == "pictures"
    assert judged[2].difference is None


def test_arms_that_may_learn_more_get_no_verdict_but_their_numbers():
    runs = runs_of(EQUAL_SEEDS, {**RATES, "r": 0.95, "u": 0.15})
    claims = [claim_of(["r"], ["u"]), claim_of(["p"], ["q"]), claim_of(["r"], ["p"])]

    plain = judge_claims(claims, runs, BOOTSTRAP)
    stopped = judge_claims(claims, runs, BOOTSTRAP, unsettled=["u", "q"])

    assert plain[0].verdict == "holds"
    assert stopped[0].in_words == "not trained long enough: 1 of its 2 arms"
    assert stopped[0].difference == plain[0].difference
    assert stopped[0].p_holm == plain[0].p_holm
    # What is not resolved may be, once its arms have learned what they can.
    assert plain[1].verdict == "not resolved"
    assert stopped[1].in_words == "not trained long enough: 1 of its 2 arms"
    assert stopped[1].difference == plain[1].difference
    # A claim about arms that have is left as it was.
    assert stopped[2] == plain[2]


@pytest.mark.parametrize(("loss", "verdict"), [(0.5, "holds"), (0.99, "not trained long enough")])
def test_a_study_that_stopped_too_early_gives_its_claims_no_verdict(loss: float, verdict: str):
    """A loss beside H0 = 1 is that of one who does not look."""
    runs = []
    for run in runs_of(EQUAL_SEEDS, {**RATES, "r": 0.95, "u": 0.15}):
        curve = [(step, loss) for step in range(1, 21)]
        record = replace(run.record, losses={"finetune": curve})
        runs.append(FinishedRun(record, run.answers))

    summary = summarize(
        runs, "u", BOOTSTRAP, blind_losses={"finetune": 1.0}, claims=[claim_of(["r"], ["u"])]
    )

    (row,) = summary.to_json()["claims"]
    assert row["verdict"] == verdict
    assert row["difference"] > 0.3


def table_of_rates(rates: Numbers, arms: Sequence[str], seeds: int, pictures: int) -> ScoreTable:
    """The scores of a study whose runs score as given: (1 + B, A · S), arm by arm."""
    columns = {arm: list(range(k * seeds, (k + 1) * seeds)) for k, arm in enumerate(arms)}
    of_runs = list(range(seeds)) * len(arms)
    mean = arm_scores(rates, np.zeros(len(rates)), RunLayout(columns, of_runs), pictures)
    return ScoreTable(
        groups=["all"],
        arms=list(arms),
        columns=list(columns.values()),
        seeds=of_runs,
        images=pictures,
        rates=rates[:, None, :],
        each=[mean],
        mean=mean,
    )


NULL_CLAIMS = {
    "mean": claim_of(["a", "b", "c", "d"], ["e", "f"]),
    "each": claim_of(["a"], ["b", "c"], over="each"),
    "each of many": claim_of(["a", "b"], ["c", "d", "e", "f"], over="each"),
}
STUDIES = 300


@pytest.mark.parametrize("name", list(NULL_CLAIMS))
@pytest.mark.parametrize("scenario", ["equal", "shared", "together", "unequal"])
def test_without_a_true_difference_few_claims_get_a_verdict(name: str, scenario: str):
    """Six equal arms and three seeds, in points; verdicts at 5 % of both directions together."""
    rng = np.random.default_rng(11)
    arms, seeds, pictures, resamples = 6, 3, 200, 100
    claim = NULL_CLAIMS[name]
    holds = 0
    verdicts = 0
    for _ in range(STUDIES):
        runs = rng.normal(0, 4, (arms, seeds))
        if scenario == "shared":
            # A seed moves all arms alike.
            runs += rng.normal(0, 8, seeds)
        elif scenario == "together":
            # A seed moves those of one kind alike.
            runs[:4] += rng.normal(0, 4, seeds)
        elif scenario == "unequal":
            runs *= np.geomspace(0.5, 3, arms)[rng.permutation(arms), None]
        of_pictures = rng.normal(0, 24, (pictures, arms))
        drawn = rng.multinomial(pictures, np.full(pictures, 1 / pictures), size=resamples)
        weights = np.vstack([np.ones(pictures), drawn])
        # (1 + B, A), then the runs of each arm beside each other
        moved = np.repeat(weights @ of_pictures / pictures, seeds, axis=1)
        test = compare_groups(
            claim, table_of_rates(moved + runs.ravel(), "abcdef", seeds, pictures)
        )
        if test.p < 0.05:
            verdicts += 1
            holds += test.contrast.difference > 0

    # 5 % and two standard errors of so few studies.
    assert verdicts <= STUDIES * (0.05 + 2 * math.sqrt(0.05 * 0.95 / STUDIES))
    # To beat each of several is harder than to beat one.
    assert holds <= STUDIES * (0.025 + 2 * math.sqrt(0.025 * 0.975 / STUDIES))


def test_a_true_difference_of_groups_is_found():
    """Four arms 8 points above two, which no pair of them would show so often."""
    rng = np.random.default_rng(5)
    arms, seeds, pictures = 6, 3, 200
    found = 0
    alone = 0
    for _ in range(100):
        runs = rng.normal(0, 4, (arms, seeds))
        runs[:4] += 8
        moved = rng.normal(0, 1.7, (101, arms))
        rates = np.repeat(moved, seeds, axis=1) + runs.ravel()
        table = table_of_rates(rates, "abcdef", seeds, pictures)
        found += compare_groups(NULL_CLAIMS["mean"], table).p < 0.05
        alone += compare_groups(claim_of(["a"], ["e"]), table).p < 0.05
    assert found > 70
    assert found > alone
