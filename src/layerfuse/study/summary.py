"""What a study says in numbers: the content of summary.json, made from its finished runs."""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.records import AnswerRecord, FinishedRun, read_runs
from layerfuse.evaluate.score_table import Bootstrap, GroupKey, ScoreTable, category_of, family_of
from layerfuse.evaluate.significance import (
    arm_score,
    compare_all,
    compare_with_chance,
    contrast,
    judge,
)


@dataclass(frozen=True)
class LayerLeader:
    """The leading single-layer arm of one family, and whether it beats each other one."""

    family: str
    leader: str
    second: str
    difference: float
    beyond_noise: bool


def layer_leaders(table: ScoreTable, single: list[int]) -> list[LayerLeader]:
    """Find the leading single-layer arm of each family.

    Args:
        table: scores by family.
        single: positions of the arms that use one layer alone.

    Returns:
        One leader a family; none where fewer than two arms use one layer.
    """
    if len(single) < 2:
        return []
    ranked_arms = []
    contrasts = []
    for scores in table.each:
        # Stable: of equal scores the arm that comes first in the study leads.
        ranked = sorted(single, key=scores.value.__getitem__, reverse=True)
        ranked_arms.append(ranked)
        for other in ranked[1:]:
            contrasts.append(contrast(scores, ranked[0], other))
    # All families together are one set of comparisons.
    judged = judge(contrasts)
    others = len(single) - 1
    leaders = []
    for index, family in enumerate(table.groups):
        tests_of_family = judged[index * others : (index + 1) * others]
        ranked = ranked_arms[index]
        leaders.append(
            LayerLeader(
                family=family,
                leader=table.arms[ranked[0]],
                second=table.arms[ranked[1]],
                difference=tests_of_family[0].difference,
                beyond_noise=all(test.verdict == "better" for test in tests_of_family),
            )
        )
    return leaders


@dataclass(frozen=True)
class StudyTables:
    """The scores of a study by family and by category of questions.

    Attributes:
        families: by family.
        categories: by category.
        seen: combinations that training holds, by the families that have both; None without any.
        novel: held-out combinations, by the same families; None without any.
    """

    families: ScoreTable
    categories: ScoreTable
    seen: ScoreTable | None
    novel: ScoreTable | None


def novelty_key(families: set[str], novel: bool) -> GroupKey:
    """Make a key that groups by family and leaves out other families and the other novelty."""

    def key(answer: AnswerRecord) -> str | None:
        if answer.family in families and answer.novel == novel:
            return answer.family
        return None

    return key


def make_tables(runs: list[FinishedRun], bootstrap: Bootstrap) -> StudyTables:
    """Score the runs by family and category, and by whether a combination was seen in training."""
    families_seen = set()
    families_novel = set()
    for answer in runs[0].answers:
        if answer.novel:
            families_novel.add(answer.family)
        else:
            families_seen.add(answer.family)
    seen = None
    novel = None
    # Only families with both kinds make the two columns comparable.
    both = families_seen & families_novel
    if both:
        seen = ScoreTable.from_runs(runs, bootstrap, novelty_key(both, novel=False))
        novel = ScoreTable.from_runs(runs, bootstrap, novelty_key(both, novel=True))
    return StudyTables(
        families=ScoreTable.from_runs(runs, bootstrap, family_of),
        categories=ScoreTable.from_runs(runs, bootstrap, category_of),
        seen=seen,
        novel=novel,
    )


def group_scores(table: ScoreTable, arm: int) -> dict[str, dict]:
    """Give one arm's score of each group, as JSON."""
    scores_by_group = {}
    for group, scores in zip(table.groups, table.each, strict=True):
        scores_by_group[group] = asdict(arm_score(scores, arm))
    return scores_by_group


def arm_row(runs: list[FinishedRun], arm: int, tables: StudyTables) -> dict:
    """Describe one arm for summary.json: everything but the comparisons.

    Args:
        runs: all finished runs.
        arm: position of the arm.
        tables: the scores of the study.

    Returns:
        What the arm is and what it scores.
    """
    table = tables.families
    records = [runs[column].record for column in table.columns[arm]]
    first_record = records[0]
    # The first row is the test set itself; a mean over families, for each run.
    run_means = np.nanmean(table.rates[0], axis=0)
    row = {
        "arm": first_record.arm,
        "layers": first_record.layers,
        "depth": first_record.depth,
        "fusion": first_record.fusion,
        "kind": first_record.kind,
        "seeds": [record.seed for record in records],
        "parameters": first_record.parameters,
        "seconds": [record.seconds for record in records],
        "mean": asdict(arm_score(table.mean, arm)),
        "seed_means": run_means[table.columns[arm]].tolist(),
        "families": group_scores(table, arm),
        "categories": group_scores(tables.categories, arm),
    }
    if tables.seen is not None and tables.novel is not None:
        row["seen"] = asdict(arm_score(tables.seen.mean, arm))
        row["novel"] = asdict(arm_score(tables.novel.mean, arm))
    return row


def arm_rows(runs: list[FinishedRun], tables: StudyTables, baseline: int) -> list[dict]:
    """Describe and compare all arms for summary.json.

    Args:
        runs: all finished runs.
        tables: the scores of the study.
        baseline: position of the baseline.

    Returns:
        One row an arm, the highest score first.
    """
    mean = tables.families.mean
    arms = len(tables.families.arms)
    leader = int(np.argmax(mean.value))
    versus_chance = compare_with_chance(mean)
    versus_baseline = compare_all(mean, baseline)
    versus_leader = compare_all(mean, leader)
    leader_beats_baseline = leader != baseline and versus_baseline[leader].verdict == "better"
    rows = []
    for arm in range(arms):
        first = arm == leader or versus_leader[arm].verdict == "tie"
        # The two sets of comparisons are corrected apart; a beaten baseline is never first.
        if arm == baseline and leader_beats_baseline:
            first = False
        row = arm_row(runs, arm, tables)
        row["versus_chance"] = asdict(versus_chance[arm])
        row["versus_baseline"] = None
        if arm != baseline:
            row["versus_baseline"] = asdict(versus_baseline[arm])
        row["first"] = first
        rows.append(row)
    rows.sort(key=lambda row: -row["mean"]["score"])
    return rows


def summarize(study_dir: Path, baseline: str, resamples: int = 2000, seed: int = 0) -> dict:
    """State everything that a report says, as JSON; unfinished studies work.

    Args:
        study_dir: the study's folder.
        baseline: the arm that all others are compared with.
        resamples: number of bootstrap resamples.
        seed: of the resamples.

    Returns:
        The content of summary.json without its sentences.

    Raises:
        LayerfuseError: the baseline has no finished run, the test set has one picture, or the
            runs cannot be read or compared.
    """
    runs = read_runs(Path(study_dir))
    tables = make_tables(runs, Bootstrap(resamples, seed))
    table = tables.families
    if baseline not in table.arms:
        raise LayerfuseError(
            f"baseline {baseline!r} has no finished run; arms with one: {table.arms}"
        )
    if table.images < 2:
        raise LayerfuseError("the test set has one picture: intervals need at least two")

    # An arm whose first run says so uses one layer alone.
    single = []
    for arm, columns in enumerate(table.columns):
        if runs[columns[0]].record.fusion["name"] == "single":
            single.append(arm)
    noise = None
    if table.mean.noise is not None:
        noise = asdict(table.mean.noise)
    chance_by_family = {}
    for family, scores in zip(table.groups, table.each, strict=True):
        chance_by_family[family] = scores.chance.score
    return {
        "baseline": baseline,
        "resamples": resamples,
        "runs": len(runs),
        "items": len(runs[0].answers),
        "images": table.images,
        "families": table.groups,
        "chance": {
            "mean": table.mean.chance.score,
            "families": chance_by_family,
        },
        "noise": noise,
        "single_layer": [table.arms[arm] for arm in single],
        "leaders": [asdict(leader) for leader in layer_leaders(table, single)],
        "arms": arm_rows(runs, tables, table.arms.index(baseline)),
    }
