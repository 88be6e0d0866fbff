"""Records of made-up runs, for tests of what is made from records."""

from typing import Any

from layerfuse.evaluate.records import AnswerRecord, ControlRecord, RunRecord


def answer_record(
    id: str,
    *,
    sample: str,
    right: bool,
    answer: str = "x",
    family: str = "a",
    image: str | None = None,
    novel: bool = False,
    weights: list[float] | None = None,
    controls: dict[str, bool] | None = None,
) -> AnswerRecord:
    """An answer that is right or wrong, under the instruction and under each control."""
    control_records = {}
    for name, control_right in (controls or {}).items():
        control_records[name] = ControlRecord("", float(control_right))
    return AnswerRecord(
        id=id,
        sample=sample,
        image=image,
        question="Which colour & why?",
        answer=answer,
        prediction=answer if right else "pink",
        score=float(right),
        family=family,
        category="all",
        novel=novel,
        weights=weights,
        controls=control_records,
    )


def run_record(
    arm: str,
    seed: int,
    *,
    layers: tuple[int, ...] = (3,),
    fusion: str = "single",
    losses: dict[str, list[tuple[int, float]]] | None = None,
    scores: dict[str, Any] | None = None,
) -> RunRecord:
    """A run of an arm that uses these layers."""
    return RunRecord(
        arm=arm,
        seed=seed,
        layers=list(layers),
        depth=12,
        fusion={"name": fusion},
        kind="external direct",
        folder=f"arms/{arm}.{seed}",
        scores=scores or {},
        losses=losses or {},
        parameters={"fusion": 1234, "trained": 56789},
        seconds={"align": 1.0 + seed},
    )
