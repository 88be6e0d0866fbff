"""What the web page tells beside the answers: the study's report, and how alike layers are."""

import base64
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory

from layerfuse.errors import LayerfuseError
from layerfuse.explain.demo_paths import page_without_paths
from layerfuse.look.figures import draw_similarity
from layerfuse.look.report_file import read_report
from layerfuse.look.similarity_report import SimilarityReport

REPORT = "report.html"
SIMILARITY = "similarity.json"
NO_STUDY = (
    "The models do not come from one study. <code>layerfuse study RECIPE</code> trains and "
    "compares arms; its report is shown here with <code>--study FOLDER</code>."
)
NO_SIMILARITY = (
    "Nothing was measured. <code>layerfuse similarity ENCODER</code> measures how alike the "
    "layers of an encoder are; it is shown here with <code>--similarity FOLDER</code>."
)


def study_frame(study: Path | None) -> str:
    """The report of a study inside the page, in a frame of its own.

    Args:
        study: its folder, or None.

    Returns:
        HTML.

    Raises:
        LayerfuseError: the study has no report, or it cannot be read.
    """
    if study is None:
        return f'<p class="lf-note">{NO_STUDY}</p>'
    file = study / REPORT
    try:
        report = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LayerfuseError(
            f"cannot read {file}: {error}. Give the folder of a study that has a {REPORT}: "
            "`layerfuse study` writes it"
        ) from error
    # As text of this page it needs no address, and so nothing else of the folder has one. Its
    # script sorts tables; without an origin it reaches nothing of this page.
    return (
        f'<iframe class="lf-report" title="Report of the study {escape(study.name)}" '
        f'sandbox="allow-scripts" srcdoc="{escape(page_without_paths(report))}"></iframe>'
    )


def read_similarity(folder: Path | None, study: Path | None) -> SimilarityReport | None:
    """Read how alike layers are.

    Args:
        folder: of what `layerfuse similarity` measured, or None.
        study: where it is looked for otherwise, if there is one.

    Returns:
        What was measured; None where there is nothing.

    Raises:
        LayerfuseError: the given folder has no `similarity.json`, or it is damaged.
    """
    if folder is not None:
        if not (folder / SIMILARITY).is_file():
            raise LayerfuseError(
                f"no {SIMILARITY} in {folder}: `layerfuse similarity ENCODER --output FOLDER` "
                "writes one"
            )
        return read_report(folder / SIMILARITY, SimilarityReport.from_json)
    if study is not None and (study / SIMILARITY).is_file():
        return read_report(study / SIMILARITY, SimilarityReport.from_json)
    return None


def similarity_figure(report: SimilarityReport | None) -> str:
    """The heat maps of layers against layers.

    Args:
        report: what was measured, if anything was.

    Returns:
        HTML.
    """
    if report is None:
        return f'<p class="lf-note">{NO_SIMILARITY}</p>'
    settings = report.settings
    # The name alone: an encoder may be a folder of this machine.
    encoder = escape(Path(settings.encoder).name)
    groups = report.measured.chosen_groups.groups
    named = "; ".join(", ".join(str(layer) for layer in group) for group in groups)
    with TemporaryDirectory(prefix="layerfuse-demo-") as folder:
        draw_similarity(report, Path(folder))
        drawn = (Path(folder) / "similarity.svg").read_bytes()
    address = base64.b64encode(drawn).decode("ascii")
    alt = (
        f"Four heat maps of how alike the {len(settings.layers)} layers of {encoder} are; "
        f"groups of layers that are alike: {named}"
    )
    return (
        f'<figure class="lf-similarity"><img alt="{alt}" src="data:image/svg+xml;base64,{address}">'
        f"<figcaption>Layers of {encoder} against each other, over "
        f"{report.measured.similarity.images:,} pictures; bright is alike. Groups of layers: "
        f"{named}.</figcaption></figure>"
    )
