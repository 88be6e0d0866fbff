"""What `probe.json` holds, as typed values."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class TaskReading:
    """What a probe reads of one task.

    Attributes:
        accuracy: on the test pictures, 0..1.
        interval: its 95 % interval [low, high].
        hits: a character for each test picture: 1 right, 0 wrong, - not asked.
    """

    accuracy: float
    interval: list[float]
    hits: str


@dataclass(frozen=True)
class ProbedSelection:
    """What probes read of some layers, their features side by side.

    Attributes:
        layers: the layers.
        tasks: by task.
        mean: mean accuracy over the tasks.
        interval: its 95 % bootstrap interval [low, high].
    """

    layers: list[int]
    tasks: dict[str, TaskReading]
    mean: float
    interval: list[float]

    @property
    def name(self) -> str:
        """The layers with plus signs between them."""
        return "+".join(map(str, self.layers))


@dataclass(frozen=True)
class Probes:
    """All selections of layers, probed on one kind of features.

    Attributes:
        kind: of the features, `mean` or `grid`.
        selections: what was probed, every single layer among them.
    """

    kind: str
    selections: list[ProbedSelection]

    def best_single(self) -> dict[str, float]:
        """Find what the best single layer reads of each task.

        Returns:
            The accuracy by task, 0..1.
        """
        best: dict[str, float] = {}
        for selection in self.selections:
            # Combinations are measured by what single layers read
            if len(selection.layers) > 1:
                continue
            for task, reading in selection.tasks.items():
                best[task] = max(best.get(task, 0.0), reading.accuracy)
        return best

    def relative(self, selection: ProbedSelection) -> dict[str, float]:
        """Give accuracies as shares of each task's best single layer (paper 3, Fig. 3).

        Args:
            selection: one of the probed ones.

        Returns:
            The shares by task; 0 where no single layer reads the task.
        """
        best = self.best_single()
        relative = {}
        for task, reading in selection.tasks.items():
            # A combination may read what no single layer does: a share of nothing is none
            relative[task] = 0.0
            if best[task] > 0:
                relative[task] = reading.accuracy / best[task]
        return relative

    def to_json(self) -> list[dict[str, Any]]:
        """Give the selections as they stand in `probe.json`.

        Returns:
            A row for each, with what is `relative` beside every accuracy.
        """
        rows = []
        for selection in self.selections:
            relative = self.relative(selection)
            tasks = {}
            for task, reading in selection.tasks.items():
                # For those who read the file; `from_json` leaves it out, it follows from the
                # accuracies
                tasks[task] = {**asdict(reading), "relative": relative[task]}
            rows.append(
                {
                    "name": selection.name,
                    "layers": selection.layers,
                    "tasks": tasks,
                    "mean": selection.mean,
                    "interval": selection.interval,
                }
            )
        return rows

    @classmethod
    def from_json(cls, kind: str, rows: list[dict[str, Any]]) -> "Probes":
        """Read what `to_json` gave.

        Args:
            kind: of the features.
            rows: of the file.

        Returns:
            The probes.
        """
        selections = []
        for row in rows:
            tasks = {}
            for task, cell in row["tasks"].items():
                tasks[task] = TaskReading(cell["accuracy"], cell["interval"], cell["hits"])
            selections.append(
                ProbedSelection(
                    layers=row["layers"],
                    tasks=tasks,
                    mean=row["mean"],
                    interval=row["interval"],
                )
            )
        return cls(kind=kind, selections=selections)


@dataclass(frozen=True)
class ProbedTask:
    """A task that was probed.

    Attributes:
        chance: accuracy of always giving the commonest training answer.
        classes: the answers that could be learned.
    """

    chance: float
    classes: list[str]


@dataclass(frozen=True)
class ProbeReport:
    """The content of `probe.json`.

    Attributes:
        encoder: name or folder of the encoder.
        depth: number of its blocks.
        source: training samples; None: generated scenes.
        test: test samples; None: a part of the training pictures, or generated scenes.
        asked: the tasks that were asked for, with commas between them; None: all.
        grid_side: cells along each side of the grid.
        dtype: number type of the encoder.
        image_aspect_ratio: what became of pictures that are no squares; None: what the encoder's
            files say, as in files of earlier versions.
        seed: of the division into training and test pictures, and of the resamples.
        train_pictures: their number.
        test_pictures: their number.
        tasks: what was probed.
        left_out: families that are no task, with the reason.
        mean: probes on the mean patch token.
        grid: probes on the grid of pooled patch tokens.
    """

    encoder: str
    depth: int
    source: str | None
    test: str | None
    asked: str | None
    grid_side: int
    dtype: str
    image_aspect_ratio: str | None
    seed: int
    train_pictures: int
    test_pictures: int
    tasks: dict[str, ProbedTask]
    left_out: dict[str, str]
    mean: Probes
    grid: Probes

    def to_json(self) -> dict[str, Any]:
        """Give the report as its file holds it.

        Returns:
            Plain values.
        """
        # In the order of earlier versions: a file that is written again is the same file
        content = {
            "encoder": self.encoder,
            "depth": self.depth,
            "source": self.source,
            "test": self.test,
            "asked": self.asked,
            "grid": self.grid.to_json(),
            "grid_side": self.grid_side,
            "dtype": self.dtype,
            "seed": self.seed,
            "train_pictures": self.train_pictures,
            "test_pictures": self.test_pictures,
            "tasks": {name: asdict(task) for name, task in self.tasks.items()},
            "left_out": self.left_out,
            "mean": self.mean.to_json(),
        }
        if self.image_aspect_ratio is not None:
            content["image_aspect_ratio"] = self.image_aspect_ratio
        return content

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "ProbeReport":
        """Read what `to_json` gave.

        Args:
            content: of the file.

        Returns:
            The report.
        """
        tasks = {}
        for name, task in content["tasks"].items():
            tasks[name] = ProbedTask(chance=task["chance"], classes=task["classes"])
        return cls(
            encoder=content["encoder"],
            depth=content["depth"],
            source=content["source"],
            test=content["test"],
            asked=content["asked"],
            grid_side=content["grid_side"],
            dtype=content["dtype"],
            image_aspect_ratio=content.get("image_aspect_ratio"),
            seed=content["seed"],
            train_pictures=content["train_pictures"],
            test_pictures=content["test_pictures"],
            tasks=tasks,
            left_out=content["left_out"],
            mean=Probes.from_json("mean", content["mean"]),
            grid=Probes.from_json("grid", content["grid"]),
        )
