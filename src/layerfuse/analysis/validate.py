"""Whether a cheap look at the frozen encoder predicts what trained: rank correlations."""

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np


def trained_scores(study: Path) -> dict[tuple[int, ...], dict[int, dict[str, float]]]:
    """Accuracy per selection, seed and family from a study's results.jsonl.

    Raises ValueError if two arms share their layers, so that layers do not decide the score.
    """
    arms: dict[tuple[int, ...], str] = {}
    found: dict[tuple[int, ...], dict[int, dict[str, float]]] = defaultdict(dict)
    for line in (study / "results.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        base = row.get("fusion", {}).get("base")  # a strategy's deep layer beside the selected
        chosen: set[int] = {*row["layers"], *([] if base is None else [base])}
        layers = tuple(sorted(chosen))
        if arms.setdefault(layers, row["arm"]) != row["arm"]:
            raise ValueError(f"arms {arms[layers]!r} and {row['arm']!r} of {study} share {layers}")
        found[layers][row["seed"]] = row["scores"]["families"]
    if len(found) < 4:
        raise ValueError(f"{study} holds {len(found)} selections; a correlation needs at least 4")
    return dict(found)


def validate(study: Path, look: dict[str, Any], probes: dict[str, Any]) -> dict[str, Any]:
    """Spearman's correlation of every criterion with the mean trained accuracy of the selections.

    Over the families that were both trained and probed. Scores of single layers are averaged over
    a selection. `between_seeds` is the mean correlation of two seeds of the study with each other.
    Raises ValueError without a common family.
    """
    trained = trained_scores(study)
    shared = [set(families) for seeds in trained.values() for families in seeds.values()]
    families = sorted(set.intersection(*shared) & set(probes["tasks"]))
    if not families:
        raise ValueError(f"no family of {study} was probed; probed: {list(probes['tasks'])}")
    rows = {k: {tuple(r["layers"]): r["tasks"] for r in probes[k]} for k in ("mean", "grid")}
    if unknown := [list(layers) for layers in trained if layers not in rows["mean"]]:
        raise ValueError(f"{study} has selections that were not probed: {unknown}")
    entropy, dimension = (np.array(look[name], float) for name in ("entropy", "dimension"))
    table = []
    for layers, seeds in trained.items():
        read, grid = (
            [rows[kind][layers][x]["accuracy"] for x in families] for kind in ("mean", "grid")
        )
        scores = [np.mean([f[x] for f in seeds.values()]) for x in families]
        row = {"layers": layers, "trained": np.mean(scores)}
        row["seeds"] = {s: np.mean([f[x] for x in families]) for s, f in seeds.items()}
        row["families"] = dict(zip(families, zip(scores, read, strict=True), strict=True))
        row |= {"probes, mean tokens": np.mean(read), "probes, grid": np.mean(grid)}
        row["matrix entropy"] = entropy[list(layers)].mean()
        row["intrinsic dimension"] = dimension[list(layers)].mean()
        row |= {"depth": np.mean(layers), "number of layers": len(layers)}
        table.append(row)
    found = {"study": study.name, "selections": table, "families": families, **_summary(table)}
    return json.loads(json.dumps(found, default=float))


def _summary(table: list[dict[str, Any]]) -> dict[str, Any]:
    scopes = {"selections": table, "single layers": [r for r in table if len(r["layers"]) == 1]}
    return {
        "correlations": {
            scope: {name: _correlation(part, name) for name in list(table[0])[4:]}
            for scope, part in scopes.items()
        },
        "within_families": {
            x: rank_correlation(*zip(*(r["families"][x] for r in table), strict=True))
            for x in table[0]["families"]
        },
        "between_seeds": _between_seeds(table),
    }


def _correlation(table: list[dict[str, Any]], name: str) -> dict[str, Any] | None:
    return rank_correlation([row[name] for row in table], [row["trained"] for row in table])


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> dict[str, Any] | None:
    """Spearman's rho with the 95 % interval of Bonett & Wright 2000 (variance of Fisher's z:
    (1 + rho²/2) / (n - 3)); None where one side is constant or undefined, or n is below 4."""
    from scipy.stats import rankdata

    if len(x) < 4 or len(set(x)) < 2 or len(set(y)) < 2 or not np.isfinite([*x, *y]).all():
        return None
    rho = float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])
    z = math.atanh(max(-0.9999, min(0.9999, rho)))
    half = 1.96 * math.sqrt((1 + rho**2 / 2) / (len(x) - 3))
    return {"rho": rho, "interval": [math.tanh(z - half), math.tanh(z + half)], "n": len(x)}


def _between_seeds(table: list[dict[str, Any]]) -> float | None:
    shared = sorted(set.intersection(*(set(row["seeds"]) for row in table)))
    pairs = [
        rank_correlation([r["seeds"][a] for r in table], [r["seeds"][b] for r in table])
        for a, b in combinations(shared, 2)
    ]
    found = [pair["rho"] for pair in pairs if pair]
    return float(np.mean(found)) if found else None
