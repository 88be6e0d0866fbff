"""All arms' scores by groups of questions, resampled over pictures.

Shapes: B resamples, I pictures, Q questions, G groups of questions, K runs, A arms.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from layerfuse.evaluate.clusters import clusters_of
from layerfuse.evaluate.metrics import exact_match, normalize
from layerfuse.evaluate.records import AnswerRecord, FinishedRun
from layerfuse.evaluate.significance import LEVEL, Competitor, Numbers, Scores, seed_noise

Positions = np.ndarray[Any, np.dtype[np.intp]]

# The group of an answer, or None where it belongs to no group.
GroupKey = Callable[[AnswerRecord], str | None]


@dataclass(frozen=True)
class Bootstrap:
    """How pictures are redrawn, and how sure what is said of them must be.

    Attributes:
        resamples: their number.
        seed: of the draws.
        level: of intervals and verdicts.
    """

    resamples: int
    seed: int
    level: float = LEVEL


@dataclass(frozen=True)
class TestedModel:
    """One run's answers, with its arm and seed."""

    arm: str
    seed: int
    answers: list[AnswerRecord]


@dataclass(frozen=True)
class RunLayout:
    """The arm and the seed of each run.

    Attributes:
        columns: for each arm the positions of its runs, 0..K-1.
        seeds: of each run (K).
    """

    columns: dict[str, list[int]]
    seeds: list[int]

    def by_seed(self, scores: Numbers) -> Numbers:
        """Arrange the scores of the runs by arm and seed.

        Args:
            scores: of the runs (K).

        Returns:
            Scores (A, S), the seeds in order; NaN where an arm was not trained with a seed.
        """
        names = sorted(set(self.seeds))
        arranged = np.full((len(self.columns), len(names)), np.nan)
        for arm, columns_of_arm in enumerate(self.columns.values()):
            for column in columns_of_arm:
                arranged[arm, names.index(self.seeds[column])] = scores[column]
        return arranged


@dataclass(frozen=True)
class ScoreTable:
    """All arms' scores by groups of questions, resampled.

    Attributes:
        groups: names of the groups (G), sorted.
        arms: names of the arms (A without guessing), in the order of their first runs.
        columns: for each arm the columns of its runs in `rates`.
        seeds: of each run (K).
        images: the number of pictures.
        rates: mean scores of the runs (1 + B, G, K): first the test set itself, then the resamples.
        each: the scores of each group.
        mean: the scores of the mean over groups.
    """

    groups: list[str]
    arms: list[str]
    columns: list[list[int]]
    seeds: list[int]
    images: int
    rates: Numbers
    each: list[Scores]
    mean: Scores

    @classmethod
    def from_runs(
        cls, runs: list[FinishedRun], bootstrap: Bootstrap, key: GroupKey
    ) -> "ScoreTable":
        """Resample the answers of all runs of a study.

        Args:
            runs: finished runs that answer the same questions in the same order.
            bootstrap: how pictures are redrawn.
            key: the group of an answer; those of group None are left out.

        Returns:
            The table.
        """
        models: list[TestedModel] = []
        for run in runs:
            models.append(TestedModel(run.record.arm, run.record.seed, run.answers))
        return cls.from_models(models, bootstrap, key)

    @classmethod
    def from_models(
        cls, models: list[TestedModel], bootstrap: Bootstrap, key: GroupKey
    ) -> "ScoreTable":
        """Resample the answers of some models to the same questions.

        Args:
            models: answers of each (K), in the same order of questions.
            bootstrap: how pictures are redrawn.
            key: the group of an answer; those of group None are left out.

        Returns:
            The table.
        """
        answers = [model.answers for model in models]
        positions: list[int] = []
        labels: list[str] = []
        asked: list[AnswerRecord] = []
        for position, answer in enumerate(answers[0]):
            label = key(answer)
            if label is None:
                continue
            positions.append(position)
            labels.append(label)
            asked.append(answer)
        picture_names, cluster = np.unique(clusters_of(asked), return_inverse=True)
        group_names, group = np.unique(labels, return_inverse=True)
        images = len(picture_names)

        # Runs of one arm need not follow each other
        columns: dict[str, list[int]] = {}
        for column, model in enumerate(models):
            columns.setdefault(model.arm, []).append(column)
        seeds = [model.seed for model in models]
        layout = RunLayout(columns, seeds)

        drawn = picture_weights(images, bootstrap)
        # The first row draws each picture once: the test set itself.
        weights = np.vstack([np.ones(images), drawn])
        run_scores = answer_scores(answers, positions)
        guess_scores = chance_scores(answers[0], positions)
        # One product for runs and guessing: each has the same questions and resamples.
        both = np.column_stack([run_scores, guess_scores])
        shares = rates(weights, cluster, group, both)
        run_shares = shares[:, :, :-1]
        chance_shares = shares[:, :, -1]

        each: list[Scores] = []
        for index in range(len(group_names)):
            group_images = len(np.unique(cluster[group == index]))
            group_shares = run_shares[:, index]
            group_chance = chance_shares[:, index]
            of_group = arm_scores(group_shares, group_chance, layout, group_images)
            each.append(replace(of_group, level=bootstrap.level))
        mean_shares = np.nanmean(run_shares, axis=1)
        mean_chance = np.nanmean(chance_shares, axis=1)
        mean = arm_scores(mean_shares, mean_chance, layout, images)
        return cls(
            groups=group_names.tolist(),
            arms=list(columns),
            columns=list(columns.values()),
            seeds=seeds,
            images=images,
            rates=run_shares,
            each=each,
            mean=replace(mean, level=bootstrap.level),
        )


def answer_scores(answers: list[list[AnswerRecord]], positions: list[int]) -> Numbers:
    """Give the score of each answer.

    Args:
        answers: of each model (K).
        positions: where the questions stand among them (Q).

    Returns:
        Scores (Q, K), 0..1.
    """
    columns: list[list[float]] = []
    for of_model in answers:
        columns.append([of_model[position].score for position in positions])
    return np.array(columns, dtype=float).T


def chance_scores(answers: list[AnswerRecord], positions: list[int]) -> Numbers:
    """Give the score of guessing without a look: the commonest answer to each family, scored as
    answers of models are.

    Args:
        answers: of any model, for what was asked and expected.
        positions: where the questions stand among them (Q).

    Returns:
        Scores (Q), 0 or 1.
    """
    questions = [answers[position] for position in positions]
    blind = commonest_answers(questions)
    return np.array([exact_match(blind[asked.family], asked.answer) for asked in questions])


def arm_scores(shares: Numbers, chance: Numbers, layout: RunLayout, images: int) -> Scores:
    """Average the runs of each arm.

    Args:
        shares: mean scores of the runs (1 + B, K), the test set first.
        chance: mean scores of guessing (1 + B), the test set first.
        layout: the arm and the seed of each run.
        images: the number of pictures.

    Returns:
        The scores of the arms and of guessing.
    """
    means: list[Numbers] = []
    seeds: dict[str, list[float]] = {}
    for arm, columns_of_arm in layout.columns.items():
        means.append(shares[:, columns_of_arm].mean(axis=1))
        seeds[arm] = shares[0, columns_of_arm].tolist()
    stacked = np.stack(means, axis=1)
    return Scores(
        value=stacked[0],
        samples=stacked[1:],
        runs=layout.by_seed(shares[0]),
        chance=Competitor(score=float(chance[0]), samples=chance[1:]),
        noise=seed_noise(seeds),
        images=images,
    )


def commonest_answers(questions: list[AnswerRecord]) -> dict[str, str]:
    """Find what one would answer without a look.

    Args:
        questions: answers of any model, for what was asked and expected.

    Returns:
        The most frequent answer of each family as `normalize` writes it, the first in sorted order
        among equals.
    """
    counts: dict[str, Counter[str]] = {}
    for question in questions:
        family_counts = counts.setdefault(question.family, Counter())
        family_counts[normalize(question.answer)] += 1
    commonest: dict[str, str] = {}
    for family in sorted(counts):
        # Stable sorting keeps the alphabetical order among equally frequent answers.
        answers = sorted(counts[family])
        answers.sort(key=counts[family].__getitem__, reverse=True)
        commonest[family] = answers[0]
    return commonest


def rates(weights: Numbers, cluster: Positions, group: Positions, scores: Numbers) -> Numbers:
    """Mean score per resample, group and run.

    Args:
        weights: how often each picture is drawn in each resample (B, I).
        cluster: the picture of each question (Q), 0..I-1.
        group: the group of each question (Q), 0..G-1.
        scores: of each run's answers (Q, K), 0..1.

    Returns:
        Means (B, G, K); NaN where a resample asks no question of a group.
    """
    images = weights.shape[1]
    groups = int(group.max()) + 1
    runs = scores.shape[1]
    # One more column counts the questions, so that one product gives both parts of the mean.
    counted = np.column_stack([scores, np.ones(len(scores))])
    counts = np.zeros((images, groups, runs + 1))
    # `add.at` adds up repeated indices, which `counts[...] +=` would count once.
    np.add.at(counts, (cluster, group), counted)
    # (B, I) x (I, G, K + 1) -> (B, G, K + 1)
    drawn = np.tensordot(weights, counts, axes=1)
    score_drawn = drawn[:, :, :-1]
    asked = drawn[:, :, -1:]
    undefined = np.full_like(score_drawn, np.nan)
    return np.divide(score_drawn, asked, out=undefined, where=asked > 0)


def picture_weights(images: int, bootstrap: Bootstrap) -> Numbers:
    """Redraw the pictures.

    Args:
        images: their number I.
        bootstrap: how often, and the seed.

    Returns:
        How often each picture is drawn in each resample (B, I).
    """
    # How often each of I pictures comes up in I draws with replacement is multinomial.
    share = np.full(images, 1 / images)
    generator = np.random.default_rng(bootstrap.seed)
    return generator.multinomial(images, share, size=bootstrap.resamples).astype(float)


def family_of(answer: AnswerRecord) -> str:
    """Give the group of an answer.

    Args:
        answer: of any model.

    Returns:
        Its family.
    """
    return answer.family


def category_of(answer: AnswerRecord) -> str:
    """Give the group of an answer.

    Args:
        answer: of any model.

    Returns:
        Its category.
    """
    return answer.category
