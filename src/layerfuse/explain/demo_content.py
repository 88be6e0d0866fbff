"""What the web page is made of, loaded and checked before it is served."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from layerfuse.evaluate.answer import LONGEST_ANSWER
from layerfuse.explain.demo_models import ShownModel, load_models, study_of, trained_questions
from layerfuse.explain.demo_pictures import PictureShelf, sample_pictures
from layerfuse.explain.demo_study import REPORT, read_similarity, study_frame
from layerfuse.look.similarity_report import SimilarityReport
from layerfuse.progress import Progress, silent


@dataclass(frozen=True)
class DemoContent:
    """What a page is made of.

    Attributes:
        models: one to four.
        shelf: the pictures.
        study: folder of the study whose report is shown, if any.
        similarity: how alike layers are, if it was measured.
        max_new_tokens: longest answer, in tokens.
    """

    models: Sequence[ShownModel]
    shelf: PictureShelf
    study: Path | None = None
    similarity: SimilarityReport | None = None
    max_new_tokens: int = LONGEST_ANSWER


def load_content(
    folders: Sequence[Path],
    *,
    study: Path | None = None,
    similarity: Path | None = None,
    max_new_tokens: int = LONGEST_ANSWER,
    progress: Progress = silent,
) -> DemoContent:
    """Load all that a page shows.

    Args:
        folders: of trained models, one to four.
        study: folder of the study whose report is shown; None finds that of the models.
        similarity: folder with a `similarity.json` to show; None looks into the study's.
        max_new_tokens: longest answer, in tokens.
        progress: told of every model that is loaded.

    Returns:
        What the page is made of.

    Raises:
        LayerfuseError: there are more than four models, or a folder holds no model, report or
            similarity, or the answers beside a model are damaged.
    """
    if study is None:
        study = study_of(folders)
        # A study that is not finished has no report yet.
        if study is not None and not (study / REPORT).is_file():
            study = None
    # What is looked at in a moment comes first: models may load for minutes.
    study_frame(study)
    measured = read_similarity(similarity, study)
    asked = trained_questions(folders)
    return DemoContent(
        models=load_models(folders, progress),
        shelf=PictureShelf(sample_pictures(asked)),
        study=study,
        similarity=measured,
        max_new_tokens=max_new_tokens,
    )
