"""What a study may claim: scores with intervals, differences to the baseline, noise, verdicts.

* Score: the macro mean over question families; an arm's score is the mean over its seeds.
* Item noise: percentile bootstrap over pictures, not questions, since the questions of a picture
  share it (cluster bootstrap: Davison & Hinkley 1997, 3.8). Arms share the resamples: paired.
* Seed noise: standard deviation over the seeds of an arm, pooled over the arms; never paired.
* Both: variance = item bootstrap variance + sd² (1/n_a + 1/n_b), with a t quantile of
  Welch-Satterthwaite degrees of freedom; the sum covers 94 to 99 % in simulation.
* Above chance: whether the trained runs beat guessing is judged by the items alone.
* Several arms: verdicts use Holm's correction (Holm 1979); the intervals are per comparison.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
from scipy.special import stdtr, stdtrit

from layerfuse.evaluate.records import FinishedRun, read_runs

LEVEL = 0.95


@dataclass(frozen=True)
class Scores:
    """One score per arm, the last being blind guessing: values (A), resamples (B, A), runs (A)."""

    value: np.ndarray
    samples: np.ndarray
    runs: np.ndarray
    noise: dict | None
    images: int


def commonest_answers(items: list[dict]) -> dict[str, str]:
    """The most frequent answer of each family (the first in sorted order where two are equal)."""
    counts: dict[str, Counter] = {}
    for item in items:
        counts.setdefault(item["family"], Counter())[item["answer"]] += 1
    return {f: min(c, key=lambda a: (-c[a], str(a))) for f, c in sorted(counts.items())}


def rates(weights: np.ndarray, cluster: np.ndarray, group: np.ndarray, right: np.ndarray):
    """Share right (B, G, K) under picture weights (B, I): cluster and group (Q), right (Q, K).

    A group without a question in a resample is NaN there.
    """
    counts = np.zeros((weights.shape[1], int(group.max()) + 1, right.shape[1] + 1))
    np.add.at(counts, (cluster, group), np.column_stack([right, np.ones(len(right))]))
    drawn = np.tensordot(weights, counts, axes=1)  # the last column: how many were asked
    found, total = drawn[:, :, :-1], drawn[:, :, -1:]
    return np.divide(found, total, out=np.full_like(found, np.nan), where=total > 0)


def picture_weights(images: int, resamples: int, seed: int) -> np.ndarray:
    """How often each picture is drawn in each resample (B, I)."""
    share = np.full(images, 1 / images)
    return np.random.default_rng(seed).multinomial(images, share, size=resamples).astype(float)


def percentiles(samples: np.ndarray) -> list[float]:
    """The central 95 % of resampled values."""
    return np.percentile(samples[~np.isnan(samples)], [50 - 50 * LEVEL, 50 + 50 * LEVEL]).tolist()


def interval(value: float, samples: np.ndarray, images: int) -> list[float]:
    """95 % percentile interval; at 0 or 1, where no resample varies, the exact binomial bound."""
    bound = ((1 - LEVEL) / 2) ** (1 / images)
    return {0.0: [0.0, 1 - bound], 1.0: [bound, 1.0]}.get(float(value)) or percentiles(samples)


def seed_noise(values: dict[str, list[float]]) -> dict | None:
    """Pooled standard deviation over seeds, or None when no arm has two seeds."""
    if not (several := {name: v for name, v in values.items() if len(v) > 1}):
        return None
    df = sum(len(v) - 1 for v in several.values())
    squares = sum(len(v) * float(np.var(v)) for v in several.values())
    spread, arm = max((float(max(v) - min(v)), name) for name, v in several.items())
    return {"sd": math.sqrt(squares / df), "df": df, "spread": spread, "spread_arm": arm}


def holm(p: list[float]) -> list[float]:
    """Holm's adjusted p values, in the order given."""
    adjusted, running = [1.0] * len(p), 0.0
    for rank, index in enumerate(np.argsort(p, kind="stable").tolist()):
        running = max(running, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = running
    return adjusted


def contrast(scores: Scores, a: int, b: int) -> dict:
    """Arm a minus arm b: the item interval, the interval of items and seeds, their p values."""
    difference = float(scores.value[a] - scores.value[b])
    samples = scores.samples[:, a] - scores.samples[:, b]
    # one picture says nothing of others: the largest variance that a share can have
    item = float(np.nanvar(samples, ddof=1)) if scores.images > 1 else 1.0
    item_df = max(scores.images - 1, 1)
    known = scores.noise or {"sd": 0.0, "df": 1}
    seeds = known["sd"] ** 2 * float(1 / scores.runs[a] + 1 / scores.runs[b])
    error = math.sqrt(item + seeds)
    df = error**4 / (item**2 / item_df + seeds**2 / known["df"]) if error else item_df
    half = float(stdtrit(df, 0.5 + LEVEL / 2)) * error
    p, item_p = (
        2 * float(stdtr(n, -abs(difference) / se)) if se else float(difference == 0)
        for se, n in ((error, df), (math.sqrt(item), item_df))
    )
    ends = [difference - half, difference + half]
    found = {"difference": difference, "interval": ends, "item_interval": percentiles(samples)}
    return {**found, "df": float(df), "p": p, "item_p": item_p}


def judge(rows: list[dict]) -> list[dict]:
    """Add Holm's p, the verdict and whether only the seed noise prevents another one."""
    both = zip(holm([r["p"] for r in rows]), holm([r["item_p"] for r in rows]), strict=True)
    for row, (p, item_p) in zip(rows, both, strict=True):
        side = "better" if row["difference"] > 0 else "worse"
        row["p_holm"], row["verdict"] = p, side if p < 1 - LEVEL else "tie"
        row["unresolved"] = row["verdict"] == "tie" and item_p < 1 - LEVEL
    return rows


class Table:
    """All arms' scores by one key of the items, resampled; items of key None are left out."""

    def __init__(
        self, runs: list[FinishedRun], draws: tuple[int, int], key: Callable[[dict], str | None]
    ):
        kept = [i for i, item in enumerate(runs[0].items) if key(item) is not None]
        items = [runs[0].items[i] for i in kept]
        images = [item.get("image") or item["sample"] for item in items]
        self.images, cluster = len(set(images)), np.unique(images, return_inverse=True)[1]
        names, group = np.unique([str(key(item)) for item in items], return_inverse=True)
        self.groups: list[str] = names.tolist()
        self.arms = list(dict.fromkeys(run.record["arm"] for run in runs))
        self.columns = [[i for i, r in enumerate(runs) if r.record["arm"] == a] for a in self.arms]
        blind = commonest_answers(items)
        right = [[run.items[i]["correct"] for i in kept] for run in runs]
        right.append([item["answer"] == blind[item["family"]] for item in items])
        weights = np.vstack([np.ones(self.images), picture_weights(self.images, *draws)])
        self.rates = rates(weights, cluster, group, np.array(right, float).T)
        sizes = [len(set(cluster[group == g])) for g in range(len(names))]
        self.each = [self._scores(self.rates[:, g], size) for g, size in enumerate(sizes)]
        self.mean = self._scores(np.nanmean(self.rates, axis=1), self.images)

    def _scores(self, runs: np.ndarray, images: int) -> Scores:
        columns = [*self.columns, [runs.shape[1] - 1]]
        arms = np.stack([runs[:, c].mean(axis=1) for c in columns], axis=1)
        seeds = [runs[0, c].tolist() for c in self.columns]
        noise = seed_noise(dict(zip(self.arms, seeds, strict=True)))
        return Scores(arms[0], arms[1:], np.array([*map(len, self.columns), np.inf]), noise, images)


def entry(scores: Scores, arm: int) -> dict:
    """An arm's score with the interval of the items."""
    score = float(scores.value[arm])
    return {"score": score, "interval": interval(score, scores.samples[:, arm], scores.images)}


def layer_leaders(table: Table, single: list[int]) -> list[dict]:
    """Per family, the leading single-layer arm, and whether it beats each other one (Holm)."""
    rows, tests = [], []
    for family, scores in zip(table.groups, table.each, strict=True) if single[1:] else ():
        lead, *others = sorted(single, key=lambda a, s=scores: -s.value[a])
        tests.append([contrast(scores, lead, other) for other in others])
        row = {"family": family, "leader": table.arms[lead], "second": table.arms[others[0]]}
        rows.append({**row, "difference": tests[-1][0]["difference"]})
    judge(list(chain.from_iterable(tests)))
    for row, found in zip(rows, tests, strict=True):
        row["beyond_noise"] = all(test["verdict"] == "better" for test in found)
    return rows


def make_tables(runs: list[FinishedRun], draws: tuple[int, int]) -> dict[str, Table]:
    """By family and category; seen and held-out combinations over the families that have both."""

    kinds = {(item["family"], bool(item.get("novel"))) for item in runs[0].items}
    both = {family for family, novel in kinds if novel and (family, False) in kinds}

    def part(item: dict, novel: bool) -> str | None:
        wanted = item["family"] in both and bool(item.get("novel")) == novel
        return item["family"] if wanted else None

    keys = {"families": lambda i: i["family"], "categories": lambda i: i.get("category") or "none"}
    if both:
        keys |= {"seen": lambda i: part(i, False), "novel": lambda i: part(i, True)}
    return {name: Table(runs, draws, key) for name, key in keys.items()}


def arm_row(runs: list[FinishedRun], arm: int, tables: dict[str, Table]) -> dict:
    """What one arm is and scores: everything but the comparisons."""
    table = tables["families"]
    mine = [runs[i].record for i in table.columns[arm]]
    row = {key: mine[0].get(key) for key in ("arm", "layers", "depth", "fusion", "kind")}
    row |= {"seeds": [r["seed"] for r in mine], "parameters": mine[0].get("parameters", {})}
    row["seconds"] = [r.get("seconds", {}) for r in mine]
    row["mean"] = entry(table.mean, arm)
    row["seed_means"] = np.nanmean(table.rates[0], axis=0)[table.columns[arm]].tolist()
    for name, t in tables.items():
        each = {g: entry(s, arm) for g, s in zip(t.groups, t.each, strict=True)}
        row[name] = entry(t.mean, arm) if name in ("seen", "novel") else each
    return row


def summarize(study_dir: Path, baseline: str, resamples: int = 2000, seed: int = 0) -> dict:
    """Everything a report states, as JSON-serialisable numbers; unfinished studies work."""
    tables = make_tables(runs := read_runs(Path(study_dir)), (resamples, seed))
    table = tables["families"]
    mean, names = table.mean, table.arms
    if baseline not in names:
        raise ValueError(f"baseline {baseline!r} has no finished run; arms with one: {names}")
    if table.images < 2:
        raise ValueError("the test set has one picture: intervals need at least two")
    base, lead = names.index(baseline), int(np.argmax(mean.value[:-1]))
    rows = [arm_row(runs, a, tables) for a in range(len(names))]
    references = {"versus_chance": len(names), "versus_baseline": base, "first": lead}
    for field, reference in references.items():
        others = [a for a in range(len(names)) if a != reference]
        # Whether what was trained beats guessing is a question about the items alone.
        scores = replace(mean, noise=None) if field == "versus_chance" else mean
        found = judge([contrast(scores, a, reference) for a in others])
        for a, row in enumerate(rows):
            row[field] = dict(zip(others, found, strict=True)).get(a)
    for row in rows:
        row["first"] = row["first"] is None or row["first"]["verdict"] == "tie"
    if (rows[lead]["versus_baseline"] or {}).get("verdict") == "better":
        rows[base]["first"] = False
    single = [a for a, row in enumerate(rows) if row["fusion"]["name"] == "single"]
    blind = dict(zip(table.groups, table.rates[0, :, -1].tolist(), strict=True))
    found = {"baseline": baseline, "resamples": resamples, "runs": len(runs)}
    found |= {"items": len(runs[0].items), "images": table.images, "families": table.groups}
    found["chance"] = {"mean": float(mean.value[-1]), "families": blind}
    found |= {"noise": mean.noise, "single_layer": [names[a] for a in single]}
    found["leaders"] = layer_leaders(table, single)
    return {**found, "arms": sorted(rows, key=lambda row: -row["mean"]["score"])}
