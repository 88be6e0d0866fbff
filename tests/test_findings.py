"""What is said about a study, sentence by sentence, for each way in which it can end."""

from dataclasses import dataclass

import pytest

from layerfuse.evaluate.learning_status import ArmLearning, RunLearning, judge_arm
from layerfuse.evaluate.significance import ArmScore, JudgedContrast, SeedNoise
from layerfuse.study.findings import state_findings
from layerfuse.study.guidance_effect import GuidanceRow
from layerfuse.study.summary import ArmSummary, ChanceScores, LayerLeader, Summary
from layerfuse.study.training_status import ProbeComparison


@dataclass(frozen=True)
class ArmOutcome:
    """How an arm compares with the baseline."""

    difference: float
    """as a share of 1; its interval reaches 0.02 to both sides"""
    verdict: str
    first: bool = False
    """whether no arm is measurably better"""
    unresolved: bool = False


BETTER = ArmOutcome(0.05, "better", first=True)
# Beats the baseline, but is itself beaten by another arm.
LESS_BETTER = ArmOutcome(0.02, "better")
TIE = ArmOutcome(0.01, "tie")
# A difference on these pictures, which other seeds might not show.
UNRESOLVED = ArmOutcome(0.03, "tie", unresolved=True)
WORSE = ArmOutcome(-0.05, "worse")
# It or the baseline has one seed.
UNJUDGED = ArmOutcome(0.05, "unjudged")
# The baseline is not compared with itself.
BASELINE = None

Outcomes = dict[str, ArmOutcome | None]


def contrast_of(difference: float, verdict: str, unresolved: bool = False) -> JudgedContrast:
    """A difference with its verdict; no sentence tells its p values, which do not fit it."""
    interval = [difference - 0.02, difference + 0.02]
    return JudgedContrast(
        difference=difference,
        interval=interval,
        item_interval=interval,
        error=0.01,
        df=9.0,
        p=1.0,
        item_p=1.0,
        covers="pictures and seeds",
        measured=verdict != "unjudged",
        p_holm=1.0,
        verdict=verdict,
        unresolved=unresolved,
    )


def arm_with(arm: str, outcome: ArmOutcome | None, above_chance: bool) -> ArmSummary:
    """An arm of one layer and one run with this outcome; None is the baseline's."""
    # As of the baseline itself.
    difference = 0.0
    first = False
    versus_baseline = None
    if outcome is not None:
        difference = outcome.difference
        first = outcome.first
        versus_baseline = contrast_of(difference, outcome.verdict, outcome.unresolved)
    chance_verdict = "tie"
    if above_chance:
        chance_verdict = "better"
    return ArmSummary(
        arm=arm,
        layers=[1],
        depth=12,
        fusion={"name": "single"},
        kind="baseline",
        seeds=[0],
        parameters={},
        seconds=[{}],
        mean=ArmScore(0.6 + difference, [0.5, 0.7]),
        seed_means=[0.6 + difference],
        families={},
        categories={},
        seen=None,
        novel=None,
        versus_chance=contrast_of(0.2 + difference, chance_verdict),
        versus_baseline=versus_baseline,
        first=first,
    )


def summary_of(
    outcomes: Outcomes,
    *,
    above_chance: bool = True,
    seed_noise: bool = True,
    single_layer: tuple[str, ...] = (),
    leaders: tuple[LayerLeader, ...] = (),
    guidance: tuple[GuidanceRow, ...] = (),
    learning: dict[str, ArmLearning] | None = None,
    probes: dict[str, ProbeComparison] | None = None,
) -> Summary:
    """A summary of arms with these outcomes, in the order of their scores.

    Args:
        outcomes: by arm; the baseline is called `base`.
        above_chance: whether the arms have learned anything.
        seed_noise: whether arms have two seeds.
        single_layer: names of the arms that use one layer.
        leaders: the best single-layer arm of each family.
        guidance: of guided arms and their controls.
        learning: what the arms had learned.
        probes: of arms whose layers were probed.
    """
    arms = []
    for arm, outcome in outcomes.items():
        arms.append(arm_with(arm, outcome, above_chance))
    noise = None
    if seed_noise:
        noise = SeedNoise(sd=0.02, df=3, spread=0.03, spread_arm="base")
    return Summary(
        baseline="base",
        resamples=2000,
        runs=len(arms),
        items=100,
        images=50,
        families=[],
        chance=ChanceScores(mean=0.4, families={}),
        noise=noise,
        resolvable=0.042,
        single_layer=list(single_layer),
        leaders=list(leaders),
        arms=arms,
        guidance=list(guidance),
        learning=learning or {},
        probes=probes or {},
    )


@pytest.mark.parametrize(
    ("outcomes", "sentence"),
    [
        # Of one arm that wins, the number is told; what ties with the baseline is not.
        (
            {"a": BETTER, "b": TIE, "base": BASELINE},
            "a beats the baseline base by 5.0 points (95 % interval 3.0 to 7.0).",
        ),
        (
            {"a": BETTER, "b": BETTER, "base": BASELINE, "c": WORSE},
            "a and b beat the baseline base; a scores highest, and b is not separable from it; "
            "c is worse.",
        ),
        (
            {"a": BETTER, "b": LESS_BETTER, "base": BASELINE},
            "a and b beat the baseline base; a leads, "
            "with +5.0 points (95 % interval +3.0 to +7.0).",
        ),
        # A tie may lie to both sides: its numbers have signs.
        (
            {"a": TIE, "base": BASELINE},
            "a and the baseline base tie: +1.0 points (95 % interval −1.0 to +3.0).",
        ),
        (
            {"a": UNRESOLVED, "base": BASELINE},
            "Not resolved: a differs from the baseline base by +3.0 points "
            "(95 % interval +1.0 to +5.0), too little for the noise between seeds.",
        ),
        (
            {"base": BASELINE, "a": WORSE, "b": WORSE},
            "The baseline base is best: a and b are all worse.",
        ),
        # "Worse" is the sign, also of the interval.
        (
            {"base": BASELINE, "a": WORSE},
            "The baseline base is best: a is worse by 5.0 points (95 % interval 3.0 to 7.0).",
        ),
        (
            {"b": TIE, "base": BASELINE, "a": WORSE},
            "No arm beats the baseline base: a is worse, b ties with it.",
        ),
        # One arm without a second seed stands beside one that has a verdict.
        (
            {"a": BETTER, "base": BASELINE, "b": UNJUDGED},
            "a beats the baseline base by 5.0 points (95 % interval 3.0 to 7.0); "
            "b has one seed and no verdict.",
        ),
        (
            {"a": UNJUDGED, "base": BASELINE},
            "No verdict on a and base: where an arm has one seed, the noise between seeds is not "
            "known and may be larger than every difference.",
        ),
        (
            {"base": BASELINE},
            "Only the baseline base has finished: there is nothing to compare yet.",
        ),
    ],
)
def test_headlines(outcomes: Outcomes, sentence: str):
    assert state_findings(summary_of(outcomes)).headline == sentence


def test_nothing_is_claimed_for_arms_at_chance():
    """An arm that has learned nothing may still differ from another one."""
    summary = summary_of({"a": BETTER, "base": BASELINE}, above_chance=False)

    findings = state_findings(summary)

    assert findings.headline.startswith("No arm is measurably above chance")
    assert "Not measurably above that: a and base." in findings.learning


def leader_of(family: str, leader: str, beyond_noise: bool) -> LayerLeader:
    """The leading single-layer arm of a family, 5 points before the arm `base`."""
    return LayerLeader(
        family=family,
        leader=leader,
        second="base",
        difference=0.05,
        beyond_noise=beyond_noise,
    )


COLOUR_LEADER = leader_of("colour", "a", beyond_noise=True)
COUNT_LEADER = leader_of("count", "b", beyond_noise=False)


def test_a_layer_that_leads_in_a_family_is_named_with_the_share_of_noise():
    summary = summary_of(
        {"a": TIE, "base": BASELINE},
        single_layer=("a", "base"),
        leaders=(COLOUR_LEADER, COUNT_LEADER),
    )

    assert state_findings(summary).layers == (
        "Of the 2 single-layer arms, a leads on colour beyond noise; elsewhere "
        "(1 of 2 families) the order is noise."
    )


def test_no_layer_is_named_where_the_order_is_noise():
    """With one seed an arm, the sentence says what was not measured."""
    summary = summary_of(
        {"a": TIE, "base": BASELINE},
        seed_noise=False,
        single_layer=("a", "base"),
        leaders=(COUNT_LEADER,),
    )

    assert state_findings(summary).layers == (
        "Among 2 single-layer arms none leads in a family beyond noise "
        "(one seed an arm: scores only, no verdict)."
    )


def test_noise_between_seeds_is_told_with_what_it_leaves_unresolved():
    summary = summary_of({"a": UNRESOLVED, "base": BASELINE})

    assert state_findings(summary).seeds == (
        "Training again with another seed moves an arm's mean by a standard deviation of 2.0 "
        "points (3 degrees of freedom); the widest spread within an arm is 3.0 points (base). "
        "It leaves a unresolved: on these questions alone the difference to the baseline would "
        "count. A study with this noise shows a difference of 4.2 points to the baseline with a "
        "probability of 80 %."
    )


def test_a_guided_arm_is_told_beside_each_of_its_controls():
    """Each control by what takes the place of the instruction, each change by its verdict."""
    # The instruction of another question takes ten points: the arm heeds its own.
    shuffled = GuidanceRow(
        arm="a",
        control="shuffled",
        guided=ArmScore(0.7, [0.6, 0.8]),
        controlled=ArmScore(0.6, [0.5, 0.7]),
        weights={},
        spread=0.1,
        difference=contrast_of(0.1, "better"),
    )
    # Against fixed weights the interval holds zero.
    mean = GuidanceRow(
        arm="a",
        control="mean",
        guided=ArmScore(0.7, [0.6, 0.8]),
        controlled=ArmScore(0.69, [0.6, 0.8]),
        weights={},
        spread=0.1,
        difference=contrast_of(0.01, "tie"),
    )
    summary = summary_of({"a": TIE, "base": BASELINE}, guidance=(shuffled, mean))

    assert state_findings(summary).guidance == (
        "Guided by its own instruction, a against itself with the instruction of another question "
        "gains +10.0 points (+8.0 to +12.0); a against itself with the mean weights does not "
        "measurably change: +1.0 points (−1.0 to +3.0)."
    )


def test_nothing_is_said_of_guidance_without_a_guided_arm():
    assert state_findings(summary_of({"a": TIE, "base": BASELINE})).guidance == ""


FLAT = judge_arm([RunLearning("flat", 0.8, 0.01, None)])
IMPROVING = judge_arm([RunLearning("still improving", 0.5, 0.2, None)] * 2)
UNSTABLE = judge_arm(
    [RunLearning("blind", 0.05, 0.0, None), RunLearning("flat", 0.5, 0.0, None)],
)
NOT_JUDGED = judge_arm([RunLearning("not judged", None, None, None)])


def test_an_unsettled_baseline_gives_no_ranking():
    """Whatever the verdicts are: neither arms nor layers are ranked."""
    summary = summary_of(
        {"a": BETTER, "base": BASELINE},
        single_layer=("a", "base"),
        leaders=(LayerLeader("colour", "a", "base", 0.2, beyond_noise=True),),
        learning={"a": FLAT, "base": UNSTABLE},
    )

    findings = state_findings(summary)

    assert findings.headline == (
        "Not trained long enough to say: 1 of 2 arms, the baseline base (unstable, 1 of 2 runs "
        "left the plateau) among them, had not learned what they could when training stopped."
    )
    assert findings.layers == (
        "Layers are not compared: their order would say which of them learned faster."
    )
    assert findings.training == (
        "When training stopped, arms had not learned what they could: unstable, 1 of 2 runs left "
        "the plateau (base)."
    )


@pytest.mark.parametrize(
    ("outcomes", "sentence"),
    [
        # An arm that is still improving is not called worse; one that flattened is.
        (
            {"a": BETTER, "b": TIE, "base": BASELINE, "c": WORSE, "d": WORSE},
            "a beats the baseline base by 5.0 points (95 % interval 3.0 to 7.0); d is worse",
        ),
        # It is if it already beats the baseline.
        (
            {"c": BETTER, "base": BASELINE, "a": WORSE},
            "c beats the baseline base by 5.0 points (95 % interval 3.0 to 7.0); a is worse",
        ),
        # Beside it, the baseline is not called best, nor do all arms tie.
        (
            {"base": BASELINE, "a": WORSE, "c": WORSE},
            "No arm beats the baseline base: a is worse",
        ),
        (
            {"a": TIE, "b": TIE, "c": TIE, "base": BASELINE},
            "3 arms tie: no difference to the baseline base is beyond noise, not even the largest, "
            "a with +1.0 points (95 % interval −1.0 to +3.0)",
        ),
        (
            {"a": TIE, "c": UNRESOLVED, "base": BASELINE},
            "a and the baseline base tie: +1.0 points (95 % interval −1.0 to +3.0)",
        ),
        (
            {"a": UNJUDGED, "c": TIE, "base": BASELINE},
            "No verdict on a and base: where an arm has one seed, the noise between seeds is not "
            "known and may be larger than every difference",
        ),
    ],
)
def test_arms_that_might_score_otherwise_are_named_beside_the_ranking(
    outcomes: Outcomes, sentence: str
):
    """The arm `c` was still improving."""
    learning = dict.fromkeys(outcomes, FLAT) | {"c": IMPROVING}
    summary = summary_of(outcomes, learning=learning)

    assert state_findings(summary).headline == (
        f"{sentence}; not trained long enough: c (still improving)."
    )


def test_training_is_said_to_be_enough_only_where_it_was_judged():
    settled = summary_of({"a": BETTER, "base": BASELINE}, learning={"a": FLAT, "base": FLAT})
    unjudged = summary_of(
        {"a": BETTER, "base": BASELINE},
        learning={"a": NOT_JUDGED, "base": NOT_JUDGED},
    )

    assert state_findings(settled).training == (
        "When training stopped, no arm was still improving measurably."
    )
    assert state_findings(unjudged).training == (
        "Whether the arms had learned what they could is not judged: it needs short answers that "
        "repeat, or validation data."
    )
    assert state_findings(unjudged).headline == state_findings(settled).headline


def test_arms_below_the_probe_of_their_layers_are_named():
    probes = {
        "a": ProbeComparison(trained=0.5, probe=0.529, families=["colour"]),
        "base": ProbeComparison(trained=0.5, probe=0.84, families=["colour"]),
    }
    summary = summary_of(
        {"a": BETTER, "base": BASELINE},
        learning={"a": FLAT, "base": FLAT},
        probes=probes,
    )

    assert state_findings(summary).training == (
        "When training stopped, no arm was still improving measurably. More than 3 points below "
        "the linear probe of the same layers: base (50.0 % against 84.0 %)."
    )
