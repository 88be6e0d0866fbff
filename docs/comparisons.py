"""Generated pages that set several studies of the same arms side by side."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from docs.results_pages import RESULTS, table_row
from layerfuse.evaluate.learning_status import ArmLearning
from layerfuse.evaluate.records import RunRecord, read_records
from layerfuse.evaluate.significance import seed_noise
from layerfuse.look.validation import rank_correlation

CONDITIONING = """# What conditioning did to a ranking of strategies

The same ten strategies on the same pictures and models. *Standardised* layers have channels of mean
0 and variance 1; *whitened* ones have directions of nearly equal variance as well (`normalize` of
the [recipe reference](recipe-reference.md)). A projector learns along the large directions first,
so that after a short training a score says how well an arm's layers are conditioned, and not what
they hold: [how far training went](training-length.md) is the question to ask of every column. The
first columns are studies from before: besides the whole LLM they had 150 pictures, longer prompts,
an align stage, other learning rates and adapters, and two seeds or three. Made by `make docs` from
results/.
"""
BLOCKS = """# Does an LLM of a few blocks rank arms as the whole one does?

The same arms on the same pictures with the first blocks of SmolLM2-135M and with all thirty
(`llm.blocks` of the [recipe reference](recipe-reference.md)), each trained for 800 steps of four
pictures, and the whole LLM, which begins to learn later, once more for 1,600. A few blocks are a
screening device: this page says how far their order can be trusted, measured by the whole LLM
where its arms, one run of each, had learned what they could. Where arms were still improving, as
after 800 steps, so may their order change. Made by `make docs` from results/.
"""
SELECTED = (
    "## Single layers and triples",
    "",
    "The same of the choice of layers.",
    "",
)
MEANING = (
    "A score is the mean over families and seeds; in brackets the arm's rank, and ↑ where it was "
    "still improving when training stopped, × where it had learned nothing (blind, failed or "
    "unstable)."
)
MARKS = {"flat": "", "not judged": "", "still improving": " ↑"}


@dataclass(frozen=True)
class Column:
    """One of the studies that are set side by side.

    Attributes:
        title: what it is called in the table.
        folder: of its committed results.
    """

    title: str
    folder: Path

    def summary(self) -> dict[str, Any]:
        """Read what the study found."""
        return json.loads((self.folder / "summary.json").read_text("utf-8"))


STRATEGIES = (
    Column("the whole LLM, standardised, 100 steps", RESULTS / "local-strategies"),
    Column("2 blocks, standardised, 400 steps", RESULTS / "scenes-standardized"),
    Column("2 blocks, standardised, 1,200 steps", RESULTS / "scenes-standardized-long"),
    Column("2 blocks, whitened, 400 steps", RESULTS / "scenes-strategies"),
    Column("2 blocks, whitened, 1,200 steps", RESULTS / "scenes-long"),
)
"""The last one is what the others are compared with: best conditioned, longest trained."""
SELECTIONS = (
    Column("the whole LLM, standardised, 160 steps", RESULTS / "local-selection"),
    Column("2 blocks, standardised, 400 steps", RESULTS / "scenes-selection-standardized"),
    Column("2 blocks, standardised, 1,200 steps", RESULTS / "scenes-selection-standardized-long"),
    Column("2 blocks, whitened, 400 steps", RESULTS / "scenes-selection"),
)
DEPTHS = (
    Column("2 blocks", RESULTS / "scenes-blocks" / "2"),
    Column("4 blocks", RESULTS / "scenes-blocks" / "4"),
    Column("8 blocks", RESULTS / "scenes-blocks" / "8"),
    Column("all 30 blocks, 800 steps", RESULTS / "scenes-blocks" / "30"),
    Column("all 30 blocks, 1,600 steps", RESULTS / "scenes-blocks" / "30-long"),
)
"""The last one is what the others are compared with: the whole LLM at its plateau."""


def measured(columns: Sequence[Column]) -> list[Column]:
    """The columns whose studies have been run."""
    return [column for column in columns if (column.folder / "summary.json").is_file()]


def comparison(columns: Sequence[Column]) -> list[str]:
    """A table of scores by study, and how well the last study's order is that of the others.

    Args:
        columns: finished studies of arms with the same names; not all need all arms.
    """
    summaries = [column.summary() for column in columns]
    scores: list[dict[str, float]] = []
    for summary in summaries:
        scores.append({arm["arm"]: arm["mean"]["score"] for arm in summary["arms"]})
    # The last study's order, best first; then what it does not have.
    names = [arm["arm"] for arm in summaries[-1]["arms"]]
    for of_study in scores:
        names += [name for name in of_study if name not in names]

    lines = [
        table_row(["arm", *(column.title for column in columns)]),
        "|---" * (1 + len(columns)) + "|",
    ]
    for name in names:
        cells = [name]
        for summary, of_study in zip(summaries, scores, strict=True):
            cells.append(score_cell(summary, of_study, name))
        lines.append(table_row(cells))
    lines += ["", MEANING, ""]

    lines += [table_row(["study", "seeds", "seed SD, points", "arms still to learn", "order"])]
    lines += ["|---" * 5 + "|"]
    for column, summary, of_study in zip(columns, summaries, scores, strict=True):
        unfinished = 0
        for name in of_study:
            if ArmLearning.from_json(summary["learning"][name]).state not in ("flat", "not judged"):
                unfinished += 1
        noise = seed_noise_points(summary)
        lines.append(
            table_row(
                [
                    column.title,
                    str(max(len(arm["seeds"]) for arm in summary["arms"])),
                    noise,
                    f"{unfinished} of {len(of_study)}",
                    agreement(of_study, scores[-1]),
                ]
            )
        )
    lines += [
        "",
        f"Order: Spearman's rank correlation with {columns[-1].title}, over the arms of both, with "
        "the 95 % interval of Bonett and Wright. With so few arms it is wide, and arms that are "
        "nearly equal may change places by noise alone.",
    ]
    return lines


def score_cell(summary: dict[str, Any], scores: dict[str, float], name: str) -> str:
    """An arm's score, its rank, and whether it had learned what it could."""
    if name not in scores:
        return ""
    rank = 1 + sum(other > scores[name] for other in scores.values())
    state = ArmLearning.from_json(summary["learning"][name]).state
    return f"{scores[name]:.3f} ({rank}){MARKS.get(state, ' ×')}"


def seed_noise_points(summary: dict[str, Any]) -> str:
    """The pooled standard deviation of a run's score between seeds."""
    noise = seed_noise({arm["arm"]: arm["seed_means"] for arm in summary["arms"]})
    return "unknown" if noise is None else f"{100 * noise.sd:.1f}"


def agreement(scores: dict[str, float], reference: dict[str, float]) -> str:
    """How well an order is that of the reference."""
    if scores is reference:
        return ""
    common = [name for name in reference if name in scores]
    correlation = rank_correlation(
        [scores[name] for name in common],
        [reference[name] for name in common],
    )
    if correlation is None:
        return "undefined"
    low, high = correlation.interval
    return f"{correlation.rho:+.2f} ({low:+.2f} to {high:+.2f}), {correlation.n} arms"


def costs(columns: Sequence[Column]) -> list[str]:
    """What a run of each study cost."""
    lines = [
        table_row(["study", "steps", "seconds a run by the clock, training and its validation"]),
        "|---" * 3 + "|",
    ]
    for column in columns:
        records = read_records(column.folder / "results.jsonl", RunRecord)
        seconds = [record.seconds["finetune"] for record in records]
        steps = sorted({record.losses["finetune"][-1][0] for record in records})
        lines.append(
            table_row(
                [
                    column.title,
                    ", ".join(f"{number:,}" for number in steps),
                    f"{sum(seconds) / len(seconds):,.0f}",
                ]
            )
        )
    lines += [
        "",
        "On one core each, two runs at a time, beside other work that slowed some studies more "
        "than others: no measurement of speed.",
    ]
    return lines


def conditioning_page() -> str:
    """What whitening and longer training did to the ranking of strategies."""
    strategies = comparison(measured(STRATEGIES))
    selections = comparison(measured(SELECTIONS))
    return "\n".join([CONDITIONING, *strategies, "", *SELECTED, *selections, ""])


def blocks_page() -> str:
    """Whether a few blocks rank arms as the whole LLM does."""
    columns = measured(DEPTHS)
    return "\n".join(
        [BLOCKS, *comparison(columns), "", "## What it costs", "", *costs(columns), ""]
    )
