"""Which layers to try first: a ranked list of selections with the evidence for each, and whether
such a cheap look at the frozen encoder predicts what trained: rank correlations."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console

from layerfuse.files import write_text
from layerfuse.look.output import ranking_words, read_json, validation_words
from layerfuse.look.pictures import require_look
from layerfuse.look.probe import bootstrap, probe, task_names
from layerfuse.look.similarity import FILE, look_folder, similarity
from layerfuse.recipe.reader import load_recipe
from layerfuse.vision.encoder import load_vision_config
from layerfuse.vision.selection import select

SHOWN = 6


def recommend(
    encoder: str,
    *,
    images: str | None = None,
    data: str | None = None,
    test: str | None = None,
    tasks: str | None = None,
    recipe: Path | None = None,
    against: Path | None = None,
    dtype: str = "float32",
    output: Path | None = None,
    console: Console | None = None,
) -> Path:
    """Rank selections by what linear probes on mean tokens read; returns `recommend.json`.

    Candidates are every single layer, the representatives of two to four groups, and the papers'
    layers 3, 18, 23 of 24 at this encoder's depth. Measurements in the folder (default
    `runs/look-<encoder>`) are used where they fit and made where not. The best are written as arms
    of `recommended.yaml`, which extends `recipe` if that is given. `against` is the folder of a
    finished study: how well every cheap criterion ranks its arms. Raises as `similarity` and
    `probe` do.
    """
    console = console or Console()
    folder = output or look_folder(encoder)
    depth = load_vision_config(encoder).num_hidden_layers
    require_look("sklearn")
    trained = [list(layers) for layers in (trained_scores(against) if against else ())]
    for layers in trained:
        select(layers, depth)  # refuses a study of a deeper encoder
    if recipe is not None:
        load_recipe(recipe)
    shared: dict[str, Any] = {"dtype": dtype, "output": folder, "console": console}
    look = _saved(folder / FILE, encoder=encoder, source=images, dtype=dtype, limit=None)
    look = look or read_json(similarity(encoder, images, **shared))
    wanted = _candidates(look, depth)
    several = [k for k in [*wanted, *trained] if len(k) > 1]
    names = task_names(tasks) or []
    probes = _saved(folder / "probe.json", encoder=encoder, source=data, test=test, dtype=dtype)
    if probes is None or not _answers(probes, names, several):
        probes = read_json(probe(encoder, data, test, tasks=tasks, layers=several, **shared))
    report: dict[str, Any] = {"encoder": encoder, "tasks": names or list(probes["tasks"])}
    report["ranking"] = _rank(look, probes, wanted, report["tasks"])
    ranking_words(report["ranking"][:SHOWN], console)
    if against:
        asked = {name: probes["tasks"][name] for name in report["tasks"]}
        report["validation"] = validate(against, look, {**probes, "tasks": asked})
        validation_words(report["validation"], console)
    return _write(folder, report, recipe, console)


def _saved(file: Path, **expected: Any) -> dict[str, Any] | None:
    """What was measured before, if it was measured as expected."""
    found = read_json(file) if file.exists() else {}
    return found if found and all(found.get(k) == v for k, v in expected.items()) else None


def _answers(probes: dict[str, Any], names: list[str], several: list[list[int]]) -> bool:
    """Whether saved probes hold these tasks (none: all there are) and combinations of layers."""
    held = [row["layers"] for row in probes["mean"]]
    enough = set(names) <= set(probes["tasks"]) if names else probes["asked"] is None
    return enough and all(layers in held for layers in several)


def _candidates(look: dict[str, Any], depth: int) -> list[list[int]]:
    found = [[k] for k in range(1, depth + 1)]
    found += [look["groups"][str(k)]["representatives"] for k in (2, 3, 4) if k <= depth]
    found.append(sorted({max(1, round(depth * k / 24)) for k in (3, 18, 23)}))
    return [list(layers) for layers in dict.fromkeys(map(tuple, found))]


def _rank(
    look: dict[str, Any], probes: dict[str, Any], wanted: list[list[int]], names: list[str]
) -> list[dict[str, Any]]:
    """Selections by their mean score / best over the tasks, with the difference to the first."""
    groups = look["groups"][str(look["chosen"])]["groups"]
    rows = [row for row in probes["mean"] if row["layers"] in wanted]
    score = {r["name"]: np.mean([r["tasks"][n]["relative"] for n in names]) for r in rows}
    rows.sort(key=lambda row: (-score[row["name"]], len(row["layers"])))
    best = {name: max(row["tasks"][name]["accuracy"] for row in rows) for name in names}
    singles = [row["tasks"] for row in probes["mean"] if len(row["layers"]) == 1]
    scale = {name: max(cells[name]["accuracy"] for cells in singles) or 1.0 for name in names}
    draws = [
        sum(bootstrap(row["tasks"], [n], probes["seed"]) / scale[n] for n in names) / len(names)
        for row in rows
    ]
    ranking = []
    for row, drawn in zip(rows, draws, strict=True):
        layers, behind = row["layers"], np.percentile(drawn - draws[0], [2.5, 97.5]).tolist()
        accuracy = {name: row["tasks"][name]["accuracy"] for name in names}
        place: dict[str, Any] = {"layers": layers, "score": float(score[row["name"]])}
        place |= {"accuracy": float(np.mean(list(accuracy.values()))), "behind": behind}
        place["tie"] = bool(behind[1] >= 0)
        place["best_on"] = [name for name in names if accuracy[name] == best[name]]
        place["groups"] = [group for group in groups if set(group) & set(layers)]
        place |= {name: [look[name][k] for k in layers] for name in ("entropy", "dimension")}
        ranking.append(place)
    return ranking


def _write(folder: Path, report: dict[str, Any], recipe: Path | None, console: Console) -> Path:
    """The report, and the best selections as arms, each with the plainest fusion for it."""
    chosen = [row["layers"] for row in report["ranking"][:SHOWN]]
    names = ["concat" if len(layers) > 1 else "single" for layers in chosen]
    arms = [{"layers": k, "fusion": {"name": n}} for k, n in zip(chosen, names, strict=True)]
    content: dict[str, Any] = {"arms": arms, "grid": None, "baseline": None}
    if recipe:
        name = re.sub(r"[^\w.-]+", "-", f"recommended-{Path(report['encoder']).name}")
        path = Path(report["encoder"])
        encoder = str(path.resolve()) if path.is_dir() else report["encoder"]
        content = {"extends": str(recipe.resolve()), "name": name, "encoder": encoder, **content}
    text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None)
    console.print(text, end="", markup=False, highlight=False)
    (folder / "recommended.yaml").write_text(text, "utf-8")
    write_text(file := folder / "recommend.json", json.dumps(report) + "\n")
    console.print(f"arms: {folder / 'recommended.yaml'}\nrecommendation: {file}", soft_wrap=True)
    return file


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
        read, grid = ([r[layers][x]["accuracy"] for x in families] for r in rows.values())
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
    found: dict[str, Any] = {"correlations": {}, "within_families": {}}
    for scope, part in scopes.items():
        trained, names = [r["trained"] for r in part], list(table[0])[4:]
        ranks = {name: rank_correlation([r[name] for r in part], trained) for name in names}
        found["correlations"][scope] = ranks
    for family in table[0]["families"]:
        pairs = [r["families"][family] for r in table]
        found["within_families"][family] = rank_correlation(*zip(*pairs, strict=True))
    shared = sorted(set.intersection(*(set(row["seeds"]) for row in table)))
    by_seed = [[row["seeds"][seed] for row in table] for seed in shared]
    pairs = filter(None, (rank_correlation(a, b) for a, b in combinations(by_seed, 2)))
    between = [pair["rho"] for pair in pairs]
    return {**found, "between_seeds": float(np.mean(between)) if between else None}


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> dict[str, Any] | None:
    """Spearman's rho with the 95 % interval of Bonett & Wright 2000 (variance of Fisher's z:
    (1 + rho²/2) / (n - 3)); None where one side is constant or undefined, or n is below 4."""
    from scipy.stats import spearmanr

    if len(x) < 4 or len(set(x)) < 2 or len(set(y)) < 2 or not np.isfinite([*x, *y]).all():
        return None
    rho = float(np.asarray(spearmanr(x, y))[0])
    z = math.atanh(max(-0.9999, min(0.9999, rho)))
    half = 1.96 * math.sqrt((1 + rho**2 / 2) / (len(x) - 3))
    return {"rho": rho, "interval": [math.tanh(z - half), math.tanh(z + half)], "n": len(x)}
