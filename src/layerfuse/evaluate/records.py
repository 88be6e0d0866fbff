"""The finished runs of a study, read from its folder and checked against each other."""

import json
from dataclasses import dataclass
from pathlib import Path

from layerfuse.errors import LayerfuseError

RESULT_FIELDS = ("arm", "seed", "layers", "fusion", "folder")
ANSWER_FIELDS = ("id", "sample", "question", "answer", "prediction", "correct", "family")


@dataclass(frozen=True)
class FinishedRun:
    """One finished run: its line of results.jsonl and its answers, sorted by id.

    Attributes:
        record: the line of results.jsonl.
        items: the lines of predictions.jsonl, one a question.
    """

    record: dict
    items: list[dict]

    @property
    def name(self) -> str:
        """How messages name the run."""
        return f"arm {self.record['arm']!r} seed {self.record['seed']}"


@dataclass(frozen=True)
class AskedQuestion:
    """What must be equal in all runs for their answers to be compared."""

    sample: str
    question: str
    answer: str
    family: str


def read_lines(path: Path, fields: tuple[str, ...]) -> list[dict]:
    """Read the JSON lines of a file.

    Args:
        path: the file; it must hold at least one line.
        fields: keys that each line must hold.

    Returns:
        One dict a line.

    Raises:
        LayerfuseError: the file is missing or empty, or a line is torn or lacks a field.
    """
    if not path.is_file() or path.stat().st_size == 0:
        raise LayerfuseError(
            f"{path} is missing or empty: no finished run, or the folder was moved"
        )
    # splitlines() would also cut at the line separators that an answer may hold.
    lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise LayerfuseError(f"{path}, line {number} is not JSON: {error}") from error
        missing = [field for field in fields if field not in row]
        if missing:
            raise LayerfuseError(f"{path}, line {number} lacks {', '.join(missing)}")
        rows.append(row)
    return rows


def asked_questions(run: FinishedRun) -> dict[str, AskedQuestion]:
    """Give the questions of a run by their id; of a repeated id the last one."""
    questions = {}
    for item in run.items:
        questions[item["id"]] = AskedQuestion(
            sample=item["sample"],
            question=item["question"],
            answer=item["answer"],
            family=item["family"],
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
    changed = []
    for identifier in sorted(set(questions) & set(expected)):
        if questions[identifier] != expected[identifier]:
            changed.append(identifier)
    repeated = len(run.items) - len(questions)
    if missing or extra or changed or repeated:
        raise LayerfuseError(
            f"{run.name} must answer each question of {first.name} once: {len(missing)} missing "
            f"{missing[:3]}, {len(extra)} extra {extra[:3]}, {len(changed)} changed {changed[:3]}, "
            f"{repeated} answered twice; evaluate all arms on one test set"
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
    for record in read_lines(study_dir / "results.jsonl", RESULT_FIELDS):
        items = read_lines(study_dir / record["folder"] / "predictions.jsonl", ANSWER_FIELDS)
        # Sorted, position i is the same question in every run: comparisons are paired by it.
        items.sort(key=lambda item: item["id"])
        run = FinishedRun(record, items)
        if run.name in names:
            raise LayerfuseError(f"results.jsonl lists {run.name} twice; keep one line")
        names.add(run.name)
        runs.append(run)
        check_same(run, runs[0])
    return runs
