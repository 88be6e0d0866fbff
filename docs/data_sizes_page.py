"""The page of a study at several data sizes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats  # pyright: ignore[reportMissingTypeStubs]

from docs.results_pages import RESULTS, table_row, verdict_in_words
from layerfuse.evaluate.records import RunRecord, read_records

# scipy brings no types
stats: Any = scipy.stats

FOLDER = RESULTS / "scenes-data-sizes"
INTRO = """# Does the order of strategies depend on how much data there is?

Five arms, each trained on nested subsets of the same scenes, for the same steps: figure 5 of
"Multi-Layer Visual Feature Fusion in Multimodal LLMs" (2503.06063) on this project's small models.
The recipe: [scenes-data-sizes.yaml](../recipes/scenes-data-sizes.yaml). Made by `make docs` from
results/.

![Accuracy of five arms against the number of training pictures](images/data-sizes.svg)
"""
CLAIM = "With more data {arm} approaches concat."
SOURCE = "2503.06063, figure 5, as notes on the paper report it"
LIMITS = (
    "From {first:,} to {last:,} pictures for as many steps, two blocks of the LLM; the interval is "
    "over seeds alone."
)
EXTERNAL = "concat"
INTERNAL = ("inject_add", "inject_cross")
MARKS = {None: "", "better": " ▲", "worse": " ▼", "tie": ""}


def data_sizes_page() -> str:
    """Scores by arm and size, and what each size says."""
    study: dict[str, Any] = json.loads((FOLDER / "data_sizes.json").read_text("utf-8"))
    sizes: list[dict[str, Any]] = study["sizes"]
    head = ["arm", *(f"{size['samples']:,} pictures" for size in sizes)]
    lines = [INTRO, study["headline"], "", table_row(head), "|---" * len(head) + "|"]
    for place, arm in enumerate(sizes[0]["arms"]):
        cells = [arm["arm"]]
        for size in sizes:
            cells.append(_cell(size["arms"][place]))
        lines.append(table_row(cells))
    lines += [
        table_row(["guessing", *(f"{size['chance']:.3f}" for size in sizes)]),
        "",
        f"▲ and ▼: better and worse than {study['baseline']} at that size, corrected for all "
        "arms; ↑: still improving when training stopped, so that its score is no verdict. "
        f"{study['length']} {study['intervals']}",
        "",
    ]
    for size in sizes:
        lines.append(f"* {size['samples']:,} pictures: {size['headline']}")
    return "\n".join([*lines, ""])


def data_size_claims() -> list[str]:
    """A row for each internal strategy: whether its distance to external direct fusion shrinks as
    data grow, by what it does from the smallest to the largest size, seed by seed."""
    study: dict[str, Any] = json.loads((FOLDER / "data_sizes.json").read_text("utf-8"))
    sizes = (study["sizes"][0], study["sizes"][-1])
    scores = [_scores_by_arm(FOLDER / size["folder"]) for size in sizes]
    limits = LIMITS.format(first=sizes[0]["samples"], last=sizes[1]["samples"])
    rows = []
    for arm in INTERNAL:
        changes = []
        for seed in scores[0][arm]:
            before, after = (of_size[arm][seed] - of_size[EXTERNAL][seed] for of_size in scores)
            changes.append(after - before)
        mean = float(np.mean(changes))
        low, high = stats.t.interval(0.95, len(changes) - 1, mean, stats.sem(changes))
        unsettled = 0
        for size in sizes:
            for row in size["arms"]:
                unsettled += row["arm"] in (arm, EXTERNAL) and not row["settled"]
        # Both arms at both sizes
        verdict = verdict_in_words(holds=low > 0, opposite=high < 0, unsettled=unsettled, arms=4)
        change = f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"
        link = f"[{study['name']}](results-{study['name']}.md)"
        rows.append(table_row([CLAIM.format(arm=arm), SOURCE, link, verdict, change, limits]))
    return rows


def _scores_by_arm(folder: Path) -> dict[str, dict[int, float]]:
    """Mean scores of the runs of one size, by arm and seed."""
    scores: dict[str, dict[int, float]] = {}
    for record in read_records(folder / "results.jsonl", RunRecord):
        scores.setdefault(record.arm, {})[record.seed] = record.scores.mean
    return scores


def _cell(arm: dict[str, Any]) -> str:
    """A score with its interval and marks."""
    low, high = arm["interval"]
    mark = "" if arm["settled"] else " ↑"
    if arm["settled"]:
        mark = MARKS[arm["verdict"]]
    return f"{arm['score']:.3f} ({low:.3f} to {high:.3f}){mark}"
