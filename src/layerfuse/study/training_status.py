"""What a study keeps and says of how far its arms had learned when their training stopped."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from layerfuse.evaluate.learning_status import ArmLearning
from layerfuse.files import write_text
from layerfuse.look.probe_report import Probes

LEARNING = "learning.json"
"""H0 of each stage, in the study's folder."""
PROBE = "probe.json"
"""What `layerfuse probe` writes; a study in whose folder it lies is compared with it."""
PROBE_MARGIN = 0.03
"""How far below the linear probe of its layers an arm may score before it is said."""

BlindLosses = dict[str, float | None]
"""H0 by stage, in nats a labelled token; None for a stage of free text"""


@dataclass(frozen=True)
class ProbeComparison:
    """What an arm scores beside the linear probe of the same layers, on the same families.

    Attributes:
        trained: mean accuracy of the arm, 0..1.
        probe: that of the better of the two probes, on the mean token and on the grid.
        families: that were both trained and probed.
    """

    trained: float
    probe: float
    families: list[str]

    @property
    def is_below(self) -> bool:
        """Whether the layers hold more than the arm says."""
        return self.trained < self.probe - PROBE_MARGIN


def write_blind_losses(folder: Path, losses: Mapping[str, float | None]) -> None:
    """Keep H0 of each stage for the report.

    Args:
        folder: the study's.
        losses: by stage.
    """
    write_text(folder / LEARNING, json.dumps({"blind_loss": dict(losses)}, indent=1) + "\n")


def read_blind_losses(folder: Path) -> BlindLosses:
    """Read what `write_blind_losses` wrote.

    Args:
        folder: the study's.

    Returns:
        By stage; empty where the study was done before they were written.
    """
    file = folder / LEARNING
    if not file.exists():
        return {}
    return json.loads(file.read_text("utf-8"))["blind_loss"]


def read_probes(folder: Path) -> list[Probes]:
    """Read the probes that lie beside a study.

    Args:
        folder: the study's.

    Returns:
        On the mean token and on the grid; empty where there are none.
    """
    file = folder / PROBE
    if not file.exists():
        return []
    # Not the whole report: what earlier versions wrote of it had other fields.
    content = json.loads(file.read_text("utf-8"))
    return [Probes.from_json(kind, content[kind]) for kind in ("mean", "grid")]


def compare_with_probe(
    layers: list[int], families: Mapping[str, float], all_probes: Sequence[Probes]
) -> ProbeComparison | None:
    """Set an arm's accuracy beside what a linear probe reads of its layers.

    Args:
        layers: of the arm.
        families: its accuracy by family.
        all_probes: of the same encoder.

    Returns:
        The comparison with the better one; None where these layers or families were not probed.
    """
    best = None
    for probes in all_probes:
        for selection in probes.selections:
            shared = [family for family in families if family in selection.tasks]
            if selection.layers != layers or not shared:
                continue
            read = sum(selection.tasks[family].accuracy for family in shared) / len(shared)
            if best is None or read > best.probe:
                trained = sum(families[family] for family in shared) / len(shared)
                best = ProbeComparison(trained, read, shared)
    return best


def _gained(points: Sequence[float]) -> str:
    """Say how much arms that were still improving gained in the last quarter."""
    span = f"{min(points):+.1f}"
    if f"{max(points):+.1f}" != span:
        span = f"{span} to {max(points):+.1f}"
    return f"still improving, {span} points in the last quarter"


def training_sentence(
    arms: Mapping[str, ArmLearning], probes: Mapping[str, ProbeComparison]
) -> str:
    """Say which arms had learned what they could when their training stopped.

    Args:
        arms: by name; may be empty.
        probes: of the arms whose layers were probed.

    Returns:
        The sentences.
    """
    unjudged = [name for name, arm in arms.items() if arm.state == "not judged"]
    # By state, so that each is named once.
    unsettled: dict[str, list[str]] = {}
    gains: dict[str, float] = {}
    for name, arm in arms.items():
        if arm.gain is not None:
            gains[name] = 100 * arm.gain
        elif not arm.settled:
            unsettled.setdefault(arm.text, []).append(name)
    if gains:
        unsettled = {_gained(list(gains.values())): list(gains), **unsettled}
    if len(unjudged) == len(arms):
        text = (
            "Whether the arms had learned what they could is not judged: it needs short answers "
            "that repeat, or validation data."
        )
    elif unsettled:
        parts = [f"{state} ({', '.join(names)})" for state, names in unsettled.items()]
        text = f"When training stopped, arms had not learned what they could: {'; '.join(parts)}."
    else:
        text = "When training stopped, no arm was still improving measurably."
    below = []
    for name, comparison in probes.items():
        if comparison.is_below:
            trained = f"{100 * comparison.trained:.1f} %"
            below.append(f"{name} ({trained} against {100 * comparison.probe:.1f} %)")
    if below:
        text += (
            f" More than {100 * PROBE_MARGIN:.0f} points below the linear probe of the same "
            f"layers: {', '.join(below)}."
        )
    return text
