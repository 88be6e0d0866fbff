"""What a look at an encoder leaves: figures, printed tables, and JSON reports."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from layerfuse import plots
from layerfuse.errors import LayerfuseError

TITLES = {
    "cosine": "cosine of patch tokens",
    "cosine_centred": "cosine without the layer's mean token",
    "cka_tokens": "linear CKA over tokens",
    "cka_images": "linear CKA over pictures",
}


def draw_similarity(report: dict[str, Any], folder: Path) -> None:
    """Draw the four matrices of an encoder, and its CKA with another encoder if there is one.

    Args:
        report: what `similarity.json` holds. The groups are framed in the matrix that they come
            from.
        folder: gets `similarity.png` and `.svg`, and `cross.png` and `.svg` with another encoder.
    """
    chosen = str(report["chosen"])
    with plots.figure(folder / "similarity", 11, 9.6) as figure:
        axes = figure.subplots(2, 2).flat
        for ax, (name, title) in zip(axes, TITLES.items(), strict=True):
            # The groups of one matrix say nothing about another
            framed = []
            if name == report["by"]:
                framed = report["groups"][chosen]["groups"]
            matrix = {
                "matrix": report[name],
                "title": title,
                "xlabel": "layer",
                "ylabel": "layer",
                "groups": framed,
            }
            plots.plot_matrix(matrix, ax)

    if not report["other"]:
        return
    with plots.figure(folder / "cross", 11, 4.9) as figure:
        # Rows are layers of the encoder, columns those of the other
        axes = figure.subplots(1, 2)
        for ax, examples in zip(axes, ("tokens", "images"), strict=True):
            matrix = {
                "matrix": report[f"cross_{examples}"],
                "title": TITLES[f"cka_{examples}"],
                "xlabel": f"layer of {report['other']}",
                "ylabel": f"layer of {report['encoder']}",
                "groups": [],
            }
            plots.plot_matrix(matrix, ax)


def draw_probe(report: dict[str, Any], stem: Path) -> None:
    """Draw tasks by layers as a heat map above a line plot, combinations beside the layers.

    Args:
        report: what `probe.json` holds, with `features` and `rows` of one kind of features.
        stem: path of the figure without its suffix.
    """
    # Inches grow with the numbers of layers and tasks, so that the cells stay readable
    columns = len(report["rows"])
    heat_map_height = 0.42 * len(report["tasks"])
    width = max(9, 0.62 * columns + 2)
    with plots.figure(stem, width, 3.6 + heat_map_height) as figure:
        top, bottom = figure.subplots(2, 1, height_ratios=[heat_map_height, 3.2])
        plots.plot_tasks(report, top)
        title = f"accuracy of probes on {report['features']} features, %"
        top.set_title(title, fontsize=10, loc="left")
        plots.plot_depth(report, bottom)
        bottom.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


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
    if value is None:
        return "-"
    return f"{value:.{digits}f}"


def similarity_table(report: dict[str, Any], console: Console) -> None:
    """Print a row for each layer, then the groups with their representatives.

    Args:
        report: what `similarity.json` holds.
        console: where it is printed.
    """
    table = _table("layer", "cosine next", "last", "CKA next", "last", "norm", "entropy", "dim.")
    last = report["depth"]
    for layer in report["layers"]:
        # The last layer is its own next
        following = min(layer + 1, last)
        cosine = report["cosine"][layer]
        cka = report["cka_tokens"][layer]
        table.add_row(
            str(layer),
            _number(cosine[following]),
            _number(cosine[last]),
            _number(cka[following]),
            _number(cka[last]),
            _number(report["norm"][layer]),
            _number(report["entropy"][layer]),
            _number(report["dimension"][layer]),
        )
    console.print(table)

    chosen = report["groups"][str(report["chosen"])]
    for group, layer in zip(chosen["groups"], chosen["representatives"], strict=True):
        console.print(f"group {group[0]}-{group[-1]}: representative {layer}")
    console.print(
        f"{report['images']} pictures; groups by {report['by']}, mean silhouette "
        f"{_number(chosen['silhouette'])}; standard error of the centred cosine "
        f"{_number(report['cosine_centred_error'], 3)} at most",
        soft_wrap=True,
    )


def probe_table(report: dict[str, Any], console: Console) -> None:
    """Print tasks by layers and combinations, accuracy in %, the best of each task marked.

    Args:
        report: what `probe.json` holds, with `features` and `rows` of one kind of features.
        console: where it is printed.
    """
    rows = report["rows"]
    best = {}
    for task in report["tasks"]:
        best[task] = max(row["tasks"][task]["accuracy"] for row in rows)

    table = _table("layers", *report["tasks"], "mean")
    for row in rows:
        cells = [row["name"]]
        for task, cell in row["tasks"].items():
            cells.append(_accuracy(cell, best[task]))
        cells.append(f"{100 * row['mean']:.0f}")
        table.add_row(*cells)
    chances = ["chance"]
    for task in report["tasks"].values():
        # Two spaces stand where accuracies have their marks
        chances.append(f"{100 * task['chance']:.0f}  ")
    chances.append("")
    table.add_row(*chances, style="dim")
    console.print(table)
    console.print(
        f"accuracy in % on {report['test_pictures']} pictures ± half of a 95 % interval, "
        f"* best; {report['features']} features, {report['train_pictures']} training pictures",
        soft_wrap=True,
    )


def _accuracy(cell: dict[str, Any], best: float) -> str:
    """An accuracy in % with half of its interval, and a star if it is the best."""
    low, high = cell["interval"]
    half = 50 * (high - low)
    mark = "*" if cell["accuracy"] == best else " "
    return f"{100 * cell['accuracy']:.0f}±{half:.0f}{mark}"


def ranking_words(ranking: list[dict[str, Any]], console: Console) -> None:
    """Print selections of layers, each with its evidence in a sentence.

    Args:
        ranking: the first selections, the best first.
        console: where it is printed.
    """
    for place, selection in enumerate(ranking, start=1):
        sentence = _evidence(selection, place)
        console.print(sentence, soft_wrap=True, highlight=False)

    # The first selection ties with itself, so there is always one
    tied = [selection["layers"] for selection in ranking if selection["tie"]]
    fewest = min(tied, key=len)
    console.print(f"fewest of these that probes cannot tell from the first: {fewest}")


def _evidence(selection: dict[str, Any], place: int) -> str:
    """What speaks for a selection at its place, 1 the first."""
    accuracy = 100 * selection["accuracy"]
    score = 100 * selection["score"]
    first_part = (
        f"{place}. layers {_listed(selection['layers'])}: "
        f"probes read {accuracy:.1f} % right, {score:.1f} % of the best"
    )
    if place > 1:
        low, high = selection["behind"]
        first_part += f" ({100 * low:+.1f} to {100 * high:+.1f} points to the first)"

    parts = [first_part]
    if selection["best_on"]:
        parts.append(f"best on {_listed(selection['best_on'])}")
    covered = []
    for group in selection["groups"]:
        covered.append(f"{group[0]}-{group[-1]}")
    parts.append(f"from groups {' and '.join(covered)}")
    for name in ("entropy", "dimension"):
        values = [_number(value) for value in selection[name]]
        parts.append(f"{name} {_listed(values)}")
    return "; ".join(parts)


def _listed(items: Sequence[Any]) -> str:
    """Items with commas between them."""
    return ", ".join(map(str, items))


def validation_words(validation: dict[str, Any], console: Console) -> None:
    """Print the rank correlation of every criterion with accuracy after training, a line each.

    Args:
        validation: `families`, `correlations` by scope and criterion, and `between_seeds`.
        console: where it is printed.
    """
    families = ", ".join(validation["families"])
    console.print(f"rank correlation with accuracy after training ({families}):", soft_wrap=True)
    for scope in ("selections", "single layers"):
        for name, cell in validation["correlations"][scope].items():
            # A scope with too few selections has no correlation
            if not cell:
                continue
            low, high = cell["interval"]
            console.print(
                f"  {name}, {cell['n']} {scope}: {cell['rho']:+.2f} ({low:+.2f} to {high:+.2f})",
                highlight=False,
            )
    between_seeds = _number(validation["between_seeds"])
    console.print(f"  one seed with another: {between_seeds}", highlight=False)


def read_json(file: Path) -> dict[str, Any]:
    """Read a report.

    Args:
        file: `similarity.json` or `probe.json`.

    Returns:
        What it holds.

    Raises:
        LayerfuseError: the file cannot be read or is damaged; it is named.
    """
    try:
        report = json.loads(file.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LayerfuseError(f"{file} is damaged ({error}): delete it to measure again") from error
    except OSError as error:
        raise LayerfuseError(f"{file} cannot be read: {error}") from error
    if not isinstance(report, dict):
        raise LayerfuseError(f"{file} holds no report: delete it to measure again")
    return report
