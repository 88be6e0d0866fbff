"""Do the claims of a recipe hold? Comparisons of groups of arms, stated before training.

A group of arms is compared as an arm is. Its score with a seed is the mean over its arms in that
seed; only seeds count that all its arms have. Over pictures it is resampled as the mean of its
arms; over seeds it varies as `RunVariance.of_group` says.

    over: mean   the mean of `better` minus the mean of `than`; its two-sided p value
    over: each   the mean of `better` minus each of `than`. To hold, it must beat every one: p is
                 the largest (intersection-union test; Berger 1982), which needs no correction.
                 Where the strongest of them scores higher, p is that of the strongest times their
                 number, since it was chosen by its score (Bonferroni)

Verdicts are corrected for all claims of a study that are judged (Holm 1979).
"""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from layerfuse.evaluate.records import AnswerRecord, FinishedRun
from layerfuse.evaluate.score_table import (
    Bootstrap,
    GroupKey,
    ScoreTable,
    category_of,
    family_of,
)
from layerfuse.evaluate.seed_model import (
    Flags,
    Numbers,
    RunVariance,
    VariancePart,
    estimate_variance,
)
from layerfuse.evaluate.significance import (
    Competitor,
    Contrast,
    contrast_of_competitors,
    holm,
)
from layerfuse.recipe.evaluate_settings import Claim

ClaimVerdict = Literal[
    "holds", "the opposite", "not resolved", "unjudged", "not trained long enough"
]


@dataclass(frozen=True)
class ClaimTest:
    """How the arms of a claim compare, before several claims are corrected for.

    Attributes:
        contrast: the mean of `better` minus that of `than`, or minus the strongest of them.
        strongest: the arm of `than` that scores highest; None where their mean is compared.
        p: two-sided; 1 where an arm has one seed.
        better_score: the mean of `better`, as a share of 1.
        than_score: what is subtracted from it.
        better_seeds: those that all arms of `better` have.
        than_seeds: those that all arms have that are subtracted.
    """

    contrast: Contrast
    strongest: str | None
    p: float
    better_score: float
    than_score: float
    better_seeds: list[int]
    than_seeds: list[int]


@dataclass(frozen=True)
class JudgedClaim:
    """A claim with its verdict: a row of `claims` in summary.json.

    Attributes:
        claim: what is claimed.
        source: who claims it, and where.
        better: the arms that are claimed to be better.
        than: the arms that they are compared with.
        over: whether with the mean of these or with each.
        families: of questions that it is about; None: all, or those of `categories`.
        categories: of questions that it is about; None: all, or those of `families`.
        limits: what the study cannot say about it.
        verdict: `holds`, `the opposite`, `not resolved`; `unjudged` where an arm has one seed or
            no result; `not trained long enough` in the place of the first two where arms had not
            learned what they could.
        reason: why there is no verdict, or what else to know of it; may be empty.
        difference: mean of `better` minus mean of `than` or the strongest of them, as a share of 1.
        interval: 95 % interval [low, high] of `difference`, not corrected for several claims.
        covers: what the interval covers: `pictures and seeds`, or `pictures`.
        p: two-sided, of the claim.
        p_holm: `p` corrected for the claims of the study.
        strongest: the arm of `than` that `difference` is about; None: their mean.
        better_score: as a share of 1.
        than_score: as a share of 1.
        better_seeds: the seeds that were used of `better`.
        than_seeds: the seeds that were used of what is subtracted.

    All from `difference` to `than_seeds` but `strongest` are None where an arm has no result or
    where its questions were not asked.
    """

    claim: str
    source: str
    better: list[str]
    than: list[str]
    over: Literal["mean", "each"]
    families: list[str] | None
    categories: list[str] | None
    limits: str
    verdict: ClaimVerdict
    reason: str
    difference: float | None = None
    interval: list[float] | None = None
    covers: str | None = None
    p: float | None = None
    p_holm: float | None = None
    strongest: str | None = None
    better_score: float | None = None
    than_score: float | None = None
    better_seeds: list[int] | None = None
    than_seeds: list[int] | None = None

    @property
    def in_words(self) -> str:
        """The verdict with its reason, as tables show it."""
        words = str(self.verdict)
        if self.verdict == "unjudged":
            words = "no verdict"
        elif self.verdict == "the opposite" and self.strongest is not None:
            words = f"the opposite: {self.strongest} is better"
        if self.reason:
            return f"{words}: {self.reason}"
        return words

    @property
    def about(self) -> str:
        """The questions that it is about, as tables show them."""
        return ", ".join(self.families or self.categories or ["all"])

    def to_json(self) -> dict[str, Any]:
        """Give the row of summary.json.

        Returns:
            Plain values.
        """
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "JudgedClaim":
        """Read what `to_json` gave.

        Args:
            content: plain values.

        Returns:
            The claim with its verdict.
        """
        return cls(**content)


@dataclass(frozen=True)
class ArmGroup:
    """Several arms as one.

    Attributes:
        arms: their positions.
        seeds: which seeds all of them were trained with (S).
        competitor: the mean over them, in these seeds.
    """

    arms: list[int]
    seeds: Flags
    competitor: Competitor


def judge_claims(
    claims: Sequence[Claim],
    runs: list[FinishedRun],
    bootstrap: Bootstrap,
    unsettled: Collection[str] = (),
) -> list[JudgedClaim]:
    """Give the claims of a study their verdicts, corrected for all of them together.

    Args:
        claims: as stated.
        runs: all finished runs, which answer the same questions.
        bootstrap: how pictures are redrawn.
        unsettled: names of arms whose scores would be others after more training, in a study that
            says nothing about arms but who learned faster.

    Returns:
        The claims in the same order; those that cannot be judged with the reason.
    """
    tests: list[ClaimTest | None] = []
    reasons: list[str] = []
    tables: dict[str, ScoreTable] = {}
    for claim in claims:
        reason = missing_for(claim, runs)
        reasons.append(reason)
        if reason:
            tests.append(None)
            continue
        about = repr((claim.families, claim.categories))
        # Most claims of a study are about the same questions.
        if about not in tables:
            tables[about] = ScoreTable.from_runs(runs, bootstrap, key_of(claim))
        tests.append(compare_groups(claim, tables[about]))

    # What is not judged is no claim that the others must be corrected for.
    measured = [test for test in tests if test is not None and test.contrast.measured]
    corrected = iter(holm([test.p for test in measured]))
    judged: list[JudgedClaim] = []
    for claim, test, reason in zip(claims, tests, reasons, strict=True):
        row = JudgedClaim(**claim.model_dump(), verdict="unjudged", reason=reason)
        if test is not None:
            p_holm = 1.0
            if test.contrast.measured:
                p_holm = next(corrected)
            row = with_unsettled(with_test(row, test, p_holm, bootstrap.level), unsettled)
        judged.append(row)
    return judged


def missing_for(claim: Claim, runs: list[FinishedRun]) -> str:
    """Say what a claim lacks.

    Args:
        claim: as stated.
        runs: all finished runs.

    Returns:
        The reason why nothing can be compared; empty where something can.
    """
    trained = {run.record.arm for run in runs}
    waiting = [name for name in claim.arms if name not in trained]
    if waiting:
        return f"no result yet of {', '.join(waiting)}"
    asked = {answer.family for answer in runs[0].answers}
    missing = [name for name in claim.families or [] if name not in asked]
    asked_categories = {answer.category for answer in runs[0].answers}
    missing += [name for name in claim.categories or [] if name not in asked_categories]
    if missing:
        return f"the test asks nothing of {', '.join(missing)}"
    return ""


def key_of(claim: Claim) -> GroupKey:
    """Make the key that groups the questions that a claim is about.

    Args:
        claim: as stated.

    Returns:
        The key; answers of other questions have group None.
    """
    families = claim.families
    categories = claim.categories

    def key(answer: AnswerRecord) -> str | None:
        if categories is not None:
            return category_of(answer) if answer.category in categories else None
        if families is not None and answer.family not in families:
            return None
        return family_of(answer)

    return key


def compare_groups(claim: Claim, table: ScoreTable) -> ClaimTest:
    """Compare the arms of a claim.

    Args:
        claim: as stated; all its arms are in the table.
        table: the scores of the study on the questions that it is about.

    Returns:
        The comparison; over pictures alone and not measured where a group has one seed.
    """
    better = group_of(claim.better, table)
    if claim.over == "mean":
        than = group_of(claim.than, table)
        contrast = contrast_of_groups(better, than, table)
        return _test_of(contrast, better, than, table, p=contrast.p, strongest=None)
    others = [group_of([name], table) for name in claim.than]
    contrasts = [contrast_of_groups(better, other, table) for other in others]
    # The one that leaves the smallest difference; of equal ones the first.
    place = min(range(len(others)), key=lambda index: contrasts[index].difference)
    closest = contrasts[place]
    if closest.difference >= 0:
        p = max(contrast.p for contrast in contrasts)
    else:
        p = min(1.0, len(contrasts) * closest.p)
    measured = all(contrast.measured for contrast in contrasts)
    contrast = replace(closest, measured=measured)
    return _test_of(contrast, better, others[place], table, p=p, strongest=claim.than[place])


def group_of(names: list[str], table: ScoreTable) -> ArmGroup:
    """Take several arms as one.

    Args:
        names: of the arms.
        table: the scores of the study.

    Returns:
        The group; where its arms share no seed, its score is that of all their runs.
    """
    arms = [table.arms.index(name) for name in names]
    common: Flags = np.all(~np.isnan(table.mean.runs[arms]), axis=0)
    every_seed = sorted(set(table.seeds))
    kept = {seed for seed, shared in zip(every_seed, common, strict=True) if shared}
    samples: list[Numbers] = []
    for arm in arms:
        columns: list[int] = []
        for column in table.columns[arm]:
            if not kept or table.seeds[column] in kept:
                columns.append(column)
        # (1 + B, G, K) -> (1 + B): groups of questions and runs count the same.
        samples.append(np.nanmean(table.rates[:, :, columns], axis=1).mean(axis=1))
    mean = np.mean(samples, axis=0)
    return ArmGroup(arms, common, Competitor(score=float(mean[0]), samples=mean[1:]))


def contrast_of_groups(first: ArmGroup, second: ArmGroup, table: ScoreTable) -> Contrast:
    """Compare two groups of arms over pictures and seeds.

    Args:
        first: the group in question.
        second: the group that is subtracted.
        table: the scores of the study.

    Returns:
        The first minus the second; over pictures alone and not measured where one has one seed.
    """
    variance = estimate_variance(table.mean.runs)
    repeated = first.seeds.sum() > 1 and second.seeds.sum() > 1
    parts: list[VariancePart] = []
    if variance is not None and repeated:
        parts = seed_parts(variance, first, second)
    return contrast_of_competitors(
        table.mean, first.competitor, second.competitor, parts, measured=bool(parts)
    )


def seed_parts(variance: RunVariance, first: ArmGroup, second: ArmGroup) -> list[VariancePart]:
    """Give what the difference of two groups varies by over seeds, as of two arms.

    Args:
        variance: of the runs of the study.
        first: one group; both have two seeds.
        second: the other.

    Returns:
        The parts of the variance.
    """
    runs_of_first = first.seeds.sum()
    runs_of_second = second.seeds.sum()
    # A seed that both have cancels, fully where they have equally many.
    weights = first.seeds / runs_of_first - second.seeds / runs_of_second
    left = float((weights**2).sum())
    own_of_first = variance.of_group(first.arms, first.seeds)
    own_of_second = variance.of_group(second.arms, second.seeds)
    return [
        VariancePart(own_of_first / runs_of_first, variance.df),
        VariancePart(own_of_second / runs_of_second, variance.df),
        VariancePart(variance.shared * left, np.full_like(variance.df, variance.shared_df)),
    ]


def _test_of(
    contrast: Contrast,
    better: ArmGroup,
    than: ArmGroup,
    table: ScoreTable,
    *,
    p: float,
    strongest: str | None,
) -> ClaimTest:
    """The comparison of two groups with what it rests on."""
    every_seed = np.array(sorted(set(table.seeds)))
    return ClaimTest(
        contrast=contrast,
        strongest=strongest,
        p=p if contrast.measured else 1.0,
        better_score=better.competitor.score,
        than_score=than.competitor.score,
        better_seeds=every_seed[better.seeds].tolist(),
        than_seeds=every_seed[than.seeds].tolist(),
    )


def with_test(row: JudgedClaim, test: ClaimTest, p_holm: float, level: float) -> JudgedClaim:
    """Give a claim its numbers and its verdict.

    Args:
        row: the claim as stated.
        test: the comparison of its arms.
        p_holm: its p value, corrected for all claims.
        level: of the verdict.

    Returns:
        The judged claim.
    """
    verdict: ClaimVerdict = "not resolved"
    reason = ""
    if not test.contrast.measured:
        verdict = "unjudged"
        reason = "fewer than two seeds that the arms share"
    elif p_holm < 1 - level:
        verdict = "holds" if test.contrast.difference > 0 else "the opposite"
    return replace(
        row,
        verdict=verdict,
        reason=reason,
        difference=test.contrast.difference,
        interval=test.contrast.interval,
        covers=test.contrast.covers,
        p=test.p,
        p_holm=p_holm,
        strongest=test.strongest,
        better_score=test.better_score,
        than_score=test.than_score,
        better_seeds=test.better_seeds,
        than_seeds=test.than_seeds,
    )


def with_unsettled(row: JudgedClaim, unsettled: Collection[str]) -> JudgedClaim:
    """Take the verdict from a claim about arms that had not learned what they could.

    Args:
        row: the judged claim.
        unsettled: names of such arms.

    Returns:
        The claim, as it was where it is about none of them or has no verdict.
    """
    concerned = [name for name in row.better + row.than if name in unsettled]
    if not concerned or row.verdict not in ("holds", "the opposite", "not resolved"):
        return row
    number = f"{len(concerned)} of its {len(row.better) + len(row.than)} arms"
    return replace(row, verdict="not trained long enough", reason=number)
