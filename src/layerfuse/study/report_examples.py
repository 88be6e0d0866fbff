"""Questions that a study's report shows with the answers of all arms, chosen by a rule."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from layerfuse.evaluate.records import AnswerRecord, FinishedRun
from layerfuse.evaluate.score_table import GroupKey, category_of, family_of
from layerfuse.study.summary import MOST_FAMILIES

# Groups of questions that get an example: all that tables show.
GROUPS = MOST_FAMILIES
# The longer side of pictures, in pixels, and the quality of those that are stored as JPEG.
PIXELS = 224
QUALITY = 85


@dataclass(frozen=True)
class ArmAnswer:
    """One arm's answer to a question."""

    arm: str
    answer: AnswerRecord


@dataclass(frozen=True)
class Example:
    """A question with the answers of all arms, and the rule by which it was chosen."""

    why: str
    group: str | None
    """the family or category that it is the example of; None: of none"""
    question: AnswerRecord
    """the first arm's answer, which holds the question and its picture"""
    answers: list[ArmAnswer]


@dataclass(frozen=True)
class ExampleCard:
    """An example as the page shows it.

    Attributes:
        id: of its place on the page.
        example: what it shows.
        picture: a data address; None where no file is.
    """

    id: str
    example: Example
    picture: str | None


@dataclass(frozen=True)
class ExampleRule:
    """Choose the first question of this group (None: any) that is answered in this way."""

    why: str
    group: str | None
    scores: set[float]


def thumbnail(study_dir: Path, image: str | None) -> str | None:
    """Make a small copy of a picture that a page can hold.

    Args:
        study_dir: the study's folder.
        image: the picture's path in it.

    Returns:
        A data address of at most 224 pixels, as PNG or JPEG, whichever is smaller: drawings are
        smaller as the one, photos as the other. None where there is no file.
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
    png = io.BytesIO()
    small.save(png, format="PNG", optimize=True)
    jpeg = io.BytesIO()
    small.save(jpeg, format="JPEG", quality=QUALITY)
    kind, stored = "png", png.getvalue()
    if len(jpeg.getvalue()) < len(stored):
        kind, stored = "jpeg", jpeg.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(stored).decode()}"


def choose(
    runs: list[FinishedRun], shown_by: Literal["families", "categories"] = "families"
) -> list[Example]:
    """Choose examples by a rule: the first ids, a new picture each.

    Each arm's first run; per group of questions the first one on which arms disagree, then the
    first that all answer rightly and the first that all answer wrongly.

    Args:
        runs: all finished runs.
        shown_by: the groups of questions.

    Returns:
        At most one example for each of the first ten groups, and two; rules that no question fits
        are left out.
    """
    first_runs: dict[str, FinishedRun] = {}
    for run in reversed(runs):
        # Going backwards, the last run that stands for an arm is its first one.
        first_runs[run.record.arm] = run
    shown_runs = list(first_runs.values())
    shown_runs.reverse()

    group_of = category_of if shown_by == "categories" else family_of
    groups = sorted({group_of(answer) for answer in runs[0].answers})
    rules = []
    for group in groups[:GROUPS]:
        rules.append(ExampleRule(f"{group}: arms disagree", group, {0.0, 1.0}))
    rules.append(ExampleRule("all right", None, {1.0}))
    rules.append(ExampleRule("all wrong", None, {0.0}))

    chosen = []
    shown_samples: set[str] = set()
    for rule in rules:
        example = first_example(rule, group_of, shown_runs, shown_samples)
        if example is not None:
            chosen.append(example)
            shown_samples.add(example.question.sample)
    return chosen


def first_example(
    rule: ExampleRule, group_of: GroupKey, runs: list[FinishedRun], shown_samples: set[str]
) -> Example | None:
    """Find the first question that fits a rule and whose sample is not shown yet."""
    for position, question in enumerate(runs[0].answers):
        if question.sample in shown_samples:
            continue
        if rule.group is not None and group_of(question) != rule.group:
            continue
        answers = [ArmAnswer(run.record.arm, run.answers[position]) for run in runs]
        scores = {each.answer.score for each in answers}
        if scores == rule.scores:
            return Example(rule.why, rule.group, question, answers)
    return None
