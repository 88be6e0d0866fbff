"""Figures and pages made again from the JSON beside them, without any model or picture."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.compare import Comparison
from layerfuse.evaluate.compare_figures import draw_categories
from layerfuse.evaluate.compare_report import COMPARISON
from layerfuse.evaluate.records import PREDICTIONS, RunRecord, read_records
from layerfuse.explain.answer_figures import draw as draw_answer
from layerfuse.explain.guidance_figures import draw_guidance
from layerfuse.explain.guidance_report import GuidanceReport
from layerfuse.explain.inspection import FACTS, load
from layerfuse.explain.page import write_page
from layerfuse.look.figures import draw_probe, draw_similarity
from layerfuse.look.probe_report import ProbeReport
from layerfuse.look.report_file import read_report
from layerfuse.look.similarity_report import SimilarityReport
from layerfuse.study.data_sizes_report import (
    DATA_SIZES,
    SizesReport,
    draw_sizes,
    write_sizes_page,
)
from layerfuse.study.report import write_report
from layerfuse.study.report_figures import draw
from layerfuse.study.reported_recipe import read_recipe

GUIDANCE = "guidance.json"
RESULTS = "results.jsonl"
SUMMARY = "summary.json"


@dataclass(frozen=True)
class _Place:
    """Where figures are made from, and where they go.

    Attributes:
        folder: holds the JSON.
        output: gets the figures alone; None: they go where they were, and pages are made again.
    """

    folder: Path
    output: Path | None

    def figures(self, subfolder: str = "") -> Path:
        """The folder of figures that by themselves lie in a subfolder."""
        return self.output or self.folder / subfolder


def redraw(folder: Path, output: Path | None = None) -> list[Path]:
    """Make all figures and pages of a folder again from the JSON in it.

    Args:
        folder: of a study, a study over data sizes, a look at an encoder, a comparison, an
            inspection or an analysis of guidance; also one that holds the numbers of a study
            without its answers.
        output: gets the figures alone; by default they go where they were.

    Returns:
        What was written: of figures the PNG, beside which lies the SVG, and pages.

    Raises:
        LayerfuseError: there is nothing to draw from, or a file cannot be read or is damaged.
    """
    place = _Place(folder, output)
    found = [name for name in SOURCES if (folder / name).is_file()]
    if not found:
        raise LayerfuseError(
            f"{folder} holds nothing to draw from; give a folder with one of {', '.join(SOURCES)}"
        )
    written: list[Path] = []
    for name in found:
        written += SOURCES[name](place)
    return written


def _pngs(names: list[str], folder: Path) -> list[Path]:
    return [folder / f"{name}.png" for name in names]


def _study(place: _Place) -> list[Path]:
    """The figures of a study, and its page where the answers are at hand."""
    records = read_records(place.folder / RESULTS, RunRecord)
    answered = all((place.folder / each.folder / PREDICTIONS).is_file() for each in records)
    if answered and place.output is None:
        page = write_report(place.folder)
        return [*sorted((place.folder / "figures").glob("*.png")), page]
    summary = read_report(place.folder / SUMMARY, dict)
    batch_sizes: Mapping[str, int] = {}
    if (place.folder / "recipe.yaml").is_file():
        batch_sizes = read_recipe(place.folder).batch_sizes
    try:
        names = draw(summary, records, place.figures("figures"), batch_sizes)
    except KeyError as error:
        raise LayerfuseError(f"{place.folder / SUMMARY} lacks {error}") from error
    return _pngs(names, place.figures("figures"))


def _data_sizes(place: _Place) -> list[Path]:
    """The figure of a study over data sizes, and its page where the recipe is at hand."""
    report = read_report(place.folder / DATA_SIZES, _reader(SizesReport))
    draw_sizes(report.sizes, place.figures("figures"))
    written = _pngs(["data_sizes"], place.figures("figures"))
    # What the study is for stands in the recipes of its sizes alone.
    study_of_size = place.folder / report.sizes[0].folder
    if place.output is None and (study_of_size / "recipe.yaml").is_file():
        description = read_recipe(study_of_size).description
        written.append(write_sizes_page(report, description, place.folder))
    return written


def _similarity(place: _Place) -> list[Path]:
    report = read_report(place.folder / "similarity.json", SimilarityReport.from_json)
    return _pngs(draw_similarity(report, place.figures()), place.figures())


def _probe(place: _Place) -> list[Path]:
    report = read_report(place.folder / "probe.json", ProbeReport.from_json)
    names = []
    for probes in (report.mean, report.grid):
        draw_probe(probes, place.figures() / f"probe-{probes.kind}")
        names.append(f"probe-{probes.kind}")
    return _pngs(names, place.figures())


def _comparison(place: _Place) -> list[Path]:
    comparison = read_report(place.folder / COMPARISON, _reader(Comparison))
    return _pngs(draw_categories(comparison, place.figures()), place.figures())


def _guidance(place: _Place) -> list[Path]:
    report = read_report(place.folder / GUIDANCE, GuidanceReport.from_json)
    return _pngs(draw_guidance(report, place.figures()), place.figures())


def _inspection(place: _Place) -> list[Path]:
    """The figures of one answer, and its page."""
    inspection = load(place.folder)
    names = draw_answer(inspection, place.figures("figures"))
    written = _pngs(names, place.figures("figures"))
    if place.output is None:
        written.append(write_page(inspection, place.folder))
    return written


# Any: the class of the value that the function gives
def _reader(kind: Any) -> Callable[[dict[str, Any]], Any]:
    """What makes a dataclass, with all dataclasses in it, of a file's content."""
    adapter = TypeAdapter(kind)

    def read(content: dict[str, Any]) -> Any:
        try:
            return adapter.validate_python(content)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(str(part) for part in problem["loc"])
            raise ValueError(f"{where}: {problem['msg']}") from error

    return read


SOURCES: dict[str, Callable[[_Place], list[Path]]] = {
    RESULTS: _study,
    DATA_SIZES: _data_sizes,
    "similarity.json": _similarity,
    "probe.json": _probe,
    COMPARISON: _comparison,
    GUIDANCE: _guidance,
    FACTS: _inspection,
}
"""What figures are made from, and by what."""
