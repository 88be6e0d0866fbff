"""The page of statistics: its template, and how the method did in simulated studies."""

import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
SIMULATION = "statistics-simulation.json"
SEEDS_SIMULATION = "sequential-seeds-simulation.json"


def statistics_page() -> str:
    """The method of all statements, and how it did in simulated studies."""
    results = json.loads((DOCS.parent / "results" / SIMULATION).read_text("utf-8"))
    text = (DOCS / "templates" / "statistics.md").read_text("utf-8")
    lines = [
        f"Each row: {results['studies']:,} studies of equal arms on {results['pictures']}",
        "pictures, of which the first arm is the baseline. Covered: the share of 95 % intervals",
        "that hold the truth. Any verdict: studies with a false one. Left out: studies in which an",
        "equal arm is called separable from the first. Found: an arm raised by",
        f"{results['gain']:.0f} points is judged better. All in per cent.",
        "",
        "| scenario | arms | seeds | differences covered | means covered | any verdict | left out "
        "| found |",
        "|---" * 8 + "|",
    ]
    shares = ("difference_covered", "mean_covered", "any_verdict", "left_out", "power")
    for cell in results["cells"]:
        cells = [cell["scenario"], str(cell["arms"]), str(cell["seeds"])]
        cells += [f"{100 * cell[share]:.1f}" for share in shares]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *methods_table(results["methods"])]
    return text.rstrip() + "\n\n" + "\n".join(lines) + "\n\n" + added_seeds_section()


def methods_table(methods: list[dict[str, Any]]) -> list[str]:
    """One row a scenario and a way to estimate the noise of an arm."""
    lines = [
        "The same studies judged with other estimates of an arm's noise: the worst of all numbers",
        "of arms and seeds for coverage and verdicts, the mean of all for what is found. All in",
        "per cent.",
        "",
        "| scenario | method | differences covered, at least | any verdict, at most | found |",
        "|---" * 5 + "|",
    ]
    for row in methods:
        cells = [row["scenario"], row["method"]]
        for share in ("least_covered", "most_verdicts", "power"):
            cells.append(f"{100 * row[share]:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def added_seeds_section() -> str:
    """How studies with `seeds: auto` did where the truth is known."""
    results = json.loads((DOCS.parent / "results" / SEEDS_SIMULATION).read_text("utf-8"))
    cells = results["cells"]
    # The last scenario is named apart: no width of intervals helps there.
    last = cells[-1]["scenario"]
    held = [cell for cell in cells if cell["scenario"] != last]
    failed = [cell for cell in cells if cell["scenario"] == last]
    covered = [min(cell["difference_covered"], cell["mean_covered"]) for cell in held]
    lost = max(cell["power_most"] - cell["power_one"] for cell in held)
    text = (DOCS / "templates" / "added-seeds.md").read_text("utf-8")
    return text.format(
        studies=f"{results['studies']:,}",
        first=results["first"],
        maximum=results["maximum"],
        margin=f"{100 * results['difference']:.0f}",
        gain=f"{results['gain']:.0f}",
        most_verdicts=f"{100 * max(cell['any_verdict'] for cell in held):.1f}",
        most_at_any_look=f"{100 * max(cell['any_look'] for cell in held):.1f}",
        least_covered=f"{100 * min(covered):.1f}",
        worst=f"{100 * max(cell['any_verdict'] for cell in failed):.0f}",
        lost=f"{100 * lost:.1f}",
        cells="\n".join(added_seeds_table(results)),
        methods="\n".join(spending_table(results["methods"])),
    )


def added_seeds_table(results: dict[str, Any]) -> list[str]:
    """One row a scenario and number of arms."""
    lines = [
        "| scenario | arms | any verdict | differences covered | means covered | equal: seeds "
        "| equal: resolved | one raised: seeds | found "
        f"| found, {results['first']} seeds | found, {results['maximum']} seeds "
        "| all raised: seeds | found |",
        "|---" * 13 + "|",
    ]
    columns = ("any_verdict", "difference_covered", "mean_covered", "seeds_equal")
    columns += ("resolved_equal", "seeds_one", "power_one", "power_first", "power_most")
    columns += ("seeds_all", "power_all")
    for cell in results["cells"]:
        cells = [cell["scenario"], str(cell["arms"])]
        for column in columns:
            if column.startswith("seeds"):
                cells.append(f"{cell[column]:.1f}")
            else:
                cells.append(f"{100 * cell[column]:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def spending_table(methods: list[dict[str, Any]]) -> list[str]:
    """One row a way to spend the error over the looks."""
    lines = [
        "| error | any verdict, % | at any look, % | differences covered, % | found, % | seeds |",
        "|---" * 6 + "|",
    ]
    for method in methods:
        cells = [method["method"]]
        for share in ("most_verdicts", "most_at_any_look", "least_covered", "power"):
            cells.append(f"{100 * method[share]:.1f}")
        cells.append(f"{method['seeds']:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines
