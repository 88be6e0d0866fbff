"""Whole made-up studies, for tests of what is said about them: made-up answers of made-up runs."""

from pathlib import Path
from typing import Any

import numpy as np

from layerfuse.evaluate.records import PREDICTIONS, AnswerRecord, FinishedRun, write_records
from tests.made_up import answer_record, run_record


def answer_to(
    picture: int,
    question: int,
    *,
    right: bool,
    answer: str = "x",
    family: str = "a",
    **more: Any,
) -> AnswerRecord:
    """An answer to a question about a picture, both by their numbers."""
    sample = f"t-{picture:03d}"
    return answer_record(
        f"{sample}/{question}",
        sample=sample,
        right=right,
        answer=answer,
        family=family,
        **more,
    )


def random_answers(rate: float, *, seed: int, pictures: int = 60) -> list[AnswerRecord]:
    """Answers of which this share is right, to questions of two families.

    Every picture has a question of family a, every third one none of family b. Picture k is
    answered by x, y or z.
    """
    rng = np.random.default_rng(seed)
    answers = []
    for picture in range(pictures):
        for question, family in enumerate("ab"):
            # The mean over families is then not the mean over questions.
            if family == "b" and picture % 3 == 0:
                continue
            answers.append(
                answer_to(
                    picture,
                    question,
                    right=bool(rng.random() < rate),
                    answer="xyz"[picture % 3],
                    family=family,
                )
            )
    return answers


def finished_run(
    arm: str,
    seed: int,
    answers: list[AnswerRecord],
    layers: tuple[int, ...] = (3,),
) -> FinishedRun:
    """A run of an arm that gave these answers."""
    return FinishedRun(run_record(arm, seed, layers=layers), answers)


def save_study(folder: Path, runs: list[FinishedRun]) -> Path:
    """Write these runs as a study's folder holds them. Returns the folder."""
    # A test may save a second study over the first.
    folder.mkdir(exist_ok=True)
    records = []
    for run in runs:
        write_records(folder / run.record.folder / PREDICTIONS, run.answers)
        records.append(run.record)
    write_records(folder / "results.jsonl", records)
    return folder


def random_study(folder: Path, rates: dict[str, float]) -> Path:
    """Save a study of one arm per rate, two seeds of close results, on 150 pictures."""
    runs = []
    for layer, (arm, rate) in enumerate(rates.items()):
        for seed in (0, 1):
            # A seed of its own for every run: with equal answers there would be no noise.
            answers = random_answers(rate, seed=10 * layer + seed, pictures=150)
            runs.append(finished_run(arm, seed, answers, layers=(layer,)))
    return save_study(folder, runs)
