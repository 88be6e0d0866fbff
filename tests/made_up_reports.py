"""A whole made-up study in a folder, for tests of its report: pictures, answers, curves, recipe."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from layerfuse.evaluate.records import (
    PREDICTIONS,
    AnswerRecord,
    ControlRecord,
    CurvePoint,
    RunRecord,
    read_records,
    write_records,
)
from tests.made_up import answer_record, run_record

# An answer that a page must not run.
EVIL = "<script>alert('red')</script>"
PICTURES = 40
FAMILIES = ("colour", "count")


def save_pictures(folder: Path) -> None:
    """Small pictures of different colours, `0.png` and so on."""
    folder.mkdir(parents=True)
    for number in range(PICTURES):
        colour = (6 * number, 90, 120)
        Image.new("RGB", (8, 8), colour).save(folder / f"{number}.png")


def answers_at_rate(
    rate: float,
    expected: list[str],
    difficulty: np.ndarray,
    rng: np.random.Generator,
    families: tuple[str, ...] = FAMILIES,
) -> list[AnswerRecord]:
    """The answers of one run to as many questions a picture as there are families, one of each.

    Args:
        rate: share of right answers, before chance changes one in 25.
        expected: the right answer to each question.
        difficulty: of each question, 0..1: a run answers those below its rate.
        rng: what chance changes.
        families: of the questions.
    """
    records = []
    for question, answer in enumerate(expected):
        picture, place = divmod(question, len(families))
        changed_by_chance = rng.random() < 0.04
        right = bool(difficulty[question] < rate) != bool(changed_by_chance)
        records.append(
            answer_record(
                f"t-{picture:03d}/{place}",
                sample=f"t-{picture:03d}",
                image=f"images/{picture}.png",
                answer=answer,
                right=right,
                family=families[place],
                novel=question % 8 < 2,
            )
        )
    return records


def run_of(arm: str, seed: int) -> RunRecord:
    """A run with two stages whose losses fall; `concat` arms have two layers."""
    # Long enough to be smoothed.
    curve = [(step, 3 / (1 + step)) for step in range(20)]
    layers = (12,)
    if "concat" in arm:
        layers = (4, 8)
    record = run_record(
        arm,
        seed,
        layers=layers,
        fusion="concat",
        losses={"align": curve, "finetune": curve},
    )
    along = []
    for step in (10, 20):
        along.append(
            CurvePoint(
                share=step / 20,
                stage="finetune",
                step=step,
                samples=4 * step,
                # Trained long enough to be compared.
                accuracy=0.5,
                families={},
                loss=1 / step,
            )
        )
    return replace(record, along=along)


def write_recipe_of(folder: Path, arms: list[str]) -> None:
    """The recipe of a study whose baseline is the first of its arms."""
    lines = ["name: tiny-study", f"baseline: {arms[0]}", "arms:"]
    for arm in arms:
        lines.append(f"- name: {arm}")
    (folder / "recipe.yaml").write_text("\n".join(lines) + "\n")


def make_study(
    folder: Path,
    rates: dict[str, float],
    seeds: int = 2,
    families: tuple[str, ...] = FAMILIES,
) -> Path:
    """Save arms with these rates of right answers; the first one is the baseline."""
    rng = np.random.default_rng(0)
    save_pictures(folder / "images")
    expected = [str(rng.choice(["blue", "green", EVIL])) for _ in range(PICTURES * len(families))]
    # What is hard is so for all arms: their differences are those of their rates.
    difficulty = rng.random(PICTURES * len(families))
    records = []
    for arm, rate in rates.items():
        for seed in range(seeds):
            record = run_of(arm, seed)
            answers = answers_at_rate(rate, expected, difficulty, rng, families)
            write_records(folder / record.folder / PREDICTIONS, answers)
            records.append(record)
    write_records(folder / "results.jsonl", records)
    write_recipe_of(folder, list(rates))
    # Names of hardware come from the machine, and may hold anything.
    (folder / "environment.json").write_text('{"python": "3.11", "cpu": "<b>fast</b>"}')
    return folder


def guide(folder: Path, arm: str, helped: bool) -> None:
    """Make an arm a guided one, with answers under the instruction of another question.

    Args:
        folder: of the study.
        arm: one of its arms.
        helped: whether the instruction moves the weights between two layers and turns every third
            answer into a right one; if not, weights and answers are always the same.
    """
    for path in folder.glob(f"arms/{arm}*/{PREDICTIONS}"):
        guided_answers = []
        for question, answer in enumerate(read_records(path, AnswerRecord)):
            weights = [0.5, 0.5]
            control_score = answer.score
            if helped:
                shift = 0.1 * (question % 2)
                weights = [0.5 + shift, 0.5 - shift]
            if helped and question % 3 == 0:
                control_score = 0.0
            controls = {"shuffled": ControlRecord("", control_score)}
            guided_answers.append(replace(answer, weights=weights, controls=controls))
        write_records(path, guided_answers)
