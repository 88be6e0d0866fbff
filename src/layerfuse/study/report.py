"""The report of a study: summary.json, three figures and one page that needs nothing else."""

import base64
import io
import json
from dataclasses import replace
from importlib.resources import files
from itertools import chain
from pathlib import Path

import numpy as np
import yaml
from jinja2 import Environment, StrictUndefined

from layerfuse.evaluate.records import FinishedRun, read_runs
from layerfuse.evaluate.significance import Table, contrast, entry, judge, summarize
from layerfuse.files import write_text
from layerfuse.study.findings import UNMEASURED, findings, guidance_sentence, percent, signed, span

PICTURES, PIXELS = 8, 224


def draw(summary: dict, runs: list[FinishedRun], folder: Path) -> list[str]:
    """Write the figures into a folder, as PNG and SVG; their names."""
    from layerfuse import plots

    order = {name: i for i, name in enumerate(dict.fromkeys(r.record["arm"] for r in runs))}
    arms = [{**a, **a["mean"], "index": order[a["arm"]]} for a in summary["arms"]]
    stages = list(dict.fromkeys(stage for r in runs for stage in r.record.get("losses", {})))
    legend, chance = 0.26 * -(-len(arms) // 4), summary["chance"]
    with plots.figure(folder / "scores", 9.2, 1.1 + 0.42 * len(arms)) as figure:
        data = {"arms": arms, "baseline": summary["baseline"], "chance": chance["mean"]}
        plots.plot_scores(data, figure.subplots())
    with plots.figure(folder / "families", 9.2, 4 + legend) as figure:
        data = {"arms": arms, "families": summary["families"], "chance": chance["families"]}
        add_legend(figure, [plots.plot_families(data, figure.subplots())])
    if not stages:
        return ["scores", "families"]
    with plots.figure(folder / "losses", 9.2, 3.4 + legend) as figure:
        axes = figure.subplots(1, len(stages), squeeze=False)[0]
        for stage, axis in zip(stages, axes, strict=True):
            curves = []
            for record in (r.record for r in runs):
                points, arm = record.get("losses", {}).get(stage, []), record["arm"]
                curves.append({"arm": arm, "index": order[arm], "points": points})
            plots.plot_losses({"stage": stage, "curves": curves}, axis)
        add_legend(figure, axes)
    return ["scores", "families", "losses"]


def add_legend(figure, axes) -> None:
    """Every label of the axes once, below them."""
    pairs = [zip(*axis.get_legend_handles_labels(), strict=True) for axis in axes]
    handles = {label: handle for handle, label in chain.from_iterable(pairs)}
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4)


def inline(file: Path) -> str:
    """The SVG element alone, with ids of its own, grey as the page's text, scaling to its box."""
    from layerfuse.plots import INK

    name, text = file.stem, file.read_text("utf-8")
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    for before in ('id="', 'href="#', "url(#"):
        text = text.replace(before, f"{before}{name}-")
    head, body = text.split(">", 1)
    box = head.split('viewBox="')[1].split('"')[0]
    return (
        f'<svg viewBox="{box}" role="img" aria-label="{name}" xmlns="http://www.w3.org/2000/svg" '
        f'xmlns:xlink="http://www.w3.org/1999/xlink">{body}'
    )


def thumbnail(study_dir: Path, image: str | None) -> str | None:
    """A picture as a PNG data address, at most 224 pixels; None where there is no file."""
    from PIL import Image

    path = study_dir / (image or "")
    if not path.is_file():
        return None
    with Image.open(path) as picture:
        small = picture.convert("RGB")
    small.thumbnail((PIXELS, PIXELS))
    stream = io.BytesIO()
    small.save(stream, format="PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def choose(runs: list[FinishedRun]) -> list[tuple[str, dict, list[tuple[str, dict]]]]:
    """(why, question, [(arm, its answer)]) by a rule: the first ids, a new picture each.

    Each arm's first run; per family the first question on which arms disagree, then the first
    that all answer rightly and the first that all answer wrongly.
    """
    firsts = list({r.record["arm"]: r for r in reversed(runs)}.values())[::-1]
    rows = [[(r.record["arm"], r.items[i]) for r in firsts] for i in range(len(runs[0].items))]
    families = sorted({item["family"] for item in runs[0].items})[: PICTURES - 2]
    wanted = [(f"{family}: arms disagree", family, {True, False}) for family in families]
    wanted += [("all right", None, {True}), ("all wrong", None, {False})]
    chosen, shown = [], set()
    for why, family, outcome in wanted:
        for row in rows:
            item = row[0][1]
            fits = item["sample"] not in shown and family in (None, item["family"])
            if fits and {bool(answer["correct"]) for _, answer in row} == outcome:
                chosen.append((why, item, row))
                shown.add(item["sample"])
                break
    return chosen


def guidance_rows(runs: list[FinishedRun], draws: tuple[int, int]) -> list[dict]:
    """One row per guided arm and control: scores, the paired difference guided − control with its
    verdict (Holm over all rows), and the spread of the weights; `weights` per family of questions.
    The same trained models answer the same questions, so that the difference holds no noise of
    seeds beyond what the intervals over pictures show.

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


def _under(run: FinishedRun, control: str) -> FinishedRun:
    """The run as if its answers under a control were its answers."""
    items = [{**item, "correct": item["controls"][control]["correct"]} for item in run.items]
    return FinishedRun({**run.record, "arm": f"{run.record['arm']} ({control})"}, items)


def _by_family(runs: list[FinishedRun]) -> dict[str, list[float]]:
    """The mean weights over layers or groups for each family of questions, over all seeds."""
    found: dict[str, list[list[float]]] = {}
    for item in (item for run in runs for item in run.items if item.get("weights")):
        found.setdefault(item["family"], []).append(item["weights"])
    return {name: np.mean(rows, axis=0).round(5).tolist() for name, rows in sorted(found.items())}


def _spread(runs: list[FinishedRun]) -> float:
    """How far the weights of one question lie from the run's mean weights: the standard deviation
    over questions, averaged over layers and runs. Zero: the instruction changes nothing."""
    weights = [[i["weights"] for i in run.items if i.get("weights")] for run in runs]
    each = [float(np.std(known, axis=0).mean()) for known in weights if known]
    return float(np.mean(each)) if each else 0.0


def planned(recipe: dict, summary: dict) -> list[str]:
    """Arms that the recipe names and that have no finished run."""
    names = [a if isinstance(a, str) else a.get("name") for a in recipe.get("arms") or []]
    done = {a["arm"] for a in summary["arms"]}
    return [n for n in names if n and n not in done] if done <= set(names) else []


def write_report(study_dir: Path) -> Path:
    """Write summary.json, figures/ and report.html into the study's folder; the page's path."""
    study_dir = Path(study_dir)
    text = (study_dir / "recipe.yaml").read_text(encoding="utf-8")
    recipe = yaml.safe_load(text)
    if not isinstance(recipe, dict) or not recipe.get("baseline"):
        raise ValueError(f"{study_dir / 'recipe.yaml'} names no baseline; add 'baseline: ARM'")
    runs = read_runs(study_dir)
    options = recipe.get("statistics") or {}
    summary = summarize(study_dir, recipe["baseline"], **options)
    summary["guidance"] = guidance_rows(runs, (summary["resamples"], options.get("seed", 0)))
    guidance = guidance_sentence(summary["guidance"])
    summary["findings"] = {**findings(summary), "guidance": guidance}
    environment = study_dir / "environment.json"
    names = draw(summary, runs, study_dir / "figures")
    page = Environment(autoescape=True, undefined=StrictUndefined)
    page.trim_blocks = page.lstrip_blocks = True
    page.filters |= {"percent": percent, "signed": signed, "span": span}
    template = files("layerfuse.study").joinpath("report.html.j2").read_text(encoding="utf-8")
    chosen = choose(runs)
    html = page.from_string(template).render(
        s=summary,
        title=recipe.get("name") or study_dir.resolve().name,
        recipe=text,
        description=recipe.get("description") or "",
        waiting=planned(recipe, summary),
        unmeasured=UNMEASURED,
        environment=json.loads(environment.read_text()) if environment.is_file() else {},
        figures={name: inline(study_dir / "figures" / f"{name}.svg") for name in names},
        examples=[(*found, thumbnail(study_dir, found[1].get("image"))) for found in chosen],
    )
    write_text(study_dir / "summary.json", json.dumps(summary, indent=1) + "\n")
    write_text(study_dir / "report.html", html)
    return study_dir / "report.html"
