"""How sure a study is, in plain words: what it resolved, what it could have seen, what it rests on.

Every number is one of the summary; no sentence claims more than the verdicts do.
"""

from dataclasses import dataclass

from layerfuse.evaluate.learning_status import not_trained_long_enough, unsettled_arms
from layerfuse.evaluate.significance import PICTURES
from layerfuse.pages.written_numbers import signed
from layerfuse.study.findings import ArmsByVerdict, ComparedArm, listed, sort_by_verdict
from layerfuse.study.summary import Summary

FEW_PICTURES = 50
"""With fewer, intervals that are made by redrawing pictures are rough themselves."""


@dataclass(frozen=True)
class Certainty:
    """One thing to know before a result is believed.

    Attributes:
        question: what a reader would ask.
        answer: one to three sentences.
    """

    question: str
    answer: str


def how_sure(summary: Summary) -> list[Certainty]:
    """Say how far a study can be trusted.

    Args:
        summary: the numbers of the study.

    Returns:
        Four questions with their answers.
    """
    return [
        Certainty("Which differences are beyond noise?", resolved_differences(summary)),
        Certainty("How small a difference could it have seen?", smallest_difference(summary)),
        Certainty("What does it rest on?", evidence(summary)),
        Certainty("Were the arms trained long enough?", training_reached(summary)),
    ]


def covered_by_intervals(summary: Summary) -> str:
    """Say what the intervals of scores are over, which depends on the seeds of each arm.

    Args:
        summary: the numbers of the study.

    Returns:
        Words that follow `interval`.
    """
    one_seed = [arm.arm for arm in summary.arms if arm.mean.covers == PICTURES]
    if not one_seed:
        return "over pictures and seeds"
    if len(one_seed) == len(summary.arms):
        return "over pictures alone, since every arm has one seed"
    return f"over pictures and seeds (over pictures alone for {listed(one_seed)}, with one seed)"


def resolved_differences(summary: Summary) -> str:
    """Say which differences to the baseline the study tells from noise."""
    arms = sort_by_verdict(summary)
    count = len(arms.compared)
    if count == 0:
        return f"Nothing is compared yet: only the baseline {arms.baseline} has finished."
    if len(arms.unjudged) == count:
        return (
            "None can be called: without a second seed of the baseline and of another arm, a "
            "difference may come from the seed alone."
        )
    resolved = len(arms.better) + len(arms.worse)
    text = f"{resolved} of {count} to the baseline {arms.baseline}"
    if resolved:
        text += f": {_resolved_arms(arms)}"
    text += "."
    if arms.tie:
        verb = "ties" if len(arms.tie) == 1 else "tie"
        text += (
            f" {len(arms.tie)} {verb} with it, so that which is better stays open: "
            f"{listed(_names(arms.tie))}."
        )
    if arms.too_early:
        open_arms = listed(_names(arms.too_early))
        text += f" More training might change what was measured of {open_arms}."
    if arms.unjudged:
        verb = "has" if len(arms.unjudged) == 1 else "have"
        text += f" {listed(_names(arms.unjudged))} {verb} one seed and no verdict."
    return text


def _names(arms: list[ComparedArm]) -> list[str]:
    return [arm.arm for arm in arms]


def _resolved_arms(arms: ArmsByVerdict) -> str:
    """The arms that are better and those that are worse, each with its difference."""
    parts = []
    for verdict, resolved in (("better", arms.better), ("worse", arms.worse)):
        named = [f"{arm.arm} ({signed(arm.versus.difference)})" for arm in resolved]
        if named:
            parts.append(f"{listed(named)} {verdict}")
    return "; ".join(parts)


def smallest_difference(summary: Summary) -> str:
    """Say which differences to the baseline a study with this noise would have shown."""
    if summary.resolvable is None:
        return "Not known: that needs a second seed of the baseline and of another arm."
    points = f"{100 * summary.resolvable:.1f} points"
    text = (
        f"One of {points} to the baseline, with a probability of 80 %. Smaller ones mostly end as "
        "ties."
    )
    largest = 0.0
    for arm in sort_by_verdict(summary).compared:
        largest = max(largest, abs(arm.versus.difference))
    return f"{text} The largest that was measured is {100 * largest:.1f}."


def evidence(summary: Summary) -> str:
    """Say how many seeds, pictures and questions a study has, and what a seed does."""
    seeds = sorted(len(arm.seeds) for arm in summary.arms)
    seeds_of_arms = f"{seeds[0]}"
    if seeds[0] != seeds[-1]:
        seeds_of_arms = f"{seeds[0]} to {seeds[-1]}"
    plural = "" if seeds[-1] == 1 else "s"
    text = (
        f"{seeds_of_arms} seed{plural} an arm; {summary.images:,} pictures with "
        f"{summary.items:,} questions."
    )
    if summary.noise is not None:
        text += f" Another seed moves an arm by {100 * summary.noise.sd:.1f} points (one sd)."
    if summary.images < FEW_PICTURES:
        text += " With so few pictures the intervals themselves are rough."
    return text


def training_reached(summary: Summary) -> str:
    """Say which arms had learned what they could when their training stopped."""
    arms = summary.learning
    judged = [arm for arm in arms.values() if arm.state != "not judged"]
    if not judged:
        return (
            "Not known: that needs short answers that repeat, or validation questions that are "
            "asked along training."
        )
    flat = [arm for arm in judged if arm.settled]
    text = f"{len(flat)} of {len(judged)} arms had learned what they could."
    if len(judged) < len(arms):
        text += f" Of {len(arms) - len(judged)} more it is not known."
    unsettled = unsettled_arms(arms)
    if unsettled:
        text += f" Not yet: {listed(unsettled)}."
    if not_trained_long_enough(arms, summary.baseline):
        text += " What is beyond noise may then be who learned faster, not who can do more."
    return text
