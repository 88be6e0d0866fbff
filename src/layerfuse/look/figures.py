"""Figures of a look at an encoder: layers against layers, and tasks against layers."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from layerfuse import plots
from layerfuse.look.probe_report import Probes
from layerfuse.look.similarity_report import SimilarityReport
from layerfuse.palette import PALETTE

TITLES = {
    "cosine": "cosine of patch tokens",
    "cosine_centred": "cosine without the layer's mean token",
    "cka_tokens": "linear CKA over tokens",
    "cka_images": "linear CKA over pictures",
}
"""The measured matrices, and what they are called in figures."""
TICKS = 14
"""Layers that get a tick, at most."""


@dataclass(frozen=True)
class LayerMatrix:
    """The similarity of layers.

    Attributes:
        matrix: rows and columns are layers 0, 1, ...; NaN where undefined.
        title: of the plot.
        xlabel: what the columns are.
        ylabel: what the rows are.
        groups: to be framed, each a list of neighbouring layers.
        selected: layers that are marked on the diagonal.
    """

    matrix: np.ndarray
    title: str
    xlabel: str
    ylabel: str
    groups: list[list[int]]
    selected: list[int]


@dataclass(frozen=True)
class LastLayerSimilarity:
    """How alike each layer of another encoder is to the last layer of this one.

    Attributes:
        encoder: the name of this one.
        other: that of the other.
        curves: by measure, a number for each layer of the other, from 0; NaN where undefined.
    """

    encoder: str
    other: str
    curves: dict[str, np.ndarray]


def draw_similarity(report: SimilarityReport, folder: Path) -> list[str]:
    """Draw the four matrices of an encoder, and its CKA with another encoder if there is one.

    Args:
        report: what was measured. The groups are framed in the matrix that they come from, and
            their representatives marked.
        folder: gets `similarity.png` and `.svg`, and with another encoder `cross` and `cross-last`.

    Returns:
        The names of the figures.
    """
    settings = report.settings
    similarity = report.measured.similarity
    with plots.figure(folder / "similarity", 11, 9.6) as figure:
        axes = figure.subplots(2, 2).flat
        for ax, (name, title) in zip(axes, TITLES.items(), strict=True):
            # The groups of one matrix say nothing about another
            framed = []
            selected = []
            if name == settings.by:
                framed = report.measured.chosen_groups.groups
                selected = report.measured.chosen_groups.representatives
            matrix = LayerMatrix(
                matrix=similarity.matrix(name),
                title=title,
                xlabel="layer",
                ylabel="layer",
                groups=framed,
                selected=selected,
            )
            plot_matrix(matrix, ax)

    if not settings.other:
        return ["similarity"]
    with plots.figure(folder / "cross", 11, 4.9) as figure:
        # Rows are layers of the encoder, columns those of the other
        axes = figure.subplots(1, 2)
        for ax, examples in zip(axes, ("tokens", "images"), strict=True):
            matrix = LayerMatrix(
                matrix=similarity.matrix(f"cross_{examples}"),
                title=TITLES[f"cka_{examples}"],
                xlabel=f"layer of {settings.other}",
                ylabel=f"layer of {settings.encoder}",
                groups=[],
                selected=[],
            )
            plot_matrix(matrix, ax)
    curves = {}
    for examples in ("tokens", "images"):
        # Rows are layers of this encoder: the last row is its last layer
        curves[TITLES[f"cka_{examples}"]] = similarity.matrix(f"cross_{examples}")[-1]
    with plots.figure(folder / "cross-last", 7.6, 4.2) as figure:
        # Of a folder its name: an axis has no room for a path
        names = (Path(settings.encoder).name, Path(settings.other).name)
        to_last = LastLayerSimilarity(names[0], names[1], curves)
        plot_last_layer(to_last, figure.subplots())
    return ["similarity", "cross", "cross-last"]


def draw_probe(probes: Probes, stem: Path) -> None:
    """Draw tasks by layers as a heat map above a line plot, combinations beside the layers.

    Args:
        probes: on one kind of features, of at least one selection.
        stem: path of the figure without its suffix.
    """
    tasks = probes.selections[0].tasks
    # Inches grow with the numbers of layers and tasks, so that the cells stay readable
    heat_map_height = 0.42 * len(tasks)
    width = max(9, 0.62 * len(probes.selections) + 2)
    with plots.figure(stem, width, 3.6 + heat_map_height) as figure:
        top, bottom = figure.subplots(2, 1, height_ratios=[heat_map_height, 3.2])
        plot_tasks(probes, top)
        title = f"accuracy of probes on {probes.kind} features, %"
        top.set_title(title, fontsize=10, loc="left")
        plot_depth(probes, bottom)
        bottom.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def plot_matrix(data: LayerMatrix, ax: Axes) -> Axes:
    """Plot the similarity of layers as a heat map, groups of layers framed.

    Args:
        data: the matrix with its words.
        ax: where it is drawn.

    Returns:
        `ax`.
    """
    matrix = data.matrix
    if np.isnan(matrix).all():
        ax.set_title(f"{data.title}: undefined", fontsize=10, loc="left")
        ax.set_axis_off()
        return ax
    # Colours mean the same in all figures, unless similarities are negative
    lowest = min(0.0, float(np.nanmin(matrix)))
    image = ax.imshow(matrix, cmap="magma", vmin=lowest, vmax=1)
    for group in data.groups:
        # Cells are centred on whole numbers, so their edges are halves
        edge = group[0] - 0.5
        # The white rim makes the frame visible on every colour of the map
        for color, width in (("white", 2.4), (PALETTE[0], 1.2)):
            frame = _frame(left=edge, top=edge, side=len(group), color=color, line_width=width)
            ax.add_patch(frame)

    for layer in data.selected:
        ax.plot(layer, layer, "o", ms=7, mfc="white", mec=PALETTE[0], mew=1.6)
    rows, columns = matrix.shape
    step = -(-rows // TICKS)
    ax.set(
        xticks=range(0, columns, step),
        yticks=range(0, rows, step),
        xlabel=data.xlabel,
        ylabel=data.ylabel,
    )
    ax.grid(visible=False)
    ax.set_title(data.title, fontsize=10, loc="left")
    bar = ax.figure.colorbar(image, ax=ax, fraction=0.046, pad=0.03)
    bar.outline.set_visible(False)
    return ax


def plot_last_layer(data: LastLayerSimilarity, ax: Axes) -> Axes:
    """Plot how alike the layers of another encoder are to the last layer of this one.

    As figure 1a of MMFuser (2410.11829): where the curve is low, the other encoder holds what the
    last layer does not.

    Args:
        data: of two encoders.
        ax: where it is drawn.

    Returns:
        `ax`.
    """
    for index, (measure, values) in enumerate(data.curves.items()):
        style = plots.look(index)
        layers = range(len(values))
        ax.plot(layers, values, color=style.color, marker=style.marker, ms=4, lw=1.6, label=measure)
    ax.set(
        xlabel=f"layer of {data.other}",
        ylabel=f"similarity to the last layer of {data.encoder}",
        ylim=(min(0.0, ax.get_ylim()[0]), 1.02),
    )
    ax.xaxis.set_major_locator(MaxNLocator(nbins=TICKS, integer=True))
    ax.legend()
    return ax


def _frame(
    *,
    left: float,
    top: float,
    side: float,
    color: str,
    line_width: float,
) -> Rectangle:
    """A square without filling."""
    return Rectangle((left, top), side, side, fill=False, ec=color, lw=line_width)


def plot_tasks(probes: Probes, ax: Axes) -> Axes:
    """Plot tasks by layers as a heat map of score / best, the best cell of each task framed.

    Args:
        probes: of at least one selection; all are of the same tasks.
        ax: where it is drawn.

    Returns:
        `ax`.
    """
    # Tasks are rows here, layers are columns
    tasks = list(probes.selections[0].tasks)
    columns = [selection.name for selection in probes.selections]
    relative = np.zeros((len(tasks), len(columns)))
    scores = np.zeros_like(relative)
    for column, selection in enumerate(probes.selections):
        shares = probes.relative(selection)
        for row, task in enumerate(tasks):
            relative[row, column] = shares[task]
            scores[row, column] = 100 * selection.tasks[task].accuracy

    # Combinations can exceed the best single layer, which is 1
    ax.imshow(relative, cmap="magma", vmin=0.0, vmax=1.1, aspect="auto")
    for row, column in np.ndindex(*scores.shape):
        # The map is dark below and light above
        ink = "white"
        if relative[row, column] > 0.65:
            ink = "black"
        number = f"{scores[row, column]:.0f}"
        ax.text(column, row, number, ha="center", va="center", fontsize=8, color=ink)
    for row, best in enumerate(scores.argmax(axis=1)):
        frame = _frame(left=best - 0.5, top=row - 0.5, side=1, color=PALETTE[0], line_width=2)
        ax.add_patch(frame)
    ax.set_xticks(range(len(columns)), columns, rotation=25)
    ax.set_yticks(range(len(tasks)), tasks)
    ax.grid(visible=False)
    return ax


def plot_depth(probes: Probes, ax: Axes) -> Axes:
    """Plot score / best against depth, a line a task, with intervals and a ring at the best layer.

    Args:
        probes: as for `plot_tasks`; selections of several layers are left out.
        ax: where it is drawn.

    Returns:
        `ax`.
    """
    singles = [selection for selection in probes.selections if len(selection.layers) == 1]
    layers = [selection.layers[0] for selection in singles]
    relative_to_best = [probes.relative(selection) for selection in singles]
    best_accuracies = probes.best_single()
    for index, task in enumerate(singles[0].tasks):
        # Where no layer reads the task, everything is 0
        best_accuracy = best_accuracies[task] or 1.0
        relative = [shares[task] for shares in relative_to_best]
        lows = []
        highs = []
        for selection in singles:
            low, high = selection.tasks[task].interval
            lows.append(low / best_accuracy)
            highs.append(high / best_accuracy)
        style = plots.look(index)
        color = style.color
        ax.fill_between(layers, lows, highs, color=color, alpha=0.12)
        (line,) = ax.plot(layers, relative, label=task, ms=4, lw=1.6)
        line.set(color=color, marker=style.marker, ls=style.line_style)
        best = int(np.argmax(relative))
        ax.plot(layers[best], relative[best], "o", ms=10, mfc="none", mec=color)
    ax.set(xticks=layers, xlabel="layer", ylabel="score / best layer's score")
    return ax
