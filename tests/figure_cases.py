"""Every kind of figure, drawn from fixed data, and the pictures that they must look like.

    python -m tests.figure_cases

draws the pictures of tests/figures again, which is right only where a figure was meant to change.
"""

from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from layerfuse import plots
from layerfuse.look import figures
from layerfuse.look.probe_report import ProbedSelection, Probes, TaskReading

FOLDER = Path(__file__).parent / "figures"
# Inches, and pixels of an inch: small, but large enough to read.
WIDTH = 5.6
HEIGHT = 3.4
DPI = 66


def study_result() -> plots.StudyResult:
    """Ten arms, so that markers go round a second time, on three families."""
    arms = []
    for index in range(10):
        score = 0.5 + 0.04 * index
        families = {}
        for place, family in enumerate(("colour", "count", "position")):
            of_family = score - 0.1 * place
            families[family] = plots.Share(of_family, [of_family - 0.05, of_family + 0.03])
        mean = plots.Share(score, [score - 0.06, score + 0.06])
        seed_means = [score - 0.02, score + 0.01]
        arms.append(plots.ArmResult(f"arm {index}", index, mean, seed_means, families))
    arms.reverse()
    chances = {"colour": 0.2, "count": 0.25, "position": 0.3}
    return plots.StudyResult(arms, baseline="arm 4", chance=0.25, family_chance=chances)


def scores(figure: Figure) -> None:
    plots.plot_scores(study_result(), figure.subplots())


def scores_far_from_chance(figure: Figure) -> None:
    data = study_result()
    few = plots.StudyResult(data.arms[:3], "arm 8", 0.05, data.family_chance)
    plots.plot_scores(few, figure.subplots())


def families(figure: Figure) -> None:
    plots.plot_families(study_result(), figure.subplots()).legend(ncols=2)


def losses(figure: Figure) -> None:
    curves = []
    for index in range(3):
        points = []
        for step in range(1, 401):
            ripple = 1 + 0.4 * np.sin(1.7 * step + index)
            points.append((step, float((4 + index) / step**0.8 * ripple)))
        curves.append(plots.LossCurve(f"arm {index}", index, points))
    # A run that skips the stage, and one whose loss is negative for a while.
    curves.append(plots.LossCurve("skips", 3, []))
    curves.append(plots.LossCurve("negative", 4, [(1, 2.0), (20, 1.0), (60, -0.1), (400, 0.3)]))
    plots.plot_losses(plots.StageLosses("align", curves, batch_size=8), figure.subplots()).legend()


def validation(figure: Figure) -> None:
    curves = []
    for index in (0, 3, 8):
        accuracy = [0.3 + 0.03 * index, 0.5 + 0.02 * index, 0.6 + 0.02 * index]
        loss = [2.0 - 0.1 * index, 1.0, 0.8]
        curves.append(plots.ValidationCurve(f"arm {index}", index, [100, 200, 300], accuracy, loss))
    accuracy_axes, loss_axes = figure.subplots(1, 2)
    plots.plot_validation(curves, accuracy_axes, loss_axes)


def data_sizes(figure: Figure) -> None:
    curves = []
    for index in range(3):
        shares = []
        for place in range(3):
            score = 0.4 + 0.1 * index + 0.1 * place
            shares.append(plots.Share(score, [score - 0.06, score + 0.04]))
        curves.append(plots.SizeCurve(f"arm {index}", index, [500, 1000, 2000], shares))
    plots.plot_data_sizes(curves, 0.25, figure.subplots()).legend()


def depth(figure: Figure) -> None:
    curves = []
    layers = [2, 4, 8, 12]
    for index, name in enumerate(("colour", "count")):
        values = [0.7 + 0.1 * index, 0.9, 1.0 - 0.1 * index, 0.8]
        lows = [value - 0.05 for value in values]
        highs = [value + 0.05 for value in values]
        curves.append(plots.DepthCurve(name, index, layers, values, lows, highs))
    one_seed = [0.6, 0.7, 0.8, 0.9]
    curves.append(plots.DepthCurve("shape", 9, layers, one_seed, one_seed, one_seed))
    data = plots.DepthResult("score, % of the best layer's", curves)
    plots.plot_depth(data, figure.subplots()).legend()


def categories(figure: Figure) -> None:
    runs = []
    for index in range(9):
        values = [0.1 * index + 0.1, 1.0 - 0.1 * index, float("nan")]
        runs.append(plots.CategoryBars(f"run {index}", index, values))
    names = ["General", "Fine-grained and other perception", "Text"]
    data = plots.CategoryResult("score, % of the best run's", names, runs)
    plots.plot_categories(data, figure.subplots())


def matrix(figure: Figure) -> None:
    layers = np.arange(8)
    similarity = np.exp(-np.abs(layers[:, None] - layers[None, :]) / 3)
    data = figures.LayerMatrix(
        similarity,
        "cosine of patch tokens",
        "layer",
        "layer",
        groups=[[0, 1, 2], [3, 4, 5, 6, 7]],
        selected=[1, 5],
    )
    figures.plot_matrix(data, figure.subplots())


def last_layer(figure: Figure) -> None:
    layers = np.arange(9)
    curves = {"over tokens": 0.1 + 0.08 * layers, "over pictures": 0.3 + 0.005 * layers**2}
    data = figures.LastLayerSimilarity("one", "another", curves)
    figures.plot_last_layer(data, figure.subplots())


def guidance(figure: Figure) -> None:
    """A map of differences, in which dark and light cells have numbers, with a line across it."""
    values = [[9.0 - 3 * column - row for column in range(6)] for row in range(4)]
    data = plots.WeightMap(
        title="difference to all questions, points",
        kinds=["General", "Chart&OCR", "colour", "count"],
        choices=["1-2", "3-4", "5-6", "7-8", "9-10", "11-12"],
        values=values,
        is_difference=True,
        rules=[2],
    )
    plots.plot_guidance(data, figure.subplots())


def guidance_of_little(figure: Figure) -> None:
    """A map of differences that are next to nothing, in pale colours."""
    values = [[0.05 * column - 0.1, 0.1 - 0.05 * column] for column in range(5)]
    data = plots.WeightMap(
        title="difference to all questions, points",
        kinds=["General", "Chart&OCR"],
        choices=["1-2", "3-4", "5-6", "7-8", "9-10"],
        values=np.transpose(values).tolist(),
        is_difference=True,
        rules=[],
    )
    plots.plot_guidance(data, figure.subplots())


def control_changes(figure: Figure) -> None:
    controls = []
    for index, name in enumerate(("another instruction", "mean weights")):
        changes = {"mean": -0.04 + 0.03 * index, "General": 0.01, "Text": -0.09 + 0.08 * index}
        intervals = {kind: [change - 0.02, change + 0.02] for kind, change in changes.items()}
        controls.append(plots.ControlChange(name, index, changes, intervals))
    plots.plot_control_changes(controls, figure.subplots()).legend()


def probes_of_layers() -> Probes:
    """Three tasks on five layers and a combination of two."""
    selections = []
    for place, layers in enumerate(([0], [3], [6], [9], [12], [6, 12])):
        tasks = {}
        for number, task in enumerate(("colour", "count", "shape")):
            accuracy = 0.4 + 0.08 * place - 0.03 * number * place
            tasks[task] = TaskReading(accuracy, [accuracy - 0.04, accuracy + 0.04], "")
        selections.append(ProbedSelection(layers, tasks, mean=0.5, interval=[0.4, 0.6]))
    return Probes("mean", selections)


def probed_tasks(figure: Figure) -> None:
    figures.plot_tasks(probes_of_layers(), figure.subplots())


def probed_depth(figure: Figure) -> None:
    figures.plot_depth(probes_of_layers(), figure.subplots()).legend()


FIGURES: dict[str, Callable[[Figure], None]] = {
    "scores": scores,
    "scores_far_from_chance": scores_far_from_chance,
    "families": families,
    "losses": losses,
    "validation": validation,
    "data_sizes": data_sizes,
    "depth": depth,
    "categories": categories,
    "matrix": matrix,
    "last_layer": last_layer,
    "guidance": guidance,
    "guidance_of_little": guidance_of_little,
    "control_changes": control_changes,
    "probed_tasks": probed_tasks,
    "probed_depth": probed_depth,
}


def draw(name: str, folder: Path) -> Path:
    """Draw one of the figures as a PNG on white.

    Args:
        name: of the figure.
        folder: where the file goes.

    Returns:
        Its path.
    """
    with mpl.rc_context():
        # What a user has set must not change it; the default font comes with matplotlib.
        mpl.rcdefaults()
        mpl.rcParams.update(plots.RC)
        figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")
        FIGURES[name](figure)
        file = folder / f"{name}.png"
        figure.savefig(
            file, facecolor="white", metadata={"Software": None}, pil_kwargs={"optimize": True}
        )
    return file


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for each in FIGURES:
        print(draw(each, FOLDER))
