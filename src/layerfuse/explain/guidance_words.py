"""What is printed about what guides a model: a table, and sentences about what follows."""

from rich.console import Console

from layerfuse.explain.guidance_figures import ALL, CONTROL_NAMES
from layerfuse.explain.guidance_report import (
    FEWEST_WORDINGS,
    ControlEffect,
    GuidanceReport,
    KindInformation,
    KindWeights,
)
from layerfuse.study.findings import listed, percent, signed, span
from layerfuse.tables import Heading, print_fitted

SAME_WEIGHTS = 1e-6
"""Spread below which weights are the same: that of rounding."""
HARDLY = 0.005
"""Mean deviation of a weight below which a difference that is sure is still small."""
PLURAL = {"category": "categories", "family": "families"}


def print_guidance(report: GuidanceReport, console: Console) -> None:
    """Print the mean weights by kind of question, and the sentences.

    Args:
        report: what was measured.
        console: where it is printed.
    """
    headings = [Heading("questions about")]
    headings += [Heading(choice, is_number=True) for choice in report.choices]
    headings += [Heading("spread", is_number=True), Heading("questions", is_number=True)]
    lines = [_cells(ALL, report.overall)]
    for kind, weights in report.kinds.items():
        if len(report.kinds) > 1:
            lines.append(_cells(kind, weights))
    print_fitted(console, headings, lines, title="mean weight, % (spread: mean deviation, points)")
    for sentence in guidance_sentences(report):
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)


def _cells(name: str, weights: KindWeights) -> list[str]:
    """One row of the table."""
    numbers = [f"{100 * weight:.1f}" for weight in weights.mean]
    spread = 100 * sum(weights.spread) / len(weights.spread)
    return [name, *numbers, f"{spread:.2f}", str(weights.questions)]


def guidance_sentences(report: GuidanceReport) -> list[str]:
    """Say what follows from the numbers.

    Args:
        report: what was measured.

    Returns:
        Sentences, in the order in which they build on each other.
    """
    sentences = [_crossed_sentence(report), *_information_sentences(report)]
    score = percent(report.guided.score)
    sentences.append(
        f"The model scores {score} ({span(report.guided.interval)}); the commonest answers would "
        f"score {percent(report.chance)}."
    )
    for control, effect in report.controls.items():
        sentences.append(_control_sentence(CONTROL_NAMES.get(control, control), effect))
    sentences.append(_conclusion(report))
    return [sentence for sentence in sentences if sentence]


def _crossed_sentence(report: GuidanceReport) -> str:
    """Whether weights follow the instruction or the picture."""
    crossed = report.crossed
    if crossed is None:
        return "One picture or one wording: what moves the weights cannot be told apart."
    if max(crossed.over_instructions, crossed.over_pictures) < SAME_WEIGHTS:
        return "The weights are the same for every instruction and every picture."
    instruction, picture, rest = crossed.shares()
    return (
        f"Of the variance of the weights, {percent(instruction)} lies between instructions, "
        f"{percent(picture)} between pictures and {percent(rest)} in which instruction meets which "
        f"picture ({crossed.instructions} instructions on each of {crossed.pictures} pictures): a "
        f"weight varies by {100 * crossed.over_instructions:.2f} points over the instructions for "
        f"one picture, and by {100 * crossed.over_pictures:.2f} over the pictures for one "
        "instruction."
    )


def _information_sentences(report: GuidanceReport) -> list[str]:
    """What weights say about the kind of a question, beyond the bias of a small sample."""
    plural = PLURAL[report.kind]
    if not report.information:
        return [f"All questions are of one {report.kind}: weights cannot tell {plural} apart."]
    sentences = []
    for row in report.information:
        if row.bins == 1:
            # No number can differ, whatever the kinds
            sentences.append(f"By {row.estimator} all questions fall into one bin: 0 bits.")
            continue
        if not row.is_testable:
            sentences.append(
                f"By {row.estimator} ({row.bins} bins) {row.bits:.2f} bits of {row.entropy:.2f}."
            )
            continue
        says = f"The weights do not measurably differ by {report.kind}"
        if row.is_more_than_shuffled:
            says = f"The weights differ by {report.kind}"
        sentences.append(
            f"{says} ({row.estimator}, {row.bins} bins): {row.bits:.2f} bits of "
            f"{row.entropy:.2f}, shuffled over wordings {row.shuffled:.2f} (95 % up to "
            f"{row.shuffled_high:.2f})."
        )
    # All estimators have the same wordings
    if not report.information[0].is_testable:
        sentences.append(_untestable_sentence(report.information[0], report.kind))
    spread = sum(report.overall.spread) / len(report.overall.spread)
    if spread < HARDLY and any(row.is_more_than_shuffled for row in report.information):
        sentences.append(
            f"They differ by little: a weight deviates by {100 * spread:.2f} points over all "
            "questions."
        )
    return sentences


def _untestable_sentence(row: KindInformation, kind: str) -> str:
    """Why there is no verdict on what weights say about the kind."""
    wordings = f"{sum(row.wordings.values())} wordings are too few for {len(row.wordings)}"
    reason = f"{wordings} {PLURAL[kind]}"
    if row.scarce_kinds:
        have = "has" if len(row.scarce_kinds) == 1 else "have"
        reason = f"{listed(row.scarce_kinds)} {have} fewer than {FEWEST_WORDINGS} wordings"
    return f"Wording and {kind} cannot be told apart, so that weights may follow either: {reason}."


def _control_sentence(control: str, effect: ControlEffect) -> str:
    """What becomes of the answers under a control."""
    difference = effect.difference
    becomes = "do not get measurably worse"
    if difference.verdict == "better":
        becomes = "get worse"
    elif difference.verdict == "worse":
        becomes = "get better"
    low, high = difference.interval
    return (
        f"Answers {becomes} with the {control}: {signed(-difference.difference)} points "
        f"({span([-high, -low], plus=True)})."
    )


def _conclusion(report: GuidanceReport) -> str:
    """What weights and answers say together."""
    if not report.controls:
        return ""
    if report.guided.interval[0] <= report.chance:
        return (
            "The model does not score measurably more than the commonest answers: whether it needs "
            "its guidance cannot show in what it answers."
        )
    differ = any(row.is_more_than_shuffled for row in report.information)
    needed = any(effect.difference.verdict == "better" for effect in report.controls.values())
    if differ and needed:
        return f"So what the weights know of the {report.kind} is used by the answers."
    if differ:
        return (
            f"So weights that differ by {report.kind} are no evidence that the guidance helps: the "
            "answers are as good without it."
        )
    if needed and not all(row.is_testable for row in report.information):
        return f"So the guidance helps, by the wording of a question or by its {report.kind}."
    if needed:
        return f"So the guidance helps, by something else in the question than its {report.kind}."
    return "So nothing shows that the guidance does anything."
