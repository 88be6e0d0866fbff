"""The page of a study at several data sizes."""

import json
from typing import Any

from docs.results_pages import RESULTS, table_row

FOLDER = RESULTS / "scenes-data-sizes"
INTRO = """# Does the order of strategies depend on how much data there is?

Five arms, each trained on nested subsets of the same scenes, for the same steps: figure 5 of
"Multi-Layer Visual Feature Fusion in Multimodal LLMs" (2503.06063) on this project's small models.
The recipe: [scenes-data-sizes.yaml](../recipes/scenes-data-sizes.yaml). Made by `make docs` from
results/.

![Accuracy of five arms against the number of training pictures](images/data-sizes.svg)
"""
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


def _cell(arm: dict[str, Any]) -> str:
    """A score with its interval and marks."""
    low, high = arm["interval"]
    mark = "" if arm["settled"] else " ↑"
    if arm["settled"]:
        mark = MARKS[arm["verdict"]]
    return f"{arm['score']:.3f} ({low:.3f} to {high:.3f}){mark}"
