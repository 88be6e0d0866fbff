"""The finished runs of a study, read from its folder and checked against each other."""

import json
from dataclasses import dataclass
from pathlib import Path

RECORD = ("arm", "seed", "layers", "fusion", "folder")
ITEM = ("id", "sample", "question", "answer", "prediction", "correct", "family")


@dataclass(frozen=True)
class FinishedRun:
    """One finished run: its line of results.jsonl and its predictions, sorted by id."""

    record: dict
    items: list[dict]

    @property
    def name(self) -> str:
        """How messages name the run."""
        return f"arm {self.record['arm']!r} seed {self.record['seed']}"


def read_lines(path: Path, fields: tuple[str, ...]) -> list[dict]:
    """The JSON lines of a file, at least one; each must hold the fields."""
    if not path.is_file() or not path.stat().st_size:
        raise ValueError(f"{path} is missing or empty: no finished run, or the folder was moved")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        if missing := [field for field in fields if field not in rows[-1]]:
            raise ValueError(f"{path}, line {number} lacks {', '.join(missing)}")
    return rows


def check_same(run: FinishedRun, first: FinishedRun) -> None:
    """Raise unless both runs answer the same questions, each once."""
    one, other = (
        {i["id"]: (i["sample"], i["question"], i["answer"], i["family"]) for i in r.items}
        for r in (run, first)
    )
    lacks, extra = sorted(set(other) - set(one)), sorted(set(one) - set(other))
    changed = sorted(key for key in one if one[key] != other.get(key, one[key]))
    if lacks or extra or changed or len(one) < len(run.items):
        raise ValueError(
            f"{run.name} must answer each question of {first.name} once: {len(lacks)} missing "
            f"{lacks[:3]}, {len(extra)} extra {extra[:3]}, {len(changed)} changed {changed[:3]}, "
            f"{len(run.items) - len(one)} answered twice; evaluate all arms on one test set"
        )


def read_runs(study_dir: Path) -> list[FinishedRun]:
    """All finished runs in the order of results.jsonl, checked to answer the same questions."""
    runs: list[FinishedRun] = []
    for record in read_lines(study_dir / "results.jsonl", RECORD):
        items = read_lines(study_dir / record["folder"] / "predictions.jsonl", ITEM)
        runs.append(FinishedRun(record, sorted(items, key=lambda item: item["id"])))
        if any(runs[-1].name == other.name for other in runs[:-1]):
            raise ValueError(f"results.jsonl lists {runs[-1].name} twice; keep one line")
        check_same(runs[-1], runs[0])
    return runs
