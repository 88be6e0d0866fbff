"""What a study may claim: against naive loops, textbook values and small simulations."""

import math

import numpy as np
import pytest
from scipy import stats

from layerfuse.evaluate import score_table as tables
from layerfuse.evaluate import significance as st
from layerfuse.evaluate.records import AnswerRecord
from tests.made_up_studies import answer_to, finished_run, random_answers


def naive_score(answers: list[AnswerRecord], drawn: list[str]) -> float:
    """Macro mean over families of the share right, each picture as often as it is drawn."""
    shares = []
    families = sorted({answer.family for answer in answers})
    for family in families:
        scores = []
        for sample in drawn:
            for answer in answers:
                if answer.sample == sample and answer.family == family:
                    scores.append(answer.score)
        # A resample may draw no picture with a question of this family.
        if scores:
            shares.append(sum(scores) / len(scores))
    return sum(shares) / len(shares)


def test_scores_and_resamples_equal_loops():
    """Two seeds of one arm and one of another, on families of different sizes."""
    runs = [
        finished_run("a", 0, random_answers(0.5, seed=1)),
        finished_run("a", 1, random_answers(0.5, seed=2)),
        finished_run("b", 0, random_answers(0.8, seed=3)),
    ]
    bootstrap = tables.Bootstrap(resamples=5, seed=7)

    table = tables.ScoreTable.from_runs(runs, bootstrap, tables.family_of)

    pictures = sorted({answer.sample for answer in runs[0].answers})
    # The arms are a, b and guessing.
    assert table.mean.value[1] == pytest.approx(naive_score(runs[2].answers, pictures))
    weights = tables.picture_weights(60, bootstrap)
    for resample in range(5):
        drawn = []
        for sample, times in zip(pictures, weights[resample], strict=True):
            drawn += [sample] * int(times)
        scores = [naive_score(run.answers, drawn) for run in runs]
        expected = [(scores[0] + scores[1]) / 2, scores[2]]
        assert table.mean.samples[resample, :2] == pytest.approx(expected)


def table_of(answers: list[AnswerRecord], resamples: int) -> tables.ScoreTable:
    """The scores of one run with these answers, by family."""
    run = finished_run("a", 0, answers)
    bootstrap = tables.Bootstrap(resamples=resamples, seed=0)
    return tables.ScoreTable.from_runs([run], bootstrap, tables.family_of)


def test_bootstrap_is_over_pictures_not_questions():
    """With eight equal answers a picture, the standard error is that of the pictures alone."""
    rng = np.random.default_rng(0)
    right = rng.random(100) < 0.5
    answers = []
    for picture in range(100):
        for question in range(8):
            answers.append(answer_to(picture, question, right=bool(right[picture])))

    table = table_of(answers, resamples=4000)

    # sd / √100; of questions taken for independent ones it would be sd / √800.
    standard_error = table.mean.samples[:, 0].std()
    assert standard_error == pytest.approx(right.std() / 10, rel=0.05)


def test_questions_sharing_an_image_are_one_cluster():
    answers = []
    for picture in range(20):
        image = f"{picture // 2}.png"
        answers.append(answer_to(picture, 0, right=picture % 2 == 0, image=image))

    table = table_of(answers, resamples=50)

    assert table.images == 10
    # Each image holds one right and one wrong answer: which are drawn does not matter.
    assert table.mean.samples[:, 0].std() == 0


def test_chance_is_the_share_of_the_commonest_answer():
    answers = []
    for picture, colour in enumerate(["red", "red", "blue", "green"]):
        answers.append(
            answer_to(
                picture,
                0,
                family="colour",
                answer=colour,
                right=True,
            )
        )
    for picture, count in enumerate(["1", "1", "2", "2"]):
        answers.append(
            answer_to(
                picture,
                1,
                family="count",
                answer=count,
                right=False,
            )
        )

    table = table_of(answers, resamples=10)

    assert tables.commonest_answers(answers) == {"colour": "red", "count": "1"}
    assert [scores.chance.score for scores in table.each] == [0.5, 0.5]


def test_one_who_does_not_look_is_scored_as_models_are() -> None:
    """Spellings that are one answer to a model's score are one answer to guess."""
    answers = []
    for picture, said in enumerate(["yes", "Yes", "yes.", "YES", "no", "no"]):
        answers.append(answer_to(picture, 0, family="closed", answer=said, right=False))

    table = table_of(answers, resamples=10)

    assert tables.commonest_answers(answers) == {"closed": "yes"}
    assert table.each[0].chance.score == pytest.approx(4 / 6)


def test_interval_at_the_edge_is_exact():
    """All right, all wrong, and in between the percentiles. 0.884297 = 0.025^(1/30)."""
    ones = np.ones(100)
    zeros = np.zeros(100)
    assert st.interval(1.0, ones, 30) == [pytest.approx(0.884297, abs=1e-6), 1.0]
    assert st.interval(0.0, zeros, 30) == [0.0, pytest.approx(0.115703, abs=1e-6)]
    assert st.interval(0.5, np.arange(1001.0), 30) == [25.0, 975.0]


@pytest.mark.parametrize("images", [1, 2, 30, 400])
@pytest.mark.parametrize("right", [False, True])
def test_interval_at_the_edge_is_that_of_clopper_and_pearson(images: int, right: bool):
    """Its end is the share at which so many right (or wrong) in a row have a chance of 2.5 %."""
    score = float(right)
    samples = np.full(10, score)

    low, high = st.interval(score, samples, images)

    # share ** images = 0.025: so many pictures in a row, each with this chance.
    share = 0.025 ** (1 / images)
    expected = [0.0, 1 - share]
    if right:
        expected = [share, 1.0]
    assert low == pytest.approx(expected[0], abs=1e-12)
    assert high == pytest.approx(expected[1], abs=1e-12)


def test_holm_textbook_values():
    """4 · 0.005, 3 · 0.01, 2 · 0.03, and never less than the one before."""
    adjusted = st.holm([0.01, 0.04, 0.03, 0.005])
    assert adjusted == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert st.holm([0.9, 0.8]) == [1.0, 1.0]


def test_seed_noise_is_pooled():
    """An arm of one seed says nothing of the noise."""
    noise = st.seed_noise({"a": [0.5, 0.6], "b": [0.7, 0.7, 0.73], "c": [0.1]})

    assert noise is not None
    # Variances weighted by their degrees of freedom, 1 and 2.
    variance_a = np.var([0.5, 0.6], ddof=1)
    variance_b = np.var([0.7, 0.7, 0.73], ddof=1)
    pooled_variance = (variance_a + 2 * variance_b) / 3
    assert noise.sd == pytest.approx(math.sqrt(pooled_variance))
    assert noise.df == 3
    assert noise.spread == pytest.approx(0.1)
    assert noise.spread_arm == "a"
    assert st.seed_noise({"a": [0.5], "b": [0.7]}) is None


GUESS = st.Competitor(score=0.0, samples=np.zeros(1))
"""guessing, where only arms are compared"""
ONE_SEED = ((0.0,), (0.0,))
"""how far the runs of two arms lie from their means: each arm has one"""
CALM = ((0.0, 0.0), (0.0, 0.0))
"""two runs each that score the same"""
NOISY = ((0.1, -0.1), (-0.1, 0.1))

Deviations = tuple[tuple[float, ...], tuple[float, ...]]


def two_arms(difference: float, item_sd: float, runs: Deviations) -> st.Scores:
    """Two arms whose paired difference has exactly this item standard deviation.

    Args:
        difference: of the first arm to the second.
        item_sd: standard deviation of the difference over the resamples.
        runs: how far the runs of each arm lie from its mean.

    Returns:
        Scores on 101 pictures, 100 degrees of freedom.
    """
    deviations = np.linspace(-1, 1, 2001)
    deviations *= item_sd / deviations.std(ddof=1)
    first = 0.5 + difference + deviations
    second = np.full(2001, 0.5)
    value: st.Numbers = np.array([0.5 + difference, 0.5])
    return st.Scores(
        value=value,
        samples=np.stack([first, second], axis=1),
        runs=value[:, None] + np.array(runs),
        chance=GUESS,
        noise=None,
        images=101,
    )


def contrast_of(difference: float, item_sd: float, runs: Deviations = CALM) -> st.Contrast:
    """The first arm of `two_arms` minus the second."""
    return st.contrast(two_arms(difference, item_sd, runs), 0, 1)


def test_items_alone_give_a_plain_t_interval():
    contrast = contrast_of(0.05, item_sd=0.02)

    # The 97.5 % quantile of t with 100 degrees of freedom, and p of t = 0.05 / 0.02.
    half = 1.983972 * 0.02
    assert contrast.interval == pytest.approx([0.05 - half, 0.05 + half])
    assert contrast.p == contrast.item_p == pytest.approx(0.014047, abs=2e-5)


def test_seed_noise_widens_by_welch_satterthwaite():
    """Two unpaired arms of two runs: variances 0.0002 and 0.0002, guarded by 1.8 squared."""
    contrast = contrast_of(0.05, item_sd=0.02, runs=((0.01, -0.01), (-0.01, 0.01)))

    item_variance = 0.02**2
    run_variance = 0.0002 * 1.8**2
    of_one_mean = run_variance / 2
    variance = item_variance + 2 * of_one_mean
    # The pooled variance has two degrees of freedom.
    df = variance**2 / (item_variance**2 / 100 + 2 * of_one_mean**2 / 2)
    assert contrast.df == pytest.approx(df)
    half = stats.t.ppf(0.975, df) * math.sqrt(variance)
    assert contrast.interval == pytest.approx([0.05 - half, 0.05 + half])
    assert contrast.covers == "pictures and seeds"
    assert contrast.item_p < 0.05 < contrast.p


@pytest.mark.parametrize(
    ("difference", "runs", "verdict", "unresolved"),
    [
        (0.10, CALM, "better", False),
        (-0.10, CALM, "worse", False),
        (0.01, CALM, "tie", False),
        # t = 2.1 and t = 1.85; with 100 degrees of freedom 1.98 decides.
        (0.042, CALM, "better", False),
        (0.037, CALM, "tie", False),
        # Clear on these pictures, but not for other seeds.
        (0.10, NOISY, "tie", True),
        (0.01, NOISY, "tie", False),
        (0.10, ONE_SEED, "unjudged", False),
    ],
)
def test_verdicts(difference: float, runs: Deviations, verdict: str, unresolved: bool):
    (judged,) = st.judge([contrast_of(difference, item_sd=0.02, runs=runs)])

    assert judged.verdict == verdict
    assert judged.unresolved == unresolved


def test_holm_makes_a_tie_of_one_lucky_arm_in_many():
    lucky = contrast_of(0.045, item_sd=0.02)
    equal = contrast_of(0.0, item_sd=0.02)

    (judged_alone,) = st.judge([lucky])
    judged_among_ten = st.judge([lucky] + [equal] * 9)

    assert judged_alone.verdict == "better"
    assert judged_among_ten[0].verdict == "tie"


def test_arms_without_a_verdict_make_no_other_verdict_harder():
    lucky = contrast_of(0.045, item_sd=0.02)
    unjudged = contrast_of(0.045, item_sd=0.02, runs=ONE_SEED)

    judged = st.judge([lucky] + [unjudged] * 9)

    assert judged[0].verdict == "better"
    assert judged[0].p_holm == lucky.p


def test_equal_answers_tie_and_constant_difference_counts():
    """Where nothing varies, t would be a division by zero."""
    assert contrast_of(0.0, item_sd=0.0).p == 1.0
    assert contrast_of(0.1, item_sd=0.0).p == 0.0


def test_trained_models_are_compared_by_pictures_alone():
    """With or without its guidance it is the same model: its seeds say nothing."""
    noisy = two_arms(0.05, item_sd=0.02, runs=NOISY)

    assert st.contrast_of_models(noisy, 0, 1).p == st.contrast(noisy, 0, 1).item_p


def test_the_interval_of_a_mean_holds_seeds_where_there_are_two():
    scores = two_arms(0.1, item_sd=0.02, runs=((0.01, -0.01), (-0.01, 0.01)))
    once = two_arms(0.1, item_sd=0.02, runs=ONE_SEED)

    with_seeds = st.arm_score(scores, 0)
    pictures_alone = st.arm_score(once, 0)

    run_variance = 0.0002 * 1.8**2 / 2
    variance = 0.02**2 + run_variance
    df = variance**2 / (0.02**4 / 100 + run_variance**2 / 2)
    half = stats.t.ppf(0.975, df) * math.sqrt(variance)
    assert with_seeds.interval == pytest.approx([0.6 - half, 0.6 + half])
    assert with_seeds.covers == "pictures and seeds"
    assert pictures_alone.interval == st.percentiles(once.samples[:, 0])
    assert pictures_alone.covers == "pictures"


def test_two_arms_are_separable_as_their_difference_is_significant():
    """With two arms there is one pair: the studentized range is √2 t."""
    contrast = contrast_of(0.045, item_sd=0.02)

    assert st.range_p(contrast, arms=2) == pytest.approx(contrast.p, rel=1e-4)
    assert st.range_p(contrast, arms=5) > 3 * contrast.p


@pytest.mark.parametrize(("difference", "inseparable"), [(0.1, False), (0.03, True)])
def test_arms_that_may_be_as_good_as_the_first(difference: float, inseparable: bool):
    scores = two_arms(difference, item_sd=0.02, runs=CALM)

    assert st.inseparable_from_first(scores) == [True, inseparable]
