"""Test one trained model on any data, with intervals over pictures."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ValidationError
from rich.console import Console
from transformers.utils import logging as transformers_logging

from layerfuse.data.lazy_records import Samples
from layerfuse.data.lengths import Lengths, Limits, positions_of
from layerfuse.data.sources import faults, load
from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.answer import Answerer
from layerfuse.evaluate.answer_folder import (
    AnswerFolder,
    Asked,
    AskedModel,
    digest_of,
    digest_of_pictures,
)
from layerfuse.evaluate.averages import scored_by_likelihood, scores
from layerfuse.evaluate.control_scores import answers_under
from layerfuse.evaluate.load_answerer import load_answerer
from layerfuse.evaluate.predict import predict
from layerfuse.evaluate.questions import Question, asked_alone, questions
from layerfuse.evaluate.records import PREDICTIONS, AnswerRecord, write_records
from layerfuse.evaluate.score_table import (
    Bootstrap,
    GroupKey,
    ScoreTable,
    TestedModel,
    category_of,
    family_of,
)
from layerfuse.evaluate.significance import Scores, arm_score
from layerfuse.files import write_text
from layerfuse.hardware import joined_process
from layerfuse.model.pretrained import processed_size
from layerfuse.progress import shown_progress, silent
from layerfuse.recipe.data_source import Data, ReadColumn
from layerfuse.recipe.evaluate_settings import Evaluation
from layerfuse.tables import Heading, print_fitted

SCORES = "scores.json"


@dataclass(frozen=True)
class ModelScore:
    """What a model scores on some questions, and what a guess without looking would.

    Attributes:
        score: mean score, 0..1.
        interval: its 95 % interval [low, high] over pictures; None with a single picture.
        chance: the score of the commonest answer.
        questions: their number.
        pictures: the number of different pictures; a sample without one counts as one.
        log_likelihood: of the right answers, in nats a token; None where it was not measured.
    """

    score: float
    interval: list[float] | None
    chance: float
    questions: int
    pictures: int
    log_likelihood: float | None = None


@dataclass(frozen=True)
class ModelScores:
    """What a model scores on a test: the content of scores.json.

    Attributes:
        model: its folder.
        data: what it was asked, as in a recipe.
        resamples: number of bootstrap resamples over pictures.
        seed: of the resampling.
        mean: over the families, each counting the same.
        families: by family of questions.
        categories: by category of questions.
        controls: as `mean`, with something else in the place of the instruction, by the control's
            name; empty for strategies that are not guided.
    """

    model: str
    data: dict[str, Any]
    resamples: int
    seed: int
    mean: ModelScore
    families: dict[str, ModelScore]
    categories: dict[str, ModelScore]
    controls: dict[str, ModelScore]


def data_of(
    source: str,
    split: str,
    limit: int | None = None,
    *,
    columns: Sequence[str] = (),
    ignore_columns: Sequence[str] = (),
    literal_answers: bool = False,
) -> Data:
    """Give the data that texts on the command line mean.

    Args:
        source: a LLaVA JSON file, a folder of images, or a Hugging Face dataset (hub id or folder).
        split: of a dataset.
        limit: use only the first samples.
        columns: what the source calls a column, each as `read=called`, such as `image=imgs`.
        ignore_columns: columns that are left out on purpose.
        literal_answers: whether markers in answers are text.

    Returns:
        The data, unread.

    Raises:
        LayerfuseError: it can be none of these, or the columns cannot be named so.
    """
    options: dict[str, Any] = {
        "split": split,
        "limit": limit,
        "columns": _columns_of(columns),
        "ignore_columns": list(ignore_columns),
        "literal_answers": literal_answers,
    }
    path = Path(source)
    if path.exists():
        options["path"] = source
    # A hub id is `name` or `owner/name`; anything else was meant as a path.
    elif path.suffix in (".json", ".jsonl", ".gz") or source[:1] in "./~" or source.count("/") > 1:
        raise LayerfuseError(f"no such file or folder of samples: {source}")
    else:
        options["dataset"] = source
    try:
        return Data.model_validate(options)
    except ValidationError as error:
        reasons = [problem["msg"].removeprefix("Value error, ") for problem in error.errors()]
        raise LayerfuseError("; ".join(reasons)) from error


def _columns_of(texts: Sequence[str]) -> dict[str, str]:
    """The names of columns in the source by what is read.

    Raises:
        LayerfuseError: a text is not `read=called`, names nothing that is read, or comes twice.
    """
    valid = get_args(ReadColumn)
    columns: dict[str, str] = {}
    for text in texts:
        read, _, called = text.partition("=")
        if not read or not called:
            raise LayerfuseError(
                f"--column {text!r}: write what is read and what the data calls it, such as "
                "--column image=imgs"
            )
        if read not in valid:
            raise LayerfuseError(
                f"--column {text!r}: {read!r} is no column that is read; valid: {', '.join(valid)}"
            )
        if read in columns:
            raise LayerfuseError(f"--column {text!r}: {read} is {columns[read]} already")
        columns[read] = called
    return columns


@dataclass(frozen=True)
class Examination:
    """A model that was asked every question of some data.

    Attributes:
        answerer: the model; it reads the features that it was asked with.
        asked: the questions.
        answers: to each.
    """

    answerer: Answerer
    asked: list[Question]
    answers: list[AnswerRecord]


def examine(
    model: Path,
    evaluation: Evaluation,
    folder: Path,
    *,
    cached: bool,
    dtype: Literal["float32", "bfloat16"] | None,
    batch_invariant: bool = True,
    console: Console,
) -> Examination:
    """Ask a trained model every question of some data, and keep every answer as it comes.

    Args:
        model: its folder.
        evaluation: the data and how it is asked.
        folder: where the answers go; a run that was stopped goes on from them.
        cached: read the pictures' features from the cache, and keep there what it lacks.
        dtype: of the model's arithmetic; None is that in which it was saved.
        batch_invariant: ask again alone what is too close to call.
        console: where progress is shown.

    Returns:
        The model with its answers.

    Raises:
        LayerfuseError: there is no model, the data cannot be used, or the folder holds answers to
            something else.
    """
    # The data first: it is checked in a moment, while a large model loads for minutes.
    samples = load(evaluation.data)
    faulty = faults(samples)
    if faulty:
        _, reason = next(iter(faulty.values()))
        raise LayerfuseError(f"{reason}; {len(faulty)} of {len(samples)} samples cannot be used")
    asked = list(questions(samples))
    if not asked:
        raise LayerfuseError("the data holds no question with an answer")
    # One bar is enough: that of the questions.
    transformers_logging.disable_progress_bar()
    answerer = load_answerer(model, dtype, batch_invariant=batch_invariant)
    _check_lengths(model, answerer, samples, evaluation)
    asked_model = AskedModel.of(model, dtype, batch_invariant=batch_invariant)
    kept = _answer_folder(folder, asked, evaluation, asked_model)
    with shown_progress(console) as progress:
        if cached:
            pictures = [picture for question in asked for picture in question.sample.pictures]
            answerer = answerer.with_cached_features(pictures, progress)
        with kept.opened():
            answers = predict(answerer, samples, evaluation, progress, kept=kept)
    return Examination(answerer, asked, answers)


def evaluate(
    model: Path,
    evaluation: Evaluation,
    *,
    output: Path | None = None,
    cached: bool = False,
    dtype: Literal["float32", "bfloat16"] | None = None,
    batch_invariant: bool = True,
    resamples: int = 2000,
    seed: int = 0,
    console: Console | None = None,
) -> Path:
    """Ask a trained model every question of some data, and print and write what it scores.

    Args:
        model: its folder.
        evaluation: the data and how it is asked.
        output: where answers and scores go; a run that was stopped goes on from them. Default:
            `evaluation/NAME` in the model's folder, where NAME is that of the data.
        cached: read the pictures' features from the cache, and keep there what it lacks.
        dtype: of the model's arithmetic; None is that in which it was saved.
        batch_invariant: ask again alone what is too close to call.
        resamples: number of bootstrap resamples over pictures.
        seed: of the resampling.
        console: where to print; the terminal by default.

    Returns:
        The folder that was written.

    Raises:
        LayerfuseError: there is no model, the data cannot be used, or the folder holds answers to
            something else.
    """
    process = joined_process()
    if console is None:
        # Of several processes the first one speaks.
        console = Console(quiet=not process.is_first)
    folder = output or model / "evaluation" / name_of(evaluation.data)
    answers = examine(
        model,
        evaluation,
        folder,
        cached=cached,
        dtype=dtype,
        batch_invariant=batch_invariant,
        console=console,
    ).answers
    result = _model_scores(str(model), evaluation.data, answers, Bootstrap(resamples, seed))
    if process.is_first:
        # Answers first: scores can be made again from them
        write_records(folder / PREDICTIONS, answers)
        write_text(folder / SCORES, json.dumps(asdict(result), indent=1) + "\n")
    _print(result, console)
    impossible = sum(answer.log_likelihood is None for answer in answers)
    if evaluation.log_likelihood and impossible:
        console.print(
            f"{impossible:,} of {len(answers):,} right answers hold tokens that this model cannot "
            "give (closed_answers): they count as wrong, and no log-likelihood is averaged",
            highlight=False,
        )
    console.print(f"answers and scores: {folder}", markup=False, highlight=False, soft_wrap=True)
    return folder


def name_of(data: Data) -> str:
    """Name the folder of the answers to some data.

    Args:
        data: what is asked.

    Returns:
        The file's or folder's name, or that of the dataset and its split.
    """
    if data.scenes is not None:
        return "scenes"
    if data.path is not None:
        # `.` and `..` are names of folders too.
        return Path(data.path).resolve().stem
    # A hub id holds a slash.
    return f"{data.dataset}-{data.split}".replace("/", "--")


def _answer_folder(
    folder: Path, asked: Sequence[Question], evaluation: Evaluation, model: AskedModel
) -> AnswerFolder:
    """The folder that keeps the answers to questions of the user's own."""
    described: list[list[object]] = []
    for question in asked:
        # Without the folder, which may be moved.
        pictures = [Path(picture.name).name for picture in question.sample.pictures]
        words = [message["content"] for message in question.messages]
        described.append([question.id, words, question.answer, pictures])
    prompt = evaluation.model_dump(mode="json", include={"max_new_tokens", "log_likelihood"})
    asked_for = Asked(
        benchmark="data",
        model=model.digest,
        prompt=prompt,
        questions=digest_of(described),
        pictures=digest_of_pictures((question.id, question.sample.pictures) for question in asked),
        folder=model.folder,
    )
    return AnswerFolder(folder, asked_for, [question.id for question in asked])


def _model_scores(
    model: str, data: Data, answers: list[AnswerRecord], bootstrap: Bootstrap
) -> ModelScores:
    """What a model scores with its answers to some data."""
    mean, families = _scores(answers, bootstrap, family_of)
    _, categories = _scores(answers, bootstrap, category_of)
    measured = scored_by_likelihood(answers)
    if measured:
        likelihoods = scores(measured)
        mean = replace(mean, log_likelihood=likelihoods.mean)
        families = _with_likelihoods(families, likelihoods.families)
        categories = _with_likelihoods(categories, likelihoods.categories)
    controls: dict[str, ModelScore] = {}
    for control in answers[0].controls:
        controls[control], _ = _scores(answers_under(control, answers), bootstrap, family_of)
    return ModelScores(
        model=model,
        data=data.model_dump(mode="json", exclude_none=True),
        resamples=bootstrap.resamples,
        seed=bootstrap.seed,
        mean=mean,
        families=families,
        categories=categories,
        controls=controls,
    )


def _check_lengths(
    model: Path, answerer: Answerer, samples: Samples, evaluation: Evaluation
) -> None:
    """Raise LayerfuseError for the first sample that cannot be asked, or leaves no positions of the
    LLM for its answer.

    Args:
        model: its folder.
        answerer: the model.
        samples: all readable.
        evaluation: how they are asked.
    """
    processor = answerer.processor
    height, width = processed_size(str(model), processor.image_processor)
    limits = Limits(
        processor.num_image_tokens(height, width),
        positions_of(answerer.model.config.text_config),
    )
    bad = Lengths(processor, limits, silent, "lengths").measure(
        samples,
        prompt="chat",
        max_length=None,
        room=evaluation.max_new_tokens,
        split=asked_alone,
    )
    for sample in bad.values():
        raise LayerfuseError(
            f"{sample.reason}; {len(bad)} of {len(samples)} samples cannot be asked"
        )


def _scores(
    answers: list[AnswerRecord], bootstrap: Bootstrap, key: GroupKey
) -> tuple[ModelScore, dict[str, ModelScore]]:
    """The mean over groups of answers, and the score of each group."""
    table = ScoreTable.from_models([TestedModel("model", 0, answers)], bootstrap, key)
    # In the order of the table, whose groups are sorted
    num_questions = dict.fromkeys(table.groups, 0)
    for answer in answers:
        num_questions[str(key(answer))] += 1
    groups: dict[str, ModelScore] = {}
    for group, of_group in zip(table.groups, table.each, strict=True):
        groups[group] = _model_score(of_group, num_questions[group])
    return _model_score(table.mean, len(answers)), groups


def _with_likelihoods(
    groups: dict[str, ModelScore], likelihoods: dict[str, float]
) -> dict[str, ModelScore]:
    """The scores of groups of questions, with the log-likelihood of each group."""
    completed: dict[str, ModelScore] = {}
    for group, score in groups.items():
        completed[group] = replace(score, log_likelihood=likelihoods[group])
    return completed


def _model_score(scores: Scores, questions: int) -> ModelScore:
    """The score of the only model that these scores are of."""
    model_score = arm_score(scores, 0)
    interval = None
    # One picture says nothing of others: its resamples are all the same.
    if scores.images > 1:
        interval = model_score.interval
    return ModelScore(
        score=model_score.score,
        interval=interval,
        chance=scores.chance.score,
        questions=questions,
        pictures=scores.images,
    )


def _print(result: ModelScores, console: Console) -> None:
    """Print a row for the mean and for each group of questions."""
    headings = [
        Heading("questions about"),
        Heading("score", is_number=True),
        Heading("95 % interval", is_number=True),
        Heading("chance", is_number=True),
        Heading("log-likelihood", is_number=True),
        Heading("questions", is_number=True),
        Heading("pictures", is_number=True),
    ]
    lines = [_cells("mean of families", result.mean)]
    for family, score in result.families.items():
        lines.append(_cells(family, score))
    # A single category is the mean under another name
    if len(result.categories) > 1:
        for category, score in result.categories.items():
            lines.append(_cells(f"category {category}", score))
    for control, score in result.controls.items():
        lines.append(_cells(f"control {control}", score))
    print_fitted(console, headings, lines)


def _cells(name: str, score: ModelScore) -> list[str]:
    """One row of the table."""
    interval = "one picture"
    if score.interval is not None:
        low, high = score.interval
        interval = f"{100 * low:.1f} to {100 * high:.1f}"
    likelihood = ""
    if score.log_likelihood is not None:
        likelihood = f"{score.log_likelihood:.3f}"
    return [
        name,
        f"{100 * score.score:.1f} %",
        interval,
        f"{100 * score.chance:.1f} %",
        likelihood,
        str(score.questions),
        str(score.pictures),
    ]
