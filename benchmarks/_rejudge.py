"""Judge committed studies again whose predictions are gone, by the package's present statistics.

    PYTHONPATH=. python benchmarks/_rejudge.py

The scores of all runs are in results.jsonl. Of the pictures only the 95 % intervals are left, in
summary.json: of each arm, and of each difference to the baseline. Resamples are made up that have
these variances; where the covariance of two arms is not known, the one that the baseline
implies is taken, and none for families. summary.json then says `pictures_read_off_intervals`.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from layerfuse.evaluate.learning_status import ArmLearning
from layerfuse.evaluate.planning import resolved_by
from layerfuse.evaluate.score_table import ScoreTable
from layerfuse.evaluate.seed_model import Numbers
from layerfuse.evaluate.significance import (
    ArmScore,
    Competitor,
    JudgedContrast,
    Scores,
    SeedNoise,
    arm_score,
    compare_all,
    inseparable_from_first,
)
from layerfuse.study.findings import state_findings
from layerfuse.study.guidance_effect import GuidanceRow
from layerfuse.study.summary import ArmSummary, ChanceScores, Summary, layer_leaders
from layerfuse.study.training_status import ProbeComparison

RESULTS = Path(__file__).parents[1] / "results"
DRAWS = 4000
# A normal 95 % interval is so many standard deviations wide.
WIDTH = 2 * 1.959964

Plain = dict[str, Any]


def sd_of(interval: list[float]) -> float:
    """The standard deviation that a 95 % interval tells."""
    return (interval[1] - interval[0]) / WIDTH


def made_up_samples(value: Numbers, covariance: Numbers) -> Numbers:
    """Resamples (B, A) with exactly these means and this covariance."""
    draws = np.random.default_rng(0).standard_normal((DRAWS, len(value)))
    draws -= draws.mean(axis=0)
    # Whitened first, so that nothing is left to the luck of the draw.
    draws = draws @ np.linalg.inv(np.linalg.cholesky(np.cov(draws.T))).T
    return value + draws @ np.linalg.cholesky(covariance).T


def covariance_of(arms: list[Plain], baseline: str) -> Numbers:
    """The covariance over pictures that the intervals of arms and differences tell."""
    sds = np.array([sd_of(arm["mean"]["interval"]) for arm in arms])
    base = [arm["arm"] for arm in arms].index(baseline)
    with_base = np.zeros(len(arms))
    for index, arm in enumerate(arms):
        if index == base:
            continue
        of_difference = sd_of(arm["versus_baseline"]["item_interval"]) ** 2
        shared = (sds[index] ** 2 + sds[base] ** 2 - of_difference) / 2
        with_base[index] = np.clip(shared / sds[index] / sds[base], -0.95, 0.95)
    correlation = np.outer(with_base, with_base)
    correlation[base] = with_base
    correlation[:, base] = with_base
    np.fill_diagonal(correlation, 1.0)
    return correlation * np.outer(sds, sds)


def runs_by_seed(arms: list[Plain], records: list[Plain], family: str | None) -> Numbers:
    """Scores (A, S) of one family, or of the mean."""
    seeds = sorted({record["seed"] for record in records})
    runs = np.full((len(arms), len(seeds)), np.nan)
    names = [arm["arm"] for arm in arms]
    for record in records:
        score = record["scores"]["mean"]
        if family is not None:
            score = record["scores"]["families"][family]
        runs[names.index(record["arm"]), seeds.index(record["seed"])] = score
    return runs


def scores_of(runs: Numbers, covariance: Numbers, images: int, noise: SeedNoise) -> Scores:
    """What the package judges."""
    value: Numbers = np.nanmean(runs, axis=1)
    samples = made_up_samples(value, covariance)
    chance = Competitor(score=0.0, samples=np.zeros(DRAWS))
    return Scores(value, samples, runs, chance, noise, images)


def family_table(arms: list[Plain], records: list[Plain], old: Plain) -> ScoreTable:
    """The scores of all families."""
    each: list[Scores] = []
    noise = SeedNoise(**old["noise"])
    for family in old["families"]:
        sds = [sd_of(arm["families"][family]["interval"]) for arm in arms]
        runs = runs_by_seed(arms, records, family)
        each.append(scores_of(runs, np.diag(np.maximum(sds, 1e-6) ** 2), old["images"], noise))
    runs = runs_by_seed(arms, records, None)
    mean = scores_of(runs, covariance_of(arms, old["baseline"]), old["images"], noise)
    return ScoreTable(
        groups=old["families"],
        arms=[arm["arm"] for arm in arms],
        columns=[],
        images=old["images"],
        rates=np.zeros((1, 1, 1)),
        each=each,
        mean=mean,
    )


def over_pictures(old: Plain) -> JudgedContrast:
    """A comparison over pictures alone, which stays as it was."""
    error = sd_of(old["interval"])
    return JudgedContrast(**{**old, "error": error, "covers": "pictures", "measured": True})


def rejudged(old: Plain, records: list[Plain]) -> Summary:
    """The summary with present statistics."""
    arms: list[Plain] = old["arms"]
    table = family_table(arms, records, old)
    names = table.arms
    base = names.index(old["baseline"])
    versus = compare_all(table.mean, base)
    first = inseparable_from_first(table.mean)
    leader = int(table.mean.value.argmax())
    if leader != base and versus[leader].verdict == "better":
        first[base] = False

    judged: list[ArmSummary] = []
    for index, arm in enumerate(arms):
        families: dict[str, ArmScore] = {}
        for family, scores in zip(table.groups, table.each, strict=True):
            families[family] = arm_score(scores, index)
        changes = {
            "mean": arm_score(table.mean, index),
            "families": families,
            "categories": {name: ArmScore(**one) for name, one in arm["categories"].items()},
            "seen": ArmScore(**arm["seen"]) if "seen" in arm else None,
            "novel": ArmScore(**arm["novel"]) if "novel" in arm else None,
            "versus_chance": over_pictures(arm["versus_chance"]),
            "versus_baseline": versus.get(index),
            "first": first[index],
        }
        judged.append(ArmSummary(**{**arm, **changes}))

    guidance: list[GuidanceRow] = []
    for row in old.get("guidance", []):
        changes = {
            "guided": ArmScore(**row["guided"]),
            "controlled": ArmScore(**row["controlled"]),
            "difference": over_pictures(row["difference"]),
        }
        guidance.append(GuidanceRow(**{**row, **changes}))
    learning: dict[str, ArmLearning] = {}
    for name, state in old["learning"].items():
        learning[name] = ArmLearning.from_json(state)
    probes: dict[str, ProbeComparison] = {}
    for name, comparison in old["probes"].items():
        probes[name] = ProbeComparison(**comparison)
    single = [names.index(name) for name in old["single_layer"]]
    changes = {
        "learning": learning,
        "probes": probes,
        "chance": ChanceScores(**old["chance"]),
        "noise": table.mean.noise,
        "resolvable": resolved_by(table.mean, base),
        "leaders": layer_leaders(table, single),
        "arms": judged,
        "guidance": guidance,
    }
    kept = {key: old[key] for key in Summary.__dataclass_fields__ if key in old}
    return Summary(**{**kept, **changes})


def main() -> None:
    """Rewrite every summary that has no picture noise of its own."""
    for file in sorted(RESULTS.glob("*/summary.json")):
        old = json.loads(file.read_text(encoding="utf-8"))
        # Judged again it would lose precision each time.
        if "resolvable" in old:
            continue
        lines = (file.parent / "results.jsonl").read_text(encoding="utf-8").splitlines()
        summary = rejudged(old, [json.loads(line) for line in lines])
        content = summary.to_json()
        content["findings"] = asdict(state_findings(summary))
        content["pictures_read_off_intervals"] = True
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
