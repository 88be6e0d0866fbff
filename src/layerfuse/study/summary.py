"""What a study says in numbers, made from its finished runs: summary.json without its sentences."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.claims import JudgedClaim, judge_claims
from layerfuse.evaluate.learning_status import (
    ArmLearning,
    judge_learning,
    not_trained_long_enough,
    unsettled_arms,
)
from layerfuse.evaluate.planning import resolved_by
from layerfuse.evaluate.records import AnswerRecord, FinishedRun
from layerfuse.evaluate.score_table import Bootstrap, GroupKey, ScoreTable, category_of, family_of
from layerfuse.evaluate.significance import (
    ArmScore,
    Contrast,
    JudgedContrast,
    Scores,
    SeedNoise,
    arm_score,
    compare_all,
    compare_with_chance,
    contrast,
    holm,
    inseparable_from_first,
)
from layerfuse.look.probe_report import Probes
from layerfuse.recipe.evaluate_settings import Claim, Statistics
from layerfuse.study.budgets import StepBudgets
from layerfuse.study.guidance_effect import GuidanceRow, guidance_rows
from layerfuse.study.likelihood_effect import ArmLikelihood, compare_likelihoods
from layerfuse.study.looks import PlannedLooks, SeedLook, bootstrap_of_look, look_at
from layerfuse.study.training_status import ProbeComparison, compare_with_probe

# As a recipe that says nothing of its statistics.
BOOTSTRAP = Bootstrap(resamples=Statistics().resamples, seed=Statistics().seed)


MOST_FAMILIES = 10
"""Of more families, tables and figures show the categories."""


@dataclass(frozen=True)
class ChanceScores:
    """What the commonest answer of each family scores, as shares of 1.

    Attributes:
        mean: over the families, each counting the same.
        families: by family of questions.
        categories: by category of questions.
    """

    mean: float
    families: dict[str, float]
    categories: dict[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class CategoryMean:
    """What an arm scores over categories of questions, each counting the same.

    Attributes:
        mean: over categories and seeds.
        versus_baseline: the arm minus the baseline, corrected for the comparisons of all arms; None
            for the baseline itself.
    """

    mean: ArmScore
    versus_baseline: JudgedContrast | None


@dataclass(frozen=True)
class ArmSummary:
    """What one arm is, what it scores, and how it compares.

    Attributes:
        arm: its name.
        layers: the selected layers, positions in `hidden_states`.
        depth: number of the vision encoder's blocks.
        fusion: the strategy's name and options, as the run's record has them.
        kind: of the strategy, such as `external direct`.
        seeds: of its runs.
        parameters: numbers of parameters of each part, and those that the last stage trained.
        seconds: for each run those of each stage and of the test.
        mean: its score, the mean over families and seeds.
        seed_means: the mean over families for each run.
        families: its score by family of questions.
        categories: its score by category of questions.
        seen: on combinations that training holds; None where no family has both kinds.
        novel: on held-out combinations, by the same families; None where no family has both kinds.
        versus_chance: the arm minus guessing.
        versus_baseline: the arm minus the baseline; None for the baseline itself.
        first: whether it is the highest-scoring arm, or not separable from that.
        over_categories: its score over categories, where these are shown; else None.
    """

    # The order of the fields is that of summary.json.
    arm: str
    layers: list[int]
    depth: int
    fusion: dict[str, Any]
    kind: str
    seeds: list[int]
    parameters: dict[str, int]
    seconds: list[dict[str, float]]
    mean: ArmScore
    seed_means: list[float]
    families: dict[str, ArmScore]
    categories: dict[str, ArmScore]
    seen: ArmScore | None
    novel: ArmScore | None
    versus_chance: JudgedContrast
    versus_baseline: JudgedContrast | None
    first: bool
    over_categories: CategoryMean | None = None

    def to_json(self) -> dict[str, Any]:
        """Give the arm as summary.json holds it.

        Returns:
            Plain values.
        """
        row = asdict(self)
        # Only studies with held-out combinations have these, where null would look like a score.
        if self.seen is None:
            del row["seen"]
        if self.novel is None:
            del row["novel"]
        if self.over_categories is None:
            del row["over_categories"]
        return row


@dataclass(frozen=True)
class LayerLeader:
    """The leading single-layer arm of one family, and whether it beats each other one."""

    family: str
    leader: str
    second: str
    difference: float
    beyond_noise: bool


@dataclass(frozen=True)
class Summary:
    """What a study found, in numbers.

    Attributes:
        baseline: the arm that all others are compared with.
        resamples: number of bootstrap resamples.
        runs: number of finished runs.
        items: number of questions.
        images: number of pictures.
        families: names of the families of questions, sorted.
        chance: what guessing scores.
        noise: between seeds; None where no arm has two.
        resolvable: the difference to the baseline that a study with this noise shows with a
            probability of 80 %; None where nothing is judged.
        single_layer: names of the arms that use one layer alone.
        leaders: the leading one of these for each group of questions; none of fewer than two.
        arms: all that have a finished run, the highest score first.
        guidance: one row per guided arm and control.
        learning: what each arm had learned when its training stopped; empty where nothing is known.
        probes: of the arms whose layers were probed, what they score beside the probe.
        likelihoods: how likely each arm finds the right answers; empty where it was not measured.
        claims: what the recipe stated before training, with the verdicts; may be empty.
        seed_look: the look at which seeds were last added or no longer; None where seeds are a
            list.
        budgets: what more steps did; None where the recipe gave the steps.
        shown_by: the groups of questions that are shown one by one: families, or categories where
            there are too many families.
    """

    # The order of the fields is that of summary.json.
    baseline: str
    resamples: int
    runs: int
    items: int
    images: int
    families: list[str]
    chance: ChanceScores
    noise: SeedNoise | None
    resolvable: float | None
    single_layer: list[str]
    leaders: list[LayerLeader]
    arms: list[ArmSummary]
    guidance: list[GuidanceRow]
    learning: dict[str, ArmLearning] = field(default_factory=dict[str, ArmLearning])
    probes: dict[str, ProbeComparison] = field(default_factory=dict[str, ProbeComparison])
    likelihoods: dict[str, ArmLikelihood] = field(default_factory=dict[str, ArmLikelihood])
    claims: list[JudgedClaim] = field(default_factory=list[JudgedClaim])
    seed_look: SeedLook | None = None
    budgets: StepBudgets | None = None
    shown_by: Literal["families", "categories"] = "families"

    def to_json(self) -> dict[str, Any]:
        """Give the summary as summary.json holds it, without its sentences.

        Returns:
            Plain values.
        """
        # `asdict` goes down to the arms, but knows nothing of what their own method leaves out.
        content = asdict(self)
        content["arms"] = [arm.to_json() for arm in self.arms]
        # Runs of older versions have none.
        if not self.likelihoods:
            del content["likelihoods"]
        if not self.claims:
            del content["claims"]
        if self.seed_look is None:
            del content["seed_look"]
        if self.budgets is None:
            del content["budgets"]
        return content


@dataclass(frozen=True)
class RankedFamily:
    """The single-layer arms of one family by score, and the leader against each other one."""

    family: str
    ranked: list[int]
    contrasts: list[Contrast]

    def p(self) -> float:
        """Give the p value of the leader being best.

        Returns:
            The largest of its comparisons: to lead it must beat every other arm. That it was
            chosen by its score costs nothing (Gutmann & Maymin 1987). 1 where an arm has one seed.
        """
        if not all(test.measured for test in self.contrasts):
            return 1.0
        return max(test.p for test in self.contrasts)


def rank_family(family: str, scores: Scores, single: list[int]) -> RankedFamily:
    """Rank the single-layer arms of one family and compare the leader with the others."""
    # Stable: of equal scores the arm that comes first in the study leads.
    ranked = sorted(single, key=scores.value.__getitem__, reverse=True)
    contrasts = [contrast(scores, ranked[0], other) for other in ranked[1:]]
    return RankedFamily(family, ranked, contrasts)


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
    families = []
    for family, scores in zip(table.groups, table.each, strict=True):
        families.append(rank_family(family, scores, single))
    # One statement a family: they are corrected for the number of families.
    corrected = holm([family.p() for family in families])
    leaders = []
    for family, p_holm in zip(families, corrected, strict=True):
        leaders.append(
            LayerLeader(
                family=family.family,
                leader=table.arms[family.ranked[0]],
                second=table.arms[family.ranked[1]],
                difference=family.contrasts[0].difference,
                beyond_noise=p_holm < 1 - table.mean.level,
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

    @property
    def has_many_families(self) -> bool:
        """Whether categories are shown in the place of families."""
        return len(self.families.groups) > MOST_FAMILIES and len(self.categories.groups) > 1


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


def group_scores(table: ScoreTable, arm: int) -> dict[str, ArmScore]:
    """Give one arm's score of each group."""
    scores_by_group = {}
    for group, scores in zip(table.groups, table.each, strict=True):
        scores_by_group[group] = arm_score(scores, arm)
    return scores_by_group


@dataclass(frozen=True)
class ArmVerdicts:
    """How one arm compares; attributes as of `ArmSummary`."""

    versus_chance: JudgedContrast
    versus_baseline: JudgedContrast | None
    first: bool


def judge_arms(tables: StudyTables, baseline: int) -> list[ArmVerdicts]:
    """Compare all arms with guessing, with the baseline and with the leader.

    Args:
        tables: the scores of the study.
        baseline: position of the baseline.

    Returns:
        The verdicts of each arm, in the order of the tables.
    """
    mean = tables.families.mean
    # Of equal scores the first.
    leader = int(np.argmax(mean.value))
    versus_chance = compare_with_chance(mean)
    versus_baseline = compare_all(mean, baseline)
    inseparable = inseparable_from_first(mean)
    leader_beats_baseline = leader != baseline and versus_baseline[leader].verdict == "better"
    verdicts = []
    for arm in range(len(tables.families.arms)):
        first = inseparable[arm]
        # The two sets of comparisons are corrected apart; a beaten baseline is never first.
        if arm == baseline and leader_beats_baseline:
            first = False
        verdicts.append(
            ArmVerdicts(
                versus_chance=versus_chance[arm],
                # The baseline is not compared with itself.
                versus_baseline=versus_baseline.get(arm),
                first=first,
            )
        )
    return verdicts


def summarize_arm(
    runs: list[FinishedRun], arm: int, tables: StudyTables, verdicts: ArmVerdicts
) -> ArmSummary:
    """Say what one arm is, what it scores and how it compares.

    Args:
        runs: all finished runs.
        arm: position of the arm.
        tables: the scores of the study.
        verdicts: of this arm.

    Returns:
        Its summary.
    """
    table = tables.families
    records = [runs[column].record for column in table.columns[arm]]
    # The runs of an arm differ in their seed alone.
    first_record = records[0]
    # The first row is the test set itself; a mean over families, for each run.
    run_means = np.nanmean(table.rates[0], axis=0)
    seen = None
    novel = None
    if tables.seen is not None and tables.novel is not None:
        seen = arm_score(tables.seen.mean, arm)
        novel = arm_score(tables.novel.mean, arm)
    return ArmSummary(
        arm=first_record.arm,
        layers=first_record.layers,
        depth=first_record.depth,
        fusion=first_record.fusion,
        kind=first_record.kind,
        seeds=[record.seed for record in records],
        parameters=first_record.parameters,
        seconds=[record.seconds for record in records],
        mean=arm_score(table.mean, arm),
        seed_means=run_means[table.columns[arm]].tolist(),
        families=group_scores(table, arm),
        categories=group_scores(tables.categories, arm),
        seen=seen,
        novel=novel,
        versus_chance=verdicts.versus_chance,
        versus_baseline=verdicts.versus_baseline,
        first=verdicts.first,
    )


def category_means(tables: StudyTables, baseline: int) -> list[CategoryMean | None]:
    """Compare all arms over categories, where these are shown.

    Args:
        tables: the scores of the study.
        baseline: position of the baseline.

    Returns:
        In the order of the tables; None for each arm of a study whose families are shown.
    """
    table = tables.categories
    if not tables.has_many_families:
        return [None] * len(table.arms)
    versus_baseline = compare_all(table.mean, baseline)
    means: list[CategoryMean | None] = []
    for arm in range(len(table.arms)):
        means.append(CategoryMean(arm_score(table.mean, arm), versus_baseline.get(arm)))
    return means


def summarize_arms(runs: list[FinishedRun], tables: StudyTables, baseline: int) -> list[ArmSummary]:
    """Describe and compare all arms.

    Args:
        runs: all finished runs.
        tables: the scores of the study.
        baseline: position of the baseline.

    Returns:
        One summary an arm, the highest score first.
    """
    summaries = []
    over_categories = category_means(tables, baseline)
    for arm, verdicts in enumerate(judge_arms(tables, baseline)):
        summary = summarize_arm(runs, arm, tables, verdicts)
        summaries.append(replace(summary, over_categories=over_categories[arm]))
    # Stable: of equal scores the arm that comes first in the study stays first.
    summaries.sort(key=lambda summary: -summary.mean.score)
    return summaries


def compare_with_probes(
    arms: list[ArmSummary], probes: Sequence[Probes]
) -> dict[str, ProbeComparison]:
    """Set the arms whose layers were probed beside their probes, by name."""
    comparisons = {}
    for arm in arms:
        families = {family: score.score for family, score in arm.families.items()}
        comparison = compare_with_probe(arm.layers, families, probes)
        if comparison is not None:
            comparisons[arm.arm] = comparison
    return comparisons


def summarize(
    runs: list[FinishedRun],
    baseline: str,
    bootstrap: Bootstrap = BOOTSTRAP,
    *,
    blind_losses: Mapping[str, float | None] | None = None,
    probes: Sequence[Probes] = (),
    claims: Sequence[Claim] = (),
    auto: PlannedLooks | None = None,
    budgets: StepBudgets | None = None,
) -> Summary:
    """State every number that a report says; unfinished studies work.

    Args:
        runs: all finished runs; they answer the same questions.
        baseline: the arm that all others are compared with.
        bootstrap: how pictures are redrawn.
        blind_losses: of each stage the loss of one who does not look; None where it is not known.
        probes: of the study's encoder, if there are any.
        claims: that the recipe states.
        auto: when the study is looked at, with `seeds: auto`; its intervals and verdicts then have
            the level of the look.
        budgets: what more steps did, with `steps: auto`.

    Returns:
        The numbers of the finished runs.

    Raises:
        LayerfuseError: the baseline has no finished run, or the test set has one picture.
    """
    if auto is not None:
        bootstrap = bootstrap_of_look(runs, auto, bootstrap)
    tables = make_tables(runs, bootstrap)
    table = tables.families
    if baseline not in table.arms:
        raise LayerfuseError(
            f"baseline {baseline!r} has no finished run; arms with one: {table.arms}"
        )
    # Each resample of one picture is that picture, so that nothing would vary.
    if table.images < 2:
        raise LayerfuseError("the test set has one picture: intervals need at least two")

    single = _single_layer_arms(runs, table)
    shown_by: Literal["families", "categories"] = "families"
    if tables.has_many_families:
        shown_by = "categories"
    seed_look = None
    if auto is not None:
        seed_look = look_at(runs, baseline, auto, table)
    arms = summarize_arms(runs, tables, table.arms.index(baseline))
    learning = judge_learning([run.record for run in runs], blind_losses or {})
    # Where most arms have learned what they could, the verdicts on the others stand too.
    unsettled = []
    if not_trained_long_enough(learning, baseline):
        unsettled = unsettled_arms(learning)
    return Summary(
        baseline=baseline,
        resamples=bootstrap.resamples,
        runs=len(runs),
        items=len(runs[0].answers),
        images=table.images,
        families=table.groups,
        chance=ChanceScores(
            mean=table.mean.chance.score,
            families=_chance_by_group(table),
            categories=_chance_by_group(tables.categories),
        ),
        noise=table.mean.noise,
        resolvable=resolved_by(table.mean, table.arms.index(baseline)),
        single_layer=[table.arms[arm] for arm in single],
        leaders=layer_leaders(table if shown_by == "families" else tables.categories, single),
        arms=arms,
        guidance=guidance_rows(runs, bootstrap),
        learning=learning,
        probes=compare_with_probes(arms, probes),
        likelihoods=compare_likelihoods(runs, baseline, bootstrap),
        claims=judge_claims(claims, runs, bootstrap, unsettled),
        seed_look=seed_look,
        budgets=budgets,
        shown_by=shown_by,
    )


def _single_layer_arms(runs: list[FinishedRun], table: ScoreTable) -> list[int]:
    """The positions of the arms that use one layer alone, as their first run says."""
    single: list[int] = []
    for arm, columns in enumerate(table.columns):
        if runs[columns[0]].record.fusion["name"] == "single":
            single.append(arm)
    return single


def _chance_by_group(table: ScoreTable) -> dict[str, float]:
    """What the commonest answer of each group of questions scores."""
    chance: dict[str, float] = {}
    for group, scores in zip(table.groups, table.each, strict=True):
        chance[group] = scores.chance.score
    return chance
