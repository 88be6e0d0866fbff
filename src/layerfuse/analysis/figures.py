"""Figures of a look at an encoder, as PNG and SVG."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from layerfuse import plots

TITLES = {
    "cosine": "cosine of patch tokens",
    "cosine_centred": "cosine without the layer's mean token",
    "cka_tokens": "linear CKA over tokens",
    "cka_images": "linear CKA over pictures",
}


@contextmanager
def figure(stem: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure in the project's style, saved as `stem`.png and `stem`.svg."""
    with plots.style():
        made = Figure(figsize=(width, height), layout="constrained")
        yield made
        made.savefig(stem.with_suffix(".png"), dpi=150)
        made.savefig(stem.with_suffix(".svg"), metadata={"Date": None})


def draw_similarity(report: dict[str, Any], folder: Path) -> None:
    """The four matrices of an encoder, its groups framed in the one that they come from; in a
    figure of its own, the linear CKA with the layers of another encoder if there is one."""
    groups = report["groups"][str(report["chosen"])]["groups"]
    with figure(folder / "similarity", 11, 9.6) as made:
        for ax, (name, title) in zip(made.subplots(2, 2).flat, TITLES.items(), strict=True):
            _matrix(ax, report[name], title, groups if name == report["by"] else [])
    if report["other"]:
        labels = f"layer of {report['other']}", f"layer of {report['encoder']}"
        with figure(folder / "cross", 11, 4.9) as made:
            for ax, kind in zip(made.subplots(1, 2), ("tokens", "images"), strict=True):
                _matrix(ax, report[f"cross_{kind}"], TITLES[f"cka_{kind}"], [], *labels)


def _matrix(
    ax: Axes, matrix: list, title: str, groups: list, xlabel: str = "layer", ylabel: str = "layer"
) -> None:
    if all(value is None for row in matrix for value in row):
        ax.set_title(f"{title}: undefined", fontsize=10, loc="left")
        ax.set_axis_off()
    else:
        data = {"matrix": matrix, "title": title, "xlabel": xlabel, "ylabel": ylabel}
        plots.plot_matrix({**data, "groups": groups}, ax)


def draw_probe(report: dict[str, Any], stem: Path) -> None:
    """Tasks by layers as a heat map above a line plot, with the combinations beside the layers."""
    rows, tasks = report["rows"], list(report["tasks"])
    data: dict[str, Any] = {"tasks": tasks, "columns": [row["name"] for row in rows]}
    for key, value in (("scores", "accuracy"), ("relative", "relative")):
        data[key] = [[row["tasks"][task][value] for row in rows] for task in tasks]
    with figure(stem, max(9, 0.62 * len(rows) + 2), 3.6 + 0.42 * len(tasks)) as made:
        top, bottom = made.subplots(2, 1, height_ratios=[0.42 * len(tasks), 3.2])
        plots.plot_tasks(data, top)
        title = f"accuracy of probes on {report['features']} features, %"
        top.set_title(title, fontsize=10, loc="left")
        singles = [row for row in rows if len(row["layers"]) == 1]
        lines = []
        for task in tasks:
            cells = [row["tasks"][task] for row in singles]
            best = max(cell["accuracy"] for cell in cells) or 1.0
            low, high = ([cell["interval"][end] / best for cell in cells] for end in (0, 1))
            relative = [cell["relative"] for cell in cells]
            lines.append({"task": task, "relative": relative, "low": low, "high": high})
        plots.plot_depth({"layers": [row["layers"][0] for row in singles], "tasks": lines}, bottom)
        bottom.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
