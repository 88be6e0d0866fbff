"""The report of a study: summary.json, three figures and one page that needs nothing else."""

import base64
import io
import json
import os
from importlib.resources import files
from pathlib import Path

import yaml
from jinja2 import Environment, StrictUndefined

from layerfuse.study.controls import guidance_rows
from layerfuse.study.findings import UNMEASURED, findings, guidance_sentence, percent, signed, span
from layerfuse.study.results import Run, read_runs
from layerfuse.study.statistics import summarize

PICTURES, PIXELS = 8, 224


def write(path: Path, data: bytes) -> None:
    """Write whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def draw(summary: dict, runs: list[Run]) -> dict[str, dict[str, bytes]]:
    """The figures as {name: {"png": bytes, "svg": bytes}}."""
    from matplotlib.figure import Figure

    from layerfuse import plots

    order = {name: i for i, name in enumerate(dict.fromkeys(r.record["arm"] for r in runs))}
    arms = [{**a, **a["mean"], "index": order[a["arm"]]} for a in summary["arms"]]
    stages = list(dict.fromkeys(stage for r in runs for stage in r.record.get("losses", {})))
    count, made = len(arms), {}
    with plots.style():
        legend = 0.26 * -(-count // 4)
        figure = Figure(figsize=(9.2, 1.1 + 0.42 * count), layout="constrained")
        plots.plot_scores(
            {"arms": arms, "baseline": summary["baseline"], "chance": summary["chance"]["mean"]},
            figure.subplots(),
        )
        made["scores"] = export(figure)
        figure = Figure(figsize=(9.2, 4 + legend), layout="constrained")
        axis = plots.plot_families(
            {
                "arms": arms,
                "families": summary["families"],
                "chance": summary["chance"]["families"],
            },
            figure.subplots(),
        )
        figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4)
        made["families"] = export(figure)
        if stages:
            figure = Figure(figsize=(9.2, 3.4 + legend), layout="constrained")
            axes = figure.subplots(1, len(stages), squeeze=False)[0]
            for stage, axis in zip(stages, axes, strict=True):
                curves = [
                    {
                        "arm": r.record["arm"],
                        "index": order[r.record["arm"]],
                        "points": r.record.get("losses", {}).get(stage, []),
                    }
                    for r in runs
                ]
                plots.plot_losses({"stage": stage, "curves": curves}, axis)
            handles = {
                label: handle
                for axis in axes
                for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
            }
            figure.legend(
                list(handles.values()), list(handles), loc="outside lower center", ncols=4
            )
            made["losses"] = export(figure)
    return made


def export(figure) -> dict[str, bytes]:
    """PNG and SVG without date or version, so that equal data give equal files."""
    made = {}
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        stream = io.BytesIO()
        figure.savefig(stream, format=kind, dpi=160, metadata=metadata)
        made[kind] = stream.getvalue()
    return made


def inline(name: str, svg: bytes) -> str:
    """The SVG element alone, with ids of its own, grey as the page's text, scaling to its box."""
    from layerfuse.plots import INK

    text = svg.decode()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    for before in ('id="', 'href="#', "url(#"):
        text = text.replace(before, f"{before}{name}-")
    head, body = text.split(">", 1)
    kept = [part for part in head.split("\n") if part]
    head = " ".join(kept)
    start = head.index('viewBox="')
    box = head[start : head.index('"', start + 9) + 1]
    return (
        f'<svg {box} role="img" aria-label="{name}" xmlns="http://www.w3.org/2000/svg" '
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


def choose(runs: list[Run]) -> list[tuple[str, dict, list[tuple[str, dict]]]]:
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
            if (
                item["sample"] not in shown
                and family in (None, item["family"])
                and {bool(answer["correct"]) for _, answer in row} == outcome
            ):
                chosen.append((why, item, row))
                shown.add(item["sample"])
                break
    return chosen


def planned(recipe: dict, summary: dict) -> list[str]:
    """Arms that the recipe names and that have no finished run."""
    arms = recipe.get("arms") or []
    names = [a if isinstance(a, str) else a.get("name") for a in arms]
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
    summary = summarize(study_dir, recipe["baseline"], **(recipe.get("statistics") or {}))
    draws = (summary["resamples"], (recipe.get("statistics") or {}).get("seed", 0))
    summary["guidance"] = guidance_rows(runs, draws)
    summary["findings"] = {
        **findings(summary),
        "guidance": guidance_sentence(summary["guidance"]),
    }
    environment = study_dir / "environment.json"
    figures = draw(summary, runs)
    page = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page.filters |= {"percent": percent, "signed": signed, "span": span}
    template = files("layerfuse.study").joinpath("report.html.j2").read_text(encoding="utf-8")
    html = page.from_string(template).render(
        s=summary,
        title=recipe.get("name") or study_dir.resolve().name,
        recipe=text,
        description=recipe.get("description") or "",
        waiting=planned(recipe, summary),
        unmeasured=UNMEASURED,
        environment=json.loads(environment.read_text()) if environment.is_file() else {},
        figures={name: inline(name, made["svg"]) for name, made in figures.items()},
        examples=[
            (why, item, row, thumbnail(study_dir, item.get("image")))
            for why, item, row in choose(runs)
        ],
    )
    write(study_dir / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())
    for name, made in figures.items():
        for kind, data in made.items():
            write(study_dir / "figures" / f"{name}.{kind}", data)
    write(study_dir / "report.html", html.encode())
    return study_dir / "report.html"
