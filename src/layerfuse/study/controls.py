"""Does the instruction matter? Guided arms against themselves with the guidance removed.

The same trained models answer the same questions: the difference is paired, and holds no noise of
seeds beyond what the intervals over pictures show.
"""

from dataclasses import replace

import numpy as np

from layerfuse.study.results import Run
from layerfuse.study.statistics import Table, contrast, entry, judge


def guidance_rows(runs: list[Run], draws: tuple[int, int]) -> list[dict]:
    """One row per guided arm and control: scores, the paired difference guided − control with its
    verdict (Holm over all rows), and the spread of the weights; `weights` per family of questions.

    `draws`: number and seed of the bootstrap resamples.
    """
    rows, tests = [], []
    for arm in dict.fromkeys(r.record["arm"] for r in runs if "controls" in r.items[0]):
        own = [r for r in runs if r.record["arm"] == arm]
        names = list(own[0].items[0]["controls"])
        variants = [_under(r, name) for name in names for r in own]
        table = Table([*own, *variants], draws, lambda item: item["family"])
        scores = replace(table.mean, noise=None)
        weights = {"weights": _by_family(own), "spread": _spread(own)}
        for column, name in enumerate(names, 1):
            tests.append(contrast(scores, 0, column))
            found = {"guided": entry(scores, 0), "controlled": entry(scores, column)}
            rows.append({"arm": arm, "control": name, **found, **weights})
    for row, test in zip(rows, judge(tests), strict=True):
        row["difference"] = test
    return rows


def _under(run: Run, control: str) -> Run:
    """The run as if its answers under a control were its answers."""
    items = [{**item, "correct": item["controls"][control]["correct"]} for item in run.items]
    return Run({**run.record, "arm": f"{run.record['arm']} ({control})"}, items)


def _by_family(runs: list[Run]) -> dict[str, list[float]]:
    """The mean weights over layers or groups for each family of questions, over all seeds."""
    found: dict[str, list[list[float]]] = {}
    for item in (item for run in runs for item in run.items if item.get("weights")):
        found.setdefault(item["family"], []).append(item["weights"])
    return {name: np.mean(rows, axis=0).round(5).tolist() for name, rows in sorted(found.items())}


def _spread(runs: list[Run]) -> float:
    """How far the weights of one question lie from the run's mean weights: the standard deviation
    over questions, averaged over layers and runs. Zero: the instruction changes nothing."""
    weights = [[i["weights"] for i in run.items if i.get("weights")] for run in runs]
    each = [float(np.std(known, axis=0).mean()) for known in weights if known]
    return float(np.mean(each)) if each else 0.0
