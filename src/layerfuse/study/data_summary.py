"""What a study's data holds, source by source: printed before training, and in the report."""

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console

from layerfuse.data.lazy_records import Samples
from layerfuse.data.sample_sets import SampleSets
from layerfuse.files import write_text
from layerfuse.model.chat_template import written
from layerfuse.tables import Heading, print_fitted

DATA_SUMMARY = "data.json"
COMMONEST = 10
"""How many of the commonest answers are named."""
NAMED_LENGTH = 20
"""Characters of an answer that the terminal shows."""


@dataclass(frozen=True)
class CommonAnswer:
    """An answer that many questions have."""

    answer: str
    share: float
    """of all answers of its source, 0..1"""


@dataclass(frozen=True)
class SourceSummary:
    """What one source holds."""

    source: str
    """the stage that trains on it, or the test"""
    samples: int
    pictures: int
    """different ones, told apart by their bytes"""
    without_picture: int
    """samples"""
    questions: int
    """with an answer; a greeting answers none"""
    questions_per_picture: float | None
    """of samples with pictures; None where there is no picture"""
    commonest: list[CommonAnswer]
    """the commonest answers, at most ten"""
    tokens: list[float]
    """least, median and most tokens of a sample, in the test of a question with its answer, with
    the most image tokens that an arm makes"""
    drawn: int | None = None
    """samples on which each run trains, drawn by its seed; None where it trains on all"""
    shared: dict[str, int] = field(default_factory=dict[str, int])
    """of the test and the validation, how many pictures another source shows too, by its name"""

    @property
    def commonest_share(self) -> float:
        """The share of all answers that the commonest ones have together."""
        return sum(common.share for common in self.commonest)


def summarize_data(
    samples: SampleSets,
    digests: Mapping[str, str],
    tokens: Mapping[str, Sequence[int]],
    subsets: Mapping[str, int] | None = None,
) -> list[SourceSummary]:
    """Count what every source of a study holds.

    Args:
        samples: of the study.
        digests: of the pictures' bytes, by the picture's name.
        tokens: by source, of every sample.
        subsets: number of samples that a run draws, by the stages that train on a part of theirs.

    Returns:
        One summary for each source, the test last.
    """
    summaries = []
    shared = samples.shared_pictures(digests)
    for label, source in samples.by_label().items():
        summary = _summarize(label, source, digests, tokens[label])
        summary = replace(summary, shared=shared.get(label, {}))
        if subsets is not None and label in subsets:
            summary = replace(summary, drawn=subsets[label])
        summaries.append(summary)
    return summaries


def _summarize(
    label: str, samples: Samples, digests: Mapping[str, str], tokens: Sequence[int]
) -> SourceSummary:
    """Count what one source holds."""
    pictures: set[str] = set()
    num_without_picture = 0
    num_questions_with_picture = 0
    answers: Counter[str] = Counter()
    for sample in samples:
        pictures.update(digests[picture.name] for picture in sample.pictures)
        of_sample = []
        for asked, message in pairwise(sample.messages):
            if asked["role"] == "user" and message["role"] == "assistant":
                of_sample.append(written(message["content"]).strip())
        answers.update(of_sample)
        if sample.pictures:
            num_questions_with_picture += len(of_sample)
        else:
            num_without_picture += 1

    num_questions = answers.total()
    commonest = []
    for answer, count in answers.most_common(COMMONEST):
        commonest.append(CommonAnswer(answer, count / num_questions))
    questions_per_picture = None
    if pictures:
        questions_per_picture = num_questions_with_picture / len(pictures)
    return SourceSummary(
        source=label,
        samples=len(samples),
        pictures=len(pictures),
        without_picture=num_without_picture,
        questions=num_questions,
        questions_per_picture=questions_per_picture,
        commonest=commonest,
        tokens=[min(tokens), statistics.median(tokens), max(tokens)],
    )


def write_data_summary(folder: Path, summaries: Sequence[SourceSummary]) -> None:
    """Keep the summaries for the report.

    Args:
        folder: the study's.
        summaries: of all sources.
    """
    content = [asdict(summary) for summary in summaries]
    write_text(folder / DATA_SUMMARY, json.dumps(content, indent=1) + "\n")


def read_data_summary(folder: Path) -> list[SourceSummary]:
    """What `write_data_summary` wrote.

    Args:
        folder: the study's.

    Returns:
        The summaries; none where the study was done before they were written.
    """
    file = folder / DATA_SUMMARY
    if not file.exists():
        return []
    summaries = []
    content: list[dict[str, Any]] = json.loads(file.read_text("utf-8"))
    for source in content:
        commonest = [CommonAnswer(**common) for common in source["commonest"]]
        summaries.append(SourceSummary(**{**source, "commonest": commonest}))
    return summaries


def print_data_summary(summaries: Sequence[SourceSummary], console: Console) -> None:
    """Print what the sources hold.

    Args:
        summaries: of all sources.
        console: where to print.
    """
    headings = [
        Heading("data"),
        Heading("samples", is_number=True),
        Heading("pictures", is_number=True),
        Heading("without", is_number=True),
        Heading("questions", is_number=True),
        Heading("a picture", is_number=True),
        Heading("tokens", is_number=True),
    ]
    rows = []
    for summary in summaries:
        least, median, most = summary.tokens
        per_picture = "none"
        if summary.questions_per_picture is not None:
            per_picture = f"{summary.questions_per_picture:.1f}"
        rows.append(
            [
                summary.source,
                f"{summary.samples:,}",
                f"{summary.pictures:,}",
                f"{summary.without_picture:,}",
                f"{summary.questions:,}",
                per_picture,
                f"{least:,}/{median:,g}/{most:,}",
            ]
        )
    print_fitted(console, headings, rows)
    for summary in summaries:
        if summary.drawn is not None:
            console.print(
                f"{summary.source}: each run trains on {summary.drawn:,} of the "
                f"{summary.samples:,} samples, drawn by its seed",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
        named = []
        for common in summary.commonest:
            short = " ".join(common.answer.split())
            if len(short) > NAMED_LENGTH:
                short = short[:NAMED_LENGTH] + "…"
            named.append(f"{short} {100 * common.share:.1f} %")
        console.print(
            f"{summary.source}: the {len(named)} commonest answers are "
            f"{100 * summary.commonest_share:.0f} % of all: {', '.join(named)}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
