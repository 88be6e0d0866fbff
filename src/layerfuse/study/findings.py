"""The sentences of a report, made from the verdicts alone: no text claims more than they do."""

from dataclasses import dataclass

UNMEASURED = "items only; seed noise not measured"

# Longer lists of names are cut to this many entries.
LISTED = 6

CONTROLS = {"shuffled": "the instruction of another question", "mean": "the mean weights"}
CHANGES = {"better": "gains", "worse": "loses", "tie": "does not measurably change:"}


@dataclass(frozen=True)
class Outcome:
    """The arms of a summary by their verdict against the baseline.

    Attributes:
        baseline: the name of the baseline.
        compared: the rows of all arms that are compared with it, the highest score first.
        better: rows of the arms that beat it.
        worse: rows of the arms that it beats.
        tie: rows of the arms that tie with it.
        unresolved: rows of the ties that come from the noise between seeds alone.
        first: names of the arms that no other arm beats, in order of score.
    """

    baseline: str
    compared: list[dict]
    better: list[dict]
    worse: list[dict]
    tie: list[dict]
    unresolved: list[dict]
    first: list[str]


def percent(value: float) -> str:
    """Write 0.8123 as 81.2 %."""
    return f"{100 * value:.1f} %"


def signed(value: float) -> str:
    """Write 0.0412 as +4.1, with a true minus and no negative zero."""
    # Adding zero turns a negative zero into zero.
    points = round(100 * value, 1) + 0.0
    return f"{points:+.1f}".replace("-", "\u2212")


def unsigned(value: float) -> str:
    """Write 0.0412 as 4.1, with a true minus where it is negative."""
    return f"{100 * value:.1f}".replace("-", "\u2212")


def span(interval: list[float], plus: bool = False) -> str:
    """Write an interval [low, high] in percent or, with plus, in points."""
    low, high = interval
    if plus:
        return f"{signed(low)} to {signed(high)}"
    return f"{unsigned(low)} to {unsigned(high)}"


def listed(names: list[str]) -> str:
    """Write a, b and c; more than six names are cut."""
    if len(names) > LISTED:
        rest = len(names) - (LISTED - 1)
        names = [*names[: LISTED - 1], f"{rest} more"]
    if len(names) < 2:
        return "".join(names)
    return ", ".join(names[:-1]) + " and " + names[-1]


def clause(arms: list[dict], one: str, several: str) -> str:
    """Write the names of the arms as the subject of a verb."""
    names = arm_names(arms)
    if len(names) == 1:
        return f"{names[0]} {one}"
    return f"{listed(names)} {several}"


def arm_names(arms: list[dict]) -> list[str]:
    """Give the names of the arms of these rows."""
    return [arm["arm"] for arm in arms]


def difference(arm: dict) -> str:
    """Write an arm's difference to the baseline with its interval."""
    versus = arm["versus_baseline"]
    points = signed(versus["difference"])
    return f"{points} points (95 % interval {span(versus['interval'], plus=True)})"


def distance(arm: dict, side: int) -> str:
    """Write how far an arm lies above (side 1) or below (side -1) the baseline."""
    versus = arm["versus_baseline"]
    low_high = sorted(side * end for end in versus["interval"])
    points = 100 * side * versus["difference"]
    return f"{points:.1f} points (95 % interval {span(low_high)})"


def sort_outcome(summary: dict) -> Outcome:
    """Sort the arms of a summary by their verdict against the baseline."""
    compared = [arm for arm in summary["arms"] if arm["versus_baseline"]]
    unresolved = []
    by_verdict: dict[str, list[dict]] = {"better": [], "worse": [], "tie": []}
    for arm in compared:
        by_verdict[arm["versus_baseline"]["verdict"]].append(arm)
        if arm["versus_baseline"].get("unresolved"):
            unresolved.append(arm)
    return Outcome(
        baseline=summary["baseline"],
        compared=compared,
        better=by_verdict["better"],
        worse=by_verdict["worse"],
        tie=by_verdict["tie"],
        unresolved=unresolved,
        first=[arm["arm"] for arm in summary["arms"] if arm["first"]],
    )


def headline(summary: dict) -> str:
    """State the finding in one sentence, for every pattern of verdicts.

    Args:
        summary: the content of summary.json.

    Returns:
        The sentence; it says so where the noise between seeds is not known.
    """
    outcome = sort_outcome(summary)
    learned = any(arm["versus_chance"]["verdict"] == "better" for arm in summary["arms"])
    # Differences between arms that only guess say nothing about what was studied.
    if not learned:
        text = "No arm is measurably above chance, so nothing can be said about layers or fusion"
    elif not outcome.compared:
        baseline = outcome.baseline
        text = f"Only the baseline {baseline} has finished: there is nothing to compare yet"
    elif outcome.better:
        text = headline_beaten(outcome)
    elif outcome.worse:
        text = headline_unbeaten(outcome)
    elif outcome.unresolved:
        text = headline_unresolved(outcome)
    else:
        text = headline_tied(outcome)
    if outcome.compared and not summary["noise"]:
        return f"{text} ({UNMEASURED})."
    return text + "."


def headline_beaten(outcome: Outcome) -> str:
    """Say which arms beat the baseline, and which of them lead."""
    better = outcome.better
    text = f"{clause(better, 'beats', 'beat')} the baseline {outcome.baseline}"
    if len(better) == 1:
        text += f" by {distance(better[0], 1)}"
    if len(outcome.first) > 1:
        text += f"; {listed(outcome.first)} are tied for first"
    elif len(outcome.first) == 1 and len(better) > 1:
        leader = outcome.first[0]
        for arm in outcome.compared:
            if arm["arm"] == leader:
                text += f"; {leader} leads, with {difference(arm)}"
    if outcome.worse:
        text += f"; {clause(outcome.worse, 'is', 'are')} worse"
    return text


def headline_unbeaten(outcome: Outcome) -> str:
    """Say that the baseline beats some or all arms and none beats it."""
    if outcome.tie:
        worse = clause(outcome.worse, "is", "are")
        tie = clause(outcome.tie, "ties", "tie")
        return f"No arm beats the baseline {outcome.baseline}: {worse} worse, {tie} with it"
    worse = clause(outcome.worse, "is", "are all")
    text = f"The baseline {outcome.baseline} is best: {worse} worse"
    if len(outcome.worse) == 1:
        text += f" by {distance(outcome.worse[0], -1)}"
    return text


def headline_unresolved(outcome: Outcome) -> str:
    """Say that a difference on these questions is lost in the noise between seeds."""
    arm = outcome.unresolved[0]
    text = (
        f"Not resolved: {arm['arm']} differs from the baseline {outcome.baseline} by "
        f"{difference(arm)}, too little for the noise between seeds"
    )
    if len(outcome.compared) > 1:
        text += f" and {len(outcome.compared)} comparisons"
    return text


def headline_tied(outcome: Outcome) -> str:
    """Say that all arms tie with the baseline, and how large the largest difference is."""
    largest = outcome.compared[0]
    for arm in outcome.compared:
        size = abs(arm["versus_baseline"]["difference"])
        if size > abs(largest["versus_baseline"]["difference"]):
            largest = arm
    if len(outcome.compared) > 1:
        text = (
            f"All {len(outcome.compared) + 1} arms tie: no difference to the baseline "
            f"{outcome.baseline} is beyond noise, not even the largest, {largest['arm']} with "
        )
    else:
        text = f"{largest['arm']} and the baseline {outcome.baseline} tie: "
    text += difference(largest)
    # The interval is for one comparison, the verdict for all: only the first may leave out zero.
    low, high = largest["versus_baseline"]["interval"]
    if low > 0 or high < 0:
        text += ", once corrected for several comparisons"
    return text


def layer_sentence(summary: dict) -> str:
    """Say which single-layer arm leads where, and where that is beyond noise.

    Args:
        summary: the content of summary.json.

    Returns:
        The sentence.
    """
    count = len(summary["single_layer"])
    leaders = summary["leaders"]
    if count < 2:
        return "Fewer than two arms use one layer alone, so layers are not compared by themselves."
    remark = ""
    if not summary["noise"]:
        remark = f" ({UNMEASURED})"

    clear_families: dict[str, list[str]] = {}
    rest = 0
    for row in leaders:
        if row["beyond_noise"]:
            clear_families.setdefault(row["leader"], []).append(row["family"])
        else:
            rest += 1
    if not clear_families:
        return f"Among {count} single-layer arms none leads in a family beyond noise{remark}."

    parts = []
    for arm, families in clear_families.items():
        parts.append(f"{arm} leads on {listed(families)}")
    tail = ""
    if rest:
        tail = f"; elsewhere ({rest} of {len(leaders)} families) the order is noise"
    return f"Of the {count} single-layer arms, {listed(parts)} beyond noise{tail}{remark}."


def guidance_sentence(rows: list[dict]) -> str:
    """Say which guided arms lose accuracy without their guidance.

    Args:
        rows: `guidance` of summary.json.

    Returns:
        The sentence; empty where no arm is guided.
    """
    if not rows:
        return ""
    parts = []
    for row in rows:
        versus = row["difference"]
        control = CONTROLS[row["control"]]
        change = f"{CHANGES[versus['verdict']]} {signed(versus['difference'])} points"
        interval = span(versus["interval"], plus=True)
        parts.append(f"{row['arm']} against itself with {control} {change} ({interval})")
    return "Guided by its own instruction, " + "; ".join(parts) + "."


def learning_sentence(summary: dict) -> str:
    """Say how good the best arm is, and which arms are not measurably better than guessing."""
    best = summary["arms"][0]
    mean = best["mean"]
    text = (
        f"The highest-scoring arm, {best['arm']}, answers {percent(mean['score'])} "
        f"right (95 % interval {span(mean['interval'])}); the commonest answer of "
        f"each family alone gives {percent(summary['chance']['mean'])}."
    )
    guessing = []
    for arm in summary["arms"]:
        if arm["versus_chance"]["verdict"] != "better":
            guessing.append(arm["arm"])
    if guessing:
        text += f" Not measurably above that: {listed(guessing)}."
    return text


def seed_sentence(summary: dict) -> str:
    """Say how large the noise between seeds is, and which arms it leaves unresolved."""
    noise = summary["noise"]
    if noise:
        text = (
            f"Training again with another seed moves an arm's mean by a standard deviation of "
            f"{100 * noise['sd']:.1f} points ({noise['df']} degrees of freedom); the widest spread "
            f"within an arm is {100 * noise['spread']:.1f} points ({noise['spread_arm']})."
        )
    else:
        text = f"No arm has two seeds ({UNMEASURED})."
    unresolved = arm_names(sort_outcome(summary).unresolved)
    if unresolved:
        text += (
            f" It leaves {listed(unresolved)} unresolved: on these questions alone the "
            "difference to the baseline would count."
        )
    return text


def findings(summary: dict) -> dict[str, str]:
    """State the finding, learning, layers and seed noise, one sentence each.

    Args:
        summary: the content of summary.json, without its findings.

    Returns:
        The sentences by topic.
    """
    return {
        "headline": headline(summary),
        "learning": learning_sentence(summary),
        "layers": layer_sentence(summary),
        "seeds": seed_sentence(summary),
    }
