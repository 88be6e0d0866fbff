"""What a study may claim: against naive loops, textbook values and small simulations."""

import math
from dataclasses import dataclass

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


def noise_of(sd: float, df: int) -> st.SeedNoise:
    """Noise between seeds of which only these two numbers matter."""
    return st.SeedNoise(sd=sd, df=df, spread=0.0, spread_arm="a")


GUESS = st.Competitor(score=0.0, samples=np.zeros(1), runs=math.inf)
"""guessing, where only arms are compared"""


def two_arms(
    difference: float,
    item_sd: float,
    noise: st.SeedNoise | None = None,
    runs: tuple[int, int] = (2, 2),
) -> st.Scores:
    """Two arms whose paired difference has exactly this item standard deviation.

    Args:
        difference: of the first arm to the second.
        item_sd: standard deviation of the difference over the resamples.
        noise: between seeds.
        runs: number of seeds of each arm.

    Returns:
        Scores on 101 pictures, 100 degrees of freedom.
    """
    deviations = np.linspace(-1, 1, 2001)
    deviations *= item_sd / deviations.std(ddof=1)
    first = 0.5 + difference + deviations
    second = np.full(2001, 0.5)
    return st.Scores(
        value=np.array([0.5 + difference, 0.5]),
        samples=np.stack([first, second], axis=1),
        runs=np.array(runs),
        chance=GUESS,
        noise=noise,
        images=101,
    )


def contrast_of(
    difference: float,
    item_sd: float,
    noise: st.SeedNoise | None = None,
    runs: tuple[int, int] = (2, 2),
) -> st.Contrast:
    """The first arm of `two_arms` minus the second."""
    return st.contrast(two_arms(difference, item_sd, noise, runs), 0, 1)


def test_items_alone_give_a_plain_t_interval():
    contrast = contrast_of(0.05, item_sd=0.02)

    # The 97.5 % quantile of t with 100 degrees of freedom, and p of t = 0.05 / 0.02.
    half = 1.983972 * 0.02
    assert contrast.interval == pytest.approx([0.05 - half, 0.05 + half])
    assert contrast.p == contrast.item_p == pytest.approx(0.014047, abs=2e-5)


def test_seed_noise_widens_by_welch_satterthwaite():
    contrast = contrast_of(0.05, item_sd=0.02, noise=noise_of(0.03, 4), runs=(2, 3))

    item_variance = 0.02**2
    seed_variance = 0.03**2 * (1 / 2 + 1 / 3)
    variance = item_variance + seed_variance
    df = variance**2 / (item_variance**2 / 100 + seed_variance**2 / 4)
    assert contrast.df == pytest.approx(df)
    half = stats.t.ppf(0.975, df) * math.sqrt(variance)
    assert contrast.interval == pytest.approx([0.05 - half, 0.05 + half])
    assert contrast.item_p < 0.05 < contrast.p


@pytest.mark.parametrize(
    ("difference", "noise", "verdict", "unresolved"),
    [
        (0.10, None, "better", False),
        (-0.10, None, "worse", False),
        (0.01, None, "tie", False),
        # t = 2.1 and t = 1.85; with 100 degrees of freedom 1.98 decides.
        (0.042, None, "better", False),
        (0.037, None, "tie", False),
        # Clear on these pictures, but not for other seeds.
        (0.10, noise_of(0.2, 5), "tie", True),
        (0.01, noise_of(0.2, 5), "tie", False),
    ],
)
def test_verdicts(difference: float, noise: st.SeedNoise | None, verdict: str, unresolved: bool):
    (judged,) = st.judge([contrast_of(difference, item_sd=0.02, noise=noise)])

    assert judged.verdict == verdict
    assert judged.unresolved == unresolved


def test_holm_makes_a_tie_of_one_lucky_arm_in_many():
    lucky = contrast_of(0.045, item_sd=0.02)
    equal = contrast_of(0.0, item_sd=0.02)

    (judged_alone,) = st.judge([lucky])
    judged_among_ten = st.judge([lucky] + [equal] * 9)

    assert judged_alone.verdict == "better"
    assert judged_among_ten[0].verdict == "tie"


def test_equal_answers_tie_and_constant_difference_counts():
    """Where nothing varies, t would be a division by zero."""
    assert contrast_of(0.0, item_sd=0.0).p == 1.0
    assert contrast_of(0.1, item_sd=0.0).p == 0.0


def simulate_equal_arms(rng: np.random.Generator, seed_sd: float) -> st.Numbers:
    """Scores of 40 pictures, 4 arms, 2 seeds, of arms that are equal on average.

    A picture is hard for all arms alike, a little more so for some, and an answer varies besides;
    a seed moves all pictures of its run together.
    """
    picture = rng.normal(0.6, 0.2, (40, 1, 1))
    picture_and_arm = rng.normal(0, 0.15, (40, 4, 1))
    run = rng.normal(0, seed_sd, (1, 4, 2))
    answer = rng.normal(0, 0.1, (40, 4, 2))
    return picture + picture_and_arm + run + answer


@dataclass
class Coverage:
    """In how many simulations an interval holds the true difference, which is 0."""

    pictures_and_seeds: int = 0
    pictures_alone: int = 0

    def count(self, contrast: st.Contrast) -> None:
        low, high = contrast.interval
        self.pictures_and_seeds += low <= 0 <= high
        low, high = contrast.item_interval
        self.pictures_alone += low <= 0 <= high


@pytest.mark.parametrize("seed_sd", [0.0, 0.05])
def test_coverage_of_the_difference(seed_sd: float):
    """Two equal arms, 40 pictures, 2 seeds of 4 arms: 0 lies in at least 95 of 100 intervals."""
    rng = np.random.default_rng(5)
    coverage = Coverage()

    for _ in range(200):
        answers = simulate_equal_arms(rng, seed_sd)
        weights = tables.picture_weights(40, tables.Bootstrap(resamples=200, seed=0))
        # (200, 40) @ (40, 4): the mean score of each arm in each resample
        samples = weights @ answers.mean(axis=2) / 40
        run_scores = answers.mean(axis=0).tolist()
        noise = st.seed_noise(dict(zip("abcd", run_scores, strict=True)))
        scores = st.Scores(
            value=answers.mean(axis=(0, 2)),
            samples=samples,
            runs=np.full(4, 2),
            chance=GUESS,
            noise=noise,
            images=40,
        )
        coverage.count(st.contrast(scores, 0, 1))

    assert 186 <= coverage.pictures_and_seeds <= 200
    # Pictures alone miss what the seeds do.
    assert (coverage.pictures_alone < 170) == (seed_sd > 0)
