"""Runs, as another tool would leave them, and a suite on which they are compared."""

import random
from collections.abc import Callable, Mapping
from pathlib import Path

from layerfuse.evaluate.benchmarks.mme import COGNITION, PERCEPTION
from layerfuse.evaluate.run_answers import Run
from tests.made_up_benchmarks import column, suite_of, write_answers

REAL = suite_of(
    column("counting", "realmix", column="counting", category="numbers"),
    column("colour", "realmix", column="colour", category="looks", divide=2),
)


def run_of(folder: Path, name: str, benchmark: str, answers: Mapping[str, str]) -> Run:
    """Write the answers of a run, as another tool would."""
    write_answers(folder / name / f"{benchmark}.jsonl", answers)
    return Run(name, folder / name)


def right_answers(count: int, right: Callable[[int], bool]) -> dict[str, str]:
    """Answers to `write_realmix`: the number where it is right, else none."""
    return {f"q{number}/0": str(number) if right(number) else "?" for number in range(count)}


def mme_answers(seed: int, share_right: float, pictures: int) -> dict[str, str]:
    """Answers to `write_mme`, right with some probability."""
    random_numbers = random.Random(seed)
    answers: dict[str, str] = {}
    for task in PERCEPTION + COGNITION:
        suffix = "jpg" if task in PERCEPTION else "png"
        for picture in range(pictures):
            for number, right in ((1, "Yes"), (2, "No")):
                wrong = "No" if right == "Yes" else "Yes"
                said = right if random_numbers.random() < share_right else wrong
                answers[f"{task}/{picture:04}.{suffix}/{number}"] = said
    return answers
