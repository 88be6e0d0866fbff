"""Does what guides a guided model matter? Its weights by kind of question, and its answers without
its own instructions.

The analysis of IGVA (2501.08443), with the control that it lacks: the same model, guided by the
instructions of other questions, or with its mean weights for all.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console
from torch import Tensor

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.answer import Answerer
from layerfuse.evaluate.evaluation import Examination, examine
from layerfuse.evaluate.load_answerer import model_settings
from layerfuse.evaluate.predict import kinds_of
from layerfuse.evaluate.questions import Question
from layerfuse.evaluate.records import PREDICTIONS, write_records
from layerfuse.evaluate.score_table import (
    Bootstrap,
    ScoreTable,
    TestedModel,
    category_of,
    family_of,
)
from layerfuse.evaluate.significance import arm_score
from layerfuse.explain.guidance_figures import draw_guidance
from layerfuse.explain.guidance_measures import (
    control_effects,
    crossed_spread,
    kind_information,
    weights_by,
)
from layerfuse.explain.guidance_report import CrossedSpread, GuidanceReport
from layerfuse.explain.guidance_words import print_guidance
from layerfuse.explain.reading import weighed_layers
from layerfuse.files import write_text
from layerfuse.fusion import FUSIONS, GuidedFusion
from layerfuse.hardware import joined_process
from layerfuse.look.pictures import require_look
from layerfuse.recipe.evaluate_settings import Evaluation
from layerfuse.vision.picture import Picture

GUIDANCE_FILE = "guidance.json"
CONTROLS = ("other_category", "mean")
CROSSED_INSTRUCTIONS = 64
CROSSED_PICTURES = 16
"""Both at most: variances need no more, and every pair is computed."""


def guidance(
    model: Path,
    evaluation: Evaluation,
    *,
    output: Path | None = None,
    cached: bool = False,
    dtype: Literal["float32", "bfloat16"] | None = None,
    resamples: int = 2000,
    seed: int = 0,
    console: Console | None = None,
) -> Path:
    """Measure what guides a guided model, and whether its answers need it; print and write both.

    Args:
        model: its folder.
        evaluation: the data and how it is asked; its controls are those of this analysis.
        output: folder of everything written; a run that was stopped goes on from the answers in
            it. Default: `guidance` in the model's folder.
        cached: read the pictures' features from the cache, and keep there what it lacks.
        dtype: of the model's arithmetic; None is that in which it was saved.
        resamples: number of bootstrap resamples over pictures.
        seed: of resamples, shufflings and the choice of what is crossed.
        console: where to print; the terminal by default.

    Returns:
        The path of `guidance.json`.

    Raises:
        LayerfuseError: the model is not guided, the data cannot be used, or the folder holds
            answers to something else.
    """
    process = joined_process()
    if console is None:
        # Of several processes the first one speaks.
        console = Console(quiet=not process.is_first)
    require_look("sklearn")
    strategy = _guided_strategy(model)
    folder = output or model / "guidance"
    evaluation = evaluation.model_copy(update={"controls": CONTROLS, "log_likelihood": False})
    examination = examine(model, evaluation, folder, cached=cached, dtype=dtype, console=console)
    report = _report(model, strategy, evaluation, examination, Bootstrap(resamples, seed))
    file = folder / GUIDANCE_FILE
    if process.is_first:
        # Answers first: all numbers but the crossed ones can be made again from them
        write_records(folder / PREDICTIONS, examination.answers)
        write_text(file, json.dumps(report.to_json(), indent=1) + "\n")
        draw_guidance(report, folder)
    print_guidance(report, console)
    console.print(f"guidance: {file}", markup=False, highlight=False, soft_wrap=True)
    return file


def _guided_strategy(model: Path) -> str:
    """The name of the strategy of the model in a folder, which must be guided."""
    guided = [name for name, (_, module) in FUSIONS.items() if issubclass(module, GuidedFusion)]
    name = model_settings(model)["fusion"]["name"]
    if name not in guided:
        raise LayerfuseError(
            f"the model in {model} fuses by {name!r}, whose weights no instruction decides: there "
            f"is nothing to measure. Give a model of a guided strategy: {', '.join(guided)}"
        )
    return name


def _report(
    model: Path,
    strategy: str,
    evaluation: Evaluation,
    examination: Examination,
    bootstrap: Bootstrap,
) -> GuidanceReport:
    """All that is measured, from the answers and from the weights of crossed pairs."""
    answers = examination.answers
    places = [place for place, answer in enumerate(answers) if answer.weights is not None]
    weighed = [answers[place] for place in places]
    if not weighed:
        raise LayerfuseError("the data shows no picture: there are no layers to weigh")
    instruction = examination.answerer.instructions(examination.asked)
    assert instruction is not None  # of a guided strategy
    kinds = kinds_of(examination.asked)
    _, wordings = np.unique(instruction.float().numpy(), axis=0, return_inverse=True)
    by_category = len({answer.category for answer in answers}) > 1
    key = category_of if by_category else family_of

    kinds_of_weighed = [str(key(answer)) for answer in weighed]
    information = []
    if len(set(kinds_of_weighed)) > 1:
        weights = np.array([answer.weights for answer in weighed])
        information = kind_information(
            weights, kinds_of_weighed, wordings[places].tolist(), bootstrap.seed
        )
    table = ScoreTable.from_models([TestedModel("guided", 0, answers)], bootstrap, family_of)
    return GuidanceReport(
        model=str(model),
        data=evaluation.data.model_dump(mode="json", exclude_none=True),
        strategy=strategy,
        choices=_choices(examination.answerer),
        kind="category" if by_category else "family",
        questions=len(weighed),
        pictures=table.images,
        wordings=int(wordings.max()) + 1,
        guided=arm_score(table.mean, 0),
        chance=table.mean.chance.score,
        overall=weights_by(answers, lambda answer: "all")["all"],
        categories=weights_by(answers, category_of),
        families=weights_by(answers, family_of),
        crossed=_crossed(examination, instruction, kinds, bootstrap.seed),
        information=information,
        controls=control_effects(answers, key, bootstrap),
        resamples=bootstrap.resamples,
        seed=bootstrap.seed,
    )


def _choices(answerer: Answerer) -> list[str]:
    """The names of the layers or groups that the model weighs."""
    fusion = answerer.model.fusion
    groups = weighed_layers(fusion.shapes.selection, fusion.choices)
    if not groups:
        return [str(place) for place in range(1, fusion.choices + 1)]
    return [_group_name(group) for group in groups]


def _group_name(group: Sequence[int]) -> str:
    """`1-6` for neighbouring layers, else all with plus signs between them."""
    if len(group) > 1 and list(group) == list(range(group[0], group[-1] + 1)):
        return f"{group[0]}-{group[-1]}"
    return "+".join(map(str, group))


def _crossed(
    examination: Examination, instruction: Tensor, kinds: Sequence[str], seed: int
) -> CrossedSpread | None:
    """The spread of the weights where every instruction meets every picture."""
    rng = np.random.default_rng(seed)
    pictures = _some_pictures(examination.asked, rng)
    rows = _some_wordings(instruction, kinds, rng)
    if len(pictures) < 2 or len(rows) < 2:
        return None
    weights = examination.answerer.crossed_weights(pictures, instruction[rows])
    return crossed_spread(weights.double().numpy())


def _some_pictures(asked: Sequence[Question], rng: np.random.Generator) -> list[Picture]:
    """Up to `CROSSED_PICTURES` of the questions' pictures, each once."""
    pictures: dict[str, Picture] = {}
    for question in asked:
        for picture in question.sample.pictures:
            pictures[picture.name] = picture
    distinct = list(pictures.values())
    chosen = rng.permutation(len(distinct))[:CROSSED_PICTURES]
    return [distinct[place] for place in sorted(chosen)]


def _some_wordings(
    instruction: Tensor, kinds: Sequence[str], rng: np.random.Generator
) -> list[int]:
    """Up to `CROSSED_INSTRUCTIONS` questions of different instructions, of each kind in turn."""
    _, first = np.unique(instruction.float().numpy(), axis=0, return_index=True)
    waiting: dict[str, list[int]] = {}
    shuffled_places: list[int] = rng.permutation(first).tolist()
    for place in shuffled_places:
        waiting.setdefault(kinds[place], []).append(place)
    chosen: list[int] = []
    while len(chosen) < CROSSED_INSTRUCTIONS and any(waiting.values()):
        for kind in sorted(waiting):
            if waiting[kind] and len(chosen) < CROSSED_INSTRUCTIONS:
                chosen.append(waiting[kind].pop())
    return sorted(chosen)
