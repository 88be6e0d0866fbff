"""Answers and runs as records: what the files of a study hold, read and checked.

A line of `predictions.jsonl` is an `AnswerRecord`, a line of `results.jsonl` a `RunRecord`. Dicts
exist only here, where the files are read and written.
"""

import json
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from layerfuse.errors import LayerfuseError
from layerfuse.files import write_text

PREDICTIONS = "predictions.jsonl"
"""The answers of a run, in its folder."""
NOVELTIES = ("seen", "novel")
"""Whether training holds the combination of attributes that a question is about."""


@dataclass(frozen=True)
class ControlRecord:
    """The answer to a question with something else in the place of its instruction.

    Attributes:
        prediction: what the model answered.
        score: of the prediction, 0..1.
    """

    prediction: str
    score: float


@dataclass(frozen=True)
class AnswerRecord:
    """A model's answer to one question: a line of predictions.jsonl.

    Attributes:
        id: of the question, unique in a test set.
        sample: id of the sample that holds the question.
        image: path of the sample's first picture; None if it has none or lies in no file.
        question: what was asked.
        answer: what was expected.
        prediction: what the model answered.
        score: of the prediction, 0..1.
        family: the kind of question; each counts the same in the mean.
        category: the group of families that a benchmark reports.
        novel: whether training holds no such combination of attributes.
        weights: of a guided strategy, its weights over layers or groups for this question.
        controls: of a guided strategy, the answers without its guidance, by the control's name.
        pictures: digests of the bytes of all pictures of the sample, in the order of their
            markers.
        log_likelihood: mean log-probability of the tokens of the right answer, its end among them,
            in nats; None where it was not measured.
    """

    id: str
    sample: str
    image: str | None
    question: str
    answer: str
    prediction: str
    score: float
    family: str
    category: str
    novel: bool
    weights: list[float] | None = None
    controls: dict[str, ControlRecord] = field(default_factory=dict[str, ControlRecord])
    pictures: list[str] = field(default_factory=list[str])
    log_likelihood: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Give the record as a line of predictions.jsonl holds it.

        Returns:
            Plain values.
        """
        line = asdict(self)
        # Only answers of guided strategies have these.
        if self.weights is None:
            del line["weights"]
        if not self.controls:
            del line["controls"]
        # Samples without a picture, and files of older versions, have none.
        if not self.pictures:
            del line["pictures"]
        if self.log_likelihood is None:
            del line["log_likelihood"]
        return line

    @classmethod
    def from_json(cls, line: dict[str, Any]) -> "AnswerRecord":
        """Read what `to_json` gave.

        Args:
            line: plain values.

        Returns:
            The record.

        Raises:
            LayerfuseError: a field is missing or unknown.
        """
        _check_fields(cls, line)
        controls: dict[str, ControlRecord] = {}
        for name, control in line.get("controls", {}).items():
            _check_fields(ControlRecord, control)
            controls[name] = ControlRecord(**control)
        values: dict[str, Any] = {**line, "controls": controls}
        return cls(**values)


@dataclass(frozen=True)
class RunScores:
    """What one run scored on its test set, as shares of 1.

    Attributes:
        mean: over the families, each counting the same.
        families: mean score by family of questions.
        categories: mean score by category of questions.
        by_novelty: mean score of the answers that are `seen` and of those that are `novel`, each
            where there are such answers, in the order in which the test set first has them.
        log_likelihood: of the right answers in nats a token, the mean over the families, each
            counting the same; None where it was not measured.
    """

    mean: float
    families: dict[str, float]
    categories: dict[str, float]
    by_novelty: dict[str, float] = field(default_factory=dict[str, float])
    log_likelihood: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Give the scores as a line of results.jsonl holds them.

        Returns:
            Plain values; `seen` and `novel` stand beside the mean, not in a dict of their own.
        """
        line = {
            "mean": self.mean,
            "families": self.families,
            "categories": self.categories,
            **self.by_novelty,
        }
        # Files of older versions have none.
        if self.log_likelihood is not None:
            line["log_likelihood"] = self.log_likelihood
        return line

    @classmethod
    def from_json(cls, line: dict[str, Any]) -> "RunScores":
        """Read what `to_json` gave.

        Args:
            line: the scores of a line of results.jsonl.

        Returns:
            The scores.

        Raises:
            LayerfuseError: a score is missing or unknown.
        """
        by_novelty: dict[str, float] = {}
        values: dict[str, Any] = {}
        for name, value in line.items():
            if name in NOVELTIES:
                by_novelty[name] = value
            else:
                values[name] = value
        # What is left must be the fixed fields; novelties may be missing
        _check_fields(cls, values)
        values["by_novelty"] = by_novelty
        return cls(**values)


@dataclass(frozen=True)
class CurvePoint:
    """What a run answered at one moment of its training.

    Attributes:
        share: of all training that was done, in samples seen; 0..1.
        stage: that was training.
        step: of the stage, from 1.
        samples: seen so far over all stages, repeated ones counted again.
        accuracy: on the validation questions, the mean over families; 0..1.
        families: accuracy by family of questions.
        loss: of the right answers, in nats a labelled token.
    """

    share: float
    stage: str
    step: int
    samples: int
    accuracy: float
    families: dict[str, float]
    loss: float

    @classmethod
    def from_json(cls, point: dict[str, Any]) -> "CurvePoint":
        """Read a point as `asdict` gives it.

        Args:
            point: plain values.

        Returns:
            The point.

        Raises:
            LayerfuseError: a field is missing or unknown.
        """
        _check_fields(cls, point)
        return cls(**point)


@dataclass(frozen=True)
class RunRecord:
    """One training of one arm, with what it scored: a line of results.jsonl.

    Attributes:
        arm: the arm's name.
        seed: of the run.
        layers: the selected layers, positions in `hidden_states`.
        depth: number of the vision encoder's blocks.
        fusion: the strategy's name and options.
        kind: of the strategy, such as `external direct`.
        folder: the run's, relative to the study's.
        scores: on the test set.
        losses: for each stage [step, loss] along training.
        parameters: numbers of parameters of each part, and those that the last stage trained.
        seconds: of each stage, with what is measured along it, and of the test.
        along: what it answered along training, in this order; empty without validation data.
    """

    arm: str
    seed: int
    layers: list[int]
    depth: int
    fusion: dict[str, Any]
    kind: str
    folder: str
    scores: RunScores
    losses: dict[str, list[tuple[int, float]]]
    parameters: dict[str, int]
    seconds: dict[str, float]
    along: list[CurvePoint] = field(default_factory=list[CurvePoint])

    @property
    def name(self) -> str:
        """How messages name the run."""
        return f"arm {self.arm!r} seed {self.seed}"

    def to_json(self) -> dict[str, Any]:
        """Give the record as a line of results.jsonl holds it.

        Returns:
            Plain values.
        """
        line = asdict(self)
        line["scores"] = self.scores.to_json()
        # Only runs of studies with validation data have these.
        if not self.along:
            del line["along"]
        return line

    @classmethod
    def from_json(cls, line: dict[str, Any]) -> "RunRecord":
        """Read what `to_json` gave.

        Args:
            line: plain values.

        Returns:
            The record.

        Raises:
            LayerfuseError: a field is missing or unknown.
        """
        _check_fields(cls, line)
        losses: dict[str, list[tuple[int, float]]] = {}
        for stage, curve in line["losses"].items():
            # JSON has no tuples.
            losses[stage] = [(step, loss) for step, loss in curve]
        scores = RunScores.from_json(line["scores"])
        along = [CurvePoint.from_json(point) for point in line.get("along", [])]
        values: dict[str, Any] = {**line, "scores": scores, "losses": losses, "along": along}
        return cls(**values)


def _check_fields(record: type[Any], line: dict[str, Any]) -> None:
    """Raise LayerfuseError if a line lacks a field of a record, or holds another one."""
    required: list[str] = []
    known: list[str] = []
    for attribute in fields(record):
        # A field with a default may be missing from a file
        known.append(attribute.name)
        if attribute.default is MISSING and attribute.default_factory is MISSING:
            required.append(attribute.name)
    missing = [name for name in required if name not in line]
    unknown = [name for name in line if name not in known]
    if missing:
        raise LayerfuseError(f"lacks {', '.join(missing)}")
    # A file of a later version is refused: half of a record may mean something else
    if unknown:
        raise LayerfuseError(f"holds {', '.join(unknown)}, which this version does not know")


Record = TypeVar("Record", AnswerRecord, RunRecord)


@dataclass(frozen=True)
class FinishedRun:
    """One finished run with its answers, sorted by id."""

    record: RunRecord
    answers: list[AnswerRecord]


@dataclass(frozen=True)
class AskedQuestion:
    """What must be equal in all runs for their answers to be compared."""

    sample: str
    question: str
    answer: str
    family: str


def read_records(path: Path, record: type[Record]) -> list[Record]:
    """Read a file with one record a line.

    Args:
        path: the file; it must hold at least one line.
        record: what its lines hold.

    Returns:
        The records in the order of the lines.

    Raises:
        LayerfuseError: the file is missing or empty, or a line is torn or holds other fields.
    """
    # A killed writer leaves no file, an empty study an empty one
    if not path.is_file() or path.stat().st_size == 0:
        raise LayerfuseError(
            f"{path} is missing or empty: no finished run, or the folder was moved"
        )
    # splitlines() would also cut at the line separators that an answer may hold.
    lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    records: list[Record] = []
    for number, line in enumerate(lines, start=1):
        try:
            data = json.loads(line)
        except json.JSONDecodeError as error:
            raise LayerfuseError(f"{path}, line {number} is not JSON: {error}") from error
        try:
            records.append(record.from_json(data))
        except LayerfuseError as error:
            raise LayerfuseError(f"{path}, line {number} {error}") from error
    return records


def write_records(path: Path, records: Iterable[AnswerRecord | RunRecord]) -> None:
    """Write one record a line; the file is there whole or not at all.

    Args:
        path: the file, which is replaced if it exists.
        records: in the order of the lines.

    Raises:
        LayerfuseError: the file cannot be written.
    """
    lines = [json.dumps(record.to_json()) + "\n" for record in records]
    write_text(path, "".join(lines))


def asked_questions(run: FinishedRun) -> dict[str, AskedQuestion]:
    """Give what a run was asked.

    Args:
        run: the run.

    Returns:
        The questions by their id; of a repeated id the last one.
    """
    questions: dict[str, AskedQuestion] = {}
    for answer in run.answers:
        # What the model answered is left out: it may differ
        questions[answer.id] = AskedQuestion(
            sample=answer.sample,
            question=answer.question,
            answer=answer.answer,
            family=answer.family,
        )
    return questions


def check_same(run: FinishedRun, first: FinishedRun) -> None:
    """Check that a run answers the questions of the study's first run, each once.

    Args:
        run: the run to check.
        first: the run that all others are compared with.

    Raises:
        LayerfuseError: questions are missing, added, changed or answered twice.
    """
    questions = asked_questions(run)
    expected = asked_questions(first)
    missing = sorted(set(expected) - set(questions))
    extra = sorted(set(questions) - set(expected))
    changed: list[str] = []
    for identifier in sorted(set(questions) & set(expected)):
        if questions[identifier] != expected[identifier]:
            changed.append(identifier)
    # A question that is answered twice would weigh twice
    repeated = len(run.answers) - len(questions)
    if missing or extra or changed or repeated:
        raise LayerfuseError(
            f"{run.record.name} must answer each question of {first.record.name} once: "
            f"{len(missing)} missing {missing[:3]}, {len(extra)} extra {extra[:3]}, "
            f"{len(changed)} changed {changed[:3]}, {repeated} answered twice; "
            "evaluate all arms on one test set"
        )


def read_runs(study_dir: Path) -> list[FinishedRun]:
    """Read all finished runs of a study, checked to answer the same questions.

    Args:
        study_dir: the study's folder.

    Returns:
        The runs in the order of results.jsonl.

    Raises:
        LayerfuseError: a file is missing or torn, a run is listed twice, or the runs do not
            answer the same questions.
    """
    runs: list[FinishedRun] = []
    names: set[str] = set()
    for record in read_records(study_dir / "results.jsonl", RunRecord):
        answers = read_records(study_dir / record.folder / PREDICTIONS, AnswerRecord)
        # Sorted, position i is the same question in every run: comparisons are paired by it.
        answers.sort(key=lambda answer: answer.id)
        run = FinishedRun(record, answers)
        # Two lines of one run would count its seed twice
        if record.name in names:
            raise LayerfuseError(f"results.jsonl lists {record.name} twice; keep one line")
        names.add(record.name)
        runs.append(run)
        check_same(run, runs[0])
    return runs
