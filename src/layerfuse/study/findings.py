"""The sentences of a report, made from the verdicts alone: no text claims more than they do."""

UNMEASURED = "items only; seed noise not measured"


def percent(value: float) -> str:
    """0.8123 as 81.2 %."""
    return f"{100 * value:.1f} %"


def signed(value: float) -> str:
    """0.0412 as +4.1, with a true minus and no negative zero."""
    return f"{round(100 * value, 1) + 0.0:+.1f}".replace("-", "\u2212")


def span(interval: list[float], plus: bool = False) -> str:
    """An interval in percent or, with plus, in points."""
    low, high = (signed(v) if plus else f"{100 * v:.1f}".replace("-", "\u2212") for v in interval)
    return f"{low} to {high}"


def listed(names: list[str]) -> str:
    """a, b and c; more than six are cut."""
    if len(names) > 6:
        names = [*names[:5], f"{len(names) - 5} more"]
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def size(arm: dict, side: int = 0) -> str:
    """An arm's difference to the baseline with its interval; with side ±1, how far on that side."""
    found = arm["versus_baseline"]
    low_high = sorted(side * v for v in found["interval"]) if side else found["interval"]
    far = f"{100 * side * found['difference']:.1f}" if side else signed(found["difference"])
    return f"{far} points (95 % interval {span(low_high, plus=not side)})"


def unresolved(summary: dict) -> list[dict]:
    """The arms whose difference to the baseline is lost in the noise between seeds alone."""
    return [a for a in summary["arms"] if (a["versus_baseline"] or {}).get("unresolved")]


def verb(names: list[str], one: str, several: str) -> str:
    """The names as the subject of a verb."""
    return f"{listed(names)} {one if len(names) == 1 else several}"


def headline(summary: dict) -> str:
    """The finding in one sentence, for every pattern of verdicts."""
    arms, base = summary["arms"], summary["baseline"]
    others = [a for a in arms if a["versus_baseline"]]
    better, worse, tie = (
        [a["arm"] for a in others if a["versus_baseline"]["verdict"] == v]
        for v in ("better", "worse", "tie")
    )
    by_name = {a["arm"]: a for a in arms}
    open_arms = unresolved(summary)
    first = [a["arm"] for a in arms if a["first"]]
    if not any(a["versus_chance"]["verdict"] == "better" for a in arms):
        text = "No arm is measurably above chance, so nothing can be said about layers or fusion"
    elif not others:
        text = f"Only the baseline {base} has finished: there is nothing to compare yet"
    elif better:
        text = f"{verb(better, 'beats', 'beat')} the baseline {base}"
        text += f" by {size(by_name[better[0]], 1)}" if len(better) == 1 else ""
        text += f"; {listed(first)} are tied for first" if len(first) > 1 else ""
        if len(first) == 1 and len(better) > 1:
            text += f"; {first[0]} leads, with {size(by_name[first[0]])}"
        text += f"; {verb(worse, 'is', 'are')} worse" if worse else ""
    elif not worse and open_arms:
        text = f"Not resolved: {open_arms[0]['arm']} differs from the baseline {base} by "
        text += f"{size(open_arms[0])}, too little for the noise between seeds"
        text += f" and {len(others)} comparisons" if len(others) > 1 else ""
    elif not worse:
        largest = max(others, key=lambda a: abs(a["versus_baseline"]["difference"]))
        low, high = largest["versus_baseline"]["interval"]
        text = f"{largest['arm']} and the baseline {base} tie: "
        if len(others) > 1:
            text = f"All {len(arms)} arms tie: no difference to the baseline {base} is beyond "
            text += f"noise, not even the largest, {largest['arm']} with "
        text += size(largest)
        text += ", once corrected for several comparisons" if low > 0 or high < 0 else ""
    elif tie:
        text = f"No arm beats the baseline {base}: {verb(worse, 'is', 'are')} worse, "
        text += f"{verb(tie, 'ties', 'tie')} with it"
    else:
        text = f"The baseline {base} is best: {verb(worse, 'is', 'are all')} worse"
        text += f" by {size(by_name[worse[0]], -1)}" if len(worse) == 1 else ""
    return text + ("." if summary["noise"] or not others else f" ({UNMEASURED}).")


def layer_sentence(summary: dict) -> str:
    """Which single-layer arm leads where, and where that is beyond noise."""
    count, leaders = len(summary["single_layer"]), summary["leaders"]
    if count < 2:
        return "Fewer than two arms use one layer alone, so layers are not compared by themselves."
    known = "" if summary["noise"] else f" ({UNMEASURED})"
    clear: dict[str, list[str]] = {}
    for row in (row for row in leaders if row["beyond_noise"]):
        clear.setdefault(row["leader"], []).append(row["family"])
    if not clear:
        return f"Among {count} single-layer arms none leads in a family beyond noise{known}."
    parts = [f"{arm} leads on {listed(families)}" for arm, families in clear.items()]
    rest = len(leaders) - sum(map(len, clear.values()))
    tail = f"; elsewhere ({rest} of {len(leaders)} families) the order is noise" if rest else ""
    return f"Of the {count} single-layer arms, {listed(parts)} beyond noise{tail}{known}."


def guidance_sentence(rows: list[dict]) -> str:
    """Which guided arms lose accuracy without their guidance; empty where none is guided."""
    if not rows:
        return ""
    names = {"shuffled": "the instruction of another question", "mean": "the mean weights"}
    words = {"better": "gains", "worse": "loses", "tie": "does not measurably change:"}
    parts = []
    for row in rows:
        d = row["difference"]
        change = f"{words[d['verdict']]} {signed(d['difference'])} points"
        whom = f"{row['arm']} against itself with {names[row['control']]}"
        parts.append(f"{whom} {change} ({span(d['interval'], True)})")
    return "Guided by its own instruction, " + "; ".join(parts) + "."


def findings(summary: dict) -> dict[str, str]:
    """One sentence each: the finding, learning, layers, seed noise."""
    best, noise = summary["arms"][0], summary["noise"]
    failed = [a["arm"] for a in summary["arms"] if a["versus_chance"]["verdict"] != "better"]
    learning = (
        f"The highest-scoring arm, {best['arm']}, answers {percent(best['mean']['score'])} "
        f"right (95 % interval {span(best['mean']['interval'])}); the commonest answer of "
        f"each family alone gives {percent(summary['chance']['mean'])}."
    )
    learning += f" Not measurably above that: {listed(failed)}." if failed else ""
    seeds = f"No arm has two seeds ({UNMEASURED})."
    if noise:
        seeds = (
            f"Training again with another seed moves an arm's mean by a standard deviation of "
            f"{100 * noise['sd']:.1f} points ({noise['df']} degrees of freedom); the widest spread "
            f"within an arm is {100 * noise['spread']:.1f} points ({noise['spread_arm']})."
        )
    if open_arms := [a["arm"] for a in unresolved(summary)]:
        seeds += f" It leaves {listed(open_arms)} unresolved: on these questions alone the "
        seeds += "difference to the baseline would count."
    found = {"headline": headline(summary), "learning": learning}
    return {**found, "layers": layer_sentence(summary), "seeds": seeds}
