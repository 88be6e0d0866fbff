"""Questions that a study's report shows with the answers of all arms, chosen by a rule."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from layerfuse.evaluate.records import AnswerRecord, FinishedRun

# Cards of examples on the page, and the longer side of their pictures in pixels.
PICTURES = 8
PIXELS = 224


@dataclass(frozen=True)
class ArmAnswer:
    """One arm's answer to a question."""

    arm: str
    answer: AnswerRecord


@dataclass(frozen=True)
class Example:
    """A question with the answers of all arms, and the rule by which it was chosen."""

    why: str
    question: AnswerRecord
    """the first arm's answer, which holds the question and its picture"""
    answers: list[ArmAnswer]


@dataclass(frozen=True)
class ExampleCard:
    """An example as the page shows it; picture is a data address, None where no file is."""

    example: Example
    picture: str | None


@dataclass(frozen=True)
class ExampleRule:
    """Choose the first question of this family (None: any) that is answered in this way."""

    why: str
    family: str | None
    scores: set[float]


def thumbnail(study_dir: Path, image: str | None) -> str | None:
    """Make a small copy of a picture that a page can hold.

    Args:
        study_dir: the study's folder.
        image: the picture's path in it.

    Returns:
        A PNG as a data address, at most 224 pixels; None where there is no file.
    """
    # Pillow and numpy are slow to import, and most pages show no picture.
    from layerfuse.vision.picture import Picture

    # A moved study may have left its pictures behind; the page then says so.
    path = study_dir / (image or "")
    if not path.is_file():
        return None
    # As the model saw it: upright, and transparency over white.
    small = Picture(str(path)).open()
    small.thumbnail((PIXELS, PIXELS))
    stream = io.BytesIO()
    small.save(stream, format="PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def choose(runs: list[FinishedRun]) -> list[Example]:
    """Choose examples by a rule: the first ids, a new picture each.

    Each arm's first run; per family the first question on which arms disagree, then the first
    that all answer rightly and the first that all answer wrongly.

    Args:
        runs: all finished runs.

    Returns:
        At most eight examples; rules that no question fits are left out.
    """
    first_runs: dict[str, FinishedRun] = {}
    for run in reversed(runs):
        # Going backwards, the last run that stands for an arm is its first one.
        first_runs[run.record.arm] = run
    shown_runs = list(first_runs.values())
    shown_runs.reverse()

    # Two cards are left for what all arms get right or wrong.
    families = sorted({answer.family for answer in runs[0].answers})
    rules = []
    for family in families[: PICTURES - 2]:
        rules.append(ExampleRule(f"{family}: arms disagree", family, {0.0, 1.0}))
    rules.append(ExampleRule("all right", None, {1.0}))
    rules.append(ExampleRule("all wrong", None, {0.0}))

    chosen = []
    shown_samples: set[str] = set()
    for rule in rules:
        example = first_example(rule, shown_runs, shown_samples)
        if example is not None:
            chosen.append(example)
            shown_samples.add(example.question.sample)
    return chosen


def first_example(
    rule: ExampleRule, runs: list[FinishedRun], shown_samples: set[str]
) -> Example | None:
    """Find the first question that fits a rule and whose sample is not shown yet."""
    for position, question in enumerate(runs[0].answers):
        if question.sample in shown_samples:
            continue
        if rule.family is not None and question.family != rule.family:
            continue
        answers = [ArmAnswer(run.record.arm, run.answers[position]) for run in runs]
        scores = {each.answer.score for each in answers}
        if scores == rule.scores:
            return Example(rule.why, question, answers)
    return None
