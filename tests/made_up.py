"""Records of made-up runs, for tests of what is made from records."""

from layerfuse.evaluate.records import AnswerRecord, ControlRecord, RunRecord, RunScores


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
    """An answer that is right or wrong, under the instruction and under each control.

    Args:
        id: of the question.
        sample: id of the sample that holds the question.
        right: whether the answer under the instruction is right.
        answer: the right one.
        family: of the question.
        image: path of the sample's first picture.
        novel: whether training lacks such a combination of attributes.
        weights: of the layers, for guided strategies.
        controls: whether the answer is right, by name of the control.
    """
    # no test calls this the right answer
    prediction = answer if right else "pink"
    control_records: dict[str, ControlRecord] = {}
    if controls is not None:
        for name, control_right in controls.items():
            control_records[name] = ControlRecord(prediction="", score=float(control_right))
    return AnswerRecord(
        id=id,
        sample=sample,
        image=image,
        question="Which colour & why?",
        answer=answer,
        prediction=prediction,
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
    scores: RunScores | None = None,
) -> RunRecord:
    """A finished run of an arm that uses these layers of an encoder of 12 blocks.

    Args:
        arm: name of the arm.
        seed: of the run; its seconds grow with it, so that means and spreads differ from zero.
        layers: the selected ones.
        fusion: name of the strategy.
        losses: (step, loss) of the training, by stage.
        scores: of the evaluation.
    """
    return RunRecord(
        arm=arm,
        seed=seed,
        layers=list(layers),
        depth=12,
        fusion={"name": fusion},
        kind="external direct",
        folder=f"arms/{arm}.{seed}",
        scores=RunScores(mean=0.0, families={}, categories={}) if scores is None else scores,
        losses={} if losses is None else losses,
        parameters={"fusion": 1234, "trained": 56789},
        seconds={"align": 1.0 + seed},
    )
