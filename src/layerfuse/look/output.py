"""What a look at an encoder leaves: figures as PNG and SVG, printed tables, and JSON files that are
written whole or not at all."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, TaskID
from rich.progress import Progress as Bar
from rich.table import Column, Table

from layerfuse import plots
from layerfuse.progress import Progress

TITLES = {
    "cosine": "cosine of patch tokens",
    "cosine_centred": "cosine without the layer's mean token",
    "cka_tokens": "linear CKA over tokens",
    "cka_images": "linear CKA over pictures",
}


def draw_similarity(report: dict[str, Any], folder: Path) -> None:
    """The four matrices of an encoder, its groups framed in the one that they come from; in a
    figure of its own, the linear CKA with the layers of another encoder if there is one."""
    groups = report["groups"][str(report["chosen"])]["groups"]
    data: dict[str, Any] = {"xlabel": "layer", "ylabel": "layer"}
    with plots.figure(folder / "similarity", 11, 9.6) as made:
        for ax, (name, title) in zip(made.subplots(2, 2).flat, TITLES.items(), strict=True):
            data |= {"matrix": report[name], "title": title}
            plots.plot_matrix({**data, "groups": groups if name == report["by"] else []}, ax)
    if report["other"]:
        data["xlabel"], data["ylabel"] = (f"layer of {report[of]}" for of in ("other", "encoder"))
        with plots.figure(folder / "cross", 11, 4.9) as made:
            for ax, kind in zip(made.subplots(1, 2), ("tokens", "images"), strict=True):
                data |= {"matrix": report[f"cross_{kind}"], "title": TITLES[f"cka_{kind}"]}
                plots.plot_matrix({**data, "groups": []}, ax)


def draw_probe(report: dict[str, Any], stem: Path) -> None:
    """Tasks by layers as a heat map above a line plot, with the combinations beside the layers."""
    columns, lines = len(report["rows"]), 0.42 * len(report["tasks"])
    with plots.figure(stem, max(9, 0.62 * columns + 2), 3.6 + lines) as made:
        top, bottom = made.subplots(2, 1, height_ratios=[lines, 3.2])
        plots.plot_tasks(report, top)
        title = f"accuracy of probes on {report['features']} features, %"
        top.set_title(title, fontsize=10, loc="left")
        plots.plot_depth(report, bottom)
        bottom.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _table(*columns: str) -> Table:
    right = [Column(column, justify="right", no_wrap=True) for column in columns]
    return Table(*right, box=None, padding=(0, 1), collapse_padding=True, pad_edge=False)


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def similarity_table(report: dict[str, Any], console: Console) -> None:
    """One row per layer, then the groups with their representatives."""
    table = _table("layer", "cosine next", "last", "CKA next", "last", "norm", "entropy", "dim.")
    last = report["depth"]
    for k in report["layers"]:
        row = [report[m][k][j] for m in ("cosine", "cka_tokens") for j in (min(k + 1, last), last)]
        scores = [report[name][k] for name in ("norm", "entropy", "dimension")]
        table.add_row(str(k), *map(_number, [*row, *scores]))
    console.print(table)
    found = report["groups"][str(report["chosen"])]
    for group, layer in zip(found["groups"], found["representatives"], strict=True):
        console.print(f"group {group[0]}-{group[-1]}: representative {layer}")
    console.print(
        f"{report['images']} pictures; groups by {report['by']}, mean silhouette "
        f"{_number(found['silhouette'])}; standard error of the centred cosine "
        f"{_number(report['cosine_centred_error'], 3)} at most",
        soft_wrap=True,
    )


def probe_table(report: dict[str, Any], console: Console) -> None:
    """Tasks by layers and combinations, accuracy in %, the best of each task marked."""
    table = _table("layers", *report["tasks"], "mean")
    best = {t: max(r["tasks"][t]["accuracy"] for r in report["rows"]) for t in report["tasks"]}
    for row in report["rows"]:
        cells = []
        for task, cell in row["tasks"].items():
            low, high = cell["interval"]
            mark = "*" if cell["accuracy"] == best[task] else " "
            cells.append(f"{100 * cell['accuracy']:.0f}±{50 * (high - low):.0f}{mark}")
        table.add_row(row["name"], *cells, f"{100 * row['mean']:.0f}")
    chances = [f"{100 * t['chance']:.0f}  " for t in report["tasks"].values()]
    table.add_row("chance", *chances, "", style="dim")
    console.print(table)
    console.print(
        f"accuracy in % on {report['test_pictures']} pictures ± half of a 95 % interval, "
        f"* best; {report['features']} features, {report['train_pictures']} training pictures",
        soft_wrap=True,
    )


def ranking_words(ranking: list[dict[str, Any]], console: Console) -> None:
    """The first selections, each with its evidence in a sentence."""
    for place, row in enumerate(ranking, start=1):
        low, high = (100 * v for v in row["behind"])
        covered = " and ".join(f"{g[0]}-{g[-1]}" for g in row["groups"])
        words = f"{place}. layers {', '.join(map(str, row['layers']))}: probes read "
        words += f"{100 * row['accuracy']:.1f} % right, {100 * row['score']:.1f} % of the best"
        words += f" ({low:+.1f} to {high:+.1f} points to the first)" if place > 1 else ""
        words += f"; best on {', '.join(row['best_on'])}" if row["best_on"] else ""
        words += f"; from groups {covered}"
        for name in ("entropy", "dimension"):
            words += f"; {name} {', '.join(map(_number, row[name]))}"
        console.print(words, soft_wrap=True, highlight=False)
    simple = min((r for r in ranking if r["tie"]), key=lambda r: len(r["layers"]))["layers"]
    console.print(f"fewest of these that probes cannot tell from the first: {simple}")


def validation_words(found: dict[str, Any], console: Console) -> None:
    """The rank correlations of every criterion, a line each."""
    families = ", ".join(found["families"])
    console.print(f"rank correlation with accuracy after training ({families}):", soft_wrap=True)
    for scope in ("selections", "single layers"):
        for name, cell in found["correlations"][scope].items():
            if cell:
                low, high = cell["interval"]
                words = f"  {name}, {cell['n']} {scope}: {cell['rho']:+.2f}"
                console.print(f"{words} ({low:+.2f} to {high:+.2f})", highlight=False)
    console.print(f"  one seed with another: {_number(found['between_seeds'])}", highlight=False)


def progress_bar(console: Console) -> Bar:
    """Make a progress bar with a count and the time left.

    Args:
        console: where it is shown.

    Returns:
        The bar, to be entered as a context.
    """
    return Bar(
        *Bar.get_default_columns(),
        MofNCompleteColumn(),
        console=console,
    )


def shown_on(bar: Bar) -> Progress:
    """Show reported progress on a bar, a line for each phase.

    Args:
        bar: an entered progress bar.

    Returns:
        What long work calls as it advances.
    """
    tasks: dict[str, TaskID] = {}

    def show(phase: str, done: int, total: int, note: str = "") -> None:
        if phase not in tasks:
            tasks[phase] = bar.add_task(phase, total=total)
        bar.update(tasks[phase], completed=done)

    return show


def read_json(file: Path) -> dict[str, Any]:
    """A report. Raises ValueError naming a file that holds none."""
    try:
        return json.loads(file.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is damaged ({error}): delete it to measure again") from error
