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


def draw_similarity(report: dict[str, Any], stem: Path) -> None:
    """The four matrices of an encoder; the groups are framed in the one that they come from."""
    groups = report["groups"][str(report["chosen"])]["groups"]
    with figure(stem, 11, 9.6) as made:
        axes = made.subplots(2, 2).flat
        for ax, (name, title) in zip(axes, TITLES.items(), strict=True):
            data = {"matrix": report[name], "title": title, "xlabel": "layer", "ylabel": "layer"}
            _matrix({**data, "groups": groups if name == report["by"] else []}, ax)


def draw_cross(report: dict[str, Any], stem: Path) -> None:
    """Linear CKA of the layers of two encoders."""
    with figure(stem, 11, 4.9) as made:
        for ax, name in zip(made.subplots(1, 2), ("cross_tokens", "cross_images"), strict=True):
            labels = {
                "xlabel": f"layer of {report['other']}",
                "ylabel": f"layer of {report['encoder']}",
            }
            title = TITLES[name.replace("cross", "cka")]
            data = {"matrix": report[name], "title": title, "groups": [], **labels}
            _matrix(data, ax)


def _matrix(data: dict[str, Any], ax: Axes) -> None:
    if all(value is None for row in data["matrix"] for value in row):
        ax.set_title(f"{data['title']}: undefined", fontsize=10, loc="left")
        ax.set_axis_off()
    else:
        plots.plot_matrix(data, ax)


def draw_probe(report: dict[str, Any], stem: Path) -> None:
    """Tasks by layers as a heat map above a line plot, with the combinations beside the layers."""
    columns = [row["name"] for row in report["rows"]]
    tasks = list(report["tasks"])
    cells = [[row["tasks"][task] for row in report["rows"]] for task in tasks]
    single = [i for i, row in enumerate(report["rows"]) if len(row["layers"]) == 1]
    with figure(stem, max(9, 0.62 * len(columns) + 2), 3.6 + 0.42 * len(tasks)) as made:
        top, bottom = made.subplots(2, 1, height_ratios=[0.42 * len(tasks), 3.2])
        scores = [[cell["accuracy"] for cell in row] for row in cells]
        relative = [[cell["relative"] for cell in row] for row in cells]
        data = {"tasks": tasks, "columns": columns, "scores": scores, "relative": relative}
        plots.plot_tasks(data, top)
        top.set_title(
            f"accuracy of probes on {report['features']} features, %", fontsize=10, loc="left"
        )
        lines = []
        for task, row in zip(tasks, cells, strict=True):
            best = max(row[i]["accuracy"] for i in single) or 1.0
            shown = {"relative": [row[i]["accuracy"] / best for i in single]}
            for key, end in (("low", 0), ("high", 1)):
                shown[key] = [row[i]["interval"][end] / best for i in single]
            lines.append({"task": task, **shown})
        layers = [report["rows"][i]["layers"][0] for i in single]
        plots.plot_depth({"layers": layers, "tasks": lines}, bottom)
        bottom.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
