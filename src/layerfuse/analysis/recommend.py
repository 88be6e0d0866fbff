"""Which layers to try first: a ranked list of selections with the evidence for each."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console

from layerfuse.analysis.probe import bootstrap, probe
from layerfuse.analysis.similarity import FILE, look_folder, similarity
from layerfuse.analysis.stream import read_json, write_json
from layerfuse.analysis.tables import ranking_words, validation_words
from layerfuse.analysis.tasks import task_names
from layerfuse.analysis.validate import trained_scores, validate
from layerfuse.data.pictures import require_look
from layerfuse.encoder import load_vision_config
from layerfuse.recipe_file import load_recipe
from layerfuse.selection import select

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
        place["accuracy"] = float(np.mean(list(accuracy.values())))
        place |= {"behind": behind, "tie": bool(behind[1] >= 0)}
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
    file = write_json(folder / "recommend.json", report)
    console.print(f"arms: {folder / 'recommended.yaml'}\nrecommendation: {file}", soft_wrap=True)
    return file
