"""The sentences of a report, made from the verdicts alone: no text claims more than they do."""

from dataclasses import dataclass, replace

from layerfuse.evaluate.learning_status import not_trained_long_enough, unsettled_arms
from layerfuse.evaluate.significance import JudgedContrast
from layerfuse.pages.written_numbers import percent, signed, span
from layerfuse.study.guidance_effect import GuidanceRow
from layerfuse.study.looks import look_sentences
from layerfuse.study.summary import Summary
from layerfuse.study.training_status import training_sentence

ONE_SEED = "one seed an arm: scores only, no verdict"

# Longer lists of names are cut to this many entries.
LISTED = 6

# By the names that records of answers give the controls.
CONTROLS = {
    "shuffled": "the instruction of another question",
    "other_category": "the instruction of a question of another category",
    "mean": "the mean weights",
}
# By verdict.
CHANGES = {"better": "gains", "worse": "loses", "tie": "does not measurably change:"}


@dataclass(frozen=True)
class Findings:
    """The sentences of a report: `findings` of summary.json.

    Attributes:
        headline: what the study found.
        learning: how good the best arm is, and which arms only guess.
        layers: which single-layer arm leads where.
        seeds: how large the noise between seeds is.
        guidance: which guided arms lose without their guidance; empty where no arm is guided.
        training: which arms had not learned what they could when their training stopped.
    """

    headline: str
    learning: str
    layers: str
    seeds: str
    guidance: str
    training: str


@dataclass(frozen=True)
class ComparedArm:
    """An arm and its difference to the baseline."""

    arm: str
    versus: JudgedContrast


@dataclass(frozen=True)
class ArmsByVerdict:
    """The arms of a summary by their verdict against the baseline.

    Attributes:
        baseline: the name of the baseline.
        compared: all arms that are compared with it, the highest score first.
        better: those that beat it.
        worse: those that it beats.
        tie: those that tie with it.
        unjudged: those that get no verdict, since they or the baseline have one seed.
        too_early: those that more training might put elsewhere: which do not beat the baseline and
            had not learned what they could, or are not worse than a baseline that had not.
        unresolved: the ties that come from the noise between seeds alone.
        first: names of the arms that are not separable from the first, in order of score.
    """

    baseline: str
    compared: list[ComparedArm]
    better: list[ComparedArm]
    worse: list[ComparedArm]
    tie: list[ComparedArm]
    unjudged: list[ComparedArm]
    too_early: list[ComparedArm]
    unresolved: list[ComparedArm]
    first: list[str]


def listed(names: list[str]) -> str:
    """Write a, b and c; more than six names are cut."""
    if len(names) > LISTED:
        rest = len(names) - (LISTED - 1)
        names = [*names[: LISTED - 1], f"{rest} more"]
    if len(names) < 2:
        return "".join(names)
    return ", ".join(names[:-1]) + " and " + names[-1]


def clause(arms: list[ComparedArm], one: str, several: str) -> str:
    """Write the names of the arms as the subject of a verb."""
    names = arm_names(arms)
    if len(names) == 1:
        return f"{names[0]} {one}"
    return f"{listed(names)} {several}"


def arm_names(arms: list[ComparedArm]) -> list[str]:
    """Give the names of these arms."""
    return [arm.arm for arm in arms]


def difference(arm: ComparedArm) -> str:
    """Write an arm's difference to the baseline with its interval."""
    points = signed(arm.versus.difference)
    return f"{points} points (95 % interval {span(arm.versus.interval, plus=True)})"


def distance(arm: ComparedArm, side: int) -> str:
    """Write how far an arm lies above (side 1) or below (side -1) the baseline."""
    # Side -1 turns the interval around.
    low_high = sorted(side * end for end in arm.versus.interval)
    points = 100 * side * arm.versus.difference
    return f"{points:.1f} points (95 % interval {span(low_high)})"


def sort_by_verdict(summary: Summary) -> ArmsByVerdict:
    """Sort the arms of a summary by their verdict against the baseline."""
    compared = []
    better = []
    worse = []
    tie = []
    unjudged = []
    too_early = []
    unresolved = []
    baseline_may_rise = may_rise(summary, summary.baseline)
    for summarized in summary.arms:
        # The baseline is not compared with itself.
        if summarized.versus_baseline is None:
            continue
        arm = ComparedArm(summarized.arm, summarized.versus_baseline)
        compared.append(arm)
        # What an arm that may still rise has won, it keeps; where it loses or ties, it may win yet.
        verdict = arm.versus.verdict
        if verdict == "unjudged":
            unjudged.append(arm)
        elif (verdict != "better" and may_rise(summary, arm.arm)) or (
            verdict != "worse" and baseline_may_rise
        ):
            too_early.append(arm)
        elif verdict == "better":
            better.append(arm)
        elif verdict == "worse":
            worse.append(arm)
        else:
            tie.append(arm)
            if arm.versus.unresolved:
                unresolved.append(arm)
    return ArmsByVerdict(
        baseline=summary.baseline,
        compared=compared,
        better=better,
        worse=worse,
        tie=tie,
        unjudged=unjudged,
        too_early=too_early,
        unresolved=unresolved,
        first=[arm.arm for arm in summary.arms if arm.first],
    )


def may_rise(summary: Summary, arm: str) -> bool:
    """Whether an arm had not learned what it could when its training stopped, as far as known."""
    return arm in summary.learning and not summary.learning[arm].settled


def headline(summary: Summary) -> str:
    """State the finding in one sentence, for every pattern of verdicts.

    Args:
        summary: the numbers of the study.

    Returns:
        The sentence; it names what gets no verdict, and says so where arms had not learned what
        they could.
    """
    if not_trained_long_enough(summary.learning, summary.baseline):
        return headline_unsettled(summary)
    arms = sort_by_verdict(summary)
    learned = any(arm.versus_chance.verdict == "better" for arm in summary.arms)
    # Differences between arms that only guess say nothing about what was studied.
    if not learned:
        text = "No arm is measurably above chance, so nothing can be said about layers or fusion"
    elif not arms.compared:
        baseline = arms.baseline
        text = f"Only the baseline {baseline} has finished: there is nothing to compare yet"
    else:
        text = headline_judged(arms)
        unsettled = [
            f"{name} ({summary.learning[name].text})" for name in unsettled_arms(summary.learning)
        ]
        if unsettled:
            text += f"; not trained long enough: {listed(unsettled)}"
    return text + "."


def headline_judged(arms: ArmsByVerdict) -> str:
    """State the finding where at least one arm has run beside the baseline."""
    if arms.better:
        text = headline_beaten(arms)
    elif arms.worse:
        text = headline_unbeaten(arms)
    elif arms.unresolved:
        text = headline_unresolved(arms)
    elif arms.tie:
        text = headline_tied(arms)
    else:
        return headline_unjudged(arms)
    if arms.unjudged:
        text += f"; {clause(arms.unjudged, 'has', 'have')} one seed and no verdict"
    return text


def headline_unjudged(arms: ArmsByVerdict) -> str:
    """Say that no arm gets a verdict, and which scores highest."""
    if len(arms.unjudged) < len(arms.compared) or len(arms.unjudged) == 1:
        names = listed([*arm_names(arms.unjudged), arms.baseline])
    else:
        names = f"the {len(arms.unjudged) + 1} arms"
    return (
        f"No verdict on {names}: where an arm has one seed, the noise between seeds is not known "
        "and may be larger than every difference"
    )


def headline_unsettled(summary: Summary) -> str:
    """Say that the order of the arms is that of who learned faster."""
    unsettled = unsettled_arms(summary.learning)
    baseline = summary.learning[summary.baseline]
    text = f"Not trained long enough to say: {len(unsettled)} of {len(summary.learning)} arms"
    if not baseline.settled:
        text += f", the baseline {summary.baseline} ({baseline.text}) among them,"
    return f"{text} had not learned what they could when training stopped."


def headline_beaten(arms: ArmsByVerdict) -> str:
    """Say which arms beat the baseline, and which of them lead."""
    better = arms.better
    text = f"{clause(better, 'beats', 'beat')} the baseline {arms.baseline}"
    # One arm's number is the finding; of several arms only the leader's fits into a sentence.
    if len(better) == 1:
        text += f" by {distance(better[0], 1)}"
    if len(arms.first) > 1:
        text += inseparable(arms.first)
    elif len(arms.first) == 1 and len(better) > 1:
        leader = arms.first[0]
        for arm in arms.compared:
            if arm.arm == leader:
                text += f"; {leader} leads, with {difference(arm)}"
    if arms.worse:
        text += f"; {clause(arms.worse, 'is', 'are')} worse"
    return text


def inseparable(first: list[str]) -> str:
    """Say which arms are not separable from the one with the highest score."""
    verb = "is" if len(first) == 2 else "are"
    return f"; {first[0]} scores highest, and {listed(first[1:])} {verb} not separable from it"


def headline_unbeaten(arms: ArmsByVerdict) -> str:
    """Say that the baseline beats some or all arms and none beats it."""
    if arms.tie or arms.too_early:
        worse = clause(arms.worse, "is", "are")
        text = f"No arm beats the baseline {arms.baseline}: {worse} worse"
        if arms.tie:
            text += f", {clause(arms.tie, 'ties', 'tie')} with it"
        return text
    worse = clause(arms.worse, "is", "are all")
    text = f"The baseline {arms.baseline} is best: {worse} worse"
    if len(arms.worse) == 1:
        text += f" by {distance(arms.worse[0], -1)}"
    return text


def headline_unresolved(arms: ArmsByVerdict) -> str:
    """Say that a difference on these questions is lost in the noise between seeds."""
    # Arms stand in order of score: the highest is named.
    arm = arms.unresolved[0]
    text = (
        f"Not resolved: {arm.arm} differs from the baseline {arms.baseline} by "
        f"{difference(arm)}, too little for the noise between seeds"
    )
    # Holm's correction asks the more of a difference, the more differences are looked at.
    if len(arms.compared) > 1:
        text += f" and {len(arms.compared)} comparisons"
    return text


def headline_tied(arms: ArmsByVerdict) -> str:
    """Say that all arms tie with the baseline, and how large the largest difference is."""
    largest = arms.tie[0]
    for arm in arms.tie:
        if abs(arm.versus.difference) > abs(largest.versus.difference):
            largest = arm
    if len(arms.tie) > 1:
        tied = f"{len(arms.tie) + 1} arms tie"
        if not arms.too_early:
            tied = f"All {tied}"
        text = (
            f"{tied}: no difference to the baseline {arms.baseline} is beyond noise, not even the "
            f"largest, {largest.arm} with "
        )
    else:
        text = f"{largest.arm} and the baseline {arms.baseline} tie: "
    text += difference(largest)
    # The interval is for one comparison, the verdict for all: only the first may leave out zero.
    low, high = largest.versus.interval
    if low > 0 or high < 0:
        text += ", once corrected for several comparisons"
    return text


def layer_sentence(summary: Summary) -> str:
    """Say which single-layer arm leads where, and where that is beyond noise.

    Args:
        summary: the numbers of the study.

    Returns:
        The sentence.
    """
    count = len(summary.single_layer)
    if count < 2:
        return "Fewer than two arms use one layer alone, so layers are not compared by themselves."
    if not_trained_long_enough(summary.learning, summary.baseline):
        return "Layers are not compared: their order would say which of them learned faster."
    remark = ""
    if summary.noise is None:
        remark = f" ({ONE_SEED})"

    # By arm, so that one that leads in several families is named once.
    clear_families: dict[str, list[str]] = {}
    rest = 0
    for leader in summary.leaders:
        if leader.beyond_noise:
            clear_families.setdefault(leader.leader, []).append(leader.family)
        else:
            rest += 1
    if not clear_families:
        one = "category" if summary.shown_by == "categories" else "family"
        return f"Among {count} single-layer arms none leads in a {one} beyond noise{remark}."

    parts = []
    for arm, families in clear_families.items():
        parts.append(f"{arm} leads on {listed(families)}")
    tail = ""
    if rest:
        tail = (
            f"; elsewhere ({rest} of {len(summary.leaders)} {summary.shown_by}) the order is noise"
        )
    return f"Of the {count} single-layer arms, {listed(parts)} beyond noise{tail}{remark}."


def guidance_sentence(rows: list[GuidanceRow]) -> str:
    """Say which guided arms lose accuracy without their guidance.

    Args:
        rows: one per guided arm and control.

    Returns:
        The sentence; empty where no arm is guided.
    """
    if not rows:
        return ""
    parts = []
    for row in rows:
        versus = row.difference
        control = CONTROLS[row.control]
        change = f"{CHANGES[versus.verdict]} {signed(versus.difference)} points"
        interval = span(versus.interval, plus=True)
        parts.append(f"{row.arm} against itself with {control} {change} ({interval})")
    return "Guided by its own instruction, " + "; ".join(parts) + "."


def learning_sentence(summary: Summary) -> str:
    """Say how good the best arm is, and which arms are not measurably better than guessing."""
    # Arms stand in order of score.
    best = summary.arms[0]
    text = (
        f"The highest-scoring arm, {best.arm}, answers {percent(best.mean.score)} "
        f"right (95 % interval {span(best.mean.interval)} over {best.mean.covers}); the commonest "
        f"answer of each family alone gives {percent(summary.chance.mean)}."
    )
    guessing = []
    for arm in summary.arms:
        if arm.versus_chance.verdict != "better":
            guessing.append(arm.arm)
    if guessing:
        text += f" Not measurably above that: {listed(guessing)}."
    return text


def seed_sentence(summary: Summary) -> str:
    """Say how large the noise between seeds is, and which arms it leaves unresolved."""
    noise = summary.noise
    if noise is not None:
        text = (
            f"Training again with another seed moves an arm's mean by a standard deviation of "
            f"{100 * noise.sd:.1f} points ({noise.df} degrees of freedom); the widest spread "
            f"within an arm is {100 * noise.spread:.1f} points ({noise.spread_arm})."
        )
    else:
        text = f"No arm has two seeds ({ONE_SEED})."
    unresolved = arm_names(sort_by_verdict(summary).unresolved)
    if unresolved:
        text += (
            f" It leaves {listed(unresolved)} unresolved: on these questions alone the "
            "difference to the baseline would count."
        )
    if summary.resolvable is not None:
        text += (
            f" A study with this noise shows a difference of {100 * summary.resolvable:.1f} points "
            "to the baseline with a probability of 80 %."
        )
    if summary.seed_look is not None:
        text += f" {look_sentences(summary.seed_look)}"
    return text


def state_findings(summary: Summary) -> Findings:
    """State the finding, learning, layers, seed noise and guidance, one sentence each.

    Args:
        summary: the numbers of the study.

    Returns:
        The sentences.
    """
    return Findings(
        headline=headline(summary),
        learning=learning_sentence(summary),
        layers=layer_sentence(summary),
        seeds=seed_sentence(summary),
        guidance=guidance_sentence(summary.guidance),
        training=training_sentence(summary.learning, summary.probes),
    )


def with_screening(findings: Findings, blocks: int) -> Findings:
    """Say in the headline that the LLM was cut.

    Args:
        findings: of a study.
        blocks: the number of the LLM's first blocks that it kept.
    """
    kept = "block" if blocks == 1 else f"{blocks} blocks"
    note = (
        f"This is a screening: the LLM was cut to its first {kept} (llm.blocks), and the whole LLM "
        "may rank the arms otherwise."
    )
    return replace(findings, headline=f"{findings.headline} {note}")
