"""What a look at an encoder prints: tables and sentences."""

import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from layerfuse.look.probe_report import ProbeReport, Probes, TaskReading
from layerfuse.look.recommendation import RankedSelection, Validation
from layerfuse.look.similarity_report import SimilarityReport

NORMALIZED = {"none": "raw", "standardize": "std.", "whiten": "wh."}
"""What normalises a layer in a recipe, and how the table of conditioning calls it."""


def _table(*headings: str) -> Table:
    """An empty table of numbers, without a frame."""
    columns = []
    for heading in headings:
        columns.append(Column(heading, justify="right", no_wrap=True))
    return Table(
        *columns,
        box=None,
        padding=(0, 1),
        collapse_padding=True,
        pad_edge=False,
    )


def _number(value: float | None, digits: int = 2) -> str:
    """A number with so many decimals; a dash where it is undefined."""
    # Silhouettes are None where undefined, as in the file; measured numbers are NaN
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.{digits}f}"


def similarity_table(report: SimilarityReport, console: Console) -> None:
    """Print a row for each layer, then the groups with their representatives.

    Args:
        report: what was measured.
        console: where it is printed.
    """
    # Neighbours and the last layer show most of a matrix that is too wide for a terminal
    table = _table("layer", "cosine next", "last", "CKA next", "last", "norm", "entropy", "dim.")
    similarity = report.measured.similarity
    scores = report.measured.scores
    last = report.settings.depth
    for layer in report.settings.layers:
        # The last layer is its own next
        following = min(layer + 1, last)
        cosine = similarity.cosine[layer]
        cka = similarity.cka_tokens[layer]
        table.add_row(
            str(layer),
            _number(cosine[following]),
            _number(cosine[last]),
            _number(cka[following]),
            _number(cka[last]),
            _number(similarity.norm[layer]),
            _number(scores.entropy[layer]),
            _number(scores.dimension[layer]),
        )
    console.print(table)

    chosen = report.measured.chosen_groups
    for group, layer in zip(chosen.groups, chosen.representatives, strict=True):
        console.print(f"group {group[0]}-{group[-1]}: representative {layer}")
    console.print(
        f"{similarity.images} pictures; groups by {report.settings.by}, mean silhouette "
        f"{_number(chosen.silhouette)}; standard error of the centred cosine "
        f"{_number(similarity.cosine_centred_error, 3)} at most",
        soft_wrap=True,
    )


def conditioning_table(report: SimilarityReport, console: Console) -> None:
    """Print how the variance of each layer is spread, raw and after each normalisation.

    Args:
        report: what was measured.
        console: where it is printed.
    """
    headings = ["layer"]
    for heading in NORMALIZED.values():
        headings.extend([f"rank {heading}", "1st %", "cond."])
    table = _table(*headings)
    for layer in report.settings.layers:
        cells = [str(layer)]
        for name in NORMALIZED:
            numbers = report.measured.conditioning[name]
            cells.append(_number(numbers.effective_rank[layer], 1))
            cells.append(_number(100 * numbers.first_share[layer], 1))
            cells.append(_rough(numbers.condition[layer]))
        table.add_row(*cells)
    console.print(table)
    console.print(
        f"how the variance of {report.measured.scores.kept_tokens} tokens is spread over "
        "directions, raw, standardised and whitened: effective rank, share of the first direction, "
        "condition. A short training learns little of a layer of low rank; `normalize: whiten` in "
        "a recipe raises it",
        soft_wrap=True,
    )


def _rough(value: float) -> str:
    """A number of any size with two digits; a dash where it is undefined."""
    if math.isnan(value):
        return "-"
    return f"{value:.1e}"


def probe_table(report: ProbeReport, probes: Probes, console: Console) -> None:
    """Print tasks by layers and combinations, accuracy in %, the best of each task marked.

    Args:
        report: what was probed.
        probes: those of the report on one kind of features.
        console: where it is printed.
    """
    best = {}
    for task in report.tasks:
        accuracies = [selection.tasks[task].accuracy for selection in probes.selections]
        best[task] = max(accuracies)

    table = _table("layers", *report.tasks, "mean")
    for selection in probes.selections:
        cells = [selection.name]
        for task, reading in selection.tasks.items():
            # A tie is marked in every row that reaches it
            cells.append(_accuracy(reading, best[task]))
        cells.append(f"{100 * selection.mean:.0f}")
        table.add_row(*cells)
    chances = ["chance"]
    for task in report.tasks.values():
        # Two spaces stand where accuracies have their marks
        chances.append(f"{100 * task.chance:.0f}  ")
    chances.append("")
    table.add_row(*chances, style="dim")
    console.print(table)
    console.print(
        f"accuracy in % on {report.test_pictures} pictures ± half of a 95 % interval, "
        f"* best; {probes.kind} features, {report.train_pictures} training pictures",
        soft_wrap=True,
    )


def _accuracy(reading: TaskReading, best: float) -> str:
    """An accuracy in % with half of its interval, and a star if it is the best."""
    low, high = reading.interval
    # Wilson's interval is not symmetric; its half width is enough for a table
    half = 50 * (high - low)
    mark = " "
    if reading.accuracy == best:
        mark = "*"
    return f"{100 * reading.accuracy:.0f}±{half:.0f}{mark}"


def ranking_words(ranking: list[RankedSelection], console: Console) -> None:
    """Print selections of layers, each with its evidence in a sentence.

    Args:
        ranking: the first selections, the best first.
        console: where it is printed.
    """
    for place, selection in enumerate(ranking, start=1):
        sentence = _evidence(selection, place)
        console.print(sentence, soft_wrap=True, highlight=False)

    # The first selection ties with itself, so there is always one
    tied = [selection.layers for selection in ranking if selection.tie]
    fewest = min(tied, key=len)
    console.print(f"fewest of these that probes cannot tell from the first: {fewest}")


def _evidence(selection: RankedSelection, place: int) -> str:
    """What speaks for a selection at its place, 1 the first."""
    accuracy = 100 * selection.accuracy
    score = 100 * selection.score
    first_part = (
        f"{place}. layers {_listed(selection.layers)}: "
        f"probes read {accuracy:.1f} % right, {score:.1f} % of the best"
    )
    # The first has no distance to itself
    if place > 1:
        low, high = selection.behind
        first_part += f" ({100 * low:+.1f} to {100 * high:+.1f} points to the first)"

    parts = [first_part]
    if selection.best_on:
        parts.append(f"best on {_listed(selection.best_on)}")
    covered = []
    for group in selection.groups:
        covered.append(f"{group[0]}-{group[-1]}")
    parts.append(f"from groups {' and '.join(covered)}")
    entropies = [_number(value) for value in selection.entropy]
    parts.append(f"entropy {_listed(entropies)}")
    dimensions = [_number(value) for value in selection.dimension]
    parts.append(f"dimension {_listed(dimensions)}")
    return "; ".join(parts)


def _listed(items: Sequence[Any]) -> str:
    """Items with commas between them."""
    return ", ".join(map(str, items))


def validation_words(validation: Validation, console: Console) -> None:
    """Print the rank correlation of every criterion with accuracy after training, a line each.

    Args:
        validation: against a finished study.
        console: where it is printed.
    """
    families = ", ".join(validation.families)
    console.print(f"rank correlation with accuracy after training ({families}):", soft_wrap=True)
    for scope, correlations in validation.correlations.items():
        for name, correlation in correlations.items():
            # A scope with too few selections has no correlation
            if correlation is None:
                continue
            low, high = correlation.interval
            console.print(
                f"  {name}, {correlation.n} {scope}: {correlation.rho:+.2f} "
                f"({low:+.2f} to {high:+.2f})",
                highlight=False,
            )
    between_seeds = _number(validation.between_seeds)
    console.print(f"  one seed with another: {between_seeds}", highlight=False)
